"""What comes back from clients: which replies can be used, and what they say.

Nothing in a reply is believed before it was looked at here.
"""

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
from flwr.app import Array, ArrayRecord, ConfigRecord, Error, Message, MetricRecord, RecordDict
from flwr.common.constant import ErrorCode, SType
from numpy.typing import NDArray

from server_app.messages import record_of
from server_app.strategies import SUM_LIMIT, distance, largest_magnitude
from task.protocol.secure_aggregation.keys import PublicKeys
from task.protocol.wire import FailureCode, Key, from_npy
from task.protocol.wire_format import WireFormat

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
    FailureCode.MISSING_WEIGHTS: "it lacks the pre-trained weights of eval.extractor=efficientnet "
    "or model.perceptual_weight > 0; its own log says what to install or to do without",
    FailureCode.BUDGET_EXHAUSTED: "its patients' privacy budget (max-epsilon) is too small for it; "
    "`feddm privacy` there says what is left",
    FailureCode.NOT_APPROVED: "its hospital has not approved this version of the app "
    "(`feddm approve` there)",
    FailureCode.AGAINST_POLICY: "its hospital's policy does not allow this run's configuration; "
    "its own log says which value",
    FailureCode.PEERS_REFUSED: "it does not take part in this sum, with these hospitals, or shows "
    "its update to nobody (trusted-peers, minimum-peers); its own log says why",
    FailureCode.NOT_FINITE: "its training has diverged",
}

# Beyond this no loss or count means anything, and sums over clients could overflow.
LARGEST_METRIC = 1e15
# More images than any node has.
MAX_COUNT = 10**12
DURATIONS_AND_RATES = (Key.SECONDS, Key.SECONDS_BESIDE, Key.IMAGES_PER_SECOND)

# What Flower's own errors come to, without the texts that they carry.
FLOWERS_ERRORS = {
    ErrorCode.LOAD_CLIENT_APP_EXCEPTION: "its Flower could not load the app; its own log says why",
    ErrorCode.CLIENT_APP_RAISED_EXCEPTION: "its ClientApp could not start; its own log says why",
    ErrorCode.MESSAGE_UNAVAILABLE: "no reply in time",
    ErrorCode.REPLY_MESSAGE_UNAVAILABLE: "its reply cannot be read, or has expired",
    ErrorCode.NODE_UNAVAILABLE: "the node is gone",
    ErrorCode.CLIENT_APP_CRASHED: "its ClientApp was killed, perhaps for want of memory",
}
# Flower's words for "the message was not answered in time" and "the node is not there".
SLOW_CODES = (ErrorCode.MESSAGE_UNAVAILABLE, ErrorCode.NODE_UNAVAILABLE)
# Of errors that are not the node's answer.
NETWORK_CODES = (
    *SLOW_CODES,
    ErrorCode.REPLY_MESSAGE_UNAVAILABLE,
    ErrorCode.CLIENT_APP_CRASHED,
)


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
        UnusableReply: it did not reply in time, or replied with an error or without records.
    """
    if reply.sent is None:
        raise UnusableReply(f"not asked: its turn did not come within {timeout:g} s")
    if reply.message is None:
        raise UnusableReply(f"no reply within {timeout:g} s")
    if reply.message.has_error():
        diverged = reply.message.error.code == FailureCode.NOT_FINITE
        raise (Diverged if diverged else UnusableReply)(describe_error(reply.message.error))
    if not isinstance(reply.message.content, RecordDict):
        raise UnusableReply("no records in the reply")
    return reply.message.content


def read_metrics(content: RecordDict, names: Collection[str] = ()) -> dict[str, int | float]:
    """Return the numbers of a reply.

    Args:
        content: the reply.
        names: of what it must say beside the loss and the number of images.

    Raises:
        Diverged: the loss, or what `names` names, is not finite or too large.
        UnusableReply: loss or number of images is missing, one is no number that a metric can
            be, or there are no images.
    """
    metrics = record_of(content, Key.METRICS, MetricRecord)
    given = [name for name in DURATIONS_AND_RATES if name in metrics]
    # Below 0 are losses such as those of a density or of a critic.
    losses: list[str] = [Key.LOSS, *names]
    bounds = dict.fromkeys(losses, (-LARGEST_METRIC, LARGEST_METRIC))
    bounds |= dict.fromkeys(given, (0.0, LARGEST_METRIC))
    return read_numbers(content, bounds, losses=losses)


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


def read_numbers(
    content: RecordDict,
    bounds: Mapping[str, tuple[float, float]],
    *,
    losses: Collection[str] = (),
) -> dict[str, int | float]:
    """Return the number of images of a reply, and each number that has bounds.

    Args:
        content: the reply.
        bounds: the least and the largest that a number may be, by name.
        losses: names of those that are too large where training has diverged.

    Raises:
        Diverged: a loss is not finite or too large.
        UnusableReply: one is missing or out of its bounds.
    """
    if Key.METRICS not in content:
        raise UnusableReply(f"no record {Key.METRICS.value!r} in the reply")
    metrics = record_of(content, Key.METRICS, MetricRecord)
    numbers: dict[str, int | float] = {}
    for name in (Key.NUM_EXAMPLES, *bounds):
        value = metrics.get(name)
        least, most = bounds.get(name, (-np.inf, np.inf))
        too_large = isinstance(value, float) and not abs(value) <= most
        kind = Diverged if name in losses and too_large else UnusableReply
        if not isinstance(value, int | float) or not np.isfinite(value):
            raise kind(f"{name} must be a finite number, got {value!r}")
        if not least <= value <= most:
            raise kind(f"{name} must be from {least:g} to {most:g}, got {value!r}")
        numbers[name] = value
    num_examples = numbers[Key.NUM_EXAMPLES]
    if not isinstance(num_examples, int) or not 0 < num_examples <= LARGEST_METRIC:
        raise UnusableReply(f"{Key.NUM_EXAMPLES} must be a whole number > 0, got {num_examples}")
    return numbers


Decode = Callable[[NDArray[Any]], NDArray[np.floating]]


def read_arrays(
    content: RecordDict,
    sizes: Mapping[str, int],
    *,
    num_images: int,
    num_clients: int,
    decode: Mapping[str, Decode] | None = None,
) -> dict[str, NDArray[np.floating]]:
    """Return the packed weights of a reply, and what comes beside them, without a copy.

    Args:
        content: the reply.
        sizes: how many values each array must have, by name.
        num_images: that they count for.
        num_clients: how many clients may add theirs to the same sum.
        decode: what makes the values of what travels, by name, where these are not the same;
            raises ValueError where it cannot.

    Raises:
        UnusableReply: one is missing, of another shape or type, not finite, or so large that the
            sum could overflow; or there are others.
    """
    arrays = record_of(content, Key.ARRAYS, ArrayRecord)
    if {*arrays} != {*sizes}:
        names = [str(name) for name in arrays]
        raise UnusableReply(f"arrays must be {[*map(str, sizes)]}, got {names}")
    return {
        name: _read_array(
            arrays[name],
            "weights" if name == Key.PACKED else name,
            size,
            num_images=num_images,
            num_clients=num_clients,
            decode=(decode or {}).get(name),
        )
        for name, size in sizes.items()
    }


def _read_array(
    array: Array,
    what: str,
    size: int,
    *,
    num_images: int,
    num_clients: int,
    decode: Decode | None,
) -> NDArray[np.floating]:
    try:
        if array.stype != SType.NUMPY:
            raise TypeError("another serialization")
        packed = from_npy(array.data)
    except Exception as error:
        # NumPy's reader raises nearly anything on bytes that were made to break it.
        raise UnusableReply(f"{what} that cannot be read: {type(error).__name__}") from error
    if decode is not None:
        try:
            packed = decode(packed)
        except ValueError as error:
            raise UnusableReply(f"{what}: {error}") from error
    if packed.shape != (size,) or packed.dtype not in (np.float32, np.float16):
        raise UnusableReply(
            f"{what} must be float32 or float16 of shape ({size},), "
            f"got {packed.dtype} of shape {packed.shape}"
        )
    largest = largest_magnitude(packed)
    if not np.isfinite(largest):
        raise Diverged(f"{what} that are not finite")
    if largest * num_images > SUM_LIMIT / num_clients:
        raise Diverged(f"{what} of up to {largest:.3g} from {num_images} images: diverged")
    return packed


@dataclass(frozen=True)
class LocalTraining:
    """What a client sends after it has trained.

    Attributes:
        weights: [P], float32 or float16, the bytes of the reply themselves.
        num_images: that it trained on; `counted_as` of a client that does not say.
        loss: mean of its training; None of a client that does not say.
        measures: what its family measured of the training, by name.
        spent: `DURATIONS_AND_RATES`, those that it says.
        update_norm: how far its weights lie from those that it was sent, measured here.
        beside: what the strategy is sent beside the weights, by name.
        num_bytes: of all its arrays, as they have travelled.
    """

    weights: NDArray[np.floating]
    num_images: int
    loss: float | None
    measures: dict[str, float]
    spent: dict[str, float]
    update_norm: float
    beside: dict[str, NDArray[np.floating]]
    num_bytes: int


def read_training(
    content: RecordDict,
    sent: NDArray[np.floating],
    *,
    num_clients: int,
    max_norm: float | None,
    measures: Collection[str] = (),
    counted_as: int | None = None,
    beside: Mapping[str, int] | None = None,
    wire: WireFormat | None = None,
) -> LocalTraining:
    """Return what a client that has trained replied, and measure how far it went.

    Args:
        content: the reply.
        sent: [P], the packed weights that the client started from.
        num_clients: how many clients may add their weights to the same sum.
        max_norm: `federation.max_update_norm`; None for any.
        measures: names of what the family measures of a training.
        counted_as: how many images a client counts for that protects its patients, and says
            nothing beside its weights; None: each says it.
        beside: how many values each array must have that the strategy is sent beside the weights.
        wire: how its weights have travelled; None: as floats.

    Raises:
        UnusableReply: see `read_metrics` and `read_arrays`; or the weights lie further than
            `max_norm` from those that were sent.
    """
    numbers = {} if counted_as is not None else read_metrics(content, measures)
    num_images = int(numbers.get(Key.NUM_EXAMPLES, counted_as or 0))
    sizes = {str(Key.PACKED): len(sent), **(beside or {})}
    arrays = read_arrays(
        content,
        sizes,
        num_images=num_images,
        num_clients=num_clients,
        decode={Key.PACKED: partial(wire.decode_local, sent=sent)} if wire is not None else {},
    )
    travelled = record_of(content, Key.ARRAYS, ArrayRecord).values()
    num_bytes = sum(from_npy(each.data).nbytes for each in travelled)
    weights = arrays.pop(Key.PACKED)
    norm = distance(weights, sent)
    if max_norm is not None and norm > max_norm:
        raise UnusableReply(
            f"weights at a distance of {norm:.4g} from those that were sent, "
            f"federation.max_update_norm={max_norm:g}"
        )
    spent = {str(name): numbers[name] for name in DURATIONS_AND_RATES if name in numbers}
    measured = {name: float(numbers[name]) for name in measures if name in numbers}
    loss = numbers.get(Key.LOSS)
    return LocalTraining(weights, num_images, loss, measured, spent, norm, arrays, num_bytes)


def read_losses(
    content: RecordDict, parts: Collection[str] = ()
) -> tuple[int, dict[str, float]] | None:
    """Return the images and the losses of a reply; None from a client without held-out images.

    Args:
        content: the reply.
        parts: names of what the family says beside the loss.

    Raises:
        UnusableReply: see `read_metrics`.
    """
    if record_of(content, Key.METRICS, MetricRecord).get(Key.NUM_EXAMPLES) == 0:
        return None
    numbers = read_metrics(content, parts)
    losses = {str(name): float(numbers[name]) for name in (Key.LOSS, *parts)}
    return int(numbers[Key.NUM_EXAMPLES]), losses


@dataclass(frozen=True)
class Introduction:
    """What a node says of its images before the first round.

    Attributes:
        num_images: all that it can train on or hold out; None in a simulation, which knows,
            and with differential privacy.
        class_counts: those to train on, of each class; None where it does not say.
        keys: of its hospital, for secure aggregation; None without.
        keeps_replies: whether it may be asked for the same training again.
    """

    num_images: int | None
    class_counts: list[int] | None
    keys: PublicKeys | None = None
    keeps_replies: bool = False


def read_introduction(said: ConfigRecord, *, num_classes: int, counted: bool) -> Introduction:
    """Return what a node says of its images.

    Args:
        said: by the node.
        num_classes: of the run.
        counted: whether it must say how many images it has.

    Raises:
        UnusableReply: it does not say how many it has, or says what cannot be.
    """
    counts = read_class_counts(said, num_classes=num_classes)
    keeps_replies = said.get(Key.KEEPS_REPLIES) is True
    if not counted:
        return Introduction(None, counts, keeps_replies=keeps_replies)
    number, trained = said.get(Key.NUM_IMAGES), sum(counts or [])
    if type(number) is not int or not trained <= number <= MAX_COUNT:
        raise UnusableReply(
            f"{Key.NUM_IMAGES.value} must be a whole number from {trained}, those of its "
            f"{Key.CLASS_COUNTS.value}, to {MAX_COUNT:g}, got {number!r:.80}"
        )
    return Introduction(number, counts, keeps_replies=keeps_replies)


def read_keys(said: ConfigRecord) -> PublicKeys:
    """Return the keys of a node's hospital for secure aggregation.

    Raises:
        UnusableReply: there are none, or they are wrong.
    """
    try:
        return PublicKeys.read(said.get(Key.PEER_KEYS))
    except ValueError as error:
        raise UnusableReply(f"{Key.PEER_KEYS.value}: {error}") from error


def read_class_counts(said: ConfigRecord, *, num_classes: int) -> list[int] | None:
    """Return how many images of each class a node says it has; None where it does not say.

    Raises:
        UnusableReply: they are no counts of the classes of this run.
    """
    counts = said.get(Key.CLASS_COUNTS)
    if counts is None:
        return None
    if (
        not isinstance(counts, list)
        or len(counts) != num_classes
        or not all(type(count) is int and 0 <= count <= MAX_COUNT for count in counts)
    ):
        raise UnusableReply(
            f"{Key.CLASS_COUNTS.value} must be {num_classes} whole numbers from 0 to "
            f"{MAX_COUNT:g}, one for each of data.classes, got {counts!r:.80}"
        )
    return [int(count) for count in counts]


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
