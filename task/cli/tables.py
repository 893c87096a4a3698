"""`feddm tables`: the paper's tables, and comparisons of generators and of remedies, from runs."""

import csv
import io
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from task.files import atomic_path
from task.reporting.figures import Picture, draw_figures
from task.reporting.generator_figure import draw_generators
from task.reporting.generator_tables import (
    SECONDS,
    SENT,
    generator_groups,
    generator_tables,
)
from task.reporting.metric_table import flat_evaluation
from task.reporting.remedy_figure import draw_remedies
from task.reporting.remedy_tables import remedy_groups, remedy_tables
from task.reporting.rendering import render
from task.reporting.tables import (
    Measurement,
    Table,
    build_tables,
    measurements,
    scale,
)
from task.runs.evaluations import Evaluation
from task.runs.layout import weights_file
from task.runs.resume import FREE_TO_CHANGE
from task.runs.run import Run, find_runs

# What a spreadsheet runs.
FORMULA = ("=", "+", "-", "@", "\t", "\r")
# Of the values that change no weights, those that are of use beside the figures.
ALSO_RECORDED = {"experiment", "federation.rounds", "federation.num_supernodes"}


def write_tables(
    folder: Path, *, device: torch.device | None, say: Callable[[str], object]
) -> None:
    """Write tables.md, tables.html, tables.csv and figures of the runs in a folder and below it.

    Args:
        folder: of a sweep.
        device: that draws the paper's figures; None: no figures.
        say: takes the text for the reader.

    Raises:
        ValueError: there is no measured run in it, or nothing to compare; in the last case the CSV
            is written nevertheless.
    """
    runs, measured, left_out = _read_sweep(folder)
    groups = generator_groups(measured)
    remedies = remedy_groups(measured)
    tables = [*generator_tables(groups), *remedy_tables(remedies), *build_tables(measured)]
    _write_text(folder / "tables.csv", csv_text(_csv_rows(folder, runs, tables)))
    alone = _alone(measured, tables)
    if alone:
        left_out["measured, with no other run to compare with"] = alone
    page = {"title": f"Tables of {folder.resolve().name}", "tables": tables, "left_out": left_out}
    say(render("tables.md", **page, pictures=[]))
    if not tables:
        raise ValueError(
            f"SWEEP_DIR: no two runs in {folder} differ in nothing but train.mode, partition.beta, "
            "federation.num_supernodes or train.local_epochs, or in nothing but the generator or "
            "the remedy, and are measured alike, so there is no table; what there is stands in "
            f"{folder / 'tables.csv'}"
        )
    # Before the figures, which may take long or find weights that are broken.
    _write_pages(folder, page, [])
    if device is not None:
        pictures = draw_generators(groups, folder, say=say)
        pictures += draw_remedies(remedies, folder, say=say)
        _write_pages(folder, page, pictures)
        pictures += draw_figures(runs, folder, device=device, say=say)
        _write_pages(folder, page, pictures)
    say("\n".join(f"written to {folder / f'tables.{ending}'}" for ending in ("md", "html", "csv")))


def _read_sweep(folder: Path) -> tuple[list[Run], list[Measurement], dict[str, list[str]]]:
    """Read the finished runs, what was measured of them, and by reason the runs to leave out."""
    unreadable: list[str] = []
    runs = find_runs(folder, lambda run, error: unreadable.append(f"{run} ({error})"))
    unfinished, diverged = _unfinished_runs(folder, unreadable)
    without = [str(run.path) for run in runs if not run.draws]
    runs = [run for run in runs if run.draws]
    without_model = {
        "unfinished (feddm-train with run_name=... resume=true)": unfinished,
        "diverged": diverged,
        "of models that draw no images, or parts of which stayed at the hospitals": without,
        "cannot be read": unreadable,
    }
    if not runs:
        begun = f" ({_left_out_in_words(without_model)})" if any(without_model.values()) else ""
        raise ValueError(f"SWEEP_DIR: no finished run in {folder}{begun}")
    measured, left_out = measurements(runs)
    left_out |= {why: which for why, which in without_model.items() if which}
    if not measured:
        raise ValueError(
            f"SWEEP_DIR: no measured run in {folder}: call feddm evaluate RUN for each, or train "
            f"with eval.final_metrics=true ({_left_out_in_words(left_out)})"
        )
    return runs, measured, left_out


def _write_pages(folder: Path, page: Mapping[str, Any], pictures: Sequence[Picture]) -> None:
    for name, template in (("tables.md", "tables.md"), ("tables.html", "tables.html.md")):
        _write_text(folder / name, render(template, **page, pictures=pictures))


def _unfinished_runs(folder: Path, unreadable: list[str]) -> tuple[list[str], list[str]]:
    """List the runs without final weights: those that can go on, and those that diverged.

    Args:
        folder: see `write_tables`.
        unreadable: gets those of which the one or the other is not known.
    """
    unfinished, diverged = [], []
    for file in sorted(folder.rglob("config.yaml")):
        run = file.parent
        if weights_file(run).is_file():
            continue
        try:
            divergence = Run(run).divergence
        except (ValueError, OSError) as error:
            unreadable.append(f"{run} ({error})")
            continue
        if divergence is None:
            unfinished.append(str(run))
        else:
            diverged.append(f"{run} (in round {divergence.round})")
    return unfinished, diverged


def _left_out_in_words(left_out: Mapping[str, Sequence[str]]) -> str:
    return "; ".join(f"{why}: {', '.join(which)}" for why, which in left_out.items() if which)


def _alone(measured: Sequence[Measurement], tables: Sequence[Table]) -> list[str]:
    shown = {each for table in tables for each in table.members}
    return [
        f"{each.run.path}: {each.run.values['data.name']}, {each.run.values['train.mode']}, "
        f"{each.found.label.extractor}, {each.found.label.image_range}, {scale(each.settings)}"
        for each in measured
        if each not in shown
    ]


def _csv_rows(folder: Path, runs: Sequence[Run], tables: Sequence[Table]) -> list[dict[str, Any]]:
    """List every run and evaluation with its settings, whether it is in a table or not."""
    numbers: dict[int, list[str]] = {}
    for table in tables:
        for each in table.members:
            numbers.setdefault(id(each.found), []).append(
                table.title.removeprefix("Table ").split(":")[0]
            )
    evaluated: list[tuple[Run, Evaluation | None]] = []
    for run in runs:
        evaluated += [(run, found) for found in run.final_evaluations] or [(run, None)]
    return [
        {
            "tables": ", ".join(numbers.get(id(found), [])),
            "run": run.path.relative_to(folder).as_posix(),
            **_csv_settings(run),
            **_csv_costs(run),
            **({} if found is None else flat_evaluation(found)),
        }
        for run, found in evaluated
    ]


def _csv_settings(run: Run) -> dict[str, Any]:
    return {
        name: value
        for name, value in run.values.items()
        if name in ALSO_RECORDED or name not in FREE_TO_CHANGE
    }


def _csv_costs(run: Run) -> dict[str, float | None]:
    rounds = run.config.federation.rounds
    return {"seconds_training": SECONDS.of(run, rounds), "megabytes_sent": SENT.of(run, rounds)}


def _write_text(path: Path, text: str) -> None:
    with atomic_path(path) as aside:
        aside.write_text(text, encoding="utf-8")


def csv_text(rows: Sequence[Mapping[str, Any]]) -> str:
    """Write rows as CSV, with a column for every key that one of them has.

    A spreadsheet takes text that begins with one of `FORMULA` for a formula and runs it; such text
    gets an apostrophe before it.

    Source: OWASP, "CSV Injection".
    """
    stream = io.StringIO()
    columns = list(dict.fromkeys(key for row in rows for key in row))
    writer = csv.DictWriter(stream, columns, lineterminator="\n")
    writer.writeheader()
    writer.writerows({key: _harmless(value) for key, value in row.items()} for row in rows)
    return stream.getvalue()


def _harmless(value: object) -> object:
    # Numbers are no text, so that a minus stays what it is.
    return f"'{value}" if isinstance(value, str) and value.startswith(FORMULA) else value
