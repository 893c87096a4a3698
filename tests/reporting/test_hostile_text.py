"""One run whose names and reasons are HTML, Markdown and formulas, in all that is written of it."""

import csv
import json
import shlex
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from markdown_it import MarkdownIt
from typer.testing import CliRunner

from task.cli.main import app
from task.reporting.model_card import write_model_card
from task.reporting.report import write_report
from task.runs.run import load_run
from tests.helpers import evaluated, left_out, losses, written_run

IMAGE = "<img src=x onerror=alert(1)>"
RUN = f"=1+1 '\"`*_{IMAGE}_*|[a](javascript:alert(2))"
CLASSES = [f'it\'s "{IMAGE}"', "<script>alert(3)", "**b**|[c](http://d)", "$\\frac$"]
REASON = f"</td></script>{IMAGE}"
EXPORTED = {"by": "x", "format": "onnx", "round": 2, "client": None, "weights_sha256": "ab"}


class Found(HTMLParser):
    """What a browser would find: the elements by tag, attributes, and all text."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str]] = []
        self.text = ""
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += [(name, value or "") for name, value in attrs]

    def handle_data(self, data: str) -> None:
        self.text += data

    def check(self) -> None:
        """Fail where anything of the run's text means something."""
        assert not any(name.startswith("on") for name, _ in self.attributes)
        links = [value for name, value in self.attributes if name in ("href", "src")]
        assert not any("javascript:" in link or link in ("x", "http://d") for link in links)


@pytest.fixture(scope="module")
def sweep(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two runs with such names that stand in one table."""
    folder = tmp_path_factory.mktemp("sweep")
    quoted = ",".join("'" + name.replace("'", "\\'") + "'" for name in CLASSES)
    for name, beta in ((RUN, 1), ("other", 5)):
        run = written_run(
            folder / name,
            [*losses(1, {0: 0.5, 1: 0.7}), left_out(1, 1, REASON)],
            rounds_done=2,
            files={"partition.json": {"num_clients": 2, "train_counts": [[3] * 4, [5] * 4]}},
            overrides=shlex.join(
                ["data=image_folder", f"data.classes=[{quoted}]", "data.image_size=8"]
            ),
            partition__beta=beta,
        )
        found = evaluated(sampler="ddim", num_inference_steps=2)
        (run / "evaluation-classifier-correct.json").write_text(json.dumps(found))
    return folder


def rendered(markdown: str) -> Found:
    return Found(MarkdownIt("commonmark").enable(["table", "strikethrough"]).render(markdown))


def test_report_shows_it_as_text(sweep: Path) -> None:
    page = Found(write_report(sweep / RUN).read_text(encoding="utf-8"))
    page.check()
    assert page.tags.count("img") == 0
    for text in (RUN, *CLASSES, REASON):
        assert text in page.text


def test_tables_show_it_as_text(sweep: Path) -> None:
    result = CliRunner().invoke(app, ["tables", str(sweep), "--no-figures"])
    assert result.exit_code == 0, result.output
    pages: list[Any] = [
        Found((sweep / "tables.html").read_text(encoding="utf-8")),
        rendered((sweep / "tables.md").read_text(encoding="utf-8")),
    ]
    for page in pages:
        page.check()
        assert not {"img", "script", "em", "strong"} & {*page.tags}
        assert all(link.startswith("#") for name, link in page.attributes if name == "href")
    with (sweep / "tables.csv").open(encoding="utf-8") as file:
        cells = [cell for line in csv.reader(file) for cell in line]
    assert f"'{RUN}" in cells and not any(cell.startswith(("=", "@")) for cell in cells)


def test_model_card_shows_it_as_text(sweep: Path) -> None:
    run = load_run(sweep / RUN)
    write_model_card(run, sweep, usage="Load it.\n", library="onnx", exported=EXPORTED)
    card = rendered((sweep / "README.md").read_text(encoding="utf-8").partition("\n---\n")[2])
    card.check()
    assert not {"img", "script", "a"} & {*card.tags}
    for name in CLASSES:
        assert card.text.count(name) == 2, name
