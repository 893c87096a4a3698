"""The kinds of image files, and what other files are called."""

import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from PIL import Image

from task.data.pictures import PICTURE_FORMATS

UNOPENED = "files that cannot be opened"

# An ending that says what a file is, rather than the last part of a number or of a name.
ENDING = re.compile(r"\.[a-z][a-z0-9]{0,4}")

# What begins as an image that it is not: raw data of cameras and scanned slides, as TIFF, of which
# a preview would be read. (A DICOMDIR, DICOM PS3.10 8.6, is the table of contents of a medium.)
NO_IMAGES = frozenset(
    {
        *(".arw", ".cr2", ".dng", ".nef", ".nrw", ".orf", ".pef", ".rw2", ".srw"),
        *(".ndpi", ".qptiff", ".scn", ".svs"),
    }
)


@dataclass(frozen=True)
class FileKind:
    """A kind of image files.

    Attributes:
        title: what they are called.
        suffixes: that their names end in, in lower case.
        holds: whether an open file is one, by its content.
    """

    title: str
    suffixes: tuple[str, ...]
    holds: Callable[[BinaryIO], bool]


def is_picture(file: BinaryIO) -> bool:
    """Whether a file begins as a picture does that `decode_picture` reads."""
    file.seek(0)
    try:
        with Image.open(file, formats=PICTURE_FORMATS):
            return True
    # Whatever Pillow does not know and what is cut off in its header; of many types.
    except Exception:
        return False


def is_dicom(file: BinaryIO) -> bool:
    """Whether a file has the mark of DICOM after its preamble.

    Source: DICOM PS3.10 7.1.
    """
    file.seek(128)
    return file.read(4) == b"DICM"


PICTURES = FileKind("pictures", (".png", ".jpg", ".jpeg", ".bmp", ".tif", ".tiff"), is_picture)
DICOM = FileKind("DICOM files", (".dcm", ".dicom"), is_dicom)


def other_kind(path: Path, form: FileKind) -> str | None:
    """Say what a file is that is none of a kind; None where it is one.

    A file is one by its ending or, where that is another, by its content.
    """
    ending = path.suffix.lower()
    if ending in form.suffixes:
        return None
    if ending in NO_IMAGES or path.name == "DICOMDIR":
        return f"{ending or path.name} files"
    try:
        with path.open("rb") as file:
            if form.holds(file):
                return None
            held = [other.title for other in (PICTURES, DICOM) if other.holds(file)]
    except OSError:
        return UNOPENED
    return (*held, f"{ending} files" if ENDING.fullmatch(ending) else "other files")[0]
