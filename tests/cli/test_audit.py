import json
import shutil
import stat
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torchvision.io import write_png

from task.config import read_config
from task.data import build_dataset
from task.data.partition import partition_dataset
from task.data.source import hash_images
from tests.cli.test_cli import assert_fails_in_one_line, feddm, finished_run


@pytest.fixture(scope="module", autouse=True)
def quick() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("task.evaluation.classifier.MAX_STEPS", 100)
        yield


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Make a finished run, not trained at all, of three clients that kept the model of client 0."""
    path = finished_run(
        tmp_path_factory.mktemp("runs"),
        *("data=digits", "data.test_fraction=0.1", "federation.num_supernodes=3"),
        *("federation.min_replies=1", "partition.counts=null", "partition.beta=0.5"),
    )
    config = read_config(path / "config.yaml")
    dataset = build_dataset(config, download=False)
    dealt = partition_dataset(config, dataset, 3).describe()
    (path / "data.json").write_text(json.dumps({"sha256": hash_images(dataset)}))
    (path / "partition.json").write_text(json.dumps(dealt))
    (path / "local").mkdir()
    shutil.copy(path / "model.safetensors", path / "local" / "client-0.safetensors")
    return path


def test_audit_of_a_model_that_remembers_nothing(run: Path) -> None:
    result = feddm("audit", run, "--num-images", 60, "--num-per-class", 2)
    assert result.exit_code == 0, result.output
    assert "DETECTED" not in result.stdout
    assert "not detected: All images: membership. The strongest of the attacks (7)" in result.stdout
    assert "client 0, own model" in result.stdout
    told = json.loads((run / "audit.json").read_text())
    assert {(each["client"], each["is_local"]) for each in told["attacks"]} >= {
        (None, False),
        (0, True),
    }
    whole = [each["found"] for each in told["attacks"] if each["client"] is None]
    assert len(whole) == 7 and all(each["members"] == each["others"] == 60 for each in whole)
    assert all(each["low"] < 0.5 < each["high"] for each in whole if each["p_value"] > 0.1)
    assert [each["space"] for each in told["searches"]] == ["pixels", "features (classifier)"]
    assert all(each["generated"] == 20 for each in told["searches"])
    assert not any(each["is_detected"] for each in told["findings"])
    # Training images are in it.
    pairs = run / "audit-pairs.png"
    assert stat.S_IMODE(pairs.stat().st_mode) == 0o600 and pairs.stat().st_size > 1000


def test_audit_needs_held_out_images_and_those_of_the_run(run: Path, tmp_path: Path) -> None:
    rng = torch.Generator().manual_seed(0)
    for number in range(24):
        place = tmp_path / "images" / "ab"[number % 2]
        place.mkdir(parents=True, exist_ok=True)
        image = torch.randint(256, (1, 8, 8), generator=rng).byte()
        write_png(image, str(place / f"{number}.png"))
    unmeasured = finished_run(
        tmp_path,
        *("data=image_folder", f"data.root={tmp_path / 'images'}", "data.classes=[a,b]"),
        *("data.channels=1", "data.test_fraction=null", "federation.num_supernodes=1"),
        *("federation.min_replies=1", f"data.cache_dir={tmp_path / 'cache'}"),
    )
    assert_fails_in_one_line(feddm("audit", unmeasured), "data.json must be the run's, with hashes")
    dataset = build_dataset(read_config(unmeasured / "config.yaml"), download=False)
    told = {"sha256": hash_images(dataset)}
    (unmeasured / "data.json").write_text(json.dumps(told))
    assert_fails_in_one_line(feddm("audit", unmeasured), "data.test_fraction must be one of the")
    write_png(torch.zeros(1, 8, 8).byte(), str(tmp_path / "images" / "a" / "more.png"))
    assert_fails_in_one_line(feddm("audit", unmeasured), "holds other images, or labels, than")
    (unmeasured / "nodes.json").write_text(json.dumps({"7": 0}))
    assert_fails_in_one_line(feddm("audit", unmeasured), "images of real nodes are not here")
    assert_fails_in_one_line(feddm("audit", tmp_path / "none"), "holds no run")
    copy = shutil.copytree(run, tmp_path / "other")
    dealt = json.loads((copy / "partition.json").read_text())
    dealt["train_counts"][0][0] += 1
    (copy / "partition.json").write_text(json.dumps(dealt))
    assert_fails_in_one_line(feddm("audit", copy), "data.root must be where the images are")
