import io
import math
import threading
import time
from collections.abc import Iterator

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, ConfigRecord, Error, Message, MetricRecord, RecordDict

from server_app.aggregation import SUM_LIMIT, FixedPointSum
from server_app.exchange import (
    Diverged,
    FalseClaim,
    Reply,
    UnusableReply,
    addressed,
    check_claim,
    check_metrics,
    check_update,
    check_weights,
    checked_content,
    exchange,
)
from task.protocol.wire import Key
from tests.helpers import SUPERLINK, Network

SIZE = 4
# What a person reads in a log, and what metrics.jsonl holds, has an end.
LINE_LENGTH = 500


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
) -> Iterator[Reply]:
    return exchange(network.grid, messages, timeout=timeout, poll_seconds=0.01, at_once=at_once)


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


def test_addressed_adds_entries_to_a_copy_of_the_shared_content() -> None:
    Network()
    arrays = ArrayRecord({Key.PACKED: Array(np.ones(SIZE, np.float32))})
    shared = RecordDict({Key.ARRAYS: arrays, Key.CONFIG: ConfigRecord({Key.SERVER_ROUND: 3})})
    made = [
        addressed(shared, node_id=n, message_type="train", timeout=100, entries={Key.CLIENT: c})
        for c, n in enumerate((70, 80))
    ]
    for client, message in enumerate(made):
        config = message.content.config_records[Key.CONFIG]
        assert dict(config) == {Key.SERVER_ROUND: 3, Key.CLIENT: client}
        assert message.content.array_records[Key.ARRAYS] is arrays  # not copied for each
        assert message.metadata.dst_node_id == (70, 80)[client]
        assert message.metadata.message_type == "train"
        assert message.metadata.src_node_id == SUPERLINK
    assert set(shared) == {Key.ARRAYS, Key.CONFIG}
    assert dict(shared.config_records[Key.CONFIG]) == {Key.SERVER_ROUND: 3}


@pytest.mark.parametrize("timeout", [0.1, 7200.0])
def test_messages_expire_before_the_exchange_ends(timeout: float) -> None:
    Network()
    message = addressed(RecordDict(), node_id=7, message_type="query", timeout=timeout)
    assert 0.9 * timeout < message.metadata.ttl < timeout
    assert dict(message.content.config_records[Key.CONFIG]) == {}


def test_no_reply_is_unusable() -> None:
    with pytest.raises(UnusableReply, match=r"^no reply within 7200 s$"):
        checked_content(Reply(3, None, sent=1.0), timeout=7200)


def said_of(error: Error) -> str:
    """Say what a person reads of an error reply."""
    Network()
    asked = addressed(RecordDict(), node_id=7, message_type="train", timeout=60)
    with pytest.raises(UnusableReply) as caught:
        checked_content(Reply(3, Message(error, reply_to=asked), sent=1.0), timeout=60)
    return str(caught.value)


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (
            Error(102, "FileNotFoundError"),
            "FileNotFoundError (code 102): its data cannot be read; its own log names the file or "
            "folder",
        ),
        (
            Error(104, "UnknownClassError"),
            "UnknownClassError (code 104): it has images of a class that is not in data.classes; "
            "its own log names it",
        ),
        (Error(100, "KeyError"), "KeyError (code 100)"),
        (Error(100, "a\n  b\tc\r\n"), "a b c (code 100)"),
        (Error(100, "\x1b[2J\x1b]0;x\x07a\u202eb\x9b\u2028\ud800"), "[2J ]0;x a b (code 100)"),
        (Error(100, "\x00\x1b"), "no reason given (code 100)"),
        (Error(100, None), "no reason given (code 100)"),
        (Error(100, ""), "no reason given (code 100)"),
        # Flower's own texts may name a file of the node.
        (
            Error(2, "[Errno 28] No space left: '/home/dr-x/.flwr/apps'"),
            "its ClientApp could not start; its own log says why (code 2)",
        ),
        (Error(5, "Node Unavailable"), "the node is gone (code 5)"),
        (Error(4711, "/scans"), "Flower failed on the node; its own log says how (code 4711)"),
    ],
)
def test_errors_are_described_in_one_line(error: Error, expected: str) -> None:
    assert said_of(error) == expected


def test_long_errors_are_cut() -> None:
    said = said_of(Error(100, "Traceback\n" * 10_000))
    assert said.startswith("Traceback Traceback") and len(said) < LINE_LENGTH


def content(**changes: object) -> RecordDict:
    """Make a good reply; a change to None takes the record or entry away."""
    metrics: dict[str, object] = {Key.NUM_EXAMPLES: 10, Key.LOSS: 0.5}
    arrays: dict[str, object] = {Key.PACKED: Array(np.ones(SIZE, np.float32))}
    for key, value in changes.items():
        name = key.replace("_", "-")
        (arrays if isinstance(value, Array) or name == Key.PACKED else metrics)[name] = value
    return RecordDict(
        {
            Key.METRICS: MetricRecord({k: v for k, v in metrics.items() if v is not None}),  # type: ignore[misc]
            Key.ARRAYS: ArrayRecord({k: v for k, v in arrays.items() if v is not None}),  # type: ignore[misc]
        }
    )


@pytest.mark.parametrize("dtype", [np.float32, np.float16])
def test_good_replies_pass(dtype: type) -> None:
    good = content(packed=Array(np.ones(SIZE, dtype)), seconds=1.5)
    check_metrics(good)
    check_weights(good, size=SIZE, num_clients=3)
    check_metrics(content(loss=0))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_examples": 0}, r"^num-examples must be a whole number > 0, got 0$"),
        ({"num_examples": -3}, r"^num-examples must be a whole number > 0, got -3$"),
        ({"num_examples": 10.0}, r"^num-examples must be a whole number > 0, got 10\.0$"),
        ({"num_examples": float("nan")}, r"^num-examples must be a finite number, got nan$"),
        ({"num_examples": [10]}, r"^num-examples must be a finite number, got \[10\]$"),
        ({"num_examples": None}, r"^num-examples must be a finite number, got None$"),
        ({"loss": float("nan")}, r"^loss must be a finite number, got nan$"),
        ({"loss": float("-inf")}, r"^loss must be a finite number, got -inf$"),
        ({"loss": [0.5, 0.5]}, r"^loss must be a finite number, got \[0\.5, 0\.5\]$"),
        ({"loss": None}, r"^loss must be a finite number, got None$"),
    ],
)
def test_bad_metrics_are_unusable(changes: dict[str, object], message: str) -> None:
    with pytest.raises(UnusableReply, match=message):
        check_metrics(content(**changes))


def test_missing_metrics_are_unusable() -> None:
    with pytest.raises(UnusableReply, match=r"^no record 'metrics' in the reply$"):
        check_metrics(RecordDict())


def test_client_may_claim_as_many_images_as_it_said_it_has_and_fewer() -> None:
    for claimed, told in ((10, 10), (3, 10), (10**9, None)):
        check_claim(content(num_examples=claimed), told)
    message = r"^num-examples must be at most 10, the images that it said it has, got 11$"
    with pytest.raises(FalseClaim, match=message):
        check_claim(content(num_examples=11), 10)
    check_claim(RecordDict(), 10)  # other checks find what is missing
    check_claim(content(num_examples=[11]), 10)


@pytest.mark.parametrize(
    "text", ["\x1b[31mred\x1b[0m", "a\rb\x08\x7f", "\u202egnp.exe\u200b", "\udc80", "x" * 1000]
)
def test_text_of_a_node_is_one_printable_line_whatever_it_holds(text: str) -> None:
    said = str(UnusableReply(f"{text} and <b>more</b>"))
    assert said.isprintable() and len(said) <= 300 and said.encode()


@pytest.mark.parametrize("dtype", [np.float32, np.float16])
def test_update_is_measured_by_its_norm_and_refused_beyond_the_limit(dtype: type) -> None:
    sent = np.full(SIZE, 1000, np.float32)
    moved = content(packed=Array((sent + np.array([3, 0, 0, -4])).astype(dtype)))
    assert check_update(moved, sent, limit=None) == 5
    assert check_update(moved, sent, limit=5.0) == 5
    message = (
        r"^weights at a distance of 5 from those that were sent, federation\.max_update_norm=4\.9$"
    )
    with pytest.raises(UnusableReply, match=message):
        check_update(moved, sent, limit=4.9)


@pytest.mark.parametrize(
    ("packed", "message"),
    [
        (np.ones(SIZE - 1, np.float32), r"shape \(4,\), got float32 of shape \(3,\)"),
        (np.ones((SIZE, 1), np.float32), r"shape \(4,\), got float32 of shape \(4, 1\)"),
        (np.ones((), np.float32), r"shape \(4,\), got float32 of shape \(\)"),
        (np.ones(SIZE), "must be float32 or float16 .* got float64"),
        (np.ones(SIZE, np.int64), "must be float32 or float16 .* got int64"),
        (np.ones(SIZE, np.complex64), "must be float32 or float16 .* got complex64"),
        (np.array(["a"] * SIZE), "must be float32 or float16 .* got <U1"),
        (np.array([1, 2, np.nan, 4], np.float32), "^weights that are not finite$"),
        (np.array([1, 2, -np.inf, 4], np.float32), "^weights that are not finite$"),
        (np.array([1, 2, np.inf, 4], np.float16), "^weights that are not finite$"),
    ],
)
def test_bad_weights_are_unusable(packed: np.ndarray, message: str) -> None:
    with pytest.raises(UnusableReply, match=message):
        check_weights(content(packed=Array(packed)), size=SIZE, num_clients=3)


@pytest.mark.parametrize(
    "changed",
    [
        RecordDict(),
        content(packed=None),
        content(more=Array(np.ones(SIZE, np.float32))),
        content(packed=None, other=Array(np.ones(SIZE, np.float32))),
    ],
)
def test_other_arrays_than_the_packed_one_are_unusable(changed: RecordDict) -> None:
    with pytest.raises(UnusableReply, match=r"^arrays must be \['packed'\], got \["):
        check_weights(changed, size=SIZE, num_clients=3)


@pytest.mark.parametrize(
    ("loss", "diverged"), [(math.nan, True), (math.inf, True), (1e20, True), (-1.0, False)]
)
def test_loss_that_is_not_finite_or_beyond_all_bounds_is_divergence(
    loss: float, diverged: bool
) -> None:
    with pytest.raises(UnusableReply) as refused:
        check_metrics(content(loss=loss))
    assert isinstance(refused.value, Diverged) is diverged


@pytest.mark.parametrize("num_clients", [1, 3])
def test_weights_may_be_as_large_as_the_sum_of_all_can_hold(num_clients: int) -> None:
    # Ten images each; every client may be as bad, and still the sum does not overflow.
    largest = np.float32(SUM_LIMIT / 10 / num_clients)
    fits = np.array([1, -largest * (1 - 1e-6), 0, 1], np.float32)
    check_weights(content(packed=Array(fits)), size=SIZE, num_clients=num_clients)
    total = FixedPointSum()
    for _ in range(num_clients):
        total.add(fits, 10)
    assert np.array_equal(total.mean(), fits)
    beyond = np.array([1, -largest * (1 + 1e-6), 0, 1], np.float32)
    with pytest.raises(UnusableReply, match=r"^weights of up to .* from 10 images: diverged$"):
        check_weights(content(packed=Array(beyond)), size=SIZE, num_clients=num_clients)


def numpy_file(header: str, values: bytes = b"\0" * 4 * SIZE) -> bytes:
    """Make an .npy file with a header of one's own."""
    padded = header.encode().ljust(117) + b"\n"
    return b"\x93NUMPY\x01\x00" + len(padded).to_bytes(2, "little") + padded + values


def zip_file() -> bytes:
    file = io.BytesIO()
    np.savez(file, packed=np.ones(SIZE, np.float32))
    return file.getvalue()


HEADER = "{{'descr': {}, 'fortran_order': False, 'shape': {}, }}"


@pytest.mark.parametrize(
    "data",
    [
        pytest.param(b"", id="nothing"),
        pytest.param(b"garbage", id="garbage"),
        pytest.param(Array(np.ones(SIZE, np.float32)).data[:-1], id="cut values"),
        pytest.param(Array(np.ones(SIZE, np.float32)).data[:30], id="cut header"),
        pytest.param(numpy_file(HEADER.format("'|O'", "(4,)")), id="objects"),
        pytest.param(numpy_file(HEADER.format("'<f4'", "(-4,)")), id="negative shape"),
        pytest.param(numpy_file(HEADER.format("'zz'", "(4,)")), id="unknown type"),
        pytest.param(numpy_file(HEADER.format("('<f4',)", "(4,)")), id="half a type"),
        pytest.param(numpy_file("{'descr': '<f4', "), id="open bracket"),
        pytest.param(numpy_file(HEADER.format("'<f4'", f"({10**13},)")), id="36 TiB"),
        pytest.param(zip_file(), id="archive"),
        pytest.param(b"PK\x03\x04" + b"garbage" * 5, id="broken archive"),
    ],
)
def test_weights_that_cannot_be_read_are_unusable(data: bytes) -> None:
    packed = Array("float32", (SIZE,), "numpy.ndarray", data)
    with pytest.raises(UnusableReply, match=r"^weights") as caught:
        check_weights(content(packed=packed), size=SIZE, num_clients=3)
    assert len(str(caught.value)) < LINE_LENGTH


def test_weights_of_a_foreign_serialisation_are_unusable() -> None:
    with pytest.raises(UnusableReply, match="cannot be read: TypeError"):
        check_weights(
            content(packed=Array("float32", (SIZE,), "pickle", b"")), size=SIZE, num_clients=3
        )


@pytest.mark.parametrize(
    "hostile",
    [
        content(loss=[0.5] * 10_000),
        content(num_examples=[1] * 10_000),
        content(**{"n" * 10_000: Array(np.ones(1, np.float32))}),
        content(packed=Array(np.ones((1,) * 32, np.float32))),
    ],
)
def test_reasons_have_a_bounded_length_whatever_a_client_sends(hostile: RecordDict) -> None:
    with pytest.raises(UnusableReply) as caught:
        check_metrics(hostile)
        check_weights(hostile, size=SIZE, num_clients=3)
    assert len(str(caught.value)) < LINE_LENGTH
    assert "\n" not in str(caught.value)
