import numpy as np
import pytest
import torch

from task.config.study_config import load_study_config
from task.data import ImageSet
from task.evaluation.study.arms import (
    ArmKind,
    list_arms,
    places_of_classes,
    real_places,
    synthetic_counts,
)


def test_arms_of_each_fraction_begin_with_real_images_alone() -> None:
    study = load_study_config(["study.ratios=[0.5,2]", "study.real_fractions=[1.0,0.1]"])
    arms = [*list_arms(study, ["vae", "gan"])]
    assert len(arms) == 2 * (3 + 2 * 3) == len({(arm.source, arm.key) for arm in arms})
    kinds = [arm.kind for arm in arms if arm.fraction == 0.1 and arm.source in ("", "vae")]
    assert kinds == [
        ArmKind.REAL,
        ArmKind.AUGMENTED,
        ArmKind.OVERSAMPLED,
        ArmKind.SYNTHETIC,
        *[ArmKind.BOTH] * 2,
    ]


@pytest.mark.parametrize(
    ("ratio", "fill", "expected"),
    [
        (0.5, "all", [30, 15, 5]),
        (0.25, "rare", [0, 2, 23]),
        (1, "rare", [7, 37, 56]),
        (5, "rare", [140, 170, 190]),
    ],
)
def test_generated_images_are_dealt_to_classes(
    ratio: float, fill: str, expected: list[int]
) -> None:
    found = synthetic_counts([60, 30, 10], ratio, fill)
    assert sum(found) == ratio * 100
    np.testing.assert_allclose(found, expected, atol=1)
    if fill == "rare" and ratio >= 1:
        np.testing.assert_allclose(np.add(found, [60, 30, 10]), (1 + ratio) * 100 / 3, atol=1)


def images(labels: list[int], groups: list[int] | None = None) -> ImageSet:
    of_patients = None if groups is None else torch.tensor(groups)
    pixels = torch.zeros(len(labels), 1, 8, 8, dtype=torch.uint8)
    return ImageSet(pixels, torch.tensor(labels), of_patients)


def test_fraction_keeps_patients_whole_and_every_class() -> None:
    rng = np.random.default_rng(0)
    groups = rng.integers(0, 60, 300)
    # A rare class with a patient of its own.
    groups[:4], labels = 60, rng.integers(0, 2, 300)
    labels[:4] = 2
    real = images(labels.tolist(), groups.tolist())
    for seed in range(3):
        places = real_places(real, 0.2, seed).numpy()
        assert set(labels[places]) == {0, 1, 2}
        assert not set(groups[places]) & set(np.delete(groups, places))
        assert 40 <= len(places) <= 80
    assert not np.array_equal(places, real_places(real, 0.2, 0))
    assert real_places(real, 1, 0).tolist() == [*range(300)]


def test_more_images_of_a_class_are_the_fewer_ones_and_others() -> None:
    labels = torch.tensor([1, 0] * 50)

    def drawn(counts: list[int], seed: int = 0) -> set[int]:
        rng = torch.Generator().manual_seed(seed)
        return {*places_of_classes(labels, counts, rng).tolist()}

    few, more = drawn([3, 10]), drawn([30, 20])
    assert len(few) == 13 and few < more
    assert sum(int(labels[place]) == 1 for place in few) == 10
    assert few != drawn([3, 10], seed=1)
    # No image twice, whatever is asked for; a class without any is not there.
    assert drawn([200, 0, 7]) == {place for place in range(100) if labels[place] == 0}
