"""Updates of weights as 32-bit integers, whose sum over clients no order and no mask changes."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from task.checks import require
from task.config import Config

# Values at a time, so that what is made of them on the way stays in a core's cache.
CHUNK = 1 << 16
LARGEST_SUM = 2**31 - 1
# Larger steps of the integers do not fit into int64 with certainty.
LARGEST_VALUE = 2.0**62
# Of the sum of a hospital's clipped gradients, in units of the clipping norm: it takes so many
# patients of each hospital whose gradients are all at one and the same weight to wrap around.
GRADIENT_RANGE = 1024.0
# What is measured of a training is clipped to so much, and rounded to so many binary places.
MEASURE_RANGE, MEASURE_BITS = 2.0**16, 20
# All images of a sum, times MEASURE_RANGE and 2^MEASURE_BITS, stay below 2^63.
MAX_IMAGES_OF_SUM = 1 << 26


class NotFiniteError(ValueError):
    """An update or a loss is not finite: training has diverged."""


def chunks(values: NDArray[Any]) -> Iterator[slice]:
    """Cut a flat array into pieces of `CHUNK` values."""
    return (slice(start, start + CHUNK) for start in range(0, len(values), CHUNK))


@dataclass(frozen=True)
class UpdateFormat:
    """How the updates of a round's clients become integers.

    Attributes:
        update_range: every value of an update is clipped to from minus this to this.
        max_images: a client with more images counts as if it had so many.
        num_clients: whose sum must not overflow.
        wraps: whether larger values stay as they are, modulo the integers. Noise that is clipped at
            each client would not add up to Gaussian noise; the sum may wrap around, which no
            privacy hangs on.

    Raises:
        ValueError: a value is out of range.
    """

    update_range: float
    max_images: int
    num_clients: int
    wraps: bool = False

    def __post_init__(self) -> None:
        require(self.update_range > 0, "update_range", "> 0", self.update_range)
        require(self.num_clients >= 1, "num_clients", ">= 1", self.num_clients)
        most = MAX_IMAGES_OF_SUM // self.num_clients
        require(
            1 <= self.max_images <= most,
            "federation.max_images_per_client",
            f"from 1 to {most} for {self.num_clients} clients",
            self.max_images,
        )

    @classmethod
    def of(cls, config: Config, num_clients: int) -> "UpdateFormat":
        """Return the format of a run for so many clients."""
        federation = config.federation
        # With differential privacy all clients count alike.
        most = 1 if config.privacy.unit else federation.max_images_per_client
        if config.privacy.is_distributed:
            return cls(GRADIENT_RANGE, most, num_clients, wraps=True)
        return cls(federation.update_range, most, num_clients)

    @property
    def steps(self) -> int:
        """How many steps of the integers a value of `update_range` is, at full weight."""
        return LARGEST_SUM // self.num_clients

    def counted(self, num_images: int) -> int:
        """Return how many images a client counts for."""
        return min(num_images, self.max_images)

    def encode(
        self, update: NDArray[np.float32], num_images: int
    ) -> tuple[NDArray[np.uint32], int]:
        """Clip an update, weight it and round it.

        Args:
            update: [P].
            num_images: > 0, that the client has.

        Returns:
            [P], two's complement, and how many values lie beyond the range.

        Raises:
            NotFiniteError: a value is not finite.
        """
        encoded, clipped = np.empty(update.shape, np.uint32), 0
        scale = self.steps * self.counted(num_images) / (self.max_images * self.update_range)
        limit = LARGEST_VALUE / scale if self.wraps else self.update_range
        for chunk in chunks(update):
            values = update[chunk].astype(np.float64)
            if not np.isfinite(values).all():
                raise NotFiniteError("an update that is not finite: training has diverged")
            clipped += int(np.count_nonzero(np.abs(values) > self.update_range))
            np.clip(values, -limit, limit, out=values)
            values *= scale
            encoded[chunk] = np.rint(values).astype(np.int64).astype(np.uint32)
        return encoded, clipped

    def add_mean(
        self, weights: NDArray[np.floating], total: NDArray[np.uint32], num_images: int
    ) -> NDArray[np.float32]:
        """Move weights by the mean of updates.

        Args:
            weights: [P], that the clients were sent.
            total: [P], the sum of what `encode` returned, modulo 2^32.
            num_images: > 0, that all clients count for.

        Returns:
            [P] float32.
        """
        moved = np.empty(weights.shape, np.float32)
        step = self.update_range * self.max_images / (self.steps * num_images)
        for chunk in chunks(weights):
            moved[chunk] = weights[chunk].astype(np.float64) + total[chunk].view(np.int32) * step
        return moved

    def encode_measures(self, num_images: int, values: Sequence[float]) -> NDArray[np.uint64]:
        """Write what a client measured, weighted, so that it can be summed as well.

        Args:
            num_images: that the client has.
            values: means over them, clipped to `MEASURE_RANGE`.

        Returns:
            [1 + values]: the images that it counts for, and images times each value.

        Raises:
            NotFiniteError: a value is not finite.
        """
        count = self.counted(num_images)
        if not np.isfinite(values).all():
            raise NotFiniteError("a loss that is not finite: training has diverged")
        clipped = np.clip(np.array(values, np.float64), -MEASURE_RANGE, MEASURE_RANGE)
        scaled = np.rint(clipped * (count * 2.0**MEASURE_BITS)).astype(np.int64)
        return np.concatenate(([np.int64(count)], scaled)).astype(np.uint64)


def decode_measures(total: NDArray[np.uint64]) -> tuple[int, list[float]]:
    """Return the images of all clients, and the mean of each value over them.

    Args:
        total: the sum of what `UpdateFormat.encode_measures` returned, modulo 2^64.

    Raises:
        ValueError: there are no images.
    """
    signed = total.view(np.int64)
    count = int(signed[0])
    require(0 < count <= MAX_IMAGES_OF_SUM, "images of a sum", "a number of images > 0", count)
    return count, [float(value / (count * 2.0**MEASURE_BITS)) for value in signed[1:]]
