"""Where the time of a round goes, by this machine's clock alone."""

import time


class PhaseTimer:
    """The seconds of a round, phase by phase.

    The server is in one phase at a time, so that the phases add up to the round. The clients
    train meanwhile.
    """

    def __init__(self) -> None:
        self._name, self._entered = "", time.monotonic()
        self._seconds: dict[str, float] = {}
        self._trained: list[tuple[float, float]] = []

    def enter(self, name: str) -> None:
        """End the phase that is going on, if there is one, and begin or go on with another."""
        now = time.monotonic()
        if self._name:
            self._seconds[self._name] = self._seconds.get(self._name, 0.0) + now - self._entered
        self._name, self._entered = name, now

    def trained(self, seconds: float, *, since: float, until: float) -> None:
        """Note that a client has trained.

        Of a client's word only the duration is used: other machines have other clocks. It is laid
        as late as it can have been, and never before the client was asked.

        Args:
            seconds: that the training took, as the client says.
            since: `time.monotonic()` when the client was asked.
            until: the same when its reply was there.
        """
        self._trained.append((max(until - seconds, since), until))

    def training(self) -> float:
        """Return the seconds in which at least one client trained: the union of all intervals."""
        total, end = 0.0, -float("inf")
        for begin, until in sorted(self._trained):
            total += max(until - max(begin, end), 0.0)
            end = max(end, until)
        return total

    def finish(self) -> dict[str, float]:
        """End the round and return its metrics.

        Returns:
            `seconds_` of each phase and of training, `round_seconds`, and `overhead_share`: of
            the round, what is outside local training.
        """
        self.enter("")
        training, total = self.training(), sum(self._seconds.values())
        return {
            **{f"seconds_{name}": spent for name, spent in self._seconds.items()},
            "seconds_training": training,
            "round_seconds": total,
            "overhead_share": 1 - training / total,
        }
