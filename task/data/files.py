"""Data sets that lie in files: listed, split, decoded into the cache."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from task.checks import require
from task.config import FILE_SETS, DataConfig, require_folder
from task.data.cache import cached_images
from task.data.dicom import decode_dicom, dicom_size
from task.data.file_kinds import DICOM, PICTURES
from task.data.images import Dataset, ImageSet
from task.data.inventory import inventory_of_listings
from task.data.listing import Listing, list_class_folders, list_odir
from task.data.patients import patients_of
from task.data.pictures import decode_picture, picture_size
from task.data.shape import crop_round_field, resize_decoded, to_square
from task.data.split import split_validation
from task.files import check_readable
from task.randomness import Stream, numpy_generator

NONE = np.empty(0, dtype=np.int64)


def load_files(data: DataConfig) -> Dataset:
    """Load a data set of files as square images with the channels that the model expects.

    The images of each split are a view of the cache, see `cached_images`. A set without a test
    split of its own and without `data.test_fraction` has an empty one.

    Raises:
        FileNotFoundError: the files are not there.
        UnknownClassError: there are images of a class that `data.classes` does not name.
        ValueError: an option does not fit the set, or files cannot be read.
    """
    require(
        data.window is None or FILE_SETS[data.name] == "dicom_folder",
        "data.window",
        f"null for data={data.name} (data=dicom_folder has windows)",
        data.window,
    )
    train, test = list_files(data)
    (images, train), (test_images, test) = read_split(train, data), read_split(test, data)
    if len(train) == 0:
        raise ValueError(
            f"data.root={data.root}: none of its images can be read; "
            + inventory_of_listings(data.classes, train, test).describe()[0]
        )
    return Dataset(images, test_images, train.left_out + test.left_out, test.note)


def list_files(data: DataConfig) -> tuple[Listing, Listing]:
    """List the training and the test split of a data set of files, without opening an image.

    Errors are those of `load_files`.
    """
    train, test = _list(FILE_SETS[data.name], Path(data.root), data.classes)
    return _split(*_with_patients(train, test, data), data)


def original_size(name: str, path: Path) -> tuple[int, int] | None:
    """Read width and height of a file of a data set; None where its header cannot be read."""
    size = dicom_size if FILE_SETS[name] == "dicom_folder" else picture_size
    try:
        return size(path)
    # Damaged files make Pillow and pydicom raise nearly anything; whoever decodes them says what.
    except Exception:
        return None


def _list(kind: str, root: Path, classes: Sequence[str]) -> tuple[Listing, Listing | None]:
    require_folder(root)
    check_readable(root)
    if kind == "odir":
        return list_odir(root, classes), None
    form = DICOM if kind == "dicom_folder" else PICTURES
    train, test = list_class_folders(root, classes, form)
    if len(train) == 0:
        found = inventory_of_listings(classes, train, test or train.subset(NONE))
        raise FileNotFoundError(
            f"data.root={root}: no images there; expected <class>/*{form.suffixes[0]} or "
            f"train/<class>/*{form.suffixes[0]}, with class folders named {', '.join(classes)}; "
            + "; ".join(found.describe())
        )
    return train, test


def _with_patients(
    train: Listing, test: Listing | None, data: DataConfig
) -> tuple[Listing, Listing | None]:
    """Number the patients of both splits alike, where the configuration says who they are."""
    numbers = patients_of([*train.paths, *(test.paths if test else ())], data)
    if numbers is None:
        return train, test
    named = replace(train, groups=numbers[: len(train)])
    return named, None if test is None else replace(test, groups=numbers[len(train) :])


def _split(train: Listing, test: Listing | None, data: DataConfig) -> tuple[Listing, Listing]:
    fraction = data.test_fraction
    if test is not None and len(test) > 0:
        ignored = f"test/ is the test split, data.test_fraction={fraction} is not used"
        return train, replace(test, note="" if fraction is None else ignored)
    if test is not None:
        train = replace(train, left_out=train.left_out + test.left_out)
    if fraction is None:
        return train, replace(train.subset(NONE), note=train.note)
    generator = numpy_generator(data.split_seed, Stream.TEST_SPLIT)
    kept, held_out = split_validation(
        train.labels, fraction, generator=generator, groups=train.groups
    )
    return replace(train.subset(kept), left_out=train.left_out), replace(
        train.subset(held_out), note=train.note
    )


def read_split(listing: Listing, data: DataConfig) -> tuple[ImageSet, Listing]:
    """Decode the files of a split, below `data.root`, as square images with `data.channels`.

    Returns:
        The images, a view of the cache, and the listing of those that are read.

    Raises:
        ValueError: files cannot be read.
    """
    window = None if data.window is None else (data.window[0], data.window[1])
    kind = FILE_SETS[data.name]

    def decode(path: Path) -> Tensor:
        pixels = decode_dicom(path, window) if kind == "dicom_folder" else decode_picture(path)
        if kind == "odir":
            pixels = crop_round_field(pixels)
        return resize_decoded(to_square(pixels, data.fit), data.image_size, data.channels)

    images, kept, hashes = cached_images(
        listing.paths,
        decode,
        root=Path(data.root),
        shape=(data.channels, data.image_size, data.image_size),
        settings=f"{kind} {data.fit} {window}",
        cache_dir=Path(data.cache_dir),
        on_corrupt=data.on_corrupt,
    )
    found = listing.readable(kept, data.classes)
    groups = None if found.groups is None else torch.from_numpy(found.groups)
    names = np.array([str(path.relative_to(data.root)) for path in found.paths], dtype=str)
    return ImageSet(images, torch.from_numpy(found.labels), groups, hashes, names), found
