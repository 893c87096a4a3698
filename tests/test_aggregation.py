import gc
import itertools
import weakref
from collections.abc import Iterator

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, Message, MetricRecord, RecordDict
from flwr.serverapp.strategy import FedAvg
from numpy.typing import NDArray

from server_app.aggregation import FRACTION_BITS, SUM_LIMIT, FixedPointSum, StreamingFedAvg
from server_app.exchange import addressed
from task.wire import Key
from tests.helpers import Network

SIZE = 300
Client = tuple[NDArray[np.floating], int]


def clients(number: int = 4, *, seed: int = 0) -> list[Client]:
    """Weights of every magnitude that a network has, and shares of very different size."""
    generator = np.random.default_rng(seed)
    return [
        (
            (generator.standard_normal(SIZE) * 10.0 ** generator.uniform(-6, 2, SIZE)).astype(
                np.float32
            ),
            int(generator.integers(1, 5000)),
        )
        for _ in range(number)
    ]


def mean_of(weighted: list[Client]) -> NDArray[np.float32]:
    total = FixedPointSum()
    for weights, num_examples in weighted:
        total.add(weights, num_examples)
    return total.mean()


def numpys_mean(weighted: list[Client]) -> NDArray[np.float64]:
    weights, counts = zip(*weighted, strict=True)
    found: NDArray[np.float64] = np.average(
        np.stack(weights).astype(np.float64), axis=0, weights=counts
    )
    return found


def reply(weights: NDArray[np.floating], num_examples: int, loss: float) -> Message:
    """Make the reply to a real message, as a ClientApp would."""
    Network()  # sets what Flower makes messages with
    asked = addressed(RecordDict(), node_id=7, message_type="train", timeout=60)
    asked.metadata.__dict__["_message_id"] = "asked"
    arrays = ArrayRecord({Key.PACKED: Array(weights)})
    metrics = MetricRecord({Key.NUM_EXAMPLES: num_examples, Key.LOSS: loss, Key.SECONDS: 1.5})
    return Message(RecordDict({Key.ARRAYS: arrays, Key.METRICS: metrics}), reply_to=asked)


@pytest.mark.parametrize("number", [1, 2, 10])
def test_mean_is_numpys_weighted_mean_within_the_stated_bound(number: int) -> None:
    weighted = clients(number)
    found, expected = mean_of(weighted), numpys_mean(weighted)
    assert found.dtype == np.float32
    total = sum(num_examples for _, num_examples in weighted)
    # Each client is rounded once, to half a step of 2^-32; the mean once more, to float32.
    steps = number * 2.0 ** -(FRACTION_BITS + 1) / total
    rounding = np.spacing(np.abs(expected).astype(np.float32)) / 2
    assert np.all(np.abs(found - expected) <= steps + rounding + 1e-14 * np.abs(expected))


def test_mean_of_one_client_is_its_own_weights() -> None:
    weights = np.array([1, -1, 0, 0.1, 3e4, 2.0**-30], np.float32)
    assert np.array_equal(mean_of([(weights, 12345)]), weights)


def test_mean_does_not_depend_on_the_order_of_arrival() -> None:
    orders = [*itertools.permutations(clients(4))]
    found = {mean_of([*order]).tobytes() for order in orders}
    assert len(orders) == 24 and len(found) == 1
    # The floating-point sum does, or this would show nothing.
    summed = {sum(w * n for w, n in order).tobytes() for order in orders}  # type: ignore[union-attr]
    assert len(summed) > 1


def test_mean_of_equal_weights_is_these_weights() -> None:
    weights, _ = clients(1)[0]
    shares = [1, 7, 100, 4999]
    found = mean_of([(weights, share) for share in shares])
    assert np.abs(found - weights).max() <= len(shares) * 2.0**-33 / sum(shares)


def test_clients_count_by_their_images() -> None:
    zeros, ones = np.zeros(3, np.float32), np.ones(3, np.float32)
    assert mean_of([(zeros, 3), (ones, 1)]).tolist() == [0.25] * 3
    # As many clients of one image each give the same.
    assert mean_of([(zeros, 1)] * 3 + [(ones, 1)]).tolist() == [0.25] * 3


def test_float16_weights_are_added_exactly() -> None:
    weights = clients(1)[0][0].astype(np.float16)
    assert np.array_equal(mean_of([(weights, 3)]), weights.astype(np.float32))


def test_chunks_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    expected = mean_of(clients())
    monkeypatch.setattr("server_app.aggregation.CHUNK", 7)
    assert np.array_equal(mean_of(clients()), expected)


def test_weights_of_clients_are_left_as_they_are() -> None:
    (weights, num_examples), *_ = clients()
    before = weights.copy()
    weights.flags.writeable = False  # as they come out of a message
    mean_of([(weights, num_examples)] * 2)
    assert np.array_equal(weights, before)


def test_sum_is_exact_up_to_its_limit_and_refuses_what_would_overflow() -> None:
    share = np.array([-SUM_LIMIT / 4, 1], np.float32)
    total = FixedPointSum()
    for _ in range(2):
        total.add(share, 2)
    assert np.array_equal(total.mean(), share)
    with pytest.raises(
        OverflowError, match=r"must add up to at most 1\.07374e\+09, got 1\.61e\+09"
    ):
        total.add(share, 2)
    assert np.array_equal(total.mean(), share) and total.num_examples == 4


@pytest.mark.parametrize("shape", [(SIZE - 1,), (SIZE, 1), ()])
def test_weights_of_another_shape_are_refused(shape: tuple[int, ...]) -> None:
    total = FixedPointSum()
    total.add(np.ones(SIZE, np.float32), 1)
    with pytest.raises(ValueError, match=r"must have shape \(300,\), got \("):
        total.add(np.ones(shape, np.float32), 1)


def test_mean_of_nothing_is_refused() -> None:
    with pytest.raises(ValueError, match="at least 1 client, got 0"):
        FixedPointSum().mean()


def test_streaming_gives_what_flowers_own_fedavg_gives() -> None:
    replies = [reply(weights, n, loss=0.1 * n) for weights, n in clients(5)]
    arrays, metrics = StreamingFedAvg().aggregate_train(1, iter(replies))
    expected_arrays, expected_metrics = FedAvg().aggregate_train(1, replies)
    assert arrays is not None and metrics is not None
    assert expected_arrays is not None and expected_metrics is not None
    assert list(arrays) == list(expected_arrays) == [Key.PACKED]
    np.testing.assert_allclose(
        arrays[Key.PACKED].numpy(), expected_arrays[Key.PACKED].numpy(), rtol=1e-5, atol=1e-6
    )
    assert metrics[Key.LOSS] == pytest.approx(expected_metrics[Key.LOSS], rel=1e-12)
    assert metrics[Key.NUM_EXAMPLES] == sum(n for _, n in clients(5))


def test_loss_and_weights_do_not_depend_on_the_order_of_arrival() -> None:
    losses = [0.1, 1e9, 1e-9, 0.3]
    replies = [reply(w, n, loss) for (w, n), loss in zip(clients(4), losses, strict=True)]
    found = set()
    for order in itertools.permutations(replies):
        arrays, metrics = StreamingFedAvg().aggregate_train(1, order)
        assert arrays is not None and metrics is not None
        found.add((arrays[Key.PACKED].numpy().tobytes(), metrics[Key.LOSS]))
    assert len(found) == 1


def test_replies_are_consumed_one_at_a_time() -> None:
    alive: list[weakref.ref[Message]] = []
    most = 0

    def arriving() -> Iterator[Message]:
        nonlocal most
        for weights, num_examples in clients(6):
            gc.collect()
            most = max(most, sum(known() is not None for known in alive))
            message = reply(weights, num_examples, 1.0)
            alive.append(weakref.ref(message))
            yield message
            del message

    arrays, _ = StreamingFedAvg().aggregate_train(1, arriving())
    assert arrays is not None and len(alive) == 6
    assert most == 1  # the one before, while the next is asked for
    assert np.array_equal(arrays[Key.PACKED].numpy(), mean_of(clients(6)))


def test_no_replies_give_no_weights() -> None:
    assert StreamingFedAvg().aggregate_train(1, iter(())) == (None, None)
