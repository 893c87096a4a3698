"""Many images of a generator, some at a time: how many fit, their noise, and their pixels."""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from task.checks import require
from task.generators.base import Advance, Generator, NoiseSource
from task.generators.noise import NOISE_BLOCK, join_blocks

# A CPU draws 16 to 100 images of the paper's network side by side equally fast, and more no faster.
CPU_BATCH_SIZE = 100
# Enough to keep a GPU busy, whatever else would fit into it.
GPU_BATCH_SIZE = 1000


def sample_batches(
    generator: Generator,
    labels: Tensor,
    *,
    batch_size: int | None,
    block_generator: Callable[[int], torch.Generator],
    advance: Advance = lambda number: None,
) -> Tensor:
    """Draw an image for each label, some at a time, with the generator in eval mode.

    The noise of an image depends on its place among the labels alone: neither the batch size nor
    further labels behind it change the image, but for rounding.

    Args:
        generator: its mode is restored afterwards.
        labels: [N] int64, on the generator's device.
        batch_size: images that are drawn side by side, >= 1; None: see `fitting_batch_size`.
        block_generator: makes the random generator of a block of images, on the device of
            `labels`; see `block_noise`.
        advance: see `Generator.sample`.

    Returns:
        [N, C, H, W] float32, about [-1, 1]; they can be trained on.

    Raises:
        ValueError: `batch_size` < 1.
    """
    require(batch_size is None or batch_size >= 1, "batch_size", ">= 1, or None", batch_size)
    training = generator.training
    generator.eval()
    try:
        size = batch_size or fitting_batch_size(generator, labels.device)
        images = []
        for start in range(0, len(labels), size):
            batch = labels[start : start + size]
            places = range(start, start + len(batch))
            noise = block_noise(places, generator.noise_shape, block_generator)
            images.append(generator.sample(batch, noise, advance=advance))
        return torch.cat(images)
    finally:
        generator.train(training)


@torch.inference_mode()
def fitting_batch_size(generator: Generator, device: torch.device) -> int:
    """Say how many images can be drawn side by side: what the free memory of a GPU takes.

    Args:
        generator: on `device`, in the mode and under the autocast that it will draw with.
        device: that draws.
    """
    if device.type != "cuda":
        return CPU_BATCH_SIZE
    noise = torch.zeros(16, *generator.noise_shape, device=device)
    labels = torch.zeros(len(noise), dtype=torch.int64, device=device)
    for _ in range(2):  # the first time leaves behind what is made once, and needs more
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        generator.sampling_step(labels, lambda: noise)
    per_image = (torch.cuda.max_memory_allocated(device) - before) / len(noise)
    reserved = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    free = torch.cuda.mem_get_info(device)[0] + reserved
    # Half of it: guidance makes two of each image.
    return max(1, min(GPU_BATCH_SIZE, int(free / 2 / per_image)))


def block_noise(
    places: range,
    noise_shape: tuple[int, ...],
    block_generator: Callable[[int], torch.Generator],
) -> NoiseSource:
    """Make a noise source of torch's generators for the images at some places; see `join_blocks`.

    Args:
        places: of the images, 0-based, without gaps.
        noise_shape: of an image, see `Generator.noise_shape`.
        block_generator: makes the generator of the block of a number, from 0.
    """

    def block_source(number: int) -> NoiseSource:
        generator = block_generator(number)
        shape = (NOISE_BLOCK, *noise_shape)
        return partial(torch.randn, shape, generator=generator, device=generator.device)

    return join_blocks(places, block_source, torch.cat)


def to_uint8(images: Tensor, *, truncated: bool = False) -> Tensor:
    """Turn float images in [-1, 1] (clamped to it) into uint8 of the same shape.

    Args:
        images: float, any shape.
        truncated: whether to drop what is beyond whole numbers, as the released code did in its
            files of generated images, instead of rounding.

    Raises:
        TypeError: `images` is not floating-point.
    """
    if not images.is_floating_point():
        raise TypeError(f"images must be floating-point in [-1, 1], got {images.dtype}")
    levels = (images.float().clamp(-1, 1) + 1) * 127.5
    return (levels if truncated else levels.round()).to(torch.uint8)
