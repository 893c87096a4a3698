"""Weighted FedAvg that adds replies up as they come, in memory that does not grow with them."""

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from itertools import accumulate

import numpy as np
from flwr.app import ArrayRecord, Message, MetricRecord, RecordDict
from flwr.serverapp.strategy import FedAvg
from numpy.typing import NDArray

from server_app.messages import packed_record, packed_weights, record_of
from task.config import FederationConfig
from task.protocol.wire import Key

# Steps of 2^-32 are finer than float32 needs for a mean of weights; int64 holds the sum.
FRACTION_BITS = 32
# What all weights times images of a round may add up to, half of what would overflow.
SUM_LIMIT = 2.0 ** (62 - FRACTION_BITS)
# Values at a time, so that what is made of them on the way stays in a core's cache.
CHUNK = 1 << 16
# With fewer clients one of them has half of the weight or more, whatever is done about it.
MIN_CAPPED = 3
# Of a median: with half of the weight a client would decide it alone.
MEDIAN_SHARE = Fraction(1, 3)


class FixedPointSum:
    """The sum of weight x num_examples, equal to the bit in whatever order it is added up.

    Floating-point addition depends on the order, integer addition does not: every product is
    rounded once to a multiple of 2^-32, on its own, and added as int64.
    """

    def __init__(self) -> None:
        self.num_examples = 0
        self._sum: NDArray[np.int64] | None = None
        self._bound = 0.0

    def add(self, weights: NDArray[np.floating], num_examples: int) -> None:
        """Add the weights of one client.

        Args:
            weights: [P] finite.
            num_examples: > 0, the images that the client trained on.

        Raises:
            ValueError: the shape differs from that of the first client.
            OverflowError: the sum could overflow; `SUM_LIMIT` is shared out among the clients of
                a round, so that what passes the check of replies never comes here.
        """
        if self._sum is None:
            self._sum = np.zeros(weights.shape, np.int64)
        if weights.shape != self._sum.shape:
            raise ValueError(f"weights must have shape {self._sum.shape}, got {weights.shape}")
        self._bound += largest_magnitude(weights) * num_examples
        if self._bound > SUM_LIMIT * (1 + 1e-9):
            raise OverflowError(
                f"weights times images must add up to at most {SUM_LIMIT:g}, got {self._bound:.3g}"
            )
        self.num_examples += num_examples
        scale = num_examples * 2.0**FRACTION_BITS
        for chunk in chunks(weights):
            # float64 holds the product of a float32 and the scale to a relative 2^-53.
            steps = weights[chunk] * np.float64(scale)
            self._sum[chunk] += np.rint(steps, out=steps).astype(np.int64)

    def mean(self) -> NDArray[np.float32]:
        """Return the mean of all weights, weighted by the images of their clients: [P] float32.

        Raises:
            ValueError: nothing was added.
        """
        if self._sum is None:
            raise ValueError("the mean needs the weights of at least 1 client, got 0")
        mean = np.empty(self._sum.shape, np.float32)
        for chunk in chunks(mean):
            mean[chunk] = self._sum[chunk] / (self.num_examples * 2.0**FRACTION_BITS)
        return mean


def chunks(values: NDArray[np.generic]) -> Iterator[slice]:
    """Cut a flat array into pieces of `CHUNK` values."""
    return (slice(start, start + CHUNK) for start in range(0, len(values), CHUNK))


def largest_magnitude(weights: NDArray[np.floating]) -> float:
    """Return the largest absolute value of [P], 0 where P is; NaN where one is."""
    largest = [np.abs(weights[chunk]).max() for chunk in chunks(weights)]
    return float(np.max(largest, initial=0.0))


def distance(weights: NDArray[np.floating], other: NDArray[np.floating]) -> float:
    """Return the L2 norm of the difference of two [P], summed in float64."""
    squares = 0.0
    for chunk in chunks(weights):
        difference = weights[chunk].astype(np.float64) - other[chunk]
        squares += float(difference @ difference)
    return math.sqrt(squares)


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
class Weighing:
    """How much each client counts, in the mean of the weights and in what clients measured.

    Attributes:
        by_images: whether they count by their images; all alike where not.
        max_share: the most that one of `MIN_CAPPED` clients or more may have of the weight; None
            where the numbers of images are known to be true.
    """

    by_images: bool = True
    max_share: float | None = None

    @classmethod
    def of(cls, config: FederationConfig, *, simulated: bool) -> "Weighing":
        """Weigh as a run does; the images of simulated clients were dealt out by the server."""
        return cls(
            by_images=config.aggregation == "fedavg",
            max_share=None if simulated else config.max_weight_share,
        )

    @property
    def trusts(self) -> bool:
        """Whether every number of images is taken as it is."""
        return self.by_images and self.max_share is None

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
        return not self.trusts and number >= MIN_CAPPED

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

    def describe(self, told: Sequence[tuple[int, float]]) -> str:
        """Say what `combine` makes of several clients and between which values it lies."""
        if not self.is_median(len(told)):
            return f"{self.combine(told):.4f}"
        values = [value for _, value in told]
        return (
            f"{self.combine(told):.4f} (median of {len(told)} clients, "
            f"{min(values):.4g} to {max(values):.4g})"
        )


def exact(share: float) -> Fraction:
    """Return the fraction that a share was written as, such as 1/10 of 0.1."""
    return Fraction(str(share))


def counted_loss(content: RecordDict) -> tuple[int, float]:
    """Return the images and the loss of a reply that was checked."""
    metrics = record_of(content, Key.METRICS, MetricRecord)
    return int(metrics[Key.NUM_EXAMPLES]), float(metrics[Key.LOSS])  # type: ignore[arg-type]


def loss_record(losses: Sequence[tuple[int, float]], weighing: Weighing) -> MetricRecord:
    """Make one loss of those of clients; see `counted_loss`."""
    num_examples = sum(count for count, _ in losses)
    return MetricRecord({Key.LOSS: weighing.combine(losses), Key.NUM_EXAMPLES: num_examples})


class StreamingFedAvg(FedAvg):
    """Flower's FedAvg over a lazy iterable of replies, weighted by the images of each client.

    Who claims more than its share is known when all replies are there. Those that claim most, as
    many as may have too much, are added last; they are the only ones that are held in memory.

    Source: Algorithm 1 of the paper, the lines of the server.
    """

    def __init__(self, weighing: Weighing | None = None) -> None:
        """Weigh clients so; None: by their images, as they say them."""
        super().__init__()
        self._weighing = weighing or Weighing()

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """Combine packed weights and losses; (None, None) where no reply came.

        Args:
            server_round: not used; part of Flower's interface.
            replies: checked already, pulled from the network while they are consumed.
        """
        total, losses = FixedPointSum(), []
        largest: list[tuple[int, NDArray[np.floating]]] = []
        for reply in replies:
            losses.append(counted_loss(reply.content))
            largest.append((losses[-1][0], packed_weights(reply.content)))
            largest.sort(key=lambda claimed: claimed[0])
            if len(largest) > self._weighing.most_capped:
                total.add(*reversed(largest.pop(0)))
        if not losses:
            return None, None
        counts = [count for count, _ in losses]
        weights = dict(zip(counts, self._weighing.weights(counts), strict=True))
        for count, packed in largest:
            total.add(packed, weights[count])
        return packed_record(total.mean()), loss_record(losses, self._weighing)
