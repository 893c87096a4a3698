"""`feddm check-node`, on real images, real certificates of openssl and a real TLS server."""

import signal
import socket
import ssl
import subprocess
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import UTC, datetime, timedelta
from importlib.metadata import version
from math import sqrt
from pathlib import Path

import pytest
from click.testing import Result
from typer.testing import CliRunner

from task.cli import training_trial as trial_step
from task.cli.check_key import check_private_key
from task.cli.check_node import NodeCheck, describe_trial, expected_round
from task.cli.check_superlink import check_superlink
from task.cli.main import app
from task.cli.training_trial import Trial, in_own_process
from task.config import load_config
from task.protocol.node import NodeConfig, own_config
from task.protocol.secure_aggregation.keys import load_identity
from tests.data.test_data_files import write_tree

SMALL = ("model=tiny", "model.width=4", "train.batch_size=4", "train.precision=float32")


def feddm(*words: object) -> Result:
    return CliRunner().invoke(app, [str(word) for word in words])


def test_patients_are_counted_and_their_table_is_named(tmp_path: Path) -> None:
    write_tree(tmp_path / "set", {"a": 20, "b": 10})
    files = sorted((tmp_path / "set").rglob("*.png"))
    rows = [f"{file.relative_to(tmp_path / 'set')},jane{file.stem[-1]}" for file in files]
    (tmp_path / "p.csv").write_text("\n".join(["file,patient", *rows]), encoding="utf-8")
    said: list[str] = []
    words = ["data=image_folder", "data.classes=[a,b]", f"data.cache_dir={tmp_path}/cache"]
    node = NodeConfig(str(tmp_path / "set"), patients=str(tmp_path / "p.csv"))
    check = NodeCheck(own_config(load_config(words), node), node, said.append)
    check.section("images", check.data())
    assert not check.problems
    text = "\n".join(map(str, said))
    assert text.count("the images are of 10 patients (9 to train on, 1 to test with)") == 1
    assert "jane" not in text


def run(*command: object) -> str:
    words = [str(word) for word in command]
    return subprocess.run(words, check=True, capture_output=True, text=True).stdout


class Authority:
    """A certificate authority of openssl's own; every certificate has the same key."""

    def __init__(self, folder: Path, name: str) -> None:
        folder.mkdir()
        self._folder, self.certificate, self.key = folder, folder / "ca.crt", folder / "key"
        run("openssl", "ecparam", "-genkey", "-name", "prime256v1", "-noout", "-out", self.key)
        subject = ("-key", self.key, "-subj", f"/CN={name}")
        run("openssl", "req", "-x509", *subject, "-days", 100, "-out", self.certificate)
        run("openssl", "req", "-new", *subject, "-out", folder / "request")
        (folder / "index").touch()
        (folder / "config").write_text(
            f"[ca]\ndefault_ca=own\n[own]\ndatabase={folder}/index\nnew_certs_dir={folder}\n"
            f"rand_serial=yes\ndefault_md=sha256\nunique_subject=no\npolicy=any\n"
            "[any]\ncommonName=supplied\n"
        )

    def sign(self, names: str, *, first: int, last: int) -> Path:
        """Sign a certificate for these names, valid between so many days from now."""
        (self._folder / "extensions").write_text(f"subjectAltName={names}\n")
        now = datetime.now(UTC)
        dates = [(now + timedelta(days)).strftime("%Y%m%d%H%M%SZ") for days in (first, last)]
        signed = self._folder / "signed.crt"
        run(
            *("openssl", "ca", "-batch", "-config", self._folder / "config", "-notext"),
            *("-cert", self.certificate, "-keyfile", self.key, "-subj", "/CN=superlink"),
            *(
                "-startdate",
                dates[0],
                "-enddate",
                dates[1],
                "-extfile",
                self._folder / "extensions",
            ),
            *("-in", self._folder / "request", "-out", signed),
        )
        return signed


@pytest.fixture(scope="module")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    return Authority(tmp_path_factory.mktemp("ca") / "own", "the coordinator")


@contextmanager
def listening(certificate: Path | None, key: Path | None) -> Iterator[str]:
    """Serve one connection on 127.0.0.1, with TLS or, without a certificate, in plain words."""
    with socket.create_server(("127.0.0.1", 0)) as server:

        def answer() -> None:
            connection, _ = server.accept()
            with connection:
                if certificate is None:
                    connection.recv(100)
                    connection.sendall(b"HTTP/1.0 400 Bad Request\r\n\r\n")
                    return
                context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
                context.load_cert_chain(certificate, key)
                try:
                    context.wrap_socket(connection, server_side=True).close()
                except OSError:
                    return  # the client does not like the certificate

        thread = threading.Thread(target=answer)
        thread.start()
        yield f"127.0.0.1:{server.getsockname()[1]}"
        thread.join(30)
        assert not thread.is_alive()


HERE = "IP:127.0.0.1"


def test_superlink_with_a_good_certificate_is_trusted(authority: Authority) -> None:
    certificate = authority.sign(HERE, first=-1, last=60)
    with listening(certificate, authority.key) as address:
        found = dict(check_superlink(address, authority.certificate))
    assert "WARNING" not in found
    assert "trusted, for 127.0.0.1" in found["certificate"] and "(59 days)" in found["certificate"]


@contextmanager
def proxy(answer: bytes, to: str) -> Iterator[str]:
    """Answer CONNECT in this way, and carry on to an address; gives where it listens."""
    host, _, port = to.rpartition(":")
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def carry(source: socket.socket, sink: socket.socket) -> None:
            with suppress(OSError):
                while piece := source.recv(1 << 16):
                    sink.sendall(piece)

        def serve() -> None:
            with suppress(OSError):
                near, _ = listener.accept()
                asked.append(near.recv(1 << 16))
                near.sendall(answer)
                far = socket.create_connection((host, int(port)))
                threading.Thread(target=carry, args=(far, near), daemon=True).start()
                carry(near, far)

        asked: list[bytes] = []
        threading.Thread(target=serve, daemon=True).start()
        yield f"127.0.0.1:{listener.getsockname()[1]}"
        assert asked and asked[0].startswith(f"CONNECT {to} HTTP/1.".encode())
        assert b"Proxy-Authorization: Basic bmFtZTpwIHc=\r\n" in asked[0]


def test_proxy_is_gone_through_as_a_node_does(
    authority: Authority, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("no_proxy", "NO_PROXY", "https_proxy", "HTTPS_PROXY"):
        monkeypatch.delenv(name, raising=False)
    certificate = authority.sign(HERE, first=-1, last=60)
    with (
        listening(certificate, authority.key) as address,
        proxy(b"HTTP/1.1 200 Connection established\r\n\r\n", address) as place,
    ):
        monkeypatch.setenv("https_proxy", f"http://name:p%20w@{place}")
        found = dict(check_superlink(address, authority.certificate))
    assert found["proxy"] == f"{place}, of HTTPS_PROXY" and "trusted" in found["certificate"]
    with proxy(b"HTTP/1.1 403 Forbidden\r\n\r\n", address) as place:
        monkeypatch.setenv("https_proxy", f"name:p%20w@{place}")
        with pytest.raises(OSError, match=rf"the proxy {place} does not lead there .*403"):
            dict(check_superlink(address, authority.certificate))
    monkeypatch.setenv("https_proxy", "socks5://127.0.0.1:1")
    with pytest.raises(ValueError, match="HTTPS_PROXY must be http://HOST:PORT"):
        dict(check_superlink(address, authority.certificate))
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    with listening(certificate, authority.key) as address:
        assert "proxy" not in dict(check_superlink(address, authority.certificate))


def test_certificate_that_ends_soon_is_warned_of(authority: Authority) -> None:
    certificate = authority.sign(HERE, first=-1, last=29)
    with listening(certificate, authority.key) as address:
        found = dict(check_superlink(address, authority.certificate))
    assert "it ends in 28 days" in found["WARNING"]


@pytest.mark.parametrize(
    ("names", "first", "last", "expected"),
    [
        (HERE, -9, -1, "a certificate has expired"),
        (HERE, 1, 9, "a certificate is not yet valid"),
        ("DNS:superlink.example.org", -1, 60, "the certificate is of another host"),
    ],
)
def test_bad_certificates_are_told_apart(
    names: str, first: int, last: int, expected: str, authority: Authority
) -> None:
    certificate = authority.sign(names, first=first, last=last)
    with listening(certificate, authority.key) as address, pytest.raises(OSError, match=expected):
        dict(check_superlink(address, authority.certificate))


def test_certificate_of_another_authority_is_not_trusted(
    authority: Authority, tmp_path: Path
) -> None:
    other = Authority(tmp_path / "other", "somebody else")
    certificate = authority.sign(HERE, first=-1, last=60)
    for trusted in (other.certificate, None):
        with (
            listening(certificate, authority.key) as address,
            pytest.raises(OSError, match="of an unknown authority"),
        ):
            dict(check_superlink(address, trusted))


def test_what_is_no_superlink_is_named(authority: Authority, tmp_path: Path) -> None:
    with listening(None, None) as address, pytest.raises(OSError, match="does not speak TLS"):
        dict(check_superlink(address, authority.certificate))
    with pytest.raises(OSError, match="refused, nothing listens there"):  # the port is free again
        dict(check_superlink(address, authority.certificate))
    with pytest.raises(OSError, match="no such host name"):
        dict(check_superlink("superlink.invalid:443", authority.certificate))
    with pytest.raises(FileNotFoundError, match="there is no file"):
        dict(check_superlink(address, tmp_path / "missing"))
    with pytest.raises(ValueError, match="must be certificates in PEM format"):
        dict(check_superlink(address, authority.key))
    for wrong in ("superlink", "superlink:0", ":443", "https://superlink:443"):
        with pytest.raises(ValueError, match="--superlink must be HOST:PORT"):
            dict(check_superlink(wrong, authority.certificate))


def made_key(file: Path, *options: object) -> Path:
    words = options or ("-t", "ecdsa", "-b", 384)
    passphrase = () if "-N" in words else ("-N", "")
    run("ssh-keygen", "-q", *words, *passphrase, "-f", file)
    return file


def test_fingerprint_is_that_of_ssh_keygen(tmp_path: Path) -> None:
    file = made_key(tmp_path / "key")
    size, fingerprint, *_ = run("ssh-keygen", "-lf", file).split()
    assert dict(check_private_key(file))["private key"] == f"{size} {fingerprint} (ECDSA)"


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (("-t", "ed25519"), "must be an EC key, such as P-384, got Ed25519PrivateKey"),
        (("-t", "ecdsa", "-N", "secret"), "must have no passphrase"),
        (("-t", "ecdsa", "-m", "PEM"), "in the format of OpenSSH"),
    ],
)
def test_keys_that_flower_does_not_take_are_refused(
    options: tuple[str, ...], expected: str, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=expected):
        dict(check_private_key(made_key(tmp_path / "key", *options)))


def test_key_must_be_private_in_both_senses(tmp_path: Path) -> None:
    file = made_key(tmp_path / "key")
    with pytest.raises(ValueError, match="must be a private key"):
        dict(check_private_key(tmp_path / "key.pub"))
    file.chmod(0o640)
    with pytest.raises(ValueError, match=r"readable for its owner alone: chmod 600 .*'mode 640'"):
        dict(check_private_key(file))


def test_node_that_can_take_part_is_told_all_about_itself(tmp_path: Path) -> None:
    write_tree(tmp_path / "set", {"Normal": 20, "pneumonia": 10})
    (tmp_path / "out").mkdir()
    result = feddm(
        *("check-node", "--data-path", tmp_path / "set", "--output-path", tmp_path / "out"),
        *("--min-images", 27, "data=image_folder", "data.classes=[normal,pneumonia,covid]"),
        *(f"data.cache_dir={tmp_path / 'cache'}", *SMALL, "train.local_epochs=2"),
    )
    assert result.exit_code == 0, result.output
    printed = " ".join(result.stdout.split())
    for words in (
        "normal 18 2 0 pneumonia 9 1 0 covid (none here) 0 0 0 all 27 3 0",
        "original sizes min 8x8, median 8x8, max 8x8 (width x height); the model sees 32x32",
        "unreadable files 0",
        "free, output-path",
        f"fingerprint {load_identity(tmp_path / 'out/.privacy/peers').public.fingerprint}, to tell",
        "for 4 images in float32, processes: 1; it fits",
        "2 epochs of 27 images",
        "this node can take part",
        f"flwr {version('flwr')}",
    ):
        assert words in printed
    assert printed.count("30 images are used") == 1


def test_every_problem_is_listed_before_the_first_is_named(tmp_path: Path) -> None:
    write_tree(tmp_path / "set", {"a": 3})
    (tmp_path / "set" / "a" / "001.png").write_bytes(b"cut off")
    said: list[str] = []
    words = ["data=image_folder", "data.classes=[a]", f"data.cache_dir={tmp_path / 'cache'}"]
    node = NodeConfig(str(tmp_path / "set"), output_path=str(tmp_path / "none"))
    check = NodeCheck(own_config(load_config(words), node), node, said.append)
    check.section("images", check.data())
    check.section("disks", check.places())
    corrupt, output = check.problems
    assert corrupt.startswith("1 image files cannot be read") and "001.png" in corrupt
    assert "it is damaged, or no PNG" in corrupt
    assert output.startswith("output-path must be a folder")
    assert "001.png" in "\n".join(said) and "original sizes" in "\n".join(said)


def test_node_without_held_out_images_is_told(tmp_path: Path) -> None:
    write_tree(tmp_path / "set", {"a": 1})
    words = ["data=image_folder", "data.classes=[a]", f"data.cache_dir={tmp_path / 'cache'}"]
    node = NodeConfig(str(tmp_path / "set"))
    check = NodeCheck(own_config(load_config(words), node), node, print)
    assert str(dict(check.data())["held out"]).startswith("none")


def test_node_that_cannot_take_part_ends_with_one_line_and_status_1(tmp_path: Path) -> None:
    write_tree(tmp_path / "set", {"a": 3, "odd": 1})
    words = ("data=image_folder", "data.classes=[a]", f"data.cache_dir={tmp_path / 'cache'}")
    # So large that the trial ends at once.
    too_large = (*SMALL, f"train.batch_size={10**10}")
    result = feddm("check-node", "--data-path", tmp_path / "set", *words, *too_large)
    assert result.exit_code == 1
    assert result.stderr.startswith("feddm: this node cannot take part yet: data.classes must name")
    assert "'odd'" in result.stderr and "(and 1 more, see above)" in result.stderr
    assert result.stderr.count("\n") == 1
    assert "a training step does not fit into the memory" in " ".join(result.stdout.split())


@pytest.mark.parametrize(
    ("death", "how", "oom_kills", "raised", "said"),
    [
        (signal.raise_signal, signal.SIGSEGV, [0], RuntimeError, "SIGSEGV: a library or a driver"),
        (signal.raise_signal, signal.SIGKILL, [7, 7], RuntimeError, "ended by SIGKILL: try again"),
        (signal.raise_signal, signal.SIGKILL, [7, 8], MemoryError, "has killed the process"),
        (sqrt, -1, [0], ValueError, "math domain"),
    ],
)
def test_death_of_a_trial_is_one_of_memory_only_where_the_system_says_so(
    monkeypatch: pytest.MonkeyPatch,
    death: Callable[[int], object],
    how: int,
    oom_kills: list[int],
    raised: type[Exception],
    said: str,
) -> None:
    monkeypatch.setattr(trial_step, "oom_kills", lambda: oom_kills.pop(0))
    with pytest.raises(raised, match=said):
        in_own_process(death, how)


def test_round_that_takes_too_long_is_a_problem() -> None:
    trial = Trial(seconds=2.0, batch_size=10, precision="float32", num_processes=1, peak_memory=0)
    words = ["data=digits", "train.local_epochs=3", "federation.round_timeout=60"]
    config = load_config(words)
    [(_, said)] = expected_round(config, trial, 100)
    assert said == "60 s: 3 epochs of 100 images"
    with pytest.raises(ValueError, match=r"round_timeout=60 s is over before .* about 61 s"):
        list(expected_round(config, trial, 101))


@pytest.mark.parametrize(
    ("num_processes", "peak_memory", "said"),
    [(1, 3 * 2**30, "it fits, 3.0 GiB at its peak"), (2, None, "processes: 2; it fits")],
)
def test_peak_memory_is_said_only_of_one_process(
    num_processes: int, peak_memory: int | None, said: str
) -> None:
    trial = Trial(2.0, 10, "float32", num_processes, peak_memory)
    assert describe_trial(trial).endswith(said)
