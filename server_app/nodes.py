"""Which node is which client, and which of them train in a round."""

import dataclasses
import time
from collections.abc import Iterable, Mapping, Sequence

from flwr.app import ConfigRecord, Message, MessageType, RecordDict
from flwr.serverapp import Grid

from server_app.hospitals.registry import HospitalsFile
from server_app.log import log
from server_app.messages import addressed, pull_reply, record_of
from server_app.replies import (
    SLOW_CODES,
    Introduction,
    Reply,
    UnusableReply,
    checked_content,
    read_introduction,
    read_keys,
)
from task.code_version import code_fingerprint
from task.protocol.wire import Key
from task.randomness import Stream, numpy_generator

QUERY_TIMEOUT_SECONDS = 120.0
# What a round waits for nodes that have just come: the server and a node look every 3 s, and a
# node takes about as long to start the process that answers.
GRACE_SECONDS = 15.0
# A node that was refused is asked again after so long: its disk may be back.
REFUSED_SECONDS = 600.0
# Between two looks at a simulation, whose network is in memory, and at a real network.
LOOK_SIMULATION, LOOK_NETWORK = 0.05, 1.0
# A simulation compares each message that is out with each node, ten times a second.
QUERIES_AT_ONCE = 64

TIME_FORMAT = "%Y-%m-%d %H:%M:%S"


class Introductions:
    """Queries to nodes that are out, each until it is answered or has expired."""

    def __init__(self, grid: Grid, extractor: str, *, secure: bool) -> None:
        self._grid = grid
        asked = ConfigRecord({Key.EXTRACTOR: extractor, Key.SECURE_AGGREGATION: secure})
        self._content = RecordDict({Key.CONFIG: asked})
        self._out: dict[int, tuple[Message, float]] = {}
        self._tardy: set[int] = set()

    def forget_all_but(self, connected: set[int]) -> None:
        """Drop what was asked of nodes that have left: they are asked anew when they return."""
        self._out = {node: asked for node, asked in self._out.items() if node in connected}
        self._tardy &= connected

    def ask(self, nodes: Iterable[int]) -> None:
        """Ask nodes to introduce themselves, unless they are asked already or too many are."""
        recent = sum(sent > time.monotonic() - GRACE_SECONDS for _, sent in self._out.values())
        new = [node for node in sorted(nodes) if node not in self._out]
        messages = {
            node: addressed(
                self._content,
                node_id=node,
                message_type=MessageType.QUERY,
                timeout=QUERY_TIMEOUT_SECONDS,
            )
            for node in new[: max(QUERIES_AT_ONCE - recent, 0)]
        }
        if not messages:
            return
        # Flower takes no message to a node that has just left, and leaves its id out.
        taken = set(self._grid.push_messages([*messages.values()]))
        for node, message in messages.items():
            if message.metadata.message_id in taken:
                self._out[node] = message, time.monotonic()

    def answers(self) -> dict[int, Message]:
        """Take the answers that have come, by node, sorted; a node that was slow has none."""
        found: dict[int, Message] = {}
        for node in self.unanswered():
            message, sent = self._out[node]
            answer = pull_reply(self._grid, message)
            expired = time.monotonic() - sent > QUERY_TIMEOUT_SECONDS
            slow = answer is not None and answer.has_error() and answer.error.code in SLOW_CODES
            if answer is None and not expired:
                continue
            del self._out[node]
            if answer is None or slow:
                self.do_not_wait_for(node)
                log(f"node {node} has not introduced itself yet")
            else:
                found[node] = answer
        return found

    def unanswered(self) -> list[int]:
        """Return the nodes whose queries are out, sorted."""
        return sorted(self._out)

    def do_not_wait_for(self, node: int) -> None:
        """Let nobody wait for the next answer of a node, which may be long in coming."""
        self._tardy.add(node)

    def are_awaited(self, patience: float) -> bool:
        """Whether a node that has answered in time so far was asked less than `patience` ago."""
        since = time.monotonic() - patience
        return any(sent > since for node, (_, sent) in self._out.items() if node not in self._tardy)


class Nodes:
    """The nodes of a run by client number.

    In a simulation the number is the partition-id. A real node gets the next free number when it
    is first seen, and keeps it: Flower gives it the same node id for the same key, until its
    database is lost. The number is that of the key, where the coordinator's file knows it.

    Attributes:
        num_partitions: number of shares of a simulation, once a node has said it; None with
            real nodes.
        introduced: what each client says of its images, by its number.
        names: of the hospitals that the coordinator's file knows, by client number.
    """

    def __init__(
        self,
        grid: Grid,
        *,
        simulated: bool,
        num_classes: int,
        extractor: str,
        package: str = "",
        counted: bool = True,
        secure: bool = False,
        known: Mapping[int, int] | None = None,
        hospitals: HospitalsFile | None = None,
    ) -> None:
        """Start without nodes.

        Args:
            grid: Flower's view of the network.
            simulated: whether the nodes are shares of a simulation; what they claim is held
                against it.
            num_classes: of the data.
            extractor: that real nodes are to score images through, settled.
            package: that brings the family of the model, see `code_fingerprint`; the clients of a
                simulation have the server's.
            counted: whether real nodes must say how many images they have.
            secure: whether nodes must say the keys of their hospitals, for secure aggregation.
            known: client numbers by node id, from an earlier start of the same run.
            hospitals: the coordinator's file; None where there is none, as in a simulation.

        Raises:
            ValueError: the file is damaged.
            OSError: it cannot be read.
        """
        self.num_partitions: int | None = None
        self.introduced: dict[int, Introduction] = {}
        self.names: dict[int, str] = {}
        self._grid = grid
        self._simulated = simulated
        self._num_classes = num_classes
        self._counted = counted and not simulated
        self._fingerprint = code_fingerprint("" if simulated else package)
        self._numbers = dict(known or {})
        self._hospitals_file = hospitals
        # Why it could not be read last.
        self._unreadable = ""
        self._hospitals = hospitals.by_node() if hospitals is not None else {}
        for node, number in self._numbers.items():
            self._keep_name(node, number)
        self._present: dict[int, int] = {}
        self._secure = secure
        self._introductions = Introductions(grid, extractor, secure=secure)
        # They have introduced themselves and get their numbers together.
        self._newcomers: dict[int, Introduction] = {}
        self._refused: dict[int, tuple[str, float]] = {}
        self._left: dict[int, str] = {}

    @property
    def node_ids(self) -> dict[int, int]:
        """Node ids by client number, of the nodes that are there now, sorted by number."""
        return dict(sorted(self._present.items()))

    @property
    def numbers(self) -> dict[int, int]:
        """Client numbers by node id, of every real node ever seen; for the run directory."""
        return dict(self._numbers)

    @property
    def number_known(self) -> int:
        """How many clients there are, with those that are not there now."""
        return max(len({*self._numbers.values()}), len(self._present))

    def described(self, client: int) -> str:
        """Name a client by its number, and by its hospital where that is known."""
        name = f" ({self.names[client]})" if client in self.names else ""
        return f"client {client}{name}"

    def _of_node(self, client: int, node: int) -> str:
        named = f"{self.names[client]}, " if client in self.names else ""
        return f"client {client} ({named}node {node})"

    def wait_for(
        self, minimum: int, *, seconds: float, patience: float = QUERY_TIMEOUT_SECONDS
    ) -> None:
        """Wait until enough nodes are there and have introduced themselves.

        Args:
            minimum: nodes; a simulation waits for all of its nodes.
            seconds: how long to wait for them.
            patience: how long to wait, once they are there, for others that have just come.
                Whoever answers later is there at the next call.

        Raises:
            TimeoutError: they did not come; says who is missing, and who was refused and why.
            ValueError: a simulation has fewer nodes than `minimum`.
            RuntimeError: the simulated clients run other code than the server.
        """
        poll_seconds = LOOK_SIMULATION if self._simulated else LOOK_NETWORK
        deadline = time.monotonic() + seconds
        # Those of a simulation are there as soon as Ray has started.
        announced = time.monotonic() if self._simulated else 0.0
        while True:
            self._look()
            wanted = self._wanted(minimum)
            ready = len(self._present) + len(self._newcomers)
            late = time.monotonic() > deadline
            if ready >= wanted and (late or not self._introductions.are_awaited(patience)):
                self._admit_newcomers()
                return
            if late:
                raise TimeoutError(
                    f"{ready} of {wanted} nodes are ready after "
                    f"federation.node_wait={seconds:g} s: {self._described_absence()}"
                )
            if ready < wanted and time.monotonic() - announced > 30:
                announced = time.monotonic()
                awaited = "Ray" if self._simulated else self._described_wait(ready, wanted)
                log(f"waiting for {awaited}")
            time.sleep(min(poll_seconds, max(deadline - time.monotonic(), 0.01)))

    def doubt(self, client: int, why: str) -> None:
        """Take a client for absent until it introduces itself again.

        Args:
            client: its number.
            why: for the log.
        """
        node = self._present.pop(client)
        self._left[client] = time.strftime(TIME_FORMAT)
        self._introductions.do_not_wait_for(node)
        log(f"{self._of_node(client, node)} {why}; it is asked to introduce itself again")

    def num_images(self, client: int) -> int | None:
        """Return how many images a client said that it has; None in a simulation."""
        return self.introduced[client].num_images

    def _wanted(self, minimum: int) -> int:
        if self.num_partitions is not None and self.num_partitions < minimum:
            raise ValueError(
                "federation.min_nodes must be at most the number of simulated nodes, "
                f"{self.num_partitions}, got {minimum}"
            )
        return max(minimum, self.num_partitions or 0)

    def _look(self) -> None:
        """Look which nodes are there, ask new ones to introduce themselves and hear who did."""
        connected = set(self._grid.get_node_ids())
        self._note_departures(connected)
        self._introductions.forget_all_but(connected)
        again = time.monotonic() - REFUSED_SECONDS
        refused = {node for node, (_, since) in self._refused.items() if since > again}
        known = refused | set(self._present.values()) | set(self._newcomers)
        new = connected - known - {*self._introductions.unanswered()}
        if new:
            self._read_hospitals()
        removed = {node for node in new & self._hospitals.keys() if self._hospitals[node].removed}
        for node in sorted(removed):
            self._refuse(node, "its key was removed; feddm-hospitals restore tells the SuperLink")
        self._introductions.ask(connected - known - removed)
        for node, answer in self._introductions.answers().items():
            try:
                self._welcome(node, checked_content(Reply(node, answer, sent=0.0), timeout=0.0))
            except UnusableReply as reason:
                self._refuse(node, str(reason))

    def _note_departures(self, connected: set[int]) -> None:
        for client, node in self.node_ids.items():
            if node not in connected:
                del self._present[client]
                self._left[client] = time.strftime(TIME_FORMAT)
                log(f"{self._of_node(client, node)} has left")
        self._refused = {node: why for node, why in self._refused.items() if node in connected}
        self._newcomers = {node: n for node, n in self._newcomers.items() if node in connected}

    def _welcome(self, node: int, content: RecordDict) -> None:
        """Take a node up that has introduced itself.

        Raises:
            UnusableReply: what it says is not what a node of this run says.
            RuntimeError: the simulated clients run other code than the server.
        """
        said = record_of(content, Key.CONFIG, ConfigRecord)
        if Key.FINGERPRINT not in said:
            raise UnusableReply(f"no {Key.FINGERPRINT.value} in {Key.CONFIG.value!r} of its reply")
        same_code = said[Key.FINGERPRINT] == self._fingerprint
        claims_share = Key.PARTITION_ID in said or Key.NUM_PARTITIONS in said
        if claims_share and not self._simulated:
            raise UnusableReply(
                "it claims a share of a simulation that there is not; start it without "
                f"{Key.PARTITION_ID.value} and {Key.NUM_PARTITIONS.value} in its --node-config"
            )
        if not same_code and self._simulated:
            raise RuntimeError(
                "the simulated clients run other code than the server: Flower's SuperLink was "
                "started in another checkout of feddm; end it, or use feddm-train"
            )
        if not same_code:
            raise UnusableReply("it runs other code than the server")
        introduction = read_introduction(said, num_classes=self._num_classes, counted=self._counted)
        if self._secure:
            introduction = dataclasses.replace(introduction, keys=read_keys(said))
        self._refused.pop(node, None)
        if self._simulated:
            # Node ids of a simulation are new at every start, partition-ids are not.
            number, self.num_partitions = self._share_of(said)
            self._present[number], self.introduced[number] = node, introduction
        else:
            self._newcomers[node] = introduction

    def _share_of(self, said: ConfigRecord) -> tuple[int, int]:
        """Return number and count of shares that a simulated node claims."""
        share, shares = said.get(Key.PARTITION_ID), said.get(Key.NUM_PARTITIONS)
        if not isinstance(share, int) or not isinstance(shares, int):
            raise UnusableReply("it does not say which share of the simulation it is")
        consistent = self.num_partitions in (None, shares) and share not in self._present
        if not consistent or not 0 <= share < shares:
            raise UnusableReply("it claims a share of a simulation that there is not")
        return share, shares

    def _admit_newcomers(self) -> None:
        """Give numbers; sorted, so that they do not depend on who answered first."""
        for node, introduction in sorted(self._newcomers.items(), key=lambda newcomer: newcomer[0]):
            own = self._hospitals[node].nodes if node in self._hospitals else (node,)
            # The first, to which belongs what the hospital has kept.
            before = [self._numbers[each] for each in own if each in self._numbers]
            number = before[0] if before else max(self._numbers.values(), default=-1) + 1
            self._numbers[node] = number
            self._present[number], self.introduced[number] = node, introduction
            self._left.pop(number, None)
            self._keep_name(node, number)
            log(f"{self._of_node(number, node)} {'is back' if before else 'has joined'}")
        self._newcomers.clear()

    def _keep_name(self, node: int, number: int) -> None:
        if node in self._hospitals:
            self.names[number] = self._hospitals[node].name

    def _read_hospitals(self) -> None:
        """Read again who the nodes are, some of whom may just have been registered."""
        if self._hospitals_file is None:
            return
        try:
            self._hospitals = self._hospitals_file.by_node()
        except (OSError, ValueError) as error:  # at the start it ends the run
            if str(error) != self._unreadable:
                log(f"hospitals are known as they were at the last look: {error}")
            self._unreadable = str(error)

    def _described_node(self, node: int) -> str:
        """Name a node by its id, and by its hospital where that is known."""
        name = f" ({self._hospitals[node].name})" if node in self._hospitals else ""
        return f"node {node}{name}"

    def _refuse(self, node: int, reason: str) -> None:
        said = f"{self._described_node(node)} was refused: {reason}"
        self._refused[node] = said, time.monotonic()
        # It is asked again, but no round waits for what it says then.
        self._introductions.do_not_wait_for(node)
        log(self._refused[node][0])

    def _described_wait(self, ready: int, wanted: int) -> str:
        """Say how many nodes a round lacks, and what those do that are online."""
        counts = {
            "asked to introduce themselves": len(self._introductions.unanswered()),
            "refused": len(self._refused),
        }
        others = [f"{number} {what}" for what, number in counts.items() if number]
        return f"nodes: {ready} of {wanted} are ready; {', '.join(others) or 'no other is online'}"

    def _described_absence(self) -> str:
        """Say which clients are missing and since when, and which nodes were refused and why."""
        there = set(self._present.values()) | set(self._newcomers)
        # The last node id of each, for a lost database has known it under another.
        last = {number: node for node, number in self._numbers.items()}
        numbers_there = {self._numbers[node] for node in there if node in self._numbers}
        reasons = [
            f"{self._of_node(number, last[number])} is missing "
            + (f"since {self._left[number]}" if number in self._left else "since this start")
            for number in sorted(last.keys() - numbers_there)
        ]
        reasons += [reason for reason, _ in self._refused.values()]
        silent = [node for node in self._introductions.unanswered() if node not in self._refused]
        reasons += [
            f"{self._described_node(node)} has not introduced itself yet" for node in silent
        ]
        return "; ".join(reasons) or "no other node connected"


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
