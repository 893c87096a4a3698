"""Images of a run's weights to be measured, one of each label in a list."""

from functools import partial

import torch
from torch import Tensor

from task.config import Config
from task.data import Dataset, ImageSet
from task.generation.images import image_shape
from task.generators.diffusion.sampler import (
    build_sampler,
    evaluations_per_image,
    sample_batches,
    to_uint8,
)
from task.generators.diffusion.unet import UNet
from task.progress import progress
from task.randomness import Stream, torch_generator
from task.training.devices import autocast, move


def draw_images(
    config: Config, model: UNet, labels: Tensor, *, device: torch.device, stream: Stream
) -> ImageSet:
    """Draw an image of each label; the same seed, stream and place in the list draw the same.

    Args:
        config: of the run: its sampler and its seed, `train.channels_last`, `eval.batch_size` and
            `eval.precision`, which is settled.
        model: moved to `device`.
        labels: [N] int64.
        device: that draws.
        stream: what the images are for.

    Returns:
        The images, uint8 on the CPU, with their labels; truncated where they are evaluated in
        the paper's range, else rounded.

    Raises:
        ValueError: `eval.precision` is "auto".
    """
    move(model, device, channels_last=config.train.channels_last)
    steps = len(labels) * evaluations_per_image(config)
    with (
        autocast(device, config.eval.precision),
        progress(steps, f"drawing {len(labels):,} images") as advance,
    ):
        images = sample_batches(
            build_sampler(config),
            model,
            labels.to(device),
            image_shape=image_shape(config),
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
