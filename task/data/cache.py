"""Images decoded once: a memory-mapped file that all processes of a machine share.

<cache_dir>/<key>/         mode 0700, it holds images of patients; complete, or not there
    images.npy             [N, C, H, W] uint8, the files that could be read, in their order
    hashes.npy             [N] uint64, equal for images that are the same pixel by pixel
    unreadable.json        position, reason and state of each of those that could not
<cache_dir>/.<key>.lock    held by the process that decodes; the others wait for it

A file that could not be read is tried again, with the others of its entry, once its state has
changed: the file, the rights to it, or the libraries that decode. An entry that is not whole is
made anew.

No other entry is ever taken out: delete `cache_dir`, or any entry, when no run is going.
"""

import errno
import hashlib
import json
import logging
import os
import shutil
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np
import torch
from filelock import FileLock
from torch import Tensor

from task.code_version import installed_versions
from task.data.duplicates import image_hash
from task.files import with_escapes
from task.progress import tracked

# To be raised when the same file and settings give other pixels than before, or any for the first
# time.
VERSION = 3

# Packages that, installed or in another version, may read a file that could not be read.
DECODERS = (
    *("pillow", "pydicom", "tifffile", "imagecodecs", "python-gdcm", "pyjpegls", "pylibjpeg"),
    *("pylibjpeg-libjpeg", "pylibjpeg-openjpeg", "pylibjpeg-rle"),
)

# Of the process, the machine or its network rather than the file: tried again every time.
PASSING = frozenset(
    {
        *(errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.EAGAIN),
        *(errno.ESTALE, errno.ETIMEDOUT, errno.EHOSTDOWN),
    }
)

MAX_LISTED = 20
MAX_THREADS = 8

_log = logging.getLogger(__name__)


class CachedImages(NamedTuple):
    """The images of those files that could be read.

    Attributes:
        images: [M, C, H, W] uint8, mapped copy-on-write.
        kept: [M] int64, their positions among the files, sorted.
        hashes: [M] uint64, see `image_hashes`.
    """

    images: Tensor
    kept: np.ndarray
    hashes: np.ndarray


class Failure(NamedTuple):
    """A file that could not be read.

    Attributes:
        position: among the files.
        reason: in words.
        state: of `read_state`, before it was tried; "" where the reason is a passing one.
    """

    position: int
    reason: str
    state: str


def cached_images(
    paths: list[Path],
    decode: Callable[[Path], Tensor],
    *,
    root: Path,
    shape: tuple[int, int, int],
    settings: str,
    cache_dir: Path,
    on_corrupt: str,
) -> CachedImages:
    """Decode files, or open what this or another process decoded before.

    Args:
        paths: of the files, below `root`.
        decode: gives the image of one file, uint8 of `shape`.
        root: folder of the data set.
        shape: C, H, W.
        settings: everything besides the file that `decode` depends on.
        cache_dir: made if it is not there.
        on_corrupt: of files that cannot be read: "refuse" raises, "skip" warns and leaves out.

    Raises:
        ValueError: files cannot be read, or the cache cannot be written.
    """
    if not paths:
        return CachedImages(
            torch.empty((0, *shape), dtype=torch.uint8),
            np.empty(0, dtype=np.int64),
            np.empty(0, dtype=np.uint64),
        )
    entry = cache_dir / cache_key(paths, root=root, settings=f"{shape} {settings}")
    try:
        if not _is_current(entry, paths):
            cache_dir.mkdir(mode=0o700, parents=True, exist_ok=True)
            with FileLock(entry.with_name(f".{entry.name}.lock")):
                if not _is_current(entry, paths):
                    _write_entry(entry, paths, decode, shape, keep=on_corrupt == "skip")
    except OSError as error:
        raise ValueError(
            f"data.cache_dir must be a folder that can be written, got {str(cache_dir)!r} ({error})"
        ) from error
    failures = {failure.position: failure.reason for failure in _failures(entry)}
    if failures:
        report_unreadable({paths[i]: why for i, why in failures.items()}, on_corrupt)
    return CachedImages(
        # Copy-on-write, because torch warns of tensors over memory that cannot be written.
        torch.from_numpy(np.load(entry / "images.npy", mmap_mode="c")),
        np.array([i for i in range(len(paths)) if i not in failures], dtype=np.int64),
        np.load(entry / "hashes.npy"),
    )


def _is_current(entry: Path, paths: list[Path]) -> bool:
    if not entry.is_dir():
        return False
    try:
        failures, hashes = _failures(entry), np.load(entry / "hashes.npy")
        images = np.load(entry / "images.npy", mmap_mode="r")  # a file that was cut is refused
        if not len(images) == len(hashes) == len(paths) - len(failures):
            raise ValueError(f"{len(images)} images, {len(hashes)} hashes, {len(paths)} files")
    except (OSError, EOFError, ValueError, TypeError) as error:
        _log.warning("%s in data.cache_dir is damaged and is made anew: %s", entry.name, error)
        return False
    return all(failure.state == read_state(paths[failure.position]) for failure in failures)


def _failures(entry: Path) -> list[Failure]:
    stored = json.loads((entry / "unreadable.json").read_text(encoding="utf-8"))
    return [Failure(*failure) for failure in stored]


def read_state(path: Path) -> str:
    """Describe everything that decides whether a file can be read, besides the code of feddm."""
    try:
        status = path.stat()
        known = (status.st_size, status.st_mtime_ns, status.st_ino, status.st_mode)
    except OSError as error:
        return type(error).__name__
    return f"{known} {os.access(path, os.R_OK)} {decoder_versions()}"


@cache
def decoder_versions() -> str:
    """Name the versions of the libraries that decode, as far as they are installed."""
    return str(installed_versions(*DECODERS))


def cache_key(paths: list[Path], *, root: Path, settings: str) -> str:
    """Name the entry of these files decoded with these settings.

    Files are known by place, size and time of change, as `make` and `rsync` know them: whoever
    rewrites a file changes one of the three, unless they take pains not to, and reading all bytes
    to be sure would cost what the cache saves.
    """
    digest = hashlib.sha256(f"{VERSION}\n{settings}\n{str(root.resolve())!r}\n".encode())
    for path in paths:
        try:
            status = path.stat()
            known = (status.st_size, status.st_mtime_ns)
        except OSError:  # decoding will say so
            known = (-1, -1)
        digest.update(f"{os.path.relpath(path, root)!r} {known}\n".encode())
    return digest.hexdigest()[:32]


def report_unreadable(reasons: dict[Path, str], on_corrupt: str) -> None:
    """Warn of files that cannot be read, or refuse them, by name.

    Raises:
        ValueError: `on_corrupt` is "refuse".
    """
    listed = [with_escapes(f"{path}: {why}") for path, why in list(reasons.items())[:MAX_LISTED]]
    if len(reasons) > MAX_LISTED:
        listed.append(f"and {len(reasons) - MAX_LISTED} more")
    text = f"{len(reasons)} image files cannot be read:\n  " + "\n  ".join(listed)
    if on_corrupt == "refuse":
        raise ValueError(f"{text}\nMend or remove them, or set data.on_corrupt=skip")
    _log.warning("%s\nThey are left out (data.on_corrupt=skip)", text)


def _write_entry(
    entry: Path,
    paths: list[Path],
    decode: Callable[[Path], Tensor],
    shape: tuple[int, int, int],
    *,
    keep: bool,
) -> None:
    aside = entry.with_name(f".{entry.name}.building")
    shutil.rmtree(aside, ignore_errors=True)  # of a process that was killed here
    aside.mkdir(mode=0o700)
    try:
        with (aside / "images.npy").open("wb") as file:
            hashes, failures = _write_images(file, paths, decode, shape)
        if failures and not keep:
            report_unreadable({paths[f.position]: f.reason for f in failures}, "refuse")
        np.save(aside / "hashes.npy", hashes)
        (aside / "unreadable.json").write_text(json.dumps(failures), encoding="utf-8")
        if entry.is_dir():  # it is damaged, or files that could not be read have changed since
            shutil.rmtree(entry)
        aside.rename(entry)
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def _write_images(
    file: BinaryIO,
    paths: list[Path],
    decode: Callable[[Path], Tensor],
    shape: tuple[int, int, int],
) -> tuple[np.ndarray, list[Failure]]:
    """Write the images as an .npy file; returns their hashes, and the files that gave none.

    Plain writes, because a full disk is an OSError to them and kills whoever writes a map.
    """
    hashes, failures = [], []
    _write_header(file, len(paths), shape)
    decoded = tracked(_decoded(paths, decode), len(paths), f"decoding {len(paths):,} images")
    for position, (image, state) in enumerate(decoded):
        if isinstance(image, Tensor):
            pixels = image.numpy().tobytes()
            file.write(pixels)
            hashes.append(image_hash(pixels))
        else:
            failures.append(Failure(position, image, state))
    file.seek(0)
    _write_header(file, len(paths) - len(failures), shape)
    file.flush()
    os.fsync(file.fileno())
    return np.frombuffer(b"".join(hashes), "<u8"), failures


def _write_header(file: BinaryIO, number: int, shape: tuple[int, int, int]) -> None:
    # Its length does not depend on the number: NumPy leaves room for the first axis to grow.
    np.lib.format.write_array_header_1_0(
        file, {"descr": "|u1", "fortran_order": False, "shape": (number, *shape)}
    )


def _decoded(
    paths: list[Path], decode: Callable[[Path], Tensor]
) -> Iterable[tuple[Tensor | str, str]]:
    def attempt(path: Path) -> tuple[Tensor | str, str]:
        state = read_state(path)
        try:
            return decode(path), state
        except MemoryError:
            raise
        # Damaged files make Pillow and pydicom raise nearly anything.
        except Exception as error:
            passing = isinstance(error, OSError) and error.errno in PASSING
            return f"{type(error).__name__}: {error}", "" if passing else state

    # Pillow decodes outside of Python's lock.
    with ThreadPoolExecutor(min(MAX_THREADS, os.cpu_count() or 1)) as pool:
        yield from pool.map(attempt, paths)
