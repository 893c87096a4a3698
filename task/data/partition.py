"""How a simulation deals one data set out to its clients: class by class, drawn or as told.

Every image goes to exactly one client, and every process that builds the partition from the
same seed and labels gets the same one.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from task.checks import require
from task.config import Config
from task.data import Dataset
from task.randomness import Stream, numpy_generator

# After so many draws that left a client without images, single images are moved instead.
MAX_DRAWS = 100


@dataclass(frozen=True, eq=False)
class Partition:
    """Which client holds which images.

    Attributes:
        counts: [N, C] int64, training images of each client and class.
        test_counts: [N, C] int64, the same of the test images.
        train_indices: per client the sorted indices of its training images, int64.
        test_indices: per client the sorted indices of its test images, which may be none.
    """

    counts: np.ndarray
    test_counts: np.ndarray
    train_indices: list[np.ndarray]
    test_indices: list[np.ndarray]

    def describe(self) -> dict[str, Any]:
        """Return the counts as plain numbers and lists, a row per client, for a JSON file."""
        return {
            "num_clients": len(self.counts),
            "train_counts": self.counts.tolist(),
            "test_counts": self.test_counts.tolist(),
        }


def partition_dataset(config: Config, dataset: Dataset, num_clients: int) -> Partition:
    """Deal a data set out as a configuration says; see `build_partition`."""
    return build_partition(
        dataset.train.labels.numpy(),
        dataset.test.labels.numpy(),
        num_classes=len(config.data.classes),
        num_clients=num_clients,
        beta=config.partition.beta,
        counts=config.partition.counts,
        seed=config.seed,
    )


def build_partition(
    train_labels: np.ndarray,
    test_labels: np.ndarray,
    *,
    num_classes: int,
    num_clients: int,
    beta: float | None,
    counts: Sequence[Sequence[int]] | None = None,
    seed: int,
) -> Partition:
    """Deal the training images out, and the test images in the same proportions.

    Args:
        train_labels: [n] int64 in [0, num_classes).
        test_labels: [m] int64 in [0, num_classes).
        num_classes: > 0.
        num_clients: > 0.
        beta: concentration of the Dirichlet distribution, > 0; inf deals evenly; None with counts.
        counts: [num_clients, num_classes] training images of each client and class, exactly.
        seed: of the run.

    Raises:
        ValueError: see `dirichlet_counts` and `check_counts`, or a label is out of range.
    """
    generator = numpy_generator(seed, Stream.PARTITION)
    train_sizes, test_sizes = (
        np.bincount(labels, minlength=num_classes) for labels in (train_labels, test_labels)
    )
    found = max(len(train_sizes), len(test_sizes))
    require(found == num_classes, "labels", f"below {num_classes}", found - 1)
    if counts is not None:
        dealt = check_counts(counts, train_sizes, num_clients)
    elif beta is not None:
        dealt = dirichlet_counts(train_sizes, num_clients, beta=beta, generator=generator)
    else:
        raise ValueError("partition.beta must be a number where partition.counts is null, got None")
    test_counts = counts_like(dealt, test_sizes)
    return Partition(
        counts=dealt,
        test_counts=test_counts,
        train_indices=assign(train_labels, dealt, generator=generator),
        test_indices=assign(test_labels, test_counts, generator=generator),
    )


def check_counts(
    counts: Sequence[Sequence[int]], class_sizes: np.ndarray, num_clients: int
) -> np.ndarray:
    """Return given counts as an array, if they deal every image out and leave no client empty.

    Args:
        counts: [num_clients, C], images of each client and class.
        class_sizes: [C] int64, images per class.
        num_clients: > 0.

    Raises:
        ValueError: they do not.
    """
    require(
        len(counts) == num_clients,
        "partition.counts",
        f"a row for each of federation.num_supernodes={num_clients} clients",
        f"{len(counts)} rows",
    )
    for client, row in enumerate(counts):
        require(
            len(row) == len(class_sizes) and min(row) >= 0 and sum(row) > 0,
            f"partition.counts[{client}]",
            f"{len(class_sizes)} numbers >= 0, one per class, not all of them 0",
            list(row),
        )
    dealt = np.array(counts, dtype=np.int64)
    require(
        np.array_equal(dealt.sum(axis=0), class_sizes),
        "partition.counts",
        f"rows that add up to the training images per class, {class_sizes.tolist()}",
        dealt.sum(axis=0).tolist(),
    )
    return dealt


def dirichlet_counts(
    class_sizes: np.ndarray, num_clients: int, *, beta: float, generator: np.random.Generator
) -> np.ndarray:
    """Draw how many images of each class each client gets; none goes away empty.

    Each class is cut at the rounded cumulative sums of proportions ~ Dirichlet(beta). A draw that
    leaves a client empty is repeated; after `MAX_DRAWS` the last one is mended by `fill_empty`.

    Args:
        class_sizes: [C] int64, images per class.
        num_clients: N > 0.
        beta: concentration, > 0; inf gives equal proportions.
        generator: of the proportions.

    Returns:
        [N, C] int64; each column adds up to its class size.

    Raises:
        ValueError: `beta` or `num_clients` is out of range, or there are more clients than images.

    Source: the split of the paper (Dirichlet, per class over clients) without its empty clients.
    """
    require(beta > 0, "partition.beta", "> 0 (inf deals every class evenly)", beta)
    images = int(class_sizes.sum())
    require(
        1 <= num_clients <= images,
        "federation.num_supernodes",
        f"between 1 and {images}, the number of training images, so that no client is empty",
        num_clients,
    )
    for _ in range(MAX_DRAWS):
        shares = dirichlet_shares((num_clients, len(class_sizes)), beta, generator)
        counts = cut(shares, class_sizes)
        if counts.any(axis=1).all():
            return counts
    return fill_empty(counts)


def dirichlet_shares(
    shape: tuple[int, int], beta: float, generator: np.random.Generator
) -> np.ndarray:
    """Draw columns of proportions ~ Dirichlet(beta), up to a factor per column.

    The logarithms are drawn, because numpy's Dirichlet and gamma variates underflow to zeros at
    small beta: G ~ Gamma(beta + 1) and E ~ Exp(1) give log G - E / beta ~ log Gamma(beta).

    Args:
        shape: clients, classes.
        beta: > 0; inf gives ones.
        generator: of the draws.

    Source: Marsaglia and Tsang 2000, Gamma(a) ~ Gamma(a + 1) U^(1 / a), in logarithms.
    """
    if np.isinf(beta):
        return np.ones(shape)
    log_gamma = np.log(generator.standard_gamma(beta + 1, shape))
    # Below 1e-300 the quotient overflows, and long before that one client takes all.
    log_gamma -= generator.standard_exponential(shape) / max(beta, 1e-300)
    shares: np.ndarray = np.exp(log_gamma - log_gamma.max(axis=0))
    return shares


def cut(shares: np.ndarray, class_sizes: np.ndarray) -> np.ndarray:
    """Cut each class at the rounded cumulative sums of its clients' shares.

    Args:
        shares: [N, C] >= 0, with a positive sum in each column.
        class_sizes: [C] int64.

    Returns:
        [N, C] int64; each column adds up to its class size.
    """
    ends = np.cumsum(shares, axis=0)
    ends = np.rint(ends / ends[-1] * class_sizes).astype(np.int64)
    return np.diff(ends, axis=0, prepend=0)


def fill_empty(counts: np.ndarray) -> np.ndarray:
    """Give each empty client one image: of the largest client, from that client's largest class.

    Args:
        counts: [N, C] int64 with a sum of at least N.
    """
    counts = counts.copy()
    for client in np.flatnonzero(~counts.any(axis=1)):
        donor = counts.sum(axis=1).argmax()
        label = counts[donor].argmax()
        counts[donor, label] -= 1
        counts[client, label] += 1
    return counts


def counts_like(counts: np.ndarray, class_sizes: np.ndarray) -> np.ndarray:
    """Deal another split out in the proportions of `counts`, class by class.

    Args:
        counts: [N, C] int64; a class without images here is dealt evenly.
        class_sizes: [C] int64, images per class of the other split.

    Returns:
        [N, C] int64; each column adds up to its class size, a row may be empty.
    """
    return cut(np.where(counts.any(axis=0), counts, 1), class_sizes)


def assign(
    labels: np.ndarray, counts: np.ndarray, *, generator: np.random.Generator
) -> list[np.ndarray]:
    """Choose which images make up the counts of each client.

    Args:
        labels: [n] int64.
        counts: [N, C] int64.
        generator: shuffles the images of each class.

    Returns:
        Per client the sorted indices of its images, int64; together each index exactly once.

    Raises:
        ValueError: the counts of a class do not add up to its number of labels.
    """
    class_sizes = np.bincount(labels, minlength=counts.shape[1])
    require(
        np.array_equal(counts.sum(axis=0), class_sizes),
        "counts",
        f"[clients, classes] with column sums {class_sizes.tolist()}, the images per class",
        counts.sum(axis=0).tolist(),
    )
    owners = np.empty(len(labels), dtype=np.int64)
    clients = np.arange(len(counts))
    for label, column in enumerate(counts.T):
        members = generator.permutation(np.flatnonzero(labels == label))
        owners[members] = np.repeat(clients, column)
    return [np.flatnonzero(owners == client) for client in clients]
