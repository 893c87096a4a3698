import io
import math

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, Error, Message, MetricRecord, RecordDict
from numpy.typing import NDArray

from server_app.messages import addressed
from server_app.replies import (
    Diverged,
    FalseClaim,
    Reply,
    UnusableReply,
    check_claim,
    checked_content,
    read_arrays,
    read_losses,
    read_metrics,
    read_training,
)
from server_app.strategies import SUM_LIMIT, FixedPointSum
from task.protocol.wire import FailureCode, Key
from tests.helpers import Network

SIZE = 4
# What a person reads in a log, and what metrics.jsonl holds, has an end.
LINE_LENGTH = 500


def test_no_reply_is_unusable() -> None:
    with pytest.raises(UnusableReply, match=r"^no reply within 7200 s$"):
        checked_content(Reply(3, None, sent=1.0), timeout=7200)


def said_of(error: Error, kind: type[UnusableReply] = UnusableReply) -> str:
    """Say what a person reads of an error reply."""
    Network()
    asked = addressed(RecordDict(), node_id=7, message_type="train", timeout=60)
    with pytest.raises(kind) as caught:
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


def test_client_that_could_not_mask_its_update_has_diverged() -> None:
    said = said_of(Error(FailureCode.NOT_FINITE, "NotFiniteError"), Diverged)
    assert said == "NotFiniteError (code 111): its training has diverged"


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


def packed_of(content: RecordDict, *, num_clients: int = 3) -> NDArray[np.floating]:
    sizes = {str(Key.PACKED): SIZE}
    return read_arrays(content, sizes, num_images=10, num_clients=num_clients)[Key.PACKED]


@pytest.mark.parametrize("dtype", [np.float32, np.float16])
def test_good_replies_pass(dtype: type) -> None:
    good = content(packed=Array(np.ones(SIZE, dtype)), seconds=1.5)
    read_metrics(good)
    packed_of(good)
    read_metrics(content(loss=0))
    read_metrics(content(loss=-2.5))


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
        read_metrics(content(**changes))


def test_missing_metrics_are_unusable() -> None:
    with pytest.raises(UnusableReply, match=r"^no record 'metrics' in the reply$"):
        read_metrics(RecordDict())


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
    packed = (sent + np.array([3, 0, 0, -4])).astype(dtype)
    moved = content(packed=Array(packed), seconds=1.5, update_norm=1e9)
    moved["more"] = MetricRecord({"x": [1.0, 2.0]})
    for limit in (None, 5.0):
        found = read_training(moved, sent, num_clients=3, max_norm=limit)
        assert (found.num_images, found.loss) == (10, 0.5)
        # What else a client sends goes no further.
        assert (found.spent, found.update_norm) == ({"seconds": 1.5}, 5)
        assert np.array_equal(found.weights, packed)
    message = (
        r"^weights at a distance of 5 from those that were sent, federation\.max_update_norm=4\.9$"
    )
    with pytest.raises(UnusableReply, match=message):
        read_training(moved, sent, num_clients=3, max_norm=4.9)


def test_client_without_held_out_images_has_no_loss() -> None:
    assert read_losses(content(num_examples=0, loss=None)) is None
    assert read_losses(content()) == (10, {"loss": 0.5})
    with pytest.raises(UnusableReply, match=r"^no record 'metrics'"):
        read_losses(RecordDict())


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
        packed_of(content(packed=Array(packed)))


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
        packed_of(changed)


@pytest.mark.parametrize(
    ("beside", "message"),
    [
        (None, r"^arrays must be \['packed', 'own-control'\], got \['packed'\]"),
        (np.ones(3, np.float32), r"^own-control must be float32 .* shape \(2,\), .* \(3,\)"),
        (np.array([1, np.nan], np.float32), "^own-control that are not finite$"),
        (np.full(2, 1e9, np.float32), "^own-control of up to 1e.09 from 10 images: diverged$"),
    ],
)
def test_what_comes_beside_the_weights_is_checked_like_them(
    beside: np.ndarray | None, message: str
) -> None:
    sizes = {str(Key.PACKED): SIZE, str(Key.OWN_CONTROL): 2}
    own = {} if beside is None else {str(Key.OWN_CONTROL): Array(beside)}
    reply = content(packed=Array(np.ones(SIZE, np.float32)), **own)
    with pytest.raises(UnusableReply, match=message):
        read_arrays(reply, sizes, num_images=10, num_clients=3)


@pytest.mark.parametrize("loss", [math.nan, math.inf, -math.inf, 1e20, -1e20])
def test_loss_that_is_not_finite_or_beyond_all_bounds_is_divergence(loss: float) -> None:
    with pytest.raises(Diverged, match=r"^loss must be "):
        read_metrics(content(loss=loss))
    with pytest.raises(Diverged, match=r"^kl must be "):
        read_metrics(content(loss=1.0, kl=loss), ["kl"])


@pytest.mark.parametrize("num_clients", [1, 3])
def test_weights_may_be_as_large_as_the_sum_of_all_can_hold(num_clients: int) -> None:
    # Ten images each; every client may be as bad, and still the sum does not overflow.
    largest = np.float32(SUM_LIMIT / 10 / num_clients)
    fits = np.array([1, -largest * (1 - 1e-6), 0, 1], np.float32)
    packed_of(content(packed=Array(fits)), num_clients=num_clients)
    total = FixedPointSum()
    for _ in range(num_clients):
        total.add(fits, 10)
    assert np.array_equal(total.mean(), fits)
    beyond = np.array([1, -largest * (1 + 1e-6), 0, 1], np.float32)
    with pytest.raises(UnusableReply, match=r"^weights of up to .* from 10 images: diverged$"):
        packed_of(content(packed=Array(beyond)), num_clients=num_clients)


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
        packed_of(content(packed=packed))
    assert len(str(caught.value)) < LINE_LENGTH


def test_weights_of_a_foreign_serialization_are_unusable() -> None:
    with pytest.raises(UnusableReply, match="cannot be read: TypeError"):
        packed_of(content(packed=Array("float32", (SIZE,), "pickle", b"")))


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
        read_metrics(hostile)
        packed_of(hostile)
    assert len(str(caught.value)) < LINE_LENGTH
    assert "\n" not in str(caught.value)
