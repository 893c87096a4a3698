"""Messages out, replies in: with a deadline, one at a time, and never an endless wait."""

import math
import os
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Generic, TypeVar, cast

import ray
from flwr.app import ArrayRecord, Message, MessageType, RecordDict
from flwr.serverapp import Grid
from flwr.superlink.grid import InMemoryGrid

from server_app.log import log
from server_app.messages import TTL_SHARE, Entries, addressed, pull_reply, record_of
from server_app.nodes import Nodes
from server_app.replies import (
    NETWORK_CODES,
    FalseClaim,
    Reply,
    UnusableReply,
    check_claim,
    checked_content,
    is_silent,
)
from server_app.timing import PhaseTimer
from task.config import FederationConfig
from task.machine_memory import total_memory
from task.progress import tracked
from task.protocol.wire import Key

# Of an exchange's time: a client that has not answered for so long gives its turn away.
PATIENCE_SHARE = 0.5
# Seconds between two looks for replies: a simulation's network is in memory, and Flower hands
# messages out there every 0.1 s, which a client's turn cannot be quicker than.
POLL_SIMULATION, POLL_NETWORK = 0.02, 2.0
# A real client without a reply is asked again after so many times the longest that it has taken
# for such an answer, and not before so many seconds: its question, or its reply, may be lost.
AGAIN_AFTER_TIMES, AGAIN_AFTER_SECONDS = 3.0, 60.0
# Of this machine's memory, for replies that arrive at once.
MEMORY_SHARE = 0.25
# Small messages that are handed out together, and bytes of messages that may wait as replies.
MANY_AT_ONCE, BYTES_AT_ONCE = 32, 1 << 28

Answer = TypeVar("Answer")


@dataclass(frozen=True)
class Repetition:
    """When and how a client is asked again, whose question or reply may have been lost.

    Attributes:
        after: after how many seconds without a reply a client is asked again; infinite: never.
        message: makes the message once more, of a client, for the seconds that are left.
        asked: is told which client was asked again.
        surplus: second answers that nobody needs, to be taken from the network when they come.
    """

    after: Callable[[int], float]
    message: Callable[[int, float], Message]
    asked: Callable[[int], None]
    surplus: list[Message]


@dataclass(frozen=True)
class Sent:
    """A message without a reply.

    Attributes:
        client: its number.
        message: the message.
        asked: `time.monotonic()` when the client was asked first.
    """

    client: int
    message: Message
    asked: float


class Turns:
    """The messages of an exchange: which wait for their turn, and which are out.

    Attributes:
        waiting: client and message, in the order of their turns.
        pending: messages without a reply, by id.
        refused: what to say of clients whose node Flower takes no message to.
    """

    def __init__(
        self,
        grid: Grid,
        messages: Mapping[int, Message],
        *,
        timeout: float,
        at_once: int,
        repetition: Repetition | None,
    ) -> None:
        """Line the messages up; see `exchange`."""
        self.waiting = deque(messages.items())
        self.pending: dict[str, Sent] = {}
        self.refused: list[Reply] = []
        self._grid = grid
        self._repetition = repetition
        self._ends = time.monotonic() + timeout
        # Clients that were asked twice.
        self._asked_again: set[int] = set()
        self._at_once = at_once
        self._patience = PATIENCE_SHARE * timeout

    def send(self) -> None:
        """Send as many as may be unanswered at once."""
        while room := min(self._room(), len(self.waiting)):
            batch = [self.waiting.popleft() for _ in range(room)]
            # Flower takes no message to a node that has just left, and leaves its id out.
            taken = set(self._grid.push_messages([message for _, message in batch]))
            sent = time.monotonic()
            for client, message in batch:
                message_id = message.metadata.message_id
                if message_id in taken:
                    self.pending[message_id] = Sent(client, message, sent)
                else:
                    self.refused.append(Reply(client, None, sent))

    def send_again(self) -> None:
        """Ask clients again, once, that have been silent for too long."""
        if self._repetition is None:
            return
        now = time.monotonic()
        for each in list(self.pending.values()):
            left = self._ends - now
            silent = now - each.asked > self._repetition.after(each.client)
            if each.client in self._asked_again or not silent or left <= 0:
                continue
            message = self._repetition.message(each.client, left)
            # Flower gives the message its id here.
            if any(self._grid.push_messages([message])):
                self._asked_again.add(each.client)
                self._repetition.asked(each.client)
                self.pending[message.metadata.message_id] = replace(each, message=message)

    def settle(self, message_id: str, reply: Message) -> bool:
        """Take note of a reply; returns whether it is the client's answer.

        An error of the network is not, while the client may still answer its other message.
        """
        client = self.pending.pop(message_id).client
        others = [each for each, sent in self.pending.items() if sent.client == client]
        if others and reply.has_error() and reply.error.code in NETWORK_CODES:
            return False
        surplus = [self.pending.pop(each).message for each in others]
        if self._repetition is not None:
            self._repetition.surplus.extend(surplus)
        return True

    def drop_surplus(self) -> None:
        """Take second answers from the network, which would keep them until the run's end."""
        if self._repetition is not None:
            surplus = self._repetition.surplus
            surplus[:] = [each for each in surplus if pull_reply(self._grid, each) is None]

    def _room(self) -> int:
        patient = time.monotonic() - self._patience
        held = len({each.client for each in self.pending.values() if each.asked > patient})
        return max(self._at_once - held, 0)

    def unanswered(self) -> Iterator[Reply]:
        """Say of every client without a reply when it was asked, if it was."""
        asked = {each.client: each.asked for each in self.pending.values()}
        yield from (Reply(client, None, sent) for client, sent in asked.items())
        yield from self.refused
        yield from (Reply(client, None) for client, _ in self.waiting)


def exchange(
    grid: Grid,
    messages: Mapping[int, Message],
    *,
    timeout: float,
    poll_seconds: float,
    at_once: int,
    phases: PhaseTimer,
    is_over: Callable[[], bool] = lambda: False,
    repetition: Repetition | None = None,
) -> Iterator[Reply]:
    """Send a message to each client and yield replies as they arrive, then what never came.

    Where not all go out at once, the next goes out when a reply was pulled and used, so that
    replies cannot pile up in the network.

    Args:
        grid: Flower's view of the network.
        messages: a new message for each client number, sent in this order.
        timeout: seconds until the exchange ends.
        poll_seconds: pause between two looks at what has come.
        at_once: how many may be unanswered. A client that is silent for `PATIENCE_SHARE` of the
            time no longer counts, so that it holds up nobody.
        phases: are told when this sends, and when it waits.
        is_over: whether what has come is enough; nothing is said of the others then.
        repetition: when a client is asked again; None: never.
    """
    start = time.monotonic()
    turns = Turns(grid, messages, timeout=timeout, at_once=at_once, repetition=repetition)

    def send() -> None:
        # What would expire on its way is not sent.
        if turns.waiting and time.monotonic() - start < TTL_SHARE * timeout:
            phases.enter("sending")
            turns.send()
        phases.enter("waiting")

    turns.drop_surplus()
    send()
    while turns.pending:
        idle = True
        for message_id in list(turns.pending):
            sent = turns.pending.get(message_id)
            if sent is not None and (reply := pull_reply(grid, sent.message)) is not None:
                idle = False
                if turns.settle(message_id, reply):
                    yield Reply(sent.client, reply, sent.asked)
                    send()
        if time.monotonic() - start > timeout:
            break
        if is_over():
            return
        if idle:
            turns.drop_surplus()
            time.sleep(poll_seconds)
            turns.send_again()
            send()
    yield from turns.unanswered()


def is_simulation(grid: Grid) -> bool:
    """Whether the nodes of a run are simulated in this process, whatever they say of themselves.

    Flower gives the ServerApp of a simulation a view of this process's memory, under `flwr run` as
    under `feddm-train`, and that of a deployment one of the network.
    """
    return isinstance(grid, InMemoryGrid)


def simulated_at_once(message_bytes: int) -> int:
    """Return how many simulated clients to keep asked, so that no process of Ray's ever idles.

    Flower hands out what waits every 0.1 s, and for it compares each message with each node:
    many small messages want to go together, but not all of a thousand. Each reserves at least a
    core, so there are no more processes than cores.

    Args:
        message_bytes: of one message.
    """
    cores = os.cpu_count() or 1
    if ray.is_initialized():
        cores = int(ray.cluster_resources().get("CPU", 1))  # type: ignore[no-untyped-call]
    return max(2 * cores, min(MANY_AT_ONCE, BYTES_AT_ONCE // message_bytes))


@dataclass(frozen=True)
class Question(Generic[Answer]):
    """What clients are asked in an exchange.

    Attributes:
        message_type: Flower's, such as "train" or "evaluate.scores".
        content: the records that all messages share.
        read: returns what a reply says, or raises UnusableReply: the client is left out.
    """

    message_type: str
    content: RecordDict
    read: Callable[[RecordDict], Answer]

    @property
    def activity(self) -> str:
        """What is asked, in a word: "train", "evaluate" or "scores"."""
        return self.message_type.rpartition(".")[2]


class ClientExchange:
    """Asks the clients of a run, and sorts out the replies that can be used.

    Attributes:
        simulated: whether the nodes are shares of one data set on this machine.
        left_out: why clients were left out of the last exchange, by number.
    """

    def __init__(self, grid: Grid, nodes: Nodes, federation: FederationConfig) -> None:
        """Send nothing yet; `federation` says how long to wait, and for how many at once."""
        self.simulated = is_simulation(grid)
        self.left_out: dict[int, UnusableReply] = {}
        # The longest that clients have taken, by what they were asked and their number.
        self._longest_seconds: dict[tuple[str, int], float] = {}
        self._surplus: list[Message] = []
        self._grid, self._nodes, self._federation = grid, nodes, federation

    def ask(
        self,
        question: Question[Answer],
        server_round: int,
        clients: list[int],
        phases: PhaseTimer,
        *,
        entries: Mapping[int, Entries] | None = None,
        reads: Mapping[int, Callable[[RecordDict], Answer]] | None = None,
        is_over: Callable[[], bool] = lambda: False,
    ) -> Iterator[tuple[int, Answer, float]]:
        """Ask clients and yield what their usable replies say, as they arrive.

        The messages share their arrays. A simulation's network is the memory of this process, and
        keeps them shared; Ray then writes each message into its store for the process that
        trains, and each reply on its way back.

        Args:
            question: to each of them.
            server_round: 1-based.
            clients: their numbers.
            phases: of the exchange.
            entries: of the config record, for each client alone; None: none but its number.
            reads: what reads the reply of a client in place of `question.read`, by its number.
            is_over: see `exchange`.

        Yields:
            Client, what `question.read` returned, and `time.monotonic()` when it was asked.
        """
        timeout = self._federation.round_timeout
        node_ids = self._nodes.node_ids
        self.left_out.clear()

        def message_to(client: int, seconds: float) -> Message:
            return addressed(
                question.content,
                node_id=node_ids[client],
                message_type=question.message_type,
                timeout=seconds,
                entries={
                    Key.CLIENT: client,
                    Key.SERVER_ROUND: server_round,
                    **(entries or {}).get(client, {}),
                },
            )

        asked_again: set[int] = set()

        def note(client: int) -> None:
            asked_again.add(client)
            who = self._nodes.described(client)
            log(f"round {server_round}: {question.activity}: {who} is silent, and is asked again")

        # Each masked sum has masks of its own.
        once = self.simulated or self._federation.secure_aggregation
        repetition = Repetition(
            partial(self._again_after, question), message_to, note, self._surplus
        )
        replies = exchange(
            self._grid,
            {client: message_to(client, timeout) for client in clients},
            timeout=timeout,
            poll_seconds=POLL_SIMULATION if self.simulated else POLL_NETWORK,
            at_once=self._at_once(record_of(question.content, Key.ARRAYS, ArrayRecord)),
            phases=phases,
            is_over=is_over,
            repetition=None if once else repetition,
        )
        stage = f"round {server_round}: {question.activity}, replies of {len(clients)} clients"
        for reply in tracked(replies, len(clients), stage):
            phases.enter("aggregating")
            try:
                content = checked_content(reply, timeout=timeout)
                check_claim(content, self._nodes.num_images(reply.client))
                found = (reads or {}).get(reply.client, question.read)(content)
            except UnusableReply as reason:
                who = self._nodes.described(reply.client)
                log(f"round {server_round}: {who} is left out: {reason}")
                self._leave_out(reply, reason)
            else:
                sent, key = cast(float, reply.sent), (question.activity, reply.client)
                if reply.client not in asked_again:
                    took = time.monotonic() - sent
                    self._longest_seconds[key] = max(took, self._longest_seconds.get(key, 0.0))
                yield reply.client, found, sent

    def _again_after(self, question: Question[Any], client: int) -> float:
        """Return after how many seconds without a reply a client is asked again.

        A training is asked for again where the node keeps its reply.
        """
        trains = question.message_type == MessageType.TRAIN
        if trains and not self._nodes.introduced[client].keeps_replies:
            return math.inf
        # Others' times say nothing of a hospital with more images.
        known = self._longest_seconds.get((question.activity, client), math.inf)
        wait = max(AGAIN_AFTER_TIMES * known, AGAIN_AFTER_SECONDS)
        return min(wait, PATIENCE_SHARE * self._federation.round_timeout)

    def _leave_out(self, reply: Reply, reason: UnusableReply) -> None:
        self.left_out[reply.client] = reason
        if is_silent(reply) and not self.simulated:
            self._nodes.doubt(reply.client, "is silent")
        if isinstance(reason, FalseClaim):
            self._nodes.doubt(reply.client, "claims more images than it said it has")

    def _at_once(self, arrays: ArrayRecord) -> int:
        """Return how many clients may be at work at a time, `federation.max_in_flight`.

        Where it is null, a simulation has as many as keep its processes busy; of real nodes all,
        or as many as could reply at once, with arrays as large as those of a message, into
        `MEMORY_SHARE` of this machine's memory.
        """
        if self._federation.max_in_flight is not None:
            return self._federation.max_in_flight
        # A question about masks has no arrays.
        message_bytes = max(1, sum(len(array.data) for array in arrays.values()))
        if self.simulated:
            return simulated_at_once(message_bytes)
        return max(1, int(total_memory() * MEMORY_SHARE) // message_bytes)
