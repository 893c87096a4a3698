"""How much memory there is, on this machine or in the container that this process is in."""

from pathlib import Path

import psutil

# Control groups of version 2, of which psutil does not know.
CONTAINER = Path("/sys/fs/cgroup")


def total_memory() -> int:
    """Return the bytes of this machine's memory, or of its container's where that has less."""
    memory = psutil.virtual_memory().total
    limit = _limit()
    return memory if limit is None else min(memory, limit)


def free_memory() -> int:
    """Return the bytes that programs can still get, here or in the container."""
    free = psutil.virtual_memory().available
    limit = _limit()
    if limit is None:
        return free
    return min(free, limit - int((CONTAINER / "memory.current").read_text()))


def _limit() -> int | None:
    file = CONTAINER / "memory.max"
    text = file.read_text().strip() if file.is_file() else "max"
    return None if text == "max" else int(text)
