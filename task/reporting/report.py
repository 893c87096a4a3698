"""A report of one run, or of several side by side: one page that needs nothing from elsewhere."""

import base64
import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import vl_convert
from jinja2 import Environment
from markupsafe import Markup

from task.config import flat_values
from task.evaluation.metrics import Use
from task.files import atomic_path
from task.generation.grids import read_grid
from task.progress import duration
from task.reporting.charts import (
    CONFIG,
    Drawing,
    class_chart,
    compared_chart,
    loss_chart,
    metric_charts,
    overhead_chart,
    participation_chart,
    time_chart,
    update_chart,
)
from task.reporting.comparison import DATA_KEYS, LOSS_KEYS, alike, incomparable
from task.reporting.history import POOLED, RunHistory, read_history
from task.reporting.metric_table import (
    HEADS,
    Figure,
    caption,
    figures,
    measured,
    metric_rows,
)
from task.reporting.report_page import SCRIPT, STYLE, TEMPLATE
from task.reporting.run_summary import (
    describe_run,
    evaluated_metrics,
    found_metrics,
    key_figures,
    loss_figures,
)
from task.reporting.warning_signs import Check, State, checks
from task.runs.evaluations import Evaluation
from task.runs.records import HELD_OUT, SCORING_CLIENTS, TEST, TRAIN, Record
from task.runs.repeat import (
    resubmitting_command,
    resuming_command,
    submitting_command,
    training_command,
)
from task.runs.run_directory import REPORT_FILE, different_values

# A page of hundreds of pictures is too large to open.
MOST_PICTURES = 40
CONTENT = (
    "This page holds what the folder of the run holds, which may be much: generated images; of "
    "each hospital, by number, its losses, its scores and its images of each class; reasons of "
    "failures; names of classes, of the machine that it ran on, and of folders there. Look at it "
    "before you hand it on."
)
SUBMITTED = (
    "This trains the run once more, into a folder of its own. It is run in a checkout of the code "
    "that is named above; CONNECTION is the name of the SuperLink in Flower's configuration."
)


@dataclass(frozen=True)
class Text:
    """A paragraph."""

    text: str
    kind: str = "text"


@dataclass(frozen=True)
class Listing:
    """Items of a list; a title is shown where it is folded."""

    items: Sequence[str]
    title: str = ""
    folded: bool = False
    kind: str = "list"


@dataclass(frozen=True)
class Figures:
    """Names and values in large type."""

    pairs: Sequence[tuple[str, str]]
    kind: str = "figures"


@dataclass(frozen=True)
class Facts:
    """Names and what is said of them, a line each."""

    pairs: Sequence[tuple[str, str]]
    kind: str = "facts"


@dataclass(frozen=True)
class Charts:
    """Charts side by side, where there is room."""

    drawings: Sequence[Drawing]
    kind: str = "charts"


@dataclass(frozen=True)
class Table:
    """A table whose first column names the rows."""

    title: str
    heads: Sequence[str]
    rows: Sequence[Sequence[str]]
    folded: bool = False
    kind: str = "table"


@dataclass(frozen=True)
class Code:
    """Text as it stands in a file or on a command line."""

    title: str
    text: str
    folded: bool = False
    kind: str = "code"


@dataclass(frozen=True)
class Picture:
    """A picture that the page holds.

    Attributes:
        title: a few words.
        says: what is seen.
        source: the picture itself, as an address.
        rows: names of its rows; empty where they stand in the picture.
    """

    title: str
    says: str
    source: str
    rows: Sequence[str] = ()


@dataclass(frozen=True)
class Pictures:
    """Pictures of one kind, beside each other or, with a slider, one at a time."""

    title: str
    pictures: Sequence[Picture]
    slider: bool = False
    kind: str = "pictures"


Block = Text | Listing | Figures | Facts | Charts | Table | Code | Pictures


@dataclass(frozen=True)
class Section:
    """A part of a page, with the anchor of its heading and the style of its look."""

    anchor: str
    title: str
    blocks: Sequence[Block]
    look: str = ""


@dataclass(frozen=True)
class Page:
    """What a template is filled with; sections without blocks are left out."""

    title: str
    sections: Sequence[Section]


def write_report(run: Path, *others: Path, file: Path | None = None) -> Path:
    """Write the page of a run, or of several side by side.

    Args:
        run: its folder.
        *others: further ones to compare it with.
        file: to write; None: `report.html` in the folder of the only run.

    Returns:
        The file.

    Raises:
        ValueError: there is no run in a folder, a file of it is broken, no file is named for
            several, or it is none that can be written.
        OSError: the file cannot be written.
    """
    if file is None and others:
        raise ValueError("--out must name the file of a comparison, got none; add --out FILE.html")
    if file is not None:
        _check_writable(file)
    histories = [read_history(folder) for folder in (run, *others)]
    page = compare(histories) if others else describe(histories[0])
    file = run / REPORT_FILE if file is None else file
    with atomic_path(file) as aside:
        aside.write_text(render(page), encoding="utf-8")
    return file


def _check_writable(file: Path) -> None:
    if file.is_dir():
        raise ValueError(f"--out must be a file, got the folder {file}; add a name, such as x.html")
    if not file.parent.is_dir():
        raise ValueError(f"--out: there is no folder {file.parent}; make it first")


def render(page: Page) -> str:
    """Fill the template; whatever comes from a run is escaped."""
    environment = Environment(autoescape=True)
    # A browser reads no NaN.
    environment.policies["json.dumps_kwargs"] = {"allow_nan": False}
    return environment.from_string(TEMPLATE).render(
        page=page,
        footer=CONTENT,
        style=Markup(STYLE),
        script=Markup(SCRIPT),
        library=Markup(chart_library()),
        hashes=Markup(" ".join(map(_hash, (chart_library(), SCRIPT)))),
        config=CONFIG,
    )


def _hash(script: str) -> str:
    """Name a script for a browser, which runs no other."""
    digest = hashlib.sha256(script.encode()).digest()
    return f"'sha256-{base64.b64encode(digest).decode('ascii')}'"


@cache
def chart_library() -> str:
    """Return the JavaScript that draws the charts, which takes seconds to put together."""
    # Within a script element nothing else may end it.
    library: str = vl_convert.javascript_bundle()  # type: ignore[call-arg]
    return library.replace("</script", "<\\/script")


def describe(history: RunHistory) -> Page:
    """Lay a run out as a page."""
    sections = [
        _verdict({"": checks(history)}, state=_state(history)),
        Section("samples", "Samples", _samples(history)),
        Section("summary", "Summary", _summary(history)),
        Section("course", "How it went", _course(history)),
        Section("participation", "Who took part", _participation(history)),
        Section("data", "Training images", _data(history)),
        Section("metrics", "Metrics", _metrics(history)),
        Section("configuration", "Configuration", _configuration(history)),
    ]
    return Page(f"Run {history.name}", [section for section in sections if section.blocks])


def compare(histories: Sequence[RunHistory]) -> Page:
    """Lay several runs out side by side, after what makes their figures incomparable."""
    runs = dict(zip(labels([each.path for each in histories]), histories, strict=True))
    found = {f"{label}: ": checks(run) for label, run in runs.items()}
    states = [block for run in runs.values() for block in _state(run)]
    sections = [
        _verdict(found, apart=incomparable(runs), state=states),
        Section("differences", "What differs", _differences(runs)),
        Section("samples", "Last samples", _last_samples(runs)),
        Section("figures", "Key figures", [_side_by_side(runs)]),
        Section("course", "How they went", _charts(*_compared_losses(runs))),
        Section("metrics", "Metrics over rounds", _charts(*_compared_metrics(runs))),
    ]
    title = f"Comparison of {', '.join(runs)}"
    return Page(title, [section for section in sections if section.blocks])


def labels(paths: Sequence[Path]) -> list[str]:
    """Name runs by as many of the last parts of their paths as tell them apart."""
    parts = [path.resolve().parts for path in paths]
    for number in range(1, max(map(len, parts))):
        names = ["/".join(each[-number:]) for each in parts]
        if len(set(names)) == len(names):
            return names
    raise ValueError(f"RUN must be different folders, got {', '.join(map(str, paths))}")


def _verdict(
    found: Mapping[str, Sequence[Check]], *, state: Sequence[Block], apart: Sequence[str] = ()
) -> Section:
    """Show what was looked for, warnings first.

    Args:
        found: the checks, by what stands before each sentence.
        state: of runs that are not over.
        apart: what keeps runs from being compared.
    """
    says: dict[State, list[str]] = {kind: [] for kind in State}
    for label, each in found.items():
        for check in each:
            subject = "" if check.state is State.WARNING else f"{check.subject}. "
            says[check.state].append(f"{label}{subject}{check.says}")
    blocks: list[Block] = [*([Listing(apart)] if apart else []), *state]
    if says[State.WARNING]:
        blocks += [Listing(says[State.WARNING])]
    if says[State.UNMEASURED]:
        blocks += [Text("Not measured:"), Listing(says[State.UNMEASURED])]
    if says[State.CLEAR]:
        head = f"Looked for and not found: {len(says[State.CLEAR])} signs"
        blocks += [Listing(says[State.CLEAR], head, folded=True)]
    states = {check.state for each in found.values() for check in each}
    warned = apart or State.WARNING in states
    look = "warning" if warned else "" if State.UNMEASURED in states else "calm"
    return Section("warnings", "Warnings" if warned else "Checks", blocks, look)


def _state(history: RunHistory) -> list[Block]:
    """Say of a run that is not over how far it is, or how to go on with it."""
    done = f"{history.rounds_done} of {history.config.federation.rounds} rounds are done"
    if history.running:
        return [Text(f"The run {history.name} is going on: {done}, and this page shows them.")]
    if history.finished:
        return []
    command = resuming_command(history.config, history.path)
    if history.setting == "real nodes" and history.run_config is not None:
        command = resubmitting_command(history.run_config, history.path)
    return [Code(f"To go on with {history.name}, of which {done}:", command)]


def _summary(history: RunHistory) -> list[Block]:
    metrics = _measured(history)
    sentences = [Text(sentence) for sentence in describe_run(history)]
    large = Figures([*key_figures(history), *metrics])
    return [*sentences, large, Facts(_origin(history))]


def _origin(history: RunHistory) -> list[tuple[str, str]]:
    """Say when, where, on what and with what a run was made."""
    return [*_when_and_where(history), *_which_data(history), *_which_code(history)]


def _when_and_where(history: RunHistory) -> list[tuple[str, str]]:
    times = history.work_times
    if not times:
        return [("date", "not written down")]
    begun, ended = (f"{at:%Y-%m-%d %H:%M}" for at in (times[0].begun, times[-1].ended))
    starts = "" if len(times) == 1 else f", in {len(times)} starts"
    hosts = ", ".join(dict.fromkeys(each.host for each in times))
    return [
        ("date", f"{begun} to {ended} ({times[-1].begun:%z})"),
        ("duration", f"{duration(history.seconds)}, with drawing and measuring{starts}"),
        ("coordinator" if history.setting == "real nodes" else "machine", hosts),
    ]


def _which_data(history: RunHistory) -> list[tuple[str, str]]:
    data = history.config.data.name
    if history.setting == "real nodes":
        return [("data", f"{data}, each hospital's own; none of it is on the coordinator")]
    if history.data_source is None:
        return [("data", f"{data}; source and hash were not written down")]
    return [
        ("data", f"{data}, {history.data_source}"),
        ("SHA-256 of all images", history.data_hashes["all"]),
        ("SHA-256 of the training images", history.data_hashes["train"]),
    ]


def _which_code(history: RunHistory) -> list[tuple[str, str]]:
    versions = ", ".join(f"{name} {number}" for name, number in history.versions.items())
    return [
        ("versions", versions or "not written down"),
        ("fingerprint of the code", history.code or "not written down"),
    ]


def _measured(history: RunHistory) -> list[tuple[str, str]]:
    return [
        (f"{heading}, {of}", f"{generated} (real {real})" if real else generated)
        for heading, of, generated, real in evaluated_metrics(history, *figures(Use.SUMMARY))
    ]


def _course(history: RunHistory) -> list[Block]:
    drawings = [draw(history) for draw in (loss_chart, update_chart, time_chart, overhead_chart)]
    over_rounds = metric_charts({"generated": history})
    return [*_charts(*drawings), *_charts(*over_rounds), *_rounds_table(history)]


def _charts(*drawings: Drawing | None) -> list[Block]:
    drawn = [drawing for drawing in drawings if drawing is not None]
    return [Charts(drawn)] if drawn else []


def _rounds_table(history: RunHistory) -> list[Block]:
    columns = {
        "train loss": ("loss", TRAIN, ".4f"),
        "test loss": ("loss", TEST, ".4f"),
        "clients": ("num_clients", None, ".0f"),
        "seconds": ("round_seconds", None, ".1f"),
        "outside training": ("overhead_share", None, ".0%"),
        "seconds evaluating": ("seconds_evaluating", None, ".1f"),
    }
    present = {
        head: (series, form)
        for head, (metric, reference, form) in columns.items()
        if (series := history.records.series(metric, reference=reference))
    }
    if not present:
        return []
    rows = [
        [
            str(number),
            *(_cell(series.get(number), form) for series, form in present.values()),
        ]
        for number in range(1, history.rounds_done + 1)
    ]
    return [Table("Every round in figures", ["round", *present], rows, folded=True)]


def _cell(value: float | None, form: str) -> str:
    return "" if value is None else f"{value:{form}}"


def _participation(history: RunHistory) -> list[Block]:
    if history.setting == "centralised":
        return []
    rounds: dict[tuple[int, str, str], list[int]] = {}
    for each in history.records.left_out:
        key = each.client or 0, each.context["activity"], each.context["reason"]
        rounds.setdefault(key, []).append(each.round)
    rows = [
        [str(client), activity, stretches(numbers), reason]
        for (client, activity, reason), numbers in sorted(rounds.items())
    ]
    heads = ["client", "activity", "rounds", "reason"]
    left_out = [Table("Replies that were left out", heads, rows)] if rows else []
    return [*_charts(participation_chart(history)), *_states_table(history), *left_out]


def _states_table(history: RunHistory) -> list[Block]:
    rounds: dict[tuple[int, str], list[int]] = {}
    for (number, client), state in sorted(history.participation().items()):
        rounds.setdefault((client, state), []).append(number)
    rows = [
        [str(client), state, stretches(numbers)]
        for (client, state), numbers in sorted(rounds.items())
    ]
    title = "Rounds of each client in figures"
    return [Table(title, ["client", "state", "rounds"], rows, folded=True)] if rows else []


def stretches(numbers: Sequence[int]) -> str:
    """Write ascending numbers as "1-3 5"."""
    groups: list[list[int]] = []
    for number in numbers:
        if groups and groups[-1][-1] == number - 1:
            groups[-1].append(number)
        else:
            groups.append([number])
    return " ".join(f"{g[0]}-{g[-1]}" if len(g) > 1 else str(g[0]) for g in groups)


def _data(history: RunHistory) -> list[Block]:
    rows = [
        ["all" if who == POOLED else str(who), *(f"{number:,}" for number in counts)]
        for who, counts in history.class_counts.items()
        if counts is not None
    ]
    heads = ["client", *history.config.data.classes]
    table = [Table("Training images of each class in figures", heads, rows, folded=True)]
    return [*_charts(class_chart(history)), *(table if rows else []), *_silent(history)]


def _silent(history: RunHistory) -> list[Block]:
    silent = [str(who) for who, counts in history.class_counts.items() if counts is None]
    if not silent:
        return []
    who = ", ".join(silent)
    return [Text(f"Clients that do not say how many images of each class they have: {who}.")]


def _samples(history: RunHistory) -> list[Block]:
    chosen = evenly(sorted(history.grids), MOST_PICTURES)
    if not chosen:
        return []
    classes = ", ".join(history.config.data.classes)
    pictures = [
        _picture(
            history,
            number,
            title=f"round {number}",
            says=f"Images generated after round {number}, a row per class: {classes}",
        )
        for number in chosen
    ]
    text = "A row per class; every round draws from the same noise."
    if len(chosen) < len(history.grids):
        text += f" {len(chosen)} of {len(history.grids)} pictures, evenly chosen, are shown."
    return [Text(text), Pictures("Round of the samples", pictures, slider=True)]


def evenly(numbers: Sequence[int], most: int) -> list[int]:
    """Choose at most so many numbers, the first and the last among them, evenly."""
    if len(numbers) <= most:
        return list(numbers)
    return [numbers[i * (len(numbers) - 1) // (most - 1)] for i in range(most)]


def _picture(history: RunHistory, number: int, *, title: str, says: str) -> Picture:
    """Embed the samples of a round, with the names of their rows as text where that can be."""
    file = history.grids[number]
    images = read_grid(file)
    source = "data:image/png;base64," + base64.b64encode(images or file.read_bytes()).decode()
    return Picture(title, says, source, history.config.data.classes if images else ())


def _metrics(history: RunHistory) -> list[Block]:
    blocks = [block for each in history.evaluations for block in _evaluation(each, history)]
    hospitals, found = _hospitals(history), found_metrics(history)
    blocks += hospitals
    evaluated = any(not each.otherwise for each in history.current_evaluations)
    if found and not hospitals and not evaluated:
        rows = [(heading, *told) for heading, _, *told in found]
        notes = [f"{each.title}: {each.of}" for each in found]
        blocks = [Table("Measured in the run", HEADS, rows), Listing(notes), *blocks]
    return blocks


def _evaluation(each: Evaluation, history: RunHistory) -> list[Block]:
    label = each.label
    title = (
        f"Extractor {label.extractor}, image range {label.image_range}, round {each.round} of "
        f"{history.config.federation.rounds}"
    )
    if each.otherwise:
        title += f", drawn with {each.otherwise}"
    counts = [] if each.num_per_class is None else [each.num_per_class]
    return [Table(title, HEADS, metric_rows(each)), Listing(caption(each, counts))]


def _hospitals(history: RunHistory) -> list[Block]:
    records, scored = history.records, history.records.last(SCORING_CLIENTS)
    if scored is None:
        return []
    of_round = records.of_round(scored.round)
    columns = [figure for figure, *_ in measured(of_round, references=[HELD_OUT])]
    rows = []
    for client in (*history.clients, None):
        count = of_round.value("num_held_out", client=client)
        cells = [
            _beside(*(figure.found(of_round, real=real, client=client) for real in (False, True)))
            for figure in columns
        ]
        rows.append(["all" if client is None else f"client {client}", _cell(count, ".0f"), *cells])
    heads = ["hospital", "held-out images", *(figure.heading for figure in columns)]
    title = (
        f"Scored by {scored.value:.0f} hospitals after round {scored.round}, real images in "
        "brackets"
    )
    number = "" if scored.n is None else f"{scored.n:,} images"
    settings = [f"{name.replace('_', ' ')} {value}" for name, value in scored.context.items()]
    told = ", ".join(filter(None, [number, *settings]))
    return [Table(title, heads, rows), Text(f"Scored: {told or 'number not written down'}.")]


def _beside(generated: Record | None, real: Record | None) -> str:
    if generated is None:
        return "-"
    return f"{generated.value:.4f}" + ("" if real is None else f" ({real.value:.4f})")


def _configuration(history: RunHistory) -> list[Block]:
    text = (history.path / "config.yaml").read_text(encoding="utf-8")
    if history.setting == "real nodes" and history.run_config is not None:
        says, command = SUBMITTED, submitting_command(history.run_config)
    else:
        says = "This trains the run once more, into a folder of its own:"
        command = training_command(history.config)
    return [
        Text(says),
        Code("", command),
        Code("The whole configuration (config.yaml)", text, folded=True),
    ]


def _compared_losses(runs: Mapping[str, RunHistory]) -> list[Drawing | None]:
    return [
        compared_chart(group, Figure("loss", reference), f"{reference} loss{of}")
        for of, group in alike(runs, LOSS_KEYS).items()
        for reference in (TRAIN, TEST)
    ]


def _compared_metrics(runs: Mapping[str, RunHistory]) -> list[Drawing]:
    return [
        drawing
        for of, group in alike(runs, DATA_KEYS).items()
        for drawing in metric_charts(group, of)
    ]


def _side_by_side(runs: Mapping[str, RunHistory]) -> Table:
    """Set figures of runs into one row where they are figures of the same."""
    columns = {label: dict(key_figures(run, losses=False)) for label, run in runs.items()}
    for keys, found in ((LOSS_KEYS, loss_figures), (DATA_KEYS, _measured)):
        for of, group in alike(runs, keys).items():
            for label, run in group.items():
                columns[label] |= {f"{name}{of}": value for name, value in found(run)}
    names = dict.fromkeys(name for column in columns.values() for name in column)
    rows = [[name, *(column.get(name, "-") for column in columns.values())] for name in names]
    return Table("Key figures of each run", ["figure", *runs], rows)


def _differences(runs: Mapping[str, RunHistory]) -> list[Block]:
    configs = [run.config for run in runs.values()]
    names = dict.fromkeys(
        name for config in configs[1:] for name in different_values(configs[0], config)
    )
    if not names:
        return [Text("The configurations differ in nothing but names and places.")]
    columns = [flat_values(config) for config in configs]
    rows = [[name, *(str(column[name]) for column in columns)] for name in names]
    return [Table("Values that are not the same in all", ["value", *runs], rows)]


def _last_samples(runs: Mapping[str, RunHistory]) -> list[Block]:
    pictures = [
        _picture(
            run,
            last := max(run.grids),
            title=f"{label}, round {last}",
            says=f"Images generated by {label} after round {last}, a row per class",
        )
        for label, run in runs.items()
        if run.grids
    ]
    return [Pictures("Last samples", pictures)] if pictures else []
