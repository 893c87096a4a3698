"""Images that are the same pixel by pixel, as the model sees them."""

import hashlib
from dataclasses import dataclass

import numpy as np
from torch import Tensor

from task.data.images import Dataset, ImageSet


@dataclass(frozen=True)
class Duplicates:
    """How many images are the same as another.

    Attributes:
        within_train: training images that repeat an earlier one.
        within_test: test images that repeat an earlier one.
        in_both: [C], of each class the test images that are training images too.
        under_two_classes: images, of both splits, that stand under another class as well.
    """

    within_train: int
    within_test: int
    in_both: tuple[int, ...]
    under_two_classes: int


def image_hash(pixels: bytes) -> bytes:
    """Return 8 bytes that are alike for the same pixels, and by chance once in 2^64."""
    return hashlib.blake2b(pixels, digest_size=8).digest()


def image_hashes(images: Tensor) -> np.ndarray:
    """Return the hash of each image.

    Args:
        images: [N, C, H, W] uint8.

    Returns:
        [N] uint64.
    """
    return np.frombuffer(b"".join(image_hash(image.tobytes()) for image in images.numpy()), "<u8")


def find_duplicates(dataset: Dataset, num_classes: int) -> Duplicates:
    """Count the images that are the same as another, within a split, in both and across classes."""
    train, test = (_hashes(images) for images in (dataset.train, dataset.test))
    shared = dataset.test.labels.numpy()[np.isin(test, train)]
    labels = np.concatenate([dataset.train.labels.numpy(), dataset.test.labels.numpy()])
    return Duplicates(
        within_train=len(train) - len(np.unique(train)),
        within_test=len(test) - len(np.unique(test)),
        in_both=tuple(np.bincount(shared, minlength=num_classes).tolist()),
        under_two_classes=_with_two_owners(np.concatenate([train, test]), labels),
    )


def count_across_clients(images: ImageSet, shares: list[np.ndarray]) -> int:
    """Count the images that another client of a simulation holds as well.

    Args:
        images: of all clients.
        shares: per client the indices of its images, int64; each index once.
    """
    owners = np.empty(len(images), dtype=np.int64)
    for client, indices in enumerate(shares):
        owners[indices] = client
    return _with_two_owners(_hashes(images), owners)


def _hashes(images: ImageSet) -> np.ndarray:
    return image_hashes(images.images) if images.hashes is None else images.hashes


def _with_two_owners(hashes: np.ndarray, owners: np.ndarray) -> int:
    _, same = np.unique(hashes, return_inverse=True)
    first, last = np.full(len(hashes), np.iinfo(np.int64).max), np.full(len(hashes), -1)
    np.minimum.at(first, same, owners)
    np.maximum.at(last, same, owners)
    return int((first != last)[same].sum())
