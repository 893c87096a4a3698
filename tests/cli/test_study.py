"""`feddm study` on a run whose model was never trained: what it writes, and how it goes on."""

import html
import json
import re
import shutil
from pathlib import Path

import pytest
from PIL import Image

from task.cli.study import study_runs
from task.files import file_sha256
from task.reporting.model_card import study_sentences
from task.reporting.report import report_page
from task.runs.run import Run
from tests.helpers import written_run
from tests.processes import feddm

FAST = [
    *("study.classifier=small", "study.ratios=[0.5,1]", "study.real_fractions=[1.0]"),
    *("study.num_steps=5", "study.num_seeds=1", "study.num_bootstraps=1000", "study.device=cpu"),
]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return written_run(tmp_path_factory.mktemp("runs") / "noise", [], rounds_done=2)


def test_study_is_written_shown_and_gone_on_with(run: Path) -> None:
    said: list[str] = []
    found = study_runs([run], FAST, out=None, say=said.append)
    folder = run / "study"
    assert json.loads((folder / "study.json").read_text()) == found
    for name in ("gain.png", "classes.png"):
        with Image.open(folder / name) as picture:
            assert min(picture.size) > 200
    page = (folder / "study.md").read_text()
    (headline,) = found["headlines"]
    assert headline["sentence"] in page.replace("\\", "")
    assert "| real + 0.5 x synthetic | 1 |" in page and "(rarest)" in page
    assert any(line.startswith("drawing") for line in said)
    assert "noise: " + headline["sentence"] in said

    shown = Run(run)
    report = html.unescape(report_page(shown))
    assert "Use to a classifier" in report and headline["sentence"] in report
    weights = {"client": None, "weights_sha256": file_sha256(run / "model.safetensors")}
    card = study_sentences(shown, weights)
    assert card[0] == headline["sentence"] and not [each for each in card if "noise" in each]
    assert study_sentences(shown, weights | {"weights_sha256": "0"}) == []
    assert study_sentences(shown, weights | {"client": 0}) == []

    said.clear()
    assert study_runs([run], FAST, out=None, say=said.append) == found
    assert not [line for line in said if re.search("^drawing| trained, about", line)]


def test_runs_are_compared_by_their_generators(run: Path, tmp_path: Path) -> None:
    other = tmp_path / "other" / "noise"
    shutil.copytree(run, other, ignore=shutil.ignore_patterns("study"))
    with pytest.raises(ValueError, match="--out must be the folder of a study of several runs"):
        study_runs([run, other], FAST, out=None, say=print)
    found = study_runs([run, other], FAST, out=tmp_path / "both", say=lambda _: None)
    assert [each["source"] for each in found["headlines"]] == [
        f"{run.parent.name}/noise",
        "other/noise",
    ]
    (between,) = found["between"]
    assert between["macro_auc"]["value"] == between["macro_auc"]["low"] == 0  # the same images
    assert "| generator |" in (tmp_path / "both" / "study.md").read_text()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["study.ratios=[-1]"], "study.ratios must be a list, each element > 0"),
        (["study.num_bootstraps=100"], "study.num_bootstraps must be at least 1680 for 42 compar"),
        (["study.classifier=resnt18", "study.weights=x"], "or a network of torchvision, such as"),
        (["study.nonsense=1"], "no such value: study.nonsense"),
        (["model.width=9"], "an override must be NAME=VALUE with a name of"),
    ],
)
def test_wrong_words_are_refused_before_anything_is_drawn(
    run: Path, tmp_path: Path, words: list[str], message: str
) -> None:
    done = feddm("study", run, *words, "--out", tmp_path / "study")
    assert done.returncode == 1 and message in done.stderr.splitlines()[-1]
    assert not (tmp_path / "study").exists()


def test_run_of_other_data_is_refused(run: Path, tmp_path: Path) -> None:
    other = written_run(tmp_path / "larger", [], rounds_done=2, data__image_size=16)
    with pytest.raises(ValueError, match=r"RUN larger must be a run of the same data"):
        study_runs([run, other], FAST, out=tmp_path / "both", say=print)
