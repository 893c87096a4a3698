import io
import re
import sys
import time

import pytest

from task import progress as module
from task.progress import Progress, duration, progress, tracked


class Stream(io.StringIO):
    def __init__(self, *, terminal: bool) -> None:
        super().__init__()
        self._terminal = terminal

    def isatty(self) -> bool:
        return self._terminal


def shown(monkeypatch: pytest.MonkeyPatch, *, terminal: bool, seconds: float) -> str:
    monkeypatch.setattr(module, "TERMINAL_SECONDS", (0.05, 0.02))
    monkeypatch.setattr(module, "LOG_SECONDS", (0.05, 0.02))
    stream = Stream(terminal=terminal)
    monkeypatch.setattr(sys, "stderr", stream)
    for _ in tracked(range(2), 2, "drawing 2 images"):
        time.sleep(seconds)
    return stream.getvalue()


@pytest.mark.parametrize("terminal", [False, True])
def test_short_stage_shows_nothing(monkeypatch: pytest.MonkeyPatch, terminal: bool) -> None:
    assert shown(monkeypatch, terminal=terminal, seconds=0.0) == ""


def test_log_gets_lines_even_while_nothing_is_done(monkeypatch: pytest.MonkeyPatch) -> None:
    lines = shown(monkeypatch, terminal=False, seconds=0.3).splitlines()
    said = [re.sub(r"^\d\d:\d\d:\d\d ", "", line) for line in lines]
    assert said[0] == "drawing 2 images: 0:00 so far"
    assert re.fullmatch(r"drawing 2 images: 50%, 0:0\d left", said[-1])
    assert len(said) > 4 and said != lines


def test_terminal_keeps_one_line_and_clears_it(monkeypatch: pytest.MonkeyPatch) -> None:
    text = shown(monkeypatch, terminal=True, seconds=0.3)
    assert "\n" not in text and text.count("\r") > 4
    assert "\rdrawing 2 images: 50%, 0:00 left\x1b[K" in text and text.endswith("\r\x1b[K")


def test_line_of_a_terminal_is_cleared_after_a_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "TERMINAL_SECONDS", (0.01, 0.01))
    stream = Stream(terminal=True)
    monkeypatch.setattr(sys, "stderr", stream)
    with pytest.raises(ValueError, match="no"), progress(10, "drawing"):
        time.sleep(0.2)
        raise ValueError("no")
    assert "drawing" in stream.getvalue() and stream.getvalue().endswith("\r\x1b[K")


def test_time_left_is_that_of_the_share_that_is_left(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [100.0]
    monkeypatch.setattr(module.time, "monotonic", lambda: now[0])
    stage = Progress(10, "decoding")
    now[0] += 30
    assert stage.line() == "decoding: 0:30 so far"
    stage.advance(3)
    stage.advance()
    assert stage.line() == "decoding: 40%, 0:45 left"
    stage.advance(6)
    assert stage.line() == "decoding: 100%, 0:00 left"


def test_hours_are_written_where_there_are_some() -> None:
    assert (duration(0), duration(61), duration(3661)) == ("0:00", "1:01", "1:01:01")
