"""A file that one process holds until it closes it or ends."""

import fcntl
import os
import time
from pathlib import Path
from typing import IO


def hold(path: Path, field: str, *, patience: float) -> IO[str]:
    """Lock a file, and write this process's number into it, until it is closed.

    Args:
        path: the file; made where there is none.
        field: what names its folder, for the error.
        patience: seconds to wait for another process to let go of it.

    Raises:
        ValueError: another process holds it.
        OSError: it cannot be written.
    """
    file = path.open("a+", encoding="utf-8")
    deadline = time.monotonic() + patience
    while True:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            break
        except BlockingIOError as error:
            if time.monotonic() >= deadline:
                file.seek(0)
                owner = file.read().strip()
                file.close()
                raise ValueError(
                    f"{field}: {path.parent} is in use by process {owner}; end it first"
                ) from error
            time.sleep(0.5)
    file.truncate(0)
    file.write(str(os.getpid()))
    file.flush()
    return file


def holder(path: Path) -> str | None:
    """Return the number of the process that holds a lock file; None where none does."""
    try:
        with path.open("r", encoding="utf-8") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
            except BlockingIOError:
                return file.read().strip() or "of unknown number"
    except FileNotFoundError:
        pass
    return None
