"""How much better one classifier is than another, with intervals over patients and seeds."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from task.checks import require

Floats = NDArray[np.float64]
# How often images are drawn: whole numbers, which float32 multiplies faster.
Counts = NDArray[np.float32]
INTERVAL = 0.95
# Positive images whose pairs with negative ones are in memory at a time.
AT_ONCE = 512


def patient_weights(
    groups: NDArray[np.int64], num_bootstraps: int, rng: np.random.Generator
) -> Counts:
    """Draw patients with replacement; returns how often each image is drawn, [N, B + 1].

    The first column is the images as they are, each once.

    Args:
        groups: [N] equal for the images of a patient.
        num_bootstraps: B.
        rng: of the draws.
    """
    _, members = np.unique(groups, return_inverse=True)
    number = int(members.max()) + 1
    drawn = rng.multinomial(number, np.full(number, 1 / number), size=num_bootstraps)
    whole = np.ones((number, 1), dtype=np.float32)
    return np.concatenate([whole, drawn.T.astype(np.float32)], 1)[members]


def macro_auc(probabilities: Floats, labels: NDArray[np.int64], weights: Counts) -> Floats:
    """Return the mean over classes of the area under the curve of each against the rest, [B].

    Classes of which a draw has no image, or no other, are left out of it; NaN where none is left.

    Args:
        probabilities: [N, C].
        labels: [N].
        weights: [N, B], how often each image is drawn.
    """
    areas = [
        _auc(probabilities[:, label], labels == label, weights)
        for label in range(probabilities.shape[1])
    ]
    return _mean_of_finite(np.stack(areas))


def _auc(scores: Floats, positive: NDArray[np.bool_], weights: Counts) -> Floats:
    """Return the chance that a positive image scores higher than a negative one, ties half."""
    positives, negatives, theirs = weights[positive], weights[~positive], scores[None, ~positive]
    pairs = positives.sum(0, dtype=np.float64) * negatives.sum(0, dtype=np.float64)
    won = np.zeros(weights.shape[1])
    for start in range(0, len(positives), AT_ONCE):
        ours = scores[positive][start : start + AT_ONCE, None]
        lower = (theirs < ours).astype(np.float32) + (theirs == ours) / np.float32(2)
        # Sums of halves, which float32 holds exactly as far as images are counted here.
        some = positives[start : start + AT_ONCE] * (lower @ negatives)
        won += some.sum(0, dtype=np.float64)
    with np.errstate(invalid="ignore", divide="ignore"):
        area: Floats = won / pairs
    return area


def sensitivities(probabilities: Floats, labels: NDArray[np.int64], weights: Counts) -> Floats:
    """Return the share of the images of each class that are found in it, [C, B]; NaN of none."""
    right = (probabilities.argmax(1) == labels).astype(np.float32)
    found = []
    for label in range(probabilities.shape[1]):
        own = weights[labels == label]
        with np.errstate(invalid="ignore", divide="ignore"):
            found.append((right[labels == label] @ own) / own.sum(0, dtype=np.float64))
    return np.stack(found)


def resampled_accuracy(probabilities: Floats, labels: NDArray[np.int64], weights: Counts) -> Floats:
    """Return the mean of `sensitivities` over the classes that there are, [B]."""
    return _mean_of_finite(sensitivities(probabilities, labels, weights))


def _mean_of_finite(values: Floats) -> Floats:
    there = np.isfinite(values)
    with np.errstate(invalid="ignore", divide="ignore"):
        mean: Floats = np.where(there, values, 0).sum(0) / there.sum(0)
    return mean


@dataclass(frozen=True)
class Gain:
    """How much higher a figure is than another.

    Attributes:
        value: the difference on the test images as they are.
        low: of the interval at `INTERVAL`.
        high: likewise.
        p_value: of no difference, two-sided.
    """

    value: float
    low: float
    high: float
    p_value: float


def gain_of(ours: Floats, theirs: Floats, rng: np.random.Generator, *, paired: bool = True) -> Gain:
    """Compare figures of the same draws of patients; see `patient_weights`.

    The uncertainty has two parts, which are added up: which patients are tested, by the draws, and
    which first weights the classifiers had, by Student's t over the seeds, as bootstrapping a few
    of them would understate it. A single seed on both sides leaves the second out.

    Args:
        ours: [S, B + 1] of S seeds, the first column of the images as they are.
        theirs: likewise.
        rng: of the draws of the second part.
        paired: whether both are of the same seeds. Otherwise their spreads are added up, and a
            single one is taken to spread as those on the other side do.

    Raises:
        ValueError: no draw has both.

    Source: percentile intervals, and p values of Davison & Hinkley 1997, section 4.4; Welch 1947
        for what is not paired.
    """
    if paired:
        error, freedom = _error_of_mean(ours[:, 0] - theirs[:, 0])
    else:
        error, freedom = _error_of_difference(ours[:, 0], theirs[:, 0])
    differences = ours.mean(0) - theirs.mean(0)
    drawn = differences[1:]
    if freedom > 0:
        drawn = drawn + error * rng.standard_t(freedom, len(drawn))
    drawn = drawn[np.isfinite(drawn)]
    require(len(drawn) > 0, "the bootstrap", "a draw of patients with a figure", 0)
    tail = (1 - INTERVAL) / 2
    low, high = np.quantile(drawn, [tail, 1 - tail])
    # Half of those that are equal on each side.
    above = ((drawn > 0).sum() + (drawn == 0).sum() / 2 + 1) / (len(drawn) + 2)
    p_value = min(1.0, 2 * float(min(above, 1 - above)))
    return Gain(float(differences[0]), float(low), float(high), p_value)


def _error_of_mean(values: Floats) -> tuple[float, float]:
    """Return the standard error of a mean and its degrees of freedom; 0 of a single value."""
    number = len(values)
    if number == 1:
        return 0.0, 0
    return float(values.std(ddof=1)) / math.sqrt(number), number - 1


def _error_of_difference(ours: Floats, theirs: Floats) -> tuple[float, float]:
    """Return the same of the difference of two means."""
    sides = [_error_of_mean(ours), _error_of_mean(theirs)]
    for place, (_, freedom) in enumerate(sides):
        if freedom == 0:  # one value, whose spread is that of the others
            other = sides[1 - place]
            return math.sqrt(2 + other[1]) * other[0], other[1]
    total = sum(error**2 for error, _ in sides)
    if total == 0:
        return 0.0, sum(freedom for _, freedom in sides)
    return math.sqrt(total), total**2 / sum(error**4 / freedom for error, freedom in sides)


def holm(p_values: Sequence[float]) -> list[float]:
    """Correct the p values of several tests, so that one falls below 5% by chance 5% of the time.

    Source: Holm 1979.
    """
    order = np.argsort(p_values, kind="stable")
    corrected, largest = [0.0] * len(p_values), 0.0
    for rank, place in enumerate(order):
        largest = max(largest, min(1.0, (len(p_values) - rank) * p_values[place]))
        corrected[place] = largest
    return corrected
