"""`feddm restore`: pictures filled in, enlarged or coloured by a run's final weights."""

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from task.config import require, value_paths
from task.data.decode import decode_picture, fit
from task.restoration import known_part, restoration_config
from task.runs import load_run
from task.synthetic_folder import write_image

NOTICE = "partly synthetic image, restored by a diffusion model"


def restore_files(
    run: Path,
    words: Sequence[str],
    *,
    out: Path,
    class_: str,
    num_images: int,
    mask: Path | None,
    upscale: int | None,
    colorize: bool,
    options: dict[str, Any],
    say: Callable[[str], object],
) -> list[Path]:
    """Restore files and write OUT/<name>-0.png and so on.

    Args:
        run: the folder of the run.
        words: files, and values of the configuration as NAME=VALUE.
        out: folder for the images; made where there is none.
        class_: name or label of the class of all files.
        num_images: for each file.
        mask: file of a mask, white where to fill.
        upscale: see `task.restoration.known_part`.
        colorize: see `task.restoration.known_part`.
        options: further ones of `task.runs.FinishedRun.restore`.
        say: takes the text for the reader.

    Returns:
        The files that were written.

    Raises:
        ValueError: an input is wrong, or a file would be written over.
        OSError: a file cannot be read or written.
    """
    overrides = [word for word in words if word.partition("=")[0] in value_paths()]
    files = [Path(word) for word in words if word not in overrides]
    require(bool(files), "IMAGE", "at least one file", words)
    found = load_run(run)
    found = dataclasses.replace(
        found, config=restoration_config(found.config, overrides, options={})
    )
    size = found.config.data.image_size
    channels = 1 if colorize else found.config.data.channels
    pictures = torch.stack([read_picture(file, size // (upscale or 1), channels) for file in files])
    task: dict[str, Any] = {
        "mask": None if mask is None else read_mask(mask, size),
        "upscale": upscale,
        "colorize": colorize,
    }
    # Before a folder is made.
    known_part(found.config, pictures, **task)
    written = _free_paths(out, files, num_images)
    say(f"drawing {len(written):,} images of class {class_}")
    images = found.restore(pictures, class_, num_images, **task, **options)
    for path, image in zip(written, images.images, strict=True):
        write_image(path, image, NOTICE)
    say(f"written to {', '.join(map(str, written[:3]))}{' ...' if len(written) > 3 else ''}")
    return written


def read_picture(file: Path, size: int, channels: int) -> Tensor:
    """Read a picture as training reads it, but without resizing.

    Args:
        file: PNG, JPEG, BMP or TIFF.
        size: its height and width.
        channels: 1 turns colours into grey, 3 repeats grey.

    Returns:
        [channels, size, size] uint8.

    Raises:
        OSError: it cannot be read.
        ValueError: it is of another size, or its pixels have no known range.
    """
    pixels = decode_picture(file)
    shape = tuple(pixels.shape[1:])
    expected = f"{size} x {size} pixels for this run and task; bring it to that size first"
    require(shape == (size, size), str(file), expected, " x ".join(map(str, shape)))
    return fit(pixels, size, channels)


def read_mask(file: Path, size: int) -> Tensor:
    """Read a mask, [size, size] bool, true where it is white; otherwise it is black.

    Raises:
        OSError: it cannot be read.
        ValueError: it is of another size, or has greys or colours.
    """
    mask = read_picture(file, size, 1)[0]
    between = sorted({*mask[(mask > 0) & (mask < 255)].tolist()})
    require(not between, str(file), "black (known) or white (to be filled) everywhere", between[:3])
    return mask == 255


def _free_paths(out: Path, files: Sequence[Path], num_images: int) -> list[Path]:
    stems = [file.stem for file in files]
    require(len(set(stems)) == len(stems), "IMAGE", "files of different names", stems)
    paths = [out / f"{stem}-{number}.png" for stem in stems for number in range(num_images)]
    there = [str(path) for path in paths if path.exists()]
    require(not there, "--out", "a folder without images of these names", there[:3])
    out.mkdir(parents=True, exist_ok=True)
    return paths
