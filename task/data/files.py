"""Data sets that lie in files: listed, split, decoded into the cache."""

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from task.checks import require, require_one_of
from task.config import FILE_SETS, require_folder
from task.data.cache import cached_images
from task.data.decode import (
    crop_round_field,
    decode_dicom,
    decode_picture,
    dicom_size,
    picture_size,
    resize_decoded,
    to_square,
)
from task.data.forms import DICOM, PICTURES
from task.data.images import Dataset, ImageSet
from task.data.inventory import inventory_of_listings
from task.data.listing import Listing, list_class_folders, list_odir
from task.data.split import split_validation
from task.data.walk import check_readable
from task.randomness import Stream, numpy_generator

NONE = np.empty(0, dtype=np.int64)


def load_files(
    name: str,
    *,
    root: str | Path,
    classes: Sequence[str],
    image_size: int,
    channels: int,
    fit: str,
    window: tuple[float, float] | None,
    test_fraction: float | None,
    seed: int,
    cache_dir: str | Path,
    on_corrupt: str,
) -> Dataset:
    """Load a data set of files as square images with the channels that the model expects.

    The images of each split are a view of the cache. A set without a test split of its own and
    without `test_fraction` has an empty one.

    Args:
        name: one of `task.config.FILE_SETS`.
        root: folder of the files; see `list_class_folders` and `list_odir`.
        classes: names of the classes, in the order of their labels.
        image_size: height and width.
        channels: 1 turns colours into grey, 3 repeats grey.
        fit: how images become square: one of `task.config.DATA_FITS`, see `to_square`.
        window: center and width for data=dicom_folder, see `decode_dicom`.
        test_fraction: share of the images, in (0, 1), that becomes the test split of a set
            without one.
        seed: of the run; decides which images these are.
        cache_dir: of the decoded images; see `cached_images`.
        on_corrupt: "refuse" or "skip" files that cannot be read.

    Raises:
        FileNotFoundError: the files are not there.
        UnknownClassError: there are images of a class that `classes` does not name.
        ValueError: an option does not fit the set, or files cannot be read.
    """
    require_one_of("data.name", name, tuple(FILE_SETS))
    kind = FILE_SETS[name]
    require(
        window is None or kind == "dicom_folder",
        "data.window",
        f"null for data={name} (data=dicom_folder has windows)",
        window,
    )
    root = Path(root)
    train, test = list_files(
        name, root=root, classes=classes, test_fraction=test_fraction, seed=seed
    )
    decode = partial(
        _decode, kind, window=window, fit=fit, image_size=image_size, channels=channels
    )

    def opened(listing: Listing) -> tuple[ImageSet, Listing]:
        images, kept, hashes = cached_images(
            listing.paths,
            decode,
            root=root,
            shape=(channels, image_size, image_size),
            settings=f"{kind} {fit} {window}",
            cache_dir=Path(cache_dir),
            on_corrupt=on_corrupt,
        )
        found = listing.readable(kept, classes)
        groups = None if found.groups is None else torch.from_numpy(found.groups)
        return ImageSet(images, torch.from_numpy(found.labels), groups, hashes), found

    (images, train), (test_images, test) = opened(train), opened(test)
    if len(train) == 0:
        raise ValueError(
            f"data.root={root}: none of its images can be read; "
            + inventory_of_listings(classes, train, test).describe()[0]
        )
    return Dataset(images, test_images, train.left_out + test.left_out, test.note)


def list_files(
    name: str,
    *,
    root: str | Path,
    classes: Sequence[str],
    test_fraction: float | None,
    seed: int,
) -> tuple[Listing, Listing]:
    """List the training and the test split of a data set of files, without opening an image.

    Arguments and errors are those of `load_files`.
    """
    require_one_of("data.name", name, tuple(FILE_SETS))
    return _split(*_list(FILE_SETS[name], Path(root), classes), test_fraction, seed)


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


def _split(
    train: Listing, test: Listing | None, fraction: float | None, seed: int
) -> tuple[Listing, Listing]:
    if test is not None and len(test) > 0:
        ignored = f"test/ is the test split, data.test_fraction={fraction} is not used"
        return train, replace(test, note="" if fraction is None else ignored)
    if test is not None:
        train = replace(train, left_out=train.left_out + test.left_out)
    if fraction is None:
        return train, train.subset(NONE)
    generator = numpy_generator(seed, Stream.TEST_SPLIT)
    kept, held_out = split_validation(
        train.labels, fraction, generator=generator, groups=train.groups
    )
    return replace(train.subset(kept), left_out=train.left_out), train.subset(held_out)


def _decode(
    kind: str,
    path: Path,
    *,
    window: tuple[float, float] | None,
    fit: str,
    image_size: int,
    channels: int,
) -> Tensor:
    if kind == "dicom_folder":
        pixels = decode_dicom(path, window)
    elif kind == "odir":
        pixels = crop_round_field(decode_picture(path))
    elif kind == "image_folder":
        pixels = decode_picture(path)
    else:
        raise ValueError(f"kind must be image_folder, dicom_folder or odir, got {kind!r}")
    return resize_decoded(to_square(pixels, fit), image_size, channels)
