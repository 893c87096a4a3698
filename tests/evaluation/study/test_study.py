"""Known answers: what a study says of generators whose use is known."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from task.config.study_config import StudyConfig, load_study_config
from task.data import Dataset, ImageSet
from task.evaluation.study.fitting import augmented
from task.evaluation.study.study import (
    Material,
    Study,
    count_nearly_equal,
    split_real,
    without_copies,
)
from task.evaluation.study.summary import summarize
from tests.helpers import digits_dataset

CLASSES = [str(digit) for digit in range(10)]
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def digits() -> Dataset:
    return digits_dataset(image_size=8, test_fraction=0.3)


def shuffled(number: int, seed: int = 0) -> Tensor:
    return torch.randperm(number, generator=torch.Generator().manual_seed(seed))


def studied(material: Material, study: StudyConfig, folder: Path) -> dict[str, Any]:
    trained = Study(material, study, folder, mirrors=False, device=CPU)
    return summarize(material, study, trained.results(lambda _: None), odir=False)


def test_real_images_gain_copies_do_not_and_wrong_labels_lose(
    digits: Dataset, tmp_path: Path
) -> None:
    study = load_study_config(
        [
            *("study.classifier=small", "study.ratios=[2]", "study.real_fractions=[1.0]"),
            *("study.num_steps=150", "study.num_bootstraps=2000"),
        ]
    )
    train, validation = split_real(digits, CLASSES, study)
    order = shuffled(len(train))
    own, held = train.subset(order[:80]), train.subset(order[80:])
    sources = {
        "held-out": held,
        "copies": own.subset(torch.arange(80).repeat(2)),
        "wrong": ImageSet(held.images, held.labels[shuffled(len(held), 1)]),
    }
    material = Material(CLASSES, own, validation, digits.test, sources)
    found = studied(material, study, tmp_path)
    told = {each["source"]: each for each in found["headlines"]}
    verdicts = {name: each["verdict"] for name, each in told.items()}
    assert verdicts == {"held-out": "gain", "copies": "no gain shown", "wrong": "loss"}
    assert told["held-out"]["sentence"].startswith("A gain is shown: 2 generated images for each")
    assert told["held-out"]["over_control"]["low"] > 0
    assert told["copies"]["over_control"]["low"] <= 0 <= told["copies"]["over_control"]["high"]
    assert "0 show a gain and 1 a loss" in told["wrong"]["sentence"]
    rows = found["arms"]
    assert [row["kind"] for row in rows[:3]] == ["real", "augmented", "oversampled"]
    assert len(rows) == 3 + 3 * 2 and all(len(row["steps"]) == 3 for row in rows)


def test_study_goes_on_where_it_stopped_and_trains_anew_what_has_changed(
    digits: Dataset, tmp_path: Path
) -> None:
    words = ["study.classifier=small", "study.ratios=[1]", "study.real_fractions=[1.0]"]
    words += ["study.num_steps=4", "study.num_seeds=1", "study.num_bootstraps=100"]
    train, validation = split_real(digits, CLASSES, load_study_config(words))
    few = train.subset(shuffled(len(train))[:60])
    hospitals = torch.arange(len(digits.test)) % 2
    material = Material(CLASSES, few, validation, digits.test, {"gan": train}, hospitals=hospitals)
    first = studied(material, load_study_config(words), tmp_path)
    files = {file: file.stat().st_mtime_ns for file in tmp_path.rglob("*.safetensors")}
    assert len(files) == 5
    assert {"hospital/0", "hospital/1"} <= first["arms"][1]["gains"].keys()
    next(iter(files)).unlink()
    assert studied(material, load_study_config(words), tmp_path) == first
    kept = [file for file, at in files.items() if file.stat().st_mtime_ns == at]
    assert len(kept) == 4
    other = load_study_config([*words, "study.batch_size=32"])
    assert studied(material, other, tmp_path) != first
    assert not [file for file, at in files.items() if file.stat().st_mtime_ns == at]


def test_split_that_shares_patients_is_refused(digits: Dataset) -> None:
    groups = torch.arange(len(digits.train)) // 2
    train = ImageSet(digits.train.images, digits.train.labels, groups)
    test = ImageSet(digits.test.images, digits.test.labels, torch.arange(len(digits.test)) + 600)
    study = load_study_config()
    shared = int(torch.isin(test.groups, groups).sum())
    with pytest.raises(ValueError, match=f"no patient .* got '{shared} patients on both"):
        split_real(Dataset(train, test), CLASSES, study)
    assert test.groups is not None
    apart = ImageSet(test.images, test.labels, test.groups + len(digits.train))
    kept, chosen = split_real(Dataset(train, apart), CLASSES, study)
    assert kept.groups is not None and chosen.groups is not None
    assert not torch.isin(kept.groups, chosen.groups).any()
    assert len(chosen) == pytest.approx(0.2 * len(train), rel=0.1)


def test_copies_are_left_out_and_images_like_real_ones_stay(digits: Dataset) -> None:
    half = len(digits.test) // 2
    others = digits.test.subset(torch.arange(half))
    dataset = Dataset(digits.train, digits.test.subset(torch.arange(half, len(digits.test))))
    copies = digits.train.subset(torch.arange(50))
    both = ImageSet(
        torch.cat([copies.images, others.images]), torch.cat([copies.labels, others.labels])
    )
    kept = without_copies(both, dataset, 0.02, mirrors=False)
    assert half * 0.9 <= len(kept) <= half
    mirrored = ImageSet(copies.images.flip(-1), copies.labels)
    assert len(without_copies(mirrored, dataset, 0.02, mirrors=True)) == 0
    assert without_copies(both, dataset, 0, mirrors=False) is both
    assert count_nearly_equal(digits.train, copies) == 50
    assert count_nearly_equal(digits.train, others) == 0


def test_augmentation_keeps_range_and_mirrors_only_where_it_may() -> None:
    images = torch.zeros(64, 1, 16, 16)
    images[..., :4] = 1.0  # bright at the left
    for mirrors in (False, True):
        changed = augmented(torch.Generator().manual_seed(0), mirrors=mirrors)(images)
        assert changed.shape == images.shape and changed.abs().max() <= 1
        right = (changed[..., 12:].mean((1, 2, 3)) > changed[..., :4].mean((1, 2, 3))).sum()
        assert 20 <= right <= 44 if mirrors else right == 0
    assert not torch.equal(changed[0], changed[1])
