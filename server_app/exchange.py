"""Messages out, replies in: with a deadline, one at a time, and never an endless wait."""

import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np
from flwr.app import ArrayRecord, ConfigRecord, Error, Message, RecordDict
from flwr.serverapp import Grid

from task.wire import Key

# A reply that would come after the deadline is refused by the network with an error of its own,
# and a node that wakes up late does not work through rounds that are over.
TTL_SHARE = 0.95


@dataclass(frozen=True)
class Reply:
    """What came back from a client.

    Attributes:
        client: its number.
        message: its reply; None where none came before the deadline.
    """

    client: int
    message: Message | None


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
    shared = content.config_records.get(Key.CONFIG, ConfigRecord())
    records[Key.CONFIG] = ConfigRecord({**shared, **(entries or {})})
    return Message(records, node_id, message_type, ttl=timeout * TTL_SHARE)


def exchange(
    grid: Grid, messages: Mapping[int, Message], *, timeout: float, poll_seconds: float
) -> Iterator[Reply]:
    """Send a message to each client and yield replies as they arrive, then what never came.

    Args:
        grid: Flower's view of the network.
        messages: a new message for each client number.
        timeout: seconds until the exchange ends.
        poll_seconds: pause between two looks at what has come.
    """
    deadline = time.monotonic() + timeout
    pending = dict(zip(grid.push_messages(list(messages.values())), messages, strict=True))
    while pending:
        for message_id in list(pending):
            # One id per call: a pull loads every reply that is ready into memory.
            for message in grid.pull_messages([message_id]):
                yield Reply(pending.pop(message_id), message)
        if time.monotonic() > deadline:
            break
        if pending:
            time.sleep(poll_seconds)
    for client in pending.values():
        yield Reply(client, None)


class UnusableReply(ValueError):
    """A reply that is left out of its round; the text says why."""


def checked_content(reply: Reply, *, timeout: float) -> RecordDict:
    """Return what a client replied.

    Raises:
        UnusableReply: it did not reply in time, or replied with an error.
    """
    if reply.message is None:
        raise UnusableReply(f"no reply within {timeout:g} s")
    if reply.message.has_error():
        raise UnusableReply(describe_error(reply.message.error))
    return reply.message.content


def check_metrics(content: RecordDict) -> None:
    """Check loss and number of images of a reply.

    Raises:
        UnusableReply: one is missing, not finite, or there are no images.
    """
    metrics = content.metric_records.get(Key.METRICS)
    if metrics is None:
        raise UnusableReply(f"no record {Key.METRICS!r} in the reply")
    for name in (Key.NUM_EXAMPLES, Key.LOSS):
        value = metrics.get(name)
        if not isinstance(value, int | float) or not np.isfinite(value):
            raise UnusableReply(f"{name} must be a finite number, got {value!r}")
    num_examples = metrics[Key.NUM_EXAMPLES]
    if not isinstance(num_examples, int) or num_examples <= 0:
        raise UnusableReply(f"{Key.NUM_EXAMPLES} must be a whole number > 0, got {num_examples}")


def check_weights(content: RecordDict, *, size: int) -> None:
    """Check the packed weights of a reply.

    Args:
        content: the reply.
        size: how many values there must be.

    Raises:
        UnusableReply: they are missing, of another shape or type, or not finite.
    """
    arrays = content.array_records.get(Key.ARRAYS, ArrayRecord())
    if list(arrays) != [Key.PACKED]:
        raise UnusableReply(f"arrays must be [{Key.PACKED.value!r}], got {list(arrays)}")
    try:
        packed = arrays[Key.PACKED].numpy()
    except (TypeError, ValueError, EOFError) as error:
        raise UnusableReply(f"weights that cannot be read: {type(error).__name__}") from error
    if packed.shape != (size,) or packed.dtype not in (np.float32, np.float16):
        raise UnusableReply(
            f"weights must be float32 or float16 of shape ({size},), "
            f"got {packed.dtype} of shape {packed.shape}"
        )
    if not np.isfinite(packed).all():
        raise UnusableReply("weights that are not finite")


def describe_error(error: Error) -> str:
    """Say what an error reply says, in one line of bounded length."""
    reason = " ".join((error.reason or "no reason given").split())[:200]
    return f"{reason} (code {error.code})"
