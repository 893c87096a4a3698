"""Images decoded once: a memory-mapped file that all processes of a machine share.

<cache_dir>/<key>/         mode 0700, it holds images of patients; complete, or not there
    images.npy             [N, C, H, W] uint8, the files that could be read, in their order
    unreadable.json        [position, reason] of those that could not
<cache_dir>/.<key>.lock    held by the process that decodes; the others wait for it

Nothing is ever taken out: delete `cache_dir`, or any entry, when no run is going.
"""

import fcntl
import hashlib
import json
import logging
import os
import shutil
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

import numpy as np
import torch
from torch import Tensor

from task.config import require_one_of
from task.progress import tracked

# To be raised when the same file and settings give other pixels than before.
VERSION = 1

MAX_LISTED = 20
MAX_THREADS = 8

_log = logging.getLogger(__name__)


def cached_images(
    paths: list[Path],
    decode: Callable[[Path], Tensor],
    *,
    root: Path,
    shape: tuple[int, int, int],
    settings: str,
    cache_dir: Path,
    on_corrupt: str,
) -> tuple[Tensor, np.ndarray]:
    """Decode files, or open what this or another process decoded before.

    Args:
        paths: of the files, below `root`.
        decode: gives the image of one file, uint8 of `shape`.
        root: folder of the data set.
        shape: C, H, W.
        settings: everything besides the file that `decode` depends on.
        cache_dir: made if it is not there.
        on_corrupt: of files that cannot be read: "refuse" raises, "skip" warns and leaves out.

    Returns:
        The images, [M, C, H, W] uint8, mapped copy-on-write, and their positions in `paths`,
        [M] int64.

    Raises:
        ValueError: files cannot be read, or the cache cannot be written.
    """
    require_one_of("data.on_corrupt", on_corrupt, ("refuse", "skip"))
    if not paths:
        return torch.empty((0, *shape), dtype=torch.uint8), np.empty(0, dtype=np.int64)
    entry = cache_dir / cache_key(paths, root=root, settings=f"{shape} {settings}")
    try:
        if not entry.is_dir():
            with _held(entry):
                if not entry.is_dir():
                    _write_entry(entry, paths, decode, shape, keep=on_corrupt == "skip")
    except OSError as error:
        raise ValueError(
            f"data.cache_dir must be a folder that can be written, got {str(cache_dir)!r} ({error})"
        ) from error
    unreadable = dict(json.loads((entry / "unreadable.json").read_text(encoding="utf-8")))
    if unreadable:
        report_unreadable({paths[i]: why for i, why in unreadable.items()}, on_corrupt)
    kept = np.array([i for i in range(len(paths)) if i not in unreadable], dtype=np.int64)
    # Copy-on-write, because torch warns of tensors over memory that cannot be written.
    return torch.from_numpy(np.load(entry / "images.npy", mmap_mode="c")), kept


def cache_key(paths: list[Path], *, root: Path, settings: str) -> str:
    """Name the entry of these files decoded with these settings.

    Files are known by place, size and time of change, as `make` and `rsync` know them: whoever
    rewrites a file changes one of the three, unless they take pains not to, and reading all bytes
    to be sure would cost what the cache saves.
    """
    digest = hashlib.sha256(f"{VERSION}\n{settings}\n{root.resolve()}\n".encode())
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
    listed = [f"{path}: {why}" for path, why in list(reasons.items())[:MAX_LISTED]]
    if len(reasons) > MAX_LISTED:
        listed.append(f"and {len(reasons) - MAX_LISTED} more")
    text = f"{len(reasons)} image files cannot be read:\n  " + "\n  ".join(listed)
    if on_corrupt == "refuse":
        raise ValueError(f"{text}\nMend or remove them, or set data.on_corrupt=skip")
    _log.warning("%s\nThey are left out (data.on_corrupt=skip)", text)


@contextmanager
def _held(entry: Path) -> Iterator[None]:
    entry.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    with entry.with_name(f".{entry.name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # let go by the system when a process dies
        yield


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
            unreadable = _write_images(file, paths, decode, shape)
        if unreadable and not keep:
            report_unreadable({paths[i]: why for i, why in unreadable}, "refuse")
        (aside / "unreadable.json").write_text(json.dumps(unreadable), encoding="utf-8")
        aside.rename(entry)
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def _write_images(
    file: BinaryIO,
    paths: list[Path],
    decode: Callable[[Path], Tensor],
    shape: tuple[int, int, int],
) -> list[tuple[int, str]]:
    """Write the images as an .npy file; returns position and reason of those it could not read.

    Plain writes, because a full disk is an OSError to them and kills whoever writes a map.
    """
    unreadable = []
    _write_header(file, len(paths), shape)
    decoded = tracked(_decoded(paths, decode), len(paths), f"decoding {len(paths):,} images")
    for position, image in enumerate(decoded):
        if isinstance(image, Tensor):
            file.write(image.numpy().tobytes())
        else:
            unreadable.append((position, image))
    file.seek(0)
    _write_header(file, len(paths) - len(unreadable), shape)
    file.flush()
    os.fsync(file.fileno())
    return unreadable


def _write_header(file: BinaryIO, number: int, shape: tuple[int, int, int]) -> None:
    # Its length does not depend on the number: NumPy leaves room for the first axis to grow.
    np.lib.format.write_array_header_1_0(
        file, {"descr": "|u1", "fortran_order": False, "shape": (number, *shape)}
    )


def _decoded(paths: list[Path], decode: Callable[[Path], Tensor]) -> Iterable[Tensor | str]:
    def attempt(path: Path) -> Tensor | str:
        try:
            return decode(path)
        except MemoryError:
            raise
        # Damaged files make Pillow and pydicom raise nearly anything.
        except Exception as error:
            return f"{type(error).__name__}: {error}"

    # Pillow decodes outside of Python's lock.
    with ThreadPoolExecutor(min(MAX_THREADS, os.cpu_count() or 1)) as pool:
        yield from pool.map(attempt, paths)
