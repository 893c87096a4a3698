import gc
import itertools
import weakref
from collections.abc import Iterator
from fractions import Fraction

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, Message, MetricRecord, RecordDict
from flwr.serverapp.strategy import FedAvg
from numpy.typing import NDArray

from server_app.aggregation import (
    FRACTION_BITS,
    SUM_LIMIT,
    FixedPointSum,
    StreamingFedAvg,
    Weighing,
    capped,
    distance,
    weighted_median,
)
from server_app.exchange import addressed
from server_app.robust import build_aggregation
from task.config import load_config
from task.protocol.wire import Key
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


def test_no_count_is_more_than_its_share_and_small_ones_stay() -> None:
    generator = np.random.default_rng(5)
    for _ in range(300):
        counts = [int(count) for count in 10 ** generator.uniform(0, 8, generator.integers(3, 9))]
        share = float(generator.uniform(0.05, 1))
        found = capped(counts, Fraction(share))
        most = max(share, 1 / len(counts))
        assert max(found) <= most * sum(found) * (1 + 1e-9) or max(found) == 1
        limit = max(found)
        assert found == [min(count, limit) for count in counts]
        if limit < max(counts):  # and no lower than it must be
            rest = [min(count, limit + 1) for count in counts]
            assert max(rest) > Fraction(most) * sum(rest) * Fraction(1 - 1e-9)


@pytest.mark.parametrize(
    ("counts", "share", "expected"),
    [
        ([100, 200, 10**8], 0.5, [100, 200, 300]),
        ([10**8, 10**8, 100, 300], 0.4, [800, 800, 100, 300]),
        ([100, 200, 10**8], 0.1, [100, 100, 100]),  # equal shares are the least that there is
        ([1, 1, 9], 1 / 3, [1, 1, 1]),
        ([5, 10**8], 0.5, [5, 10**8]),  # of two, one has half or more in any case
        ([5, 6, 7], 0.5, [5, 6, 7]),
        ([1, 2, 10**8], 1.0, [1, 2, 10**8]),
    ],
)
def test_shares_are_capped(counts: list[int], share: float, expected: list[int]) -> None:
    assert Weighing(max_share=share).weights(counts) == expected
    assert Weighing(max_share=share).weights(counts[::-1]) == expected[::-1]
    assert Weighing().weights(counts) == counts


def test_claim_of_a_hundred_million_images_counts_for_its_share_in_any_order() -> None:
    weighted = [*clients(4), (np.full(SIZE, 0.5, np.float32), 10**8)]
    lowered = [*weighted[:4], (weighted[4][0], sum(count for _, count in weighted[:4]))]
    expected = mean_of(lowered)
    for order in itertools.permutations(weighted):
        replies = (reply(w, n, loss=0.5) for w, n in order)
        arrays, _ = StreamingFedAvg(Weighing(max_share=0.5)).aggregate_train(1, replies)
        assert arrays is not None and np.array_equal(arrays[Key.PACKED].numpy(), expected)
    # Where nobody claims too much the cap changes no bit.
    for share in (0.5, 0.7):
        replies = (reply(w, 100 + n % 7, loss=0.5) for w, n in clients(5))
        arrays, _ = StreamingFedAvg(Weighing(max_share=share)).aggregate_train(1, replies)
        assert arrays is not None
        plain = mean_of([(w, 100 + n % 7) for w, n in clients(5)])
        assert np.array_equal(arrays[Key.PACKED].numpy(), plain)


def test_share_of_any_size_is_taken_as_it_was_written() -> None:
    for share, kept in ((0.1, 9), (0.3, 3), (0.5, 1), (1.0, 0)):
        assert Weighing(max_share=share).most_capped == kept
    assert Weighing(max_share=1e-9).weights([5, 6, 7]) == [5, 5, 5]


def test_weighted_median_is_that_of_as_many_equal_values() -> None:
    generator = np.random.default_rng(6)
    for _ in range(200):
        weights = generator.integers(1, 6, generator.integers(1, 7)).tolist()
        values = generator.standard_normal(len(weights)).tolist()
        weighted = [*zip(weights, values, strict=True)]
        assert weighted_median(weighted) == np.median(np.repeat(values, weights))
        assert weighted_median(weighted[::-1]) == weighted_median(weighted)


@pytest.mark.parametrize("weighing", [Weighing(max_share=0.5), Weighing(by_images=False)])
@pytest.mark.parametrize("claim", [1, 10**8])
@pytest.mark.parametrize("loss", [0.0, 1e14])
def test_no_client_alone_moves_a_loss_out_of_the_range_of_the_others(
    weighing: Weighing, claim: int, loss: float
) -> None:
    honest = [(100, 0.08), (150, 0.09), (300, 0.1)]
    found = weighing.combine([*honest, (claim, loss)])
    assert 0.08 <= found <= 0.1
    assert weighing.describe([*honest, (claim, loss)]).startswith(f"{found:.4f} (median of 4 ")
    # The one whose counts are known believes them.
    assert Weighing().combine(honest) == pytest.approx((8 + 13.5 + 30) / 550, rel=1e-12)
    assert weighing.combine(honest[:1]) == 0.08


ROBUST = {
    "median": "federation.min_replies=3",
    "trimmed_mean": "federation.min_replies=4 federation.trim_fraction=0.25",
    "krum": "federation.min_replies=5 federation.num_malicious=1",
}
SENT = np.random.default_rng(9).standard_normal(SIZE).astype(np.float32)


def aggregated(
    aggregation: str, weights: list[NDArray[np.floating]], *, settings: str = "", order: int = 1
) -> NDArray[np.float32]:
    """Aggregate weights of clients 0, 1, ..., which arrive in this order or the other way round."""
    overrides = [f"federation.aggregation={aggregation}", *ROBUST.get(aggregation, "").split()]
    config = load_config([*overrides, *settings.split()]).federation
    aggregate = build_aggregation(config, Weighing.of(config, simulated=True))
    replies = [(c, reply(w, 10 + c, loss=0.5 + c)) for c, w in enumerate(weights)]
    arrays, metrics = aggregate(iter(replies[::order]), SENT)
    assert arrays is not None and metrics is not None and list(arrays) == [Key.PACKED]
    counts = [10 + c for c in range(len(weights))]
    losses = [0.5 + c for c in range(len(weights))]
    mean = np.average(losses, weights=counts)
    expected = mean if aggregation == "fedavg" else np.median(losses)
    assert metrics[Key.LOSS] == pytest.approx(expected, rel=1e-12)
    assert metrics[Key.NUM_EXAMPLES] == sum(counts)
    found = arrays[Key.PACKED].numpy()
    assert found.dtype == np.float32
    return found


def trained(number: int, *, scale: float = 0.1, seed: int = 0) -> list[NDArray[np.float32]]:
    """Weights of clients that have moved a little from what was sent, no two as far."""
    generator = np.random.default_rng(seed)
    together = generator.standard_normal(SIZE)
    return [
        (SENT + scale * (together + (1 + 0.05 * c) * generator.standard_normal(SIZE))).astype(
            np.float32
        )
        for c in range(number)
    ]


def by_hand(aggregation: str, weights: list[NDArray[np.floating]]) -> NDArray[np.float64]:
    """Aggregate as the papers say, value by value, in float64."""
    rows = [[float(value) for value in client] for client in weights]
    if aggregation == "krum":
        gaps = [[sum((a - b) ** 2 for a, b in zip(x, y, strict=True)) for y in rows] for x in rows]
        # The n - f - 2 nearest of the others: the client itself, at 0, comes first.
        scores = [sum(sorted(gap)[1 : len(rows) - 1 - 2 + 1]) for gap in gaps]
        return np.array(rows[int(np.argmin(scores))])
    found = []
    for column in zip(*rows, strict=True):
        ordered, n = sorted(column), len(column)
        cut = (n - 1) // 2 if aggregation == "median" else n // 4
        kept = ordered[cut : n - cut]
        found.append(sum(kept) / len(kept))
    return np.array(found)


@pytest.mark.parametrize("dtype", [np.float32, np.float16])
@pytest.mark.parametrize("number", [5, 8])
@pytest.mark.parametrize("aggregation", ROBUST)
def test_robust_aggregation_is_what_its_paper_says(
    aggregation: str, number: int, dtype: type
) -> None:
    weights = [w.astype(dtype) for w in trained(number)]
    expected = by_hand(aggregation, weights)
    for order in (1, -1):
        found = aggregated(aggregation, weights, order=order)
        np.testing.assert_allclose(found, expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("aggregation", ROBUST)
def test_robust_aggregation_does_not_depend_on_the_order_of_arrival_or_on_pieces(
    aggregation: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    weights = trained(7)
    expected = aggregated(aggregation, weights)
    assert np.array_equal(aggregated(aggregation, weights, order=-1), expected)
    monkeypatch.setattr("server_app.aggregation.CHUNK", 7)
    assert np.allclose(aggregated(aggregation, weights), expected, rtol=0, atol=1e-7)


@pytest.mark.parametrize("aggregation", ROBUST)
def test_robust_aggregation_bears_an_attacker_that_moves_the_mean_anywhere(
    aggregation: str,
) -> None:
    honest = trained(6)
    attacked = [*honest[:3], np.full(SIZE, 1e5, np.float32), *honest[3:]]
    furthest = max(distance(w, SENT) for w in honest)
    assert distance(aggregated(aggregation, attacked), SENT) <= furthest
    assert distance(aggregated("fedavg", attacked), SENT) > 1e4


def test_krum_tells_clients_apart_that_differ_by_little_beside_their_weights() -> None:
    # Of the weights themselves, the distances in float32 would be rounding.
    generator = np.random.default_rng(3)
    weights = [
        (SENT + 1e-5 * (1 + c % 3) * generator.standard_normal(SIZE)).astype(np.float32)
        for c in range(7)
    ]
    found = aggregated("krum", weights)
    np.testing.assert_allclose(found, by_hand("krum", weights), rtol=0, atol=1e-7)


def test_multi_krum_is_the_plain_mean_of_those_that_krum_likes_best() -> None:
    weights = trained(6)
    rows = np.stack(weights).astype(np.float64)
    gaps = ((rows[:, None] - rows[None]) ** 2).sum(2)
    scores = np.sort(gaps, axis=1)[:, 1 : 6 - 1 - 2 + 1].sum(1)
    expected = rows[np.argsort(scores)[:3]].mean(0)
    found = aggregated("krum", weights, settings="federation.num_selected=3")
    np.testing.assert_allclose(found, expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("aggregation", ["fedavg", *ROBUST])
def test_surplus_of_a_client_does_not_end_the_aggregation(aggregation: str) -> None:
    overrides = [f"federation.aggregation={aggregation}", *ROBUST.get(aggregation, "").split()]
    config = load_config(overrides).federation
    aggregate = build_aggregation(config, Weighing.of(config, simulated=False))
    replies = [(c, reply(w, 5, loss=1.0)) for c, w in enumerate(trained(5))]
    replies[2][1].content["more"] = MetricRecord({"x": [1.0, 2.0]})
    replies[3][1].content["arrays 2"] = ArrayRecord({"y": Array(np.ones(2))})
    replies[4][1].content.metric_records[Key.METRICS]["surplus"] = [1.0]
    arrays, _ = aggregate(iter(replies), SENT)
    assert arrays is not None and arrays[Key.PACKED].shape == (SIZE,)
    assert aggregate(iter(()), SENT) == (None, None)


def test_distance_is_the_norm_of_the_difference() -> None:
    one, other = clients(2)[0][0], clients(2)[1][0]
    expected = np.linalg.norm(one.astype(np.float64) - other)
    assert distance(one, other) == pytest.approx(expected, rel=1e-12)
    assert distance(one, one) == 0
