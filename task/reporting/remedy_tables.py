"""The comparison of remedies: how much of the gap between FedAvg and pooled images each closes.

Runs belong into one comparison where all is equal but what the files of conf/remedy change, beside
mode and seed. FedAvg without a remedy is one end of the scale, the centralized run the other.
"""

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from statistics import mean, stdev

from scipy.stats import t as student_t

from task.config import strategy_preset, without_remedy
from task.evaluation.metrics import Use
from task.reporting.generator_tables import (
    ABOUT_SENT,
    DISTANCE,
    NOT_RECORDED,
    SECONDS,
    SENT,
    SPREAD_WITH_KID,
    mean_cost,
    seconds_caption,
)
from task.reporting.metric_table import Quantity
from task.reporting.tables import (
    CONFIDENCE,
    Cell,
    Column,
    Headed,
    Measurement,
    Scores,
    SettingValues,
    Table,
    column_caption,
    column_labels,
    comparisons,
    floor_label,
    floor_scores,
    mean_scores,
    range_caption,
    remedy_free,
    remedy_in,
    scale,
    setting_values,
    told_apart,
)
from task.runs.records import TRAIN
from task.runs.resume import is_about_clients

FEDAVG, CENTRALIZED = "FedAvg", "Centralized"
POOLED_ALONE = setting_values({"train.mode": "centralized"})
DISTANCES = (DISTANCE, Quantity("kid", TRAIN))
# Of the seeds of an interval.
LEAST_SEEDS = 3

ABOUT_REMEDIES = (
    "A row is named by the values in which its runs differ from FedAvg. Centralized: R x E epochs "
    "on the pooled images, without N clients."
)
ABOUT_SHARES = (
    "Gap closed: (FedAvg - remedy) / (FedAvg - Centralized), the mean over the seeds that all "
    f"three have, with its {CONFIDENCE:.0%} interval (Student's t) where there are {LEAST_SEEDS} "
    "or more; fewer have no interval. 0: as FedAvg, 1: as Centralized, below 0: worse than FedAvg."
)
NO_CENTRALIZED = (
    "There is no centralized run beside them, so that it is not known how large the gap is."
)


@dataclass(frozen=True)
class Closed:
    """The share of a gap that is closed, as a column.

    Attributes:
        quantity: that has the gap; less is better.
    """

    quantity: Quantity

    @property
    def heading(self) -> str:
        """The title with an arrow: more is better."""
        return f"gap in {self.quantity.title} closed ↑"


@dataclass(frozen=True)
class SeedMean(Cell):
    """A mean over seeds with its interval.

    Attributes:
        low: end of the interval; None where there are too few seeds for one.
        high: its other end.
    """

    low: float | None = None
    high: float | None = None

    def __str__(self) -> str:
        interval = "" if self.low is None else f"{self.low:.2f} to {self.high:.2f}; "
        told = f" ({interval}{self.seeds} seeds)" if self.seeds > 1 else ""
        return f"{self.mean:.2f}{told}"


SHARES = tuple(map(Closed, DISTANCES))


@dataclass(frozen=True)
class RemedyGroup:
    """Runs of FedAvg and of one remedy or more that can be compared.

    Attributes:
        label: of their data.
        settings: what is equal in all that have it.
        scale: of them, those that tell the size of a run or this comparison from others, in words.
        rows: a measurement of each seed, by the label of the row; FedAvg first.
    """

    label: str
    settings: SettingValues
    scale: str
    rows: Mapping[str, Sequence[Measurement]]

    @property
    def members(self) -> list[Measurement]:
        """All measurements."""
        return [each for members in self.rows.values() for each in members]


def remedy_groups(measured: Iterable[Measurement]) -> list[RemedyGroup]:
    """Find the comparisons of remedies in measurements, the largest first."""
    members = comparisons(measured, lambda each: remedy_free(each.settings))
    found = {key: rows for key, group in members.items() if _has_remedy(rows := _rows_of(group))}
    keys = sorted(found, key=lambda key: (-sum(map(len, found[key].values())), *map(sorted, key)))
    labels = column_labels([column for _, column in keys])
    apart = told_apart([settings for settings, _ in keys])
    return [
        RemedyGroup(label, settings, scale(settings, *apart), found[settings, column])
        for label, (settings, column) in zip(labels, keys, strict=True)
    ]


def _has_remedy(rows: Mapping[str, object]) -> bool:
    return FEDAVG in rows and bool(rows.keys() - {FEDAVG, CENTRALIZED})


def _rows_of(members: Iterable[Measurement]) -> dict[str, list[Measurement]]:
    """Put the seeds of a remedy together: FedAvg, then Centralized, then the others by name."""
    rows: dict[str, list[Measurement]] = {}
    for each in sorted(members, key=lambda each: (each.run.config.seed, str(each.run.path))):
        rows.setdefault(_remedy_label(_remedy_of(each)), []).append(each)
    ends = [name for name in (FEDAVG, CENTRALIZED) if name in rows]
    return {name: rows[name] for name in [*ends, *sorted(rows.keys() - {*ends})]}


def _remedy_of(each: Measurement) -> SettingValues:
    """Pick what a run changes against FedAvg."""
    changed = remedy_in(each.settings)
    if each.run.values["train.mode"] != "centralized":
        return changed
    return POOLED_ALONE | {pair for pair in changed if not is_about_clients(pair[0])}


def _remedy_label(remedy: SettingValues) -> str:
    """Name a row by what it changes, without what comes with the word of `strategy=`."""
    values = dict(remedy)
    mode, strategy = values.pop("train.mode", None), values.pop("strategy.name", None)
    preset = {} if strategy is None else dict(setting_values(strategy_preset(strategy)))
    words = [] if mode is None else [CENTRALIZED]
    words += [] if strategy is None else [f"strategy={strategy}"]
    words += [
        f"{name.rpartition('.')[2]}={values[name]}"
        for name in without_remedy()
        if name in values and values[name] != preset.get(name)
    ]
    return ", ".join(words) or FEDAVG


def remedy_tables(groups: Sequence[RemedyGroup]) -> Iterator[Table]:
    """Lay each comparison out."""
    for number, group in enumerate(groups, 1):
        count = f" ({number} of {len(groups)})" if len(groups) > 1 else ""
        yield _remedy_table(group, f"Remedies{count}: {group.label}")


def _remedy_table(group: RemedyGroup, title: str) -> Table:
    first = group.members[0]
    scores = {
        label: row_scores(members) | _shares(group, label) for label, members in group.rows.items()
    }
    floor: Scores = {
        quantity: cell
        for quantity, cell in floor_scores(first, Use.GENERATORS).items()
        if quantity in DISTANCES
    }
    rows = scores | ({floor_label([first]): floor} if floor else {})
    heads: list[Headed] = [*DISTANCES, *SHARES, SENT, SECONDS]
    return Table(
        title=title,
        rows=[*rows],
        metrics=[head for head in heads if any(head in row for row in scores.values())],
        columns=[Column(group.label, rows)],
        caption=[
            f"{group.scale}.",
            ABOUT_REMEDIES,
            ABOUT_SHARES if CENTRALIZED in group.rows else NO_CENTRALIZED,
            ABOUT_SENT,
            seconds_caption(group.members),
            column_caption(group.label, first, parameters=True),
            *range_caption(dict(group.settings)),
            NOT_RECORDED,
            SPREAD_WITH_KID,
        ],
        verdicts=[*_gap_verdicts(group)],
        members=group.members,
    )


def row_scores(members: Sequence[Measurement]) -> Scores:
    """Return what was measured of the seeds of a row, and what it cost."""
    found = mean_scores(members, Use.GENERATORS)
    scores: Scores = {quantity: found[quantity] for quantity in DISTANCES if quantity in found}
    for cost in (SENT, SECONDS):
        if (cell := mean_cost(cost, members)) is not None:
            scores[cost] = cell
    return scores


def _shares(group: RemedyGroup, label: str) -> Scores:
    """Return the shares of the gaps that a row closes, where they are known."""
    shares: Scores = {}
    for share in SHARES:
        gaps = _gaps_by_seed(group, CENTRALIZED, share.quantity)
        gains = _gaps_by_seed(group, label, share.quantity)
        paired = [seed for seed in gaps if seed in gains]
        if not paired or any(gaps[seed] == 0 for seed in paired):
            continue
        if label in (FEDAVG, CENTRALIZED):
            # An end of the scale, whatever was measured.
            shares[share] = SeedMean(float(label == CENTRALIZED))
        else:
            shares[share] = seed_mean([gains[seed] / gaps[seed] for seed in paired])
    return shares


def _gaps_by_seed(group: RemedyGroup, label: str, quantity: Quantity) -> dict[int, float]:
    """Say for each seed by how much a row is better than FedAvg."""
    plain, other = (_by_seed(group.rows.get(row, []), quantity) for row in (FEDAVG, label))
    return {seed: plain[seed] - other[seed] for seed in plain if seed in other}


def _by_seed(members: Iterable[Measurement], quantity: Quantity) -> dict[int, float]:
    return {
        each.run.config.seed: record.value
        for each in members
        if (record := quantity.found(each.found.records)) is not None
    }


def seed_mean(values: Sequence[float]) -> SeedMean:
    """Average a value of each seed, with the interval of Student's t where there are enough.

    Args:
        values: at least one.
    """
    if len(values) < LEAST_SEEDS:
        return SeedMean(mean(values), seeds=len(values))
    spread = stdev(values)
    half = float(student_t.ppf((1 + CONFIDENCE) / 2, len(values) - 1)) * spread
    half /= math.sqrt(len(values))
    return SeedMean(
        mean(values), spread, len(values), low=mean(values) - half, high=mean(values) + half
    )


def _gap_verdicts(group: RemedyGroup) -> Iterator[str]:
    """Say how large each gap is, and whether it is shown, without which shares mean nothing."""
    for quantity in DISTANCES:
        gaps = _gaps_by_seed(group, CENTRALIZED, quantity)
        if not gaps:
            continue
        gap = seed_mean([*gaps.values()])
        said = f"Gap in {quantity.title} between FedAvg and Centralized: {gap.mean:.4g}"
        if gap.low is None or gap.high is None:
            yield (
                f"{said}, not shown (paired seeds: {gap.seeds}, too few for an interval); whether "
                "its shares mean anything is not known"
            )
            continue
        said += (
            f", {CONFIDENCE:.0%} interval {gap.low:.4g} to {gap.high:.4g}, {gap.seeds} paired seeds"
        )
        found = "not shown" if gap.high >= 0 else "the opposite is shown"
        yield f"{said}: " + (
            "shown" if gap.low > 0 else f"{found}, so that its shares mean nothing"
        )
