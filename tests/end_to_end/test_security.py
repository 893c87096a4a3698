"""Who is refused: real SuperLink, gateway and nodes on 127.0.0.1, with keys by docker/scripts."""

import json
import os
import shutil
import socket
import ssl
import subprocess
import threading
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from ipaddress import IPv4Address
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.x509.oid import NameOID

from server_app.hospitals.registry import HOSPITALS_VARIABLE, HospitalsFile
from tests.deployment import GATEWAY, SCRIPTS
from tests.processes import COMMANDS, process, wait_for

REGISTER = (COMMANDS / "feddm-hospitals", "register", "hospitals", "hospital-a.pub", "hospital-a")
CADDY = shutil.which("caddy", path=str(COMMANDS))

pytestmark = pytest.mark.slow


@dataclass(frozen=True)
class Federation:
    folder: Path
    port: int
    environment: dict[str, str]

    def run(self, *command: str | Path, check: bool = True) -> "subprocess.CompletedProcess[str]":
        return subprocess.run(
            command,
            cwd=self.folder,
            env={**os.environ, **self.environment},
            capture_output=True,
            text=True,
            timeout=300,
            check=check,
        )

    def status_of(self, name: str) -> str:
        listed = self.run(COMMANDS / "feddm-hospitals", "list", "hospitals").stdout
        return next(line.split()[1] for line in listed.splitlines() if line.endswith(f" {name}"))

    @contextmanager
    def node(
        self, name: str, *arguments: str | Path, port: int
    ) -> Iterator[tuple["subprocess.Popen[bytes]", Path]]:
        """Run a SuperNode; give its process and its log."""
        log = self.folder / f"node-{name}.log"
        command = ["flower-supernode", "--superlink", f"127.0.0.1:{port}"]
        command += ["--port", str(free_port()), *map(str, arguments)]
        environment = {**self.environment, "FLWR_HOME": str(self.folder / f"home-{name}")}
        with process(
            [COMMANDS / command[0], *command[1:]], log=log, cwd=self.folder, env=environment
        ) as started:
            yield started, log


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def healthy(url: str, ca: Path) -> bool:
    with suppress(urllib.error.URLError, OSError):
        context = ssl.create_default_context(cafile=ca) if url.startswith("https") else None
        proxy = urllib.request.ProxyHandler({})
        opener = urllib.request.build_opener(proxy, urllib.request.HTTPSHandler(context=context))
        with opener.open(f"{url}/health", timeout=2) as answer:
            return bool(answer.status == 200)
    return False


@pytest.fixture(scope="module")
def federation(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Federation]:
    folder = tmp_path_factory.mktemp("federation")
    port = free_port()
    environment = {
        "FLWR_HOME": str(folder / "home"),
        "NO_PROXY": "127.0.0.1",
        "no_proxy": "127.0.0.1",
        "PATH": f"{COMMANDS}{os.pathsep}{os.environ['PATH']}",
        HOSPITALS_VARIABLE: str(folder / "known-hospitals"),
    }
    federation = Federation(folder, port, environment)
    federation.run(SCRIPTS / "make-ca.sh", folder)
    federation.run(SCRIPTS / "make-ca.sh", folder / "other")
    federation.run(SCRIPTS / "make-server-certificate.sh", folder, "127.0.0.1")
    for name in ("hospital-a", "stranger"):
        federation.run(SCRIPTS / "make-node-key.sh", folder, name)
    address = f"127.0.0.1:{port}"
    federation.run(SCRIPTS / "write-connection.sh", "hospitals", address, folder / "ca.crt")
    command = ["flower-superlink", "--host", "127.0.0.1", "--port", str(port)]
    command += ["--ssl-certfile", "server.pem", "--ssl-keyfile", "server.key"]
    command += ["--ssl-ca-certfile", "ca.crt", "--enable-supernode-auth"]
    command += ["--disable-runtime-dependency-installation", "--database", "state.db"]
    with process(
        [COMMANDS / command[0], *command[1:]],
        log=folder / "superlink.log",
        cwd=folder,
        env=environment,
    ):
        wait_for(
            lambda: healthy(f"https://{address}", folder / "ca.crt"),
            seconds=300,
            what="the SuperLink's health",
        )
        yield federation


@pytest.fixture(scope="module")
def registered(federation: Federation) -> str:
    """Register hospital-a; return what the command said."""
    return federation.run(*REGISTER).stdout


@contextmanager
def presenting(certificate: Path, key: Path) -> Iterator[int]:
    """Serve TLS with a certificate on a free port."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate, key)
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def serve() -> None:
            with suppress(OSError):
                while True:
                    connection, _ = listener.accept()
                    with suppress(OSError):
                        context.wrap_socket(connection, server_side=True).close()

        threading.Thread(target=serve, daemon=True).start()
        yield int(listener.getsockname()[1])


def sign(folder: Path, name: str, *, host: x509.GeneralName, ended: bool) -> Path:
    """Sign a certificate for the server's key that the script would not make."""
    authority = x509.load_pem_x509_certificate((folder / "ca.crt").read_bytes())
    signer = serialization.load_pem_private_key((folder / "ca.key").read_bytes(), None)
    key = serialization.load_pem_private_key((folder / "server.key").read_bytes(), None)
    now = datetime.now(UTC)
    builder = x509.CertificateBuilder(
        issuer_name=authority.subject,
        subject_name=x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)]),
        public_key=key.public_key(),
        serial_number=x509.random_serial_number(),
        not_valid_before=now - timedelta(days=2),
        not_valid_after=now + timedelta(days=-1 if ended else 1),
        extensions=[
            x509.Extension(extension.oid, False, extension)
            for extension in (
                x509.SubjectAlternativeName([host]),
                x509.AuthorityKeyIdentifier.from_issuer_public_key(authority.public_key()),
            )
        ],
    )
    certificate = builder.sign(signer, hashes.SHA384())  # type: ignore[arg-type]
    path = folder / f"{name}.pem"
    path.write_bytes(certificate.public_bytes(serialization.Encoding.PEM))
    return path


def test_registering_twice_names_the_same_node(federation: Federation, registered: str) -> None:
    fingerprint = federation.run("ssh-keygen", "-l", "-f", "hospital-a.pub").stdout.split()[1]
    node = registered.split()[1]
    assert registered == f"SuperNode {node} is registered: hospital-a with {fingerprint}\n"
    again = federation.run(*REGISTER).stdout
    assert again == f"SuperNode {node} was registered before: hospital-a with {fingerprint}\n"
    (known,) = HospitalsFile(federation.folder / "known-hospitals").hospitals().values()
    assert (known.name, known.fingerprint, known.nodes) == ("hospital-a", fingerprint, (int(node),))


def test_key_that_was_removed_is_never_let_in_again(federation: Federation) -> None:
    federation.run(SCRIPTS / "make-node-key.sh", federation.folder, "gone")
    command = (*REGISTER[:3], "gone.pub", "hospital-gone")
    node = federation.run(*command).stdout.split()[1]
    said = federation.run(COMMANDS / "feddm-hospitals", "remove", "hospitals", node).stdout
    assert said.startswith(f"SuperNode {node} is removed: hospital-gone with SHA256:")
    assert federation.status_of("hospital-gone") == "unregistered"
    again = federation.run(*command, check=False)
    assert again.returncode == 1 and "must be of a key that was not removed" in again.stderr
    # Nor by what lets everybody in again.
    restored = federation.run(COMMANDS / "feddm-hospitals", "restore", "hospitals").stdout
    assert "hospital-gone" not in restored
    assert federation.status_of("hospital-gone") == "unregistered"


def test_removed_key_of_an_older_database_is_unregistered_with_the_restoring(
    federation: Federation, registered: str
) -> None:
    federation.run(SCRIPTS / "make-node-key.sh", federation.folder, "revived")
    federation.run(*REGISTER[:3], "revived.pub", "hospital-revived")
    file = HospitalsFile(federation.folder / "known-hospitals")
    (known,) = [each for each in file.hospitals().values() if each.name == "hospital-revived"]
    with file.held():
        file.add(replace(known, removed=True))
    said = federation.run(COMMANDS / "feddm-hospitals", "restore", "hospitals").stdout
    assert f"SuperNode {known.nodes[0]} is removed: hospital-revived with" in said
    assert f"SuperNode {registered.split()[1]} was registered before: hospital-a" in said
    assert federation.status_of("hospital-revived") == "unregistered"


def test_key_that_flower_unregistered_is_taken_note_of(federation: Federation) -> None:
    federation.run(SCRIPTS / "make-node-key.sh", federation.folder, "flowers")
    command = (*REGISTER[:3], "flowers.pub", "hospital-f")
    node = federation.run(*command).stdout.split()[1]
    federation.run(COMMANDS / "flwr", "supernode", "unregister", node, "hospitals")
    assert federation.run(*command, check=False).returncode == 1
    file = HospitalsFile(federation.folder / "known-hospitals")
    assert [each.removed for each in file.hospitals().values() if each.name == "hospital-f"] == [
        True
    ]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("register", "hospitals", "hospital-a", "a"), "must be a public key by make-node-key.sh"),
        (("register", "hospitals", "hospital-a.pub", "a\nb"), "NAME must be 1 to 100 printable"),
        (("register", "hospitals", "stranger.pub", "hospital-a"), "NAME must be of one hospital"),
        (("register", "nowhere", "hospital-a.pub", "a"), "nowhere"),
        (("remove", "hospitals", "4711"), "NODE must be the id of a node"),
        (("list", "hospitals", "."), "RUN must be the folder of a run"),
        (("restore", "hospitals", "--file", "none"), "--file must name registered hospitals"),
    ],
)
def test_wrong_words_are_refused_in_words(
    federation: Federation, registered: str, words: tuple[str, ...], message: str
) -> None:
    assert registered
    refused = federation.run(COMMANDS / "feddm-hospitals", *words, check=False)
    assert refused.returncode != 0 and message in refused.stderr, refused.stderr
    assert "Traceback" not in refused.stderr


@pytest.fixture(scope="module")
def refusals(federation: Federation, registered: str) -> dict[str, tuple[int, str]]:
    """Start all that must be refused at once; return exit status and output of each."""
    folder = federation.folder
    here, there = x509.IPAddress(IPv4Address("127.0.0.1")), x509.DNSName("other.test")
    expired = sign(folder, "expired", host=here, ended=True)
    other = sign(folder, "other", host=there, ended=False)
    ours, key = ["--root-certificates", "ca.crt"], "--auth-supernode-private-key"
    with ExitStack() as stack:
        late = stack.enter_context(presenting(expired, folder / "server.key"))
        elsewhere = stack.enter_context(presenting(other, folder / "server.key"))
        started = {
            name: stack.enter_context(federation.node(name, *arguments, port=port))
            for name, arguments, port in [
                ("stranger", [*ours, key, "stranger"], federation.port),
                ("keyless", ours, federation.port),
                (
                    "wrong-ca",
                    ["--root-certificates", "other/ca.crt", key, "hospital-a"],
                    federation.port,
                ),
                ("expired", [*ours, key, "hospital-a"], late),
                ("other-name", [*ours, key, "hospital-a"], elsewhere),
            ]
        }
        return {
            name: (node.wait(120), log.read_text(errors="replace"))
            for name, (node, log) in started.items()
        }


@pytest.mark.parametrize(
    ("node", "cause"),
    [
        ("stranger", "[code: 2004] Failed to activate SuperNode"),
        ("wrong-ca", "unable to get local issuer certificate"),
        ("expired", "certificate has expired"),
        ("other-name", "certificate is not valid for '127.0.0.1'"),
    ],
)
def test_refused_node_ends_with_its_cause(
    refusals: dict[str, tuple[int, str]], node: str, cause: str
) -> None:
    status, output = refusals[node]
    assert status == 1 and cause in output


def test_superlink_says_what_a_strangers_node_does_not(
    federation: Federation, refusals: dict[str, tuple[int, str]]
) -> None:
    assert refusals["stranger"][0] == 1
    log = (federation.folder / "superlink.log").read_text()
    assert "No SuperNode found with the given public key" in log


def test_node_without_a_key_never_gets_in(refusals: dict[str, tuple[int, str]]) -> None:
    status, output = refusals["keyless"]
    assert status != 0 and "SuperNode ID" not in output


@contextmanager
def gateway(federation: Federation) -> Iterator[int]:
    if CADDY is None:
        pytest.skip("the gateway's program is not installed: uv sync --group deployment")
    port, health = free_port(), free_port()
    environment = {
        "SUPERLINK": f"127.0.0.1:{federation.port}",
        "CERTIFICATES": str(federation.folder),
        "GATEWAY_HOST": "127.0.0.1",
        "GATEWAY_PORT": str(port),
        "HEALTH_PORT": str(health),
    }
    with process(
        [CADDY, "run", "--adapter", "caddyfile", "--config", GATEWAY],
        log=federation.folder / "gateway.log",
        cwd=federation.folder,
        env=environment,
    ):
        wait_for(
            lambda: healthy(f"http://127.0.0.1:{health}", federation.folder / "ca.crt"),
            seconds=300,
            what="the gateway's health",
        )
        yield port


def test_gateway_lets_nodes_in_and_nothing_else(federation: Federation, registered: str) -> None:
    with ExitStack() as stack:
        port = stack.enter_context(gateway(federation))
        context = ssl.create_default_context(cafile=federation.folder / "ca.crt")
        for path in [
            "/v1/control/list-runs",
            "/v1/fleet/../control/list-runs",
            "/v1/fleet/%2e%2e/control/list-runs",
            "/v1/fleet/..%2fcontrol/list-runs",
            "//v1/control/list-runs",
            "/v1/runtime/acquire-task",
            "/health",
        ]:
            assert answer_to(path, port, context) == 403, path
        # The SuperLink's own answer to a request of no known type.
        assert answer_to("/v1/fleet/pull-messages", port, context) == 415
        assert answer_to("/v1/control/list-runs", federation.port, context) == 415

        address = f"127.0.0.1:{port}"
        authority = federation.folder / "ca.crt"
        federation.run(SCRIPTS / "write-connection.sh", "through-gateway", address, authority)
        listed = federation.run(COMMANDS / "flwr", "list", "through-gateway", check=False)
        assert listed.returncode == 1 and "403 Forbidden" in listed.stdout + listed.stderr

        arguments = ["--root-certificates", "ca.crt", "--auth-supernode-private-key", "hospital-a"]
        _, log = stack.enter_context(federation.node("hospital-a", *arguments, port=port))
        wait_for(lambda: "SuperNode ID" in log.read_text(), seconds=300, what="the node's start")
        assert federation.status_of("hospital-a") == "online"


def test_gateway_refuses_bodies_that_no_message_has(federation: Federation) -> None:
    with gateway(federation) as port:
        context = ssl.create_default_context(cafile=federation.folder / "ca.crt")
        path = "/v1/fleet/push-object"
        # The SuperLink's own answer to a whole body of no known node.
        assert answer_to(path, port, context, num_bytes=6 << 20) in (400, 401)
        assert answer_to(path, port, context, num_bytes=12 << 20) == 413
        # The list of a reply's pieces.
        path = "/v1/fleet/push-messages"
        assert answer_to(path, port, context, num_bytes=7 << 10) in (400, 401)
        assert answer_to(path, port, context, num_bytes=9 << 10) == 413


def test_list_of_nodes_tells_the_client_numbers_of_a_run(
    federation: Federation, registered: str, tmp_path: Path
) -> None:
    node = registered.split()[1]
    for numbers, expected in (({node: 3}, "hospital-a client 3"), ({"4711": 0}, "hospital-a -")):
        (tmp_path / "nodes.json").write_text(json.dumps(numbers))
        listed = federation.run(COMMANDS / "feddm-hospitals", "list", "hospitals", tmp_path)
        assert [line for line in listed.stdout.splitlines() if line.endswith(f" {expected}")]


def answer_to(path: str, port: int, context: ssl.SSLContext, *, num_bytes: int = 0) -> int:
    """Post zeros to a path as it is written, dots and slashes included; return the status."""
    kind = "Content-Type: application/protobuf\r\n" if num_bytes else ""
    request = (
        f"POST {path} HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Length: {num_bytes}\r\n{kind}\r\n"
    )
    with (
        socket.create_connection(("127.0.0.1", port), timeout=30) as plain,
        context.wrap_socket(plain, server_hostname="127.0.0.1") as secure,
    ):
        secure.sendall(request.encode())
        # Whoever refuses a body may close before its end.
        with suppress(ConnectionError, ssl.SSLError):
            secure.sendall(bytes(num_bytes))
        return int(secure.recv(64).split()[1])
