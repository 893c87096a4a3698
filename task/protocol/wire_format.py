"""How packed weights travel, by `federation.wire_dtype`: to clients, and back from them."""

from abc import ABC, abstractmethod
from typing import Any

import numpy as np
from numpy.typing import NDArray

from task.checks import require
from task.protocol.quantization import BlockQuantizer
from task.protocol.wire import WeightLayout

# What wire_dtype may be, by the bits of a value of an update on its way back.
BLOCK_BITS = {"int8": 8, "int4": 4}
FLOATS = ("float32", "float16")
# Of a value on its way back, without the scales of blocks, which are a few hundredths.
BYTES_BACK = {"float32": 4.0, "float16": 2.0, **{dtype: n / 8 for dtype, n in BLOCK_BITS.items()}}


class WireFormat(ABC):
    """Both ways of packed weights, [P], between the server and a client.

    Attributes:
        is_lossy: whether the server has to keep its own weights, because what it sends is coarse.
    """

    is_lossy = False

    @abstractmethod
    def encode_weights(
        self, weights: NDArray[np.float32], rng: np.random.Generator
    ) -> NDArray[Any]:
        """Make what travels to clients of the global weights.

        Args:
            weights: [P] finite.
            rng: of the rounding, where it is random.
        """

    @abstractmethod
    def decode_weights(self, encoded: NDArray[Any]) -> NDArray[np.floating]:
        """Return the weights that a client starts from, [P].

        Raises:
            ValueError: that is not what `encode_weights` makes.
        """

    @abstractmethod
    def encode_local(
        self,
        weights: NDArray[np.float32],
        received: NDArray[np.floating],
        rng: np.random.Generator,
    ) -> NDArray[Any]:
        """Make what travels back of a client's weights.

        Args:
            weights: [P] finite, after the local epochs.
            received: [P], of `decode_weights`.
            rng: of the rounding, where it is random.
        """

    @abstractmethod
    def decode_local(
        self, encoded: NDArray[Any], sent: NDArray[np.floating]
    ) -> NDArray[np.floating]:
        """Return the weights of a client, [P].

        Args:
            encoded: of `encode_local`.
            sent: [P], of `decode_weights`.

        Raises:
            ValueError: that is not what `encode_local` makes.
        """


class FloatFormat(WireFormat):
    """The weights themselves, in both directions."""

    def __init__(self, layout: WeightLayout, dtype: str) -> None:
        """Send float32 or float16; either is taken."""
        self._size, self._dtype = layout.size, np.dtype(dtype)

    def encode_weights(
        self, weights: NDArray[np.float32], rng: np.random.Generator
    ) -> NDArray[Any]:
        """Round to the dtype."""
        return weights.astype(self._dtype, copy=False)

    def decode_weights(self, encoded: NDArray[Any]) -> NDArray[np.floating]:
        """Return what travelled."""
        right = encoded.shape == (self._size,) and encoded.dtype in FLOATS
        got = f"{encoded.dtype} of shape {encoded.shape}"
        require(right, "weights", f"float32 or float16 of shape ({self._size},)", got)
        return encoded

    def encode_local(
        self,
        weights: NDArray[np.float32],
        received: NDArray[np.floating],
        rng: np.random.Generator,
    ) -> NDArray[Any]:
        """Round to the dtype."""
        return self.encode_weights(weights, rng)

    def decode_local(
        self, encoded: NDArray[Any], sent: NDArray[np.floating]
    ) -> NDArray[np.floating]:
        """Return what travelled."""
        return self.decode_weights(encoded)


class BlockFormat(WireFormat):
    """Weights in 8 bits to clients, and their updates in 8 or 4 bits back.

    A client needs nothing of earlier rounds. The server keeps its own weights in float32: what
    rounding changes on the way out is no part of an update, and does not add up over rounds.
    Vectors, such as biases and statistics of batches, travel as they are: they are few, and a
    variance that was rounded up could be moved below 0.
    """

    is_lossy = True

    def __init__(self, layout: WeightLayout, bits: int) -> None:
        """Send updates in so many bits a value."""
        shapes = layout.shapes
        self._rounded = layout.where(lambda name: len(shapes[name]) > 1)
        sizes = [shape.numel() for shape in shapes.values() if len(shape) > 1]
        self._down, self._up = BlockQuantizer(sizes, 8), BlockQuantizer(sizes, bits)

    def encode_weights(
        self, weights: NDArray[np.float32], rng: np.random.Generator
    ) -> NDArray[Any]:
        """Quantize the weights."""
        return self._encoded(self._down, weights, weights, rng)

    def decode_weights(self, encoded: NDArray[Any]) -> NDArray[np.floating]:
        """Return the quantized weights."""
        return self._decoded(self._down, encoded)

    def encode_local(
        self,
        weights: NDArray[np.float32],
        received: NDArray[np.floating],
        rng: np.random.Generator,
    ) -> NDArray[Any]:
        """Quantize the update."""
        return self._encoded(self._up, weights - received, weights, rng)

    def decode_local(
        self, encoded: NDArray[Any], sent: NDArray[np.floating]
    ) -> NDArray[np.floating]:
        """Add the update to the weights that were sent."""
        weights = self._decoded(self._up, encoded)
        weights[self._rounded] += sent[self._rounded]
        return weights

    def _encoded(
        self,
        quantizer: BlockQuantizer,
        rounded: NDArray[np.float32],
        exact: NDArray[np.float32],
        rng: np.random.Generator,
    ) -> NDArray[np.uint8]:
        """Write what is rounded, [P], of tensors, and what is exact, [P], of vectors."""
        vectors = np.asarray(exact[~self._rounded], "<f4").view(np.uint8)
        return np.concatenate([vectors, quantizer.encode(rounded[self._rounded], rng)])

    def _decoded(self, quantizer: BlockQuantizer, encoded: NDArray[Any]) -> NDArray[np.float32]:
        """Read what `_encoded` wrote: [P]."""
        end = 4 * int((~self._rounded).sum())
        size = end + quantizer.num_bytes
        right = encoded.shape == (size,) and encoded.dtype == np.uint8
        got = f"{encoded.dtype} of shape {encoded.shape}"
        require(right, "encoded weights", f"uint8 of shape ({size},)", got)
        values = np.empty(len(self._rounded), np.float32)
        values[~self._rounded] = encoded[:end].copy().view("<f4")
        values[self._rounded] = quantizer.decode(encoded[end:])
        return values


def float_dtype(dtype: str) -> str:
    """Return in what float weights travel that are to be measured as they are, not trained."""
    return "float16" if dtype in BLOCK_BITS else dtype


def sent_weights(layout: WeightLayout, encoded: NDArray[Any]) -> NDArray[np.floating]:
    """Return the weights of a message to a client, [P], whichever format it has.

    Raises:
        ValueError: it has none.
    """
    dtype = "int8" if encoded.dtype == np.uint8 else "float32"
    return wire_format(layout, dtype).decode_weights(encoded)


def wire_format(layout: WeightLayout, dtype: str) -> WireFormat:
    """Build the format that `federation.wire_dtype` names.

    Raises:
        ValueError: it names none.
    """
    if dtype in BLOCK_BITS:
        return BlockFormat(layout, BLOCK_BITS[dtype])
    known = (*FLOATS, *BLOCK_BITS)
    require(dtype in FLOATS, "federation.wire_dtype", f"one of {', '.join(known)}", dtype)
    return FloatFormat(layout, dtype)
