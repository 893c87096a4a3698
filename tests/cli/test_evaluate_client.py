import dataclasses
import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from task.cli.evaluate_client import client_images, client_verdict
from task.config import Config, read_config, write_config
from task.data import Dataset, build_dataset
from task.data.partition import partition_dataset
from task.evaluation.evaluate import evaluate_images
from task.evaluation.features import FeatureExtractor, build_extractor
from task.evaluation.metrics import Use
from task.runs.checkpoint import load_weights, save_weights
from task.runs.evaluations import evaluation_of
from task.runs.records import TRAIN, Record, Records
from tests.cli.test_cli import FILE, assert_fails_in_one_line, feddm, finished_run

CLIENT_FILE = "evaluation-classifier-correct-client-0.json"


@pytest.fixture(scope="module", autouse=True)
def quick() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("task.evaluation.metrics.KID_SUBSETS", 5)
        patch.setattr("task.evaluation.classifier.MAX_STEPS", 100)
        yield


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Make a finished run of three clients that kept the model of client 0: the global one."""
    path = finished_run(
        tmp_path_factory.mktemp("runs"),
        *("data=digits", "data.test_fraction=0.1", "federation.num_supernodes=3"),
        *("partition.beta=0.1", "federation.min_replies=1"),
    )
    (path / "local").mkdir()
    shutil.copy(path / "model.safetensors", path / "local" / "client-0.safetensors")
    return path


@pytest.fixture(scope="module")
def config(run: Path) -> Config:
    return read_config(run / "config.yaml")


@pytest.fixture(scope="module")
def dataset(config: Config) -> Dataset:
    return build_dataset(config, download=False)


@pytest.fixture(scope="module")
def extractor(config: Config, dataset: Dataset) -> FeatureExtractor:
    return build_extractor(config, dataset.train, "cpu")


@pytest.fixture
def copy(run: Path, tmp_path: Path) -> Path:
    """Copy the run, so that it may be changed."""
    return Path(shutil.copytree(run, tmp_path / "copy"))


def test_client_images_are_its_share_of_the_training_images(
    run: Path, config: Config, dataset: Dataset
) -> None:
    partition = partition_dataset(config, dataset, 3)
    for client, counts in enumerate(partition.counts):
        own = client_images(run, config, dataset, client)
        assert own.train.labels.bincount(minlength=10).tolist() == counts.tolist()
        expected = dataset.train.images[partition.train_indices[client]]
        assert torch.equal(own.train.images, expected)
        assert len(own.test) == 0


def test_unseen_images_like_those_of_a_client_fit_it_better_than_those_of_another(
    run: Path, config: Config, dataset: Dataset, extractor: FeatureExtractor
) -> None:
    held_out = partition_dataset(config, dataset, 3).test_indices
    for client, other in ((0, 1), (1, 0)):
        own = client_images(run, config, dataset, client)
        ours, theirs = (
            evaluate_images(
                config,
                dataset.test.subset(images),
                own,
                extractor=extractor,
                server_round=3,
                use=Use.ROUNDS,
            )
            for images in (held_out[client], held_out[other])
        )
        for name, reference in (("fid", TRAIN), ("kid", TRAIN), ("coverage", None)):
            found = [each.records.value(name, reference=reference) for each in (ours, theirs)]
            assert None not in found
            # Precision and recall are no oracle here: one outlier makes a ball that holds all.
            if name == "coverage":
                assert found[0] > 2 * found[1]  # type: ignore[operator]
            else:
                assert found[0] < found[1]  # type: ignore[operator]
        assert "the local model fits its client better" in client_verdict(0, ours, theirs)
        assert "the global model fits the client better" in client_verdict(0, theirs, ours)
        assert "both fit the client alike" in client_verdict(0, ours, ours)
        better = Record(3, "fid", 0.0, reference=TRAIN)
        torn = dataclasses.replace(theirs, records=Records((*theirs.records.all, better)))
        assert "FD and KID do not agree" in client_verdict(0, ours, torn)


def test_a_local_model_that_equals_the_global_one_scores_as_it_does(
    run: Path, config: Config, dataset: Dataset
) -> None:
    result = feddm("evaluate", run, "--client", 0)
    assert result.exit_code == 0, result.output
    found = json.loads((run / CLIENT_FILE).read_text())
    assert (found["client"], found["round"], found["local_round"]) == (0, 3, 3)
    own, everything = found["local_own"], found["local_all"]
    assert own == found["global_own"] and everything == found["global_all"]
    number = len(client_images(run, config, dataset, 0).train)
    assert own["n_generated"] == own["n_train"] == number
    assert (own["n_test"], own["n_floor"]) == (0, number // 2)
    # The images of a plain evaluation, measured as there.
    assert feddm("evaluate", run).exit_code == 0
    plain = json.loads((run / FILE).read_text())
    assert everything["whole"] == plain["whole"]
    assert all(each in plain["records"] for each in everything["records"])
    own_fid, floor, whole_fid = (
        evaluation_of(found).records.value("fid", reference=TRAIN, real=real)
        for found, real in ((own, False), (own, True), (everything, False))
    )
    printed = " ".join(result.stdout.split())
    for words in (
        "tiny, client 0, local model of round 3, global model of round 3 of 3",
        "metric local, own global, own real, own local, all global, all real, all",
        f"FD (train) ↓ {own_fid:.4f} {own_fid:.4f} {floor:.4f} {whole_fid:.4f}",
        f"own: data digits: {number:,} generated images (",
        f"On the {number:,} images of client 0 the local model's FD is",
        "both fit the client alike.",
    ):
        assert words in printed


def test_another_local_model_changes_its_columns_only(copy: Path) -> None:
    file = copy / "local" / "client-0.safetensors"
    weights, metadata = load_weights(file)
    save_weights(file, {name: tensor * 1.5 for name, tensor in weights.items()}, metadata)
    reports = []
    for _ in range(2):
        assert feddm("evaluate", copy, "--client", 0, "--num-per-class", 2).exit_code == 0
        reports.append(json.loads((copy / CLIENT_FILE).read_text()))
    first, again = reports
    assert first == again
    assert first["local_all"]["n_generated"] == first["global_all"]["n_generated"] == 20
    for whose in ("own", "all"):
        local, shared = (
            evaluation_of(first[f"{name}_{whose}"]).records for name in ("local", "global")
        )
        fids = [each.value("fid", reference=TRAIN) for each in (local, shared)]
        assert fids[0] != fids[1]
        floors = [each.value("fid", reference=TRAIN, real=True) for each in (local, shared)]
        assert floors[0] == floors[1]


def test_a_client_that_was_not_kept_is_an_error_of_one_line(run: Path) -> None:
    result = feddm("evaluate", run, "--client", 2)
    assert_fails_in_one_line(result, "client must be one whose weights are in", "(0), got 2")


def test_a_centralized_run_has_no_clients(copy: Path, config: Config) -> None:
    write_config(config.changed({"train.mode": "centralized"}), copy / "config.yaml")
    result = feddm("evaluate", copy, "--client", 0)
    assert_fails_in_one_line(result, "train.mode must be federated for --client, got 'centralized'")


def test_other_data_than_the_run_dealt_out_are_refused(
    copy: Path, config: Config, dataset: Dataset
) -> None:
    described = partition_dataset(config, dataset, 3).describe()
    file = copy / "partition.json"
    file.write_text(json.dumps(described))
    assert len(client_images(copy, config, dataset, 0).train) == sum(described["train_counts"][0])
    described["train_counts"][1][0] += 1
    file.write_text(json.dumps(described))
    result = feddm("evaluate", copy, "--client", 0)
    assert_fails_in_one_line(result, "data.root must be where the images are that", str(file))


def test_a_client_of_few_images_is_refused_by_its_number(
    run: Path, config: Config, dataset: Dataset
) -> None:
    few = Dataset(dataset.train.subset(torch.arange(45)), dataset.test)
    sizes = [len(part) for part in partition_dataset(config, few, 3).train_indices]
    client = min(range(3), key=sizes.__getitem__)
    expected = f"client {client} must be one of at least 20 training .* got {sizes[client]}$"
    with pytest.raises(ValueError, match=expected):
        client_images(run, config, few, client)
