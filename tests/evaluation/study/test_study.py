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
    Hospitals,
    Material,
    Study,
    count_nearly_equal,
    split_test,
    without_copies,
)
from task.evaluation.study.summary import summarize, verdict_of
from task.runs.checkpoint import load_weights
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


@pytest.mark.slow
def test_real_images_gain_copies_do_not_and_wrong_labels_lose(
    digits: Dataset, tmp_path: Path
) -> None:
    study = load_study_config(
        [
            *("study.classifier=small", "study.ratios=[5]", "study.real_fractions=[1.0]"),
            *("study.num_steps=100", "study.num_bootstraps=2000"),
        ]
    )
    chosen, measured = split_test(digits, CLASSES, study)
    train, order = digits.train, shuffled(len(digits.train))
    own, held = train.subset(order[:40]), train.subset(order[40:])
    sources = {
        "held-out": held,
        "copies": own.subset(torch.arange(40).repeat(5)),
        "wrong": ImageSet(held.images, held.labels[shuffled(len(held), 1)]),
    }
    real = digits.test.subset(chosen), digits.test.subset(measured)
    told = {
        # The classifiers of real images alone are trained once.
        name: studied(Material(CLASSES, own, *real, {name: images}), study, tmp_path)
        for name, images in sources.items()
    }
    headlines = {name: found["headlines"][0] for name, found in told.items()}
    verdicts = {name: each["verdict"] for name, each in headlines.items()}
    assert verdicts == {"held-out": "gain", "copies": "no gain shown", "wrong": "loss"}
    assert headlines["held-out"]["sentence"].startswith("A gain is shown: 5 generated images for")
    assert "0 show a gain and 1 a loss" in headlines["wrong"]["sentence"]
    rows = told["copies"]["arms"]
    kinds = ["real", "augmented", "oversampled", "synthetic", "both"]
    assert [row["kind"] for row in rows] == kinds
    assert all(len(row["steps"]) == 5 for row in rows) and rows[4]["num_synthetic"] == [200] * 5

    found = studied(Material(CLASSES, own, *real, sources), study, tmp_path)
    between = {(e["first"], e["second"]): e["macro_auc"]["low"] for e in found["between"]}
    assert between["held-out", "copies"] > 0 and between["held-out", "wrong"] > 0
    assert len([*tmp_path.rglob("*.safetensors")]) == 5 * (3 + 3 * 2)


@pytest.mark.slow
def test_copies_that_even_out_the_classes_are_no_gain_over_oversampling(
    digits: Dataset, tmp_path: Path
) -> None:
    """Beside real images alone they are one, where nothing else evens the classes out."""
    study = load_study_config(
        [
            *("study.classifier=small", "study.ratios=[2]", "study.real_fractions=[1.0]"),
            *("study.num_steps=100", "study.num_seeds=2", "study.balance=none", "study.fill=rare"),
        ]
    )
    chosen, measured = split_test(digits, CLASSES, study)
    rare = [4 if label % 2 else 60 for label in range(10)]
    places = [(digits.train.labels == label).nonzero()[:n, 0] for label, n in enumerate(rare)]
    own = digits.train.subset(torch.cat(places))
    real = digits.test.subset(chosen), digits.test.subset(measured)
    copies = own.subset(torch.arange(len(own)).repeat(40))
    found = studied(Material(CLASSES, own, *real, {"copies": copies}), study, tmp_path)
    (row,) = [row for row in found["arms"] if row["kind"] == "both"]
    assert row["gains"]["balanced_accuracy"]["value"] > 0.02
    assert row["verdict"] == "no gain shown"


def test_study_goes_on_where_it_stopped_and_trains_anew_what_has_changed(
    digits: Dataset, tmp_path: Path
) -> None:
    words = ["study.classifier=small", "study.ratios=[1]", "study.real_fractions=[1.0]"]
    words += ["study.num_steps=4", "study.num_seeds=1", "study.num_bootstraps=200"]
    chosen, measured = split_test(digits, CLASSES, load_study_config(words))
    train, validation = digits.train, digits.test.subset(chosen)
    test = digits.test.subset(measured)
    few = train.subset(shuffled(len(train))[:60])
    # Hospital 2 has no test images.
    hospitals = Hospitals(
        torch.arange(len(few)) % 3, torch.zeros(len(validation)), torch.arange(len(test)) % 2
    )
    material = Material(CLASSES, few, validation, test, {"gan": train}, hospitals=hospitals)
    first = studied(material, load_study_config(words), tmp_path)
    files = {file: file.stat().st_mtime_ns for file in tmp_path.rglob("*.safetensors")}
    assert len(files) == 5 + 2 * 2
    assert {"hospital/0", "hospital/1"} <= first["arms"][1]["gains"].keys()
    assert [each["hospital"] for each in first["at_hospitals"]] == [0, 1]
    assert first["at_hospitals"][0]["num_train"] == 20
    # Hospital 1 has no validation images, so that the last weights are kept.
    own = (tmp_path / "fits").glob("own-0-of-1-at-*.safetensors")
    assert {load_weights(file)[1]["step"] for file in own if "at-1" in file.name} == {"4"}
    next(iter(files)).unlink()
    assert studied(material, load_study_config(words), tmp_path) == first
    kept = [file for file, at in files.items() if file.stat().st_mtime_ns == at]
    assert len(kept) == 8
    other = load_study_config([*words, "study.batch_size=32"])
    assert studied(material, other, tmp_path) != first
    assert len([*tmp_path.rglob("*.safetensors")]) == 18  # each beside the earlier one


def test_generator_whose_images_are_all_left_out_is_one_without_images(
    digits: Dataset, tmp_path: Path
) -> None:
    words = ["study.classifier=small", "study.ratios=[1]", "study.real_fractions=[1.0]"]
    words += ["study.num_steps=4", "study.num_seeds=1", "study.num_bootstraps=200"]
    chosen, measured = split_test(digits, CLASSES, load_study_config(words))
    real = digits.test.subset(chosen), digits.test.subset(measured)
    few, none = (digits.train.subset(torch.arange(number)) for number in (60, 0))
    material = Material(CLASSES, few, *real, {"copier": none})
    found = studied(material, load_study_config(words), tmp_path)
    kinds = {row["kind"]: row["num_synthetic"] for row in found["arms"]}
    assert "synthetic" not in kinds and kinds["both"] == [0]
    assert found["headlines"][0]["verdict"] == "no gain shown"


@pytest.mark.parametrize(
    ("over_real", "over_control", "expected"),
    [(1, 1, 1), (1, 0, 0), (1, -1, 0), (0, 1, 0), (0, -1, 0), (-1, 1, -1), (-1, -1, -1)],
)
def test_gain_must_be_over_both_and_a_loss_is_over_real_images(
    over_real: int, over_control: int, expected: int
) -> None:
    assert verdict_of([over_real, over_control]) == expected
    assert verdict_of([over_real]) == over_real


def test_hospital_of_few_patients_has_no_interval(digits: Dataset, tmp_path: Path) -> None:
    words = ["study.classifier=small", "study.ratios=[1]", "study.real_fractions=[1.0]"]
    words += ["study.num_steps=4", "study.num_seeds=1", "study.num_bootstraps=200"]
    chosen, measured = split_test(digits, CLASSES, load_study_config(words))
    validation, test = digits.test.subset(chosen), digits.test.subset(measured)
    few = digits.train.subset(torch.arange(60))
    of_test = (torch.arange(len(test)) >= 9).long()
    hospitals = Hospitals(torch.arange(60) % 2, torch.zeros(len(validation)), of_test)
    material = Material(CLASSES, few, validation, test, {"gan": digits.train}, hospitals)
    found = studied(material, load_study_config(words), tmp_path)
    small, large = found["at_hospitals"]
    assert small["num_test_patients"] == 9 and large["num_test_patients"] == len(test) - 9
    assert not any("gain_over_own" in each for each in small["classifiers"])
    assert all("gain_over_own" in each for each in large["classifiers"][1:])
    assert "hospital/0" not in found["arms"][1]["gains"]


def test_test_images_of_one_class_are_refused(digits: Dataset) -> None:
    ones = digits.test.subset((digits.test.labels == 1).nonzero().flatten())
    with pytest.raises(ValueError, match=r"to measure on must be of two classes at least"):
        split_test(Dataset(digits.train, ones), CLASSES, load_study_config())


def test_split_that_shares_patients_is_refused(digits: Dataset) -> None:
    groups = torch.arange(len(digits.train)) // 2
    train = ImageSet(digits.train.images, digits.train.labels, groups)
    test = ImageSet(digits.test.images, digits.test.labels, torch.arange(len(digits.test)) + 600)
    study = load_study_config()
    shared = int(torch.isin(test.groups, groups).sum())
    with pytest.raises(ValueError, match=f"no patient .* got '{shared} patients on both"):
        split_test(Dataset(train, test), CLASSES, study)
    assert test.groups is not None
    apart = ImageSet(test.images, test.labels, test.groups // 2 + len(digits.train))
    chosen, measured = (
        apart.subset(places) for places in split_test(Dataset(train, apart), CLASSES, study)
    )
    assert chosen.groups is not None and measured.groups is not None
    assert not torch.isin(chosen.groups, measured.groups).any()
    assert len(chosen) == pytest.approx(0.3 * len(test), rel=0.1)
    assert len(chosen) + len(measured) == len(test)


def test_copies_are_left_out_and_images_like_real_ones_stay(digits: Dataset) -> None:
    train, half = digits.train, len(digits.test) // 2
    others = digits.test.subset(torch.arange(half))
    validation = digits.test.subset(torch.arange(half, len(digits.test)))
    copies = train.subset(torch.arange(50))
    both = ImageSet(
        torch.cat([copies.images, others.images]), torch.cat([copies.labels, others.labels])
    )
    kept = without_copies(both, train, validation, 0.02, mirrors=False)
    assert half * 0.9 <= len(kept) <= half
    # Even where a part of the validation images are training images.
    spoiled = ImageSet(
        torch.cat([copies.images, validation.images]),
        torch.cat([copies.labels, validation.labels]),
    )
    assert len(without_copies(both, train, spoiled, 0.02, mirrors=False)) == len(kept)
    mirrored = ImageSet(copies.images.flip(-1), copies.labels)
    assert len(without_copies(mirrored, train, validation, 0.02, mirrors=True)) == 0
    assert without_copies(both, train, validation, 0, mirrors=False) is both
    assert count_nearly_equal(mirrored, train, mirrors=True) == 50
    assert count_nearly_equal(others, train, mirrors=False) == 0


def test_augmentation_keeps_range_and_mirrors_only_where_it_may() -> None:
    images = torch.zeros(64, 1, 16, 16)
    images[..., :4] = 1.0  # bright at the left
    for mirrors in (False, True):
        changed = augmented(torch.Generator().manual_seed(0), mirrors=mirrors)(images)
        assert changed.shape == images.shape and changed.abs().max() <= 1
        right = (changed[..., 12:].mean((1, 2, 3)) > changed[..., :4].mean((1, 2, 3))).sum()
        assert 20 <= right <= 44 if mirrors else right == 0
    assert not torch.equal(changed[0], changed[1])
