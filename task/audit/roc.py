"""How well scores tell those who were trained on from those who were not, and how sure that is.

Patients, not images, are drawn at random: images of one patient are alike, and count as one draw.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

import numpy as np
from numpy.typing import NDArray
from scipy.special import ndtri

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
# Pairs of patients up to which p values are exact.
MOST_EXACT = 10_000
# What is counted, and beyond what no count is one.
COUNTS = ("members", "others", "patients of members", "patients of others")
MOST_COUNTED = 10**12


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
        error: standard error of the AUC of scores that say nothing, with as many patients.
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

    def interval(self, level: float) -> tuple[float, float]:
        """Return the interval that leaves out the true AUC with a probability of `level`."""
        return _wilson(self.auc, 0.25 / self.error**2, level)

    @property
    def least_p_value(self) -> float:
        """The p value of so many patients that an attack never takes for each other."""
        return 1 / math.comb(sum(self.patients), self.patients[0])

    def numbers(self) -> list[float]:
        """Write it as numbers alone, as few digits as say something; what few cannot show is -1."""
        rates = [self.true_positives.get(rate, -1.0) for rate in FALSE_POSITIVE_RATES]
        shares = [round(share, 4) for share in (self.auc, self.low, self.high, self.error)]
        counts = map(float, (self.members, self.others, *self.patients))
        p_value = float(f"{self.p_value:.2g}")
        return [*shares, p_value, *(round(rate, 4) for rate in rates), *counts]

    @classmethod
    def of_numbers(cls, numbers: Sequence[float]) -> Self:
        """Read what `numbers` wrote.

        Raises:
            ValueError: it cannot have written them.
        """
        shares, counts = numbers[: -len(COUNTS)], numbers[-len(COUNTS) :]
        length = 5 + len(FALSE_POSITIVE_RATES) + len(COUNTS)
        require(len(numbers) == length, "numbers of an attack", f"{length} numbers", len(numbers))
        for share in shares[:5]:
            require(0 <= share <= 1, "numbers of an attack", "shares in [0, 1]", share)
        require(shares[3] > 0, "numbers of an attack", "a standard error > 0", shares[3])
        for share in shares[5:]:
            possible = share == -1 or 0 <= share <= 1
            require(possible, "numbers of an attack", "rates in [0, 1], or -1", share)
        for count in counts:
            whole = FEWEST_PATIENTS <= count <= MOST_COUNTED and count == int(count)
            require(whole, "numbers of an attack", f"counts from {FEWEST_PATIENTS} on", count)
        rates = zip(FALSE_POSITIVE_RATES, shares[5:], strict=True)
        members, others, *patients = map(int, counts)
        auc, low, high, error, p_value = shares[:5]
        return cls(
            auc=auc,
            low=low,
            high=high,
            error=error,
            p_value=p_value,
            true_positives={rate: share for rate, share in rates if share >= 0},
            members=members,
            others=others,
            patients=(patients[0], patients[1]),
        )


def separation(
    members: Sample, others: Sample, *, seed: int, num_draws: int = BOOTSTRAP_DRAWS
) -> Separation | None:
    """Measure how well scores tell members from others; None where there are too few patients.

    The p value is that of the Mann-Whitney test on one number of each patient, the mean rank of its
    images. The interval is Wilson's for a share, of as many independent trials as the standard
    error over draws of patients stands for, at most as many as scores that say nothing have.

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
    # The variance of the AUC of scores that say nothing is 1 / (4 trials).
    trials = 3 * n * m / (n + m + 1)
    variance = float(np.var(drawn, ddof=1))
    if variance > 0:
        trials = min(trials, max(1.0, auc * (1 - auc) / variance))
    low, high = _wilson(auc, trials, SHOWN_LEVEL)
    rates = {
        rate: true_positive_rate(members.scores, others.scores, rate)
        for rate in FALSE_POSITIVE_RATES
        if len(others.scores) * rate >= 1
    }
    return Separation(
        auc=auc,
        low=low,
        high=high,
        error=0.5 / float(np.sqrt(trials)),
        p_value=_p_value(members, others),
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
    from scipy.stats import rankdata  # takes a second to import

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


def _wilson(share: float, trials: float, level: float) -> tuple[float, float]:
    """Return the interval of a share of so many trials, which stays in [0, 1] and is never empty.

    It leaves out the true share with a probability of `level`, both sides together.

    Source: Wilson 1927.
    """
    reach = float(-ndtri(level / 2))
    middle = (share + reach**2 / (2 * trials)) / (1 + reach**2 / trials)
    half = reach * np.sqrt(share * (1 - share) / trials + (reach / (2 * trials)) ** 2)
    half = float(half) / (1 + reach**2 / trials)
    return max(0.0, middle - half), min(1.0, middle + half)


def _p_value(members: Sample, others: Sample) -> float:
    """Test whether patients of the members rank above the others, each by its images' mean rank."""
    from scipy.stats import mannwhitneyu, rankdata  # takes a second to import

    ranks = rankdata(np.concatenate([members.scores, others.scores]))
    means = []
    for sample, own in zip((members, others), np.split(ranks, [len(members.scores)]), strict=True):
        _, whose = np.unique(sample.patients, return_inverse=True)
        means.append(np.bincount(whose, weights=own) / np.bincount(whose))
    everyone = np.concatenate(means)
    if np.ptp(everyone) == 0:
        return 1.0
    # The normal approximation is far off for few patients; with ties there is nothing exact.
    few = len(means[0]) * len(means[1]) <= MOST_EXACT and len(np.unique(everyone)) == len(everyone)
    method = "exact" if few else "asymptotic"
    return float(mannwhitneyu(*means, alternative="greater", method=method).pvalue)
