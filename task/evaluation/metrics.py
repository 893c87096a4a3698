"""Measures of generated images, as pure functions of features [N, D] or probabilities [N, C].

They compute in float64 on the device of their arguments, block by block, so that memory does not
grow with the product of two sets. What is random draws from a generator.
"""

import math
from bisect import bisect_left
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.special import xlogy
from torch import Tensor

from task.checks import require

# 64 MiB of float64: bounds what a block of N x M distances takes.
BLOCK_ROWS = 1024
BLOCK_COLUMNS = 8192

# Of an image, among the training images.
NEIGHBOURS = 10
# Of the images nearest to training images, as many are looked at; see `copying_test`.
DEEPEST = 1000
# Sums of logarithms that are equal may differ by so much.
ROUNDING = 1e-9


class MeanStd(NamedTuple):
    """A mean and the standard deviation (with n - 1) over splits or subsets."""

    mean: float
    std: float


class Neighbourhood(NamedTuple):
    """Shares of neighbourhoods that hold images of the other set; see `precision_recall`."""

    precision: float
    recall: float


class Manifold(NamedTuple):
    """How well generated images fill the neighbourhoods of real ones; see `density_coverage`."""

    density: float
    coverage: float


class Copying(NamedTuple):
    """How near generated images come to training images, beside held-out real images.

    Attributes:
        generated: median distance of a generated image to its nearest training image.
        held_out: the same of real images that were not trained on.
        copied: share of the generated images that lie near a training image beyond the share of
            held-out ones that do, in [0, 1]; see `copying_test`.
        p_value: that held-out images come out at least so unlike the generated ones where nothing
            is copied; None: not tested, by an older version.
    """

    generated: float
    held_out: float
    copied: float
    p_value: float | None = None


def inception_score(
    probabilities: Tensor, *, splits: int = 10, generator: torch.Generator
) -> MeanStd:
    """Measure how sure and how varied a classifier is about images: exp(mean KL(p(y|x) || p(y))).

    Args:
        probabilities: [N, C], rows sum to 1.
        splits: >= 2 parts of equal size, drawn at random, each with its own p(y).
        generator: on the CPU, orders the images.

    Returns:
        Mean and standard deviation over the splits; the mean is in [1, C].

    Raises:
        ValueError: there are fewer images than splits, or fewer than 2 splits.

    Source: Salimans et al. 2016, section 4; the order and the std are those of torchmetrics.
    """
    require(splits >= 2, "splits", ">= 2", splits)
    number = len(probabilities)
    require(number >= splits, "probabilities", f"of at least {splits} images (splits)", number)
    order = torch.randperm(number, generator=generator).to(probabilities.device)
    scores = []
    for part in torch.tensor_split(probabilities[order].double(), splits):
        marginal = part.mean(0, keepdim=True)
        divergence = (torch.xlogy(part, part) - torch.xlogy(part, marginal)).sum(1)
        scores.append(divergence.mean().exp())
    return _mean_std(torch.stack(scores))


def frechet_distance(first: Tensor, second: Tensor) -> float:
    """Return the Frechet distance between Gaussians fitted to two sets of features.

    It is |m1 - m2|^2 + tr(S1 + S2 - 2 (S1 S2)^(1/2)), with covariances that divide by n - 1. With
    fewer images than features the covariances are singular, and the value is far above that of
    many images: compare equal n only.

    Args:
        first: [N, D], N >= 2.
        second: [M, D], M >= 2.

    Raises:
        ValueError: a set has fewer than 2 images, or the features differ in number.

    Source: Heusel et al. 2017, equation 6.
    """
    _check_features(first, second, at_least=2)
    mean_1, covariance_1 = gaussian(first)
    mean_2, covariance_2 = gaussian(second)
    return gaussian_distance(mean_1, covariance_1, mean_2, covariance_2)


def gaussian(features: Tensor) -> tuple[Tensor, Tensor]:
    """Return mean [D] and covariance [D, D] of features [N, D], in float64."""
    mean = torch.stack([block.double().sum(0) for block in _rows(features)]).sum(0) / len(features)
    covariance = mean.new_zeros(len(mean), len(mean))
    for block in _rows(features):
        centred = block.double() - mean
        covariance += centred.T @ centred
    return mean, covariance / (len(features) - 1)


def gaussian_distance(
    mean_1: Tensor, covariance_1: Tensor, mean_2: Tensor, covariance_2: Tensor
) -> float:
    """Return the Frechet distance of two Gaussians, means [D], covariances [D, D], float64.

    The eigenvalues of S1 S2 are those of the symmetric R1 S2 R1 = (R1 R2) (R1 R2)^T, with
    R = S^(1/2) from eigenvalues of S, so tr (S1 S2)^(1/2) is the sum of the singular values of
    R1 R2. That holds for singular covariances too, where a square root of the unsymmetric product
    is unstable, and does not square rounding errors as eigenvalues of R1 S2 R1 would.
    """
    roots = _root(covariance_1).T @ _root(covariance_2)
    cross = torch.linalg.svdvals(roots).sum()
    distance = (mean_1 - mean_2).square().sum() + covariance_1.trace() + covariance_2.trace()
    return max(0.0, float(distance - 2 * cross))


def _root(covariance: Tensor) -> Tensor:
    """Return R with R R^T = covariance; any such R has the same singular values of R1^T R2."""
    values, vectors = torch.linalg.eigh(covariance)
    root: Tensor = vectors * values.clamp(min=0).sqrt()
    return root


def kid(
    real: Tensor,
    generated: Tensor,
    *,
    subsets: int = 100,
    subset_size: int = 1000,
    generator: torch.Generator,
) -> MeanStd:
    """Return the kernel distance of two sets of features, over random subsets of them.

    Args:
        real: [N, D].
        generated: [M, D].
        subsets: >= 2.
        subset_size: 2 to min(N, M), images of each set in a subset.
        generator: on the CPU, chooses the subsets.

    Raises:
        ValueError: a set has fewer images than a subset, or an option is out of range.

    Source: Binkowski et al. 2018, section 4 and appendix E; see `squared_mmd`.
    """
    require(subsets >= 2, "subsets", ">= 2", subsets)
    require(subset_size >= 2, "subset_size", ">= 2", subset_size)
    _check_features(real, generated, at_least=subset_size)
    values = []
    for _ in range(subsets):
        chosen = []
        for features in (real, generated):
            order = torch.randperm(len(features), generator=generator)[:subset_size]
            chosen.append(features[order.to(features.device)])
        values.append(squared_mmd(*chosen))
    return _mean_std(torch.tensor(values, dtype=torch.float64))


def squared_mmd(first: Tensor, second: Tensor) -> float:
    """Estimate the squared maximum mean discrepancy, without bias, on whole sets.

    The kernel is (x . y / D + 1)^3. The estimate is about 0, and may be below it, for two sets
    of one distribution.

    Args:
        first: [N, D], N >= 2.
        second: [M, D], M >= 2.

    Raises:
        ValueError: a set has fewer than 2 images, or the features differ in number.

    Source: Gretton et al. 2012, equation 3; the kernel of Binkowski et al. 2018.
    """
    _check_features(first, second, at_least=2)
    n, m = len(first), len(second)
    within = [
        (_kernel_sum(features, features) - _kernel(features, None).sum().item())
        / (len(features) * (len(features) - 1))
        for features in (first, second)
    ]
    return sum(within) - 2 * _kernel_sum(first, second) / (n * m)


def _kernel_sum(first: Tensor, second: Tensor) -> float:
    return sum(_kernel(a, b).sum().item() for a in _rows(first) for b in _columns(second))


def _kernel(first: Tensor, second: Tensor | None) -> Tensor:
    """Return the kernel of each pair, or, without a second set, of each image with itself."""
    a = first.double()
    products = a.square().sum(1) if second is None else a @ second.double().T
    return (products / first.shape[1] + 1) ** 3


def precision_recall(real: Tensor, generated: Tensor, *, k: int = 3) -> Neighbourhood:
    """Return the shares of generated images near real ones, and of real ones near generated ones.

    An image is near a set when it lies in the ball around one of its images that reaches to that
    image's k-th nearest neighbour in the set.

    Args:
        real: [N, D], N > k.
        generated: [M, D], M > k.
        k: >= 1.

    Raises:
        ValueError: a set has at most k images, or k < 1.

    Source: Kynkaanniemi et al. 2019, equations 1 and 2.
    """
    _check_neighbours(real, generated, k)
    return Neighbourhood(_share_near(generated, real, k), _share_near(real, generated, k))


def _share_near(queries: Tensor, reference: Tensor, k: int) -> float:
    radii = _squared_radii(reference, k)
    inside = 0
    for rows in _rows(queries):
        near = torch.zeros(len(rows), dtype=torch.bool, device=rows.device)
        for columns, distances in _squared_distances(rows, reference):
            near |= (distances <= radii[columns]).any(1)
        inside += int(near.sum())
    return inside / len(queries)


def density_coverage(real: Tensor, generated: Tensor, *, k: int = 5) -> Manifold:
    """Return how densely generated images fill the balls of real ones, and how many they reach.

    The ball around a real image reaches to its k-th nearest real neighbour, which it leaves out.
    Density is the mean number of balls around a generated image, over k: about 1 for real images,
    more where generated ones crowd in the middle. Coverage is the share of the balls that hold a
    generated image; it depends on N and M.

    Args:
        real: [N, D], N > k.
        generated: [M, D], M > k.
        k: >= 1.

    Raises:
        ValueError: a set has at most k images, or k < 1.

    Source: Naeem et al. 2020, equations 3 and 4, with the strict inequality of their code.
    """
    _check_neighbours(real, generated, k)
    radii = _squared_radii(real, k)
    balls = 0
    covered = torch.zeros(len(real), dtype=torch.bool, device=real.device)
    for rows in _rows(generated):
        for columns, distances in _squared_distances(rows, real):
            inside = distances < radii[columns]
            balls += int(inside.sum())
            covered[columns] |= inside.any(0)
    return Manifold(balls / (k * len(generated)), covered.double().mean().item())


def energy_distance(first: Tensor, second: Tensor) -> float:
    """Estimate the energy distance of two sets, without bias, whatever their numbers.

    It is 2 E|x - y| - E|x - x'| - E|y - y'|, 0 for equal distributions and larger for all others.
    The estimate of two sets of one distribution is about 0, and may be below it.

    Args:
        first: [N, D], N >= 2.
        second: [M, D], M >= 2.

    Raises:
        ValueError: a set has fewer than 2 images, or D differs.

    Source: Szekely & Rizzo 2013, equation 6, with the U-statistics of its terms.
    """
    _check_features(first, second, at_least=2)
    between = _distance_sum(first, second) / (len(first) * len(second))
    within = [_distance_sum(x, x) / (len(x) * (len(x) - 1)) for x in (first, second)]
    return 2 * between - sum(within)


def _distance_sum(first: Tensor, second: Tensor) -> float:
    return sum(
        float(distances.sqrt_().sum())
        for rows in _rows(first)
        for _, distances in _squared_distances(rows, second)
    )


def nearest_distances(queries: Tensor, reference: Tensor) -> Tensor:
    """Return the Euclidean distance of each query to its nearest reference; 0 for exact copies.

    Args:
        queries: [N, D], any dtype.
        reference: [M, D], M >= 1.

    Returns:
        [N] float64, on the CPU.

    Raises:
        ValueError: a set is empty, or D differs.
    """
    return neighbour_distances(queries, reference)[0]


def neighbour_distances(queries: Tensor, reference: Tensor) -> tuple[Tensor, Tensor]:
    """Return how near the nearest reference of each query is, alone and beside the next ones.

    The second is the distance to the nearest over the mean distance to the `NEIGHBOURS` nearest:
    0 for an exact copy, about 1 for an image that is as near to many, such as a blurred one.

    Args:
        queries: [N, D], any dtype.
        reference: [M, D], M >= 1.

    Returns:
        Two of [N] float64, on the CPU.

    Raises:
        ValueError: a set is empty, or D differs.

    Source: Carlini et al. 2023, section 5.1 (their mean is over 50 neighbours).
    """
    _check_features(queries, reference, at_least=1)
    number = min(NEIGHBOURS, len(reference))
    found, relative = [], []
    for rows in _rows(queries):
        best = torch.full((len(rows), number), math.inf, dtype=torch.float64, device=rows.device)
        where = torch.zeros(len(rows), dtype=torch.int64, device=rows.device)
        for columns, distances in _squared_distances(rows, reference):
            value, index = distances.min(1)
            where = torch.where(value < best[:, 0], index + columns.start, where)
            best = torch.cat([best, distances], 1).topk(number, largest=False, sorted=True).values
        # A difference of squares is off by rounding; the difference itself is not.
        nearest = (rows.double() - reference[where].double()).norm(dim=1)
        mean = (nearest + best[:, 1:].sqrt().sum(1)) / number
        found.append(nearest.cpu())
        relative.append((nearest / mean.clamp(min=torch.finfo(mean.dtype).tiny)).cpu())
    return torch.cat(found), torch.cat(relative)


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


def copying(generated: tuple[Tensor, Tensor], held_out: tuple[Tensor, Tensor]) -> Copying:
    """Compare distances to the training images; see `neighbour_distances`.

    Args:
        generated: of generated images.
        held_out: of real images that were not trained on.
    """
    p_value, copied = copying_test(generated[1], held_out[1])
    return Copying(
        generated=generated[0].median().item(),
        held_out=held_out[0].median().item(),
        copied=copied,
        p_value=p_value,
    )


def _squared_radii(features: Tensor, k: int) -> Tensor:
    """Return the squared distance of each row to its k-th nearest other row, [N] float64."""
    radii = []
    for rows in _rows(features):
        nearest = rows.new_empty((len(rows), 0), dtype=torch.float64)
        for _, distances in _squared_distances(rows, features):
            candidates = torch.cat([nearest, distances], 1)
            # One more than k, because each row is its own nearest.
            nearest = candidates.topk(min(k + 1, candidates.shape[1]), largest=False).values
        radii.append(nearest[:, k])
    return torch.cat(radii)


def _squared_distances(rows: Tensor, reference: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """Yield blocks of squared distances [len(rows), B] with the columns that they belong to."""
    a = rows.double()
    start = 0
    for block in _columns(reference):
        b = block.double()
        squares = a.square().sum(1, keepdim=True) + b.square().sum(1)
        yield slice(start, start + len(b)), (squares - 2 * a @ b.T).clamp_(min=0)
        start += len(b)


def _rows(features: Tensor) -> tuple[Tensor, ...]:
    return torch.split(features, BLOCK_ROWS)


def _columns(features: Tensor) -> tuple[Tensor, ...]:
    return torch.split(features, BLOCK_COLUMNS)


def _mean_std(values: Tensor) -> MeanStd:
    return MeanStd(values.mean().item(), values.std().item())


def _check_features(first: Tensor, second: Tensor, *, at_least: int) -> None:
    for features in (first, second):
        require(features.ndim == 2, "features", "[N, D]", tuple(features.shape))
        require(len(features) >= at_least, "features", f"of >= {at_least} images", len(features))
    require(
        first.shape[1] == second.shape[1],
        "features",
        f"[N, {first.shape[1]}], as those of the other set",
        tuple(second.shape),
    )


def _check_neighbours(real: Tensor, generated: Tensor, k: int) -> None:
    require(k >= 1, "k", ">= 1", k)
    _check_features(real, generated, at_least=k + 1)
