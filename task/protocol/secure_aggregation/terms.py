"""What all clients of a sum must agree on, or their masks do not cancel."""

import dataclasses
import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

from task.config import MIN_PEERS
from task.protocol.secure_aggregation.fixed_point import UpdateFormat
from task.protocol.secure_aggregation.keys import PublicKeys


@dataclass(frozen=True)
class Terms:
    """One sum: whose, of what and for the how manyth time.

    Every mask and every key hangs on all of it: where the server tells clients different terms,
    or sends them different weights, it learns noise.

    Attributes:
        run: the run's id.
        server_round: 1-based.
        attempt: a number that grows with every sum of a run, so that nothing is masked twice alike.
        purpose: what is summed, such as "train".
        peers: all clients that may send, in the order that the server gave.
        format: of the update.
        model: SHA-256 of the weights that the clients were sent, and of their layout.
        min_replies: clients that the run wants in a sum at least, and to take masks off it.
        colluders: peers that may work together with a server that lies.
    """

    run: str
    server_round: int
    attempt: int
    purpose: str
    peers: tuple[PublicKeys, ...]
    format: UpdateFormat
    model: str
    min_replies: int = 1
    colluders: int = 0

    @cached_property
    def digest(self) -> bytes:
        """Return the SHA-256 of all of it."""
        written = json.dumps(
            [
                *(self.run, self.server_round, self.attempt, self.purpose, self.model),
                *(self.min_replies, self.colluders),
                *dataclasses.astuple(self.format),
                [peer.to_bytes().hex() for peer in self.peers],
            ]
        )
        return hashlib.sha256(written.encode()).digest()

    @property
    def threshold(self) -> int:
        """How many shares it takes to take a mask off."""
        return least_to_unmask(len(self.peers), self.min_replies)

    def minimum(self, minimum_peers: int = MIN_PEERS) -> int:
        """Return of how many clients a sum must be."""
        return max(MIN_PEERS, minimum_peers, self.threshold)

    @property
    def resists_colluders(self) -> bool:
        """Whether no two answers of different survivors can both be had, with colluders' help."""
        return 2 * self.threshold > len(self.peers) + self.colluders


def least_to_unmask(num_peers: int, min_replies: int) -> int:
    """Return how many clients take masks off together: more than half, and those of a run."""
    return max(num_peers // 2 + 1, min_replies)


def read_peers(given: Sequence[bytes]) -> tuple[PublicKeys, ...]:
    """Read the keys of all peers of a sum.

    Raises:
        ValueError: a signature is wrong, or a key is there twice.
    """
    peers = tuple(PublicKeys.read(each) for each in given)
    for kind in ("identity", "exchange"):
        if len({getattr(peer, kind) for peer in peers}) != len(peers):
            raise ValueError("a key of the peers is there twice")
    return peers
