import itertools
from functools import partial

import numpy as np
import pytest
import torch
from flwr.app import Message, MetricRecord, RecordDict
from flwr.serverapp.strategy import FedAvg, FedMedian, FedTrimmedAvg, MultiKrum
from numpy.typing import NDArray
from torch import nn

from server_app.build_strategy import build_strategy
from server_app.messages import addressed, packed_record
from server_app.strategies import (
    FRACTION_BITS,
    SUM_LIMIT,
    FixedPointSum,
    Strategy,
    WeightedMean,
    Weights,
    distance,
    moving_average,
)
from server_app.weighting import Weighting
from task.config import load_config
from task.protocol.wire import Key, WeightLayout
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


def reduced(weighted: list[Client], weighting: Weighting | None = None) -> NDArray[np.float32]:
    """Reduce the weights of clients 0, 1, ... by FedAvg."""
    reducer = WeightedMean(weighting or Weighting())
    for client, (weights, num_images) in enumerate(weighted):
        reducer.add(client, weights, num_images)
    return reducer.reduce()


def by_flower(strategy: FedAvg, weighted: list[Client]) -> NDArray[np.float32]:
    """Let a strategy of Flower's aggregate the weights of clients."""
    Network()  # sets what Flower makes messages with
    replies = []
    for weights, num_images in weighted:
        asked = addressed(RecordDict(), node_id=7, message_type="train", timeout=60)
        asked.metadata.__dict__["_message_id"] = "asked"
        metrics = MetricRecord({Key.NUM_EXAMPLES: num_images})
        content = RecordDict({Key.ARRAYS: packed_record(weights), Key.METRICS: metrics})
        replies.append(Message(content, reply_to=asked))
    arrays, _ = strategy.aggregate_train(1, replies)
    assert arrays is not None
    found: NDArray[np.float32] = arrays[Key.PACKED].numpy()
    return found


def test_weighted_mean_is_that_of_flowers_own_fedavg() -> None:
    expected = by_flower(FedAvg(), clients(5))
    np.testing.assert_allclose(reduced(clients(5)), expected, rtol=1e-5, atol=1e-6)


def test_weights_of_all_clients_but_the_largest_claims_are_let_go_at_once() -> None:
    for share, held in ((None, 0), (0.5, 1), (0.3, 3)):
        reducer = WeightedMean(Weighting(max_share=share))
        for client, (weights, num_images) in enumerate(clients(6)):
            reducer.add(client, weights, num_images)
        assert len(reducer._largest) == held


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
    monkeypatch.setattr("task.protocol.secure_aggregation.fixed_point.CHUNK", 7)
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
    assert np.array_equal(total.mean(), share) and total.num_images == 4


@pytest.mark.parametrize("shape", [(SIZE - 1,), (SIZE, 1), ()])
def test_weights_of_another_shape_are_refused(shape: tuple[int, ...]) -> None:
    total = FixedPointSum()
    total.add(np.ones(SIZE, np.float32), 1)
    with pytest.raises(ValueError, match=r"must have shape \(300,\), got \("):
        total.add(np.ones(shape, np.float32), 1)


def test_mean_of_nothing_is_refused() -> None:
    with pytest.raises(ValueError, match="at least 1 client, got 0"):
        FixedPointSum().mean()


def test_claim_of_a_hundred_million_images_counts_for_its_share_in_any_order() -> None:
    half = Weighting(max_share=0.5)
    weighted = [*clients(4), (np.full(SIZE, 0.5, np.float32), 10**8)]
    lowered = [*weighted[:4], (weighted[4][0], sum(count for _, count in weighted[:4]))]
    expected = mean_of(lowered)
    for order in itertools.permutations(weighted):
        assert np.array_equal(reduced([*order], half), expected)
    # Where nobody claims too much the cap changes no bit.
    modest = [(w, 100 + n % 7) for w, n in clients(5)]
    for share in (0.5, 0.7):
        assert np.array_equal(reduced(modest, Weighting(max_share=share)), mean_of(modest))


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
    config = load_config([*overrides, *settings.split()])
    layout = WeightLayout({"w": torch.Size([SIZE])})
    strategy = build_strategy(config, layout, Weighting.of(config, simulated=True))
    strategy.broadcast({"w": torch.zeros(SIZE)}, 9)
    strategy.add(0, np.ones(SIZE, np.float32), 1)  # nothing is left of an attempt that failed
    assert np.array_equal(strategy.broadcast({"w": torch.from_numpy(SENT)}, 9), SENT)
    for client, client_weights in [*enumerate(weights)][::order]:
        strategy.add(client, client_weights, 10 + client)
    found = strategy.finish()["w"]
    assert strategy.state_dict() == {} and found.dtype == torch.float32
    return found.numpy()


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
    monkeypatch.setattr("task.protocol.secure_aggregation.fixed_point.CHUNK", 7)
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


def test_bounded_mean_is_fedavg_for_small_updates_and_stops_an_attacker_at_its_range() -> None:
    honest = trained(6)
    settings = "federation.update_range=4 federation.max_images_per_client=20"
    found = aggregated("bounded_mean", honest, settings=settings)
    np.testing.assert_allclose(found, aggregated("fedavg", honest), rtol=0, atol=1e-6)
    assert np.array_equal(found, aggregated("bounded_mean", honest, settings=settings, order=-1))
    attacked = [*honest, np.full(SIZE, 1e5, np.float32)]
    moved = aggregated("bounded_mean", attacked, settings=settings)
    assert np.abs(moved - SENT).max() < 4
    # More images than the cap make no difference to those that have as many.
    capped = aggregated("bounded_mean", honest, settings="federation.max_images_per_client=5")
    np.testing.assert_allclose(capped, np.mean(honest, axis=0), rtol=0, atol=1e-6)


def test_multi_krum_is_the_plain_mean_of_those_that_krum_likes_best() -> None:
    weights = trained(6)
    rows = np.stack(weights).astype(np.float64)
    gaps = ((rows[:, None] - rows[None]) ** 2).sum(2)
    scores = np.sort(gaps, axis=1)[:, 1 : 6 - 1 - 2 + 1].sum(1)
    expected = rows[np.argsort(scores)[:3]].mean(0)
    found = aggregated("krum", weights, settings="federation.num_selected=3")
    np.testing.assert_allclose(found, expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    ("aggregation", "flowers"),
    [
        ("median", FedMedian()),
        ("trimmed_mean", FedTrimmedAvg(beta=0.25)),
        ("krum", MultiKrum(num_malicious_nodes=1, num_nodes_to_select=1)),
    ],
)
def test_robust_aggregation_is_flowers_own_over_updates_to_the_bit(
    aggregation: str, flowers: FedAvg
) -> None:
    weights = trained(8)
    expected = SENT + by_flower(flowers, [(w - SENT, 1) for w in weights])
    assert np.array_equal(aggregated(aggregation, weights), expected)


def test_distance_is_the_norm_of_the_difference() -> None:
    one, other = clients(2)[0][0], clients(2)[1][0]
    expected = np.linalg.norm(one.astype(np.float64) - other)
    assert distance(one, other) == pytest.approx(expected, rel=1e-12)
    assert distance(one, one) == 0


class Counting(nn.Module):
    """A network with a counter and a tensor that never leaves a client."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 2)
        self.register_buffer("steps", torch.tensor(7))
        self.register_buffer("latents", torch.ones(4))


def test_counters_and_local_tensors_are_not_averaged_and_stay() -> None:
    model = Counting()
    layout = WeightLayout.of(model, {"latents"})
    strategy = Strategy(layout, lambda _, __: WeightedMean(Weighting()), ema_decay=0.5)
    sent = strategy.broadcast(model.state_dict(), 2)
    assert sent.shape == (8,)
    strategy.add(0, sent + 1, 5)
    weights = strategy.finish()
    assert strategy.average is not None
    for state in (weights, strategy.average):
        assert state["steps"].item() == 7 and state["steps"].dtype == torch.int64
        assert state["latents"].tolist() == [1] * 4
    torch.testing.assert_close(weights["layer.bias"], model.layer.bias + 1)
    Counting().load_state_dict(weights)


OPTIMIZERS = {
    "sgd": partial(torch.optim.SGD, lr=1.0),
    "momentum": partial(torch.optim.SGD, lr=0.7, momentum=0.9),
    "adam": partial(torch.optim.Adam, lr=0.01, eps=1e-3),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_server_optimizer_steps_along_the_mean_update_and_goes_on_after_a_resume(
    name: str,
) -> None:
    layout = WeightLayout({"w": torch.Size([SIZE])})
    rounds = [clients(3, seed=seed) for seed in range(4)]

    def opened() -> Strategy:
        return Strategy(
            layout, lambda _, __: WeightedMean(Weighting()), server_optimizer=OPTIMIZERS[name]
        )

    def played(strategy: Strategy, weights: Weights, rounds: list[list[Client]]) -> Weights:
        for weighted in rounds:
            sent = strategy.broadcast(weights, 2)
            for client, (update, num_images) in enumerate(weighted):
                strategy.add(client, sent + 0.01 * update, num_images)
            weights = strategy.finish()
        return weights

    first = {"w": torch.from_numpy(SENT)}
    # By hand, with PyTorch's own loop.
    parameter = nn.Parameter(first["w"].clone())
    optimizer = OPTIMIZERS[name]([parameter])
    for weighted in rounds:
        mean = numpys_mean([(0.01 * update, n) for update, n in weighted])
        parameter.grad = torch.from_numpy(-mean.astype(np.float32))
        optimizer.step()
    whole = played(opened(), first, rounds)
    torch.testing.assert_close(whole["w"], parameter.detach(), rtol=1e-5, atol=1e-4)

    ended, resumed = opened(), opened()
    weights = played(ended, first, rounds[:2])
    resumed.load_state_dict({group: dict(tensors) for group, tensors in ended.state_dict().items()})
    assert torch.equal(played(resumed, weights, rounds[2:])["w"], whole["w"])


def test_moving_average_is_the_closed_form() -> None:
    decay, rounds = 0.9, 20
    drawn = torch.randn(rounds, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    average: Weights | None = None
    for weights in drawn:
        average = moving_average(average, {"w": weights}, decay)
    powers = decay ** torch.arange(rounds - 1, -1, -1, dtype=torch.float64)
    shares = torch.cat([powers[:1], (1 - decay) * powers[1:]])
    assert shares.sum().item() == pytest.approx(1)
    assert average is not None
    torch.testing.assert_close(average["w"], shares @ drawn)


def test_moving_average_is_off_without_a_decay_and_owns_its_numbers() -> None:
    weights = {"w": torch.ones(3)}
    assert moving_average(None, weights, None) is None
    assert moving_average(weights, weights, None) is None
    first = moving_average(None, weights, 0.5)
    assert first is not None
    weights["w"] += 1
    assert first["w"].tolist() == [1, 1, 1]
