import base64
import fcntl
import html
import json
import re
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from typer.testing import CliRunner

from task.cli.main import app
from task.reporting.charts import course_charts, whole_ticks
from task.reporting.comparability import incomparable
from task.reporting.rendering import render
from task.reporting.report import (
    comparison_page,
    evenly,
    labels,
    report_page,
    stretches,
    write_report,
)
from task.reporting.run_summary import key_figures
from task.runs.commands import resuming_command
from task.runs.records import DIVERGENCE, TRAIN, Record, records_of
from task.runs.run import Run
from tests.helpers import evaluated, left_out, losses, written_run

EVIL = "<script>alert(1)</script>"
REASON = "</script><img src=x onerror=alert(2)>"


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run whose classes, reasons and name are HTML."""
    folder = tmp_path_factory.mktemp("runs") / "a<b>"
    recorded = [
        *losses(1, {0: 0.512, 1: 0.734}),
        *losses(2, {0: 0.256}),
        left_out(2, 1, REASON),
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


def bare(page: str) -> str:
    """A page whose cells have no attributes."""
    return re.sub(r"<(td|th) [^>]*>", r"<\1>", page)


def section(page: str, anchor: str) -> str:
    """A part of a page, with its text as a reader sees it."""
    return html.unescape(bare(page).partition(f'<h2 id="{anchor}">')[2].partition("</section>")[0])


def items(part: str) -> list[str]:
    return re.findall("<li>(.*?)</li>", part)


def data_of_charts(page: str, number: int | None = None) -> list[dict[str, Any]]:
    """The values that the charts of a page hold, or those of one, counted from 1."""
    specs = re.findall(r'<script type="application/json">(.*?)</script>', page)
    chosen = specs if number is None else specs[number - 1 : number]
    return [row for spec in chosen for row in rows_in(json.loads(spec))]


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
    history = Run(run)
    assert {("0", 1): 0.512, ("1", 1): 0.734, ("0", 2): 0.256}.items() <= drawn.items()
    shared = {row["round"]: row["value"] for row in rows if row.get("line") == "train loss"}
    assert shared == history.records.series("loss", reference=TRAIN)
    cells = {(row["client"], row["class"]): row["images"] for row in rows if "images" in row}
    assert cells[("1", "b")] == 6
    assert "<td>left out</td><td>2</td>" in bare(page) and "<td>5</td><td>6</td>" in bare(page)
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
    text = bare(comparison_page([Run(run), Run(other)]))
    row = re.search(r"train.local_epochs</th><td>(\d)</td><td>(\d)</td>", text)
    assert row is not None and row.groups() == ("1", "7")
    assert "other: The run is not finished: 1 of 2 rounds" in text
    lines = {row["line"] for row in data_of_charts(text) if "line" in row}
    assert lines == {"a<b>", "other"}


def test_comparison_sets_only_like_figures_beside_each_other(tmp_path: Path) -> None:
    runs = [written_run(tmp_path / name, losses(1, {0: 0.5}), rounds_done=2) for name in "abc"]
    for run, number in zip(runs, (2000, 2000, 179), strict=True):
        described = evaluated(n_generated=number, n_scored=number)
        (run / "evaluation-classifier-correct.json").write_text(json.dumps(described))
    text = bare(comparison_page([Run(run) for run in runs]))
    for number, cells in (("2,000", ["2.5", "2.5", "-"]), ("179", ["-", "-", "2.5"])):
        name = f"FD (train) ↓, classifier, correct, n={number}"
        row = text.partition(f">{name}</th>")[2].partition("</tr>")[0]
        assert [re.split(r"[> ]", cell)[1] for cell in re.findall("<td>[^<]+", row)] == cells


def test_comparison_says_first_what_keeps_figures_apart(tmp_path: Path) -> None:
    changes: dict[str, dict[str, Any]] = {
        "a": {},
        "longer": {"federation__rounds": 3},
        "seed": {"seed": 1},
        "larger": {"data__image_size": 16},
        "epsilon": {"diffusion__prediction_type": "epsilon"},
    }
    runs = {}
    for name, changed in changes.items():
        rounds = 3 if name == "longer" else 2
        run = written_run(tmp_path / name, losses(1, {0: 0.5}), rounds_done=rounds, **changed)
        described = evaluated(rounds)
        (run / "evaluation-classifier-correct.json").write_text(json.dumps(described))
        runs[name] = Run(run)

    def sentences(*names: str) -> str:
        return " ".join(incomparable({name: runs[name] for name in names}))

    assert sentences("a") == ""
    assert "unequally long (a: 2 rounds of 1 local epochs; longer: 3" in sentences("a", "longer")
    assert sentences("a", "seed") == "The seeds differ: a: 0; seed: 1."
    assert sentences("a", "larger").startswith("The data differ")
    assert "different objectives" in sentences("a", "epsilon")

    def rows(*names: str) -> dict[str, list[str]]:
        table = section(comparison_page([runs[name] for name in names]), "figures")
        rows = [re.findall("<t[hd]>([^<]*)", row) for row in table.split("<tr ")[2:]]
        return {name: cells for name, *cells in rows}

    fid = "FD (train) ↓, classifier, correct, n=897"
    assert len(rows("a", "longer")[fid]) == 2 and "-" not in rows("a", "longer")["train loss"]
    apart = rows("a", "larger")
    assert apart[f"{fid} (of a alone)"][1] == apart[f"{fid} (of larger alone)"][0] == "-"
    apart = rows("a", "epsilon")
    assert apart["train loss (of a alone)"][1] == "-" and "-" not in apart[fid]
    page = comparison_page([runs["a"], runs["seed"]])
    assert re.findall('<h2 id="(.*?)">', page)[:2] == ["warnings", "differences"]
    assert items(section(page, "warnings"))[0] == "The seeds differ: a: 0; seed: 1."


def test_same_configuration_of_other_images_is_told_by_their_hash(tmp_path: Path) -> None:
    runs = {}
    for name in "ab":
        said = {"source": "folder x", "sha256": {"all": name * 64, "train": name * 64}}
        run = written_run(
            tmp_path / name, losses(1, {0: 0.5}), rounds_done=2, files={"data.json": said}
        )
        runs[name] = Run(run)
    assert "SHA-256 bbbbbbbbbbbb" in incomparable(runs)[0]


def test_page_says_when_where_and_of_what_a_run_is(tmp_path: Path) -> None:
    hashes = {"all": "a1" * 32, "train": "b2" * 32}
    times = [
        {"begun": "2026-03-01T10:00:00+01:00", "seconds": 100.0, "host": "alpha"},
        {"begun": "2026-03-02T10:00:00+01:00", "seconds": 3600.0, "host": "beta"},
    ]
    files: dict[str, Any] = {
        "data.json": {"source": "folder eyes", "sha256": hashes},
        "times.json": times,
    }
    run = written_run(tmp_path / "run", losses(1, {0: 0.5}), rounds_done=2, files=files)
    facts = re.findall("<dd>(.*?)</dd>", section(report_page(Run(run)), "summary"))
    for words in (
        "2026-03-01 10:00 to 2026-03-02 11:00 (+0100)",
        "1:01:40, with drawing and measuring, in 2 starts",
        "alpha, beta",
        "digits, folder eyes",
        *hashes.values(),
    ):
        assert words in facts
    assert dict(key_figures(Run(run)))["time"] == "1:01:40"
    (run / "times.json").write_text('[{"begun": "yesterday"}]')
    with pytest.raises(ValueError, match=r"times\.json is not what a run writes"):
        report_page(Run(run))
    (run / "times.json").unlink()
    huge = json.dumps({"round": 1, "metric": "loss", "value": 10**400})
    for file, content in (
        ("submission.json", '{"run_config": 5}'),
        ("metrics.jsonl", "[" * 10**5),
        ("metrics.jsonl", huge),
        ("metrics.jsonl", '{"round": 1, "metric": "loss", "value": NaN}'),
        ("metrics.jsonl", '{"round": 1, "metric": "loss", "value": 1, "other": 2}'),
    ):
        (run / file).write_text(content + "\n")
        with pytest.raises(ValueError, match=rf"{file} is not what a run writes"):
            report_page(Run(run)), Run(run).submitted
        (run / file).unlink()


def test_run_that_is_not_over_says_how_to_go_on_or_that_it_does(tmp_path: Path) -> None:
    run = written_run(tmp_path / "it's", losses(1, {0: 0.5}), rounds_done=1)
    with (run / ".lock").open("a+") as lock:
        warnings = section(report_page(Run(run)), "warnings")
        command = resuming_command(Run(run).config, run)
        assert f"<pre><code>{command}</code></pre>" in warnings
        assert "The run is not finished: 1 of 2 rounds are done" in warnings
        # Held as another process would.
        fcntl.flock(lock, fcntl.LOCK_EX)
        lock.truncate(0)
        lock.write("1")
        lock.flush()
        going = section(report_page(Run(run)), "warnings")
    assert "is going on: 1 of 2 rounds are done" in going
    assert "not finished" not in going and "resume=true" not in going
    with (run / "metrics.jsonl").open("a") as metrics:
        metrics.write(Record(2, DIVERGENCE, 1, context={"reason": "kl is inf"}).line())
    diverged = section(report_page(Run(run)), "warnings")
    assert "Training has diverged in round 2 (kl is inf)" in diverged
    assert command not in diverged and "not finished" not in diverged


@pytest.mark.parametrize(
    ("first", "last", "expected"),
    [
        (1, 1, [1]),
        (1, 3, [1, 2, 3]),
        (1, 8, list(range(1, 9))),
        (1, 9, [2, 4, 6, 8]),
        (1, 100, [20, 40, 60, 80, 100]),
        (95, 100, [95, 96, 97, 98, 99, 100]),
    ],
)
def test_ticks_are_whole_rounds(first: int, last: int, expected: list[int]) -> None:
    assert whole_ticks(first, last) == expected


def test_time_that_nobody_trained_is_told_from_training(tmp_path: Path) -> None:
    spent = {"seconds_waiting": 124.0, "seconds_training": 8.0, "round_seconds": 126.0}
    run = written_run(tmp_path / "run", records_of(1, spent), rounds_done=2)
    (drawing,) = course_charts(Run(run))
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


def test_page_holds_no_value_that_a_browser_cannot_read() -> None:
    with pytest.raises(ValueError, match="not JSON compliant"):
        render("run_page.html.md", title="", library="", chart_config={"value": float("nan")})
