"""The data sets that come with a library: scikit-learn's digits and those of torchvision."""

from functools import partial
from http.client import HTTPException
from pathlib import Path

import numpy as np
import torch

from task.checks import require
from task.config import DataConfig
from task.data.images import Dataset, ImageSet, reshape
from task.data.listing import UnknownClassError
from task.data.split import split_validation
from task.randomness import Stream, numpy_generator

MNIST_FILES = tuple(
    f"{split}-{part}-ubyte"
    for split in ("train", "t10k")
    for part in ("images-idx3", "labels-idx1")
)

# By name: the class in torchvision, the folder below data.root and the files it reads there.
TORCHVISION_SETS = {
    "mnist": ("MNIST", "MNIST/raw", MNIST_FILES),
    "fashion_mnist": ("FashionMNIST", "FashionMNIST/raw", MNIST_FILES),
    "cifar10": (
        "CIFAR10",
        "cifar-10-batches-py",
        ("batches.meta", *(f"data_batch_{i}" for i in range(1, 6)), "test_batch"),
    ),
    "svhn": ("SVHN", ".", ("train_32x32.mat", "test_32x32.mat")),
}


def load_packaged(data: DataConfig, *, download: bool) -> Dataset:
    """Load a data set as square images with the channels that the model expects.

    Args:
        data: of digits, or of one of `TORCHVISION_SETS`; gray images fill three channels.
        download: whether to fetch what is not below `data.root`; never on a hospital's own node,
            which would train on public images in the place of its own.

    Raises:
        FileNotFoundError: the files are not below `root` and are not, or cannot be, downloaded.
        ValueError: an option is out of range or does not fit the set.
        UnknownClassError: the set has more classes.
    """
    if data.name == "digits":
        train, test = read_digits(data.test_fraction, data.split_seed)
    else:
        require(
            data.test_fraction is None,
            "data.test_fraction",
            f"null for data={data.name}, which has its own test split",
            data.test_fraction,
        )
        train, test = (
            read_torchvision(data.name, Path(data.root), train=part, download=download)
            for part in (True, False)
        )
    found = 1 + int(max(train.labels.max(), test.labels.max()))
    # Fewer are welcome: a hospital need not have every class of a run.
    if found > len(data.classes):
        raise UnknownClassError(
            f"data.classes must be at least {found} names for data={data.name}, "
            f"got {len(data.classes)}"
        )
    train, test = (reshape(part, data.image_size, data.channels) for part in (train, test))
    return Dataset(train, test)


def read_digits(test_fraction: float | None, seed: int) -> tuple[ImageSet, ImageSet]:
    """Read scikit-learn's 1,797 digits of 8x8 and cut a stratified test split off.

    Raises:
        ValueError: `test_fraction` is None or not in (0, 1).
    """
    if test_fraction is None:
        raise ValueError(
            "data.test_fraction must be between 0 and 1 for data=digits, which has no test split "
            "of its own, got None"
        )
    # Imported here because it takes seconds, and every process of a run would pay them.
    from sklearn.datasets import load_digits  # type: ignore[import-untyped]

    digits = load_digits()
    images = np.rint(digits.images * (255 / 16)).astype(np.uint8)
    everything = ImageSet(torch.from_numpy(images)[:, None], torch.from_numpy(digits.target).long())
    generator = numpy_generator(seed, Stream.TEST_SPLIT)
    train, test = split_validation(digits.target, test_fraction, generator=generator)
    return everything.subset(train), everything.subset(test)


def missing_files(name: str, root: Path) -> list[str]:
    """Name the files of a packaged data set that are not below `root`; none where all are."""
    if name == "digits":
        return []
    _, folder, files = TORCHVISION_SETS[name]
    return [file for file in files if not (root / folder / file).is_file()]


def read_torchvision(name: str, root: Path, *, train: bool, download: bool) -> ImageSet:
    """Read the training or the test split of one of torchvision's sets, whole.

    Raises:
        FileNotFoundError: the files are not below `root` and cannot be downloaded.
    """
    # Imported here because it takes seconds, and every process of a run would pay them.
    from torchvision import datasets  # type: ignore[import-untyped]

    kind, folder, files = TORCHVISION_SETS[name]
    split = {"split": "train" if train else "test"} if name == "svhn" else {"train": train}
    load = partial(getattr(datasets, kind), root, **split)
    place = f"the files {', '.join(files)} in {(root / folder).resolve()}"
    try:
        found = load(download=False)
    except (RuntimeError, ValueError) as missing:  # torchvision's words for missing and damaged
        if not download:
            raise FileNotFoundError(
                f"data.root={root}: data={name} needs {place}; they are missing or damaged"
            ) from missing
        try:
            found = load(download=True)
        except (RuntimeError, ValueError, OSError, HTTPException) as error:
            raise FileNotFoundError(
                f"data.root={root}: data={name} needs {place}; they are missing or damaged, and "
                f"downloading them failed ({error}). Copy them there, set data.root to the folder "
                "that holds them, or choose data=digits, which needs no files"
            ) from error
    images = torch.as_tensor(found.data)
    if name == "cifar10":
        images = images.permute(0, 3, 1, 2)
    elif images.ndim == 3:
        images = images[:, None]
    labels = found.labels if name == "svhn" else found.targets
    return ImageSet(images.contiguous(), torch.as_tensor(labels).long())
