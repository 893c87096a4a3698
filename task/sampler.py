"""Samplers: from noise and labels to images, with any model and any schedule.

They compute in float32, whatever the model computes in under the caller's autocast.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from itertools import pairwise

import torch
from torch import Tensor, nn

from task.config import DIFFUSION_CHOICES, Config, require, require_one_of
from task.diffusion import Model, predict_noise, predict_x_start, unknown_choice
from task.schedule import NoiseSchedule, build_schedule, log_snr

# sampler(model, labels, generator) -> images [N, C, H, W] float32 in about [-1, 1]
Sampler = Callable[[Model, Tensor, torch.Generator], Tensor]


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
        """Predict with one call of the model on twice the batch; see `task.diffusion`."""
        both = torch.cat([labels, torch.full_like(labels, self.null_label)])
        output = self.model(torch.cat([x_t, x_t]), torch.cat([log_snr, log_snr]), both)
        conditional, unconditional = output.to(x_t.dtype).chunk(2)
        return unconditional + self.guidance_scale * (conditional - unconditional)


def denoise(
    model: Model,
    x_t: Tensor,
    labels: Tensor,
    *,
    alpha_cumprod: float,
    prediction_type: str,
    clip_x_start: bool,
) -> tuple[Tensor, Tensor]:
    """Split noisy images into the images and the noise that a model sees in them.

    Args:
        model: see `task.diffusion`.
        x_t: [N, C, H, W] float32.
        labels: [N] int64.
        alpha_cumprod: in (0, 1), the same for all images.
        prediction_type: "epsilon", "v_prediction" or "sample".
        clip_x_start: whether to clamp the images to [-1, 1] and let the noise follow.

    Returns:
        x_start and noise, both [N, C, H, W] float32.
    """
    alphas_cumprod = labels.new_full((len(labels),), alpha_cumprod, dtype=torch.float64)
    output = model(x_t, log_snr(alphas_cumprod).float(), labels).to(x_t.dtype)
    x_start = predict_x_start(output, x_t, alphas_cumprod, prediction_type)
    if not clip_x_start:
        return x_start, predict_noise(output, x_t, alphas_cumprod, prediction_type)
    x_start = x_start.clamp(-1, 1)
    return x_start, predict_noise(x_start, x_t, alphas_cumprod, "sample")


@torch.inference_mode()
def ddpm_sample(
    model: Model,
    labels: Tensor,
    *,
    schedule: NoiseSchedule,
    image_shape: tuple[int, int, int],
    prediction_type: str,
    variance: str,
    clip_x_start: bool,
    generator: torch.Generator,
) -> Tensor:
    """Draw images by ancestral sampling, one step per timestep.

    Args:
        model: see `task.diffusion`.
        labels: [N] int64, what to draw.
        schedule: the model's.
        image_shape: (C, H, W).
        prediction_type: what the model returns.
        variance: of the noise of a step: "beta" or "posterior". The last step adds none.
        clip_x_start: whether to clamp each prediction of x_start to [-1, 1].
        generator: source of all noise, on the device of `labels`.

    Returns:
        [N, C, H, W] float32, about [-1, 1].

    Raises:
        ValueError: `variance` or `prediction_type` is unknown.

    Source: the paper, equation 3 (Ho et al. 2020, Algorithm 2).
    """
    require_one_of("variance", variance, DIFFUSION_CHOICES["variance"])
    alphas_cumprod, betas = schedule.alphas_cumprod.tolist(), schedule.betas.tolist()
    x_t = draw_noise(labels, image_shape, generator)
    for timestep in reversed(range(schedule.num_timesteps)):
        alpha_cumprod, beta = alphas_cumprod[timestep], betas[timestep]
        _, noise = denoise(
            model,
            x_t,
            labels,
            alpha_cumprod=alpha_cumprod,
            prediction_type=prediction_type,
            clip_x_start=clip_x_start,
        )
        x_t = (x_t - beta / math.sqrt(1 - alpha_cumprod) * noise) / math.sqrt(1 - beta)
        if timestep > 0:
            posterior = (1 - alphas_cumprod[timestep - 1]) / (1 - alpha_cumprod) * beta
            std = math.sqrt(beta if variance == "beta" else posterior)
            x_t = x_t + std * draw_noise(labels, image_shape, generator)
    return x_t


@torch.inference_mode()
def ddim_sample(
    model: Model,
    labels: Tensor,
    *,
    schedule: NoiseSchedule,
    image_shape: tuple[int, int, int],
    prediction_type: str,
    num_inference_steps: int,
    eta: float,
    clip_x_start: bool,
    generator: torch.Generator,
) -> Tensor:
    """Draw images in any number of steps; the last one returns the predicted x_start.

    With every step and `eta` = 1 it is `ddpm_sample` with the posterior variance, which over
    the continuous schedule is the sampler of the released code.

    Args:
        model: see `task.diffusion`.
        labels: [N] int64, what to draw.
        schedule: the model's.
        image_shape: (C, H, W).
        prediction_type: what the model returns.
        num_inference_steps: 1 to T, see `inference_timesteps`.
        eta: in [0, 1], share of fresh noise in a step; 0: all noise is in the start.
        clip_x_start: whether to clamp each prediction of x_start to [-1, 1].
        generator: source of all noise, on the device of `labels`.

    Returns:
        [N, C, H, W] float32, about [-1, 1].

    Raises:
        ValueError: `num_inference_steps` or `eta` is out of range, a word is unknown.

    Source: Song et al. 2021 (DDIM), equations 12 and 16.
    """
    require(0 <= eta <= 1, "eta", "in [0, 1]", eta)
    timesteps = inference_timesteps(schedule.num_timesteps, num_inference_steps)
    path = [*schedule.alphas_cumprod[timesteps].tolist(), 1.0]
    x_t = draw_noise(labels, image_shape, generator)
    for here, after in pairwise(path):
        x_start, noise = denoise(
            model,
            x_t,
            labels,
            alpha_cumprod=here,
            prediction_type=prediction_type,
            clip_x_start=clip_x_start,
        )
        std = eta * math.sqrt((1 - after) / (1 - here) * (1 - here / after))
        x_t = math.sqrt(after) * x_start + math.sqrt(1 - after - std**2) * noise
        if std > 0:
            x_t = x_t + std * draw_noise(labels, image_shape, generator)
    return x_t


def inference_timesteps(num_timesteps: int, num_inference_steps: int) -> list[int]:
    """Spread steps evenly over the timesteps, falling, the first at T - 1, where noise is all.

    Raises:
        ValueError: `num_inference_steps` is not in 1 to `num_timesteps`.

    Source: Lin et al. 2024 (arXiv 2305.08891), "trailing".
    """
    require(
        1 <= num_inference_steps <= num_timesteps,
        "num_inference_steps",
        f"between 1 and {num_timesteps}",
        num_inference_steps,
    )
    steps = range(num_inference_steps, 0, -1)
    return [num_timesteps * step // num_inference_steps - 1 for step in steps]


def draw_noise(
    labels: Tensor, image_shape: tuple[int, int, int], generator: torch.Generator
) -> Tensor:
    """Draw standard normal noise, [N, C, H, W] float32, beside N labels."""
    return torch.randn(len(labels), *image_shape, device=labels.device, generator=generator)


def build_sampler(config: Config) -> Sampler:
    """Make the sampler of a configuration, with guidance where it asks for it.

    What the sampler returns are inference tensors, which cannot be trained on;
    `sample_batches` returns ordinary ones.

    Raises:
        ValueError: `diffusion.sampler` is unknown.
    """
    diffusion, data = config.diffusion, config.data
    schedule = build_schedule(config)
    draw: Callable[..., Tensor]
    if diffusion.sampler == "ddpm":
        draw = partial(ddpm_sample, variance=diffusion.variance)
    elif diffusion.sampler == "ddim":
        steps = diffusion.num_inference_steps or diffusion.num_timesteps
        draw = partial(ddim_sample, num_inference_steps=steps, eta=diffusion.eta)
    else:
        raise unknown_choice("sampler", diffusion.sampler)

    def sampler(model: Model, labels: Tensor, generator: torch.Generator) -> Tensor:
        if diffusion.guidance_scale != 1:
            model = GuidedModel(model, diffusion.guidance_scale, len(data.classes))
        return draw(
            model,
            labels,
            schedule=schedule,
            image_shape=(data.channels, data.image_size, data.image_size),
            prediction_type=diffusion.prediction_type,
            clip_x_start=diffusion.clip_x_start,
            generator=generator,
        )

    return sampler


def sample_batches(
    sampler: Sampler,
    model: nn.Module,
    labels: Tensor,
    *,
    batch_size: int,
    generator: torch.Generator,
) -> Tensor:
    """Draw an image for each label, some at a time, with the model in eval mode.

    Args:
        sampler: see `build_sampler`.
        model: its mode is restored afterwards.
        labels: [N] int64, on the model's device.
        batch_size: images that are drawn side by side, >= 1.
        generator: source of all noise, on the device of `labels`.

    Returns:
        [N, C, H, W] float32, about [-1, 1].

    Raises:
        ValueError: `batch_size` < 1.
    """
    require(batch_size >= 1, "batch_size", ">= 1", batch_size)
    training = model.training
    model.eval()
    try:
        parts = torch.split(labels, batch_size)
        return torch.cat([sampler(model, part, generator) for part in parts])
    finally:
        model.train(training)


def to_uint8(images: Tensor) -> Tensor:
    """Turn float images in [-1, 1] (clamped to it) into uint8 of the same shape, rounded.

    Raises:
        TypeError: `images` is not floating-point.
    """
    if not images.is_floating_point():
        raise TypeError(f"images must be floating-point in [-1, 1], got {images.dtype}")
    return ((images.float().clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)
