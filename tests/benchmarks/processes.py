"""Real runs of feddm-train for the benchmarks, and the memory that they take."""

import os
import statistics
import subprocess
import tempfile
import threading
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path

from task.runs.layout import METRICS_FILE
from task.runs.records import read_records
from tests.processes import CHECKOUT, COMMANDS

Rounds = dict[int, dict[str, float]]
TIMEOUT_SECONDS = 1200.0
RUN_NAME = "run"


def feddm_train(folder: str, *overrides: str) -> float:
    """Run `feddm-train` to its end, into the run `RUN_NAME` of a folder.

    Returns:
        The peak memory of all its processes together in MiB.

    Raises:
        RuntimeError: it failed; with the end of what it said.
    """
    process = subprocess.Popen(
        [COMMANDS / "feddm-train", *overrides, f"output_dir={folder}", f"run_name={RUN_NAME}"],
        cwd=CHECKOUT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    try:
        with Peak(lambda: tree_memory(process.pid), every=1.0) as peak:
            said, _ = process.communicate(timeout=TIMEOUT_SECONDS)
    finally:
        process.kill()  # all that it has started ends with it
    if process.returncode != 0:
        raise RuntimeError(f"feddm-train failed: {said[-500:]}")
    return peak.mib


def rounds_of(*overrides: str) -> tuple[Rounds, float]:
    """Run `feddm-train`; returns the federation's metrics by round and the peak memory in MiB."""
    with tempfile.TemporaryDirectory() as folder:
        peak = feddm_train(folder, *overrides)
        rounds: Rounds = defaultdict(dict)
        for each in read_records(Path(folder) / RUN_NAME / METRICS_FILE).all:
            if each.client is None:
                rounds[each.round][each.metric] = each.value
        return rounds, peak


def after_the_first(rounds: Rounds, name: str) -> float:
    """Return the median of a metric over the rounds but the first, in which processes start."""
    return statistics.median(told[name] for number, told in rounds.items() if number > 1)


class Peak:
    """The largest of a quantity's values, looked at `every` so many seconds in the block."""

    def __init__(self, look: Callable[[], float], *, every: float) -> None:
        self.mib = 0.0
        self._look, self._every = look, every
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> "Peak":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._stop.wait(self._every):
            self.mib = max(self.mib, self._look())


def tree_memory(root: int) -> float:
    """Return the MiB of a process and all below it; what they share is counted once."""
    parents = {}
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            # The name of a program stands in brackets, and may hold anything.
            state = (folder / "stat").read_text().rpartition(")")[2].split()
            parents[int(folder.name)] = int(state[1])
        except OSError:
            continue  # ended meanwhile
    family = {root}
    while more := {pid for pid, parent in parents.items() if parent in family} - family:
        family |= more
    return sum(memory(pid, "smaps_rollup", "Pss:") for pid in family)


def own_memory() -> float:
    """Return the MiB of this process alone, without what it shares with others.

    Ray's store of objects is shared memory: its pages count where they were last read.
    """
    return memory(os.getpid(), "status", "RssAnon:")


def memory(pid: int, file: str, entry: str) -> float:
    """Read an entry in kB of a file of Linux about a process as MiB; 0 where it has ended."""
    try:
        lines = Path(f"/proc/{pid}/{file}").read_text().splitlines()
    except OSError:
        return 0.0
    return next((int(line.split()[1]) / 1024 for line in lines if line.startswith(entry)), 0.0)
