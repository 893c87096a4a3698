import base64
import json
import re
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from typer.testing import CliRunner

from task.charts import Drawing, time_chart
from task.cli.main import app
from task.history import read_history
from task.report import (
    Charts,
    Page,
    Section,
    compare,
    evenly,
    labels,
    render,
    stretches,
    write_report,
)
from tests.helpers import losses, metric_report, written_run

EVIL = "<script>alert(1)</script>"
REASON = "</script><img src=x onerror=alert(2)>"


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run whose classes, reasons and name are HTML."""
    folder = tmp_path_factory.mktemp("runs") / "a<b>"
    recorded = [
        *losses(1, {0: 0.512, 1: 0.734}),
        *losses(2, {0: 0.256}),
        (2, "client-1", {"train_left_out": REASON}),
    ]
    counts = {"train_counts": [[3, 4], [5, 6]]}
    written_run(
        folder,
        recorded,
        rounds_done=2,
        files={"partition.json": counts},
        overrides=f"data=image_folder \"data.classes=['{EVIL}',b]\" data.image_size=8",
    )
    for number in (1, 2):
        Image.new("L", (8, 8), 40 * number).save(folder / "samples" / f"round_{number:04d}.png")
    return folder


@pytest.fixture(scope="module")
def page(run: Path) -> str:
    return write_report(run).read_text(encoding="utf-8")


def data_of_charts(page: str, number: int | str = r"\d+") -> list[dict[str, Any]]:
    specs = re.findall(
        rf'<script type="application/json" data-chart="{number}">(.*?)</script>', page
    )
    return [row for spec in specs for row in rows_in(json.loads(spec))]


def rows_in(part: Any) -> Iterator[dict[str, Any]]:
    """Find the values that a specification holds, wherever they stand in it."""
    if isinstance(part, list) and part and all(isinstance(each, dict) for each in part):
        yield from part
    for child in (
        part.values() if isinstance(part, dict) else part if isinstance(part, list) else ()
    ):
        yield from rows_in(child)


def test_report_shows_the_figures_of_the_metrics(run: Path, page: str) -> None:
    rows = data_of_charts(page)
    drawn = {
        (row["client"], row["round"]): row["value"]
        for row in data_of_charts(page, 1)
        if {"client", "value"} <= row.keys()
    }
    history = read_history(run)
    assert {("0", 1): 0.512, ("1", 1): 0.734, ("0", 2): 0.256}.items() <= drawn.items()
    shared = {row["round"]: row["value"] for row in rows if row.get("line") == "train loss"}
    assert shared == history.values["train_loss"]
    cells = {(row["client"], row["class"]): row["images"] for row in rows if "images" in row}
    assert cells[("1", "b")] == 6
    assert "<td>left out</td><td>2</td>" in page and "<td>5</td><td>6</td>" in page
    assert "0.256 (round 2)" in page and "Client 1 was left out once" in page


def test_report_embeds_every_grid_as_it_is(run: Path, page: str) -> None:
    for file in (run / "samples").iterdir():
        assert base64.b64encode(file.read_bytes()).decode() in page


class Elements(HTMLParser):
    """The elements of a page as a browser finds them: tag, attributes, and text of scripts."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None]]] = []
        self.scripts: list[tuple[str | None, str]] = []
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))
        if tag == "script":
            self.scripts.append((dict(attrs).get("type"), ""))

    def handle_data(self, data: str) -> None:
        if self.cdata_elem == "script":
            kind, text = self.scripts.pop()
            self.scripts.append((kind, text + data))


def test_report_escapes_what_comes_from_a_run(page: str) -> None:
    elements = Elements(page)
    code = [text for kind, text in elements.scripts if kind is None]
    data = [text for kind, text in elements.scripts if kind == "application/json"]
    charts = sum(tag == "figure" and "chart" in (a.get("class") or "") for tag, a in elements.found)
    # The library and the page's own, the configuration of charts, and what each holds.
    assert (len(code), len(data)) == (2, charts + 1) and len(elements.scripts) == charts + 3
    assert not any("alert(" in text for text in code) and any("alert(" in text for text in data)
    names = {name for _, attributes in elements.found for name in attributes}
    assert not any(name.startswith("on") for name in names)
    assert not any(tag == "b" for tag, _ in elements.found)
    assert any(row.get("class") == EVIL for row in data_of_charts(page))


def test_report_asks_for_nothing_from_elsewhere(page: str) -> None:
    links = [
        a[name] or "" for _, a in Elements(page).found for name in ("src", "href") if name in a
    ]
    assert len(links) > 2
    assert all(link.startswith(("data:image/png;base64,", "#")) for link in links)
    assert "default-src 'none'" in page and "'unsafe-eval'" not in page
    assert "script-src 'sha256-" in page


def test_comparison_names_what_differs(run: Path, tmp_path: Path) -> None:
    other = written_run(
        tmp_path / "other", losses(1, {0: 0.9, 1: 0.9}), rounds_done=1, train__local_epochs=7
    )
    text = render(compare([read_history(run), read_history(other)]))
    row = re.search(r"train.local_epochs</th><td>(\d)</td><td>(\d)</td>", text)
    assert row is not None and row.groups() == ("1", "7")
    assert "other: The run is not finished: 1 of 2 rounds" in text
    lines = {row["line"] for row in data_of_charts(text) if "line" in row}
    assert lines == {"a<b>", "other"}


def test_comparison_sets_only_like_figures_beside_each_other(tmp_path: Path) -> None:
    runs = [written_run(tmp_path / name, losses(1, {0: 0.5}), rounds_done=2) for name in "abc"]
    for run, number in zip(runs, (2000, 2000, 179), strict=True):
        described = {**metric_report().describe(), "round": 2, "n_generated": number}
        (run / "evaluation-classifier-correct.json").write_text(json.dumps(described))
    text = render(compare([read_history(run) for run in runs]))
    for number, cells in (("2,000", ["2.5", "2.5", "-"]), ("179", ["-", "-", "2.5"])):
        name = f"FID (train) ↓, classifier, correct, n={number}"
        row = text.partition(f">{name}</th>")[2].partition("</tr>")[0]
        assert [re.split(r"[> ]", cell)[1] for cell in re.findall("<td>[^<]+", row)] == cells


def test_time_that_nobody_trained_is_told_from_training(tmp_path: Path) -> None:
    spent = {"seconds_waiting": 124.0, "seconds_training": 8.0, "round_seconds": 126.0}
    run = written_run(tmp_path / "run", [(1, "global", spent)], rounds_done=2)
    drawing = time_chart(read_history(run))
    assert drawing is not None
    rows = {row["phase"]: row["seconds"] for row in rows_in(drawing.spec) if "phase" in row}
    assert rows == {"training": 8.0, "waiting": 116.0}


def test_runs_are_told_apart_by_their_paths(tmp_path: Path) -> None:
    assert labels([Path("/x/a"), Path("/x/b")]) == ["a", "b"]
    assert labels([Path("/x/a"), Path("/y/a")]) == ["x/a", "y/a"]
    with pytest.raises(ValueError, match="different folders"):
        labels([Path("/x/a"), Path("/x/a")])


def test_rounds_are_written_as_stretches() -> None:
    assert stretches([1, 2, 3, 5, 8, 9]) == "1-3 5 8-9"


def test_few_of_many_pictures_are_chosen_evenly() -> None:
    assert evenly([5, 10], 40) == [5, 10]
    assert evenly(range(1, 101), 4) == [1, 34, 67, 100]


def test_command_fails_in_one_line_where_there_is_no_run(run: Path, tmp_path: Path) -> None:
    for words, expected in (
        ([tmp_path], "holds no run"),
        ([run, run], "--out must name the file of a comparison"),
        ([run, "--out", tmp_path], "--out must be a file, got the folder"),
        ([run, "--out", tmp_path / "no" / "x.html"], "make it first"),
    ):
        result = CliRunner().invoke(app, ["report", *map(str, words)])
        assert result.exit_code == 1 and result.stderr.count("\n") == 1
        assert expected in result.stderr


def test_broken_file_is_named_in_one_line(tmp_path: Path) -> None:
    run = written_run(tmp_path / "run", losses(1, {0: 0.5}), rounds_done=2)
    whole = {file: file.read_bytes() for file in run.glob("*") if file.is_file()}
    for name, broken in (
        ("metrics.jsonl", "not json\n"),
        ("metrics.jsonl", '{"a": 1}\n'),
        ("model.safetensors", "x"),
        ("class_counts.json", '{"clients": {"0": [1]}}'),
        ("class_counts.json", "[1]"),
        ("evaluation-classifier-correct.json", "{}"),
        ("samples/round_x.png", ""),
    ):
        (run / name).write_text(broken)
        result = CliRunner().invoke(app, ["report", str(run)])
        assert (result.exit_code, result.stderr.count("\n")) == (1, 1), (name, result.stderr)
        assert str(run / name) in result.stderr and "move it out of the folder" in result.stderr
        if run / name in whole:
            (run / name).write_bytes(whole[run / name])
        else:
            (run / name).unlink()


def test_loss_that_was_not_a_number_is_said_and_kept_out_of_the_charts(tmp_path: Path) -> None:
    run = written_run(tmp_path / "run", losses(1, {0: 0.5}), rounds_done=2)
    lost = {"round": 2, "who": "global", "name": "train_loss", "value": float("nan")}
    with (run / "metrics.jsonl").open("a") as file:
        file.write(json.dumps(lost) + "\n" + json.dumps({**lost, "who": "client-0"}) + "\n")
    history = read_history(run)
    assert history.values["train_loss"] == {1: 0.5} and len(history.not_finite) == 2
    assert history.participation()[2, 0] == "trained"
    page = write_report(run).read_text(encoding="utf-8")
    assert "Train loss was not a number in 1 round, from round 2 on: the run has diverged" in page
    assert not any("NaN" in text for kind, text in Elements(page).scripts if kind)
    bare = Charts([Drawing("t", "s", {"value": float("nan")})])
    with pytest.raises(ValueError, match="not JSON compliant"):
        render(Page("p", [Section("a", "t", [bare])]))
