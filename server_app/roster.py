"""Which node is which client, and which of them train in a round."""

import time
from collections.abc import Mapping, Sequence

from flwr.app import ConfigRecord, MessageType, RecordDict
from flwr.common.constant import ErrorCode
from flwr.serverapp import Grid

from server_app.exchange import Reply, UnusableReply, addressed, checked_content, exchange
from server_app.log import log
from server_app.records import record_of
from task.fingerprint import code_fingerprint
from task.randomness import Stream, numpy_generator
from task.wire import Key

QUERY_TIMEOUT_SECONDS = 120.0
POLL_SECONDS = 0.05
# A simulation compares each message that is out with each node, ten times a second.
QUERIES_AT_ONCE = 64

# Flower's words for "the message was not answered in time" and "the node is not there".
SLOW_CODES = (ErrorCode.MESSAGE_UNAVAILABLE, ErrorCode.NODE_UNAVAILABLE)


class Roster:
    """The nodes of a run by client number.

    In a simulation the number is the partition-id. A real node gets the next free number when it
    is first seen, and keeps it: Flower gives it the same node id for the same key.

    Attributes:
        num_partitions: number of shares of a simulation; None with real nodes.
    """

    def __init__(self, grid: Grid, *, known: Mapping[str, int] | None = None) -> None:
        """Start without nodes.

        Args:
            grid: Flower's view of the network.
            known: client numbers by node id, from an earlier start of the same run.
        """
        self.num_partitions: int | None = None
        self._grid = grid
        self._numbers = {int(node): number for node, number in (known or {}).items()}
        self._present: dict[int, int] = {}
        self._refused: dict[int, str] = {}

    @property
    def node_ids(self) -> dict[int, int]:
        """Node ids by client number, of the nodes that are there now, sorted by number."""
        return dict(sorted(self._present.items()))

    @property
    def numbers(self) -> dict[str, int]:
        """Client numbers by node id, of every real node ever seen; for the run directory."""
        return {str(node): number for node, number in self._numbers.items()}

    def wait_for(self, minimum: int, *, seconds: float) -> None:
        """Wait until enough nodes are there and have introduced themselves.

        Args:
            minimum: nodes; a simulation waits for all of its nodes.
            seconds: how long to wait.

        Raises:
            TimeoutError: they did not come; says why nodes that came were refused.
            ValueError: a simulation has fewer nodes than `minimum`.
            RuntimeError: the simulated clients run other code than the server.
        """
        deadline = time.monotonic() + seconds
        announced = 0.0
        while True:
            remaining = max(deadline - time.monotonic(), POLL_SECONDS)
            self.refresh(timeout=min(remaining, QUERY_TIMEOUT_SECONDS))
            if self.num_partitions is not None and self.num_partitions < minimum:
                raise ValueError(
                    "federation.min_nodes must be at most the number of simulated nodes, "
                    f"{self.num_partitions}, got {minimum}"
                )
            wanted = max(minimum, self.num_partitions or 0)
            if len(self._present) >= wanted:
                return
            if time.monotonic() > deadline:
                reasons = "; ".join(self._refused.values()) or "no other node connected"
                raise TimeoutError(
                    f"{len(self._present)} of {wanted} nodes are ready after "
                    f"federation.node_wait={seconds:g} s: {reasons}"
                )
            if time.monotonic() - announced > 30:
                announced = time.monotonic()
                log(f"waiting for nodes: {len(self._present)} of {wanted} are there")
            time.sleep(POLL_SECONDS)

    def refresh(self, *, timeout: float = QUERY_TIMEOUT_SECONDS) -> None:
        """Look which nodes are there, and ask new ones to introduce themselves.

        A node that was refused is asked again when it has left and comes back.

        Args:
            timeout: seconds that they have to answer.

        Raises:
            RuntimeError: the simulated clients run other code than the server.
        """
        connected = set(self._grid.get_node_ids())
        self._present = {c: node for c, node in self._present.items() if node in connected}
        self._refused = {node: why for node, why in self._refused.items() if node in connected}
        new = sorted(connected - set(self._present.values()) - set(self._refused))
        messages = {
            node: addressed(
                RecordDict(),
                node_id=node,
                message_type=MessageType.QUERY,
                timeout=timeout,
            )
            for node in new
        }
        replies = exchange(
            self._grid,
            messages,
            timeout=timeout,
            poll_seconds=POLL_SECONDS,
            at_once=QUERIES_AT_ONCE,
        )
        # Sorted, so that numbers do not depend on who answers first.
        for reply in sorted(replies, key=lambda reply: reply.client):
            self._welcome(reply.client, reply, timeout=timeout)

    def _welcome(self, node: int, reply: Reply, *, timeout: float) -> None:
        if reply.message is None or reply.message.has_error():
            self._excuse(node, reply, timeout=timeout)
            return
        said = record_of(reply.message.content, Key.CONFIG, ConfigRecord)
        if Key.FINGERPRINT not in said:
            self._refuse(node, f"no {Key.FINGERPRINT.value} in {Key.CONFIG.value!r} of its reply")
            return
        same_code = said[Key.FINGERPRINT] == code_fingerprint()
        if Key.PARTITION_ID in said or Key.NUM_PARTITIONS in said:
            share = self._share_of(said)
            if share is None:
                self._refuse(node, "it claims a share of a simulation that there is not")
                return
            if not same_code:
                raise RuntimeError(
                    "the simulated clients run other code than the server: Flower's SuperLink was "
                    "started in another checkout of feddm; end it, or use feddm-train"
                )
            # Node ids of a simulation are new at every start, partition-ids are not.
            number, self.num_partitions = share
            self._present[number] = node
        elif self.num_partitions is not None:
            self._refuse(node, "it is no share of the simulation that the others are of")
        elif same_code:
            number = self._numbers.get(node, max(self._numbers.values(), default=-1) + 1)
            self._numbers[node] = number
            self._present[number] = node
        else:
            self._refuse(node, "it runs other code than the server")

    def _share_of(self, said: ConfigRecord) -> tuple[int, int] | None:
        """Return number and count of shares that a node claims, where they can be true."""
        share, shares = said.get(Key.PARTITION_ID), said.get(Key.NUM_PARTITIONS)
        if not isinstance(share, int) or not isinstance(shares, int):
            return None
        real_nodes = bool(self._numbers)
        if real_nodes or self.num_partitions not in (None, shares):
            return None
        return (share, shares) if 0 <= share < shares and share not in self._present else None

    def _excuse(self, node: int, reply: Reply, *, timeout: float) -> None:
        """Refuse a node that failed; one that was only slow is asked again."""
        slow = reply.message is None or reply.message.error.code in SLOW_CODES
        try:
            checked_content(reply, timeout=timeout)
        except UnusableReply as error:
            if slow:
                log(f"node {node} has not introduced itself yet: {error}")
            else:
                self._refuse(node, str(error))

    def _refuse(self, node: int, reason: str) -> None:
        self._refused[node] = f"node {node} was refused: {reason}"
        log(self._refused[node])


def sample_clients(
    available: Sequence[int], clients_per_round: int | None, *, seed: int, server_round: int
) -> list[int]:
    """Draw the clients of a round without replacement, from (seed, round) alone.

    Args:
        available: client numbers.
        clients_per_round: how many; None, or more than there are, means all.
        seed: of the run.
        server_round: 1-based.

    Returns:
        Client numbers, sorted.
    """
    if clients_per_round is None or clients_per_round >= len(available):
        return sorted(available)
    generator = numpy_generator(seed, Stream.CLIENT_SAMPLING, server_round)
    drawn = generator.choice(sorted(available), size=clients_per_round, replace=False)
    return sorted(int(client) for client in drawn)
