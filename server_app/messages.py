"""Messages and their records, as the server writes and reads them."""

import math
from collections.abc import Mapping
from typing import Any, TypeVar

import numpy as np
from flwr.app import Array, ArrayRecord, ConfigRecord, Error, Message, MetricRecord, RecordDict
from flwr.common.constant import FLWR_PRIVATE_MAX_ARRAY_CHUNK_SIZE, ErrorCode, SType
from flwr.serverapp import Grid
from google.protobuf.message import DecodeError  # type: ignore[import-untyped]
from numpy.typing import NDArray

from task.data import ImageSet
from task.protocol.wire import Key, to_npy

# A reply that would come after the deadline is refused by the network with an error of its own,
# and a node that wakes up late does not work through rounds that are over.
TTL_SHARE = 0.95

# Flower's, of a reply that was made to break it; a network that fails raises others.
INFLATE_ERRORS = (ValueError, TypeError, LookupError, AttributeError, RecursionError, DecodeError)

# A node announces a reply by a list of its pieces, each of so many bytes at most, in so many bytes;
# the rest is the message's own, and that of its records. The gateway's MAX_LIST bounds it.
PIECE_BYTES, LISTED_PIECE_BYTES, LIST_BASE_BYTES = FLWR_PRIVATE_MAX_ARRAY_CHUNK_SIZE, 68, 1500
DEFAULT_MAX_LIST = 8 << 10

# Of a config record.
Entries = Mapping[str, str | int | list[int] | list[str] | list[bytes]]

FlowerRecord = TypeVar("FlowerRecord", ArrayRecord, MetricRecord, ConfigRecord)


def addressed(
    content: RecordDict,
    *,
    node_id: int,
    message_type: str,
    timeout: float,
    entries: Entries | None = None,
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


def list_bytes(num_bytes: float) -> int:
    """Return how many bytes a node announces a reply with so many bytes of arrays with, at most."""
    return LIST_BASE_BYTES + math.ceil(num_bytes / PIECE_BYTES) * LISTED_PIECE_BYTES


def pull_reply(grid: Grid, message: Message) -> Message | None:
    """Take the reply to a message, an error where Flower cannot read it; None before it comes."""
    try:
        # One id per call: a pull loads every reply that is ready into memory.
        return next(iter(grid.pull_messages([message.metadata.message_id])), None)
    except INFLATE_ERRORS:
        return Message(Error(ErrorCode.REPLY_MESSAGE_UNAVAILABLE), reply_to=message)


def record_of(content: RecordDict, name: str, kind: type[FlowerRecord]) -> FlowerRecord:
    """Return a record of a message; an empty one where there is none of that name and kind.

    Flower's own views, such as `content.array_records`, refer to the content and to themselves:
    the weights of many replies would stay in memory until Python looks for circles.
    """
    found = content.get(name)
    return found if isinstance(found, kind) else kind()


def array_record(arrays: Mapping[str, NDArray[Any]]) -> ArrayRecord:
    """Make the record of contiguous arrays that travels."""
    return ArrayRecord(
        {
            str(name): Array(str(array.dtype), array.shape, SType.NUMPY, to_npy(array))
            for name, array in arrays.items()
        }
    )


def packed_record(
    packed: NDArray[Any], beside: Mapping[str, NDArray[np.floating]] | None = None
) -> ArrayRecord:
    """Make the record of packed weights that travels, with what a strategy sends beside them."""
    return array_record({Key.PACKED: packed, **(beside or {})})


def images_record(images: ImageSet) -> ArrayRecord:
    """Make the record of images that travels, with their labels."""
    return array_record({Key.IMAGES: images.images.numpy(), Key.LABELS: images.labels.numpy()})
