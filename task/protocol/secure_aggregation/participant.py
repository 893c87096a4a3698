"""A client's half of a sum: it masks what it sends, and later helps to take masks off, once."""

import hashlib
import os
from collections.abc import Collection, Sequence
from dataclasses import dataclass

import numpy as np
from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from numpy.typing import NDArray

from task.config import MIN_PEERS
from task.protocol.secure_aggregation.keys import Identity, PublicKeys
from task.protocol.secure_aggregation.masks import add_mask
from task.protocol.secure_aggregation.memory import Memory, MemoryStore, PeersRefusedError
from task.protocol.secure_aggregation.shamir import SHARE_BYTES, split_secret
from task.protocol.secure_aggregation.terms import Terms

NONCE_BYTES, TAG_BYTES = 12, 16


@dataclass(frozen=True)
class Upload:
    """What a client sends of a sum.

    Attributes:
        values: [P], its encoded update and its masks.
        measures: [K], what it measured, likewise.
        shares: for each peer, which alone can read them, its shares of the seeds of all masks.
        commitments: SHA-256 of the seed of each mask, by which wrong shares are known.
    """

    values: NDArray[np.uint32]
    measures: NDArray[np.uint64]
    shares: list[bytes]
    commitments: list[bytes]


class Participant:
    """A client that takes part in sums on terms of its own, whatever the server asks."""

    def __init__(
        self,
        identity: Identity,
        store: MemoryStore,
        *,
        minimum_peers: int = MIN_PEERS,
        trusted: Collection[str] = (),
    ) -> None:
        """Take part as this hospital.

        Args:
            identity: of the hospital.
            store: of what it remembers.
            minimum_peers: how many clients a sum must be of at least; never fewer than 3.
            trusted: fingerprints of the other hospitals that may be among the peers; none: all may.
        """
        self._identity, self._memory = identity, Memory(store)
        self._minimum_peers, self._trusted = minimum_peers, frozenset(trusted)

    def begin(self, terms: Terms) -> None:
        """Agree to a sum, before its training begins.

        Raises:
            PeersRefusedError: this client takes no part in it: there are too few peers, one is not
                trusted, it is not among them, or the sum is not a new one.
        """
        own = self._place(terms.peers)
        others = {peer.fingerprint for place, peer in enumerate(terms.peers) if place != own}
        strangers = sorted(others - self._trusted) if self._trusted else []
        if strangers:
            raise PeersRefusedError(f"not among trusted-peers: {', '.join(strangers)}")
        if len(terms.peers) < terms.minimum(self._minimum_peers):
            raise PeersRefusedError(
                f"a sum of {len(terms.peers)} hospitals, at least "
                f"{terms.minimum(self._minimum_peers)} are wanted here"
            )
        if not terms.resists_colluders:
            raise PeersRefusedError(
                f"{terms.threshold} of {len(terms.peers)} hospitals take masks off: with "
                f"{terms.colluders} that collude a server could have those of two sums taken off; "
                "ask the coordinator for a larger federation.min_replies"
            )
        if terms.format.num_clients != len(terms.peers):
            raise PeersRefusedError("a sum in the format of another number of clients")
        self._memory.begin(terms)

    def upload(
        self, terms: Terms, values: NDArray[np.uint32], measures: NDArray[np.uint64]
    ) -> Upload:
        """Mask what this client adds to a sum that it began; once for each.

        Args:
            terms: that `begin` agreed to.
            values: [P], becomes the masked one.
            measures: [K], likewise.
        """
        own = self._place(terms.peers)
        seeds = [
            os.urandom(32)
            if place == own
            else self._identity.agreed_key(peer, b"feddm mask\0" + terms.digest)
            for place, peer in enumerate(terms.peers)
        ]
        for place, seed in enumerate(seeds):
            add_mask((values, measures), seed, sign=mask_sign(own, place))
        number = len(terms.peers)
        split = [split_secret(seed, threshold=terms.threshold, shares=number) for seed in seeds]
        shares = []
        for place, peer in enumerate(terms.peers):
            nonce = os.urandom(NONCE_BYTES)
            plain = b"".join(pieces[place] for pieces in split)
            cipher = AESGCM(self._share_key(terms, peer, sender=own, reader=place))
            shares.append(nonce + cipher.encrypt(nonce, plain, None))
        return Upload(values, measures, shares, [commitment(seed) for seed in seeds])

    def answer(
        self, run: str, attempt: int, survivors: Sequence[int], shares: Sequence[bytes]
    ) -> list[bytes]:
        """Help to take the masks off a sum; once for each.

        Args:
            run: of the sum.
            attempt: of the sum, the last that this client began.
            survivors: the places of the peers whose uploads are in the sum, in ascending order.
            shares: what each of them sent for this client, in the same order.

        Returns:
            For each survivor the share of its own mask's seed and then, for each peer that is not
            in the sum, the share of the seed that the two have in common.

        Raises:
            PeersRefusedError: it was asked before, there are too few survivors, or what they sent
                for this client cannot be read.
        """
        terms = self._memory.answer(run, attempt)
        own, number = self._place(terms.peers), len(terms.peers)
        minimum = terms.minimum(self._minimum_peers)
        known = sorted({*survivors} & {*range(number)})
        if [*survivors] != known or len(known) != len(shares) or len(known) < minimum:
            raise PeersRefusedError(
                f"{len(survivors)} of {number} hospitals are said to be in the sum, at least "
                f"{minimum} are wanted here"
            )
        answers = []
        for sender, encrypted in zip(survivors, shares, strict=True):
            cipher = AESGCM(self._share_key(terms, terms.peers[sender], sender=sender, reader=own))
            try:
                plain = cipher.decrypt(encrypted[:NONCE_BYTES], encrypted[NONCE_BYTES:], None)
            except (InvalidTag, ValueError) as error:
                raise PeersRefusedError(
                    f"shares of {terms.peers[sender].fingerprint} that were changed on their way"
                ) from error
            if len(plain) != number * SHARE_BYTES:
                raise PeersRefusedError(f"shares of {terms.peers[sender].fingerprint} are too few")
            wanted = revealed(sender, survivors, number)
            answers.append(b"".join(plain[p * SHARE_BYTES : (p + 1) * SHARE_BYTES] for p in wanted))
        return answers

    def _place(self, peers: Sequence[PublicKeys]) -> int:
        public = self._identity.public
        places = [place for place, peer in enumerate(peers) if peer == public]
        if len(places) != 1:
            raise PeersRefusedError("this hospital's own keys are not among those of the peers")
        return places[0]

    def _share_key(self, terms: Terms, peer: PublicKeys, *, sender: int, reader: int) -> bytes:
        way = f"{sender} {reader}\0".encode()
        return self._identity.agreed_key(peer, b"feddm shares\0" + way + terms.digest)


def mask_sign(own: int, other: int) -> int:
    """Return with which sign a client adds the mask that it has in common with another.

    Its own mask, of which `other` is `own`, it adds.
    """
    return 1 if own <= other else -1


def revealed(sender: int, survivors: Collection[int], number: int) -> list[int]:
    """Return the places of the masks of a survivor that have to come off, its own first."""
    return [sender, *(place for place in range(number) if place not in survivors)]


def commitment(seed: bytes) -> bytes:
    """Return what a seed is known by, which says nothing of it."""
    return hashlib.sha256(b"feddm seed\0" + seed).digest()
