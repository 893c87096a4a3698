"""Weights and updates in 8 or 4 bits a value: blocks with a scale each, rounded at random.

A block lies in one tensor, so that the scales of layers do not mix, and holds `BLOCK` values or
what is left of the tensor. A value becomes a whole number of steps, of which the largest magnitude
of its block has `STEPS`, and is rounded up with the probability of what is cut off: the mean over
draws is the value itself, and no draw is further away than a step.

Source: Alistarh et al. 2017 (arXiv 1610.02132), with the largest magnitude in place of the norm.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from task.checks import require

BLOCK = 512
# Steps from 0 to the largest magnitude of a block, by the bits of a value.
STEPS = {8: 127, 4: 7}


@dataclass(frozen=True)
class BlockQuantizer:
    """Writes the flat values of tensors as bytes: the scales of all blocks, then the values.

    Attributes:
        sizes: the number of values of each tensor, in order, each > 0.
        bits: 8 or 4 for a value.
    """

    sizes: Sequence[int]
    bits: int

    def __post_init__(self) -> None:
        """Check both.

        Raises:
            ValueError: there are no such bits, or a tensor is empty.
        """
        require(self.bits in STEPS, "bits", f"one of {', '.join(map(str, STEPS))}", self.bits)
        require(min(self.sizes, default=1) > 0, "sizes", "all > 0", self.sizes)

    @property
    def num_values(self) -> int:
        """Of all tensors."""
        return sum(self.sizes)

    @cached_property
    def _lengths(self) -> NDArray[np.int64]:
        """How many values each block has."""
        lengths = []
        for size in self.sizes:
            whole, left = divmod(size, BLOCK)
            lengths += [BLOCK] * whole + [left] * (left > 0)
        return np.asarray(lengths, np.int64)

    @property
    def num_bytes(self) -> int:
        """Of what `encode` returns."""
        return 4 * len(self._lengths) + (self.num_values * self.bits + 7) // 8

    def encode(self, values: NDArray[np.float32], rng: np.random.Generator) -> NDArray[np.uint8]:
        """Write values as bytes.

        Args:
            values: [P] finite.
            rng: of the rounding.

        Returns:
            [num_bytes] uint8.
        """
        values = np.asarray(values, np.float32)
        starts = np.cumsum(self._lengths) - self._lengths
        steps = STEPS[self.bits]
        largest = np.maximum.reduceat(np.abs(values), starts)
        scales = (largest / np.float32(steps)).astype("<f4")
        # A block of zeros, or of values too small to divide by, is all 0.
        per_step = np.divide(1, scales, out=np.zeros_like(scales), where=scales > 1e-38)
        scaled = values * np.repeat(per_step, self._lengths)
        codes = np.floor(scaled + rng.random(len(values), dtype=np.float32))
        codes = np.clip(codes, -steps, steps).astype(np.int8)
        return np.concatenate([scales.view(np.uint8), self._packed(codes)])

    def decode(self, encoded: NDArray[np.uint8]) -> NDArray[np.float32]:
        """Return the values, [P], that `encode` has rounded to.

        Args:
            encoded: [num_bytes] uint8.

        Raises:
            ValueError: it is of another shape or dtype, or a scale is negative or not finite.
        """
        right = encoded.shape == (self.num_bytes,) and encoded.dtype == np.uint8
        got = f"{encoded.dtype} of shape {encoded.shape}"
        require(right, "encoded values", f"uint8 of shape ({self.num_bytes},)", got)
        end = 4 * len(self._lengths)
        scales = encoded[:end].copy().view("<f4")
        possible = bool((np.isfinite(scales) & (scales >= 0)).all())
        require(possible, "scales", "finite and >= 0", "one that is not")
        codes = self._unpacked(encoded[end:])
        return np.asarray(codes * np.repeat(scales, self._lengths), np.float32)

    def _packed(self, codes: NDArray[np.int8]) -> NDArray[np.uint8]:
        if self.bits == 8:
            return codes.view(np.uint8)
        low_bits = codes.view(np.uint8) & 0xF
        pairs = np.concatenate([low_bits, np.zeros(len(codes) % 2, np.uint8)]).reshape(-1, 2)
        packed: NDArray[np.uint8] = pairs[:, 0] | pairs[:, 1] << 4
        return packed

    def _unpacked(self, packed: NDArray[np.uint8]) -> NDArray[np.int8]:
        if self.bits == 8:
            return packed.view(np.int8)
        pairs = np.stack([packed & 0xF, packed >> 4], axis=1).reshape(-1)[: self.num_values]
        # The fourth bit is the sign.
        return (pairs << 4).view(np.int8) >> 4
