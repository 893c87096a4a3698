import math
import threading
import time
from collections.abc import Iterator

import pytest
from flwr.app import ConfigRecord, Error, Message, RecordDict
from flwr.common.constant import ErrorCode
from flwr.proto.message_pb2 import Message as ProtoMessage

from server_app.exchange import Repetition, exchange
from server_app.messages import addressed
from server_app.replies import Reply, UnusableReply, checked_content
from server_app.timing import PhaseTimer
from task.protocol.wire import Key
from tests.helpers import Network


def echo(message: Message) -> Message:
    return Message(RecordDict({Key.CONFIG: message.content[Key.CONFIG]}), reply_to=message)


def sent_to(nodes: list[int], *, ttl: float = 3600) -> dict[int, Message]:
    """Messages to clients that are numbered against the order of their nodes."""
    return {
        client: Message(
            RecordDict({Key.CONFIG: ConfigRecord({"n": client})}), node, "train", ttl=ttl
        )
        for client, node in zip(reversed(range(len(nodes))), nodes, strict=True)
    }


def replies(
    network: Network,
    messages: dict[int, Message],
    *,
    timeout: float = 20,
    at_once: int | None = None,
    repetition: Repetition | None = None,
) -> Iterator[Reply]:
    options = {"timeout": timeout, "poll_seconds": 0.01, "at_once": at_once or len(messages)}
    return exchange(network.grid, messages, **options, phases=PhaseTimer(), repetition=repetition)


@pytest.mark.parametrize("order", [(0, 1, 2, 3), (3, 2, 1, 0), (2, 0, 3, 1)])
def test_replies_are_yielded_in_the_order_of_their_arrival(order: tuple[int, ...]) -> None:
    network = Network()
    messages = sent_to(network.add_nodes(4))

    def arrange(found: list[Message]) -> list[Message]:
        return sorted(found, key=lambda m: order.index(m.content[Key.CONFIG]["n"]))

    with network.answering(echo, order=arrange):
        found = [*replies(network, messages)]
    assert [reply.client for reply in found] == [*order]
    for reply in found:
        assert reply.message is not None
        assert reply.message.content[Key.CONFIG]["n"] == reply.client


def test_reply_is_yielded_while_others_are_still_awaited() -> None:
    network = Network()
    messages = sent_to(network.add_nodes(2))
    seen = threading.Event()

    def patient(message: Message) -> Message:
        if message.content[Key.CONFIG]["n"] == 0:
            assert seen.wait(10), "the first reply was not yielded before the second came"
        return echo(message)

    with network.answering(patient, order=lambda found: found):
        arriving = replies(network, messages)
        assert next(arriving).client == 1
        seen.set()
        assert next(arriving).client == 0
        assert [*arriving] == []


def test_one_reply_is_taken_from_the_network_at_a_time() -> None:
    network = Network()
    messages = sent_to(network.add_nodes(3))
    arriving = replies(network, messages)
    ready = threading.Thread(target=lambda: answer_all(network, 3))
    ready.start()
    for taken in (1, 2, 3):
        next(arriving)
        ready.join()
        assert network.state.num_message_res() == 3 - taken


def answer_all(network: Network, number: int) -> None:
    """Hand over all replies at once."""
    waiting: list[Message] = []
    while len(waiting) < number:
        waiting += network.waiting()
    with network.state.lock:
        for message in waiting:
            network.store_reply(echo(message))


def test_missing_reply_is_yielded_as_none_at_the_deadline() -> None:
    network = Network()
    messages = sent_to(network.add_nodes(3))
    silent = messages[1].metadata.dst_node_id
    start = time.monotonic()
    with network.answering(lambda m: None if m.metadata.dst_node_id == silent else echo(m)):
        found = [*replies(network, messages, timeout=0.5)]
    assert 0.5 <= time.monotonic() - start < 3
    assert [reply.client for reply in found][-1] == 1 and len(found) == 3
    assert [reply.message is None for reply in found] == [False, False, True]


def test_late_reply_is_an_error_of_the_network_before_the_deadline() -> None:
    network = Network()
    (node,) = network.add_nodes(1)
    message = addressed(RecordDict(), node_id=node, message_type="train", timeout=0.4)
    start = time.monotonic()
    (reply,) = replies(network, {5: message}, timeout=0.4)
    assert reply.client == 5 and reply.message is not None and reply.message.has_error()
    assert time.monotonic() - start < 0.4 + 0.1
    with pytest.raises(UnusableReply, match=r" \(code \d+\)$"):
        checked_content(reply, timeout=0.4)


def test_error_replies_are_replies() -> None:
    network = Network()
    messages = sent_to(network.add_nodes(2))
    with network.answering(lambda m: Message(Error(code=102, reason="OSError"), reply_to=m)):
        found = [*replies(network, messages)]
    assert sorted(reply.client for reply in found) == [0, 1]
    assert all(reply.message is not None and reply.message.has_error() for reply in found)


def test_reply_that_flower_cannot_read_is_unusable_and_the_others_reply() -> None:
    network = Network()
    messages = sent_to(network.add_nodes(3))
    pull = network.grid.pull_messages

    def pulled(message_ids: list[str]) -> list[Message]:
        found = list(pull(message_ids))
        if found and message_ids == [messages[1].metadata.message_id]:
            ProtoMessage.FromString(b"no message")
        return found

    network.grid.pull_messages = pulled  # type: ignore[method-assign]
    with network.answering(echo):
        found = {reply.client: reply for reply in replies(network, messages)}
    with pytest.raises(UnusableReply, match="its reply cannot be read"):
        checked_content(found[1], timeout=20)
    assert [checked_content(found[n], timeout=20)[Key.CONFIG]["n"] for n in (0, 2)] == [0, 2]


@pytest.mark.parametrize("at_once", [1, 2, 5, 9, None])
def test_no_more_clients_than_allowed_are_asked_at_once_and_all_reply(at_once: int | None) -> None:
    network = Network()
    messages = sent_to(network.add_nodes(9))
    unanswered: list[int] = []

    def watch(message: Message) -> Message:
        unanswered.append(network.state.num_message_ins())
        return echo(message)

    with network.answering(watch):
        found = [*replies(network, messages, at_once=at_once)]
    assert sorted(reply.client for reply in found) == [*range(9)]
    assert all(reply.message is not None and not reply.message.has_error() for reply in found)
    assert max(unanswered) == (at_once or 9)


def test_next_client_is_asked_when_a_reply_has_been_used() -> None:
    network = Network()
    messages = sent_to(network.add_nodes(3))
    arriving = replies(network, messages, at_once=1)
    with network.answering(echo):
        for asked in (1, 2, 3):
            next(arriving)
            time.sleep(0.05)  # in which nobody else is asked
            assert sum(m.metadata.message_id != "" for m in messages.values()) == asked


def test_silent_client_holds_up_nobody_for_long() -> None:
    network = Network()
    messages = sent_to(network.add_nodes(4))
    first = next(iter(messages))
    silent = messages[first].metadata.dst_node_id
    with network.answering(lambda m: None if m.metadata.dst_node_id == silent else echo(m)):
        found = {r.client: r for r in replies(network, messages, timeout=2, at_once=1)}
    assert [c for c, r in found.items() if r.message is None or r.message.has_error()] == [first]
    assert found[first].sent is not None


def test_clients_whose_turn_never_came_are_named_as_not_asked() -> None:
    network = Network()
    messages = sent_to(network.add_nodes(30))
    found = [*replies(network, messages, timeout=0.5, at_once=1)]  # nobody answers
    assert sorted(reply.client for reply in found) == [*range(30)]
    never = [reply for reply in found if reply.sent is None]
    assert 15 <= len(never) < 30
    assert all(messages[reply.client].metadata.message_id == "" for reply in never)
    with pytest.raises(UnusableReply, match=r"^not asked: its turn did not come within 0\.5 s$"):
        checked_content(never[0], timeout=0.5)


@pytest.mark.parametrize("at_once", [1, 2, None])
@pytest.mark.parametrize("gone", [(1,), (0, 2), (0, 1, 2)])
def test_nodes_that_have_left_are_accounted_for_and_the_others_reply(
    gone: tuple[int, ...], at_once: int | None
) -> None:
    # Unregistered after the list of nodes was made: Flower takes no message to them.
    network = Network()
    messages = sent_to(network.add_nodes(3))
    for client in gone:
        network.remove_node(messages[client].metadata.dst_node_id)
    with network.answering(echo):
        arrived = replies(network, messages, timeout=1, at_once=at_once)
        found = {reply.client: reply.message for reply in arrived}
    assert sorted(found) == [0, 1, 2]
    for client, message in found.items():
        assert (message is None or message.has_error()) == (client in gone)


def test_nothing_to_send_ends_at_once() -> None:
    assert [*replies(Network(), {})] == []


@pytest.mark.parametrize("lost", ["question", "error of the network", "reply late"])
def test_silent_client_is_asked_again_once_and_counts_once(lost: str) -> None:
    network = Network()
    messages = sent_to(network.add_nodes(2))
    asked: list[int] = []
    late: list[Message] = []

    def answer(message: Message) -> Message | None:
        client = int(message.content[Key.CONFIG]["n"])
        asked.append(client)
        if client == 0 or asked.count(1) > 1:
            if client == 1 and late:
                with network.state.lock:
                    first = late.pop()
                    gone = Error(code=ErrorCode.NODE_UNAVAILABLE, reason="it has left")
                    error = Message(gone, reply_to=first)
                    network.store_reply(echo(first) if lost == "reply late" else error)
            return echo(message)
        late.extend([message] * (lost != "question"))
        return None

    def again(client: int, seconds: float) -> Message:
        assert 0 < seconds < 20
        node = messages[client].metadata.dst_node_id
        return Message(RecordDict({Key.CONFIG: ConfigRecord({"n": client})}), node, "train")

    again_to: list[int] = []
    repetition = Repetition(
        lambda client: 0.2 if client == 1 else math.inf, again, again_to.append, surplus := []
    )
    with network.answering(answer):
        found = [*replies(network, messages, repetition=repetition)]
        assert again_to == [1]
        # What comes twice is taken from the network by the next exchange.
        assert len(surplus) == (lost != "error of the network")
        if lost == "reply late":
            more = sent_to([messages[0].metadata.dst_node_id])
            assert len([*replies(network, more, repetition=repetition)]) == 1
            assert surplus == [] and network.state.num_message_res() == 0
    assert asked.count(1) == 2
    assert sorted(reply.client for reply in found) == [0, 1]
    for reply in found:
        assert reply.message is not None
        assert not reply.message.has_error(), reply.message.error


def test_client_that_stays_silent_is_asked_twice_and_missing_once() -> None:
    network = Network()
    messages = sent_to(network.add_nodes(2))
    asked: list[int] = []

    def answer(message: Message) -> Message | None:
        asked.append(int(message.content[Key.CONFIG]["n"]))
        return echo(message) if asked[-1] == 0 else None

    def again(client: int, seconds: float) -> Message:
        node = messages[client].metadata.dst_node_id
        return Message(RecordDict({Key.CONFIG: ConfigRecord({"n": client})}), node, "train")

    repetition = Repetition(lambda client: 0.1 if client else math.inf, again, lambda _: None, [])
    with network.answering(answer):
        found = [*replies(network, messages, timeout=0.8, repetition=repetition)]
    assert asked.count(1) == 2 and asked.count(0) == 1
    assert [(reply.client, reply.message is None) for reply in found] == [(0, False), (1, True)]
