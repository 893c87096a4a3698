"""How a simulation deals one data set out to its clients: class by class, drawn or as told.

Every image goes to exactly one client, and every process that builds the partition from the
same seed and labels gets the same one.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import Tensor

from task.checks import require
from task.config import Config
from task.data import Dataset
from task.data.split import rarest_labels
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

    @property
    def shares(self) -> dict[int, tuple[np.ndarray, np.ndarray]]:
        """By client the indices of its training images and of its test images."""
        return dict(enumerate(zip(self.train_indices, self.test_indices, strict=True)))

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
        train_groups=_as_array(dataset.train.groups),
        test_groups=_as_array(dataset.test.groups),
    )


def _as_array(groups: Tensor | None) -> np.ndarray | None:
    return None if groups is None else groups.numpy()


def build_partition(
    train_labels: np.ndarray,
    test_labels: np.ndarray,
    *,
    num_classes: int,
    num_clients: int,
    beta: float | None,
    counts: Sequence[Sequence[int]] | None = None,
    seed: int,
    train_groups: np.ndarray | None = None,
    test_groups: np.ndarray | None = None,
) -> Partition:
    """Deal the training images out, and the test images in the same proportions.

    With groups, whole patients are dealt out instead, each as one of the rarest class that it has
    images of; one with images in both splits goes to one client with all of them.

    Args:
        train_labels: [n] int64 in [0, num_classes).
        test_labels: [m] int64 in [0, num_classes).
        num_classes: > 0.
        num_clients: > 0.
        beta: concentration of the Dirichlet distribution, > 0; inf deals evenly; None with counts.
        counts: [num_clients, num_classes] training images of each client and class, exactly.
        seed: of the run.
        train_groups: [n] int64, equal for the images of one patient; None: each stands alone.
        test_groups: [m] int64, the same of the test images; given if and only if the others are.

    Raises:
        ValueError: see `dirichlet_counts` and `check_counts`, or a label is out of range, or there
            are both counts and groups.
    """
    generator = numpy_generator(seed, Stream.PARTITION)
    train_sizes, test_sizes = (
        np.bincount(labels, minlength=num_classes) for labels in (train_labels, test_labels)
    )
    found = max(len(train_sizes), len(test_sizes))
    require(found == num_classes, "labels", f"below {num_classes}", found - 1)
    together = (train_groups is None) == (test_groups is None)
    require(together, "test_groups", "given if and only if train_groups are", test_groups)
    if train_groups is not None and test_groups is not None:
        require(
            counts is None,
            "partition.counts",
            "null (with partition.beta=0.5) where images have patients, whom numbers would part",
            counts,
        )
        return _deal_patients(
            _Patients.of(train_labels, train_groups),
            _Patients.of(test_labels, test_groups),
            shape=(num_clients, num_classes),
            beta=_given(beta),
            generator=generator,
        )
    if counts is not None:
        dealt = check_counts(counts, train_sizes, num_clients)
    else:
        dealt = dirichlet_counts(train_sizes, num_clients, beta=_given(beta), generator=generator)
    test_counts = counts_like(dealt, test_sizes)
    return Partition(
        counts=dealt,
        test_counts=test_counts,
        train_indices=assign(train_labels, dealt, generator=generator),
        test_indices=assign(test_labels, test_counts, generator=generator),
    )


def _given(beta: float | None) -> float:
    if beta is None:
        raise ValueError("partition.beta must be a number where partition.counts is null, got None")
    return beta


@dataclass(frozen=True, eq=False)
class _Patients:
    """The patients of one split.

    Attributes:
        labels: [n] int64, of the images.
        numbers: [P] int64, sorted, of the patients.
        members: [n] int64, the place of each image's patient in `numbers`.
        kinds: [P] int64, the class that each counts as.
    """

    labels: np.ndarray
    numbers: np.ndarray
    members: np.ndarray
    kinds: np.ndarray

    @classmethod
    def of(cls, labels: np.ndarray, groups: np.ndarray) -> "_Patients":
        return cls(labels, np.unique(groups), *rarest_labels(labels, groups))

    def images(
        self, owners: np.ndarray, shape: tuple[int, int]
    ) -> tuple[np.ndarray, list[np.ndarray]]:
        """Count and list the images of each client, whose patients `owners` ([P] int64) tells."""
        of_images = owners[self.members]
        counts = np.zeros(shape, dtype=np.int64)
        np.add.at(counts, (of_images, self.labels), 1)
        return counts, [np.flatnonzero(of_images == client) for client in range(shape[0])]


def _deal_patients(
    train: _Patients,
    test: _Patients,
    *,
    shape: tuple[int, int],
    beta: float,
    generator: np.random.Generator,
) -> Partition:
    num_clients, num_classes = shape
    sizes = np.bincount(train.kinds, minlength=num_classes)
    dealt = dirichlet_counts(sizes, num_clients, beta=beta, generator=generator, unit="patients")
    owners = choose_owners(train.kinds, dealt, generator=generator)
    # A folder of test images may hold more of a patient who is trained on.
    places = np.searchsorted(train.numbers, test.numbers)
    known = np.isin(test.numbers, train.numbers)
    test_owners = np.empty(len(test.numbers), dtype=np.int64)
    test_owners[known] = owners[places[known]]
    others = test.kinds[~known]
    test_dealt = counts_like(dealt, np.bincount(others, minlength=num_classes))
    test_owners[~known] = choose_owners(others, test_dealt, generator=generator)
    counts, indices = train.images(owners, shape)
    test_counts, test_indices = test.images(test_owners, shape)
    return Partition(counts, test_counts, indices, test_indices)


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
    class_sizes: np.ndarray,
    num_clients: int,
    *,
    beta: float,
    generator: np.random.Generator,
    unit: str = "images",
) -> np.ndarray:
    """Draw how many images of each class each client gets; none goes away empty.

    Each class is cut at the rounded cumulative sums of proportions ~ Dirichlet(beta). A draw that
    leaves a client empty is repeated; after `MAX_DRAWS` the last one is mended by `fill_empty`.

    Args:
        class_sizes: [C] int64, images per class.
        num_clients: N > 0.
        beta: concentration, > 0; inf gives equal proportions.
        generator: of the proportions.
        unit: what is dealt out, for errors.

    Returns:
        [N, C] int64; each column adds up to its class size.

    Raises:
        ValueError: `beta` or `num_clients` is out of range, or there are more clients than images.

    Source: the split of the paper (Dirichlet, per class over clients) without its empty clients.
    """
    require(beta > 0, "partition.beta", "> 0 (inf deals every class evenly)", beta)
    number = int(class_sizes.sum())
    require(
        1 <= num_clients <= number,
        "federation.num_supernodes",
        f"between 1 and {number}, the number of training {unit}, so that no client is empty",
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
        ValueError: see `choose_owners`.
    """
    owners = choose_owners(labels, counts, generator=generator)
    return [np.flatnonzero(owners == client) for client in range(len(counts))]


def choose_owners(
    labels: np.ndarray, counts: np.ndarray, *, generator: np.random.Generator
) -> np.ndarray:
    """Choose the client of each image, or of each patient; arguments are those of `assign`.

    Returns:
        [n] int64.

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
    return owners
