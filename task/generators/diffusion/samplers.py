"""The steps of the samplers in plain numbers, and how they lead from noise to images.

The numbers are Python's own, and the arrays of torch or of NumPy. It imports nothing of feddm,
because `feddm export` ships this file beside the weights.
"""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

# Of torch or of NumPy, [N, C, H, W] float32.
Array = Any
# predict(x_t, log-SNR) -> what the prediction type says, for labels of the caller
Predict = Callable[[Array, float], Array]


@dataclass(frozen=True, kw_only=True)
class Step:
    """One step of a sampler: the next images are a sum of what it knows, with these weights.

    Attributes:
        alpha_cumprod: in (0, 1), the share of the image's variance in x_t.
        x_t: weight of the noisy images themselves.
        x_start: weight of the clean images that the model sees in them.
        previous: weight of the clean images that it saw a step before; 0 in the first step.
        noise: weight of fresh noise; 0: none is drawn.
    """

    alpha_cumprod: float
    x_t: float
    x_start: float
    previous: float = 0.0
    noise: float = 0.0

    @property
    def log_snr(self) -> float:
        """log(alpha_cumprod / (1 - alpha_cumprod)), what the model is told of the noise."""
        return 2 * half_log_snr(self.alpha_cumprod)


def half_log_snr(alpha_cumprod: float) -> float:
    """Return log(alpha / sigma) of an alpha_cumprod in (0, 1), the lambda of the literature."""
    return (math.log(alpha_cumprod) - math.log1p(-alpha_cumprod)) / 2


def sampling_steps(
    alphas_cumprod: Sequence[float],
    *,
    sampler: str,
    num_inference_steps: int,
    eta: float,
    variance: str,
) -> list[Step]:
    """List the steps of a sampler over a schedule.

    Args:
        alphas_cumprod: of each of the T timesteps, in (0, 1), falling.
        sampler: "ddpm", which takes every timestep, "ddim" or "dpmpp_2m".
        num_inference_steps: of "ddim" and "dpmpp_2m", 1 to T.
        eta: of "ddim".
        variance: of "ddpm".

    Raises:
        ValueError: a word is unknown, or a number out of range.
    """
    if sampler == "ddpm":
        return ddpm_steps(alphas_cumprod, variance)
    if sampler == "ddim":
        return ddim_steps(alphas_cumprod, num_inference_steps, eta=eta)
    if sampler == "dpmpp_2m":
        return dpmpp_2m_steps(alphas_cumprod, num_inference_steps)
    raise ValueError(f"sampler must be one of ddpm, ddim, dpmpp_2m, got {sampler!r}")


def ddpm_steps(alphas_cumprod: Sequence[float], variance: str) -> list[Step]:
    """List the steps of ancestral sampling, one per timestep.

    Args:
        alphas_cumprod: see `sampling_steps`.
        variance: of the noise of a step: "beta" or "posterior". The last step adds none.

    Raises:
        ValueError: `variance` is unknown.

    Source: Ho et al. 2020, equations 6 and 7.
    """
    if variance not in ("beta", "posterior"):
        raise ValueError(f"variance must be one of beta, posterior, got {variance!r}")
    steps = []
    for here, after in pairwise([*reversed(alphas_cumprod), 1.0]):
        beta = 1 - here / after
        posterior = (1 - after) / (1 - here) * beta
        steps.append(
            Step(
                alpha_cumprod=here,
                x_t=math.sqrt(1 - beta) * (1 - after) / (1 - here),
                x_start=math.sqrt(after) * beta / (1 - here),
                noise=math.sqrt(beta if variance == "beta" and after < 1 else posterior),
            )
        )
    return steps


def ddim_steps(
    alphas_cumprod: Sequence[float], num_inference_steps: int, *, eta: float
) -> list[Step]:
    """List the steps of DDIM; the last one returns the clean images that the model sees.

    Args:
        alphas_cumprod: see `sampling_steps`.
        num_inference_steps: 1 to T, see `inference_timesteps`.
        eta: in [0, 1], share of fresh noise in a step; 0: all noise is in the start.

    Raises:
        ValueError: a number is out of range.

    Source: Song et al. 2021 (DDIM), equations 12 and 16.
    """
    if not 0 <= eta <= 1:
        raise ValueError(f"eta must be in [0, 1], got {eta!r}")
    steps = []
    for here, after in pairwise(_path(alphas_cumprod, num_inference_steps)):
        std = eta * math.sqrt((1 - after) / (1 - here) * (1 - here / after))
        kept = math.sqrt((1 - after - std**2) / (1 - here))
        x_start = math.sqrt(after) - kept * math.sqrt(here)
        steps.append(Step(alpha_cumprod=here, x_t=kept, x_start=x_start, noise=std))
    return steps


def dpmpp_2m_steps(alphas_cumprod: Sequence[float], num_inference_steps: int) -> list[Step]:
    """List the steps of DPM-Solver++(2M): the path of DDIM with `eta` = 0, to second order.

    Args:
        alphas_cumprod: see `sampling_steps`.
        num_inference_steps: 1 to T, see `inference_timesteps`.

    Raises:
        ValueError: `num_inference_steps` is out of range.

    Source: Lu et al. 2022 (arXiv 2211.01095), Algorithm 2.
    """
    # Evenly in time: 20 steps that were even in log-SNR drew worse digits.
    path = _path(alphas_cumprod, num_inference_steps)
    widths = [half_log_snr(b) - half_log_snr(a) for a, b in pairwise(path[:-1])]
    steps = []
    for number, (here, after) in enumerate(pairwise(path)):
        kept = math.sqrt((1 - after) / (1 - here))
        ahead = math.sqrt(after) - kept * math.sqrt(here)
        # Nothing lies before the first step, and the last one is endless in log-SNR.
        inner = 0 < number < len(widths)
        beyond = ahead * widths[number] / (2 * widths[number - 1]) if inner else 0.0
        steps.append(Step(alpha_cumprod=here, x_t=kept, x_start=ahead + beyond, previous=-beyond))
    return steps


def _path(alphas_cumprod: Sequence[float], num_inference_steps: int) -> list[float]:
    timesteps = inference_timesteps(len(alphas_cumprod), num_inference_steps)
    return [*(alphas_cumprod[timestep] for timestep in timesteps), 1.0]


def inference_timesteps(num_timesteps: int, num_inference_steps: int) -> list[int]:
    """Spread steps evenly over the timesteps, falling, the first at T - 1, where noise is all.

    Raises:
        ValueError: `num_inference_steps` is not in 1 to `num_timesteps`.

    Source: Lin et al. 2024 (arXiv 2305.08891), "trailing".
    """
    if not 1 <= num_inference_steps <= num_timesteps:
        raise ValueError(
            f"num_inference_steps must be between 1 and {num_timesteps}, "
            f"got {num_inference_steps!r}"
        )
    steps = range(num_inference_steps, 0, -1)
    return [num_timesteps * step // num_inference_steps - 1 for step in steps]


def sample_along(
    steps: Iterable[Step],
    predict: Predict,
    *,
    draw_noise: Callable[[], Array],
    prediction_type: str,
    clip_x_start: bool,
) -> Array:
    """Draw images: start from noise, and take every step.

    Args:
        steps: of a sampler.
        predict: the model, for the labels of the images.
        draw_noise: returns standard normal noise, [N, C, H, W] float32, new at every call.
        prediction_type: what the model returns, see `predict_x_start`.
        clip_x_start: whether to clamp each prediction of the clean images to [-1, 1].

    Returns:
        [N, C, H, W] float32, about [-1, 1].

    Raises:
        ValueError: `prediction_type` is unknown.
    """
    x_t = previous = draw_noise()
    for step in steps:
        x_start = denoise(
            step, x_t, predict, prediction_type=prediction_type, clip_x_start=clip_x_start
        )
        x_t = take_step(step, x_t, x_start, previous, draw_noise)
        previous = x_start
    return x_t


def denoise(
    step: Step, x_t: Array, predict: Predict, *, prediction_type: str, clip_x_start: bool
) -> Array:
    """Return the clean images that the model sees in noisy ones; see `sample_along`."""
    output = predict(x_t, step.log_snr)
    x_start = predict_x_start(output, x_t, step.alpha_cumprod, prediction_type)
    return x_start.clip(-1, 1) if clip_x_start else x_start


def take_step(
    step: Step, x_t: Array, x_start: Array, previous: Array, draw_noise: Callable[[], Array]
) -> Array:
    """Take a step from noisy images `x_t`, in which the model sees `x_start`."""
    x_t = step.x_t * x_t + step.x_start * x_start
    if step.previous:
        x_t = x_t + step.previous * previous
    return x_t + step.noise * draw_noise() if step.noise else x_t


def predict_x_start(output: Array, x_t: Array, alpha_cumprod: float, prediction_type: str) -> Array:
    """Turn a model's output into its prediction of the clean images.

    Args:
        output: [N, C, H, W] float32, what the model returned for `x_t`.
        x_t: [N, C, H, W] float32.
        alpha_cumprod: in (0, 1), the same for all images.
        prediction_type: "epsilon", the noise; "sample", the clean images; "v_prediction",
            alpha * noise - sigma * clean images (Salimans & Ho 2022).

    Raises:
        ValueError: `prediction_type` is unknown.
    """
    alpha, sigma = math.sqrt(alpha_cumprod), math.sqrt(1 - alpha_cumprod)
    if prediction_type == "epsilon":
        return (x_t - sigma * output) / alpha
    if prediction_type == "sample":
        return output
    if prediction_type == "v_prediction":
        return alpha * x_t - sigma * output
    raise ValueError(
        f"prediction_type must be one of epsilon, v_prediction, sample, got {prediction_type!r}"
    )


def guide(conditional: Array, unconditional: Array, guidance_scale: float) -> Array:
    """Exaggerate a prediction away from "no class", towards its label.

    Args:
        conditional: what the model predicts for the labels.
        unconditional: what it predicts for "no class".
        guidance_scale: >= 0; 0 ignores the labels, 1 is no guidance, more exaggerates.

    Source: Ho & Salimans 2022, equation 6, whose w is `guidance_scale` - 1.
    """
    return unconditional + guidance_scale * (conditional - unconditional)


def draw_by_settings(
    settings: Mapping[str, Any],
    predict: Callable[[Array, float, Array], Array],
    labels: Array,
    *,
    draw_noise: Callable[[], Array],
    **sampling: Any,
) -> Array:
    """Draw an image of each label, as the config.json of an export says.

    Args:
        settings: with "alphas_cumprod", "prediction_type", "null_label" and "sampling".
        predict: the model, of x_t, their log-SNR and labels.
        labels: [N] int64.
        draw_noise: see `sample_along`.
        **sampling: what to change of `settings["sampling"]`: sampler, num_inference_steps, eta,
            variance, clip_x_start, guidance_scale.

    Returns:
        [N, C, H, W] float32, about [-1, 1].

    Raises:
        ValueError: a word is unknown or a number out of range, or guidance is asked of a model
            without a null label.
    """
    chosen = {**settings["sampling"], **sampling}
    clip_x_start, scale = chosen.pop("clip_x_start"), chosen.pop("guidance_scale")
    null_label = settings["null_label"]
    if scale != 1 and null_label is None:
        raise ValueError(
            f"guidance_scale must be 1 for a model without a null label, got {scale!r}"
        )

    def guided(x_t: Array, log_snr: float) -> Array:
        output = predict(x_t, log_snr, labels)
        if scale == 1:
            return output
        return guide(output, predict(x_t, log_snr, labels * 0 + null_label), scale)

    return sample_along(
        sampling_steps(settings["alphas_cumprod"], **chosen),
        guided,
        draw_noise=draw_noise,
        prediction_type=settings["prediction_type"],
        clip_x_start=clip_x_start,
    )
