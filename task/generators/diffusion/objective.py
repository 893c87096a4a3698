"""The forward process, what a model may predict about it, and the losses.

A model is any callable `model(x_t, log_snr, labels)`: x_t [N, C, H, W] float in about [-1, 1],
log_snr [N] float32, labels [N] int64; it returns [N, C, H, W]. What it returns is said by
the prediction type, with x_t = alpha * x_start + sigma * noise, alpha^2 = alphas_cumprod and
sigma^2 = 1 - alphas_cumprod: "epsilon" is the noise, "sample" is x_start, "v_prediction" is
alpha * noise - sigma * x_start (Salimans & Ho 2022).
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from task.checks import require, require_one_of
from task.config import choices
from task.generators.diffusion.noise_schedule import (
    NoiseSchedule,
    log_snr,
    sample_times,
)

Denoiser = Callable[[Tensor, Tensor, Tensor], Tensor]


def scales(alphas_cumprod: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Return alpha and sigma, [N, 1, 1, 1] of `dtype`, of alphas_cumprod, [N] float64."""
    alphas_cumprod = alphas_cumprod.double()[:, None, None, None]
    return alphas_cumprod.sqrt().to(dtype), (1 - alphas_cumprod).sqrt().to(dtype)


def q_sample(x_start: Tensor, noise: Tensor, alphas_cumprod: Tensor) -> Tensor:
    """Noise images: alpha * x_start + sigma * noise.

    Args:
        x_start: [N, C, H, W] float32 in [-1, 1].
        noise: [N, C, H, W] float32, standard normal.
        alphas_cumprod: [N] float64 in (0, 1).

    Source: Ho et al. 2020, equation 4.
    """
    alpha, sigma = scales(alphas_cumprod, x_start.dtype)
    return alpha * x_start + sigma * noise


def training_target(
    x_start: Tensor, noise: Tensor, alphas_cumprod: Tensor, prediction_type: str
) -> Tensor:
    """Return what a model of the prediction type should return; shapes as in `q_sample`.

    Raises:
        ValueError: `prediction_type` is unknown.
    """
    if prediction_type == "epsilon":
        return noise
    if prediction_type == "sample":
        return x_start
    if prediction_type == "v_prediction":
        alpha, sigma = scales(alphas_cumprod, x_start.dtype)
        return alpha * noise - sigma * x_start
    raise unknown_choice("prediction_type", prediction_type)


def loss_weights(alphas_cumprod: Tensor, prediction_type: str, loss_weighting: str) -> Tensor:
    """Return what the squared error of each image is multiplied by, [N] float64.

    Args:
        alphas_cumprod: [N] float64 in (0, 1).
        prediction_type: whose error it is.
        loss_weighting: "uniform", 1; "epsilon", the weight that makes it the squared error of
            the noise that the output implies, whatever the prediction type.

    Raises:
        ValueError: `prediction_type` or `loss_weighting` is unknown.
    """
    alphas_cumprod = alphas_cumprod.double()
    if loss_weighting == "uniform":
        return torch.ones_like(alphas_cumprod)
    if loss_weighting != "epsilon":
        raise unknown_choice("loss_weighting", loss_weighting)
    if prediction_type == "epsilon":
        return torch.ones_like(alphas_cumprod)
    if prediction_type == "sample":
        return alphas_cumprod / (1 - alphas_cumprod)
    if prediction_type == "v_prediction":
        return alphas_cumprod
    raise unknown_choice("prediction_type", prediction_type)


def diffusion_losses(
    model: Denoiser,
    x_start: Tensor,
    labels: Tensor,
    *,
    alphas_cumprod: Tensor,
    noise: Tensor,
    prediction_type: str,
    loss_weighting: str,
    loss_reduction: str,
) -> Tensor:
    """Return the weighted squared error of the model's prediction for each image.

    Args:
        model: see the module.
        x_start: [N, C, H, W] float32 in [-1, 1].
        labels: [N] int64.
        alphas_cumprod: [N] float64 in (0, 1).
        noise: [N, C, H, W] float32, standard normal.
        prediction_type: "epsilon", "v_prediction" or "sample".
        loss_weighting: see `loss_weights`.
        loss_reduction: "sum" or "mean", over the pixels of an image.

    Returns:
        [N] of the type of `x_start`, also where the model runs under autocast.

    Raises:
        TypeError: `x_start` is not floating-point.
        ValueError: a word is unknown.

    Source: the paper, Algorithm 1 (epsilon, sum); the released code (v_prediction, epsilon
    weighting, mean), which is the same but for the number of pixels.
    """
    if not x_start.is_floating_point():
        raise TypeError(f"x_start must be floating-point in [-1, 1], got {x_start.dtype}")
    require_one_of("loss_reduction", loss_reduction, choices("diffusion.loss_reduction"))
    target = training_target(x_start, noise, alphas_cumprod, prediction_type)
    weights = loss_weights(alphas_cumprod, prediction_type, loss_weighting).to(x_start.dtype)
    x_t = q_sample(x_start, noise, alphas_cumprod)
    output = model(x_t, log_snr(alphas_cumprod).float(), labels)
    errors = (output.to(x_start.dtype) - target).square().flatten(1)
    per_image = errors.sum(1) if loss_reduction == "sum" else errors.mean(1)
    return weights * per_image


@dataclass(frozen=True)
class DiffusionObjective:
    """The loss of a batch at random times, with random noise.

    Attributes:
        schedule: what is left of an image at a time.
        prediction_type: what the model returns.
        loss_weighting: see `loss_weights`.
        loss_reduction: "sum" or "mean", over the pixels of an image.
        timestep_sampling: see `sample_times`.
        label_dropout: probability in [0, 1) of hiding an image's label; 0: off.
        null_label: what hides a label; None only where `label_dropout` is 0.
    """

    schedule: NoiseSchedule
    prediction_type: str
    loss_weighting: str
    loss_reduction: str
    timestep_sampling: str
    label_dropout: float = 0.0
    null_label: int | None = None

    def __post_init__(self) -> None:
        """Check that there is a label to drop to.

        Raises:
            ValueError: `label_dropout` > 0 without a `null_label`.
        """
        require(
            self.label_dropout == 0 or self.null_label is not None,
            "null_label",
            f"a label with label_dropout={self.label_dropout}",
            self.null_label,
        )

    def draw(
        self, x_start: Tensor, labels: Tensor, generator: torch.Generator
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Draw times and noise, and which labels are hidden.

        Args:
            x_start: [N, C, H, W] float32 in [-1, 1].
            labels: [N] int64.
            generator: the one source of every draw, on the device of `x_start`.

        Returns:
            alphas_cumprod, [N] float64; noise, [N, C, H, W]; labels, [N] int64.
        """
        times = sample_times(len(x_start), self.timestep_sampling, generator)
        # Not randn_like: the numbers should not depend on the memory format of x_start.
        noise = torch.randn(
            x_start.shape, dtype=x_start.dtype, device=x_start.device, generator=generator
        )
        if self.null_label is not None and self.label_dropout > 0:
            draws = torch.rand(len(labels), device=labels.device, generator=generator)
            labels = labels.masked_fill(draws < self.label_dropout, self.null_label)
        return self.schedule.alphas_cumprod_at(times), noise, labels

    def losses(
        self,
        model: Denoiser,
        x_start: Tensor,
        alphas_cumprod: Tensor,
        noise: Tensor,
        labels: Tensor,
    ) -> Tensor:
        """Return the losses of images at what was drawn for them; see `diffusion_losses`."""
        return diffusion_losses(
            model,
            x_start,
            labels,
            alphas_cumprod=alphas_cumprod,
            noise=noise,
            prediction_type=self.prediction_type,
            loss_weighting=self.loss_weighting,
            loss_reduction=self.loss_reduction,
        )


def unknown_choice(name: str, value: str) -> ValueError:
    """Make the error that ends a chain of options."""
    return ValueError(
        f"{name} must be one of {', '.join(choices(f'diffusion.{name}'))}, got {value!r}"
    )
