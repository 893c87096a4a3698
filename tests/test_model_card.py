"""What a model card says of a run, and what it keeps to itself."""

import json
import re
from pathlib import Path
from typing import Any

import pytest

from task.config import anchored, load_config, write_config
from task.evaluate import Classification, Label, MetricReport, Scores
from task.metrics import Copying
from task.model_card import training_counts, write_model_card
from task.runs import FinishedRun, find_runs

EXPORTED = {
    "by": "feddm 0.1.0",
    "format": "onnx",
    "round": 3,
    "client": None,
    "weights_sha256": "ab" * 32,
}
LABEL = Label("digits", "classifier", "cd" * 32, "correct", False, 20, 100, 30, 20, 20, 0)
SHARES = dict(precision=0.9, recall=0.8, density=1.0, coverage=0.7)
REPORT = MetricReport(
    label=LABEL,
    generated=Scores(fid_train=1.25, kid_train=0.5, kid_train_std=0.1, **SHARES),
    floor=Scores(fid_train=0.75, kid_train=0.0, kid_train_std=0.1, **SHARES),
    classification=Classification(0.8, 0.9, 0.95, 0.99),
    pixel_copying=Copying(0.1, 0.2, 0.125),
    feature_copying=None,
)


def run_of(folder: Path, files: dict[str, Any], *overrides: str) -> FinishedRun:
    path = folder / "st-elsewhere"
    path.mkdir()
    config = load_config(
        [
            *("data=image_folder", "data.classes=[normal,pneumonia]", f"data.root={folder}"),
            *("run_name=st-elsewhere", f"output_dir={folder}", "federation.rounds=3", *overrides),
        ]
    )
    write_config(anchored(config, folder), path / "config.yaml")
    for name, content in files.items():
        (path / name).write_text(json.dumps(content))
    (path / "model.safetensors").touch()
    return find_runs(folder)[0]


def card(run: FinishedRun, **exported: Any) -> str:
    write_model_card(
        run, run.path, usage="Load it.\n", library="onnx", exported={**EXPORTED, **exported}
    )
    return (run.path / "README.md").read_text()


def test_card_of_a_simulation_tells_counts_training_metrics_and_copies(tmp_path: Path) -> None:
    drawn = {"round": 3, "sampler": "ddim", "num_inference_steps": 50}
    files = {
        "partition.json": {"num_clients": 2, "train_counts": [[30, 10], [20, 40]]},
        "evaluation-classifier-correct.json": {**REPORT.describe(), **drawn},
    }
    text = card(run_of(tmp_path, files, "partition.beta=0.25", "diffusion.label_dropout=0.1"))
    front = re.match(r"---\n(.*?)---\n", text, re.DOTALL)
    assert front is not None and "library_name: onnx\n" in front[1] and "license: " in front[1]
    for words in (
        "clients that one machine simulated",
        "after round 3 of 3",
        "| normal | 50 |",
        "| all | 100 |",
        "| partition.beta (Dirichlet) | 0.25 |",
        "| FID (train) v | 1.2500 | 0.7500 |",
        "nearest 1 % of real, pixels | 0.1250 | 0.0100 |",
        "drawn by ddim in 50 steps",
        "extractor classifier cdcdcdcdcdcd, image range correct",
        "no formal guarantee",
        "Diagnosis",
        "ab" * 32,
    ):
        assert words in text
    assert str(tmp_path) not in text and "st-elsewhere" not in text


@pytest.mark.parametrize(
    ("told", "expected"),
    [
        ({"0": [3, 4], "1": [5, 6]}, ([8, 10], 2, 0)),
        # The sum would be the counts of the one that told.
        ({"0": [3, 4], "1": None}, (None, 2, 1)),
        ({"0": None, "1": None}, (None, 2, 2)),
    ],
)
def test_counts_of_a_single_site_are_not_told(
    tmp_path: Path, told: dict[str, Any], expected: tuple[Any, ...]
) -> None:
    files = {
        "nodes.json": {"7576031391778918868": 0, "9903621916691877769": 1},
        "class_counts.json": {"classes": ["normal", "pneumonia"], "clients": told},
    }
    run = run_of(tmp_path, files)
    assert training_counts(run) == expected
    text = card(run)
    assert "Clients: 2." in text and "shared weights and never images" in text
    assert "7576031391778918868" not in text and "partition.beta" not in text
    assert ("| all | 18 |" in text) == (expected[0] is not None)
    assert (
        "Nothing was measured of these weights: assume nothing about quality or copied images."
        in text
    )


def test_hospitals_scores_are_told_as_their_mean_alone(tmp_path: Path) -> None:
    run = run_of(tmp_path, {"nodes.json": {"7": 0, "8": 1}})
    scores = [
        {"round": 2, "who": "global", "name": "quality_pixel_copied", "value": 0.5},
        {"round": 3, "who": "client-0", "name": "quality_pixel_copied", "value": 0.75},
        {"round": 3, "who": "global", "name": "quality_pixel_copied", "value": 0.25},
    ]
    (run.path / "metrics.jsonl").write_text("".join(json.dumps(each) + "\n" for each in scores))
    text = card(run)
    assert "as the nearest 1 % of real, pixels | 0.2500 | 3 |" in text
    assert "0.75" not in text and "0.5" not in text


def test_card_of_a_clients_weights_claims_no_results(tmp_path: Path) -> None:
    drawn = {"round": 3, "sampler": "ddim", "num_inference_steps": 50}
    files = {"evaluation-classifier-correct.json": {**REPORT.describe(), **drawn}}
    text = card(run_of(tmp_path, files), client=1)
    assert "of a single client" in text and "FID (train)" not in text
    assert "Nothing was measured of these weights: " in text


def test_card_of_a_centralised_run_says_where_the_images_were(tmp_path: Path) -> None:
    files = {"pooled.json": {"train_counts": [5, 6], "test_counts": [1, 1]}}
    text = card(run_of(tmp_path, files, "train.mode=centralized"))
    assert "on all images in one place" in text and "| algorithm | centralised training |" in text
    assert "| all | 11 |" in text and "Clients" not in text


def test_a_report_survives_its_description() -> None:
    found = json.loads(json.dumps(REPORT.describe())) | {"round": 3, "eta": 1.0}
    assert MetricReport.from_description(found) == REPORT
    with pytest.raises(ValueError, match=r"no measurements of this version .* 'n_floor'"):
        MetricReport.from_description({k: v for k, v in found.items() if k != "n_floor"})
