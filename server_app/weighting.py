"""How much each client counts, in the mean of the weights and in what clients measured."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from itertools import accumulate

from task.config import Config

# With fewer clients one of them has half of the weight or more, whatever is done about it.
MIN_CAPPED = 3
# Of a median: with half of the weight a client would decide it alone.
MEDIAN_SHARE = Fraction(1, 3)


def capped(counts: Sequence[int], share: Fraction) -> list[int]:
    """Lower the largest counts until none is more than a share of their sum.

    Fewer than `MIN_CAPPED` counts are left as they are. Where the share is below that of equal
    counts, they become equal.

    Args:
        counts: > 0.
        share: in (0, 1].

    Returns:
        The counts in the same order, > 0.
    """
    if len(counts) < MIN_CAPPED:
        return [*counts]
    share = max(share, Fraction(1, len(counts)))
    ordered = sorted(counts, reverse=True)
    if ordered[0] <= share * sum(ordered):
        return [*counts]
    for number in range(1, len(ordered)):
        # With `number` counts at the limit, each of them is exactly the share.
        limit = share * sum(ordered[number:]) / (1 - number * share)
        if ordered[number] <= limit:
            break
    return [min(count, max(int(limit), 1)) for count in counts]


def weighted_median(weighted: Sequence[tuple[int, float]]) -> float:
    """Return the value with half of the weight below it; the middle of two where it lies between.

    Args:
        weighted: weight > 0 and value of each, at least one.
    """
    values, weights = zip(*sorted((value, weight) for weight, value in weighted), strict=True)
    reached = [2 * weight for weight in accumulate(weights)]
    low = next(place for place, twice in enumerate(reached) if twice >= sum(weights))
    high = next(place for place, twice in enumerate(reached) if twice > sum(weights))
    return float(values[low] + values[high]) / 2


@dataclass(frozen=True)
class Weighting:
    """How much each client counts.

    Attributes:
        by_images: whether they count by their images; all alike where not.
        max_share: the most that one of `MIN_CAPPED` clients or more may have of the weight; None
            where the numbers of images are known to be true.
    """

    by_images: bool = True
    max_share: float | None = None

    @classmethod
    def of(cls, config: Config, *, simulated: bool) -> "Weighting":
        """Weight as a run does; the images of simulated clients were dealt out by the server."""
        federation = config.federation
        return cls(
            # With differential privacy all clients count alike.
            by_images=federation.aggregation in ("fedavg", "bounded_mean")
            and not config.privacy.unit,
            # A bounded mean has a bound of its own.
            max_share=None
            if simulated or federation.aggregation != "fedavg"
            else federation.max_weight_share,
        )

    @property
    def most_capped(self) -> int:
        """How many clients of a round may claim more than their share at most."""
        return 0 if self.max_share is None else math.ceil(1 / exact(self.max_share)) - 1

    def weights(self, counts: Sequence[int]) -> list[int]:
        """Return how much clients with these numbers of images count."""
        if not self.by_images:
            return [1] * len(counts)
        return [*counts] if self.max_share is None else capped(counts, exact(self.max_share))

    def is_median(self, number: int) -> bool:
        """Whether `combine` takes the median of so many clients."""
        trusted = self.by_images and self.max_share is None
        return not trusted and number >= MIN_CAPPED

    def combine(self, told: Sequence[tuple[int, float]]) -> float:
        """Make one number of what clients measured.

        It is the mean weighted by images where these are known to be true or clients are few.
        Otherwise it is the weighted median, which no single client decides.

        Args:
            told: images > 0 and number of each client, at least one.
        """
        counts, values = zip(*told, strict=True)
        weights = self.weights(counts)
        if self.is_median(len(told)):
            return weighted_median([*zip(capped(weights, MEDIAN_SHARE), values, strict=True)])
        # fsum is exact, so the order of arrival does not show here either.
        terms = (weight * value for weight, value in zip(weights, values, strict=True))
        return math.fsum(terms) / sum(weights)

    def combined(self, told: Sequence[tuple[int, float]]) -> tuple[int, float]:
        """Return the images of all clients, and what `combine` makes of what they measured."""
        return sum(count for count, _ in told), self.combine(told)

    def describe(self, told: Sequence[tuple[int, float]]) -> str:
        """Say what `combine` makes of several clients and between which values it lies."""
        combined = f"{self.combine(told):.4f}"
        if not self.is_median(len(told)):
            return combined
        values = [value for _, value in told]
        return f"{combined} (median of {len(told)} clients, {min(values):.4g} to {max(values):.4g})"


def exact(share: float) -> Fraction:
    """Return the fraction that a share was written as, such as 1/10 of 0.1."""
    return Fraction(str(share))
