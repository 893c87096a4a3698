"""A SuperLink of one's own for a simulation, started and stopped with the job."""

import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from task.processes import end_with_parent

START_TIMEOUT_SECONDS = 60.0
STOP_TIMEOUT_SECONDS = 3.0
CONNECTION = "feddm"
WATCH_SECONDS = 2.0
SUBMITTER_VARIABLE = "FEDDM_SUBMITTER_PID"


@dataclass(frozen=True)
class SuperLink:
    """A running SuperLink.

    Attributes:
        folder: an empty working directory, gone afterwards.
        environment: variables with which `flwr` talks to it, under the name `CONNECTION`.
    """

    folder: Path
    environment: dict[str, str]


@contextmanager
def private_superlink() -> Iterator[SuperLink]:
    """Start a SuperLink for simulations on a free port of 127.0.0.1, and end it with the block.

    It runs in an empty directory, so that Ray's workers load the app's code from the bundle and
    from nowhere else, and uses the environment that it is started in.

    Raises:
        RuntimeError: it did not start.
    """
    folder = Path(tempfile.mkdtemp(prefix="feddm-"))
    port = free_port()
    environment = {
        **os.environ,
        SUBMITTER_VARIABLE: str(os.getpid()),
        "FLWR_HOME": str(folder / "flwr"),
        "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
        "FLWR_DISABLE_UPDATE_CHECK": "1",
        "FLWR_TELEMETRY_ENABLED": os.environ.get("FLWR_TELEMETRY_ENABLED", "0"),
        # A proxy is for what lies outside, and Flower's commands would go through it.
        "NO_PROXY": ",".join(filter(None, [os.environ.get("NO_PROXY"), "127.0.0.1"])),
        "no_proxy": ",".join(filter(None, [os.environ.get("no_proxy"), "127.0.0.1"])),
        # The commands of this environment come first, whatever the shell has found.
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}",
    }
    (folder / "flwr").mkdir()
    (folder / "flwr" / "config.toml").write_text(
        f'[superlink]\ndefault = "{CONNECTION}"\n\n'
        f'[superlink.{CONNECTION}]\naddress = "127.0.0.1:{port}"\ninsecure = true\n',
        encoding="utf-8",
    )
    (folder / "empty").mkdir()
    output = folder / "superlink.log"
    command = ["flower-superlink", "--insecure", "--simulation", "--isolation", "subprocess"]
    command += ["--host", "127.0.0.1", "--port", str(port)]
    with output.open("wb") as file:
        process = subprocess.Popen(
            [shutil.which(command[0], path=environment["PATH"]) or command[0], *command[1:]],
            cwd=folder / "empty",
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            # One that is only asked to end waits for its run; its own children watch its pid.
            preexec_fn=end_with_parent,
        )
    try:
        wait_until_healthy(process, port, output)
        yield SuperLink(folder, environment)
    finally:
        stop(process)
        shutil.rmtree(folder, ignore_errors=True)


def end_with_submitter() -> None:
    """Kill this process when the one that started its private SuperLink is gone.

    Flower's simulation outlives its SuperLink, so the ServerApp has to look for itself. Without
    a private SuperLink it does nothing.
    """
    pid = os.environ.get(SUBMITTER_VARIABLE)
    if pid is not None:
        threading.Thread(target=_watch, args=(int(pid),), daemon=True).start()


def _watch(pid: int) -> None:
    while True:
        try:
            os.kill(pid, 0)
        except ProcessLookupError:
            os.kill(os.getpid(), signal.SIGKILL)
        time.sleep(WATCH_SECONDS)


def free_port() -> int:
    """Return a port of 127.0.0.1 that nothing listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def wait_until_healthy(process: "subprocess.Popen[bytes]", port: int, output: Path) -> None:
    """Wait until a SuperLink answers.

    Raises:
        RuntimeError: it ended, or did not answer in time; with the end of its output.
    """
    deadline = time.monotonic() + START_TIMEOUT_SECONDS
    direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    while process.poll() is None and time.monotonic() < deadline:
        try:
            with direct.open(f"http://127.0.0.1:{port}/health", timeout=1):
                return
        except (urllib.error.URLError, OSError):
            time.sleep(0.2)
    tail = output.read_text(encoding="utf-8", errors="replace")[-2000:]
    raise RuntimeError(f"Flower's SuperLink did not start on port {port}:\n{tail}")


def stop(process: "subprocess.Popen[bytes]") -> None:
    """End a process and everything in its session."""
    process.terminate()
    with suppress(subprocess.TimeoutExpired):
        process.wait(STOP_TIMEOUT_SECONDS)
    # Its children may still train; they are of its session, and nothing in it is worth saving.
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
