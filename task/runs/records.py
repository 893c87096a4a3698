"""What a run measured and counted: one `Record` for each number, a line each of metrics.jsonl."""

import json
import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import KW_ONLY, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from task.runs.first_schema import is_of_first_schema, translated
from task.runs.layout import understood

# Values by round.
Series = dict[int, float]

# Against what images a number was measured.
TRAIN, TEST, HELD_OUT = "train", "test", "held_out"
# A reply that was not used; the context says of which activity it was, and the reason.
LEFT_OUT = "left_out"
# A round after which training could not go on; the context says the reason.
SECONDS_EVALUATING = "seconds_evaluating"
DIVERGENCE = "divergence"
# What the rounds so far have cost a patient at most; the context says delta.
SPENT_EPSILON = "epsilon"
# A client whose training shows a failure while that of others goes on; the context says the reason.
CLIENT_DIVERGENCE = "client_divergence"
# 1 of each client whose update is in a masked sum, which tells nothing else of it.
IN_SUM = "in_sum"
# How many clients scored generated images; the context says by what, `n` how many images.
SCORING_CLIENTS = "num_scoring_clients"


@dataclass(frozen=True)
class Record:
    """One number of a run, and what it is a number of.

    Attributes:
        round: 1-based; 0 before the first.
        metric: its name, such as "loss", "fid" or "images_per_second".
        value: finite.
        client: the client that it is about; None: the whole run.
        local_model: whether it is about that client's own weights and not about the global ones.
        reference: the images that it was measured against: "train", "test" or "held_out", each
            client's own; None where the metric leaves no choice.
        real: whether real images stood in for the generated ones, which gives the floor.
        std: standard deviation of `value`; None where there is none.
        n: how many images `value` is of; None where that says nothing.
        context: what else has to be equal for two numbers to be comparable, and words.

    Raises:
        ValueError: `value` is not finite.
    """

    round: int
    metric: str
    value: float
    _: KW_ONLY
    client: int | None = None
    local_model: bool = False
    reference: str | None = None
    real: bool = False
    std: float | None = None
    n: int | None = None
    context: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Refuse what is no number."""
        if not math.isfinite(self.value):
            raise ValueError(
                f"round {self.round}: {self.metric} of {self.subject} must be finite, got "
                f"{self.value}; where training has diverged, start a new run with a smaller "
                "train.lr"
            )

    @property
    def subject(self) -> str:
        """What it is about, in words."""
        if self.client is None:
            return "global"
        return (
            f"local model of client {self.client}" if self.local_model else f"client {self.client}"
        )

    @property
    def tag(self) -> str:
        """What it is called in TensorBoard: an FID looks through Inception, others are FD."""
        is_fd = self.metric == "fid" and self.context.get("extractor") != "inception"
        of = ", ".join(filter(None, [self.reference, "real images" * self.real]))
        return f"{'fd' if is_fd else self.metric}{f' ({of})' if of else ''}/{self.subject}"

    def line(self) -> str:
        """Write it as a line of JSON, without what has its default value."""
        told = {
            name: value
            for name, value in vars(self).items()
            if value is not None and value is not False and value != {}
        }
        return json.dumps(told, allow_nan=False) + "\n"


def records_of(server_round: int, values: Mapping[str, float], **fields: Any) -> list[Record]:
    """Make a record of each value, by metric; all of them have the same further fields."""
    return [Record(server_round, metric, value, **fields) for metric, value in values.items()]


@dataclass(frozen=True)
class Records:
    """All records of a run, in order.

    The methods find those of one metric and take what else tells them apart as keywords:
    `reference`, `client`, `local_model` and `real`, with the defaults of `Record`. A number that
    was recorded twice is the last one.
    """

    all: tuple[Record, ...]

    @cached_property
    def _found(self) -> dict[tuple[object, ...], dict[int, Record]]:
        found: dict[tuple[object, ...], dict[int, Record]] = {}
        for each in self.all:
            key = each.metric, each.client, each.local_model, each.reference, each.real
            found.setdefault(key, {})[each.round] = each
        return found

    def by_round(
        self,
        metric: str,
        *,
        reference: str | None = None,
        client: int | None = None,
        local_model: bool = False,
        real: bool = False,
    ) -> dict[int, Record]:
        """Return the records of a metric by round; empty where there are none."""
        return self._found.get((metric, client, local_model, reference, real), {})

    def series(self, metric: str, **which: Any) -> Series:
        """Return the values of a metric by round."""
        return {number: each.value for number, each in self.by_round(metric, **which).items()}

    def last(self, metric: str, **which: Any) -> Record | None:
        """Return the record of a metric of the last round that has one; None without any."""
        found = self.by_round(metric, **which)
        return found[max(found)] if found else None

    def value(self, metric: str, **which: Any) -> float | None:
        """Return the value of a metric of the last round that has one; None without any."""
        found = self.last(metric, **which)
        return None if found is None else found.value

    def of_clients(self, metric: str, **which: Any) -> dict[int, Series]:
        """Return the values of a metric by client and round, of the clients that have some."""
        found = {client: self.series(metric, client=client, **which) for client in self.clients}
        return {client: series for client, series in found.items() if series}

    @cached_property
    def clients(self) -> list[int]:
        """The numbers of all clients with a record, ascending."""
        return sorted({each.client for each in self.all if each.client is not None})

    @cached_property
    def left_out(self) -> list[Record]:
        """The replies that were not used, by round and client; each activity once."""
        # Keyed, because a round may be evaluated once more after a restart.
        found = {
            (each.round, each.client or 0, each.context["activity"]): each
            for each in self.all
            if each.metric == LEFT_OUT
        }
        return [found[key] for key in sorted(found)]

    def of_client_divergence(self) -> dict[int, list[Record]]:
        """Return where single clients have diverged, by client."""
        found: dict[int, list[Record]] = {}
        for each in self.all:
            if each.metric == CLIENT_DIVERGENCE and each.client is not None:
                found.setdefault(each.client, []).append(each)
        return found

    def up_to(self, number: int) -> "Records":
        """Leave out later rounds."""
        return Records(tuple(each for each in self.all if each.round <= number))

    def of_round(self, number: int) -> "Records":
        """Leave out the other rounds."""
        return Records(tuple(each for each in self.all if each.round == number))


def read_records(file: Path) -> Records:
    """Read a file of records, of this version's schema or of the first; none where it is not there.

    Raises:
        ValueError: a line is no record.
    """
    with understood(file):
        return Records(tuple(_records(_lines(file))))


def _lines(file: Path) -> Iterator[dict[str, Any]]:
    if file.exists():
        # The last line may have been cut off by the end of the process.
        for line in file.read_text(encoding="utf-8").split("\n")[:-1]:
            yield json.loads(line)


def _records(lines: Iterable[dict[str, Any]]) -> Iterator[Record]:
    lines = list(lines)
    old = [line for line in lines if is_of_first_schema(line)]
    yield from (Record(**fields) for fields in translated(old))
    yield from (Record(**line) for line in lines if not is_of_first_schema(line))
