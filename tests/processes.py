"""Real processes for the end-to-end tests: started here, ended here, by their own pid."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path

CHECKOUT = Path(__file__).resolve().parent.parent
COMMANDS = Path(sys.executable).parent

# Seconds of training instead of minutes, on the same path through the code.
SMALL = [
    "federation.num_supernodes=3",
    "federation.rounds=3",
    "train.local_epochs=1",
    "train.precision=float32",
    "model.width=8",
    "diffusion.num_inference_steps=4",
    "eval.every=2",
    "eval.images_per_class=2",
    "eval.num_images=20",
]


def feddm_train(
    *overrides: str, cwd: Path, env: Mapping[str, str] | None = None
) -> "subprocess.CompletedProcess[str]":
    """Run `feddm-train` to its end, with further variables in its environment."""
    return subprocess.run(
        [COMMANDS / "feddm-train", *overrides],
        cwd=cwd,
        env={**os.environ, **(env or {})},
        capture_output=True,
        text=True,
        timeout=900,
        check=False,
    )


def feddm(
    *words: object, env: Mapping[str, str] | None = None
) -> "subprocess.CompletedProcess[str]":
    """Run `feddm` to its end, with further variables in its environment."""
    return subprocess.run(
        [COMMANDS / "feddm", *map(str, words)],
        env={**os.environ, **(env or {})},
        capture_output=True,
        text=True,
        timeout=900,
        check=False,
    )


@contextmanager
def process(
    command: list[str | Path],
    *,
    log: Path,
    cwd: Path,
    env: Mapping[str, str] | None = None,
) -> Iterator["subprocess.Popen[bytes]"]:
    """Run a command beside the test and end it, with its session, afterwards."""
    with log.open("wb") as output:
        started = subprocess.Popen(
            command,
            cwd=cwd,
            env={**os.environ, **(env or {})},
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    try:
        yield started
    finally:
        if started.poll() is None:
            started.terminate()
            with suppress(subprocess.TimeoutExpired):
                started.wait(20)
        # What it has started is of its session, and may have outlived it.
        with suppress(ProcessLookupError):
            os.killpg(started.pid, signal.SIGKILL)
        started.wait()


def wait_for(
    condition: Callable[[], bool], *, seconds: float, what: str, every: float = 0.1
) -> None:
    """Wait until something is so, looking every so many seconds; fail with a name otherwise."""
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            raise TimeoutError(f"{what} did not happen within {seconds:g} s")
        time.sleep(every)


def processes_below(folder: str) -> list[int]:
    """Return the pids of this user's processes that keep their temporary files in a folder."""
    variable, found = os.fsencode(f"TMPDIR={folder}"), []
    for environment in Path("/proc").glob("[0-9]*/environ"):
        with suppress(OSError):  # another user's process, or one that has ended since
            if variable in environment.read_bytes().split(b"\0"):
                found.append(int(environment.parent.name))
    return found
