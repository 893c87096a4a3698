"""How far a long command has come: a bar on a terminal, a line now and then elsewhere."""

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import click

SECONDS_BETWEEN_LINES = 30.0


@contextmanager
def progress(total: int, unit: str) -> Iterator[Callable[[int], None]]:
    """Yield a function that takes what was done since its last call; writes to stderr.

    Args:
        total: that is to be done.
        unit: what is counted, for the reader: "images".
    """
    if sys.stderr.isatty():
        with click.progressbar(length=total, file=sys.stderr, show_pos=True, label=unit) as bar:
            yield bar.update
        return
    done, last = 0, time.monotonic()

    def update(number: int) -> None:
        nonlocal done, last
        done += number
        if time.monotonic() - last >= SECONDS_BETWEEN_LINES:
            last = time.monotonic()
            click.echo(f"{done:,} of {total:,} {unit}", err=True)

    yield update
