"""Files that are either whole or not there."""

import errno
import hashlib
import json
import math
import os
import re
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

# Of the folders that `atomic_folder` fills, so that no folder of somebody else is called so.
LEFT_OVER = ".partial"


@contextmanager
def atomic_path(path: Path, *, private: bool = False) -> Iterator[Path]:
    """Yield a path to write to, which takes the place of `path` when the block succeeds.

    A reader, an error or a full disk never leaves half a file behind; a process that is killed
    leaves a hidden one, see `remove_left_overs`.

    Args:
        path: the file to write; its folder exists.
        private: whether its owner alone may read it.

    Raises:
        OSError: it cannot be written; see `naming_full_disk`.
    """
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.stem}-", suffix=path.suffix)
    os.close(handle)
    aside = Path(name)
    try:
        with naming_full_disk(path.parent):
            yield aside
            with aside.open("rb") as written:
                os.fsync(written.fileno())
        # mkstemp makes files private; results are as readable as any new file.
        if not private:
            open_by_umask(aside)
        aside.replace(path)
    finally:
        aside.unlink(missing_ok=True)


def open_by_umask(file: Path) -> None:
    """Give a file the permissions of any new file."""
    umask = os.umask(0)
    os.umask(umask)
    file.chmod(0o666 & ~umask)


@contextmanager
def atomic_folder(folder: Path) -> Iterator[Path]:
    """Yield a folder to fill, which takes the place of `folder` when the block succeeds.

    A process that is killed leaves a hidden folder beside it, which the next one that succeeds
    removes. Its files are as readable as any new file.

    Args:
        folder: the one to write, and to replace where it exists; made with those above it. Nobody
            else writes it now.

    Raises:
        OSError: it cannot be written; see `naming_full_disk`.
    """
    folder = folder.resolve()
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(
        dir=folder.parent, prefix=f".{folder.name}-", suffix=LEFT_OVER
    ) as room:
        aside, old = Path(room) / "new", Path(room) / "old"
        aside.mkdir()
        with naming_full_disk(folder.parent):
            yield aside
        for file in aside.rglob("*"):
            if file.is_file():
                open_by_umask(file)
        if folder.exists():
            folder.rename(old)
        try:
            aside.rename(folder)
        except OSError:
            if old.exists():
                old.rename(folder)
            raise
    _remove_left_over_folders(folder)


def _remove_left_over_folders(folder: Path) -> None:
    # mkdtemp puts 8 of these signs; a dash would be the folder of another name.
    name = re.compile(rf"\.{re.escape(folder.name)}-[a-z0-9_]{{8}}{re.escape(LEFT_OVER)}")
    for other in folder.parent.iterdir():
        if name.fullmatch(other.name):
            shutil.rmtree(other)


@contextmanager
def naming_full_disk(folder: Path) -> Iterator[None]:
    """Say of a disk that is full, or a quota that is used up, which it is and what to do.

    Args:
        folder: that the block writes to.

    Raises:
        OSError: there is no room left.
    """
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise OSError(
            error.errno,
            f"no room left on the disk of {folder}: make some there and start this again; "
            "what was whole before is whole still",
        ) from error


def file_sha256(file: Path) -> str:
    """Return the SHA-256 of what is in a file, in hexadecimal digits.

    Raises:
        OSError: it cannot be read.
    """
    with file.open("rb") as content:
        return hashlib.file_digest(content, "sha256").hexdigest()


def write_json(path: Path, content: object) -> None:
    """Write a small JSON file, atomically.

    Raises:
        ValueError: a number is not finite, which JSON has no word for; names its place.
    """
    for place, number in _infinite_numbers(content):
        raise ValueError(f"{path}: {place} must be finite, got {number}; it is not written")
    with atomic_path(path) as aside:
        aside.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def _infinite_numbers(content: object, place: str = "") -> Iterator[tuple[str, float]]:
    """Yield the place and the value of every number that is not finite."""
    if isinstance(content, Mapping):
        for key, value in content.items():
            yield from _infinite_numbers(value, f"{place}.{key}" if place else str(key))
    elif isinstance(content, list | tuple):
        for number, value in enumerate(content):
            yield from _infinite_numbers(value, f"{place}[{number}]")
    elif isinstance(content, float) and not math.isfinite(content):
        yield place, content


def remove_left_overs(path: Path) -> None:
    """Remove what `atomic_path` left of writers of a file that were killed.

    Args:
        path: the file, which nobody writes now; its name may be a pattern.
    """
    for aside in path.parent.glob(f".{path.stem}-*{path.suffix}"):
        aside.unlink()


def check_readable(folder: Path) -> None:
    """Check that a folder may be read and entered.

    Raises:
        PermissionError: it may not.
    """
    if not os.access(folder, os.R_OK | os.X_OK):
        raise PermissionError(refusal(folder))


def refusal(folder: Path) -> str:
    """Say of a folder of images that it may not be read, and what to do."""
    return (
        f"{with_escapes(str(folder))}: this folder may not be read; give the user of this process "
        "the rights to read and enter it, or move it out of data.root"
    )


def with_escapes(text: str) -> str:
    """Escape what a name of a file may hold: line breaks, control characters, bytes of no text."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)
