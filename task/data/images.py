"""Images in memory: uint8 NCHW, brought to the shape that the model sees, normalized per batch."""

from collections import Counter
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from task.checks import require

# Bounds the memory of the float copies that resizing needs.
RESIZE_CHUNK = 4096


@dataclass(frozen=True, eq=False)
class ImageSet:
    """Images and their classes.

    Attributes:
        images: [N, C, H, W] uint8, on the CPU; of files, a view of the cache on disk.
        labels: [N] int64 in [0, number of classes).
        groups: [N] int64, equal for the images of one patient; None where each image stands alone.
        hashes: [N] uint64, of `image_hashes`, where they are known.
        names: [N] str, the path of each one's file below `data.root`, where there are files.

    Raises:
        TypeError: a dtype is another.
        ValueError: a shape is another.
    """

    images: Tensor
    labels: Tensor
    groups: Tensor | None = None
    hashes: np.ndarray | None = None
    names: np.ndarray | None = None

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
        if self.groups is not None:
            require(
                self.groups.shape == self.labels.shape,
                "groups",
                f"[{len(self.images)}], one per image",
                tuple(self.groups.shape),
            )

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def num_patients(self) -> int:
        """The number of patients; each image is of another where there are no groups."""
        return len(self) if self.groups is None else len(torch.unique(self.groups))

    def subset(self, indices: np.ndarray | Tensor) -> "ImageSet":
        """Copy the images at `indices` ([M] int64), in that order."""
        chosen = torch.as_tensor(indices)
        groups = None if self.groups is None else self.groups[chosen]
        hashes = None if self.hashes is None else self.hashes[chosen.numpy()]
        names = None if self.names is None else self.names[chosen.numpy()]
        return ImageSet(self.images[chosen], self.labels[chosen], groups, hashes, names)


@dataclass(frozen=True, eq=False)
class Dataset:
    """A training and a test split of the same classes.

    Attributes:
        train: to be trained on.
        test: to measure with; may be empty.
        left_out: how many files beside them are not used; see `Listing`.
        note: how the splits came about, where that is not what was asked for.
    """

    train: ImageSet
    test: ImageSet
    left_out: Counter[tuple[str, str]] = field(default_factory=Counter)
    note: str = ""


def reshape(images: ImageSet, image_size: int, channels: int) -> ImageSet:
    """Bring images to `image_size` and `channels`.

    Raises:
        ValueError: the images have colors and `channels` is 1.
    """
    pixels = images.images
    require(
        channels == pixels.shape[1] or (pixels.shape[1], channels) == (1, 3),
        "data.channels",
        f"{pixels.shape[1]} for these images (gray fits 3 as well, color is never dropped)",
        channels,
    )
    resized = resize(pixels, image_size)
    return ImageSet(resized.repeat(1, channels // resized.shape[1], 1, 1), images.labels)


def resize(images: Tensor, size: int) -> Tensor:
    """Resize images to `size` x `size`, bilinearly, without antialiasing, as the paper's code does.

    Args:
        images: [N, C, H, W] uint8, or float32 in [0, 255].
        size: > 0.

    Returns:
        [N, C, size, size] uint8, rounded; `images` itself where nothing is left to do.
    """
    if images.shape[-2:] == (size, size):
        return images if images.dtype == torch.uint8 else images.round().byte()
    chunks = [
        F.interpolate(chunk.float(), (size, size), mode="bilinear", antialias=False).round_().byte()
        for chunk in torch.split(images, RESIZE_CHUNK)
    ]
    return torch.cat(chunks)


def normalize(images: Tensor) -> Tensor:
    """Map uint8 images to float32 in [-1, 1], on their device.

    Raises:
        TypeError: the images are not uint8, so they may have been normalized before.
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
