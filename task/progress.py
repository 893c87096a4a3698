"""How far a long stage has come, with the time left, on stderr: nothing where it is short.

On a terminal it is one line that changes and goes away; in a log it is a line now and then.
"""

import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from typing import TypeVar

Item = TypeVar("Item")

# Until the first line, and from line to line.
TERMINAL_SECONDS = (1.0, 0.5)
LOG_SECONDS = (5.0, 15.0)


class Progress:
    """A stage of known size that is going on."""

    def __init__(self, total: int, stage: str) -> None:
        """Begin.

        Args:
            total: that is to be done.
            stage: what is going on, for the reader: "drawing 500 images".
        """
        self._total, self._stage, self._done = total, stage, 0
        self._begin = time.monotonic()

    def advance(self, number: int = 1) -> None:
        """Note that something was done."""
        self._done += number

    def line(self) -> str:
        """Say how far the stage has come."""
        spent, done = time.monotonic() - self._begin, self._done
        if done == 0:
            return f"{self._stage}: {duration(spent)} so far"
        left = duration(spent / done * (self._total - done))
        return f"{self._stage}: {done / self._total:.0%}, {left} left"

    def show(self, ended: threading.Event) -> None:
        """Write a line now and then, until the stage has ended."""
        terminal = sys.stderr.isatty()
        delay, between = TERMINAL_SECONDS if terminal else LOG_SECONDS
        shown = False
        while not ended.wait(delay):
            delay, shown = between, True
            # One write per line: Flower forwards each write on its own.
            write(
                f"\r{self.line()}\x1b[K"
                if terminal
                else f"{time.strftime('%H:%M:%S')} {self.line()}\n"
            )
        if terminal and shown:
            write("\r\x1b[K")


def write(text: str) -> None:
    """Write to stderr; where nobody reads it, the stage goes on all the same."""
    with suppress(OSError):
        sys.stderr.write(text)
        sys.stderr.flush()


@contextmanager
def progress(total: int, stage: str) -> Iterator[Callable[[int], None]]:
    """Yield a function that takes what was done since its last call; see `Progress`."""
    going, ended = Progress(total, stage), threading.Event()
    # A thread, because what is done may itself take long.
    thread = threading.Thread(target=going.show, args=(ended,), daemon=True)
    thread.start()
    try:
        yield going.advance
    finally:
        ended.set()
        thread.join()


def tracked(items: Iterable[Item], total: int, stage: str) -> Iterator[Item]:
    """Yield items, and show how many of them are done with; see `Progress`."""
    with progress(total, stage) as advance:
        for item in items:
            yield item
            advance(1)


def duration(seconds: float) -> str:
    """Write seconds as 1:02:03, or 2:03 where there are no hours."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"
