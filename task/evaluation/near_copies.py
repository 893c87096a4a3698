"""Whether generated images lie nearer to training images than images that were held out."""

import math
from bisect import bisect_left
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.special import xlogy
from torch import Tensor, nn

from task.evaluation.distances import Nearest, neighbor_distances
from task.evaluation.features import Features
from task.progress import progress

# Of the images nearest to training images, as many are looked at; see `copying_test`.
DEEPEST = 1000
# Sums of logarithms that are equal may differ by so much.
ROUNDING = 1e-9
# A sum of probabilities tells none below.
LEAST_P_VALUE = 1e-15


class Copying(NamedTuple):
    """How near generated images come to training images, beside held-out real images.

    Attributes:
        generated: median distance of a generated image to its nearest training image.
        held_out: the same of real images that were not trained on.
        copied: share of the generated images that lie near a training image beyond the share of
            held-out ones that do, in [0, 1]; see `copying_test`.
        p_value: that held-out images come out at least so unlike the generated ones where nothing
            is copied.
    """

    generated: float
    held_out: float
    copied: float
    p_value: float

    @classmethod
    def of(cls, generated: Nearest, held_out: Nearest) -> "Copying":
        """Compare what is known of the nearest training images."""
        p_value, copied = copying_test(generated.ratio, held_out.ratio)
        near, real = (each.distance.median().item() for each in (generated, held_out))
        return cls(near, real, copied, p_value)


def copying_test(generated: Tensor, held_out: Tensor) -> tuple[float, float]:
    """Test whether more generated images than held-out ones lie near a training image.

    Both sets are put in one order, the nearest first. Without copies each order is as likely as
    any other. For each number of nearest images the share of generated ones among them is held
    against their share of all by the likelihood ratio of two binomials; the largest of these is
    compared with its exact distribution over all orders. So the p value is right for any numbers
    and any distribution of distances; with few held-out images only many copies show.

    Args:
        generated: [N], how near each generated image is, small for copies.
        held_out: [M], the same of real images that were not trained on.

    Returns:
        The p value, and by how much the share of the generated images among the nearest exceeds
        that of the held-out ones, where the evidence is greatest; for the share all numbers of
        nearest images count, for the p value up to `DEEPEST` and half of all.

    Source: Berk & Jones 1979 (the statistic), for two samples.
    """
    n, m = len(generated), len(held_out)
    nearness = torch.cat([held_out, generated]).numpy()
    is_generated = (np.arange(n + m) >= m).astype(np.int64)
    # Of equal distances those of held-out images come first, which is on the safe side.
    among = np.cumsum(is_generated[np.argsort(nearness, kind="stable")])
    depths = np.arange(1, n + m + 1)
    evidence = _evidence(among, depths, n / (n + m))
    deepest = min(DEEPEST, (n + m) // 2)
    most = evidence[:deepest].max()
    if most <= 0:
        return 1.0, 0.0
    # chances[k]: of k generated images among the nearest, with less evidence at each depth so far.
    chances = np.zeros(deepest + 1)
    chances[0] = 1.0
    counts = np.arange(deepest + 1)
    tested = depths[:deepest, None]
    reached = _evidence(counts, tested, n / (n + m)) >= most - ROUNDING
    taken = np.clip((n - counts) / (n + m - tested + 1), 0, 1)
    for take, out in zip(taken, reached, strict=True):
        moved = chances * take
        chances = chances - moved
        chances[1:] += moved[:-1]
        chances[out] = 0.0
    at = int(evidence.argmax())
    share = among[at] / n - (depths[at] - among[at]) / m
    return float(np.clip(1 - chances.sum(), LEAST_P_VALUE, 1)), float(share)


def least_share_shown(generated: int, held_out: int, p_value: float) -> float | None:
    """Return the smallest share of copies for which `copying_test` falls below a p value.

    The other generated images are as near to training images as the held-out ones.

    Args:
        generated: their number, with the copies.
        held_out: their number.
        p_value: to be reached.

    Returns:
        The share, or None where not even copies alone would show.
    """
    real = torch.arange(1, held_out + 1, dtype=torch.float64) / (held_out + 1)

    def shows(copies: int) -> bool:
        others = torch.arange(1, generated - copies + 1, dtype=torch.float64)
        nearness = torch.cat([torch.zeros(copies), others / (generated - copies + 1)])
        return copying_test(nearness, real)[0] < p_value

    least = bisect_left(range(generated + 1), True, key=shows)
    return least / generated if least <= generated else None


def _evidence(
    among: NDArray[np.int64], depth: NDArray[np.int64], share: float
) -> NDArray[np.float64]:
    """Return the log likelihood ratio of a larger share than `share`; 0 where it is smaller."""
    found = np.minimum(among / depth, 1)
    ratio = xlogy(found, found / share) + xlogy(1 - found, (1 - found) / (1 - share))
    return np.where(found > share, depth * ratio, 0.0)


@dataclass(frozen=True, eq=False)
class TrainingImages:
    """Training images, among which the nearest one is searched for.

    Attributes:
        images: [M, C, H, W] uint8, or their features, [M, D] float32; on the device that computes.
        horizontal_flip: whether images count mirrored as well.
        most_shifted: pixels by which other images may be shifted, in each direction, to come
            nearer; edges are repeated.
    """

    images: Tensor
    horizontal_flip: bool = False
    most_shifted: int = 0

    @cached_property
    def _points(self) -> Tensor:
        images = self.images
        return (torch.cat([images, images.flip(-1)]) if self.horizontal_flip else images).flatten(1)

    @property
    def _unit(self) -> float:
        """The distance that counts as 1; images differ by the root mean square in [0, 1]."""
        in_pixels = self.images.ndim == 4
        return 255 * math.sqrt(self.images[0].numel()) if in_pixels else 1.0

    def nearest(self, images: Tensor, *, own: Tensor | None = None) -> Nearest:
        """Find the nearest training image of each image, at the shift at which it comes nearest.

        Args:
            images: [N, C, H, W] uint8, or [N, D] features.
            own: see `neighbor_distances`; of mirrored images M is added.

        Returns:
            Distances of features, or root mean square differences of pixels in [0, 1].
        """
        images = images.to(self.images.device)
        found = [
            neighbor_distances(each.flatten(1), self._points, own=own)
            for each in shifted(images, self.most_shifted)
        ]
        distance, ratio, place = (torch.stack(each) for each in zip(*found, strict=True))
        best = distance.argmin(0, keepdim=True)
        distance, ratio, place = (each.gather(0, best)[0] for each in (distance, ratio, place))
        return Nearest(distance / self._unit, ratio, place % len(self.images))

    def nearest_others(self, indices: Tensor) -> Nearest:
        """Find, for training images at `indices`, [N] int64, the nearest other training image.

        Raises:
            ValueError: there is no other.
        """
        own = torch.stack([indices, indices + len(self.images)][: 1 + self.horizontal_flip], 1)
        return self.nearest(self.images[indices.to(self.images.device)], own=own)


def shifted(images: Tensor, most: int) -> Iterator[Tensor]:
    """Yield images, [N, C, H, W], at every shift of up to so many pixels; edges are repeated."""
    yield images
    if most == 0:
        return
    height, width = images.shape[-2:]
    padded = nn.functional.pad(images.float(), (most,) * 4, mode="replicate").to(images.dtype)
    for down in range(2 * most + 1):
        for right in range(2 * most + 1):
            if (down, right) != (most, most):
                yield padded[..., down : down + height, right : right + width]


@progress(1, "searching for copies in features")
def feature_copying(generated: Features, train: Features, held_out: Features) -> Copying:
    """Compare how near images come to the training images, in the features of an extractor."""
    images = TrainingImages(train.features)
    return Copying.of(images.nearest(generated.features), images.nearest(held_out.features))


@progress(1, "searching for copies in pixels")
def pixel_copying(
    generated: Tensor,
    train: Tensor,
    held_out: Tensor,
    *,
    horizontal_flip: bool,
    device: torch.device,
) -> Copying:
    """Compare how near images come to the training images, in pixels.

    Args:
        generated: [N, C, H, W] uint8.
        train: [M, C, H, W] uint8.
        held_out: [K, C, H, W] uint8, that were not trained on.
        horizontal_flip: whether the training images count mirrored as well.
        device: that computes.
    """
    images = TrainingImages(train.to(device), horizontal_flip)
    return Copying.of(images.nearest(generated), images.nearest(held_out))
