"""Where generated images lie between real images and noise, which no noise can pass."""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from task.checks import require
from task.evaluation.distances import energy_distance
from task.evaluation.halves import halve
from task.generation.batches import to_uint8
from task.randomness import Stream, torch_generator

# Pairs are compared; more images than this would change the last digits alone.
MOST_COMPARED = 500
MOST_IN_A_HALF = MOST_COMPARED // 2
# Power below this, of values in [0, 1], is rounding to bytes.
LEAST_POWER = 1e-4


class Position(NamedTuple):
    """How far images are from real ones, as a share of how far noise is.

    Attributes:
        generated: 0 as near as real images are to each other, 1 as far as noise, without bound.
        real: the same of held-out real images, as many of them where there are so many.
        n_real: their number.
    """

    generated: float
    real: float
    n_real: int


def noise_position(
    generated: Tensor,
    train: Tensor,
    held_out: Tensor,
    *,
    seed: int,
    device: str | torch.device,
    groups: Tensor | None = None,
) -> Position:
    """Say where generated images lie between real ones and noise, by what any image has.

    The energy distance to the training images is taken in pixels and in the logarithm of the
    power at each spatial frequency, each over that of noise to the training images; the root of
    the larger counts. No network looks: one that has seen real images alone may take noise for
    anything. Noise is what sampling starts from, N(0, 1), cut off to the range of images.

    Args:
        generated: [N, C, H, W] uint8, N >= 2.
        train: [M, C, H, W] uint8, M >= 2. Without held-out images one half of them, drawn at
            random, stands in for these and is measured against the other.
        held_out: [K, C, H, W] uint8; fewer than 2 are none.
        seed: of the noise and of the choice where there are more than `MOST_COMPARED` images.
        device: that computes.
        groups: [M] int64, equal for the training images of one patient, who is in one half alone.

    Raises:
        ValueError: there are too few images, or they should be halved and are of one patient.
    """
    needed = 2 if len(held_out) >= 2 else 4
    require(len(train) >= needed, "the training images", f"at least {needed}", len(train))

    def shuffled(images: Tensor, purpose: int) -> Tensor:
        generator = torch_generator(seed, Stream.METRICS, purpose)
        return torch.randperm(len(images), generator=generator)

    order, stand_ins = shuffled(train, 10), held_out
    if len(held_out) < 2:
        first, second = halve(order, groups)
        stand_ins, order = train[first[:MOST_IN_A_HALF]], second[:MOST_IN_A_HALF]
    reference = train[order[:MOST_COMPARED]]
    generated = generated[shuffled(generated, 11)[:MOST_COMPARED]]
    stand_ins = stand_ins[shuffled(stand_ins, 12)[: len(generated)]]
    noise = starting_noise(len(generated), generated.shape[1:], seed)
    shares = []
    for look in (_pixels, _spectra):
        real = look(reference.to(device))
        ours, theirs, noises = (
            energy_distance(look(images.to(device)), real)
            for images in (generated, stand_ins, noise)
        )
        shares.append((ours / noises, theirs / noises))
    ours, theirs = (math.sqrt(max(0.0, *share)) for share in zip(*shares, strict=True))
    return Position(ours, theirs, len(stand_ins))


def starting_noise(number: int, shape: Sequence[int], seed: int) -> Tensor:
    """Return what sampling starts from as images, [number, *shape] uint8."""
    generator = torch_generator(seed, Stream.METRICS, 13)
    return to_uint8(torch.randn(number, *shape, generator=generator))


def _pixels(images: Tensor) -> Tensor:
    return images.flatten(1).double() / 255


def _spectra(images: Tensor) -> Tensor:
    """Return the logarithm of the mean power at each spatial frequency, [N, C * (size // 2 + 1)].

    Real images have less of the higher ones, blurred ones nearly none, noise as much of each.
    """
    power = torch.fft.rfft2(images.double() / 255, norm="ortho").abs().square()
    height, width = images.shape[-2:]
    down = torch.fft.fftfreq(height, 1 / height, device=images.device)
    across = torch.fft.rfftfreq(width, 1 / width, device=images.device)
    rings = torch.hypot(down[:, None], across).round().long().clamp(max=height // 2).flatten()
    sums = power.new_zeros(*images.shape[:2], height // 2 + 1)
    sums.index_add_(2, rings, power.flatten(2))
    spectrum: Tensor = (sums / rings.bincount() + LEAST_POWER).log()
    return spectrum.flatten(1)
