"""What a data set is, in few words and in one hash, to tell two of them apart."""

import hashlib
from pathlib import Path

from task.config import FILE_SETS, DataConfig
from task.data.images import Dataset, ImageSet


def describe_source(data: DataConfig) -> str:
    """Say where the images are from, without the path of a folder, which may tell too much."""
    if data.name in FILE_SETS:
        return f"folder {Path(data.root).name or '/'}"
    return "package scikit-learn" if data.name == "digits" else "files of torchvision"


def hash_images(dataset: Dataset) -> dict[str, str]:
    """Hash the images with their labels, in any order: of all, and of the training split.

    Equal images that are split otherwise have one hash of all and two of the training split.

    Returns:
        "all" and "train": 64 hexadecimal digits each.
    """
    train, test = map(_digests, (dataset.train, dataset.test))
    return {"all": _joined(train + test), "train": _joined(train)}


def _digests(images: ImageSet) -> list[bytes]:
    shape = repr(tuple(images.images.shape[1:]))
    pixels = images.images.contiguous().numpy()
    return [
        hashlib.sha256(f"{shape} {label} ".encode() + image.tobytes()).digest()
        for image, label in zip(pixels, images.labels.tolist(), strict=True)
    ]


def _joined(digests: list[bytes]) -> str:
    return hashlib.sha256(b"".join(sorted(digests))).hexdigest()
