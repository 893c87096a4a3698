import time

import pytest

from server_app.timing import PhaseTimer


def union(intervals: list[tuple[float, float]]) -> float:
    """Count the tenths of a second in which any interval is: an independent way to the union."""
    return len({t for b, e in intervals for t in range(round(b * 10), round(e * 10))}) / 10


@pytest.mark.parametrize(
    "intervals",
    [
        [],
        [(1.0, 2.5)],
        [(1.0, 2.0), (3.0, 4.5)],
        [(1.0, 2.0), (2.0, 3.0)],
        [(1.0, 4.0), (2.0, 3.0), (3.5, 5.0)],
        [(5.0, 6.0), (1.0, 2.0), (1.5, 5.5)],
        [(1.0, 2.0), (1.0, 2.0)],
    ],
)
def test_training_is_the_union_of_the_clients_intervals(
    intervals: list[tuple[float, float]],
) -> None:
    phases = PhaseTimer()
    for begin, end in intervals:
        phases.trained(end - begin, since=0.0, until=end)
    assert phases.training() == pytest.approx(union(intervals))


def test_training_never_began_before_the_client_was_asked() -> None:
    phases = PhaseTimer()
    phases.trained(1e15, since=3.0, until=5.0)
    assert phases.training() == 2.0


def test_phases_add_up_to_the_round_whatever_is_entered_in_between() -> None:
    phases = PhaseTimer()
    time.sleep(0.02)  # before the round
    start = time.monotonic()
    for name in ("sending", "waiting", "sending", "aggregating", "checkpoint"):
        phases.enter(name)
        time.sleep(0.01)
    told = phases.finish()
    elapsed = time.monotonic() - start
    names = ["sending", "waiting", "aggregating", "checkpoint"]
    assert set(told) == {
        *(f"seconds_{name}" for name in names),
        *("seconds_training", "round_seconds", "overhead_share"),
    }
    assert sum(told[f"seconds_{name}"] for name in names) == pytest.approx(told["round_seconds"])
    assert 0.05 <= told["round_seconds"] <= elapsed
    assert told["seconds_sending"] >= 0.02


def test_overhead_is_what_is_outside_training() -> None:
    phases = PhaseTimer()
    phases.enter("waiting")
    time.sleep(0.04)
    phases.trained(0.01, since=0.0, until=time.monotonic())
    told = phases.finish()
    expected = 1 - 0.01 / told["round_seconds"]
    assert told["overhead_share"] == pytest.approx(expected)


def test_round_in_which_nobody_trained_is_all_overhead() -> None:
    phases = PhaseTimer()
    phases.enter("waiting")
    assert phases.finish()["overhead_share"] == 1.0
