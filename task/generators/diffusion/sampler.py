"""Samplers: from noise and labels to images, with any model and any schedule.

They compute in float32, whatever the model computes in under the caller's autocast.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from task.checks import require
from task.config import Config
from task.generators.diffusion.noise_schedule import NoiseSchedule, build_schedule
from task.generators.diffusion.objective import Model
from task.generators.diffusion.samplers import (
    Predict,
    Step,
    ddim_steps,
    ddpm_steps,
    dpmpp_2m_steps,
    guide,
    sampling_steps,
    walk,
)
from task.generators.noise import NOISE_BLOCK, join_blocks

# draw_noise() -> standard normal noise beside N labels, [N, C, H, W] float32, new at every call
NoiseSource = Callable[[], Tensor]
# sampler(model, labels, draw_noise) -> images [N, C, H, W] float32 in about [-1, 1]
Sampler = Callable[[Model, Tensor, NoiseSource], Tensor]

# A CPU draws 16 to 100 images of the paper's network side by side equally fast, and more no faster.
CPU_BATCH_SIZE = 100
# Enough to keep a GPU busy, whatever else would fit into it.
GPU_BATCH_SIZE = 1000


@dataclass(frozen=True)
class GuidedModel:
    """A model with classifier-free guidance: away from "no class", towards the label.

    Attributes:
        model: trained with dropped labels.
        guidance_scale: >= 0; 0 ignores the labels, 1 is the model itself, more exaggerates.
        null_label: the label that stands for "no class".

    Source: Ho & Salimans 2022, equation 6, whose w is `guidance_scale` - 1.
    """

    model: Model
    guidance_scale: float
    null_label: int

    def __call__(self, x_t: Tensor, log_snr: Tensor, labels: Tensor) -> Tensor:
        """Predict with one call of the model on twice the batch."""
        both = torch.cat([labels, torch.full_like(labels, self.null_label)])
        output = self.model(torch.cat([x_t, x_t]), torch.cat([log_snr, log_snr]), both)
        conditional, unconditional = output.to(x_t.dtype).chunk(2)
        guided: Tensor = guide(conditional, unconditional, self.guidance_scale)
        return guided


@torch.inference_mode()
def draw_along(
    steps: Sequence[Step],
    model: Model,
    labels: Tensor,
    *,
    prediction_type: str,
    clip_x_start: bool,
    draw_noise: NoiseSource,
) -> Tensor:
    """Draw images along the steps of a sampler.

    Args:
        steps: see `task.generators.diffusion.samplers`.
        model: see `task.generators.diffusion.objective`.
        labels: [N] int64, what to draw.
        prediction_type: what the model returns.
        clip_x_start: whether to clamp each prediction of x_start to [-1, 1].
        draw_noise: source of all noise, beside `labels`.

    Returns:
        [N, C, H, W] float32, about [-1, 1].

    Raises:
        ValueError: `prediction_type` is unknown.
    """
    images: Tensor = walk(
        steps,
        predicting(model, labels),
        draw_noise=draw_noise,
        prediction_type=prediction_type,
        clip_x_start=clip_x_start,
    )
    return images


def predicting(model: Model, labels: Tensor) -> Predict:
    """Let a model predict for labels, [N] int64, at one log-SNR for all images, in float32."""

    def predict(x_t: Tensor, log_snr: float) -> Tensor:
        log_snrs = labels.new_full((len(labels),), log_snr, dtype=torch.float32)
        return model(x_t, log_snrs, labels).to(x_t.dtype)

    return predict


def ddpm_sample(
    model: Model,
    labels: Tensor,
    *,
    schedule: NoiseSchedule,
    prediction_type: str,
    variance: str,
    clip_x_start: bool,
    draw_noise: NoiseSource,
) -> Tensor:
    """Draw images by ancestral sampling, one step per timestep.

    Args:
        model: see `task.generators.diffusion.objective`.
        labels: [N] int64, what to draw.
        schedule: the model's.
        prediction_type: what the model returns.
        variance: of the noise of a step: "beta" or "posterior". The last step adds none.
        clip_x_start: whether to clamp each prediction of x_start to [-1, 1].
        draw_noise: source of all noise, beside `labels`.

    Returns:
        [N, C, H, W] float32, about [-1, 1].

    Raises:
        ValueError: `variance` or `prediction_type` is unknown.

    Source: the paper, equation 3 (Ho et al. 2020, Algorithm 2).
    """
    return draw_along(
        ddpm_steps(schedule.alphas_cumprod.tolist(), variance),
        model,
        labels,
        prediction_type=prediction_type,
        clip_x_start=clip_x_start,
        draw_noise=draw_noise,
    )


def ddim_sample(
    model: Model,
    labels: Tensor,
    *,
    schedule: NoiseSchedule,
    prediction_type: str,
    num_inference_steps: int,
    eta: float,
    clip_x_start: bool,
    draw_noise: NoiseSource,
) -> Tensor:
    """Draw images in any number of steps; the last one returns the predicted x_start.

    With every step and `eta` = 1 it is `ddpm_sample` with the posterior variance, which over
    the continuous schedule is the sampler of the released code.

    Args:
        model: see `task.generators.diffusion.objective`.
        labels: [N] int64, what to draw.
        schedule: the model's.
        prediction_type: what the model returns.
        num_inference_steps: 1 to T, see `inference_timesteps`.
        eta: in [0, 1], share of fresh noise in a step; 0: all noise is in the start.
        clip_x_start: whether to clamp each prediction of x_start to [-1, 1].
        draw_noise: source of all noise, beside `labels`.

    Returns:
        [N, C, H, W] float32, about [-1, 1].

    Raises:
        ValueError: `num_inference_steps` or `eta` is out of range, a word is unknown.

    Source: Song et al. 2021 (DDIM), equations 12 and 16.
    """
    return draw_along(
        ddim_steps(schedule.alphas_cumprod.tolist(), num_inference_steps, eta=eta),
        model,
        labels,
        prediction_type=prediction_type,
        clip_x_start=clip_x_start,
        draw_noise=draw_noise,
    )


def dpmpp_2m_sample(
    model: Model,
    labels: Tensor,
    *,
    schedule: NoiseSchedule,
    prediction_type: str,
    num_inference_steps: int,
    clip_x_start: bool,
    draw_noise: NoiseSource,
) -> Tensor:
    """Draw images by DPM-Solver++(2M): the path of DDIM with `eta` = 0, to second order.

    Args:
        model: see `task.generators.diffusion.objective`.
        labels: [N] int64, what to draw.
        schedule: the model's.
        prediction_type: what the model returns.
        num_inference_steps: 1 to T, see `inference_timesteps`.
        clip_x_start: whether to clamp each prediction of x_start to [-1, 1].
        draw_noise: source of the noise to start from, beside `labels`; there is no other.

    Returns:
        [N, C, H, W] float32, about [-1, 1].

    Raises:
        ValueError: `num_inference_steps` is out of range, or `prediction_type` unknown.

    Source: Lu et al. 2022 (arXiv 2211.01095), Algorithm 2.
    """
    return draw_along(
        dpmpp_2m_steps(schedule.alphas_cumprod.tolist(), num_inference_steps),
        model,
        labels,
        prediction_type=prediction_type,
        clip_x_start=clip_x_start,
        draw_noise=draw_noise,
    )


def build_sampler(config: Config) -> Sampler:
    """Make the sampler of a configuration, with guidance where it asks for it.

    What the sampler returns are inference tensors, which cannot be trained on;
    `sample_batches` returns ordinary ones.

    Raises:
        ValueError: `diffusion.sampler` is unknown.
    """
    diffusion = config.diffusion
    steps = sampling_steps(
        build_schedule(config).alphas_cumprod.tolist(),
        sampler=diffusion.sampler,
        num_inference_steps=diffusion.num_inference_steps or diffusion.num_timesteps,
        eta=diffusion.eta,
        variance=diffusion.variance,
    )

    def sampler(model: Model, labels: Tensor, draw_noise: NoiseSource) -> Tensor:
        return draw_along(
            steps,
            guided(model, config),
            labels,
            prediction_type=diffusion.prediction_type,
            clip_x_start=diffusion.clip_x_start,
            draw_noise=draw_noise,
        )

    return sampler


def evaluations_per_image(config: Config) -> int:
    """Return how often the sampler of a configuration evaluates the model for an image."""
    steps = config.diffusion.num_inference_steps or config.diffusion.num_timesteps
    return steps if config.diffusion.guidance_scale == 1 else 2 * steps


def guided(model: Model, config: Config) -> Model:
    """Return the model, with guidance where a configuration asks for it."""
    scale = config.diffusion.guidance_scale
    return model if scale == 1 else GuidedModel(model, scale, len(config.data.classes))


def sample_batches(
    sampler: Sampler,
    model: nn.Module,
    labels: Tensor,
    *,
    image_shape: tuple[int, int, int],
    batch_size: int | None,
    block_generator: Callable[[int], torch.Generator],
    advance: Callable[[int], None] = lambda number: None,
) -> Tensor:
    """Draw an image for each label, some at a time, with the model in eval mode.

    The noise of an image depends on its place among the labels alone: neither the batch size nor
    further labels behind it change the image, but for rounding.

    Args:
        sampler: see `build_sampler`.
        model: its mode is restored afterwards.
        labels: [N] int64, on the model's device.
        image_shape: (C, H, W).
        batch_size: images that are drawn side by side, >= 1; None: see `fitting_batch_size`.
        block_generator: makes the generator of a block of images, on the device of `labels`;
            see `block_noise`.
        advance: is told of each evaluation of the model for how many images it was.

    Returns:
        [N, C, H, W] float32, about [-1, 1].

    Raises:
        ValueError: `batch_size` < 1.
    """
    require(batch_size is None or batch_size >= 1, "batch_size", ">= 1, or None", batch_size)
    training = model.training
    model.eval()
    told = telling(model, advance)
    try:
        size = batch_size or fitting_batch_size(model, image_shape, labels.device)
        images = []
        for start in range(0, len(labels), size):
            batch = labels[start : start + size]
            places = range(start, start + len(batch))
            images.append(sampler(told, batch, block_noise(places, image_shape, block_generator)))
        return torch.cat(images)
    finally:
        model.train(training)


def telling(model: Model, advance: Callable[[int], None]) -> Model:
    """Return the model, which tells of each evaluation for how many images it was."""

    def told(x_t: Tensor, log_snr: Tensor, labels: Tensor) -> Tensor:
        output = model(x_t, log_snr, labels)
        advance(len(x_t))
        return output

    return told


@torch.inference_mode()
def fitting_batch_size(
    model: nn.Module, image_shape: tuple[int, int, int], device: torch.device
) -> int:
    """Say how many images can be drawn side by side: what the free memory of a GPU takes.

    Args:
        model: on `device`, in the mode and under the autocast that it will draw with.
        image_shape: (C, H, W).
        device: that draws.
    """
    if device.type != "cuda":
        return CPU_BATCH_SIZE
    tried = 16
    x_t = torch.zeros(tried, *image_shape, device=device)
    log_snr = x_t.new_zeros(tried)
    for _ in range(2):  # the first time leaves behind what is made once, and needs more
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        model(x_t, log_snr, log_snr.long())
    per_image = (torch.cuda.max_memory_allocated(device) - before) / tried
    reserved = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    free = torch.cuda.mem_get_info(device)[0] + reserved
    # Half of it: guidance makes two of each image.
    return max(1, min(GPU_BATCH_SIZE, int(free / 2 / per_image)))


def block_noise(
    places: range,
    image_shape: tuple[int, int, int],
    block_generator: Callable[[int], torch.Generator],
) -> NoiseSource:
    """Make a noise source of torch's generators for the images at some places; see `join_blocks`.

    Args:
        places: of the images, 0-based, without gaps.
        image_shape: (C, H, W).
        block_generator: makes the generator of the block of a number, from 0.
    """

    def block_source(number: int) -> NoiseSource:
        generator = block_generator(number)
        shape = (NOISE_BLOCK, *image_shape)
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
