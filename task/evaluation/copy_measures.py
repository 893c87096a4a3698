"""Figures of how generated images lie to training images, beside held-out images.

They describe; whether there are copies is for `task.evaluation.near_copies.copying_test` to say,
whose rate of false alarms is known.
"""

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.stats import rankdata
from torch import Tensor, nn

from task.evaluation.distances import NEIGHBOURS, Nearest, neighbor_distances
from task.evaluation.near_copies import TrainingImages
from task.randomness import Stream, torch_generator

# Shares of the images, the nearest first, at which the ratio of distances is told.
QUANTILES = (0.01, 0.05, 0.5)
# Generated and held-out images, below which a cell says nothing.
FEWEST_IN_CELL = 20
MOST_CLUSTERS = 10
# Training images, drawn at random, of which cells are made.
MOST_CLUSTERED = 5000
# Pixels of a side.
LARGEST_CLUSTERED = 32


@dataclass(frozen=True)
class Beside:
    """A figure of generated images, and the same of held-out ones.

    Attributes:
        generated: the former.
        held_out: the latter.
    """

    generated: float
    held_out: float


@dataclass(frozen=True)
class CopyMeasures:
    """How generated images lie to training images, beside held-out ones.

    Attributes:
        neighbors: of how many nearest training images the mean of a ratio is.
        ratios: by quantile, the distance to the nearest training image over the mean to the
            nearest ones; about 0 for copies.
        authenticity: see `authenticity`; 0 for copies.
        c_t: see `data_copying`; far below 0 for copies, None where no cell has images enough.
        cells: how many had.
    """

    neighbors: int
    ratios: dict[float, Beside]
    authenticity: Beside
    c_t: float | None
    cells: int


def measure_copies(
    train: TrainingImages, generated: Nearest, held_out: Nearest, *, seed: int
) -> CopyMeasures:
    """Measure how generated images lie to training images in every way that there is.

    Args:
        train: the training images, two at least.
        generated: the training images that are nearest to the generated ones.
        held_out: likewise, of real images that were not trained on.
        seed: of the cells.

    Raises:
        ValueError: there is one training image alone.
    """
    both = generated, held_out
    hit = torch.unique(torch.cat([each.place for each in both]))
    own = torch.zeros(len(train.images), dtype=torch.float64)
    own[hit] = train.nearest_others(hit).distance
    smallest = min(len(each.place) for each in both)
    number = max(1, min(MOST_CLUSTERS, smallest // (2 * FEWEST_IN_CELL), len(train.images)))
    c_t, cells = data_copying(generated, held_out, cells_of(train.images, number, seed))
    return CopyMeasures(
        neighbors=min(NEIGHBOURS, len(train.images) * (1 + train.horizontal_flip)),
        ratios={
            share: Beside(*(float(each.ratio.quantile(share)) for each in both))
            for share in QUANTILES
        },
        authenticity=Beside(*(authenticity(each, own) for each in both)),
        c_t=c_t,
        cells=cells,
    )


def authenticity(found: Nearest, own: Tensor) -> float:
    """Return the share of images that are authentic.

    That is farther from the nearest training image than this one is from the nearest other
    training image.

    Args:
        found: of the images.
        own: [M] float64, of each training image the distance to the nearest other one.

    Source: Alaa et al. 2022 (arXiv 2102.08921), section 4.3.
    """
    return float((found.distance > own[found.place]).double().mean())


def cells_of(images: Tensor, number: int, seed: int) -> NDArray[np.int64]:
    """Put training images into cells, by k-means.

    Args:
        images: [M, ...], M >= `number`.
        number: of cells, >= 1.
        seed: of the cells.

    Returns:
        [M], in [0, number).
    """
    if number == 1:
        return np.zeros(len(images), dtype=np.int64)
    # It takes seconds to import.
    from sklearn.cluster import KMeans  # type: ignore[import-untyped]

    points = _thumbnails(images).flatten(1)
    order = torch.randperm(len(points), generator=torch_generator(seed, Stream.AUDIT, 4))
    chosen = points[order[:MOST_CLUSTERED].to(points.device)].cpu().float()
    clusters = KMeans(number, n_init=1, random_state=seed).fit(chosen.numpy())
    centers = torch.from_numpy(clusters.cluster_centers_).to(points.device)
    return neighbor_distances(points, centers).place.numpy()


def _thumbnails(images: Tensor) -> Tensor:
    """Make large images, [M, C, H, W], smaller, which cells need no detail of."""
    if images.dim() != 4 or max(images.shape[-2:]) <= LARGEST_CLUSTERED:
        return images
    blocks = [
        nn.functional.adaptive_avg_pool2d(block.float(), LARGEST_CLUSTERED)
        for block in torch.split(images, 1024)
    ]
    return torch.cat(blocks)


def data_copying(
    generated: Nearest, held_out: Nearest, cells: NDArray[np.int64]
) -> tuple[float | None, int]:
    """Return C_T, how much nearer generated images lie to training images than held-out ones.

    An image lies in the cell of its nearest training image. In each cell the distances of both
    kinds are compared by the z of the Mann-Whitney test, which is below 0 where generated images
    are nearer. C_T is the mean over the cells, weighted by their numbers of held-out images. About
    0 where nothing is copied, far below it where copies are many, above it where generated images
    are unlike the training images.

    Args:
        generated: the training images nearest to generated images.
        held_out: likewise, of real images that were not trained on.
        cells: [M], of each training image.

    Returns:
        C_T, None where no cell has `FEWEST_IN_CELL` images of each kind; and how many cells have.

    Source: Meehan et al. 2020 (arXiv 2004.05675), section 4.
    """
    sets = [(each.distance.numpy(), cells[each.place.numpy()]) for each in (generated, held_out)]
    scores, weights = [], []
    for cell in np.unique(cells):
        near, real = (distances[of == cell] for distances, of in sets)
        n, m = len(near), len(real)
        if min(n, m) < FEWEST_IN_CELL:
            continue
        wins = rankdata(np.concatenate([near, real]))[:n].sum() - n * (n + 1) / 2
        scores.append((wins - n * m / 2) / np.sqrt(n * m * (n + m + 1) / 12))
        weights.append(m)
    return (float(np.average(scores, weights=weights)) if scores else None), len(scores)
