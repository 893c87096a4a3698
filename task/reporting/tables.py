"""The paper's tables from finished runs: which runs stand side by side, and what they show.

Runs belong into one table where all that determines their weights is equal but the value that
the table varies; seeds are averaged over. Figures belong into one column where, besides, data,
numbers of images and extractor are equal.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from statistics import mean, stdev
from typing import Any, NamedTuple, Protocol

from scipy.stats import t as student_t

from task.config import FILE_SETS, without_remedy
from task.evaluation.features import HASH_DIGITS
from task.evaluation.metrics import Use
from task.reporting.metric_table import Quantity, quantities
from task.reporting.published import (
    PAPER_SIZES,
    PUBLISHED,
    PublishedScores,
    is_papers_federation,
    paper_values,
)
from task.runs.evaluations import Evaluation
from task.runs.records import TEST, TRAIN, Record
from task.runs.resume import WITHOUT_INFLUENCE, is_about_clients
from task.runs.run import Run

# Measures of unequal ones of these are not put into one column.
COLUMN_VALUES = ("n_generated", "n_train", "n_test", "n_floor", "n_scored", "extractor_sha256")

# What a caption says of the settings that all runs of a table share.
SCALE = {
    "federation.rounds": "R",
    "train.local_epochs": "E",
    "federation.num_supernodes": "N",
    "partition.beta": "beta",
    "partition.counts": "counts",
    "federation.clients_per_round": "clients per round",
    "train.batch_size": "batch",
    "train.lr": "lr",
    "model.width": "width",
    "model.num_poolings": "poolings",
    "model.bottom_blocks": "bottom blocks",
    "diffusion.prediction_type": "prediction",
    "diffusion.num_timesteps": "T",
    "diffusion.sampler": "sampler",
}

LITERATURE = "FD is not FID: the scores of the literature look through Inception."
WRAPPED = "The wrapped range of the published tables: never beside figures in the correct range."
PUBLISHED_SCALE = (
    "As published, at the paper's full scale, through Inception, in the wrapped image range: not "
    "comparable with the measured figures above."
)

SPREAD_OVER_SEEDS = "±: the sample standard deviation over the seeds, where a cell says how many"
SPREAD = (
    f"{SPREAD_OVER_SEEDS}; of a single seed and of real images that of the inception score over "
    "its 10 splits."
)

# Of the interval of a difference that a verdict rests on.
CONFIDENCE = 0.95

SettingValues = frozenset[tuple[str, str]]


@dataclass(frozen=True)
class Kind:
    """One of the paper's tables.

    Attributes:
        number: in Roman figures.
        key: path of the value that differs between its rows.
        subject: what it is about.
        ordering: what the paper concludes from it.
        worst: index of the row that is worst by that.
    """

    number: str
    key: str
    subject: str
    ordering: str
    worst: int

    def takes(self, values: Mapping[str, Any]) -> bool:
        """Say whether a run of such a configuration can be in this table.

        I and V are one comparison, V of images that lie in files. The others take any data.
        """
        if self.key == "train.mode":
            # Other strategies than its rows name are no part of the paper.
            named = values["train.mode"] == "centralized" or values["strategy.name"] == "fedavg"
            return named and (values["data.name"] in FILE_SETS) == (self.number == "V")
        return values["train.mode"] == "federated" and values[self.key] is not None


KINDS = (
    Kind("I", "train.mode", "centralized and federated", "Centralized better than FedAvg", -1),
    Kind("II", "partition.beta", "skew of the partition", "the smallest beta worst", 0),
    Kind("III", "federation.num_supernodes", "number of clients", "the largest N worst", -1),
    Kind("IV", "train.local_epochs", "local epochs", "the smallest E worst", 0),
    Kind(
        "V",
        "train.mode",
        "centralized and federated, image files",
        "Centralized better than FedAvg",
        -1,
    ),
)


@dataclass(frozen=True, eq=False)
class Measurement:
    """A run, seen through one extractor in one image range.

    Attributes:
        run: the run.
        found: what was measured of it.
        settings: what determined its weights, by path, without data and seed, and through what
            it was seen.
        column: what must be equal for figures to stand in one column.
    """

    run: Run
    found: Evaluation
    settings: SettingValues
    column: SettingValues

    def row(self, kind: Kind) -> Any:
        """Return the value that a table varies."""
        return self.run.values[kind.key]


@dataclass(frozen=True)
class Cell:
    """A value in a table: of one run, the mean over several seeds, published, or of real images.

    Attributes:
        mean: the value.
        std: over the seeds, or, of a single inception score, over its splits; or None.
        seeds: their number.
    """

    mean: float
    std: float | None = None
    seeds: int = 1

    def __str__(self) -> str:
        digits = 2 if abs(self.mean) >= 1 else 4
        spread = "" if self.std is None else f" ± {self.std:.{digits}f}"
        return f"{self.mean:.{digits}f}{spread}" + f" ({self.seeds} seeds)" * (self.seeds > 1)


class Gap(NamedTuple):
    """By how much one mean is worse than another, with the interval of that and its p value."""

    mean: float
    low: float
    high: float
    p_value: float


class Headed(Protocol):
    """What a column tells of each row: a `Quantity`, or a cost of a run."""

    @property
    def heading(self) -> str:
        """What stands above the cells."""


Scores = dict[Headed, Cell]
Columns = Mapping[str, Sequence[Measurement]]


@dataclass(frozen=True)
class Column:
    """What stands under one heading: by row, then by metric.

    Attributes:
        label: the heading: a data set, or a round.
        rows: the cells of each row.
    """

    label: str
    rows: Mapping[str, Scores]

    def score(self, row: str, metric: Headed) -> Cell | None:
        """Return what stands in a cell; None where nothing was measured."""
        return self.rows.get(row, {}).get(metric)


@dataclass(frozen=True)
class Table:
    """A table as it is to be laid out.

    Attributes:
        title: with its number.
        rows: their labels, from top to bottom.
        metrics: of each column.
        columns: one per data set or round, and one more where there are published values to
            compare with.
        caption: what it holds for, a sentence per line.
        verdicts: whether the paper's ordering holds, a line per data set and metric.
        members: the measurements in it.
    """

    title: str
    rows: Sequence[str]
    metrics: Sequence[Headed]
    columns: Sequence[Column]
    caption: Sequence[str]
    verdicts: Sequence[str] = ()
    members: Sequence[Measurement] = ()

    @property
    def cells(self) -> list[tuple[Column, Headed]]:
        """The column and the metric of each cell of a row."""
        return [(column, metric) for column in self.columns for metric in self.metrics]


def measurements(runs: Iterable[Run]) -> tuple[list[Measurement], dict[str, list[str]]]:
    """Take the evaluations of runs apart, without those that must not be in a table.

    Returns:
        The measurements, and by reason the runs whose evaluations were left out.
    """
    taken: dict[object, Measurement] = {}
    unmeasured, stale, repeats = [], [], []
    for run in runs:
        if not run.main_evaluations:
            unmeasured.append(str(run.path))
        if len(run.final_evaluations) < len(run.main_evaluations):
            stale.append(f"{run.path} (it now ends after round {run.config.federation.rounds})")
        for each in (_measurement(run, found) for found in run.final_evaluations):
            mode = each.run.values["train.mode"]
            trained = each.settings if mode == "federated" else without_clients(each.settings)
            same = (trained, each.column, mode, each.run.values["seed"])
            twin = taken.setdefault(same, each)
            if twin is not each:
                repeats.append(f"{run.path} (of {twin.run.path})")
    left_out = {
        "finished, not measured (feddm evaluate RUN)": unmeasured,
        "measured before the last round (feddm evaluate RUN)": stale,
        "repeats, but for rounding, of another run": repeats,
    }
    return [*taken.values()], {why: which for why, which in left_out.items() if which}


def _measurement(run: Run, found: Evaluation) -> Measurement:
    column, label = run.data_values, found.label
    column |= {name: getattr(label, name) for name in COLUMN_VALUES} | {"eval.seed": label.seed}
    settings = _weight_settings(run.values)
    settings |= {"extractor": label.extractor, "image_range": label.image_range}
    return Measurement(run, found, setting_values(settings), setting_values(column))


def _weight_settings(values: Mapping[str, Any]) -> dict[str, Any]:
    """Pick what determines weights, but for the mode, the data and the seed."""
    ignored = WITHOUT_INFLUENCE | {"seed", "train.mode"}
    found = {k: v for k, v in values.items() if not k.startswith("data.") and k not in ignored}
    if found["federation.clients_per_round"] is None:
        found["federation.clients_per_round"] = values["federation.num_supernodes"]
    return found


def setting_values(values: Mapping[str, Any]) -> SettingValues:
    """Write values by path as those of a `Measurement`, so that equal ones are equal."""
    return frozenset((name, _plain_value(value)) for name, value in values.items())


def _plain_value(value: object) -> str:
    """Write a value so that equal ones look equal: 5.0 as 5, None as null."""
    if isinstance(value, float):
        return str(value).removesuffix(".0")
    return "null" if value is None else str(value)


def build_tables(measured: Sequence[Measurement]) -> list[Table]:
    """Build every table that measurements give, in the paper's order; published ones at the end.

    A table has two rows or more, or is none. Where settings that are equal within a table differ
    between measurements, there are several tables of a number, the fullest first.
    """
    tables, published = [], []
    for kind in KINDS:
        groups = [
            (key, columns)
            for key, m in _groups(kind, measured)
            if (columns := _split_columns(kind, m))
        ]
        groups.sort(key=lambda group: -sum(map(len, group[1].values())))
        apart = told_apart([settings for settings, _ in groups])
        found = []
        for number, (settings, columns) in enumerate(groups, 1):
            count = f" ({number} of {len(groups)})" if len(groups) > 1 else ""
            title = f"Table {kind.number}{count}: {kind.subject}"
            found.append(_table(kind, title, settings, columns, apart))
        beside = any(
            len(table.columns) > len(group[1]) for table, group in zip(found, groups, strict=True)
        )
        if found and not beside:
            published.append(_published_table(kind))
        tables += found
    return [*tables, *published]


def _groups(
    kind: Kind, measured: Sequence[Measurement]
) -> Iterator[tuple[SettingValues, list[Measurement]]]:
    """Put measurements together that are equal in all but what a table varies."""
    groups: dict[SettingValues, list[Measurement]] = {}
    centralized = []
    for each in measured:
        if not kind.takes(each.run.values):
            continue
        if each.run.values["train.mode"] == "centralized":
            centralized.append(each)
            continue
        for settings in _group_settings(kind, each):
            groups.setdefault(settings, []).append(each)
    baselines: dict[SettingValues, list[Measurement]] = {}
    for each in centralized:
        # It has no clients, so that it fits any federation; the paper's, where that is there.
        fitting = _without_repeats(
            [s for s in groups if without_clients(s) == without_clients(each.settings)]
        )
        for settings in [
            s for s in fitting if is_papers_federation(groups[s][0].run.values)
        ] or fitting:
            baselines.setdefault(settings, []).append(each)
    for settings, members in groups.items():
        yield settings, members + baselines.get(settings, [])


def _without_repeats(groups: Sequence[SettingValues]) -> list[SettingValues]:
    """Leave out remedies for what stands in another group without any."""
    plain = {remedy_free(settings) for settings in groups if not remedy_in(settings)}
    return [s for s in groups if not remedy_in(s) or remedy_free(s) not in plain]


def remedy_in(settings: SettingValues) -> SettingValues:
    """Pick the settings that are changed against FedAvg without a remedy."""
    values = without_remedy()
    return frozenset(pair for pair in settings if pair[0] in values) - setting_values(values)


def remedy_free(settings: SettingValues) -> SettingValues:
    """Leave out the settings that remedies change."""
    return frozenset(pair for pair in settings if pair[0] not in without_remedy())


def comparisons(
    measured: Iterable[Measurement], common: Callable[[Measurement], SettingValues]
) -> dict[tuple[SettingValues, SettingValues], list[Measurement]]:
    """Put measurements together whose columns are equal and some of their settings.

    Args:
        measured: in any order.
        common: takes the settings that are to be equal.

    Returns:
        The measurements by these settings and their column.
    """
    members: dict[tuple[SettingValues, SettingValues], list[Measurement]] = {}
    centralized = []
    for each in measured:
        if each.run.values["train.mode"] == "centralized":
            centralized.append(each)
        else:
            members.setdefault((common(each), each.column), []).append(each)
    federations = [*members]
    for each in centralized:
        # It has no clients, so that it fits any federation.
        alone = without_clients(common(each)), each.column
        fitting = [key for key in federations if (without_clients(key[0]), key[1]) == alone]
        for key in fitting or [alone]:
            members.setdefault(key, []).append(each)
    return members


def without_clients(settings: SettingValues) -> SettingValues:
    """Leave out what says nothing in a centralized run."""
    return frozenset((name, value) for name, value in settings if not is_about_clients(name))


def _group_settings(kind: Kind, each: Measurement) -> Iterator[SettingValues]:
    settings = dict(each.settings)
    varied = settings.pop(kind.key, None)
    yield frozenset(settings.items())
    if kind.number == "III" and settings["federation.clients_per_round"] == varied:
        # All of N=10 goes with 10 of N=30, as in the paper, and with all of N=30.
        yield frozenset((settings | {"federation.clients_per_round": "all"}).items())


def _split_columns(kind: Kind, members: Sequence[Measurement]) -> Columns:
    """Split a group into columns, by label, without those that do not compare two rows."""
    columns: dict[SettingValues, list[Measurement]] = {}
    for each in members:
        columns.setdefault(each.column, []).append(each)
    compared = {
        key: column
        for key, column in columns.items()
        if len({each.row(kind) for each in column}) > 1
    }
    return dict(zip(column_labels([*compared]), compared.values(), strict=True))


def column_labels(columns: Sequence[SettingValues]) -> list[str]:
    """Name columns by their data sets, and those of one data set by what sets them apart."""
    values = [dict(column) for column in columns]
    labels = []
    for value in values:
        others = [other for other in values if other["data.name"] == value["data.name"]]
        apart = [name for name in sorted(value) if len({other[name] for other in others}) > 1]
        words = ", ".join(f"{name}={value[name]}" for name in apart)
        labels.append(value["data.name"] + (f" ({words})" if words else ""))
    return labels


def told_apart(groups: Sequence[SettingValues]) -> list[str]:
    """Name the settings, beyond those that every caption says, that differ between groups."""
    names = {name for settings in groups for name, _ in settings}
    return sorted(
        name
        for name in names - SCALE.keys() - {"extractor", "image_range"}
        if len({dict(settings).get(name) for settings in groups}) > 1
    )


def _table(
    kind: Kind, title: str, settings: SettingValues, columns: Columns, apart: Sequence[str]
) -> Table:
    members = [each for column in columns.values() for each in column]
    rows = {row_label(kind, row): row for row in sorted({each.row(kind) for each in members})}
    floor = floor_label(column[0] for column in columns.values())
    published = {
        name: column for name, column in columns.items() if _at_full_scale(kind, settings, column)
    }
    laid_out: list[Column] = []
    verdicts: list[str] = []
    for name, column in columns.items():
        whole = name in published
        scores = {
            label: mean_scores(
                [each for each in column if each.row(kind) == row], Use.TABLES, whole=whole
            )
            for label, row in rows.items()
        }
        data = column[0].run.values["data.name"]
        verdicts += _verdicts(kind, name, scores, data)
        laid_out.append(
            Column(name, scores | {floor: floor_scores(column[0], Use.TABLES, whole=whole)})
        )
        if name in published:
            laid_out.append(_published_column(kind, data))
    return Table(
        title=title,
        # Without a floor of as many images as the scores are of, there is no row of it.
        rows=[*rows, *[floor] * any(column.rows.get(floor) for column in laid_out)],
        metrics=[
            quantity
            for quantity in quantities(Use.TABLES)
            if any(quantity.found(each.found.records) for each in members)
        ],
        columns=laid_out,
        caption=_caption(settings, columns, published, apart),
        verdicts=verdicts,
        members=members,
    )


def row_label(kind: Kind, value: Any) -> str:
    """Name a row as the paper does."""
    if kind.key == "train.mode":
        return "Centralized" if value == "centralized" else "FedAvg"
    return f"{SCALE[kind.key]}={_plain_value(value)}"


def mean_scores(members: Sequence[Measurement], use: Use, *, whole: bool = False) -> Scores:
    """Average over the seeds.

    Args:
        members: a measurement of each seed.
        use: of the metrics that are wanted.
        whole: whether scores are those of all generated images; else of as many as the floor has.
    """
    scores: Scores = {}
    for quantity in quantities(use):
        found = [
            record
            for each in members
            if (record := _recorded_score(quantity, each, whole=whole)) is not None
        ]
        if found:
            scores[quantity] = mean_cell([each.value for each in found], found[0].std)
    return scores


def mean_cell(values: Sequence[float], std: float | None = None) -> Cell:
    """Average the values of one seed or more.

    Args:
        values: at least one.
        std: what stands beside the value of a single seed.
    """
    if len(values) == 1:
        return Cell(values[0], std)
    return Cell(mean(values), stdev(values), len(values))


def _recorded_score(quantity: Quantity, each: Measurement, *, whole: bool) -> Record | None:
    """Return the score of all generated images, where that is asked for and differs."""
    everything = quantity.found(each.found.whole) if whole else None
    return everything or quantity.found(each.found.records)


def floor_label(of: Iterable[Measurement]) -> str:
    """Name the row of real images by their number in each column."""
    sizes = dict.fromkeys(f"{each.found.label.n_floor:,}" for each in of)
    return f"real images (floor, n={' / '.join(sizes)})"


def floor_scores(each: Measurement, use: Use, *, whole: bool = False) -> Scores:
    """Return what real images reach, where as many of them are beside as many generated ones."""
    if _scored(each, whole=whole) != each.found.label.n_floor:
        return {}
    return {
        quantity: Cell(record.value, record.std)
        for quantity in quantities(use)
        if (record := quantity.found(each.found.records, real=True)) is not None
    }


def _scored(each: Measurement, *, whole: bool) -> int:
    """Return how many generated images the scores of a column are of."""
    label = each.found.label
    return label.n_generated if whole else label.n_scored


def scale(settings: SettingValues, *further: str) -> str:
    """Say the settings of `SCALE` in a line, and further ones that there are by their names."""
    values = dict(settings)
    words = [
        f"{symbol}={values[key]}"
        for key, symbol in SCALE.items()
        if values.get(key, "null") != "null"
    ]
    return ", ".join(words + [f"{name}={values[name]}" for name in further if name in values])


def _caption(
    settings: SettingValues, columns: Columns, published: Columns, apart: Sequence[str]
) -> list[str]:
    values = dict(settings)
    lines = [scale(settings, *apart) + "."]
    if any(len({m.run.values["train.mode"] for m in column}) > 1 for column in columns.values()):
        lines.append("Centralized: R x E epochs on the pooled images, without N clients.")
    lines += [
        column_caption(label, column[0], whole=label in published, parameters=True)
        for label, column in columns.items()
    ]
    return [*lines, *range_caption(values), SPREAD]


def range_caption(values: Mapping[str, str]) -> Iterator[str]:
    """Say what figures of an image range and an extractor must not be compared with.

    Args:
        values: of `SettingValues`, by path.
    """
    yield f"Image range {values['image_range']}; FD depends on n: compare equal n only."
    if values["image_range"] == "paper":
        yield WRAPPED
    if values["extractor"] != "inception":
        yield LITERATURE


def column_caption(
    name: str, each: Measurement, *, whole: bool = False, parameters: bool = False
) -> str:
    """Say what the figures of a column are of.

    Args:
        name: of the column.
        each: one of its measurements.
        whole: see `mean_scores`.
        parameters: whether to say their number, which is that of all its models.
    """
    label, data = each.found.label, each.run.config.data
    scored = _scored(each, whole=whole)
    return (
        f"{name}: {data.image_size}x{data.image_size}, {label.n_generated:,} generated, "
        f"{label.n_train:,} training and {label.n_test:,} test images; scores of "
        f"{scored:,} generated and floor of {label.n_floor:,} real ones"
        + (", which cannot be compared and is left out" if scored != label.n_floor else "")
        + (f"; {each.run.generator.num_parameters:,} parameters" if parameters else "")
        + f"; extractor {label.extractor} "
        f"{label.extractor_sha256[:HASH_DIGITS]}."
    )


def _verdicts(kind: Kind, label: str, rows: Mapping[str, Scores], data: str) -> Iterator[str]:
    """Say for each metric whether the paper's ordering holds, and whether it held in the paper."""
    in_paper = {row_label(kind, value): row for value, row in PUBLISHED[kind.number].items()}
    published = [row[data] for row in in_paper.values() if data in row]
    if [*rows][kind.worst] != [*in_paper][kind.worst]:
        published = []  # It speaks of another row.
    for quantity in quantities(Use.TABLES):
        scores = [row[quantity] for row in rows.values() if quantity in row]
        if len(scores) < 2:
            continue
        line = (
            f"{kind.ordering}, {label}, {quantity.title}: {verdict(scores, kind.worst, quantity)}"
        )
        theirs = [row[quantity] for row in map(_published_scores, published) if quantity in row]
        if theirs:
            holds = min(gap.mean for gap in _gaps(theirs, kind.worst, quantity)) > 0
            line += "; in the paper it " + ("holds" if holds else "does not hold")
        yield line


def verdict(scores: Sequence[Cell], worst: int, quantity: Quantity) -> str:
    """Say whether one score is shown to be worse than all others, by Welch's t test of each pair.

    Args:
        scores: two or more.
        worst: index of the one that should be.
        quantity: what they are scores of.

    Returns:
        The verdict, with the difference to the score that it is least shown for, the interval
        of that difference, and Welch's p value. A single seed has no interval and shows nothing.
    """
    return _shown(_gaps(scores, worst, quantity))


def best_verdict(scores: Sequence[Cell], best: int, quantity: Quantity) -> str:
    """Say whether one score is shown to be better than all others; see `verdict`."""
    gaps = [
        _gap(other, scores[best], _sign(quantity))
        for number, other in enumerate(scores)
        if number != best
    ]
    return _shown(gaps)


def _shown(gaps: Sequence[Gap]) -> str:
    gap = min(gaps, key=lambda gap: (gap.low, gap.mean))
    said = f"difference {gap.mean:.4g}"
    if not math.isfinite(gap.low):
        return f"not shown ({said}; a single seed, so that no interval is known)"
    said += f", {CONFIDENCE:.0%} interval {gap.low:.4g} to {gap.high:.4g}, p={gap.p_value:.2g}"
    if gap.low > 0:
        return f"shown ({said})"
    return f"{'the opposite is shown' if gap.high < 0 else 'not shown'} ({said})"


def _gaps(scores: Sequence[Cell], worst: int, quantity: Quantity) -> list[Gap]:
    """By how much the worst is worse than each other one."""
    chosen = scores[worst]
    return [_gap(chosen, other, _sign(quantity)) for other in scores if other is not chosen]


def _sign(quantity: Quantity) -> int:
    return -1 if quantity.metric.better == "higher" else 1


def _gap(worse: Cell, better: Cell, sign: int) -> Gap:
    """Compare two means by Welch's t test, with the interval of their difference."""
    mean = sign * (worse.mean - better.mean) + 0.0
    if min(worse.seeds, better.seeds) < 2:
        return Gap(mean, -math.inf, math.inf, math.nan)
    variances = [(score.std or 0.0) ** 2 / score.seeds for score in (worse, better)]
    if sum(variances) == 0:
        return Gap(mean, mean, mean, float(mean == 0))
    freedom = sum(variances) ** 2 / sum(
        variance**2 / (score.seeds - 1)
        for variance, score in zip(variances, (worse, better), strict=True)
    )
    error = math.sqrt(sum(variances))
    half = float(student_t.ppf((1 + CONFIDENCE) / 2, freedom)) * error
    return Gap(mean, mean - half, mean + half, 2 * float(student_t.sf(abs(mean) / error, freedom)))


def _at_full_scale(kind: Kind, settings: SettingValues, column: Sequence[Measurement]) -> bool:
    """Say whether a column was trained and measured as the paper's was."""
    label, run = column[0].found.label, column[0].run
    sizes = PAPER_SIZES.get(run.config.data.name)
    if sizes != (label.n_train, label.n_generated):
        return False
    seen = {"extractor": "inception", "image_range": "paper"}
    ignored = {kind.key, "data.root", "data.cache_dir", "data.on_corrupt"}
    return any(
        setting_values({**_weight_settings(values), **seen})
        - {(kind.key, _plain_value(values[kind.key]))}
        == settings
        and all(
            run.values[k] == v
            for k, v in values.items()
            if k.startswith("data.") and k not in ignored
        )
        for values in paper_values(run.config.data.name)
    )


def _published_column(kind: Kind, data: str) -> Column:
    return Column(
        f"{data} (paper)",
        {
            row_label(kind, value): _published_scores(row[data])
            for value, row in PUBLISHED[kind.number].items()
        },
    )


def _published_scores(published: PublishedScores) -> Scores:
    inception_score = Cell(published.inception_score, published.inception_score_std)
    scores: Scores = {
        Quantity("inception_score"): inception_score,
        Quantity("fid", TRAIN): Cell(published.fid_train),
    }
    if published.fid_test is not None:
        scores[Quantity("fid", TEST)] = Cell(published.fid_test)
    return scores


def _published_table(kind: Kind) -> Table:
    rows = PUBLISHED[kind.number]
    columns = [_published_column(kind, data) for data in next(iter(rows.values()))]
    return Table(
        title=f"Published values of Table {kind.number}: {kind.subject}",
        rows=[row_label(kind, value) for value in rows],
        metrics=[
            quantity
            for quantity in quantities(Use.TABLES)
            if any(quantity in scores for column in columns for scores in column.rows.values())
        ],
        columns=columns,
        caption=[PUBLISHED_SCALE, "±: as published, of the inception score."],
    )
