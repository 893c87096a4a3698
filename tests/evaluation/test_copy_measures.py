"""Generators whose answers are known, from one that copies alone to one that draws noise."""

import numpy as np
import pytest
import torch
from scipy.stats import mannwhitneyu
from sklearn.datasets import load_digits
from torch import Tensor

from task.evaluation.copy_measures import (
    CopyMeasures,
    authenticity,
    cells_of,
    data_copying,
    measure_copies,
)
from task.evaluation.distances import Nearest
from task.evaluation.near_copies import Copying, TrainingImages

HELD_OUT = 300


@pytest.fixture(scope="module")
def digits() -> dict[str, Tensor]:
    """Deal real digits out at random: to train on, held out, and as if they were drawn."""
    images = torch.from_numpy(load_digits().images / 16 * 255).round().byte()[:, None]
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
    parts = torch.split(images[order], [1000, HELD_OUT, len(images) - 1000 - HELD_OUT])
    return dict(zip(("train", "held_out", "honest"), parts, strict=True))


def looked_for(digits: dict[str, Tensor], drawn: Tensor) -> tuple[Copying, CopyMeasures]:
    train = TrainingImages(digits["train"])
    near, real = train.nearest(drawn), train.nearest(digits["held_out"])
    return Copying.of(near, real), measure_copies(train, near, real, seed=0)


def test_training_images_themselves_are_at_the_end_of_every_scale(
    digits: dict[str, Tensor],
) -> None:
    found, measures = looked_for(digits, digits["train"][:HELD_OUT])
    assert found.copied == 1 and found.p_value < 1e-10 and found.generated == 0
    assert all(both.generated == 0 < both.held_out for both in measures.ratios.values())
    assert measures.authenticity.generated == 0 < 0.4 < measures.authenticity.held_out
    # The least that it can be with so many of both in the cells.
    assert measures.c_t is not None and measures.c_t < -7 and measures.cells >= 3


def test_images_like_held_out_ones_are_not_detected(digits: dict[str, Tensor]) -> None:
    found, measures = looked_for(digits, digits["honest"])
    assert found.p_value > 0.05
    both = measures.authenticity
    assert both.generated == pytest.approx(both.held_out, abs=0.1)
    assert measures.c_t is not None and abs(measures.c_t) < 1.5
    for ratio in measures.ratios.values():
        assert ratio.generated == pytest.approx(ratio.held_out, abs=0.1)
    assert measures.neighbors == 50


def test_one_copy_in_twenty_is_found_and_counted(digits: dict[str, Tensor]) -> None:
    drawn = digits["honest"].clone()
    number = len(drawn) // 20
    noise = torch.randn(number, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    drawn[:number] = (digits["train"][:number] + 3 * noise).clamp(0, 255).byte()
    found, measures = looked_for(digits, drawn)
    assert found.p_value < 1e-3 and found.copied == pytest.approx(0.05, abs=0.02)
    nearest, _, middle = measures.ratios.values()
    assert nearest.generated < 0.3 * nearest.held_out
    assert middle.generated == pytest.approx(middle.held_out, abs=0.1)


def test_noise_is_authentic_and_no_copy(digits: dict[str, Tensor]) -> None:
    draws = torch.Generator().manual_seed(0)
    found, measures = looked_for(digits, torch.randint(256, (200, 1, 8, 8), generator=draws).byte())
    assert found.p_value == 1 and found.copied == 0
    assert measures.authenticity.generated == 1
    assert measures.c_t is not None and measures.c_t > 5


def test_authenticity_compares_with_the_training_images_own_neighbor() -> None:
    train = torch.tensor([[0.0], [1.0], [5.0]])
    images = TrainingImages(train)
    own = images.nearest_others(torch.arange(3)).distance
    assert own.tolist() == [1, 1, 4]
    # At distances 1/4 of 1, 2 of 1, 3 of 4 and 5 of 4.
    assert authenticity(images.nearest(torch.tensor([[0.25], [-2], [8], [10]])), own) == 0.5


def test_c_t_is_the_weighted_mean_of_mann_whitney_scores() -> None:
    rng = np.random.default_rng(0)
    cells = np.array([0, 1, 2])

    def drawn(numbers: list[int], scale: float) -> Nearest:
        place = torch.from_numpy(np.repeat([0, 1, 2], numbers))
        distance = torch.from_numpy(scale * rng.random(len(place)))
        return Nearest(distance, distance, place)

    near, real = drawn([30, 50, 80], 0.8), drawn([40, 25, 5], 1.0)
    # The third cell has too few held-out images.
    found, number = data_copying(near, real, cells)
    scores = []
    for cell, n, m in ((0, 30, 40), (1, 50, 25)):
        values = (each.distance[each.place == cell].numpy() for each in (near, real))
        wins = mannwhitneyu(*values).statistic
        scores.append((wins - n * m / 2) / np.sqrt(n * m * (n + m + 1) / 12))
    assert number == 2 and found == pytest.approx((40 * scores[0] + 25 * scores[1]) / 65)
    assert data_copying(near, drawn([19, 19, 19], 1.0), cells) == (None, 0)


def test_cells_part_images_that_are_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    images = torch.arange(40.0).div(20, rounding_mode="floor")[:, None] * 100
    images = images + torch.rand(40, 1, generator=torch.Generator().manual_seed(0))
    monkeypatch.setattr("task.evaluation.copy_measures.MOST_CLUSTERED", 10)
    found = cells_of(images, 2, seed=0)
    assert {*found[:20]} | {*found[20:]} == {0, 1} and len({*found[:20]}) == 1
    assert cells_of(images, 1, seed=0).tolist() == [0] * 40


def test_one_training_image_has_no_other() -> None:
    alone = TrainingImages(torch.zeros(1, 1, 8, 8, dtype=torch.uint8))
    near = alone.nearest(torch.ones(3, 1, 8, 8, dtype=torch.uint8))
    with pytest.raises(ValueError, match="one image at least beside the query itself, got 1"):
        measure_copies(alone, near, near, seed=0)
