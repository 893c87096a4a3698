"""Which files a data set consists of, and of which class and patient each is."""

import ast
import csv
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from task.config import class_folders, require

PICTURES = (".png", ".jpg", ".jpeg", ".bmp", ".tif", ".tiff")
DICOM = (".dcm", ".dicom")

ODIR_TABLE = "full_df.csv"
ODIR_COLUMNS = ("ID", "filename", "labels")
# Where the copies in circulation keep the photographs, the whole ones before the cropped ones.
ODIR_FOLDERS = ("ODIR-5K/ODIR-5K/Training Images", "ODIR-5K/Training Images", "preprocessed_images")


class UnknownClassError(ValueError):
    """There are images of a class that `data.classes` does not name."""


@dataclass(frozen=True)
class Listing:
    """The images of one split, in a fixed order.

    Attributes:
        paths: of the files, which may turn out to be missing or damaged; empty for a set that
            comes with a library.
        labels: [N] int64, the class of each.
        groups: [N] int64, equal for the files of one patient; None where patients are not known.
    """

    paths: list[Path]
    labels: np.ndarray
    groups: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self.labels)

    def subset(self, indices: np.ndarray) -> "Listing":
        """Return the files at `indices` ([M] int64), in that order."""
        return Listing(
            [self.paths[i] for i in indices],
            self.labels[indices],
            None if self.groups is None else self.groups[indices],
        )


def list_class_folders(
    root: Path, classes: Sequence[str], suffixes: tuple[str, ...]
) -> tuple[Listing, Listing | None]:
    """List `root/train/<class>/**` and `root/test/<class>/**`, or `root/<class>/**`.

    A class without a folder is one that this hospital has no images of. Hidden files and files
    with other suffixes are no images.

    Args:
        root: of the tree.
        classes: their names; folders match them whatever their case, and `-` matches `_`.
        suffixes: of the images' names, in lower case.

    Returns:
        The training split, or everything where nothing is split, and the test split or None.

    Raises:
        FileNotFoundError: there is no such tree, or no image in it.
        UnknownClassError: a folder is of no class.
    """
    train, test = root / "train", root / "test"
    listing = _list_classes(train if train.is_dir() else root, classes, suffixes)
    if len(listing) == 0:
        raise FileNotFoundError(
            f"data.root={root}: no images there; expected <class>/*{suffixes[0]} or "
            f"train/<class>/*{suffixes[0]}, with class folders named {', '.join(classes)} and "
            f"files named *{', *'.join(suffixes)}"
        )
    if not (train.is_dir() and test.is_dir()):
        return listing, None
    return listing, _list_classes(test, classes, suffixes)


def _list_classes(folder: Path, classes: Sequence[str], suffixes: tuple[str, ...]) -> Listing:
    paths: list[Path] = []
    labels: list[int] = []
    for name in class_folders(folder):
        label = class_label(name, classes)
        if label is None:
            raise UnknownClassError(
                f"data.classes must name every folder in {folder}, which holds {name!r}, "
                f"got {list(classes)}"
            )
        found = sorted(
            path
            for path in (folder / name).rglob("*")
            if path.suffix.lower() in suffixes and not path.name.startswith(".")
        )
        paths += found
        labels += [label] * len(found)
    return Listing(paths, np.array(labels, dtype=np.int64))


def class_label(found: str, classes: Sequence[str]) -> int | None:
    """Return which class a name is of: the one of that very name, or the only one like it."""
    if found in classes:
        return list(classes).index(found)
    alike = [label for label, name in enumerate(classes) if _plain(name) == _plain(found)]
    return alike[0] if len(alike) == 1 else None


def _plain(name: str) -> str:
    return name.casefold().replace("-", "_").replace(" ", "_")


def list_odir(root: Path, classes: Sequence[str]) -> Listing:
    """List the fundus photographs of ODIR-5K, a row of its `full_df.csv` per eye.

    Photographs lie in the folders of the copies in circulation, or beside the table.

    Args:
        root: folder of the table.
        classes: the letters by which the column `labels` (as `['N']`) names them.

    Raises:
        FileNotFoundError: the table is not there.
        ValueError: the table lacks a column, or a row names no or several classes.
        UnknownClassError: a row names another class.
    """
    table = root / ODIR_TABLE
    if not table.is_file():
        raise FileNotFoundError(
            f"data.root={root}: data=odir needs {table}, a table with the columns "
            f"{', '.join(ODIR_COLUMNS)}, and the photographs in one of "
            f"{', '.join(f'{name}/' for name in ODIR_FOLDERS)} or beside it"
        )
    with table.open(encoding="utf-8-sig", newline="") as file:
        reader = csv.DictReader(file)
        columns = list(reader.fieldnames or [])
        require(
            set(ODIR_COLUMNS) <= set(columns),
            str(table),
            f"a table with the columns {', '.join(ODIR_COLUMNS)}",
            columns,
        )
        rows = sorted(reader, key=lambda row: str(row["filename"]))
    folder = next((root / name for name in ODIR_FOLDERS if (root / name).is_dir()), root)
    _, patients = np.unique([str(row["ID"]) for row in rows], return_inverse=True)
    return Listing(
        [folder / row["filename"] for row in rows],
        np.array([_odir_label(row, classes, table) for row in rows], dtype=np.int64),
        patients.astype(np.int64),
    )


def _odir_label(row: dict[str, str], classes: Sequence[str], table: Path) -> int:
    refusal = (
        f"{table}: labels of {row['filename']} must be one of {list(classes)}, as \"['N']\", "
        f"got {row['labels']!r}"
    )
    try:
        (name,) = ast.literal_eval(row["labels"])
    except (ValueError, SyntaxError, TypeError) as error:
        raise ValueError(refusal) from error
    label = class_label(str(name), classes)
    if label is None:
        raise UnknownClassError(refusal)
    return label
