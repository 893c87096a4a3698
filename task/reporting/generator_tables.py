"""The comparison of generators: runs that differ in what is trained, beside mode and seed alone.

Runs belong into one comparison where all is equal that is not part of a generator: the images and
how they were split and dealt out, federation, rounds, epochs, and what measured them.
"""

import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from task.audit.records import newest_audit
from task.config import TRAINED_WITH, model_presets, nearest_models
from task.evaluation.metrics import Use
from task.reporting.metric_table import Quantity, quantities
from task.reporting.tables import (
    KINDS,
    SPREAD_OVER_SEEDS,
    Cell,
    Column,
    Measurement,
    Scores,
    SettingValues,
    Table,
    best_verdict,
    column_caption,
    column_labels,
    comparisons,
    floor_label,
    floor_scores,
    mean_cell,
    mean_scores,
    range_caption,
    row_label,
    scale,
    told_apart,
)
from task.runs.records import TEST, TRAIN
from task.runs.resume import is_about_clients
from task.runs.run import Run

# What a generator is: sections, and values that come with the word of `model=` or fit one family.
SECTIONS = {"model", "diffusion"}
OWN_VALUES = {"train.start_from", "federation.local", *(f"train.{name}" for name in TRAINED_WITH)}
DISTANCE = Quantity("fid", TRAIN)
MEGA = 1e6
# Columns of a table by round.
MOST_ROUNDS = 8
ABOUT_ROUNDS = (
    f"At most {MOST_ROUNDS} of the rounds that were measured, the last among them, with the "
    "seconds of training up to each."
)
ABOUT_BUDGETS = (
    "Below: the generator whose least distance within a budget is the smallest, and from which "
    "budget on. Means are compared, without a test."
)

SPREAD_WITH_KID = (
    f"{SPREAD_OVER_SEEDS}; of a single seed and of real images that of KID over its subsets."
)
ABOUT_SECONDS = (
    "Seconds of training: the time in which at least one client, or the centralized run, trained, "
    "summed over the rounds."
)
ABOUT_SENT = (
    "MB sent: weights to the clients that were to train, and back in the replies that were used, "
    "of all rounds, in 10^6 bytes; a centralized run sends none."
)
ABOUT_MODEL = (
    "MB of model: the tensors of model.safetensors, some of which draw no images; parameters: "
    "trained values."
)
ABOUT_REMEMBERED = (
    "AUC of the strongest attack: how well training images are told from held-out ones by the "
    "final weights, 0.5 is guessing; of several attacks, so that about 0.55 is no finding."
)
# A cost that was not recorded is not 0.
NOT_RECORDED = "-: there is none, or it was not measured or recorded in every round."


# A measurement of a run that went on or ended: after which round, of how many generated images.
Point = tuple[int, int]
Course = Mapping[Point, Cell]


@dataclass(frozen=True)
class Cost:
    """What a run costs, as a column.

    Attributes:
        title: in words.
        of: the cost of the first rounds of a run, of so many; None where it was not recorded.
    """

    title: str
    of: Callable[[Run, int], float | None]

    @property
    def heading(self) -> str:
        """The title with an arrow: less is better."""
        return f"{self.title} ↓"


@dataclass(frozen=True)
class GeneratorGroup:
    """Runs of two generators or more that can be compared.

    Attributes:
        label: of their data.
        settings: what is equal in all that have it.
        scale: of them, those that tell the size of a run or this comparison from others, in words.
        modes: by the name of train.mode, then by that of the generator, a measurement of each seed.
    """

    label: str
    settings: SettingValues
    scale: str
    modes: Mapping[str, Mapping[str, Sequence[Measurement]]]

    @property
    def rows(self) -> dict[str, Sequence[Measurement]]:
        """A measurement of each seed, by the label of the row."""
        return {
            _row_of(name, mode): members
            for mode, generators in self.modes.items()
            for name, members in generators.items()
        }

    @property
    def members(self) -> list[Measurement]:
        """All measurements."""
        return [each for members in self.rows.values() for each in members]


def _row_of(name: str, mode: str) -> str:
    return f"{name}, {mode}"


def _recorded_sum(metric: str) -> Callable[[Run, int], float | None]:
    def cost(run: Run, rounds: int) -> float | None:
        series = run.records.series(metric)
        known = [series[number] for number in range(1, rounds + 1) if number in series]
        return sum(known) if len(known) == rounds else None

    return cost


def _megabytes_sent(run: Run, rounds: int) -> float | None:
    sent = _recorded_sum("weight_bytes")(run, rounds)
    return None if sent is None else sent / MEGA


def _megabytes_of_model(run: Run, rounds: int) -> float:
    stored = run.generator.shared(run.generator.state_dict())
    return sum(tensor.nbytes for tensor in stored.values()) / MEGA


def _strongest_auc(run: Run, rounds: int) -> float | None:
    audit = newest_audit(run)
    if audit is None or audit.round != rounds:
        return None
    whole = [each.found for each in audit.attacks if each.client is None]
    return min(whole, key=lambda each: each.p_value).auc if whole else None


ROUNDS = Cost("rounds", lambda run, rounds: float(rounds))
SECONDS = Cost("seconds of training", _recorded_sum("seconds_training"))
SENT = Cost("MB sent", _megabytes_sent)
COSTS = (
    SECONDS,
    SENT,
    Cost("MB of model", _megabytes_of_model),
    Cost("million parameters", lambda run, rounds: run.generator.num_parameters / MEGA),
)
# What giving the model away may cost whose images it was trained on.
REMEMBERED = Cost("AUC of the strongest attack", _strongest_auc)
# What there may be little of.
BUDGETS = (ROUNDS, SECONDS, SENT)


def generator_groups(measured: Iterable[Measurement]) -> list[GeneratorGroup]:
    """Find the comparisons of generators in measurements, the largest first."""
    members = comparisons(measured, _common)
    found = {key: group for key, group in members.items() if _compares(group)}
    keys = sorted(found, key=lambda key: (-len(found[key]), *map(sorted, key)))
    labels = column_labels([column for _, column in keys])
    apart = told_apart([settings for settings, _ in keys])
    return [
        GeneratorGroup(label, settings, scale(settings, *apart), _modes(found[settings, column]))
        for label, (settings, column) in zip(labels, keys, strict=True)
    ]


def _compares(members: Iterable[Measurement]) -> bool:
    """Say whether there are two models that were trained in the same mode."""
    models = {(_mode_of(each), _model_of(each)) for each in members}
    return any(count > 1 for count in Counter(mode for mode, _ in models).values())


def _mode_of(each: Measurement) -> str:
    mode: str = each.run.values["train.mode"]
    return mode


def _is_of_generator(name: str, mode: str) -> bool:
    if mode == "centralized" and is_about_clients(name):
        return False
    return name.partition(".")[0] in SECTIONS or name in OWN_VALUES


def _generator_of(each: Measurement) -> SettingValues:
    values, mode, frozen = each.run.values, _mode_of(each), each.run.config.model.frozen_file
    # Known by its SHA-256, wherever it lies.
    place = frozen.path_value if frozen is not None and values[frozen.sha256_value] else None
    return frozenset(
        (name, value)
        for name, value in each.settings
        if _is_of_generator(name, mode) and name != place
    )


def _common(each: Measurement) -> SettingValues:
    mode = _mode_of(each)
    return frozenset(pair for pair in each.settings if not _is_of_generator(pair[0], mode))


def _model_of(each: Measurement) -> SettingValues:
    return frozenset(pair for pair in _generator_of(each) if pair[0].startswith("model."))


def _modes(members: Sequence[Measurement]) -> dict[str, dict[str, list[Measurement]]]:
    """Put the seeds of a generator together, in each mode; centralized runs first."""
    names = _generator_names(members)

    def place(each: Measurement) -> tuple[str, str, int, str]:
        name = names[_generator_of(each)]
        return _mode_of(each), name, each.run.config.seed, str(each.run.path)

    modes: dict[str, dict[str, list[Measurement]]] = {}
    for each in sorted(members, key=place):
        mode, name, *_ = place(each)
        modes.setdefault(row_label(KINDS[0], mode), {}).setdefault(name, []).append(each)
    return modes


def _generator_names(members: Iterable[Measurement]) -> dict[SettingValues, str]:
    """Name generators by the word of `model=`, what they change of it, and what sets them apart."""
    words = {_generator_of(each): _word(each.run) for each in members}
    named = {}
    for generator, (word, changed) in words.items():
        twins = [dict(other) for other in words if words[other][0] == word]
        own = dict(generator)
        values = {name: {other[name] for other in twins if name in other} for name in own}
        told = [name for name in sorted(own) if name in changed or len(values[name]) > 1]
        said = ", ".join(f"{name}={own[name]}" for name in told)
        named[generator] = f"{word} ({said})" if said else word
    return named


def _word(run: Run) -> tuple[str, frozenset[str]]:
    """Return the word of `model=` that is most like a run's, and the values that it changes.

    It is the family where several words are as like; a file that is frozen is no change.
    """
    words, frozen = nearest_models(run.values), run.config.model.frozen_file
    preset = model_presets()[words[0]] if words else {}
    own = {f"model.{name}": value for name, value in preset.items()}
    if frozen is not None:
        own = {k: v for k, v in own.items() if k not in (frozen.path_value, frozen.sha256_value)}
    changed = frozenset(k for k, v in own.items() if k in run.values and run.values[k] != v)
    return words[0] if len(words) == 1 else run.config.model.family, changed


def generator_tables(groups: Sequence[GeneratorGroup]) -> Iterator[Table]:
    """Lay each comparison out: the final figures, the costs, and the distance by round."""
    for number, group in enumerate(groups, 1):
        count = f" ({number} of {len(groups)})" if len(groups) > 1 else ""
        yield _quality_table(group, f"Generators{count}: {group.label}")
        yield _cost_table(group, f"Costs of generators{count}: {group.label}")
        yield from _tables_by_round(group, f"Generators by round{count}: {group.label}")


def _quality_table(group: GeneratorGroup, title: str) -> Table:
    first = group.members[0]
    scores = {label: mean_scores(members, Use.GENERATORS) for label, members in group.rows.items()}
    floor = floor_scores(first, Use.GENERATORS)
    of_floor = {floor_label([first]): floor} if floor else {}
    return Table(
        title=title,
        rows=[*scores, *of_floor],
        metrics=[
            quantity
            for quantity in quantities(Use.GENERATORS)
            if any(quantity in row for row in scores.values())
        ],
        columns=[Column(group.label, scores | of_floor)],
        caption=[*_group_caption(group), SPREAD_WITH_KID],
        verdicts=[*_least_distances(group, scores)],
        members=group.members,
    )


def _cost_table(group: GeneratorGroup, title: str) -> Table:
    rows: dict[str, Scores] = {}
    for label, members in group.rows.items():
        distance = mean_scores(members, Use.GENERATORS).get(DISTANCE)
        rows[label] = {} if distance is None else {DISTANCE: distance}
        rows[label] |= {
            cost: cell
            for cost in (*COSTS, REMEMBERED)
            if (cell := mean_cost(cost, members)) is not None
        }
    audited = [REMEMBERED] * any(REMEMBERED in row for row in rows.values())
    return Table(
        title=title,
        rows=[*rows],
        metrics=[DISTANCE, *COSTS, *audited],
        columns=[Column(group.label, rows)],
        caption=[
            seconds_caption(group.members),
            ABOUT_SENT,
            ABOUT_MODEL,
            *[ABOUT_REMEMBERED] * len(audited),
            NOT_RECORDED,
            f"{SPREAD_OVER_SEEDS}.",
        ],
    )


def seconds_caption(members: Iterable[Measurement]) -> str:
    """Say what the seconds of training are, and of which machines."""
    devices = sorted({each.run.device or "an unknown machine" for each in members})
    return f"{ABOUT_SECONDS} On {', '.join(devices)}: compare equal machines alone."


def mean_cost(cost: Cost, members: Sequence[Measurement], rounds: int | None = None) -> Cell | None:
    """Average a cost over the seeds; None where it was not recorded of each.

    Args:
        cost: which.
        members: a measurement of each seed.
        rounds: of how many, the first ones; None: of all.
    """
    runs = [each.run for each in members]
    values = [cost.of(run, rounds or run.config.federation.rounds) for run in runs]
    known = [value for value in values if value is not None]
    if len(known) < len(values):
        return None
    # What no seed changes has no spread.
    return mean_cell(known) if len({*known}) > 1 else Cell(known[0])


def _group_caption(group: GeneratorGroup) -> Iterator[str]:
    yield f"{group.scale}."
    if len(group.modes) > 1:
        yield "Centralized: R x E epochs on the pooled images, without N clients."
    named = {name: each[0] for rows in group.modes.values() for name, each in rows.items()}
    yield from (f"{name}: {scale(_generator_of(named[name]))}." for name in sorted(named))
    yield column_caption(group.label, group.members[0])
    yield from range_caption(dict(group.settings))


def _least_distances(group: GeneratorGroup, scores: Mapping[str, Scores]) -> Iterator[str]:
    """Say for each mode which generator's distance is least, and whether that is shown."""
    for mode, generators in group.modes.items():
        for quantity in (DISTANCE, Quantity("fid", TEST)):
            measured = {
                name: scores[_row_of(name, mode)][quantity]
                for name in generators
                if quantity in scores[_row_of(name, mode)]
            }
            if len(measured) > 1:
                best = min(measured, key=lambda name: measured[name].mean)
                said = best_verdict([*measured.values()], [*measured].index(best), quantity)
                yield f"Least {quantity.title}, {mode}: {best}, {said}"


def _tables_by_round(group: GeneratorGroup, title: str) -> Iterator[Table]:
    """Lay out what was measured while the runs trained; nothing where that was done once."""
    courses = {label: _course(members) for label, members in group.rows.items()}
    points = sorted({point for course in courses.values() for point in course})
    if len(points) > 1:
        every = -(-len(points) // MOST_ROUNDS)
        leaders = [*_leaders(group, courses)]
        yield Table(
            title=title,
            rows=[*group.rows],
            metrics=[DISTANCE, SECONDS],
            columns=[_column_of(group, courses, *point) for point in points[::-1][::every][::-1]],
            caption=[
                ABOUT_ROUNDS,
                *[ABOUT_BUDGETS] * bool(leaders),
                *range_caption(dict(group.settings)),
                NOT_RECORDED,
            ],
            verdicts=leaders,
        )


def _course(members: Sequence[Measurement]) -> Course:
    """Average over the seeds what was measured of each of them."""
    found: dict[Point, list[float]] = {}
    for each in members:
        for point, value in _measured_in_rounds(each).items():
            found.setdefault(point, []).append(value)
    return {
        point: mean_cell(values) for point, values in found.items() if len(values) == len(members)
    }


def _measured_in_rounds(each: Measurement) -> dict[Point, float]:
    """Return what was seen through the same extractor in the same range, with the same seed."""
    label = each.found.label
    seen = {name: getattr(label, name) for name in ("extractor", "image_range", "seed")}
    recorded = each.run.records.by_round(DISTANCE.name, reference=DISTANCE.reference)
    found = {
        (number, record.n): record.value
        for number, record in recorded.items()
        if record.n is not None and seen.items() <= record.context.items()
    }
    if (last := DISTANCE.found(each.found.records)) is not None:
        found[each.found.round, label.n_scored] = last.value
    return found


def _column_of(group: GeneratorGroup, courses: Mapping[str, Course], number: int, n: int) -> Column:
    rows: dict[str, Scores] = {}
    for label, members in group.rows.items():
        seconds = mean_cost(SECONDS, members, number)
        if (number, n) in courses[label]:
            rows[label] = {DISTANCE: courses[label][number, n]}
            rows[label] |= {} if seconds is None else {SECONDS: seconds}
    return Column(f"round {number} (n={n:,})", rows)


def _leaders(group: GeneratorGroup, courses: Mapping[str, Course]) -> Iterator[str]:
    """Say for each mode and budget which generator's distance was the least within it."""
    for mode, generators in group.modes.items():
        own = {name: courses[_row_of(name, mode)] for name in generators}
        for n in sorted({n for course in own.values() for _, n in course}):
            points = {name: [each for each in own[name] if each[1] == n] for name in own}
            if sum(map(bool, points.values())) < 2 or max(map(len, points.values())) < 2:
                continue
            for budget in BUDGETS:
                spent = [
                    (cost.mean, own[name][point].mean, name)
                    for name, of_name in points.items()
                    for point in of_name
                    if (cost := mean_cost(budget, generators[name], point[0])) is not None
                ]
                told = "; ".join(f"from {c:.4g} {name} ({d:.4g})" for c, d, name in _led(spent))
                if told:
                    yield f"Least {DISTANCE.title}, n={n:,}, {mode}, by {budget.title}: {told}"


def _led(spent: Iterable[tuple[float, float, str]]) -> list[tuple[float, float, str]]:
    """Of (cost, distance, name), keep where the name that has the least distance so far changes."""
    led: list[tuple[float, float, str]] = []
    least = math.inf
    for cost, distance, name in sorted(spent):
        if distance < least:
            least = distance
            if not led or led[-1][2] != name:
                led.append((cost, distance, name))
    return led
