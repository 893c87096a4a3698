"""A report of one run, or of several side by side: one page that needs nothing from elsewhere."""

import base64
from collections.abc import Iterable, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import vl_convert
import yaml  # type: ignore[import-untyped]
from markupsafe import Markup

from task.config import flat_values
from task.evaluation.metrics import Use
from task.files import atomic_path, file_sha256
from task.generation.grids import read_grid
from task.progress import duration
from task.reporting.audit_section import audit_section
from task.reporting.charts import (
    CONFIG,
    audit_charts,
    class_charts,
    course_charts,
    loss_charts,
    metric_charts,
    participation_charts,
)
from task.reporting.comparability import alike, data_values, incomparable, loss_values
from task.reporting.metric_table import HEADS, caption, measured, metric_rows, quantities
from task.reporting.rendering import render
from task.reporting.run_summary import (
    describe_run,
    evaluated_metrics,
    found_metrics,
    key_figures,
    loss_figures,
)
from task.reporting.study_tables import study_notes, study_tables
from task.reporting.warning_signs import Check, State, checks
from task.runs.commands import (
    resubmitting_command,
    resuming_command,
    submitting_command,
    training_command,
)
from task.runs.evaluations import Evaluation
from task.runs.layout import REPORT_FILE, STUDY_FILE, STUDY_FOLDER, understood, weights_file
from task.runs.records import HELD_OUT, SCORING_CLIENTS, SECONDS_EVALUATING, TEST, TRAIN, Record
from task.runs.resume import different_values
from task.runs.run import POOLED, Run

# A page of hundreds of pictures is too large to open.
MOST_PICTURES = 40
# Values of a round: the head of a column, the metric, its reference, and its format.
ROUND_COLUMNS = (
    ("train loss", "loss", TRAIN, ".4f"),
    ("test loss", "loss", TEST, ".4f"),
    ("test accuracy", "accuracy", TEST, ".4f"),
    ("clients", "num_clients", None, ".0f"),
    ("bytes of weights", "weight_bytes", None, ",.0f"),
    ("seconds", "round_seconds", None, ".1f"),
    ("outside training", "overhead_share", None, ".0%"),
    ("seconds evaluating", SECONDS_EVALUATING, None, ".1f"),
)

NamedValues = list[tuple[str, str]]


class TableRows(NamedTuple):
    """A table whose first column names the rows."""

    heads: Sequence[str]
    rows: Sequence[Sequence[str]]


class Samples(NamedTuple):
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
    rows: Sequence[str]


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
    compared = [Run(folder) for folder in (run, *others)]
    page = comparison_page(compared) if others else report_page(compared[0])
    file = run / REPORT_FILE if file is None else file
    with atomic_path(file) as aside:
        aside.write_text(page, encoding="utf-8")
    return file


def _check_writable(file: Path) -> None:
    if file.is_dir():
        raise ValueError(f"--out must be a file, got the folder {file}; add a name, such as x.html")
    if not file.parent.is_dir():
        raise ValueError(f"--out: there is no folder {file.parent}; make it first")


def report_page(run: Run) -> str:
    """Lay a run out as a page of HTML."""
    return _page(
        "report.html.md",
        title=f"Run {run.name}",
        found=_findings({"": checks(run)}),
        unfinished=_unfinished_states([run]),
        samples=_samples(run),
        num_samples=len(run.grids),
        sentences=describe_run(run),
        figures=[*key_figures(run), *_measured_values(run)],
        origin=_origin(run),
        course_charts=course_charts(run),
        metric_charts=metric_charts({"generated": run}),
        rounds=_round_rows(run),
        **_participation(run),
        **_training_images(run),
        **_metrics(run),
        audit=audit_section(run),
        audit_charts=audit_charts(run),
        study=_study(run),
        **_repeating(run),
        configuration=_configuration(run),
    )


def _configuration(run: Run) -> str:
    """Return the configuration as it was written, but for folders that real nodes do not have."""
    text = (run.path / "config.yaml").read_text(encoding="utf-8")
    if run.setting != "real nodes":
        return text
    values = yaml.safe_load(text)
    for name in ("root", "cache_dir"):
        values["data"][name] = "each hospital's own"
    shown: str = yaml.safe_dump(values, sort_keys=False)
    return shown


def comparison_page(compared: Sequence[Run]) -> str:
    """Lay several runs out side by side as a page of HTML."""
    runs = dict(zip(labels([each.path for each in compared]), compared, strict=True))
    return _page(
        "comparison.html.md",
        title=f"Comparison of {', '.join(runs)}",
        found=_findings({f"{label}: ": checks(run) for label, run in runs.items()}),
        incomparable=incomparable(runs),
        unfinished=_unfinished_states(compared),
        differences=_differences(runs),
        samples=_last_samples(runs),
        figures=_side_by_side(runs),
        loss_charts=[
            chart
            for of, group in alike(runs, loss_values).items()
            for chart in loss_charts(group, of)
        ],
        metric_charts=[
            chart
            for of, group in alike(runs, data_values).items()
            for chart in metric_charts(group, of)
        ],
    )


def _page(template: str, **values: object) -> str:
    return render(template, **values, library=chart_library(), chart_config=CONFIG)


@cache
def chart_library() -> Markup:
    """Return the JavaScript that draws the charts, which takes seconds to put together."""
    library: str = vl_convert.javascript_bundle()  # type: ignore[call-arg]
    # Within a script element nothing else may end it.
    return Markup(library.replace("</script", "<\\/script"))


def labels(paths: Sequence[Path]) -> list[str]:
    """Name runs by as many of the last parts of their paths as tell them apart."""
    parts = [path.resolve().parts for path in paths]
    for number in range(1, max(map(len, parts))):
        names = ["/".join(each[-number:]) for each in parts]
        if len(set(names)) == len(names):
            return names
    raise ValueError(f"RUN must be different folders, got {', '.join(map(str, paths))}")


def _findings(found: Mapping[str, Sequence[Check]]) -> dict[str, list[str]]:
    """Write checks as sentences, by what they came to.

    Args:
        found: the checks, by what stands before each sentence.
    """
    sentences: dict[str, list[str]] = {"warnings": [], "unmeasured": [], "not_found": []}
    lists = dict(zip((State.WARNING, State.UNMEASURED, State.CLEAR), sentences, strict=True))
    for label, each in found.items():
        for check in each:
            subject = "" if check.state is State.WARNING else f"{check.subject}. "
            sentences[lists[check.state]].append(f"{label}{subject}{check.says}")
    return sentences


def _unfinished_states(compared: Iterable[Run]) -> list[dict[str, Any]]:
    """Say of runs that are not over how far they are, and how to go on with one that stopped.

    One that diverged is left out: going on would repeat the same.
    """
    return [
        {
            "name": each.name,
            "rounds_done": each.rounds_done,
            "rounds": each.config.federation.rounds,
            "command": None if each.running else _command_to_go_on(each),
        }
        for each in compared
        if each.running or not (each.finished or each.divergence)
    ]


def _command_to_go_on(run: Run) -> str:
    if run.setting == "real nodes" and run.submitted is not None:
        return resubmitting_command(run.submitted, run.path)
    return resuming_command(run.config, run.path)


def _repeating(run: Run) -> dict[str, Any]:
    if run.setting == "real nodes" and run.submitted is not None:
        return {"submitted": True, "command": submitting_command(run.submitted)}
    return {"submitted": False, "command": training_command(run.config)}


def _origin(run: Run) -> NamedValues:
    """Say when, where, on what and with what a run was made."""
    versions = ", ".join(f"{name} {number}" for name, number in run.versions.items())
    return [
        *_when_and_where(run),
        *_which_data(run),
        ("versions", versions or "not written down"),
        ("fingerprint of the code", run.code or "not written down"),
    ]


def _when_and_where(run: Run) -> NamedValues:
    times = run.work_times
    if not times:
        return [("date", "not written down")]
    begun, ended = (f"{at:%Y-%m-%d %H:%M}" for at in (times[0].begun, times[-1].ended))
    starts = "" if len(times) == 1 else f", in {len(times)} starts"
    hosts = ", ".join(dict.fromkeys(each.host for each in times))
    return [
        ("date", f"{begun} to {ended} ({times[-1].begun:%z})"),
        ("duration", f"{duration(run.seconds)}, with drawing and measuring{starts}"),
        ("coordinator" if run.setting == "real nodes" else "machine", hosts),
    ]


def _which_data(run: Run) -> NamedValues:
    data = run.config.data.name
    if run.setting == "real nodes":
        return [("data", f"{data}, each hospital's own; none of it is on the coordinator")]
    if run.data_source is None:
        return [("data", f"{data}; source and hash were not written down")]
    return [
        ("data", f"{data}, {run.data_source}"),
        ("SHA-256 of all images", run.data_hashes["all"]),
        ("SHA-256 of the training images", run.data_hashes["train"]),
    ]


def _measured_values(run: Run) -> NamedValues:
    return [
        (f"{heading}, {of}", f"{generated} (real {real})" if real else generated)
        for heading, of, generated, real in evaluated_metrics(run, *quantities(Use.SUMMARY))
    ]


def _round_rows(run: Run) -> TableRows:
    columns = [
        (head, series, form)
        for head, metric, reference, form in ROUND_COLUMNS
        if (series := run.records.series(metric, reference=reference))
    ]
    numbers = range(1, run.rounds_done + 1) if columns else ()
    rows = [
        [str(number), *(_with_digits(series.get(number), form) for _, series, form in columns)]
        for number in numbers
    ]
    return TableRows(["round", *(head for head, _, _ in columns)], rows)


def _with_digits(value: float | None, form: str) -> str:
    return "" if value is None else f"{value:{form}}"


def _participation(run: Run) -> dict[str, Any]:
    federated = run.setting != "centralized"
    left_out = [
        ((each.client or 0, each.context["activity"], each.context["reason"]), each.round)
        for each in run.records.left_out
    ]
    states = sorted(run.participation().items())
    in_state = [((client, state), number) for (number, client), state in states]
    return {
        "participation_charts": participation_charts(run) if federated else [],
        "client_rounds": TableRows(
            ["client", "state", "rounds"],
            [[who_is(run, who), state, stretches(n)] for (who, state), n in _by_key(in_state)]
            if federated
            else [],
        ),
        "left_out": TableRows(
            ["client", "activity", "rounds", "reason"],
            [
                [who_is(run, who), what, stretches(n), why]
                for (who, what, why), n in _by_key(left_out)
            ],
        ),
    }


def who_is(run: Run, client: int) -> str:
    """Name a client by its number, and by its hospital where the coordinator has named it."""
    return " ".join(filter(None, [str(client), run.hospitals.get(client)]))


def _by_key(found: Iterable[tuple[Any, int]]) -> list[tuple[Any, list[int]]]:
    """Collect the numbers of each key; the keys ascending."""
    numbers: dict[Any, list[int]] = {}
    for key, number in found:
        numbers.setdefault(key, []).append(number)
    return sorted(numbers.items())


def stretches(numbers: Sequence[int]) -> str:
    """Write ascending numbers as "1-3 5"."""
    groups: list[list[int]] = []
    for number in numbers:
        if groups and groups[-1][-1] == number - 1:
            groups[-1].append(number)
        else:
            groups.append([number])
    return " ".join(f"{g[0]}-{g[-1]}" if len(g) > 1 else str(g[0]) for g in groups)


def _training_images(run: Run) -> dict[str, Any]:
    names = {who: "all" if who == POOLED else str(who) for who in run.class_counts}
    counts = run.class_counts.items()
    rows = [[names[who], *(f"{n:,}" for n in of)] for who, of in counts if of is not None]
    return {
        "class_charts": class_charts(run),
        "class_counts": TableRows(["client", *run.config.data.classes], rows),
        "silent": [names[who] for who, of in counts if of is None],
    }


def _samples(run: Run) -> list[Samples]:
    classes = ", ".join(run.config.data.classes)
    return [
        _picture(
            run,
            number,
            title=f"round {number}",
            says=f"Images generated after round {number}, a row per class: {classes}",
        )
        for number in evenly(sorted(run.grids), MOST_PICTURES)
    ]


def evenly(numbers: Sequence[int], most: int) -> list[int]:
    """Choose at most so many numbers, the first and the last among them, evenly."""
    if len(numbers) <= most:
        return list(numbers)
    return [numbers[i * (len(numbers) - 1) // (most - 1)] for i in range(most)]


def _last_samples(runs: Mapping[str, Run]) -> list[Samples]:
    return [
        _picture(
            run,
            last := max(run.grids),
            title=f"{label}, round {last}",
            says=f"Images generated by {label} after round {last}, a row per class",
        )
        for label, run in runs.items()
        if run.grids
    ]


def _picture(run: Run, number: int, *, title: str, says: str) -> Samples:
    """Embed the samples of a round, with the names of their rows as text where that can be."""
    file = run.grids[number]
    images = read_grid(file)
    source = "data:image/png;base64," + base64.b64encode(images or file.read_bytes()).decode()
    return Samples(title, says, source, run.config.data.classes if images else ())


def _metrics(run: Run) -> dict[str, Any]:
    hospitals, found = _hospitals(run), found_metrics(run)
    evaluated = any(not each.otherwise for each in run.current_evaluations)
    own = found if hospitals is None and not evaluated else []
    return {
        "own_scores": TableRows(HEADS, [(each.title, each.generated, each.real) for each in own]),
        "own_score_notes": [f"{each.title}: {each.of}" for each in own],
        "evaluations": [_evaluation_block(each, run) for each in run.evaluations],
        "hospitals": hospitals,
    }


def _study(run: Run) -> dict[str, Any] | None:
    found = run.study
    if found is None:
        return None
    with understood(run.path / STUDY_FOLDER / STUDY_FILE):
        weights = weights_file(run.path)
        if not weights.exists() or file_sha256(weights) not in found["weights_sha256"].values():
            return None  # of weights that the run has trained further since
        return {
            "sentences": [
                f"{each['source']}: {each['sentence']}"
                if len(found["headlines"]) > 1
                else each["sentence"]
                for each in found["headlines"]
            ]
            + [found["at_hospitals_sentence"]] * bool(found["at_hospitals_sentence"]),
            "warnings": found["warnings"],
            "tables": [
                (heading, TableRows(heads, rows)) for heading, heads, rows in study_tables(found)
            ],
            "notes": study_notes(found),
        }


def _evaluation_block(each: Evaluation, run: Run) -> dict[str, Any]:
    label = each.label
    title = (
        f"Extractor {label.extractor}, image range {label.image_range}, round {each.round} of "
        f"{run.config.federation.rounds}"
    )
    if each.otherwise:
        title += f", drawn with {each.otherwise}"
    counts = [] if each.num_per_class is None else [each.num_per_class]
    return {
        "title": title,
        "scores": TableRows(HEADS, metric_rows(each)),
        "caption": caption(each, counts),
    }


def _hospitals(run: Run) -> dict[str, Any] | None:
    scored = run.records.last(SCORING_CLIENTS)
    if scored is None:
        return None
    records = run.records.of_round(scored.round)
    columns = [quantity for quantity, *_ in measured(records, references=[HELD_OUT])]
    rows = []
    for client in (*run.clients, None):
        count = records.value("num_held_out", client=client)
        cells = [
            _beside(*(quantity.found(records, real=real, client=client) for real in (False, True)))
            for quantity in columns
        ]
        rows.append(
            ["all" if client is None else f"client {client}", _with_digits(count, ".0f"), *cells]
        )
    number = [] if scored.n is None else [f"{scored.n:,} images"]
    settings = [f"{name.replace('_', ' ')} {value}" for name, value in scored.context.items()]
    return {
        "title": f"Scored by {scored.value:.0f} hospitals after round {scored.round}, real images "
        "in brackets",
        "scores": TableRows(
            ["hospital", "held-out images", *(each.heading for each in columns)], rows
        ),
        "scored": ", ".join([*number, *settings]) or "number not written down",
    }


def _beside(generated: Record | None, real: Record | None) -> str:
    if generated is None:
        return "-"
    return f"{generated.value:.4f}" + ("" if real is None else f" ({real.value:.4f})")


def _side_by_side(runs: Mapping[str, Run]) -> TableRows:
    """Set figures of runs into one row where they are figures of the same."""
    columns = {label: dict(key_figures(run, losses=False)) for label, run in runs.items()}
    for values, found in ((loss_values, loss_figures), (data_values, _measured_values)):
        for of, group in alike(runs, values).items():
            for label, run in group.items():
                columns[label] |= {f"{name}{of}": value for name, value in found(run)}
    names = dict.fromkeys(name for column in columns.values() for name in column)
    rows = [[name, *(column.get(name, "-") for column in columns.values())] for name in names]
    return TableRows(["figure", *runs], rows)


def _differences(runs: Mapping[str, Run]) -> TableRows:
    configs = [run.config for run in runs.values()]
    names = dict.fromkeys(
        name for config in configs[1:] for name in different_values(configs[0], config)
    )
    columns = [flat_values(config) for config in configs]
    return TableRows(
        ["value", *runs], [[name, *(str(column[name]) for column in columns)] for name in names]
    )
