"""Masks: numbers that look random to whoever does not know their seed."""

import numpy as np
from cryptography.hazmat.primitives.ciphers import Cipher
from cryptography.hazmat.primitives.ciphers.algorithms import AES256
from cryptography.hazmat.primitives.ciphers.modes import CTR
from numpy.typing import NDArray

SEED_BYTES = 32
# Of a mask at a time, so that it stays in a core's cache.
MASK_CHUNK_BYTES = 1 << 18
_ZEROS = bytes(MASK_CHUNK_BYTES)

MaskedArray = NDArray[np.uint32] | NDArray[np.uint64]


def add_mask(arrays: tuple[MaskedArray, ...], seed: bytes, *, sign: int) -> None:
    """Add the mask of a seed to arrays, or take it off, modulo 2^32 or 2^64 as they are.

    Args:
        arrays: flat, changed in place; the mask goes on from one to the next.
        seed: 32 bytes that no other mask is made of.
        sign: 1 to add, -1 to subtract.
    """
    # Each seed is used for one mask alone, so that the counter may begin at zero.
    stream = Cipher(AES256(seed), CTR(bytes(16))).encryptor()
    buffer = bytearray(MASK_CHUNK_BYTES)
    for array in arrays:
        step = MASK_CHUNK_BYTES // array.itemsize
        combine = np.add if sign > 0 else np.subtract
        for start in range(0, len(array), step):
            piece = array[start : start + step]
            stream.update_into(_ZEROS[: piece.nbytes], buffer)
            mask = np.frombuffer(buffer, piece.dtype.newbyteorder("<"), len(piece))
            combine(piece, mask, out=piece)
