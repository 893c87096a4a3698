"""A folder of synthetic images: class folders of PNG files, and a manifest of where they are from.

<folder>/
    manifest.json             what drew the images, how many there are of each class, its labels
    grid.png                  the first images of each class, where it was asked for
    <class>/000000.png        the image at place 0 of a class
    .lock                     held by the process that writes here, empty otherwise
"""

import json
import math
import operator
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from hashlib import file_digest
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from torch import Tensor

from task.checks import require
from task.config import Config, flat_values, hydra_override
from task.files import atomic_path, remove_left_overs, write_json
from task.generation.grids import save_sample_grid
from task.generation.images import ImageSource, to_pil
from task.lock import hold

MANIFEST_FILE = "manifest.json"
GRID_FILE = "grid.png"
# Images of a class in the grid.
GRID_COLUMNS = 10
NOTICE = "synthetic image, drawn by a generative model"

IMAGES_LOCK = ".lock"

# Of the real data: what an image looks like. Where they lie and how they were split is no business
# of whoever receives these.
DATA_VALUES = ("name", "classes", "image_size", "channels", "horizontal_flip", "window")

# Names that a reader of class folders or a file system takes for something else.
RESERVED = re.compile(r"\.|__MACOSX|(train|test|con|prn|aux|nul|com\d|lpt\d)(\.|$)|$", re.I)

# Bytes of a PNG file beside its pixels: headers and text.
PNG_OVERHEAD = 300


@dataclass(frozen=True)
class Manifest:
    """What a manifest says.

    Attributes:
        origin: see `describe_origin`.
        counts: by class, how many images were asked for.
    """

    origin: dict[str, Any]
    counts: dict[str, int]


class SyntheticFolder:
    """A folder of synthetic images, held by this process alone while it is open.

    Attributes:
        path: the folder.
    """

    def __init__(
        self,
        path: Path,
        classes: Sequence[str],
        *,
        origin: Mapping[str, Any],
        asked: Mapping[int, int],
    ) -> None:
        """Check what is in a folder, and write down what is going to be.

        Use `open_folder`, which makes and holds the folder.

        Args:
            path: the folder.
            classes: names of all classes, in the order of their labels.
            origin: what the images are made from, of `describe_origin`.
            asked: by label, how many images there are to be, 0 or more of which are there already.

        Raises:
            ValueError: the folder holds other things, images of another origin, or has no room.
        """
        self.path, self._classes, self._origin = path, classes, origin
        self._folders = [path / name for name in folder_names(classes)]
        self._counts = [asked.get(label, 0) for label in range(len(classes))]
        before = read_manifest(path)
        if before is not None:
            _check_same_origin(path, before.origin, origin)
            there = (before.counts[name] for name in classes)
            self._counts = [max(pair) for pair in zip(self._counts, there, strict=True)]
        for pattern in (path / MANIFEST_FILE, *(folder / "*.png" for folder in self._folders)):
            remove_left_overs(pattern)
        self._check_room(sum(self.num_missing(label, num) for label, num in asked.items()))
        self.write_manifest()

    def missing(self, label: int, places: range) -> list[int]:
        """List those of some places of a class that have no image."""
        folder = self._folders[label]
        return [place for place in places if not (folder / _file_name(place)).exists()]

    def num_missing(self, label: int, num_images: int) -> int:
        """Count those of the first `num_images` places of a class that have no image."""
        folder = self._folders[label]
        if not folder.is_dir():
            return num_images
        with os.scandir(folder) as entries:
            places = (_image_number(entry.name) for entry in entries)
            return num_images - sum(place is not None and place < num_images for place in places)

    def count(self, label: int) -> int:
        """Return how many images of a class this call or an earlier one has asked for."""
        return self._counts[label]

    def write(self, label: int, place: int, image: Tensor) -> None:
        """Write an image, uint8 [C, H, W], to its place in a class."""
        folder = self._folders[label]
        folder.mkdir(exist_ok=True)
        scale = self._origin["scale"]
        enlarged = image.repeat_interleave(scale, 1).repeat_interleave(scale, 2)
        write_image(folder / _file_name(place), enlarged, NOTICE)

    def write_grid(self, labels: Sequence[int], num_images: int) -> None:
        """Show the first images of some classes in one picture, a row for each class."""
        columns = min(num_images, GRID_COLUMNS)
        shown = [self.read(label, place) for label in labels for place in range(columns)]
        save_sample_grid(
            torch.stack(shown),
            self.path / GRID_FILE,
            classes=[self._classes[label] for label in labels],
            images_per_class=columns,
        )

    def read(self, label: int, place: int) -> Tensor:
        """Read the file of an image, uint8 [C, H, W] at the folder's scale."""
        with Image.open(self._folders[label] / _file_name(place)) as picture:
            pixels = torch.from_numpy(np.array(picture))
        return pixels.reshape(*pixels.shape[:2], -1).permute(2, 0, 1)

    def image_folder_labels(self) -> dict[int, int]:
        """Return by label how torchvision's ImageFolder numbers the class: by its folder's name."""
        there = [label for label, count in enumerate(self._counts) if count]
        in_order = sorted(there, key=lambda label: self._folders[label].name)
        return {label: number for number, label in enumerate(in_order)}

    def overrides(self) -> list[str]:
        """Say in words of a configuration how to train on the images."""
        data = self._origin["data"]
        # A simulation takes no class without an image.
        drawn = [f.name for f, num in zip(self._folders, self._counts, strict=True) if num]
        return [
            "data=image_folder",
            hydra_override("data.root", str(self.path.absolute())),
            hydra_override("data.classes", drawn),
            *(f"data.{name}={data[name]}" for name in ("image_size", "channels")),
            "data.test_fraction=0.1",
        ]

    def write_manifest(self) -> None:
        """Write down what was asked for, and whether all of it is there."""
        numbers = self.image_folder_labels()
        classes = {
            name: {
                "label": label,
                "folder": folder.name,
                "images": self._counts[label],
                "image_folder_label": numbers.get(label),
            }
            for label, (name, folder) in enumerate(zip(self._classes, self._folders, strict=True))
        }
        missing = any(self.num_missing(label, num) for label, num in enumerate(self._counts))
        content = {
            "notice": f"Every picture here is a {NOTICE}.",
            "complete": not missing,
            "files": f"<folder>/{_file_name(0)}, numbered from 0",
            "classes": classes,
            "origin": self._origin,
        }
        write_json(self.path / MANIFEST_FILE, content)

    def _check_room(self, missing: int) -> None:
        data = self._origin["data"]
        disk = os.statvfs(self.path)
        pixels = (data["image_size"] * self._origin["scale"]) ** 2
        size = data["channels"] * pixels + PNG_OVERHEAD
        # A file takes whole blocks.
        needed = missing * math.ceil(size / disk.f_frsize) * disk.f_frsize
        free = disk.f_bavail * disk.f_frsize
        require(
            needed <= free,
            "--out",
            f"on a disk with {needed:,} free bytes, which {missing:,} images may take (make room, "
            "or draw fewer now and the rest later)",
            f"{self.path} with {free:,}",
        )


def batch_size_of(path: Path) -> int | None:
    """Return the batch size of the images in a folder, None where there are none."""
    manifest = read_manifest(path)
    return None if manifest is None else manifest.origin.get("batch_size")


@contextmanager
def open_folder(
    path: Path, classes: Sequence[str], *, origin: Mapping[str, Any], asked: Mapping[int, int]
) -> Iterator[SyntheticFolder]:
    """Make a folder of synthetic images, or go on with one; see `SyntheticFolder`.

    Raises:
        ValueError: see `SyntheticFolder`, or another process writes into it.
        OSError: it cannot be written.
    """
    # No lock is left in a folder of other things.
    read_manifest(path)
    path.mkdir(parents=True, exist_ok=True)
    with hold(path / IMAGES_LOCK, "--out", patience=0) as lock:
        try:
            yield SyntheticFolder(path, classes, origin=origin, asked=asked)
        finally:
            # Which process drew the images is no part of them.
            lock.truncate(0)


def read_manifest(path: Path) -> Manifest | None:
    """Read the manifest of a folder; None where the folder is empty, or not there.

    Raises:
        ValueError: there is something else in it, or the manifest is broken.
    """
    file = path / MANIFEST_FILE
    if not path.exists():
        return None
    require(path.is_dir(), "--out", "a folder", str(path))
    if not file.exists():
        # A first call that was killed leaves its lock and a part of the manifest.
        own = (IMAGES_LOCK, ".manifest-")
        others = [name for name in sorted(os.listdir(path)) if not name.startswith(own)]
        expected = f"a new or empty folder, or one with images and their {MANIFEST_FILE}"
        require(not others, "--out", expected, f"{path}, which holds {', '.join(others[:3])}")
        return None
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
        origin, classes = content["origin"], content["classes"]
        counts = {
            name: operator.index(classes[name]["images"]) for name in origin["data"]["classes"]
        }
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"{file} is no manifest of synthetic images ({error!r}); pass another --out"
        ) from error
    return Manifest(origin, counts)


def _check_same_origin(path: Path, there: Mapping[str, Any], asked: Mapping[str, Any]) -> None:
    wanted = json.loads(json.dumps(asked))
    differences = [
        f"{name} {wanted.get(name)} (there: {there.get(name)})"
        for name in sorted({*wanted, *there})
        if wanted.get(name) != there.get(name)
    ]
    if differences:
        raise ValueError(
            f"--out: {path} holds images of another origin; asked for {'; '.join(differences)}. "
            "Pass the words that it was started with, or another --out"
        )


def describe_origin(
    config: Config,
    source: ImageSource,
    *,
    weights: Path,
    server_round: int,
    client: int | None,
    scale: int,
) -> dict[str, Any]:
    """Say what images are made from: calls that agree in all of it go on with one folder.

    Args:
        config: of the drawing.
        source: that draws.
        weights: the file of the model's weights.
        server_round: of the weights.
        client: whose own weights they are; None: the global ones.
        scale: height and width in the files of a pixel of an image.
    """
    values, data = flat_values(config), config.data.model_dump()
    with weights.open("rb") as file:
        model = file_digest(file, "sha256").hexdigest()
    return {
        "feddm": version("feddm"),
        "torch": torch.__version__,
        "model_sha256": model,
        "round": server_round,
        "client": client,
        "seed": config.seed,
        **{name: values[name] for name in config.drawing_values},
        "eval.precision": config.eval.precision,
        "device": source.device.type,
        "batch_size": source.batch_size,
        "scale": scale,
        "data": {name: data[name] for name in DATA_VALUES},
    }


def folder_names(classes: Sequence[str]) -> list[str]:
    """Name the folders of classes: as the classes, where a folder can be called that.

    What a file system or a reader of such folders does not take becomes "_": characters that some
    system forbids, and a "_" stands in front of a dot (hidden), of the names of splits and of those
    that Windows reserves. Where that leaves two classes with one name, for a file system that
    ignores case, the later one ends in its label: "a_b" and "a_b_1" for "a:b" and "a/b".
    """
    names: list[str] = []
    for label, name in enumerate(classes):
        folder = re.sub(r'[\x00-\x1f/\\:*?"<>|]', "_", name).rstrip(". ")
        folder = f"_{folder}" if RESERVED.match(folder) else folder
        while folder.casefold() in {other.casefold() for other in names}:
            folder = f"{folder}_{label}"
        names.append(folder)
    return names


def _file_name(place: int) -> str:
    return f"{place:06d}.png"


def _image_number(file_name: str) -> int | None:
    found = re.fullmatch(r"([0-9]{6}|[1-9][0-9]{6,})\.png", file_name)
    return int(found[1]) if found else None


def write_image(path: Path, image: Tensor, notice: str) -> None:
    """Write an image, uint8 [1 or 3, H, W], as a PNG file that says what it is, atomically."""
    info = PngInfo()
    info.add_text("Software", "feddm")
    info.add_text("Comment", notice)
    with atomic_path(path) as aside:
        to_pil(image).save(aside, "PNG", pnginfo=info)
