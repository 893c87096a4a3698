"""Every file below a folder, and which kind those are of that cannot be images."""

import os
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from task.config import is_hidden
from task.files import check_readable, refusal

FOLDER = "folders"
FILE = "files"
HIDDEN_FOLDER = "in hidden folders and those of the system"
HIDDEN_FILE = "hidden files"
RESOURCE = "macOS resource files (._*)"
CIRCLE = "links to folders that are read already"
SPECIAL = "neither files nor folders"


def files_below(folder: Path) -> tuple[list[Path], Counter[str]]:
    """Find every file below a folder; links to other folders are followed, each folder once.

    Returns:
        The files that may be images, sorted, and how many others there are of each kind.

    Raises:
        PermissionError: a folder may not be read.
    """
    found: list[Path] = []
    left_out: Counter[str] = Counter()
    top, seen, pending = folder.resolve(), {_identity(folder)}, [folder]
    while pending:
        for path, kind in entries(pending.pop()):
            if kind == FILE:
                found.append(path)
            elif kind != FOLDER:
                left_out[kind] += count_files(path) if kind == HIDDEN_FOLDER else 1
            elif _identity(path) in seen or top.is_relative_to(path.resolve()):
                left_out[CIRCLE] += 1
            else:
                seen.add(_identity(path))
                pending.append(path)
    return sorted(found), left_out


def entries(folder: Path) -> Iterator[tuple[Path, str]]:
    """Name what is in a folder, sorted: `FOLDER`, `FILE`, or the kind of what holds no images.

    Raises:
        PermissionError: the folder, or one that it links to, may not be read.
    """
    check_readable(folder)
    with os.scandir(folder) as found:
        for entry in sorted(found, key=lambda entry: entry.name):
            yield folder / entry.name, _kind(entry)


def count_files(folder: Path) -> int:
    """Count the files below a folder, as far as it may be read."""
    return sum(len(files) for _, _, files in os.walk(folder))


def _kind(entry: os.DirEntry[str]) -> str:
    if entry.name.startswith("._"):
        return RESOURCE
    if is_hidden(entry.name):
        return HIDDEN_FOLDER if os.path.isdir(entry.path) else HIDDEN_FILE
    try:
        if entry.is_dir():
            return FOLDER
        # Links that lead nowhere may be images: whoever decodes them says what is missing.
        return FILE if entry.is_file() or entry.is_symlink() else SPECIAL
    except PermissionError as error:  # of what a link leads to
        raise PermissionError(refusal(Path(entry.path))) from error
    except OSError:  # a link to itself
        return FILE


def _identity(folder: Path) -> tuple[int, int]:
    status = folder.stat()
    return status.st_dev, status.st_ino
