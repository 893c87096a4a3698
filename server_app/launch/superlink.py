"""A SuperLink of one's own for a simulation, started and stopped with the job."""

import os
import shlex
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

import psutil

from server_app.launch.flwr_command import local_environment
from task.processes import end_with_parent

START_TIMEOUT_SECONDS = 60.0
STOP_TIMEOUT_SECONDS = 3.0
REMOVAL_SECONDS = 10.0
CONNECTION = "feddm"
WATCH_SECONDS = 2.0
SUBMITTER_VARIABLE = "FEDDM_SUBMITTER_PID"
FLOWER_PROCESS = Path(__file__).with_name("flower_process.py")
ENDING_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
# Ray's sockets lie 68 characters below its folder, and may have paths of 107.
LONGEST_FOLDER = 38


@dataclass(frozen=True)
class SuperLink:
    """A running SuperLink.

    Attributes:
        folder: its own, gone afterwards. Flower's commands are run in it: elsewhere they take the
            name of a connection for a path, where an app lies in a folder of that name.
        environment: variables with which `flwr` talks to it, under the name `CONNECTION`.
        output: file with what it wrote.
        status_file: written at the end of the simulation's process, with its exit status.
    """

    folder: Path
    environment: dict[str, str]
    output: Path
    status_file: Path


@contextmanager
def private_superlink() -> Iterator[SuperLink]:
    """Start a SuperLink for simulations on a free port of 127.0.0.1, and end it with the block.

    It runs in an empty directory, so that Ray's workers load the app's code from the bundle and
    from nowhere else, and uses the environment that it is started in.

    Raises:
        RuntimeError: it did not start.
    """
    folder, port = private_folder(), free_port()
    environment = private_environment(folder)
    (folder / "flwr").mkdir()
    (folder / "flwr" / "config.toml").write_text(
        f'[superlink]\ndefault = "{CONNECTION}"\n\n'
        f'[superlink.{CONNECTION}]\naddress = "127.0.0.1:{port}"\ninsecure = true\n',
        encoding="utf-8",
    )
    (folder / "empty").mkdir()
    (folder / "bin").mkdir()
    simulation, status_file = folder / "bin" / "flwr-simulation", folder / "simulation.status"
    command = shlex.join(patient("flwr-simulation"))
    status = shlex.quote(str(status_file))
    simulation.write_text(f'#!/bin/sh\n{command} "$@"\necho $? > {status}\n', encoding="utf-8")
    simulation.chmod(0o700)
    output = folder / "superlink.log"
    options = ["--insecure", "--simulation", "--isolation", "subprocess"]
    options += ["--host", "127.0.0.1", "--port", str(port)]
    with output.open("wb") as file:
        process = subprocess.Popen(
            [*patient("flower-superlink"), *options],
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
        yield SuperLink(folder, environment, output, status_file)
    finally:
        with uninterrupted():
            stop(process)
            _remove_folder(folder)


def _remove_folder(folder: Path) -> None:
    """Remove a folder into which processes of Ray that are ending may still write."""
    deadline = time.monotonic() + REMOVAL_SECONDS
    shutil.rmtree(folder, ignore_errors=True)
    while folder.exists() and time.monotonic() < deadline:
        time.sleep(0.1)
        shutil.rmtree(folder, ignore_errors=True)


def private_folder() -> Path:
    """Make an empty folder whose path is short enough for the sockets of a Ray in it."""
    folder = Path(tempfile.mkdtemp(prefix="feddm-"))
    if len(os.fsencode(folder)) > LONGEST_FOLDER:
        folder.rmdir()
        folder = Path(tempfile.mkdtemp(prefix="feddm-", dir="/tmp"))
    return folder


def private_environment(folder: Path) -> dict[str, str]:
    """Return the variables of a private SuperLink, its simulation and the commands that ask it.

    Args:
        folder: its own.
    """
    own = local_environment()
    return {
        **own,
        SUBMITTER_VARIABLE: str(os.getpid()),
        "FLWR_HOME": str(folder / "flwr"),
        "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
        "FLWR_DISABLE_UPDATE_CHECK": "1",
        "FLWR_TELEMETRY_ENABLED": os.environ.get("FLWR_TELEMETRY_ENABLED", "0"),
        # Otherwise Ray joins what runs on this machine, or waits for what has run.
        "RAY_ADDRESS": os.environ.get("RAY_ADDRESS") or "local",
        "RAY_TMPDIR": os.environ.get("RAY_TMPDIR") or str(folder),
        # Below `uv run` Ray would start each worker through uv, which makes an environment anew.
        "RAY_ENABLE_UV_RUN_RUNTIME_ENV": "0",
        "PATH": f"{folder / 'bin'}{os.pathsep}{own['PATH']}",
        # What a run says may hold any letter, whatever the locale.
        "PYTHONUTF8": "1",
        "PYTHONIOENCODING": "utf-8",
    }


def patient(command: str) -> list[str]:
    """Return how to run a command of Flower with more patience, see `flower_process.py`."""
    return [sys.executable, "-P", str(FLOWER_PROCESS), command]


@contextmanager
def uninterrupted() -> Iterator[None]:
    """Let no signal that asks this process to end stop it within the block."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    handlers = {number: signal.signal(number, signal.SIG_IGN) for number in ENDING_SIGNALS}
    try:
        yield
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)


def end_with_submitter() -> None:
    """Kill this process when the one that started its private SuperLink is gone.

    Flower's simulation outlives its SuperLink, so the ServerApp has to look for itself. Without
    a private SuperLink it does nothing.
    """
    pid = os.environ.get(SUBMITTER_VARIABLE)
    if pid is not None:
        threading.Thread(target=_watch, args=(int(pid),), daemon=True).start()


def _watch(pid: int) -> None:
    while psutil.pid_exists(pid):
        time.sleep(WATCH_SECONDS)
    os.kill(os.getpid(), signal.SIGKILL)


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
    """End a process and everything that it has started."""
    # Its children may still train, some in sessions of their own, and nothing in them is worth
    # saving. They are counted first: those of a process that has ended have another parent.
    try:
        children = psutil.Process(process.pid).children(recursive=True)
    except psutil.NoSuchProcess:
        children = []
    process.terminate()
    with suppress(subprocess.TimeoutExpired):
        process.wait(STOP_TIMEOUT_SECONDS)
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    for child in children:
        with suppress(psutil.NoSuchProcess):
            child.kill()
    process.wait()
    # Until they are gone they may still write.
    psutil.wait_procs(children, timeout=STOP_TIMEOUT_SECONDS)
