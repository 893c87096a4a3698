"""How much memory there is, on this machine or in the container that this process is in."""

import os
from pathlib import Path

# Of control groups of version 2.
CONTAINER = Path("/sys/fs/cgroup")
LINUX_MEMORY = Path("/proc/meminfo")


def total_memory(container: Path = CONTAINER) -> int:
    """Return the bytes of this machine's memory, or of its container's where that has less."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    limit = _limit(container)
    return memory if limit is None else min(memory, limit)


def free_memory(machine: Path = LINUX_MEMORY, container: Path = CONTAINER) -> int | None:
    """Return the bytes that programs can still get; None where there is no `machine`."""
    if not machine.is_file():
        return None
    lines = dict(line.split(":", 1) for line in machine.read_text().splitlines())
    free = int(lines["MemAvailable"].split()[0]) * 1024
    limit = _limit(container)
    if limit is None:
        return free
    return min(free, limit - int((container / "memory.current").read_text()))


def _limit(container: Path) -> int | None:
    file = container / "memory.max"
    said = file.read_text().strip() if file.is_file() else "max"
    return None if said == "max" else int(said)
