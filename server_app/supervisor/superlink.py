"""`feddm-superlink`: Flower's `flower-superlink`, whose process that starts runs is started again.

The SuperLink answers on, and says that it is healthy, where the `flower-superexec` that it has
started is dead; runs then stay pending for ever. Here the same command is started again. Runs that
are going are processes of their own, which it does not touch.
"""

import contextlib
import shutil
import signal
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import psutil

from server_app.log import log
from server_app.supervisor.alerts import alert
from task.processes import end_with_parent

LOOK_SECONDS = 2.0
# A process that has only just been started may not show its command yet.
DEAD_LOOKS = 2
EXECUTOR = "flower-superexec"


def executor_of(process: psutil.Process) -> psutil.Process | None:
    """Return the living `flower-superexec` that a SuperLink has started; None where none is."""
    for child in process.children():
        with contextlib.suppress(psutil.Error):
            named = any(Path(word).name == EXECUTOR for word in child.cmdline()[:2])
            if named and child.status() != psutil.STATUS_ZOMBIE:
                return child
    return None


class WatchedSuperLink:
    """A SuperLink, and what starts its runs."""

    def __init__(self, words: list[str]) -> None:
        """Start nothing yet; `words` are the options of `flower-superlink`."""
        beside = Path(sys.executable).parent / "flower-superlink"
        found = str(beside) if beside.exists() else shutil.which("flower-superlink")
        self._command = [found or "flower-superlink", *words]
        self._ending = threading.Event()
        self._executor: subprocess.Popen[bytes] | None = None
        self._executors_words: list[str] = []
        self._dead_looks = 0

    def end(self, *_: Any) -> None:
        """Have `watch` end the SuperLink and return."""
        self._ending.set()

    def watch(self) -> int:
        """Start the SuperLink and watch it to its end; returns its exit status."""
        # The kernel counts the thread that starts it: this is the main one, which lives to the end.
        superlink = subprocess.Popen(self._command, preexec_fn=end_with_parent)
        process = psutil.Process(superlink.pid)
        while superlink.poll() is None and not self._ending.wait(LOOK_SECONDS):
            with contextlib.suppress(psutil.Error):
                self._look(process)
        if superlink.poll() is None:
            superlink.terminate()
        status = superlink.wait()
        if self._executor is not None:
            self._executor.terminate()
            self._executor.wait()
        return status

    def _look(self, superlink: psutil.Process) -> None:
        """Start its executor again where that is dead."""
        if self._executor is not None and self._executor.poll() is None:
            return
        living = executor_of(superlink)
        if living is not None:
            self._executors_words, self._dead_looks = living.cmdline(), 0
            return
        self._dead_looks += bool(self._executors_words)
        if self._dead_looks < DEAD_LOOKS:
            return
        text = f"{EXECUTOR}, which starts the SuperLink's runs, was dead; it is started again"
        log(text)
        alert(text)
        self._executor = subprocess.Popen(
            self._executors_words, start_new_session=True, preexec_fn=end_with_parent
        )


def main() -> None:
    """Run `feddm-superlink`, with the options of `flower-superlink`."""
    watched = WatchedSuperLink(sys.argv[1:])
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, watched.end)
    status = watched.watch()
    # Killed by a signal: as a shell says it.
    sys.exit(status if status >= 0 else 128 - status)
