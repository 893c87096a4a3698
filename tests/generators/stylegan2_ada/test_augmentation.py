"""What is done to images, against changes that torch knows by name."""

import math

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from task.generators.stylegan2_ada.augmentation import (
    SYM6,
    ImageChanges,
    _composed,
    _hue_rotations,
    change_images,
    draw_changes,
    warp,
)


def drawn(number: int, probability: float, *, channels: int = 3, seed: int = 0) -> ImageChanges:
    rng = torch.Generator().manual_seed(seed)
    p = torch.tensor(probability)
    return draw_changes(number, channels=channels, image_size=16, probability=p, rng=rng)


def smooth(number: int = 2, channels: int = 3, size: int = 32) -> Tensor:
    coarse = torch.randn(number, channels, 5, 5, generator=torch.Generator().manual_seed(1))
    return F.interpolate(coarse, size, mode="bicubic", align_corners=True)


def affine(rows: list[list[float]], number: int = 2) -> Tensor:
    return torch.tensor(rows).expand(number, -1, -1)


@pytest.mark.parametrize("channels", [1, 3])
def test_probability_zero_is_the_identity(channels: int) -> None:
    images = torch.randn(8, channels, 16, 16, generator=torch.Generator().manual_seed(0))
    assert torch.equal(change_images(images, drawn(8, 0.0, channels=channels)), images)


@pytest.mark.parametrize("channels", [1, 3])
def test_probability_one_changes_every_image(channels: int) -> None:
    images = smooth(64, channels, 16)
    changed = change_images(images, drawn(64, 1.0, channels=channels))
    assert changed.isfinite().all()
    assert ((changed - images).abs().amax((1, 2, 3)) > 1e-3).all()


def test_changes_happen_as_often_as_they_should() -> None:
    # Five that happen with p, and two that make p together; then five of color.
    p, changes = 0.2, drawn(20_000, 0.2)
    assert changes.moved.float().mean().item() == pytest.approx(1 - (1 - p) ** 7, abs=0.01)
    assert changes.recolored.float().mean().item() == pytest.approx(1 - (1 - p) ** 5, abs=0.01)


def test_a_part_is_changed_as_in_the_whole_batch() -> None:
    images, changes = smooth(8, size=16), drawn(8, 0.5)
    part = slice(3, 6)
    whole = change_images(images, changes)
    torch.testing.assert_close(change_images(images[part], changes[part]), whole[part])


def test_filter_is_orthogonal_to_its_even_shifts() -> None:
    taps = torch.tensor(SYM6, dtype=torch.float64)
    products = [(taps[: 12 - 2 * n] * taps[2 * n :]).sum().item() for n in range(6)]
    assert products == pytest.approx([1, 0, 0, 0, 0, 0], abs=1e-9)
    assert taps.sum().item() == pytest.approx(math.sqrt(2))


def test_warp_by_nothing_gives_the_image_back() -> None:
    images = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    warped = warp(images, affine([[1.0, 0, 0], [0, 1, 0]]))
    torch.testing.assert_close(warped[:, :, 6:-6, 6:-6], images[:, :, 6:-6, 6:-6])


@pytest.mark.parametrize(
    ("rows", "expected"),
    [
        ([[-1.0, 0, 0], [0, 1, 0]], lambda images: images.flip(3)),
        ([[0.0, -1, 0], [1, 0, 0]], lambda images: images.rot90(1, (2, 3))),
        ([[1.0, 0, 3], [0, 1, -2]], lambda images: images.roll((2, -3), (2, 3))),
        # A place in the result, shifted and then mirrored.
        ([[-1.0, 0, -3], [0, 1, 0]], lambda images: images.flip(3).roll(-3, 3)),
    ],
)
def test_warp_agrees_with_flips_turns_and_shifts(rows: list[list[float]], expected) -> None:
    images, inner = smooth(), (..., slice(8, -8), slice(8, -8))
    warped, right = warp(images, affine(rows)), expected(images)
    assert (warped - right)[inner].abs().max() < 0.02 * images.abs().max()
    assert (images - right)[inner].abs().max() > 0.2 * images.abs().max()


def test_warp_passes_gradients_to_images() -> None:
    images = smooth(size=16).requires_grad_()
    warp(images, affine([[0.8, 0.3, 1], [-0.3, 0.8, 0]])).square().sum().backward()
    assert images.grad is not None
    assert (images.grad.abs().sum((1, 2, 3)) > 0).all()


def test_hue_turns_around_gray_and_a_third_of_a_turn_swaps_the_channels() -> None:
    turns = _hue_rotations(torch.tensor([0.4, 2 * math.pi / 3]))
    torch.testing.assert_close(turns @ turns.transpose(1, 2), torch.eye(3).expand(2, 3, 3))
    torch.testing.assert_close(turns @ torch.ones(3), torch.ones(2, 3))
    torch.testing.assert_close(turns[1] @ torch.eye(3)[0], torch.eye(3)[1], atol=1e-6, rtol=0)


def test_colors_change_alike_in_all_pixels() -> None:
    images = torch.full((64, 3, 8, 8), 0.3)
    changed = change_images(images, drawn(64, 0.5))
    spread = changed.amax((2, 3)) - changed.amin((2, 3))
    assert spread.max() < 1e-3
    # Of gray, hue and saturation leave gray.
    assert (changed.amax(1) - changed.amin(1)).max() < 1e-3


def test_composed_changes_follow_each_other() -> None:
    mirror, shift = affine([[-1.0, 0, 0], [0, 1, 0]], 3), affine([[1.0, 0, 2], [0, 1, 0]], 3)
    has_mirror = torch.tensor([True, False, True])
    has_shift = torch.tensor([True, True, False])
    has_any, total = _composed([(has_mirror, mirror), (has_shift, shift)])
    assert has_any.all()
    point = torch.tensor([5.0, 7, 1])
    assert (total @ point).tolist() == [[-3, 7], [7, 7], [-5, 7]]
