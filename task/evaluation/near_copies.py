"""Whether generated images lie nearer to training images than images that were held out."""

import math
from bisect import bisect_left
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.special import xlogy
from torch import Tensor, nn

from task.evaluation.distances import neighbor_distances
from task.evaluation.features import Features
from task.progress import progress

# Of the images nearest to training images, as many are looked at; see `copying_test`.
DEEPEST = 1000
# Sums of logarithms that are equal may differ by so much.
ROUNDING = 1e-9


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
    def of(cls, generated: tuple[Tensor, Tensor], held_out: tuple[Tensor, Tensor]) -> "Copying":
        """Compare distances to the training images; see `neighbor_distances`."""
        p_value, copied = copying_test(generated[1], held_out[1])
        return cls(generated[0].median().item(), held_out[0].median().item(), copied, p_value)


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
        that of the held-out ones, where the evidence is greatest.

    Source: Berk & Jones 1979 (the statistic), for two samples.
    """
    n, m = len(generated), len(held_out)
    nearness = torch.cat([held_out, generated]).numpy()
    is_generated = (np.arange(n + m) >= m).astype(np.int64)
    # Of equal distances those of held-out images come first, which is on the safe side.
    order = np.argsort(nearness, kind="stable")[: min(DEEPEST, (n + m) // 2)]
    among = np.cumsum(is_generated[order])
    depths = np.arange(1, len(order) + 1)
    evidence = _evidence(among, depths, n / (n + m))
    most = evidence.max()
    if most <= 0:
        return 1.0, 0.0
    # chances[k]: of k generated images among the nearest, with less evidence at each depth so far.
    chances = np.zeros(len(order) + 1)
    chances[0] = 1.0
    counts = np.arange(len(order) + 1)
    reached = _evidence(counts, depths[:, None], n / (n + m)) >= most - ROUNDING
    taken = np.clip((n - counts) / (n + m - depths[:, None] + 1), 0, 1)
    for take, out in zip(taken, reached, strict=True):
        moved = chances * take
        chances = chances - moved
        chances[1:] += moved[:-1]
        chances[out] = 0.0
    at = int(evidence.argmax())
    share = among[at] / n - (depths[at] - among[at]) / m
    return float(np.clip(1 - chances.sum(), 0, 1)), float(share)


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


@progress(1, "searching for copies in features")
def feature_copying(generated: Features, train: Features, held_out: Features) -> Copying:
    """Compare how near images come to the training images, in the features of an extractor."""
    return Copying.of(
        neighbor_distances(generated.features, train.features),
        neighbor_distances(held_out.features, train.features),
    )


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


def shifted_distances(images: Tensor, train: Tensor, most: int) -> tuple[Tensor, Tensor]:
    """Return the `neighbor_distances` of images, each at the shift at which it comes nearest."""
    found = [
        neighbor_distances(each.flatten(1), train.flatten(1)) for each in shifted(images, most)
    ]
    nearest, relative = (torch.stack(each) for each in zip(*found, strict=True))
    best = nearest.argmin(0, keepdim=True)
    return nearest.gather(0, best)[0], relative.gather(0, best)[0]


@progress(1, "searching for copies in pixels")
def pixel_copying(
    generated: Tensor,
    train: Tensor,
    held_out: Tensor,
    *,
    horizontal_flip: bool,
    device: torch.device,
    most_shifted: int = 0,
) -> Copying:
    """Compare how near images come to the training images, in pixels.

    Distances are root mean square differences of pixels in [0, 1].

    Args:
        generated: [N, C, H, W] uint8.
        train: [M, C, H, W] uint8.
        held_out: [K, C, H, W] uint8, that were not trained on.
        horizontal_flip: whether the training images count mirrored as well.
        device: that computes.
        most_shifted: pixels by which images may be shifted, in each direction, to come nearer.
    """
    train = train.to(device)
    if horizontal_flip:
        train = torch.cat([train, train.flip(-1)])
    scale = 255 * math.sqrt(train[0].numel())

    def distances(images: Tensor) -> tuple[Tensor, Tensor]:
        nearest, relative = shifted_distances(images.to(device), train, most_shifted)
        return nearest / scale, relative

    return Copying.of(distances(generated), distances(held_out))
