"""The server's half of a sum: it adds masked uploads up, and takes the masks off their sum."""

from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from task.checks import require
from task.protocol.secure_aggregation.masks import add_mask
from task.protocol.secure_aggregation.participant import (
    NONCE_BYTES,
    TAG_BYTES,
    Upload,
    commitment,
    mask_sign,
    revealed,
)
from task.protocol.secure_aggregation.shamir import SHARE_BYTES, join_shares

COMMITMENT_BYTES = 32


class WrongSharesError(ValueError):
    """The shares that clients sent do not lead to the seeds of the masks."""


class MaskedSum:
    """The sum of the uploads of clients, in memory that hardly grows with their number."""

    def __init__(self, number: int, *, size: int, num_measures: int) -> None:
        """Start with nothing.

        Args:
            number: of peers.
            size: of the values of an upload.
            num_measures: of the measures of an upload.
        """
        self._number = number
        self._values = np.zeros(size, np.uint32)
        self._measures = np.zeros(num_measures, np.uint64)
        self._shares: dict[int, list[bytes]] = {}
        self._commitments: dict[int, list[bytes]] = {}

    @property
    def survivors(self) -> list[int]:
        """The places of the peers whose uploads are in the sum, in ascending order."""
        return sorted(self._shares)

    def check(self, upload: Upload) -> None:
        """Check that an upload fits the sum.

        Raises:
            ValueError: it does not.
        """
        length = NONCE_BYTES + self._number * SHARE_BYTES + TAG_BYTES
        for name, array, like in (
            ("values", upload.values, self._values),
            ("measures", upload.measures, self._measures),
        ):
            given, wanted = (array.dtype, array.shape), (like.dtype, like.shape)
            require(given == wanted, name, f"{like.dtype} of shape {like.shape}", given)
        for name, lines, size in (
            ("shares", upload.shares, length),
            ("commitments", upload.commitments, COMMITMENT_BYTES),
        ):
            lengths = [len(line) if isinstance(line, bytes) else None for line in lines]
            expected = f"{self._number} times {size} bytes"
            require(lengths == [size] * self._number, name, expected, lengths[:8])

    def add(self, place: int, upload: Upload) -> None:
        """Add the upload of a peer, which `check` has let through."""
        self._values += upload.values
        self._measures += upload.measures
        self._shares[place], self._commitments[place] = upload.shares, upload.commitments

    def question(self, place: int) -> list[bytes]:
        """Return what a peer needs to help with the masks: see `Participant.answer`."""
        return [self._shares[survivor][place] for survivor in self.survivors]

    def check_answer(self, answer: Sequence[object]) -> None:
        """Check the form of an answer; what is wrong in it shows in `total`.

        Raises:
            ValueError: it is none.
        """
        survivors = self.survivors
        length = SHARE_BYTES * (1 + self._number - len(survivors))
        lengths = [len(each) if isinstance(each, bytes) else None for each in answer]
        expected = f"{len(survivors)} times {length} bytes"
        require(lengths == [length] * len(survivors), "answer", expected, lengths[:8])

    def total(
        self, answers: Mapping[int, Sequence[bytes]]
    ) -> tuple[NDArray[np.uint32], NDArray[np.uint64]]:
        """Take the masks off.

        Args:
            answers: of more than half of the peers, by their places.

        Returns:
            The sums of the values and of the measures of the survivors.

        Raises:
            WrongSharesError: a share is wrong, or they are too few.
        """
        survivors = self.survivors
        seeds: list[tuple[bytes, int]] = []
        for index, sender in enumerate(survivors):
            for number, mask in enumerate(revealed(sender, survivors, self._number)):
                piece = slice(number * SHARE_BYTES, (number + 1) * SHARE_BYTES)
                shares = {place: answer[index][piece] for place, answer in answers.items()}
                seed = join_shares(shares)
                if seed is None or commitment(seed) != self._commitments[sender][mask]:
                    raise WrongSharesError(f"the shares of the masks of peer {sender} do not fit")
                seeds.append((seed, -mask_sign(sender, mask)))
        for seed, sign in seeds:
            add_mask((self._values, self._measures), seed, sign=sign)
        return self._values, self._measures
