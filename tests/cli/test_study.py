"""`feddm study` on a run whose model was never trained: what it writes, and how it goes on."""

import html
import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from task.cli.study import study_runs
from task.cli.tables import write_tables
from task.data import build_dataset
from task.data.partition import partition_dataset
from task.files import file_sha256, write_json
from task.reporting.model_card import study_sentences
from task.reporting.report import report_page
from task.runs.layout import run_config
from task.runs.run import Run
from tests.helpers import written_run
from tests.processes import feddm

FAST = [
    *("study.classifier=small", "study.ratios=[0.5,1]", "study.real_fractions=[1.0]"),
    *("study.num_steps=5", "study.num_seeds=1", "study.num_bootstraps=1000", "study.device=cpu"),
]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "noise"
    return dealt_out(written_run(folder, [], rounds_done=2))


def dealt_out(run: Path) -> Path:
    """Write down that a simulation of two clients dealt its images out."""
    config = run_config(run)
    dealt = partition_dataset(config, build_dataset(config, download=False), 2).describe()
    write_json(run / "partition.json", dealt)
    return run


def written_classifier(folder: Path, **changes: Any) -> Path:
    unlike = ("width", "num_poolings"), ("num_timesteps", "num_inference_steps")
    left_out = dict.fromkeys(
        f"{section}__{name}"
        for section, names in zip(("model", "diffusion"), unlike, strict=True)
        for name in names
    )
    words = "model=classifier model.network=small"
    return written_run(folder, [], rounds_done=2, overrides=words, **left_out, **changes)


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
    with pytest.raises(ValueError, match="--out must be the folder of a study of several gen"):
        study_runs([run, other], FAST, out=None, say=print)
    found = study_runs([run, other], FAST, out=tmp_path / "both", say=lambda _: None)
    assert [each["source"] for each in found["headlines"]] == [
        f"{run.parent.name}/noise",
        "other/noise",
    ]
    (between,) = found["between"]
    assert between["macro_auc"]["value"] == between["macro_auc"]["low"] == 0  # the same images
    assert "| generator |" in (tmp_path / "both" / "study.md").read_text()


def test_classifiers_of_runs_stand_beside_what_hospitals_get(run: Path, tmp_path: Path) -> None:
    seeds = [
        dealt_out(written_classifier(tmp_path / "sweep" / f"seed-{seed}", seed=seed))
        for seed in (0, 1)
    ]
    pooled = written_classifier(tmp_path / "pooled", train__mode="centralized")
    words = [*FAST, "study.ratios=[1]"]
    found = study_runs([run, *seeds, pooled], words, out=tmp_path / "study", say=lambda _: None)
    (headline,) = found["headlines"]
    assert headline["source"] == "noise"
    arms = {row["title"]: row for row in found["arms"] if row["kind"] == "run"}
    assert [*arms] == ["classifier of a run seed-0", "classifier of a run pooled"]
    assert [[run["name"] for run in row["runs"]] for row in arms.values()] == [
        ["seed-0", "seed-1"],
        ["pooled"],
    ]
    assert all({"gains", "p_holm_gains"} <= row.keys() for row in arms.values())
    # Untrained, it says the same of all images: by chance.
    for row in arms.values():
        assert row["figures"]["balanced_accuracy"]["mean"] < 0.3
    assert [each for each in found["warnings"] if "images dealt out otherwise" in each]
    assert [each["hospital"] for each in found["at_hospitals"]] == [0, 1]
    kinds = [each["kind"] for each in found["at_hospitals"][0]["classifiers"]]
    assert kinds == ["own", "own_both", "real", "synthetic", "run", "run"]
    assert sum(e["num_train"] for e in found["at_hospitals"]) == sum(
        found["images"]["train"]["by_class"]
    )
    page = (tmp_path / "study" / "study.md").read_text()
    assert "## Alone and together" in page and "| trained by run pooled |" in page
    assert "a single run is taken to spread" in page
    assert found["at_hospitals_sentence"].startswith("Of 2 hospitals the mean balanced accuracy")
    assert found["at_hospitals_sentence"] in page.replace("\\", "")

    with pytest.raises(ValueError, match=r"no finished run in .*models that draw no images, or "):
        write_tables(tmp_path / "sweep", device=None, say=print)

    for runs, message in (
        (seeds, "RUN must be one at least that draws images"),
        ([run, seeds[0]], "study.real_fractions must be a list with 1.0 beside classifiers"),
    ):
        with pytest.raises(ValueError, match=message):
            study_runs(runs, [*FAST, "study.real_fractions=[0.5]"], out=tmp_path / "x", say=print)


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
