"""Which files a data set consists of, and of which class and patient each is."""

import unicodedata
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np

from task.config import class_folders
from task.data.file_kinds import PICTURES, FileKind, other_kind
from task.data.odir_table import ODIR_COLUMNS, ODIR_PRECEDENCE, ODIR_TABLE, OdirRow, read_odir_table
from task.data.patients import number_patients
from task.data.walk import FILE, FOLDER, HIDDEN_FOLDER, count_files, entries, files_below

# Where the copies in circulation keep the photographs, the whole ones before the cropped ones.
ODIR_FOLDERS = ("ODIR-5K/ODIR-5K/Training Images", "ODIR-5K/Training Images", "preprocessed_images")

UNREADABLE = "unreadable files (data.on_corrupt=skip)"
OUTSIDE = "outside of the class folders"
NOT_LISTED = f"pictures that {ODIR_TABLE} does not list"


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
        left_out: how many files beside them are no images of the set, by class ("" where they are
            of none) and kind.
        note: how the split came about, or its labels, where that is not what was asked for.
    """

    paths: list[Path]
    labels: np.ndarray
    groups: np.ndarray | None = None
    left_out: Counter[tuple[str, str]] = field(default_factory=Counter)
    note: str = ""

    def __len__(self) -> int:
        return len(self.labels)

    def subset(self, indices: np.ndarray) -> "Listing":
        """Return the files at `indices` ([M] int64), in that order, and none that is left out."""
        return Listing(
            [self.paths[i] for i in indices] if self.paths else [],
            self.labels[indices],
            None if self.groups is None else self.groups[indices],
        )

    def readable(self, indices: np.ndarray, classes: Sequence[str]) -> "Listing":
        """Return the files at `indices`; the others are left out as unreadable, of their class."""
        left_out = Counter(self.left_out)
        for label in np.delete(self.labels, indices):
            left_out[classes[label], UNREADABLE] += 1
        return replace(self.subset(indices), left_out=left_out, note=self.note)


def list_class_folders(
    root: Path, classes: Sequence[str], form: FileKind
) -> tuple[Listing, Listing | None]:
    """List `root/train/<class>/**` and `root/test/<class>/**`, or `root/<class>/**`.

    A class without a folder is one that this hospital has no images of. A file is an image by its
    ending or, where that is another, by its content.

    Args:
        root: of the tree.
        classes: their names; folders match them whatever their case, and `-` matches `_`.
        form: of the images.

    Returns:
        The training split, or everything where nothing is split, and the test split or None.

    Raises:
        PermissionError: a folder may not be read.
        UnknownClassError: a folder is of no class.
    """
    train, test = root / "train", root / "test"
    if not train.is_dir():
        return _list_classes(root, classes, form), None
    listing = _list_classes(train, classes, form)
    held_out = _list_classes(test, classes, form) if test.is_dir() else None
    for path, kind in entries(root):
        if path not in (train, test):
            _leave_out(listing, path, kind)
    return listing, held_out


def list_one_split(folder: Path, form: FileKind) -> tuple[Listing, list[str]]:
    """List the images of a folder that holds one split: `folder/<class>/**`, or `folder/*`.

    Where there are images in folders, those beside the folders are left out.

    Args:
        folder: of the images.
        form: of the images.

    Returns:
        The images, and the names of their classes; none where there are no folders of classes.

    Raises:
        PermissionError: a folder may not be read.
    """
    classes = class_folders(folder)
    listing = _list_classes(folder, classes, form)
    if len(listing) > 0:
        return listing, classes
    found, left_out = _images_below(folder, form)
    of_no_class = Counter({("", kind): number for kind, number in left_out.items()})
    return Listing(found, np.zeros(len(found), dtype=np.int64), left_out=of_no_class), []


def _list_classes(folder: Path, classes: Sequence[str], form: FileKind) -> Listing:
    listing = Listing([], np.empty(0, dtype=np.int64))
    labels: list[int] = []
    for path, kind in entries(folder):
        if kind != FOLDER:
            _leave_out(listing, path, kind)
            continue
        label = class_label(path.name, classes)
        if label is None:
            raise UnknownClassError(
                f"data.classes must name every folder in {folder}, which holds {path.name!r}, "
                f"got {list(classes)}"
            )
        found, left_out = _images_below(path, form)
        listing.paths.extend(found)
        labels += [label] * len(found)
        for left, number in left_out.items():
            listing.left_out[classes[label], left] += number
    return replace(listing, labels=np.array(labels, dtype=np.int64))


def _images_below(folder: Path, form: FileKind) -> tuple[list[Path], Counter[str]]:
    files, left_out = files_below(folder)
    images = []
    for path in files:
        kind = other_kind(path, form)
        if kind is None:
            images.append(path)
        else:
            left_out[kind] += 1
    return images, left_out


def _leave_out(listing: Listing, path: Path, kind: str) -> None:
    """Count a file, or those of a folder, that lie outside of the class folders."""
    number = count_files(path) if kind in (FOLDER, HIDDEN_FOLDER) else 1
    listing.left_out["", OUTSIDE if kind in (FILE, FOLDER) else kind] += number


def class_label(found: str, classes: Sequence[str]) -> int | None:
    """Return which class a name is of: the one of that very name, or the only one like it."""
    if found in classes:
        return list(classes).index(found)
    alike = [label for label, name in enumerate(classes) if _plain(name) == _plain(found)]
    return alike[0] if len(alike) == 1 else None


def _plain(name: str) -> str:
    # macOS writes letters with accents as two characters.
    return unicodedata.normalize("NFC", name).casefold().replace("-", "_").replace(" ", "_")


def list_odir(root: Path, classes: Sequence[str]) -> Listing:
    """List the fundus photographs of ODIR-5K, a row of its `full_df.csv` per eye.

    Photographs lie in the folders of the copies in circulation, or beside the table.

    Args:
        root: folder of the table.
        classes: the letters by which the column `labels` (as `['N']`) names them; an eye with
            several counts as the first of them in `ODIR_PRECEDENCE`.

    Raises:
        FileNotFoundError: the table is not there.
        PermissionError: a folder may not be read.
        ValueError: see `read_odir_table`.
        UnknownClassError: a row names another class, or several that are not in
            `ODIR_PRECEDENCE`.
    """
    table = root / ODIR_TABLE
    if not table.is_file():
        raise FileNotFoundError(
            f"data.root={root}: data=odir needs {table}, a table with the columns "
            f"{', '.join(ODIR_COLUMNS)}, and the photographs in one of "
            f"{', '.join(f'{name}/' for name in ODIR_FOLDERS)} or beside it"
        )
    rows = sorted(read_odir_table(table), key=lambda row: row.filename)
    folder = next((root / name for name in ODIR_FOLDERS if (root / name).is_dir()), root)
    _check_odir_classes(rows, classes, table)
    several = sum(len(row.labels) > 1 for row in rows)
    said = f"{several:,} eyes have several diagnoses and count as the first of them in the order "
    return Listing(
        [folder / row.filename for row in rows],
        np.array([class_label(_diagnosis(row), classes) for row in rows], dtype=np.int64),
        number_patients([row.patient for row in rows]),
        _not_listed(table, folder, {row.filename for row in rows}),
        said + ", ".join(ODIR_PRECEDENCE) if several else "",
    )


def _diagnosis(row: OdirRow) -> str:
    """Choose the one of an eye's diagnoses that it counts as."""
    return row.labels[0] if len(row.labels) == 1 else min(row.labels, key=ODIR_PRECEDENCE.index)


def _check_odir_classes(rows: Sequence[OdirRow], classes: Sequence[str], table: Path) -> None:
    """Refuse classes that are not known, and name all of them with their numbers of eyes."""
    unknown = Counter[str]()
    first = None
    for row in rows:
        known = [name for name in row.labels if class_label(name, classes) is not None]
        if len(row.labels) > 1:
            known = [name for name in known if name in ODIR_PRECEDENCE]
        if len(known) < len(row.labels):
            first = first or row
            unknown.update(name for name in row.labels if name not in known)
    if first is not None:
        numbers = ", ".join(f"{name} {number:,}" for name, number in unknown.most_common())
        raise UnknownClassError(
            f"{table}, line {first.line}: labels must be one of "
            f"{list(classes)}, as \"['N']\", or several of {', '.join(ODIR_PRECEDENCE)}, got "
            f"{list(first.labels)} (in the whole table: {numbers})"
        )


def _not_listed(table: Path, folder: Path, names: set[str]) -> Counter[tuple[str, str]]:
    files, left_out = files_below(table.parent)
    for path in files:
        if not path.is_relative_to(folder):
            left_out[f"outside of {folder.relative_to(table.parent)}/"] += path != table
        elif str(path.relative_to(folder)) not in names:
            left_out[other_kind(path, PICTURES) or NOT_LISTED] += path != table
    return +Counter({("", kind): number for kind, number in left_out.items()})
