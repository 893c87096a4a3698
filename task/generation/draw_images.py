"""Images of a run's weights to be measured, one of each label in a list."""

from functools import partial

import torch
from torch import Tensor

from task.config import Config
from task.data import Dataset, ImageSet
from task.generation.batches import sample_batches, to_uint8
from task.generators.base import Generator
from task.progress import progress
from task.randomness import Stream, torch_generator
from task.training.devices import autocast, move


def draw_images(
    config: Config, generator: Generator, labels: Tensor, *, device: torch.device, stream: Stream
) -> ImageSet:
    """Draw an image of each label; the same seed, stream and place in the list draw the same.

    Args:
        config: of the run: its seed, `train.channels_last`, `eval.batch_size` and
            `eval.precision`, which is settled.
        generator: moved to `device`.
        labels: [N] int64.
        device: that draws.
        stream: what the images are for.

    Returns:
        The images, uint8 on the CPU, with their labels; truncated where they are evaluated in
        the paper's range, else rounded.

    Raises:
        ValueError: `eval.precision` is "auto".
    """
    move(generator, device, channels_last=config.train.channels_last)
    steps = len(labels) * generator.evaluations_per_image
    with (
        autocast(device, config.eval.precision),
        progress(steps, f"drawing {len(labels):,} images") as advance,
    ):
        images = sample_batches(
            generator,
            labels.to(device),
            batch_size=config.eval.batch_size,
            block_generator=partial(torch_generator, config.seed, stream, device=device),
            advance=advance,
        )
    # The published figures are of images that were truncated.
    truncated = stream is Stream.EVALUATED_IMAGES and config.eval.image_range == "paper"
    drawn = to_uint8(images, truncated=truncated).cpu()
    # Clients in other processes may train on the same GPU.
    torch.cuda.empty_cache()
    return ImageSet(drawn, labels)


def balanced_labels(num_images: int, num_classes: int) -> Tensor:
    """List classes in turn, [num_images] int64."""
    return torch.arange(num_images) % num_classes


def full_labels(config: Config, dataset: Dataset) -> Tensor:
    """List the classes of the images that full metrics draw, [N] int64.

    Of each class `eval.num_per_class`, or as many as the test split has, or, without a test
    split, the training images.

    Source: section IV of the paper.
    """
    num_classes = len(config.data.classes)
    if config.eval.num_per_class is None:
        real = dataset.test if len(dataset.test) > 0 else dataset.train
        counts = real.labels.bincount(minlength=num_classes)
    else:
        counts = torch.full((num_classes,), config.eval.num_per_class)
    return torch.arange(num_classes).repeat_interleave(counts)
