"""A simulation by `flwr run`, followed to its end: what is shown of it, and why it failed."""

import os
import re
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterable
from contextlib import nullcontext
from pathlib import Path
from typing import IO, Any

from server_app.launch.flwr_command import NoAnswer, flwr
from server_app.launch.superlink import CONNECTION, SuperLink, private_superlink
from server_app.log import log

POLL_SECONDS = 1.0
# From the end of the simulation's process to what Flower says of the run.
STATUS_GRACE_SECONDS = 5.0

TERMINAL_COLORS = re.compile(r"\x1b\[[0-9;]*m")
# What Flower and Ray say in every run, and nobody needs. Errors and other warnings are shown, but
# for the lines of code that led to an error.
NOISE = re.compile(
    r"(\(\w+ pid=\d+\) )?(INFO *:|WARNING *: +(Since flwr 1\.32|Manually terminating))"
    r"|Using SuperLink: |Successfully (started|installed) "
    r"|\S+ \S+\tINFO worker\.py:"
    r"|.*/site-packages/.*: (Future|Deprecation)Warning: "
    r"|(\(\w+ pid=\d+\) )?Traceback \(most recent call last\):"
)
# The lines of code that Python shows below a warning or in a traceback.
CODE_LINE = re.compile(r"(\(\w+ pid=\d+\) )?  \s*\S")
OVERLOADED = re.compile(r"No heartbeat received from the task|node timed out during startup")


class OverloadedError(RuntimeError):
    """The machine was too busy for Flower or Ray; the same run may succeed in a second attempt."""


def simulate(
    app: Path, *, run_config: Callable[[], str], federation_config: str, log_file: Path
) -> None:
    """Run an app in a simulation of its own until it has finished; once more where that may help.

    Args:
        app: folder of the app.
        run_config: returns what `flwr run --run-config` reads from a file.
        federation_config: as for `flwr run --federation-config`.
        log_file: takes all that Flower, Ray and the app say.

    Raises:
        RuntimeError: the run did not finish as completed.
    """
    try:
        simulate_once(app, run_config(), federation_config, log_file)
    except OverloadedError as error:
        log(f"{error}; trying once more")
        simulate_once(app, run_config(), federation_config, log_file)


def simulate_once(app: Path, run_config: str, federation_config: str, log_file: Path) -> None:
    """Run an app once; see `simulate`.

    Raises:
        OverloadedError: the machine was too busy.
        RuntimeError: the run did not finish as completed for another reason.
    """
    with private_superlink() as superlink, log_file.open("a", encoding="utf-8") as whole:
        begin = whole.tell()
        words = superlink.folder / "run-config.toml"
        words.write_text(run_config, encoding="utf-8")
        command = ["flwr", "run", str(app), CONNECTION, "--stream"]
        command += ["--run-config", str(words), "--federation-config", federation_config]
        status = stream(command, superlink, whole)
        if not superlink.status_file.exists() and status != 0:
            raise RuntimeError(f"`flwr run` ended with status {status}")
        failure = described_failure(superlink)
        if failure is None:
            return
        whole.write(superlink.output.read_text(encoding="utf-8", errors="replace"))
    cause = OVERLOADED.search(failure + log_file.read_bytes()[begin:].decode(errors="replace"))
    if cause is not None:
        load, cores = os.getloadavg()[0], os.cpu_count()
        raise OverloadedError(
            f"the machine was too busy to start or to hear the simulation (load {load:.0f} on "
            f"{cores} cores; {cause[0]})"
        )
    raise RuntimeError(failure)


def stream(command: list[str], superlink: SuperLink, whole: IO[str]) -> int:
    """Run a command of Flower's, and show what it says until the simulation's process has ended.

    Args:
        command: that shows the log of the run.
        superlink: of the run.
        whole: takes everything that is said.

    Returns:
        The status of the command; below 0 where the simulation ended without telling Flower.
    """
    process = subprocess.Popen(
        command,
        cwd=superlink.folder,
        env={**superlink.environment, "PYTHONUNBUFFERED": "1"},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        encoding="utf-8",
        errors="replace",
    )

    def end_with_simulation() -> None:
        while process.poll() is None:
            if superlink.status_file.exists():
                time.sleep(STATUS_GRACE_SECONDS)
                process.kill()
            time.sleep(POLL_SECONDS)

    threading.Thread(target=end_with_simulation, daemon=True).start()
    try:
        with process.stdout or nullcontext(()) as lines:
            show(lines, whole)
        return process.wait()
    finally:
        process.kill()
        process.wait()


def show(lines: Iterable[str], whole: IO[str]) -> None:
    """Print what is no noise, and write everything into a file."""
    code_follows = False
    for line in lines:
        whole.write(line)
        whole.flush()
        plain = TERMINAL_COLORS.sub("", line)
        is_code = code_follows and CODE_LINE.match(plain) is not None
        noise = NOISE.match(plain) is not None
        code_follows = is_code or (noise and ("Warning: " in plain or "Traceback " in plain))
        if not noise and not is_code:
            print(line, end="", flush=True)


def described_failure(superlink: SuperLink) -> str | None:
    """Wait for the end of a private SuperLink's run and say why it failed; None where it did not.

    Raises:
        NoAnswer: Flower does not answer as expected.
    """
    ended: float | None = None
    while not (run := _only_run(superlink))["status"].startswith("finished"):
        if superlink.status_file.exists():
            ended = ended or time.monotonic()
            if time.monotonic() - ended > STATUS_GRACE_SECONDS:
                return described_end(int(superlink.status_file.read_text()))
        time.sleep(POLL_SECONDS)
    if run["status"] == "finished:completed":
        return None
    return f"the run ended as {run['status']}: {run.get('status-details', '')}"


def described_end(status: int) -> str:
    """Say how the process of a simulation ended, by the exit status that a shell gives."""
    if status > 128:
        hint = " (by hand, or because memory ran out: then fewer clients at once, or a smaller "
        hint = f"{hint}train.batch_size)" if status == 128 + signal.SIGKILL else ""
        return f"the simulation was killed by signal {status - 128}{hint}"
    return f"the simulation's process ended with status {status}"


def _only_run(superlink: SuperLink) -> dict[str, Any]:
    answer = flwr("list", CONNECTION, environment=superlink.environment)
    try:
        run: dict[str, Any] = answer["runs"][0]
    except (KeyError, IndexError) as error:
        raise NoAnswer(f"`flwr list` named no run: {answer}") from error
    return run
