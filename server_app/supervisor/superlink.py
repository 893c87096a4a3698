"""`feddm-superlink`: Flower's `flower-superlink`, whose process that starts runs is started again.

The SuperLink answers on, and says that it is healthy, where the `flower-superexec` that it has
started is dead; runs then stay pending for ever. Here the same command is started again. Runs that
are going are processes of their own, which it does not touch.
"""

import argparse
import contextlib
import math
import os
import shutil
import signal
import sqlite3
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import psutil

from server_app.log import log
from server_app.supervisor.alerts import alert
from task.processes import end_with_parent

EXECUTOR_LOOK_SECONDS = 2.0
# A process that has only just been started may not show its command yet.
LOOKS_WITHOUT_EXECUTOR = 2
EXECUTOR_NAME = "flower-superexec"
# From one start of it to the next, doubled with each that does not live as long as the longest.
FIRST_PAUSE_SECONDS, LONGEST_PAUSE_SECONDS = 5.0, 300.0


def executor_of(process: psutil.Process) -> psutil.Process | None:
    """Return the living `flower-superexec` that a SuperLink has started; None where none is."""
    for child in process.children():
        with contextlib.suppress(psutil.Error):
            named = any(Path(word).name == EXECUTOR_NAME for word in child.cmdline()[:2])
            if named and child.status() != psutil.STATUS_ZOMBIE:
                return child
    return None


def is_alive(process: subprocess.Popen[bytes]) -> bool:
    """Whether a process runs, without taking note of its end: its number stays taken.

    Runs that it has started end themselves where their parent's number is gone.
    """
    try:
        return psutil.Process(process.pid).status() != psutil.STATUS_ZOMBIE
    except psutil.Error:
        return False


class WatchedSuperLink:
    """A SuperLink, and what starts its runs."""

    def __init__(self, words: list[str]) -> None:
        """Start nothing yet; `words` are the options of `flower-superlink`."""
        beside = Path(sys.executable).parent / "flower-superlink"
        found = str(beside) if beside.exists() else shutil.which("flower-superlink")
        self._command = [found or "flower-superlink", *words]
        # Flower's processes find each other on the PATH, which a service has without them.
        path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
        self._environment = {**os.environ, "PATH": path}
        self._ending = threading.Event()
        self._executors: list[subprocess.Popen[bytes]] = []
        self._executors_words: list[str] = []
        self._dead_looks = 0
        self._started_at, self._pause = -math.inf, FIRST_PAUSE_SECONDS

    def end(self, *_: Any) -> None:
        """Have `watch` end the SuperLink and return."""
        self._ending.set()

    def watch(self) -> int:
        """Start the SuperLink and watch it to its end; returns the status to end with."""
        # From the main thread, with which the kernel ends it.
        superlink = subprocess.Popen(
            self._command, preexec_fn=end_with_parent, env=self._environment
        )
        process = psutil.Process(superlink.pid)
        while superlink.poll() is None and not self._ending.wait(EXECUTOR_LOOK_SECONDS):
            with contextlib.suppress(psutil.Error):
                self._look(process)
        asked = self._ending.is_set()
        if superlink.poll() is None:
            superlink.terminate()
        status = superlink.wait()
        for executor in self._executors:
            executor.terminate()
            executor.wait()
        # Killed by a signal: as a shell says it.
        return 0 if asked else status if status >= 0 else 128 - status

    def _look(self, superlink: psutil.Process) -> None:
        """Start its executor again where that is dead."""
        now = time.monotonic()
        living = executor_of(superlink)
        if living is not None:
            self._executors_words = living.cmdline()
        if living is not None or (self._executors and is_alive(self._executors[-1])):
            self._dead_looks = 0
            if now - self._started_at > LONGEST_PAUSE_SECONDS:
                self._pause = FIRST_PAUSE_SECONDS
            return
        self._dead_looks += bool(self._executors_words)
        if self._dead_looks < LOOKS_WITHOUT_EXECUTOR or now - self._started_at < self._pause:
            return
        first = self._pause == FIRST_PAUSE_SECONDS
        self._started_at, self._pause = now, min(2 * self._pause, LONGEST_PAUSE_SECONDS)
        self._executors.append(
            subprocess.Popen(
                self._executors_words,
                start_new_session=True,
                preexec_fn=end_with_parent,
                env=self._environment,
            )
        )
        text = f"{EXECUTOR_NAME}, which starts the SuperLink's runs, was dead; it is started again"
        log(text)
        if first:
            # It may take a minute, in which nobody would look.
            threading.Thread(target=alert, args=(text,), daemon=True).start()


def check_database(file: Path) -> None:
    """Look through a SuperLink's database, if there is one; some seconds for each gigabyte.

    Raises:
        ValueError: it is damaged.
        OSError: it cannot be read now.
    """
    if not file.exists():
        return
    try:
        with contextlib.closing(sqlite3.connect(file)) as database:
            (found,) = database.execute("PRAGMA quick_check(1)").fetchone()
    except sqlite3.OperationalError as error:
        raise OSError(
            f"--database={file} cannot be read now ({error}): end the SuperLink that has it open, "
            "or look at its owner and at the disk"
        ) from error
    except sqlite3.DatabaseError as error:
        found = str(error)
    if found != "ok":
        raise ValueError(
            f"--database must be a SQLite database that is whole, got {file} "
            f"({' '.join(found.split())}); put a back-up in its place, or move it away and let the "
            "hospitals in again (feddm-hospitals restore)"
        )


def main() -> None:
    """Run `feddm-superlink`, with the options of `flower-superlink`."""
    reading = argparse.ArgumentParser(prog="feddm-superlink", add_help=False, allow_abbrev=False)
    reading.add_argument("--database", type=Path)
    options, _ = reading.parse_known_args()
    try:
        if options.database is not None:
            check_database(options.database)
    except (ValueError, OSError) as error:
        log(f"feddm-superlink: {error}")
        sys.exit(1)
    watched = WatchedSuperLink(sys.argv[1:])
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        if signal.getsignal(number) is not signal.SIG_IGN:  # as nohup leaves it
            signal.signal(number, watched.end)
    sys.exit(watched.watch())
