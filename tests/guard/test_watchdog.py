"""When `feddm-node` starts a node again, on a clock of the test."""

import os
import subprocess
import sys
import time
from typing import Any

import psutil
import pytest

from node_guard.watchdog import (
    DEAD_LOOKS,
    EXECUTOR,
    START_SECONDS,
    WORK_SECONDS,
    Node,
    Watchdog,
    patience_of,
    serve_health,
    trusted,
)


class Scripted(Node):
    """A node whose processes and signs of life are what the test says."""

    def __init__(self) -> None:
        super().__init__([])
        self.started_at, self.programs = 0.0, {EXECUTOR}

    def runs(self, *names: str) -> bool:
        return not self.programs.isdisjoint(names)


def watched(*, reachable: bool = True) -> tuple[Scripted, Watchdog, list[float]]:
    node, asked = Scripted(), []

    def answers() -> bool:
        asked.append(1.0)
        return reachable

    return node, Watchdog(node, answers, patience=75), asked


def group_of(pid: int) -> int | None:
    try:
        return os.getpgid(pid)
    except ProcessLookupError:
        return None


def test_node_that_is_heard_is_left_alone_and_nobody_else_is_asked() -> None:
    node, watchdog, asked = watched()
    for now in range(0, 600, 5):
        node.heard_at = now - now % 20
        assert watchdog.why_lost(now) == ""
    assert asked == []


def test_silent_node_is_lost_only_where_the_superlink_can_be_reached() -> None:
    node, watchdog, asked = watched()
    node.heard_at = 100.0
    assert all(watchdog.why_lost(now) == "" for now in range(100, 175))
    assert 1 <= len(asked) <= 4  # from 45 s of silence on, every 10 s
    assert "does not hear this node" in watchdog.why_lost(175)
    node, away, _ = watched(reachable=False)
    node.heard_at = 100.0
    assert all(away.why_lost(now) == "" for now in range(100, 90_000, 5))
    # It answers again: the node has as long as before to find back by itself.
    away._reachable = lambda: True
    assert all(away.why_lost(now) == "" for now in range(90_000, 90_065, 5))
    assert away.why_lost(90_080)


def test_node_that_starts_has_longer_than_one_that_was_heard() -> None:
    _, watchdog, _ = watched()
    assert all(watchdog.why_lost(now) == "" for now in range(0, int(START_SECONDS), 5))
    assert watchdog.why_lost(START_SECONDS)


def test_training_ends_before_the_node_is_started_again(
    capsys: pytest.CaptureFixture[str],
) -> None:
    node, watchdog, _ = watched()
    node.heard_at, node.programs = 0.0, {EXECUTOR, "feddm-guard"}
    assert all(watchdog.why_lost(now) == "" for now in range(0, 9000, 50))
    assert capsys.readouterr().out.count("the training under way ends first") == 1
    node.programs = {EXECUTOR}
    assert watchdog.why_lost(9001)
    node.programs = {"flwr-clientapp"}
    assert watchdog.why_lost(9050) == "" and watchdog.why_lost(9050 + WORK_SECONDS)


def test_node_without_the_process_that_starts_its_work_is_lost() -> None:
    node, watchdog, _ = watched()
    node.programs = set()
    # Before it was heard it may not have been started yet.
    assert all(watchdog.why_lost(now) == "" for now in range(20))
    found = []
    for now in range(20, 20 + DEAD_LOOKS):
        node.heard_at = now
        found.append(watchdog.why_lost(now))
    assert found[:-1] == [""] * (DEAD_LOOKS - 1) and EXECUTOR in found[-1]
    node.programs = {"flwr-clientapp"}  # it has been killed in the midst of a training
    assert watchdog.why_lost(30) == ""


def test_real_process_is_heard_by_its_pipe_and_ends_with_all_it_has_started(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    code = "import os,sys,time; os.write(int(sys.argv[1]), b'.'); os.fork(); time.sleep(60)"
    popen: Any = subprocess.Popen

    def start(command: list[str], **options: Any) -> Any:
        return popen([sys.executable, "-c", code, command[4]], **options)

    monkeypatch.setattr(subprocess, "Popen", start)
    node = Node([])
    assert not node.is_online and not node.runs("python")
    node.start()
    deadline = time.monotonic() + 20
    while not node.is_online and time.monotonic() < deadline:
        time.sleep(0.05)
    assert node.is_online and node.status is None and node._process is not None
    group = os.getpgid(node._process.pid)
    node.end()
    assert not node.is_online and node.status == -15
    living = [each for each in psutil.process_iter(["status"]) if group_of(each.pid) == group]
    assert all(each.info["status"] == psutil.STATUS_ZOMBIE for each in living)


@pytest.mark.parametrize("wrong", ["10", "-1", "nan"])
def test_patience_below_the_pace_of_signs_of_life_is_refused(wrong: str) -> None:
    with pytest.raises(Exception, match="must be at least 60 s"):
        patience_of(wrong)


def test_wrong_options_are_named() -> None:
    with pytest.raises(ValueError, match=r"^--root-certificates must be .*'/none'"):
        trusted("/none")
    for wrong in ("127.0.0.1", "127.0.0.1:no", "[::1]:9095"):
        with pytest.raises(ValueError, match=r"^--health must be host:port"):
            serve_health(Node([]), wrong)
