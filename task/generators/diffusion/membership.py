"""What a denoiser shows of whether it was trained on an image.

Every attack is placed by log-SNR, log(alpha^2 / sigma^2), and not by a timestep, so that all
schedules are attacked alike; where a paper names timesteps of Ho et al.'s schedule, the log-SNR is
that of those. Scores are larger for images that look more like ones that were trained on.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor

from task.generators.diffusion.samplers import predict_x_start

# From nearly clean images to nearly noise.
LOSS_LEVELS = (4.0, 2.0, 0.0, -2.0)
LOSS_DRAWS = 4
# Timestep 100 of 1,000.
EARLY = 2.1
# Timestep 200 of 1,000.
LATER = 0.65
# As clean as the network is asked about.
CLEANEST = 8.0
# Steps from there to `EARLY`, of which SecMI takes one more and one back.
INVERSION_STEPS = 10

# predict(x_t, log_snr, labels): the noise that the network sees in x_t, [N, C, H, W] float32.
PredictNoise = Callable[[Tensor, float, Tensor], Tensor]


def alpha_sigma(log_snr: float) -> tuple[float, float]:
    """Return what images and noise are multiplied by at a log-SNR."""
    signal = 1 / (1 + math.exp(-log_snr))
    return math.sqrt(signal), math.sqrt(1 - signal)


def noise_predictor(
    network: Callable[[Tensor, Tensor, Tensor], Tensor], prediction_type: str
) -> PredictNoise:
    """Make a denoiser of any prediction type say which noise it sees."""

    def predict(x_t: Tensor, log_snr: float, labels: Tensor) -> Tensor:
        log_snrs = x_t.new_full((len(x_t),), log_snr)
        output = network(x_t, log_snrs, labels).to(x_t.dtype)
        if prediction_type == "epsilon":
            return output
        alpha, sigma = alpha_sigma(log_snr)
        x_start = predict_x_start(output, x_t, alpha**2, prediction_type)
        noise: Tensor = (x_t - alpha * x_start) / sigma
        return noise

    return predict


def losses_at(
    predict: PredictNoise, images: Tensor, labels: Tensor, log_snr: float, rng: torch.Generator
) -> Tensor:
    """Return the mean squared error of the noise over some draws, [N]: the loss of training."""
    alpha, sigma = alpha_sigma(log_snr)
    total = images.new_zeros(len(images))
    for _ in range(LOSS_DRAWS):
        # The same for all images, so that they differ in themselves alone.
        noise = torch.randn(images.shape[1:], generator=rng, device=rng.device).expand_as(images)
        found = predict(alpha * images + sigma * noise, log_snr, labels)
        total += (found - noise).square().flatten(1).mean(1)
    return total / LOSS_DRAWS


def sima(predict: PredictNoise, images: Tensor, labels: Tensor) -> Tensor:
    """Return the size of the noise that is seen in the clean images, [N], from one query.

    Source: SimA, arXiv 2509.25003.
    """
    norms: Tensor = torch.linalg.vector_norm(predict(images, EARLY, labels).flatten(1), dim=1)
    return norms


def pia(predict: PredictNoise, images: Tensor, labels: Tensor) -> Tensor:
    """Return how the noise seen in clean images differs from that seen once it is added, [N].

    Source: Kong et al. 2023, arXiv 2305.18355, equation 13 (the 4-norm).
    """
    noise = predict(images, CLEANEST, labels)
    alpha, sigma = alpha_sigma(LATER)
    again = predict(alpha * images + sigma * noise, LATER, labels)
    norms: Tensor = torch.linalg.vector_norm((again - noise).flatten(1), ord=4, dim=1)
    return norms


def secmi(predict: PredictNoise, images: Tensor, labels: Tensor) -> Tensor:
    """Return the error of a deterministic step on and back from noised images, [N].

    Source: Duan et al. 2023, arXiv 2302.01316, equation 10.
    """
    step = (CLEANEST - EARLY) / INVERSION_STEPS
    x_t, log_snr = images, CLEANEST
    for _ in range(INVERSION_STEPS):
        x_t, log_snr = _moved(predict, x_t, log_snr, log_snr - step, labels), log_snr - step
    on = _moved(predict, x_t, log_snr, log_snr - step, labels)
    back = _moved(predict, on, log_snr - step, log_snr, labels)
    return (back - x_t).square().flatten(1).mean(1)


def _moved(predict: PredictNoise, x_t: Tensor, log_snr: float, to: float, labels: Tensor) -> Tensor:
    """Take images from a log-SNR to another along the path of DDIM, which adds no noise."""
    noise = predict(x_t, log_snr, labels)
    alpha, sigma = alpha_sigma(log_snr)
    next_alpha, next_sigma = alpha_sigma(to)
    return next_alpha * (x_t - sigma * noise) / alpha + next_sigma * noise


def member_scores(
    predict: PredictNoise,
    images: Tensor,
    labels: Tensor,
    rng: torch.Generator,
    *,
    null_label: int | None = None,
) -> dict[str, Tensor]:
    """Attack images in every way of this module.

    Args:
        predict: of the network that is given away.
        images: [N, C, H, W] float32 in [-1, 1].
        labels: [N] int64.
        rng: of the noise; its state decides it, so that members and others get the same.
        null_label: "no class", where the network knows it.

    Returns:
        By attack [N] float32, larger for members.
    """
    levels = [losses_at(predict, images, labels, level, rng) for level in LOSS_LEVELS]
    found = {
        f"loss at log-SNR {level:g}": -losses
        for level, losses in zip(LOSS_LEVELS, levels, strict=True)
    }
    found["SimA"] = -sima(predict, images, labels)
    found["PIA"] = -pia(predict, images, labels)
    found["SecMI"] = -secmi(predict, images, labels)
    if null_label is not None:
        state = rng.get_state()
        own = losses_at(predict, images, labels, LATER, rng)
        rng.set_state(state)
        without = losses_at(predict, images, torch.full_like(labels, null_label), LATER, rng)
        found["loss without class less loss"] = without - own
    return found
