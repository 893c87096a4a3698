"""Messages out, replies in: with a deadline, one at a time, and never an endless wait."""

import time
from collections import deque
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import cast

import numpy as np
from flwr.app import ArrayRecord, ConfigRecord, Error, Message, MetricRecord, RecordDict
from flwr.common.constant import ErrorCode, SType
from flwr.serverapp import Grid
from numpy.typing import NDArray

from server_app.aggregation import SUM_LIMIT, distance, largest_magnitude
from server_app.messages import packed_weights, record_of
from server_app.timing import PhaseTimer
from task.protocol.wire import FailureCode, Key

# A reply that would come after the deadline is refused by the network with an error of its own,
# and a node that wakes up late does not work through rounds that are over.
TTL_SHARE = 0.95
# Of an exchange's time: a client that has not answered for so long gives its turn away.
PATIENCE_SHARE = 0.5

# What the coordinator asks the hospital: its own log has the cause, which stays there.
ADVICE = {
    FailureCode.BAD_INPUT: "the node's configuration or data does not fit the run's configuration; "
    "its own log says what",
    FailureCode.DATA_UNREADABLE: "its data cannot be read; its own log names the file or folder",
    FailureCode.OUT_OF_MEMORY: "its memory is too small: lower train.batch_size, or ask what else "
    "runs there",
    FailureCode.UNKNOWN_CLASS: "it has images of a class that is not in data.classes; its own log "
    "names it",
    FailureCode.TOO_FEW_IMAGES: "it has fewer images than its hospital takes part with "
    "(min-images); its own log counts them",
}

# Beyond this no loss or count means anything, and sums over clients could overflow.
LARGEST_METRIC = 1e15
DURATIONS_AND_RATES = (Key.SECONDS, Key.SECONDS_BESIDE, Key.IMAGES_PER_SECOND)

# What Flower's own errors come to, without the texts that they carry.
FLOWERS_ERRORS = {
    ErrorCode.LOAD_CLIENT_APP_EXCEPTION: "its Flower could not load the app; its own log says why",
    ErrorCode.CLIENT_APP_RAISED_EXCEPTION: "its ClientApp could not start; its own log says why",
    ErrorCode.MESSAGE_UNAVAILABLE: "no reply in time",
    ErrorCode.NODE_UNAVAILABLE: "the node is gone",
    ErrorCode.CLIENT_APP_CRASHED: "its ClientApp was killed, perhaps for want of memory",
}
# Flower's words for "the message was not answered in time" and "the node is not there".
SLOW_CODES = (ErrorCode.MESSAGE_UNAVAILABLE, ErrorCode.NODE_UNAVAILABLE)


@dataclass(frozen=True)
class Reply:
    """What came back from a client.

    Attributes:
        client: its number.
        message: its reply; None where none came before the deadline.
        sent: `time.monotonic()` when its message went out; None where its turn never came.
    """

    client: int
    message: Message | None
    sent: float | None = None


def addressed(
    content: RecordDict,
    *,
    node_id: int,
    message_type: str,
    timeout: float,
    entries: Mapping[str, str | int] | None = None,
) -> Message:
    """Make the message to one node: shared content, with further entries in its config record.

    Args:
        content: records for everyone; its config record is copied, not changed.
        node_id: Flower's number of the node.
        message_type: "train", "evaluate" or "query".
        timeout: seconds until the exchange ends.
        entries: of the config record, for this node alone.
    """
    records = RecordDict(dict(content.items()))
    shared = record_of(content, Key.CONFIG, ConfigRecord)
    records[Key.CONFIG] = ConfigRecord({**shared, **(entries or {})})
    return Message(records, node_id, message_type, ttl=timeout * TTL_SHARE)


class Turns:
    """The messages of an exchange: which wait for their turn, and which are out.

    Attributes:
        waiting: client and message, in the order of their turns.
        pending: client and `time.monotonic()` of sending, by id, of messages without a reply.
        refused: what to say of clients whose node Flower takes no message to.
    """

    def __init__(
        self, grid: Grid, messages: Mapping[int, Message], *, timeout: float, at_once: int | None
    ) -> None:
        """Line the messages up; see `exchange`."""
        self.waiting = deque(messages.items())
        self.pending: dict[str, tuple[int, float]] = {}
        self.refused: list[Reply] = []
        self._grid = grid
        self._at_once = at_once or len(messages)
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
                    self.pending[message_id] = client, sent
                else:
                    self.refused.append(Reply(client, None, sent))

    def _room(self) -> int:
        patient = time.monotonic() - self._patience
        held = sum(sent > patient for _, sent in self.pending.values())
        return max(self._at_once - held, 0)

    def unanswered(self) -> Iterator[Reply]:
        """Say of every client without a reply when it was asked, if it was."""
        yield from (Reply(client, None, sent) for client, sent in self.pending.values())
        yield from self.refused
        yield from (Reply(client, None) for client, _ in self.waiting)


def exchange(
    grid: Grid,
    messages: Mapping[int, Message],
    *,
    timeout: float,
    poll_seconds: float,
    at_once: int | None = None,
    phases: PhaseTimer | None = None,
) -> Iterator[Reply]:
    """Send a message to each client and yield replies as they arrive, then what never came.

    Where not all go out at once, the next goes out when a reply was pulled and used, so that
    replies cannot pile up in the network.

    Args:
        grid: Flower's view of the network.
        messages: a new message for each client number, sent in this order.
        timeout: seconds until the exchange ends.
        poll_seconds: pause between two looks at what has come.
        at_once: how many may be unanswered; None for all. A client that is silent for
            `PATIENCE_SHARE` of the time no longer counts, so that it holds up nobody.
        phases: are told when this sends, and when it waits.
    """
    phases = phases or PhaseTimer()
    start = time.monotonic()
    turns = Turns(grid, messages, timeout=timeout, at_once=at_once)

    def send() -> None:
        # What would expire on its way is not sent.
        if turns.waiting and time.monotonic() - start < TTL_SHARE * timeout:
            phases.enter("sending")
            turns.send()
        phases.enter("waiting")

    send()
    while turns.pending:
        idle = True
        for message_id in list(turns.pending):
            # One id per call: a pull loads every reply that is ready into memory.
            for message in grid.pull_messages([message_id]):
                idle = False
                client, sent = turns.pending.pop(message_id)
                yield Reply(client, message, sent)
                send()
        if time.monotonic() - start > timeout:
            break
        if idle:
            time.sleep(poll_seconds)
            send()
    yield from turns.unanswered()


class UnusableReply(ValueError):
    """A reply that is left out of its round; the text says why, in one printable line.

    All text of a node that is logged or recorded goes through here.
    """

    def __init__(self, reason: str) -> None:
        super().__init__(printable(reason)[:300])


class FalseClaim(UnusableReply):
    """A reply that claims more images than its client said it has."""


class Diverged(UnusableReply):
    """A reply with a loss or weights that training with too large steps leads to."""


def printable(text: str) -> str:
    """Make one line of what a node sent: each run of other signs than printable ones is a space.

    Control and escape characters could rewrite a log on a terminal, and a lone surrogate, as a
    file name may hold, cannot be written at all.
    """
    return " ".join("".join(sign if sign.isprintable() else " " for sign in text).split())


def checked_content(reply: Reply, *, timeout: float) -> RecordDict:
    """Return what a client replied.

    Raises:
        UnusableReply: it did not reply in time, or replied with an error.
    """
    if reply.sent is None:
        raise UnusableReply(f"not asked: its turn did not come within {timeout:g} s")
    if reply.message is None:
        raise UnusableReply(f"no reply within {timeout:g} s")
    if reply.message.has_error():
        raise UnusableReply(describe_error(reply.message.error))
    return reply.message.content


def check_metrics(content: RecordDict) -> None:
    """Check the numbers of a reply.

    Raises:
        UnusableReply: loss or number of images is missing, one is no number that a metric can
            be, or there are no images.
    """
    if Key.METRICS not in content:
        raise UnusableReply(f"no record {Key.METRICS.value!r} in the reply")
    metrics = record_of(content, Key.METRICS, MetricRecord)
    given = [name for name in DURATIONS_AND_RATES if name in metrics]
    check_numbers(metrics, dict.fromkeys((Key.LOSS, *given), (0.0, LARGEST_METRIC)))


def check_claim(content: RecordDict, num_images: int | None) -> None:
    """Check that a client does not claim more images than it said it has.

    Fewer are no false claim: damaged files may be left out, and fewer images count for less.

    Args:
        content: a reply.
        num_images: what the client said; None where the server knows by itself.

    Raises:
        FalseClaim: it claims more.
    """
    claimed = record_of(content, Key.METRICS, MetricRecord).get(Key.NUM_EXAMPLES)
    if num_images is not None and isinstance(claimed, int) and claimed > num_images:
        raise FalseClaim(
            f"{Key.NUM_EXAMPLES} must be at most {num_images}, the images that it said it has, "
            f"got {claimed}"
        )


def check_numbers(metrics: MetricRecord, bounds: Mapping[str, tuple[float, float]]) -> None:
    """Check the number of images of a reply, and that each number is there and within bounds.

    Args:
        metrics: of the reply.
        bounds: the least and the largest that a number may be, by name.

    Raises:
        UnusableReply: one is not.
    """
    for name in (Key.NUM_EXAMPLES, *bounds):
        value = metrics.get(name)
        least, most = bounds.get(name, (-np.inf, np.inf))
        too_large = isinstance(value, float) and not value <= most
        kind = Diverged if name == Key.LOSS and too_large else UnusableReply
        if not isinstance(value, int | float) or not np.isfinite(value):
            raise kind(f"{name} must be a finite number, got {value!r}")
        if not least <= value <= most:
            raise kind(f"{name} must be from {least:g} to {most:g}, got {value!r}")
    num_examples = metrics[Key.NUM_EXAMPLES]
    if not isinstance(num_examples, int) or not 0 < num_examples <= LARGEST_METRIC:
        raise UnusableReply(f"{Key.NUM_EXAMPLES} must be a whole number > 0, got {num_examples}")


def check_weights(content: RecordDict, *, size: int, num_clients: int) -> None:
    """Check the packed weights of a reply.

    Args:
        content: the reply; its metrics were checked already.
        size: how many values there must be.
        num_clients: how many clients may add their weights to the same sum.

    Raises:
        UnusableReply: they are missing, of another shape or type, not finite, or so large that
            the sum could overflow.
    """
    arrays = record_of(content, Key.ARRAYS, ArrayRecord)
    if list(arrays) != [Key.PACKED]:
        names = [str(name) for name in arrays]
        raise UnusableReply(f"arrays must be [{Key.PACKED.value!r}], got {names}")
    try:
        if arrays[Key.PACKED].stype != SType.NUMPY:
            raise TypeError("another serialisation")
        packed = packed_weights(content)
    except Exception as error:
        # NumPy's reader raises nearly anything on bytes that were made to break it.
        raise UnusableReply(f"weights that cannot be read: {type(error).__name__}") from error
    if packed.shape != (size,) or packed.dtype not in (np.float32, np.float16):
        raise UnusableReply(
            f"weights must be float32 or float16 of shape ({size},), "
            f"got {packed.dtype} of shape {packed.shape}"
        )
    largest = largest_magnitude(packed)
    if not np.isfinite(largest):
        raise Diverged("weights that are not finite")
    num_examples = cast(int, record_of(content, Key.METRICS, MetricRecord)[Key.NUM_EXAMPLES])
    if largest * num_examples > SUM_LIMIT / num_clients:
        raise Diverged(f"weights of up to {largest:.3g} from {num_examples} images: diverged")


def check_update(content: RecordDict, sent: NDArray[np.floating], *, limit: float | None) -> float:
    """Return how far the weights of a reply lie from those that were sent, as an L2 norm.

    Args:
        content: the reply; its weights were checked already.
        sent: [P], the packed weights that the client started from.
        limit: `federation.max_update_norm`; None for any.

    Raises:
        UnusableReply: they lie further than the limit.
    """
    norm = distance(packed_weights(content), sent)
    if limit is not None and norm > limit:
        raise UnusableReply(
            f"weights at a distance of {norm:.4g} from those that were sent, "
            f"federation.max_update_norm={limit:g}"
        )
    return norm


def is_silent(reply: Reply) -> bool:
    """Whether a client was asked and let the time pass, or is not there any more."""
    if reply.message is None:
        return reply.sent is not None
    return reply.message.has_error() and reply.message.error.code in SLOW_CODES


def describe_error(error: Error) -> str:
    """Say what an error reply says and what to ask its hospital, in one line of bounded length.

    Only the ClientApp's own errors are repeated: Flower's may carry texts and paths of the node.
    """
    if error.code not in [*FailureCode]:
        what = FLOWERS_ERRORS.get(error.code, "Flower failed on the node; its own log says how")
        return f"{what} (code {error.code})"
    reason = printable(error.reason or "")[:150] or "no reason given"
    advice = ADVICE.get(FailureCode(error.code))
    return f"{reason} (code {error.code})" + (f": {advice}" if advice else "")
