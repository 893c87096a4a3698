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
BLOCKS_AT_A_TIME = 1024


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
            values: [P]; a block with one that is not finite comes back without any that is.
            rng: of the rounding.

        Returns:
            [num_bytes] uint8.
        """
        steps = np.float32(STEPS[self.bits])
        scales = np.empty(len(self._lengths), "<f4")
        codes = np.empty(self.num_values, np.int8)
        # Block by block of all would take several times as much memory as the values.
        for first, last, start, end in self._parts:
            part, lengths = np.asarray(values[start:end], np.float32), self._lengths[first:last]
            largest = np.maximum.reduceat(np.abs(part), np.cumsum(lengths) - lengths)
            scales[first:last] = largest / steps
            # A block of zeros, or of values too small to divide by, is all 0.
            scale = scales[first:last]
            per_step = np.divide(1, scale, out=np.zeros_like(scale), where=scale > 1e-38)
            with np.errstate(invalid="ignore"):
                scaled = part * np.repeat(per_step, lengths)
            scaled += rng.random(len(part), dtype=np.float32)
            np.floor(scaled, out=scaled)
            # The scale of what is not finite is not finite either, and says so for the block.
            np.nan_to_num(scaled, copy=False)
            codes[start:end] = np.clip(scaled, -steps, steps, out=scaled)
        return np.concatenate([scales.view(np.uint8), self._packed(codes)])

    @cached_property
    def _parts(self) -> list[tuple[int, int, int, int]]:
        """First and last block of each part, and where its values begin and end."""
        ends = np.concatenate([[0], np.cumsum(self._lengths)])
        firsts = range(0, len(self._lengths), BLOCKS_AT_A_TIME)
        lasts = [min(first + BLOCKS_AT_A_TIME, len(self._lengths)) for first in firsts]
        return [
            (first, last, int(ends[first]), int(ends[last]))
            for first, last in zip(firsts, lasts, strict=True)
        ]

    def decode(self, encoded: NDArray[np.uint8]) -> NDArray[np.float32]:
        """Return the values, [P], that `encode` has rounded to.

        Args:
            encoded: [num_bytes] uint8.

        Raises:
            ValueError: it is of another shape or dtype.
        """
        right = encoded.shape == (self.num_bytes,) and encoded.dtype == np.uint8
        got = f"{encoded.dtype} of shape {encoded.shape}"
        require(right, "encoded values", f"uint8 of shape ({self.num_bytes},)", got)
        end = 4 * len(self._lengths)
        scales = encoded[:end].copy().view("<f4")
        codes = self._unpacked(encoded[end:])
        values = np.empty(self.num_values, np.float32)
        for first, last, start, stop in self._parts:
            steps = np.repeat(scales[first:last], self._lengths[first:last])
            with np.errstate(invalid="ignore"):
                np.multiply(codes[start:stop], steps, out=values[start:stop])
        return values

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
