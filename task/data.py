"""The data sets: read, brought to the shape that the model sees, split, normalised.

Images stay uint8 NCHW in memory; batches are normalised on the device that trains.
"""

from dataclasses import dataclass
from http.client import HTTPException
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from task.config import DATA_SETS, Config, require, require_one_of
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

# Bounds the memory of the float copies that resizing needs.
RESIZE_CHUNK = 4096


@dataclass(frozen=True, eq=False)
class ImageSet:
    """Images and their classes.

    Attributes:
        images: [N, C, H, W] uint8, on the CPU.
        labels: [N] int64 in [0, number of classes).

    Raises:
        TypeError: a dtype is another.
        ValueError: a shape is another.
    """

    images: Tensor
    labels: Tensor

    def __post_init__(self) -> None:
        if self.images.dtype != torch.uint8 or self.labels.dtype != torch.int64:
            raise TypeError(
                "images and labels must be uint8 and int64, "
                f"got {self.images.dtype} and {self.labels.dtype}"
            )
        require(self.images.ndim == 4, "images", "[N, C, H, W]", tuple(self.images.shape))
        require(
            self.labels.shape == self.images.shape[:1],
            "labels",
            f"[{len(self.images)}], one per image",
            tuple(self.labels.shape),
        )

    def __len__(self) -> int:
        return len(self.labels)

    def subset(self, indices: np.ndarray | Tensor) -> "ImageSet":
        """Copy the images at `indices` ([M] int64), in that order."""
        chosen = torch.as_tensor(indices)
        return ImageSet(self.images[chosen], self.labels[chosen])


@dataclass(frozen=True, eq=False)
class Dataset:
    """A training and a test split of the same classes."""

    train: ImageSet
    test: ImageSet


def build_dataset(config: Config) -> Dataset:
    """Load the data set that the configuration names; see `load_dataset`."""
    data = config.data
    return load_dataset(
        data.name,
        root=data.root,
        image_size=data.image_size,
        channels=data.channels,
        num_classes=len(data.classes),
        test_fraction=data.test_fraction,
        seed=config.seed,
    )


def load_dataset(
    name: str,
    *,
    root: str | Path,
    image_size: int,
    channels: int,
    num_classes: int,
    test_fraction: float | None,
    seed: int,
) -> Dataset:
    """Load a data set as square images with the channels that the model expects.

    Args:
        name: one of `task.config.DATA_SETS`.
        root: folder of torchvision's sets; what is not there is downloaded into it.
        image_size: height and width.
        channels: 1 or 3; grey images fill all three.
        num_classes: how many classes the set may have.
        test_fraction: share of the images, in (0, 1), that becomes the test split of a set
            without one; None for a set that has its own.
        seed: of the run; decides which images these are.

    Raises:
        FileNotFoundError: the files are not below `root` and cannot be downloaded.
        ValueError: an option is out of range or does not fit the set.
    """
    require_one_of("data.name", name, DATA_SETS)
    if name == "digits":
        train, test = read_digits(test_fraction, seed)
    else:
        require(
            test_fraction is None,
            "data.test_fraction",
            f"null for data={name}, which has its own test split",
            test_fraction,
        )
        train, test = (read_torchvision(name, Path(root), train=part) for part in (True, False))
    found = 1 + int(max(train.labels.max(), test.labels.max()))
    # Fewer are welcome: a hospital need not have every class of a run.
    require(found <= num_classes, "data.classes", f"{found} names for data={name}", num_classes)
    return Dataset(*(reshape(part, image_size, channels) for part in (train, test)))


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


def read_torchvision(name: str, root: Path, *, train: bool) -> ImageSet:
    """Read the training or the test split of one of torchvision's sets, whole.

    Raises:
        FileNotFoundError: the files are not below `root` and cannot be downloaded.
    """
    # Imported here because it takes seconds, and every process of a run would pay them.
    from torchvision import datasets  # type: ignore[import-untyped]

    kind, folder, files = TORCHVISION_SETS[name]
    split = {"split": "train" if train else "test"} if name == "svhn" else {"train": train}
    try:
        found = getattr(datasets, kind)(root, download=False, **split)
    except (RuntimeError, ValueError):  # torchvision's words for missing and damaged files
        try:
            found = getattr(datasets, kind)(root, download=True, **split)
        except (RuntimeError, ValueError, OSError, HTTPException) as error:
            raise FileNotFoundError(
                f"data.root={root}: data={name} needs the files {', '.join(files)} in "
                f"{(root / folder).resolve()}; they are missing or damaged, and downloading them "
                f"failed ({error}). Copy them there, set data.root to the folder that holds them, "
                "or choose data=digits, which needs no files"
            ) from error
    images = torch.as_tensor(found.data)
    if name == "cifar10":
        images = images.permute(0, 3, 1, 2)
    elif images.ndim == 3:
        images = images[:, None]
    labels = found.labels if name == "svhn" else found.targets
    return ImageSet(images.contiguous(), torch.as_tensor(labels).long())


def reshape(images: ImageSet, image_size: int, channels: int) -> ImageSet:
    """Bring images to `image_size` and `channels`.

    Raises:
        ValueError: the images have colours and `channels` is 1.
    """
    pixels = images.images
    require(
        channels == pixels.shape[1] or (pixels.shape[1], channels) == (1, 3),
        "data.channels",
        f"{pixels.shape[1]} for these images (grey fits 3 as well, colour is never dropped)",
        channels,
    )
    resized = resize(pixels, image_size)
    return ImageSet(resized.repeat(1, channels // resized.shape[1], 1, 1), images.labels)


def resize(images: Tensor, size: int) -> Tensor:
    """Resize images to `size` x `size`, bilinearly, without antialiasing, as the paper's code does.

    Args:
        images: [N, C, H, W] uint8.
        size: > 0.

    Returns:
        [N, C, size, size] uint8, rounded; `images` itself where the size is right already.
    """
    if images.shape[-2:] == (size, size):
        return images
    chunks = [
        F.interpolate(chunk.float(), (size, size), mode="bilinear", antialias=False).round_().byte()
        for chunk in torch.split(images, RESIZE_CHUNK)
    ]
    return torch.cat(chunks)


def split_validation(
    labels: np.ndarray, fraction: float, *, generator: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """Hold a share of every class out.

    Of a class with n images, round(n * fraction) are held out, but never none and never all; a
    class with a single image keeps it for training.

    Args:
        labels: [N] int64.
        fraction: in (0, 1).
        generator: chooses the images.

    Returns:
        The indices of the training and of the held-out images, each sorted, [M] int64.

    Raises:
        ValueError: `fraction` is not in (0, 1).
    """
    require(0 < fraction < 1, "fraction", "between 0 and 1, exclusive", fraction)
    held_out = np.zeros(len(labels), dtype=bool)
    for label in np.unique(labels):
        members = generator.permutation(np.flatnonzero(labels == label))
        share = min(max(round(len(members) * fraction), 1), len(members) - 1)
        held_out[members[:share]] = True
    return np.flatnonzero(~held_out), np.flatnonzero(held_out)


def normalize(images: Tensor) -> Tensor:
    """Map uint8 images to float32 in [-1, 1], on their device.

    Raises:
        TypeError: the images are not uint8, so they may have been normalised before.
    """
    if images.dtype != torch.uint8:
        raise TypeError(f"images must be uint8, got {images.dtype}")
    return images.float().div_(127.5).sub_(1)


def random_horizontal_flip(images: Tensor, generator: torch.Generator) -> Tensor:
    """Mirror each image left to right with probability 1/2.

    Args:
        images: [N, C, H, W], any dtype.
        generator: on the device of `images`.
    """
    flipped = torch.rand(len(images), device=images.device, generator=generator) < 0.5
    return torch.where(flipped[:, None, None, None], images.flip(-1), images)
