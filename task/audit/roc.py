"""How well scores tell those who were trained on from those who were not, and how sure that is.

Patients, not images, are drawn at random: images of one patient are alike, and count as one draw.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.stats import norm, rankdata

from task.checks import require

ScoreArray = NDArray[np.float64]

# Draws of patients with replacement, of which the standard error of an AUC is taken.
BOOTSTRAP_DRAWS = 400
# Of the interval that is shown, both sides together.
SHOWN_LEVEL = 0.05
# False positive rates at which true positives are counted.
FALSE_POSITIVE_RATES = (0.01, 0.001)
# Patients of each kind below which nothing is said.
FEWEST_PATIENTS = 10


@dataclass(frozen=True)
class Sample:
    """Scores of images, and whose images they are.

    Attributes:
        scores: [N], larger the more an image looks like one that was trained on.
        patients: [N] int64, equal for images of one patient.
    """

    scores: ScoreArray
    patients: NDArray[np.int64]

    def __post_init__(self) -> None:
        """Check both.

        Raises:
            ValueError: they are not as many, or a score is not finite.
        """
        require(self.scores.shape == self.patients.shape, "patients", "one of each score", "others")
        require(bool(np.isfinite(self.scores).all()), "scores", "finite", "one that is not")

    @property
    def num_patients(self) -> int:
        """How many there are."""
        return len(np.unique(self.patients))


@dataclass(frozen=True)
class Separation:
    """How well members are told from others.

    Attributes:
        auc: the chance that a member scores above another one: 0.5 by guessing, 1 without fail.
        low: lower end of its 95 % interval, over patients.
        high: the upper end.
        error: standard error of the AUC, at least that of scores that say nothing.
        p_value: that by chance the AUC comes out so far above 0.5.
        true_positives: by false positive rate, the share of members found; of rates alone that so
            many others can show.
        members: their images.
        others: likewise.
        patients: members and others.
    """

    auc: float
    low: float
    high: float
    error: float
    p_value: float
    true_positives: dict[float, float]
    members: int
    others: int
    patients: tuple[int, int]


def separation(
    members: Sample, others: Sample, *, seed: int, num_draws: int = BOOTSTRAP_DRAWS
) -> Separation | None:
    """Measure how well scores tell members from others; None where there are too few patients.

    The interval and the p value rest on the standard error over draws of patients, at least that
    of scores that say nothing: where all are equal no draw would differ from another.

    Args:
        members: of images that were trained on.
        others: of images of the same kind that were not.
        seed: of the draws.
        num_draws: of patients, >= 2.

    Source: the AUC as a share of pairs: Mann & Whitney 1947; draws of patients: Obuchowski 1997.
    """
    patients = members.num_patients, others.num_patients
    if min(patients) < FEWEST_PATIENTS:
        return None
    auc = _share_of_pairs(members.scores, others.scores)
    rng = np.random.default_rng(seed)
    drawn = [
        _weighted_auc(members, others, _times_drawn(members, rng), _times_drawn(others, rng))
        for _ in range(num_draws)
    ]
    n, m = patients
    without_ties = np.sqrt((n + m + 1) / (12 * n * m))
    tied = 1 - _untied_share(members.scores, others.scores)
    error = max(float(np.std(drawn, ddof=1)), tied * without_ties)
    reach = float(norm.isf(SHOWN_LEVEL / 2)) * error
    # Where nothing is remembered the error is that of ranks, whatever was drawn.
    largest = max(error, float(without_ties))
    p_value = float(norm.sf((auc - 0.5) / largest))
    rates = {
        rate: true_positive_rate(members.scores, others.scores, rate)
        for rate in FALSE_POSITIVE_RATES
        if len(others.scores) * rate >= 1
    }
    return Separation(
        auc=auc,
        low=max(0.0, auc - reach),
        high=min(1.0, auc + reach),
        error=largest,
        p_value=p_value,
        true_positives=rates,
        members=len(members.scores),
        others=len(others.scores),
        patients=patients,
    )


def true_positive_rate(members: ScoreArray, others: ScoreArray, rate: float) -> float:
    """Return the share of members above a threshold that at most a share of the others passes."""
    allowed = int(rate * len(others))
    threshold = np.sort(others)[::-1][allowed]
    return float((members > threshold).mean())


def _share_of_pairs(members: ScoreArray, others: ScoreArray) -> float:
    ranks = rankdata(np.concatenate([members, others]))[: len(members)]
    n, m = len(members), len(others)
    return float((ranks.sum() - n * (n + 1) / 2) / (n * m))


def _times_drawn(sample: Sample, rng: np.random.Generator) -> ScoreArray:
    """Draw patients with replacement; returns how often each image is there."""
    _, whose = np.unique(sample.patients, return_inverse=True)
    number = int(whose.max()) + 1
    times = np.bincount(rng.integers(number, size=number), minlength=number)
    return times[whose].astype(np.float64)


def _weighted_auc(
    members: Sample, others: Sample, w_members: ScoreArray, w_others: ScoreArray
) -> float:
    """Return the AUC of images that are there several times, or not at all."""
    order = np.argsort(others.scores, kind="stable")
    scores, below = others.scores[order], np.concatenate([[0.0], np.cumsum(w_others[order])])
    left = below[np.searchsorted(scores, members.scores, side="left")]
    right = below[np.searchsorted(scores, members.scores, side="right")]
    return float((w_members * (left + right)).sum() / (2 * w_members.sum() * w_others.sum()))


def _untied_share(members: ScoreArray, others: ScoreArray) -> float:
    """Return the share of pairs of a member and another one whose scores differ."""
    ordered = np.sort(others)
    equal = np.searchsorted(ordered, members, side="right") - np.searchsorted(ordered, members)
    return 1 - float(equal.mean()) / len(others)
