"""What a model card says of a run, and what it keeps to itself."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import save_file

from task.config import anchored, load_config, write_config
from task.reporting.metric_table import Quantity
from task.reporting.model_card import training_counts, write_model_card
from task.runs.records import HELD_OUT, TEST, TRAIN, Record, records_of
from task.runs.run import Run, load_run
from tests.helpers import Scores, evaluated

EXPORTED = {
    "by": "feddm 0.1.0",
    "format": "onnx",
    "round": 3,
    "client": None,
    "weights_sha256": "ab" * 32,
}
SCORES: Scores = {
    Quantity("fid", TRAIN): (1.25, 0.75),
    Quantity("class_agreement"): (0.99, None),
    Quantity("pixel_copied"): (0.125, None),
    Quantity("pixel_p_value"): (0.03125, None),
}


def measured(server_round: int = 3, **drawn: Any) -> dict[str, Any]:
    label = {"n_generated": 20, "n_train": 100, "n_test": 30, "n_floor": 20, "n_scored": 20}
    told = {**label, "n_rarest": 10, "extractor_sha256": "cd" * 32, **drawn}
    return evaluated(server_round, SCORES, **told)


def run_of(folder: Path, files: dict[str, Any], *overrides: str) -> Run:
    path = folder / "st-elsewhere"
    path.mkdir(parents=True)
    config = load_config(
        [
            *("data=image_folder", "data.classes=[normal,pneumonia]", f"data.root={folder}"),
            *("run_name=st-elsewhere", f"output_dir={folder}", "federation.rounds=3", *overrides),
        ]
    )
    write_config(anchored(config, folder), path / "config.yaml")
    for name, content in files.items():
        (path / name).write_text(json.dumps(content))
    save_file({}, path / "model.safetensors", {"round": "3"})
    return load_run(path)


def card(run: Run, **exported: Any) -> str:
    write_model_card(
        run, run.path, usage="Load it.\n", library="onnx", exported={**EXPORTED, **exported}
    )
    return (run.path / "README.md").read_text()


def test_card_of_a_simulation_tells_counts_training_metrics_and_copies(tmp_path: Path) -> None:
    files = {
        "partition.json": {"num_clients": 2, "train_counts": [[30, 10], [20, 40]]},
        "evaluation-classifier-correct.json": measured(sampler="ddim", num_inference_steps=50),
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
        "| FD (train) ↓ | 1.2500 | 0.7500 |",
        "nearer to training images than held-out ones, pixels ↓ | 0.1250 |  |",
        "p where nothing is copied, pixels | 0.0312 |",
        "Not measured: images that look like noise.",
        "Warning: fewer than 50 measured images of a class. Few images of a class were measured: "
        "20 of 2 classes",
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


def test_card_of_a_run_without_evaluation_tells_what_it_measured_itself(tmp_path: Path) -> None:
    files: dict[str, Any] = {"partition.json": {"num_clients": 2, "train_counts": [[3, 1], [2, 4]]}}
    run = run_of(tmp_path, files)
    record(
        run,
        Record(3, "class_agreement", 0.5, n=500),
        *records_of(3, {"chance_agreement": 0.5, "noise_position": 0.75}, n=500),
        Record(3, "noise_position", 0.125, real=True),
    )
    text = card(run)
    for words in (
        "500 images at the end of the run, round 3",
        "| between real (0) and noise (1) ↓ | 0.7500 | 0.1250 |",
        "| found in the class asked for ↑ | 0.5000 |  |",
        "| found in the class asked for by chance | 0.5000 |  |",
        "Warning: images that look like noise. The images look untrained",
        "Warning: images of other classes than asked for.",
        "Not measured: copies of training images.",
    ):
        assert words in text


def record(run: Run, *records: Record) -> None:
    (run.path / "metrics.jsonl").write_text("".join(map(Record.line, records)))


def loss(number: int, value: float, client: int | None = None) -> Record:
    return Record(number, "loss", value, client=client, reference=TEST)


def score(
    number: int, metric: str, value: float, *, of: int | None = None, client: int | None = None
) -> Record:
    """What hospitals scored: one, or so many of them together."""
    context = {} if of is None else {"num_clients": of}
    return Record(number, metric, value, client=client, reference=HELD_OUT, context=context)


def test_hospitals_scores_are_told_as_their_mean_alone(tmp_path: Path) -> None:
    run = run_of(tmp_path, {"nodes.json": {"7": 0, "8": 1}})
    record(
        run,
        score(2, "pixel_copied", 0.5, of=2),
        score(3, "pixel_copied", 0.75, client=0),
        score(3, "pixel_copied", 0.25, of=2),
        Record(3, "num_scoring_clients", 2),
        *(loss(3, 0.75, client) for client in range(3)),
        loss(3, 0.125),
        # Of a round before, and of a single hospital, the others having one class each.
        score(2, "fid", 0.5, of=2),
        score(3, "class_agreement", 0.75, of=1),
    )
    text = card(run)
    assert "than held-out ones, pixels ↓ | 0.2500 |  | 2 | 3 |" in text
    assert "| loss on held-out images | 0.1250 |  | 3 | 3 |" in text
    assert "0.75" not in text and "0.5" not in text
    assert "Scores of fewer than 2 clients are not told." in text


def test_scores_of_another_round_than_that_of_the_weights_are_not_told(tmp_path: Path) -> None:
    run = run_of(
        tmp_path, {"evaluation-classifier-correct.json": measured(2)}, "train.mode=centralized"
    )
    record(run, loss(2, 0.625))
    assert "Nothing was measured of these weights: " in card(run)
    assert "0.625" not in card(run) and "FD (train)" not in card(run)
    of_round_2 = card(run, round=2)
    assert "| loss | 0.6250 | 2 |" in of_round_2 and "FD (train)" in of_round_2


@pytest.mark.parametrize("others", [False, True])
def test_scores_of_a_single_client_are_not_told(tmp_path: Path, others: bool) -> None:
    run = run_of(tmp_path, {"nodes.json": {"7": 0, "8": 1}})
    elsewhere = [loss(2, 0.75, client=1), Record(2, "num_scoring_clients", 2)]
    record(
        run,
        *(elsewhere if others else []),
        score(3, "pixel_copied", 0.25, client=0),
        score(3, "pixel_copied", 0.25, of=1),
        Record(3, "num_scoring_clients", 1),
        loss(3, 0.625, client=0),
        loss(3, 0.625),
    )
    text = card(run)
    assert "0.25" not in text and "0.625" not in text
    assert "Scores of fewer than 2 clients are not told." in text
    assert "Nothing was measured" not in text


def test_card_of_an_earlier_run_tells_what_its_files_hold(tmp_path: Path) -> None:
    files = {
        "partition.json": {"train_counts": [[30, 10], [20, 40]]},
        "evaluation-classifier-correct.json": measured(),
    }
    text = card(run_of(tmp_path, files))
    assert "Clients: 2." in text and "- after round 3\n" in text and "drawn by" not in text


@pytest.mark.parametrize("name", ["partition.json", "evaluation-classifier-correct.json"])
def test_file_that_no_run_has_written_is_named(name: str, tmp_path: Path) -> None:
    run = run_of(tmp_path, {name: {"sampler": "ddim"}})
    with pytest.raises(ValueError, match=re.escape(name)):
        card(run)


def test_card_of_a_clients_weights_claims_no_results(tmp_path: Path) -> None:
    files = {"evaluation-classifier-correct.json": measured()}
    text = card(run_of(tmp_path, files), client=1)
    assert "of a single client" in text and "FD (train)" not in text
    assert "Nothing was measured of these weights: " in text


def test_card_of_a_centralized_run_says_where_the_images_were(tmp_path: Path) -> None:
    files = {"pooled.json": {"train_counts": [5, 6], "test_counts": [1, 1]}}
    run = run_of(tmp_path, files, "train.mode=centralized")
    record(run, loss(2, 0.5), loss(3, 0.125))
    text = card(run)
    assert "on all images in one place" in text and "| algorithm | centralized training |" in text
    assert "| all | 11 |" in text
    assert "### On held-out images\n" in text and "| loss | 0.1250 | 3 |" in text
    assert "client" not in text.casefold()


def test_training_names_the_arguments_of_the_aggregation(tmp_path: Path) -> None:
    words = ("federation.aggregation=krum", "federation.num_malicious=2", "federation.rounds=3")
    words += ("federation.min_replies=7", "federation.max_update_norm=5", "train.precision=float32")
    text = card(run_of(tmp_path, {}, *words))
    for row in (
        "num_malicious | 2",
        "num_selected | 1",
        "max_update_norm | 5",
        "precision | float32",
    ):
        assert f"| {row}" in text
    assert "trim_fraction" not in text and "ema_decay" not in text
    assert "| strategy" not in text and "learning rates over" not in text


def test_training_names_the_strategy_with_its_values_and_the_schedule(tmp_path: Path) -> None:
    words = ("strategy=fedavgm", "train.lr_schedule=cosine", "train.warmup_rounds=1")
    text = card(run_of(tmp_path, {}, *words))
    for row in (
        "strategy | fedavgm (server_lr 1, momentum 0.5)",
        "learning rates over rounds | cosine",
        "rounds of warm-up | 1",
    ):
        assert f"| {row} |" in text


def test_card_leaves_what_it_cannot_know_to_its_owner(tmp_path: Path) -> None:
    text = card(run_of(tmp_path, {}, "train.precision=auto"))
    assert "- Data set: a folder of images; say here what they show.\n" in text
    assert "precision" not in text and "max_update_norm" not in text


def test_card_tells_the_versions_that_trained_where_they_are_known(tmp_path: Path) -> None:
    machine = {"machine.json": {"device": "cpu", "versions": {"feddm": "1.2", "torch": "3.4"}}}
    assert "- Trained with feddm 1.2, torch 3.4.\n" in card(run_of(tmp_path / "new", machine))
    unknown = "- Trained with versions that the run does not record.\n"
    assert unknown in card(run_of(tmp_path / "old", {}))
