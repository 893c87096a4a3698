"""`feddm restore`: pictures filled in, enlarged or colored by a run's final weights."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from task.checks import require
from task.config import Config
from task.data.pictures import decode_picture
from task.data.shape import resize_decoded
from task.generation.folder import write_image
from task.generation.images import class_labels
from task.generation.restoration import (
    Restorer,
    known_part,
    picture_shape,
    restoration_config,
)
from task.generators.base import Projection
from task.progress import progress
from task.runs.layout import run_config
from task.runs.run import final_model
from task.training.devices import select_device

RESTORED_NOTICE = "partly synthetic image, restored by a generative model"


@dataclass(frozen=True)
class FileTask:
    """What is done to files: one of three, see `task.generation.restoration.known_part`.

    Attributes:
        mask: file of a mask, white where to fill.
        upscale: how many times to enlarge.
        colorize: whether to color.
    """

    mask: Path | None = None
    upscale: int | None = None
    colorize: bool = False

    def known_part(self, config: Config, files: Sequence[Path]) -> tuple[Tensor, Projection]:
        """Say what files tell about the images that are wanted."""
        given: dict[str, Any] = {"upscale": self.upscale, "colorize": self.colorize}
        channels, size, _ = picture_shape(config, mask=self.mask is not None, **given)
        pictures = torch.stack([read_picture(file, size, channels) for file in files])
        mask = None if self.mask is None else read_mask(self.mask, size)
        return known_part(config, pictures, mask=mask, **given)


def restore_files(
    run: Path,
    words: Sequence[str],
    task: FileTask,
    *,
    out: Path,
    class_: str,
    num_images: int,
    walk: Mapping[str, int | None],
    client: int | None,
    options: Mapping[str, object | None],
    say: Callable[[str], object],
) -> None:
    """Restore files and write OUT/<name>-0.png and so on, each as soon as it is drawn.

    Args:
        run: the folder of the run.
        words: files, and values of the configuration as NAME=VALUE.
        task: what is done to the files.
        out: folder for the images; made where there is none.
        class_: name or label of the class of all files.
        num_images: for each file.
        walk: arguments of `Generator.restoring`.
        client: whose own weights draw; None: the global ones.
        options: see `task.generation.restoration.restoration_config`.
        say: takes the text for the reader.

    Raises:
        ValueError: an input is wrong, or a file would be written over.
        OSError: a file cannot be read or written.
    """
    overrides = [word for word in words if "=" in word and not Path(word).exists()]
    files = [Path(word) for word in words if word not in overrides]
    require(bool(files), "IMAGE", "at least one file", words)
    config = restoration_config(run_config(run), overrides, options=options)
    (label,) = class_labels(config.data.classes, class_)
    known, projection = task.known_part(config, files)
    written = _free_paths(out, files, num_images)
    restorer = Restorer(
        config,
        final_model(run, config, client)[0],
        known,
        projection,
        label=label,
        num_images=num_images,
        device=select_device(config.train.device),
        **walk,
    )
    say(f"drawing {len(written):,} images of class {class_} on {restorer.device}")
    _write_restored(restorer, written)
    say(f"written to {', '.join(map(str, written[:3]))}{' ...' if len(written) > 3 else ''}")


def _write_restored(restorer: Restorer, paths: Sequence[Path]) -> None:
    # Before hours of drawing, in case it cannot be made.
    paths[0].parent.mkdir(parents=True, exist_ok=True)
    left = iter(paths)
    with progress(len(paths), f"drawing {len(paths):,} images") as update:
        for images in restorer.batches():
            for image in images:
                write_image(next(left), image, RESTORED_NOTICE)
            update(len(images))


def read_picture(file: Path, size: int, channels: int) -> Tensor:
    """Read a picture as training reads it, but without resizing.

    Args:
        file: of a picture, see `decode_picture`.
        size: its height and width.
        channels: 1 turns colors into gray, 3 repeats gray.

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
    return resize_decoded(pixels, size, channels)


def read_mask(file: Path, size: int) -> Tensor:
    """Read a mask, [size, size] bool, true where it is white; otherwise it is black.

    Raises:
        OSError: it cannot be read.
        ValueError: it is of another size, or has grays or colors.
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
    return paths
