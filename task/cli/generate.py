"""`feddm generate`: a folder of images of chosen classes from a run's final weights."""

import shlex
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from task.config import Config, changed_config
from task.generation.folder import SyntheticFolder, batch_size_of, describe_origin, open_folder
from task.generation.images import ImageSource, class_labels
from task.progress import progress
from task.runs.layout import weights_file
from task.runs.run import final_model
from task.training.devices import select_device


def generate_images(
    run: Path,
    config: Config,
    *,
    classes: Sequence[str] | None,
    num_images: int,
    out: Path,
    client: int | None,
    grid: bool,
    scale: int,
    say: Callable[[str], object],
) -> None:
    """Draw images into a folder, or those that it still lacks; see `task.generation.folder`.

    Args:
        run: the folder of the run.
        config: of the run, with what is to be drawn otherwise.
        classes: names or labels; None: every class.
        num_images: of each class.
        out: the folder.
        client: whose own weights draw; None: the global ones.
        grid: whether to show the first images of each class in one picture, too.
        scale: pixels of a file for a pixel of an image, in each direction.
        say: takes the text for the reader.

    Raises:
        ValueError: an input is wrong, or the folder holds something else.
        OSError: the folder cannot be written.
    """
    names = config.data.classes
    labels = class_labels(names, classes)
    # Another batch size would draw the rest of a folder with another rounding.
    config = changed_config(
        config,
        options={"eval.batch_size": config.eval.batch_size or batch_size_of(out)},
        names=config.generation_values,
    )
    model, server_round = final_model(run, config, client)
    source = ImageSource(config, model, select_device(config.train.device))
    origin = describe_origin(
        config,
        source,
        weights=weights_file(run, client),
        server_round=server_round,
        client=client,
        scale=scale,
    )
    with open_folder(out, names, origin=origin, asked=dict.fromkeys(labels, num_images)) as folder:
        fill_folder(folder, source, labels, num_images=num_images, say=say)
        folder.write_manifest()
        if grid:
            folder.write_grid(labels, num_images)
        for line in describe_folder(folder, names, labels, num_images):
            say(line)


def describe_folder(
    folder: SyntheticFolder, names: Sequence[str], labels: Sequence[int], num_images: int
) -> Iterator[str]:
    """Say what a folder holds after a call, how its classes are numbered, and how to train on it.

    Args:
        folder: the folder.
        names: of all classes, in the order of their labels.
        labels: of the classes that were asked for.
        num_images: that were asked for of each.
    """
    for label in labels:
        more = folder.count(label) - num_images
        yield (
            f"{names[label]}: {num_images:,} images"
            + (f"; {more:,} more of an earlier call are there or still to come" if more else "")
        )
    numbers = folder.image_folder_labels()
    if any(label != number for label, number in numbers.items()):
        yield (
            "torchvision's ImageFolder numbers these folders in the order of their names: "
            + ", ".join(f"{names[label]} {n} (here {label})" for label, n in numbers.items())
            + "; manifest.json has both"
        )
    yield f"\nin {folder.path}; to train on them:\nfeddm-train {shlex.join(folder.overrides())}"


def fill_folder(
    folder: SyntheticFolder,
    source: ImageSource,
    labels: Sequence[int],
    *,
    num_images: int,
    say: Callable[[str], object],
) -> None:
    """Draw what a folder lacks; a batch that lacks any image is drawn whole, as the first time."""
    total = sum(folder.num_missing(label, num_images) for label in labels)
    if total == 0:
        return
    say(f"drawing {total:,} images on {source.device}")
    batches = [
        (label, places)
        for label in labels
        for places in source.batches(num_images)
        if folder.missing(label, places)
    ]
    work = source.evaluations * sum(len(places) for _, places in batches)
    with progress(work, f"drawing {total:,} images") as advance:
        for label, places in batches:
            images = source.draw(label, places, advance)
            for place in folder.missing(label, places):
                folder.write(label, place, images[place - places.start])
