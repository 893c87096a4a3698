"""Contestants in processes of their own, and the turns that they take."""

import time
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ProcessPoolExecutor
from contextlib import AbstractContextManager
from multiprocessing import get_context
from typing import Any

import torch

from task.processes import end_with_parent

_contestant: Any = None


class Contestant(AbstractContextManager["Contestant"]):
    """An object in a process of its own: what it sets for its process helps nobody else."""

    def __init__(self, make: Callable[..., object], *arguments: object) -> None:
        """Start the process and make the object in it; errors of the process are raised here."""
        self._pool = ProcessPoolExecutor(1, mp_context=get_context("spawn"))
        self._pool.submit(_make, make, arguments).result()

    def call(self, method: str, *arguments: object) -> Any:
        """Call a method of the object."""
        return self._pool.submit(_call, method, arguments).result()

    def __exit__(self, *_: object) -> None:
        self._pool.shutdown(cancel_futures=True)


def _make(make: Callable[..., object], arguments: Iterable[object]) -> None:
    global _contestant
    end_with_parent()
    _contestant = make(*arguments)


def _call(method: str, arguments: Iterable[object]) -> Any:
    return getattr(_contestant, method)(*arguments)


def take_turns(players: Mapping[str, Callable[[], float]], turns: int) -> dict[str, list[float]]:
    """Let players play in turn, again and again, so that a slow minute of the machine meets all.

    Args:
        players: each plays once and returns its score.
        turns: that count; one more before them warms up.

    Returns:
        `turns` scores of each.
    """
    scores: dict[str, list[float]] = {name: [] for name in players}
    for _ in range(turns + 1):
        for name, play in players.items():
            scores[name].append(play())
    return {name: played[1:] for name, played in scores.items()}


def timed(device: torch.device, work: Callable[[], object]) -> float:
    """Return the seconds that work takes, what it has queued on a GPU included."""
    _wait_for(device)
    start = time.perf_counter()
    work()
    _wait_for(device)
    return time.perf_counter() - start


def _wait_for(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
