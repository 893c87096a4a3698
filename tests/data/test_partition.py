import json
import subprocess
import sys

import numpy as np
import pytest

from task.data.partition import (
    Partition,
    assign,
    build_partition,
    counts_like,
    dirichlet_counts,
    dirichlet_shares,
    fill_empty,
)

SIZES = np.array([50, 0, 7, 1, 120])


def generator(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


def labels_of(sizes: np.ndarray, seed: int = 0) -> np.ndarray:
    return generator(seed).permutation(np.repeat(np.arange(len(sizes)), sizes))


def build(seed: int = 0, **options: object) -> Partition:
    train, test = labels_of(SIZES), labels_of(SIZES // 3 + 1)
    defaults = {"num_classes": 5, "num_clients": 10, "beta": 0.5}
    return build_partition(train, test, seed=seed, **(defaults | options))


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("beta", [1e-300, 1e-3, 0.1, 0.5, 5, 1e6, np.inf])
@pytest.mark.parametrize("num_clients", [1, 2, 10, 178])
def test_dirichlet_counts_cover_each_class_and_leave_no_client_empty(
    seed: int, beta: float, num_clients: int
) -> None:
    counts = dirichlet_counts(SIZES, num_clients, beta=beta, generator=generator(seed))
    assert counts.shape == (num_clients, 5) and counts.dtype == np.int64
    assert np.array_equal(counts.sum(axis=0), SIZES)
    assert counts.min() >= 0
    assert counts.sum(axis=1).min() >= 1


@pytest.mark.parametrize("num_clients", [1, 3, 7, 10])
def test_infinite_beta_is_even_within_one(num_clients: int) -> None:
    sizes = np.array([100, 101, 45, 7])
    counts = dirichlet_counts(sizes, num_clients, beta=np.inf, generator=generator())
    assert np.abs(counts - sizes / num_clients).max() < 1


@pytest.mark.parametrize("beta", [0.1, 0.5, 5])
def test_shares_have_the_moments_of_the_dirichlet_distribution(beta: float) -> None:
    shares = dirichlet_shares((4, 200_000), beta, generator())
    shares /= shares.sum(axis=0)
    # Var = m (1 - m) / (N beta + 1) with the mean m = 1 / N.
    assert shares.mean(axis=1) == pytest.approx(np.full(4, 0.25), abs=0.005)
    assert shares.var(axis=1) == pytest.approx(np.full(4, 0.1875 / (4 * beta + 1)), rel=0.03)


@pytest.mark.parametrize("beta", [5e-324, 1e-300, 1e-3, 1e300])
def test_shares_are_numbers_at_extreme_beta(beta: float) -> None:
    shares = dirichlet_shares((50, 1000), beta, generator())
    assert np.isfinite(shares).all()
    assert (shares.max(axis=0) == 1).all()


def test_small_beta_is_more_skewed_than_large() -> None:
    sizes = np.full(10, 1000)
    spreads = [
        dirichlet_counts(sizes, 10, beta=beta, generator=generator()).std()
        for beta in (0.1, 0.5, 5, np.inf)
    ]
    assert spreads == sorted(spreads, reverse=True)
    assert spreads[0] > 2 * spreads[2] and spreads[3] == 0


def test_fill_empty_moves_single_images_from_the_largest_client() -> None:
    counts = np.array([[0, 0], [3, 5], [0, 0], [6, 1]])
    # From client 1 (8 images, most of class 1), then client 1 again (7, as many as client 3).
    assert fill_empty(counts).tolist() == [[0, 1], [3, 3], [0, 1], [6, 1]]
    assert counts[0].sum() == 0


def test_counts_do_not_depend_on_the_order_of_the_labels() -> None:
    first, second = (
        build_partition(
            labels_of(SIZES, seed),
            labels_of(SIZES, seed),
            num_classes=5,
            num_clients=10,
            beta=0.5,
            seed=0,
        )
        for seed in (1, 2)
    )
    assert np.array_equal(first.counts, second.counts)


def test_counts_like_keeps_the_proportions_and_covers_each_class() -> None:
    counts = np.array([[10, 0, 3], [30, 0, 3], [60, 0, 0]])
    assert counts_like(counts, np.array([10, 9, 5])).tolist() == [[1, 3, 2], [3, 3, 3], [6, 3, 0]]


@pytest.mark.parametrize("seed", range(5))
def test_counts_like_is_within_one_of_the_exact_share(seed: int) -> None:
    counts = dirichlet_counts(SIZES, 10, beta=0.5, generator=generator(seed))
    sizes = np.array([17, 4, 3, 0, 31])
    exact = counts / np.maximum(SIZES, 1) * sizes
    dealt = counts_like(counts, sizes)
    assert np.array_equal(dealt.sum(axis=0), sizes)
    assert np.abs(dealt - exact)[:, [0, 2, 3, 4]].max() <= 1


@pytest.mark.parametrize("seed", range(5))
def test_assign_gives_each_image_to_one_client_by_the_counts(seed: int) -> None:
    labels = labels_of(SIZES)
    counts = dirichlet_counts(SIZES, 10, beta=0.5, generator=generator(seed))
    indices = assign(labels, counts, generator=generator(seed))
    assert sorted(np.concatenate(indices)) == [*range(len(labels))]
    assert all((np.diff(part) > 0).all() for part in indices)
    held = [np.bincount(labels[part], minlength=5) for part in indices]
    assert np.array_equal(held, counts)


def test_assign_shuffles_within_classes() -> None:
    labels, counts = np.zeros(100, np.int64), np.array([[50], [50]])
    first, again, other = (assign(labels, counts, generator=generator(s))[0] for s in (0, 0, 1))
    assert np.array_equal(first, again)
    assert not np.array_equal(first, other)


def test_assign_refuses_counts_that_do_not_add_up() -> None:
    with pytest.raises(ValueError, match="counts must be"):
        assign(np.array([0, 1, 1]), np.array([[1, 1]]), generator=generator())


def test_build_partition_deals_both_splits() -> None:
    partition = build()
    assert sorted(np.concatenate(partition.train_indices)) == [*range(SIZES.sum())]
    assert sorted(np.concatenate(partition.test_indices)) == [*range((SIZES // 3 + 1).sum())]
    assert np.array_equal(partition.test_counts, counts_like(partition.counts, SIZES // 3 + 1))


def test_build_partition_follows_the_seed() -> None:
    assert build(0).describe() == build(0).describe() != build(1).describe()


def test_build_partition_is_the_same_in_another_process() -> None:
    code = (
        "import json, numpy as np; from task.data.partition import build_partition; "
        "p = build_partition(np.arange(60) % 3, np.arange(9) % 3, "
        "num_classes=3, num_clients=4, beta=0.5, seed=7); "
        "print(json.dumps([i.tolist() for i in p.train_indices + p.test_indices]))"
    )
    output = subprocess.run(
        [sys.executable, "-c", code], check=True, capture_output=True, text=True
    ).stdout
    labels = np.arange(60) % 3
    here = build_partition(labels, labels[:9], num_classes=3, num_clients=4, beta=0.5, seed=7)
    assert json.loads(output) == [part.tolist() for part in here.train_indices + here.test_indices]


def test_given_counts_are_dealt_exactly() -> None:
    counts = [[20, 0, 0, 1, 0], [30, 0, 7, 0, 120]]
    partition = build(num_clients=2, beta=None, counts=counts)
    labels = labels_of(SIZES)
    held = [np.bincount(labels[part], minlength=5).tolist() for part in partition.train_indices]
    assert held == partition.counts.tolist() == counts
    assert sorted(np.concatenate(partition.train_indices)) == [*range(SIZES.sum())]


def test_given_counts_need_no_test_images() -> None:
    partition = build_partition(
        np.array([0, 1, 1]),
        np.array([], dtype=np.int64),
        num_classes=2,
        num_clients=2,
        beta=None,
        counts=[[1, 0], [0, 2]],
        seed=0,
    )
    assert [part.tolist() for part in partition.train_indices] == [[0], [1, 2]]
    assert [len(part) for part in partition.test_indices] == [0, 0]


@pytest.mark.parametrize(
    ("counts", "message"),
    [
        ([[1] * 5], r"partition\.counts must be a row for each of .*=2 clients, got '1 rows'"),
        ([[50, 0, 7, 1, 120], [0] * 5], r"partition\.counts\[1\] must be 5 numbers"),
        ([[50, 0, 7, 1], [1] * 5], r"partition\.counts\[0\] must be 5 numbers"),
        ([[51, 0, 7, 1, 120], [-1, 0, 0, 0, 1]], r"partition\.counts\[1\] must be .*>= 0"),
        ([[20, 0, 0, 1, 0], [31, 0, 7, 0, 120]], r"add up to .*\[50, 0, 7, 1, 120\], got \[51,"),
        (None, r"partition\.beta must be a number where partition\.counts is null"),
    ],
)
def test_counts_that_do_not_fit_are_refused(counts: list[list[int]], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build(num_clients=2, beta=None, counts=counts)


def test_describe_is_plain_json() -> None:
    described = json.loads(json.dumps(build().describe()))
    assert described["num_clients"] == len(described["train_counts"]) == 10
    assert np.array_equal(np.sum(described["train_counts"], axis=0), SIZES)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_clients": 179}, r"federation\.num_supernodes must be between 1 and 178.*got 179"),
        ({"num_clients": 0}, r"federation\.num_supernodes"),
        ({"beta": 0.0}, r"partition\.beta must be > 0.*got 0"),
        ({"beta": float("nan")}, r"partition\.beta"),
        ({"num_classes": 4}, r"labels must be below 4, got 4"),
    ],
)
def test_build_partition_refuses_what_cannot_be_dealt(
    options: dict[str, object], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        build(**options)
