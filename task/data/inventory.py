"""What became of every file of a data set: an image that is used, or left out, and why."""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, NamedTuple

import numpy as np
from torch import Tensor

from task.data.duplicates import Duplicates, find_duplicates
from task.data.images import Dataset
from task.data.listing import Listing

# Kinds of files that are named before the others are summed up.
MAX_KINDS = 8


class PatientCounts(NamedTuple):
    """How many patients the images of a data set are of.

    Attributes:
        train: with images to train on.
        test: with images to test with.
        in_both: with some of either.
        most_images: of a single one, in both.
    """

    train: int
    test: int
    in_both: int
    most_images: int


@dataclass(frozen=True)
class Inventory:
    """Every file of a data set, counted. It stays on the machine that holds the files.

    Attributes:
        classes: names of the classes.
        train: [C], training images of each class.
        test: [C], test images of each class.
        left_out: how many files beside them are not used, by class ("" where they are of none)
            and kind.
        note: how the splits came about, where that is not what was asked for.
        duplicates: images that are the same as another; None where no image was decoded yet.
        across_clients: training images that another client of a simulation holds as well.
        patients: how many the images are of; None where nothing says who they are.
    """

    classes: tuple[str, ...]
    train: tuple[int, ...]
    test: tuple[int, ...]
    left_out: Mapping[tuple[str, str], int] = field(default_factory=dict)
    note: str = ""
    duplicates: Duplicates | None = None
    across_clients: int | None = None
    patients: PatientCounts | None = None

    def describe(self) -> list[str]:
        """Say in a few lines what became of the files, warnings last."""
        return [*self._lines(), *(f"WARNING: {text}" for text in self._warnings())]

    def describe_missing(self, names: Iterable[str]) -> str:
        """Say what the folders of classes hold that have no images to train on."""
        return "; ".join(f"{name}: {self._held(name)}" for name in names)

    def as_json(self) -> dict[str, Any]:
        """Return the counts as plain numbers and lists, for a JSON file."""
        return {
            "classes": list(self.classes),
            "train_counts": list(self.train),
            "test_counts": list(self.test),
            "left_out": dict(_kinds(self.left_out)),
            "note": self.note,
            "duplicates": None if self.duplicates is None else asdict(self.duplicates),
            "across_clients": self.across_clients,
            "patients": None if self.patients is None else self.patients._asdict(),
        }

    def _lines(self) -> Iterable[str]:
        used = (
            f"{sum(self.train) + sum(self.test):,} images are used "
            f"({sum(self.train):,} to train on, {sum(self.test):,} to test with)"
        )
        left_out = sum(self.left_out.values())
        if left_out:
            total = sum(self.train) + sum(self.test) + left_out
            used = f"{total:,} in all: {used}, {_most_common(_kinds(self.left_out))}"
        yield used
        if self.patients is not None:
            train, test, in_both, _ = self.patients
            yield (
                f"the images are of {train + test - in_both:,} patients ({train:,} to train on, "
                f"{test:,} to test with)"
            )
        if self.note:
            yield self.note
        found = self.duplicates
        if found is not None and found.within_train + found.within_test:
            yield (
                f"{found.within_train:,} training and {found.within_test:,} test images repeat "
                "another of their split, pixel by pixel"
            )
        if self.across_clients:
            yield f"{self.across_clients:,} training images are at more than one client"

    def _warnings(self) -> Iterable[str]:
        for name, train, test in zip(self.classes, self.train, self.test, strict=True):
            if train + test == 0 and any(owner == name for owner, _ in self.left_out):
                yield f"{name} has no images: {self._held(name)}"
        if self.patients is not None:
            yield from self._warnings_of(self.patients)
        if self.duplicates is None:
            return
        in_both = dict(zip(self.classes, self.duplicates.in_both, strict=True))
        if any(in_both.values()):
            each = ", ".join(f"{name} {number:,}" for name, number in in_both.items() if number)
            yield (
                f"{sum(in_both.values()):,} of {sum(self.test):,} test images are training images "
                f"too, pixel by pixel ({each}): what is measured with them is too good; take them "
                "out of one of the splits"
            )
        if self.duplicates.under_two_classes:
            yield (
                f"{self.duplicates.under_two_classes:,} images stand under two classes or more, "
                "pixel by pixel: one of their labels is wrong"
            )

    def _warnings_of(self, patients: PatientCounts) -> Iterable[str]:
        images = sum(self.train) + sum(self.test)
        if 2 * patients.most_images > images:
            yield (
                f"one patient has {patients.most_images:,} of {images:,} images, which no split "
                "parts: check what says who is who (data.patient_pattern, data.patients), or leave "
                "it out where it cannot tell patients apart"
            )
        if patients.in_both:
            yield (
                f"{patients.in_both:,} patients have images to train on and images to test with: "
                "what is measured with these is too good; move them into one of the splits"
            )

    def _held(self, name: str) -> str:
        test = self.test[self.classes.index(name)]
        kinds = _kinds({key: n for key, n in self.left_out.items() if key[0] == name})
        held = [f"{test:,} images to test with"] if test else []
        return ", ".join([*held, _most_common(kinds)] if kinds else held) or "no file at all"


def inventory_of_listings(classes: Sequence[str], train: Listing, test: Listing) -> Inventory:
    """Count the files of two splits before any is decoded."""
    return Inventory(
        tuple(classes),
        _counted(train.labels, len(classes)),
        _counted(test.labels, len(classes)),
        train.left_out + test.left_out,
        test.note,
        patients=_count_patients(train.groups, test.groups),
    )


def inventory_of_dataset(classes: Sequence[str], dataset: Dataset) -> Inventory:
    """Count the images of a data set, its files, and the images that are the same."""
    return Inventory(
        tuple(classes),
        _counted(dataset.train.labels.numpy(), len(classes)),
        _counted(dataset.test.labels.numpy(), len(classes)),
        dataset.left_out,
        dataset.note,
        find_duplicates(dataset, len(classes)),
        patients=_count_patients(dataset.train.groups, dataset.test.groups),
    )


def _count_patients(
    train: np.ndarray | Tensor | None, test: np.ndarray | Tensor | None
) -> PatientCounts | None:
    if train is None or test is None:
        return None
    ours, theirs = Counter[int](train.tolist()), Counter[int](test.tolist())
    both = ours + theirs
    most = max(both.values(), default=0)
    return PatientCounts(len(ours), len(theirs), len(ours.keys() & theirs.keys()), most)


def _counted(labels: np.ndarray, num_classes: int) -> tuple[int, ...]:
    return tuple(np.bincount(labels, minlength=num_classes).tolist())


def _kinds(left_out: Mapping[tuple[str, str], int]) -> Counter[str]:
    kinds: Counter[str] = Counter()
    for (_, kind), number in left_out.items():
        kinds[kind] += number
    return kinds


def _most_common(kinds: Counter[str]) -> str:
    named = [f"{number:,} {kind}" for kind, number in kinds.most_common(MAX_KINDS)]
    rest = kinds.total() - sum(number for _, number in kinds.most_common(MAX_KINDS))
    if rest:
        named.append(f"{rest:,} others")
    return f"{kinds.total():,} left out ({', '.join(named)})"
