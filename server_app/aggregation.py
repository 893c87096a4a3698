"""Weighted FedAvg that adds replies up as they come, in memory that does not grow with them."""

import math
from collections.abc import Iterable, Iterator, Sequence

import numpy as np
from flwr.app import ArrayRecord, Message, MetricRecord, RecordDict
from flwr.serverapp.strategy import FedAvg
from numpy.typing import NDArray

from server_app.records import packed_record, packed_weights, record_of
from task.wire import Key

# Steps of 2^-32 are finer than float32 needs for a mean of weights; int64 holds the sum.
FRACTION_BITS = 32
# What all weights times images of a round may add up to, half of what would overflow.
SUM_LIMIT = 2.0 ** (62 - FRACTION_BITS)
# Values at a time, so that what is made of them on the way stays in a core's cache.
CHUNK = 1 << 16


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


def counted_loss(content: RecordDict) -> tuple[int, float]:
    """Return the images and the loss of a reply that was checked."""
    metrics = record_of(content, Key.METRICS, MetricRecord)
    return int(metrics[Key.NUM_EXAMPLES]), float(metrics[Key.LOSS])  # type: ignore[arg-type]


def mean_loss(losses: Sequence[tuple[int, float]]) -> MetricRecord:
    """Average the losses of clients, weighted by their images; see `counted_loss`."""
    num_examples = sum(count for count, _ in losses)
    # fsum is exact, so the order of arrival does not show here either.
    loss = math.fsum(loss * count for count, loss in losses) / num_examples
    return MetricRecord({Key.LOSS: loss, Key.NUM_EXAMPLES: num_examples})


class StreamingFedAvg(FedAvg):
    """Flower's FedAvg over a lazy iterable of replies, weighted by the images of each client.

    Source: Algorithm 1 of the paper, the lines of the server.
    """

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """Average packed weights and losses; (None, None) where no reply came.

        Args:
            server_round: not used; part of Flower's interface.
            replies: checked already, pulled from the network while they are consumed.
        """
        total, losses = FixedPointSum(), []
        for reply in replies:
            losses.append(counted_loss(reply.content))
            total.add(packed_weights(reply.content), losses[-1][0])
        if not losses:
            return None, None
        return packed_record(total.mean()), mean_loss(losses)
