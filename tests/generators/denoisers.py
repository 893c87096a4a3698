"""Diffusion models of functions in the place of networks."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from task.config import load_config
from task.generators.diffusion.generator import Diffusion, Sampling
from task.generators.diffusion.noise_schedule import NoiseSchedule, build_schedule
from task.generators.diffusion.objective import DiffusionObjective

Denoise = Callable[[Tensor, Tensor, Tensor], Tensor]
LINEAR, COSINE, CONTINUOUS = (
    build_schedule(load_config([f"diffusion.schedule={name}"]))
    for name in ("linear", "cosine", "continuous")
)


class Denoiser(nn.Module):
    """A function as a network."""

    def __init__(self, function: Denoise) -> None:
        super().__init__()
        self.function = function

    def forward(self, x_t: Tensor, log_snr: Tensor, labels: Tensor) -> Tensor:
        return self.function(x_t, log_snr, labels)


def diffusion(
    function: Denoise,
    *,
    schedule: NoiseSchedule = LINEAR,
    prediction_type: str = "epsilon",
    image_shape: tuple[int, int, int] = (1, 16, 16),
    null_label: int | None = None,
    **sampling: Any,
) -> Diffusion:
    """Make a generator of a function, which draws with every step unless told otherwise."""
    objective = DiffusionObjective(
        schedule=schedule,
        prediction_type=prediction_type,
        loss_weighting="uniform",
        loss_reduction="mean",
        timestep_sampling="uniform",
    )
    chosen: dict[str, Any] = {
        **{"sampler": "ddim", "num_inference_steps": schedule.num_timesteps, "eta": 1.0},
        **{"variance": "posterior", "clip_x_start": False, "guidance_scale": 1.0},
    }
    return Diffusion(
        Denoiser(function),
        objective,
        Sampling(**(chosen | sampling)),
        image_shape=image_shape,
        null_label=null_label,
    )


def sample(
    function: Denoise, labels: Tensor, *, draw_noise: Callable[[], Tensor], **options: Any
) -> Tensor:
    """Draw with a function; options as of `diffusion`."""
    return diffusion(function, **options).sample(labels, draw_noise)


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)
