"""Distances and shares of two sets of features [N, D], and the score of probabilities [N, C].

They compute in float64 on the device of their arguments, block by block, so that memory does not
grow with the product of two sets. What is random draws from a generator.
"""

import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from task.checks import require

# 64 MiB of float64: bounds what a block of N x M distances takes.
BLOCK_ROWS = 1024
BLOCK_COLUMNS = 8192

# Of an image, among the training images; as many as Carlini et al. take.
NEIGHBOURS = 50


class MeanStd(NamedTuple):
    """A mean and the standard deviation (with n - 1) over splits or subsets, where there is one."""

    mean: float
    std: float | None = None


class Manifold(NamedTuple):
    """How well generated images fill the neighborhoods of real ones; see `density_coverage`."""

    density: float
    coverage: float


class Nearest(NamedTuple):
    """The nearest of the reference images, for each of N queries; on the CPU.

    Attributes:
        distance: [N] float64, to it.
        ratio: [N] float64, that distance over the mean distance to the `NEIGHBOURS` nearest: 0 for
            an exact copy, about 1 for an image that is as near to many, such as a blurred one.
        place: [N] int64, which one it is.
    """

    distance: Tensor
    ratio: Tensor
    place: Tensor


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
        centered = block.double() - mean
        covariance += centered.T @ centered
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


def share_near(queries: Tensor, reference: Tensor, *, k: int = 3) -> float:
    """Return the share of images that lie near those of another set.

    An image is near a set when it lies in the ball around one of its images that reaches to that
    image's k-th nearest neighbor in the set. Of generated images near real ones it is the
    precision, of real images near generated ones the recall.

    Args:
        queries: [N, D].
        reference: [M, D], M > k.
        k: >= 1.

    Raises:
        ValueError: a set has at most k images, or k < 1.

    Source: Kynkaanniemi et al. 2019, equations 1 and 2.
    """
    _check_neighbors(reference, queries, k)
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

    The ball around a real image reaches to its k-th nearest real neighbor, which it leaves out.
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
    _check_neighbors(real, generated, k)
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


def neighbor_distances(queries: Tensor, reference: Tensor, *, own: Tensor | None = None) -> Nearest:
    """Find the nearest reference of each query, and how near it is beside the next ones.

    Args:
        queries: [N, D], any dtype.
        reference: [M, D], M > K; with fewer than `NEIGHBOURS` the mean is over all.
        own: [N, K] int64, references that do not count for each query, because they are the query
            itself; None: all count.

    Raises:
        ValueError: a set is empty, D differs, or no reference is left that counts.

    Source: Carlini et al. 2023 (arXiv 2301.13188), section 5.1.
    """
    _check_features(queries, reference, at_least=1)
    left = len(reference) - (0 if own is None else own.shape[1])
    require(left >= 1, "reference", "of one image at least beside the query itself", len(reference))
    number = min(NEIGHBOURS, left)
    found = []
    for start, rows in zip(range(0, len(queries), BLOCK_ROWS), _rows(queries), strict=True):
        best = torch.full((len(rows), number), math.inf, dtype=torch.float64, device=rows.device)
        where = torch.zeros(len(rows), dtype=torch.int64, device=rows.device)
        left_out = None if own is None else own[start : start + len(rows)].to(rows.device)
        for columns, distances in _squared_distances(rows, reference):
            if left_out is not None:
                row, place = ((left_out >= columns.start) & (left_out < columns.stop)).nonzero().T
                distances[row, left_out[row, place] - columns.start] = math.inf
            value, index = distances.min(1)
            where = torch.where(value < best[:, 0], index + columns.start, where)
            best = torch.cat([best, distances], 1).topk(number, largest=False, sorted=True).values
        # A difference of squares is off by rounding; the difference itself is not.
        nearest = (rows.double() - reference[where].double()).norm(dim=1)
        mean = (nearest + best[:, 1:].sqrt().sum(1)) / number
        ratio = nearest / mean.clamp(min=torch.finfo(mean.dtype).tiny)
        found.append((nearest.cpu(), ratio.cpu(), where.cpu()))
    return Nearest(*map(torch.cat, zip(*found, strict=True)))


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


def _check_neighbors(real: Tensor, generated: Tensor, k: int) -> None:
    require(k >= 1, "k", ">= 1", k)
    _check_features(real, generated, at_least=k + 1)
