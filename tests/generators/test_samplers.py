"""Samplers against models whose best prediction is known in closed form."""

from collections.abc import Callable
from functools import partial
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor

from task.config import load_config
from task.generators.base import NoiseSource
from task.generators.diffusion.generator import build_diffusion
from task.generators.diffusion.noise_schedule import NoiseSchedule
from task.generators.diffusion.samplers import inference_timesteps
from tests.generators.denoisers import (
    CONTINUOUS,
    COSINE,
    LINEAR,
    Denoise,
    Denoiser,
    diffusion,
    sample,
    seeded,
)

SHAPE = (1, 4, 4)
PREDICTION_TYPES = ("epsilon", "v_prediction", "sample")


def noise(num: int, seed: int = 0) -> NoiseSource:
    return partial(torch.randn, num, *SHAPE, generator=seeded(seed))


def gaussian_model(mean: Tensor | float, std: float, prediction_type: str) -> Denoise:
    """Make the best possible model of images whose pixels are N(mean, std^2).

    With std = 0 it knows the images.
    """

    def model(x_t: Tensor, log_snr: Tensor, labels: Tensor) -> Tensor:
        alpha = log_snr.double().sigmoid().sqrt().view(-1, 1, 1, 1)
        sigma = (-log_snr.double()).sigmoid().sqrt().view(-1, 1, 1, 1)
        gain = alpha * std**2 / (alpha**2 * std**2 + sigma**2)
        x_0 = mean + gain * (x_t - alpha * mean)
        epsilon = (x_t - alpha * x_0) / sigma
        v = alpha * epsilon - sigma * x_0
        return {"epsilon": epsilon, "sample": x_0, "v_prediction": v}[prediction_type].float()

    return model


ddim, ddpm = partial(sample, sampler="ddim"), partial(sample, sampler="ddpm")
dpmpp_2m = partial(sample, sampler="dpmpp_2m")
LABELS = torch.zeros(512, dtype=torch.int64)


@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
@pytest.mark.parametrize("num_inference_steps", [1, 2, 7, 300])
@pytest.mark.parametrize("eta", [0.0, 1.0])
def test_ddim_finds_images_the_model_knows(
    prediction_type: str, num_inference_steps: int, eta: float
) -> None:
    images = torch.rand(5, *SHAPE, generator=seeded(1)) * 2 - 1
    actual = ddim(
        gaussian_model(images, 0, prediction_type),
        LABELS[:5],
        prediction_type=prediction_type,
        num_inference_steps=num_inference_steps,
        eta=eta,
        draw_noise=noise(5),
    )
    torch.testing.assert_close(actual, images, atol=1e-3, rtol=0)


@pytest.mark.parametrize("variance", ["beta", "posterior"])
def test_ddpm_finds_images_the_model_knows_without_noise_at_last_step(variance: str) -> None:
    images = torch.rand(5, *SHAPE, generator=seeded(1)) * 2 - 1
    model = gaussian_model(images, 0, "epsilon")
    actual = ddpm(model, LABELS[:5], variance=variance, draw_noise=noise(5))
    torch.testing.assert_close(actual, images, atol=1e-3, rtol=0)


@pytest.mark.parametrize("schedule", [LINEAR, COSINE, CONTINUOUS])
@pytest.mark.parametrize(
    "sample",
    [
        partial(ddpm, variance="beta"),
        partial(ddpm, variance="posterior"),
        partial(ddim, num_inference_steps=300, eta=1.0),
        partial(ddim, num_inference_steps=100, eta=0.0),
        partial(dpmpp_2m, num_inference_steps=20),
    ],
)
def test_samplers_draw_the_distribution_of_the_data(
    schedule: NoiseSchedule, sample: Callable[..., Tensor]
) -> None:
    images = sample(
        gaussian_model(0.3, 0.5, "epsilon"), LABELS, schedule=schedule, draw_noise=noise(512)
    )
    assert images.dtype == torch.float32
    assert images.shape == (512, *SHAPE)
    assert images.mean() == pytest.approx(0.3, abs=0.03)
    assert images.std() == pytest.approx(0.5, rel=0.05)


@pytest.mark.parametrize(
    ("sample", "order"), [(partial(ddim, eta=0.0), 1), (dpmpp_2m, 2)], ids=["ddim", "dpmpp_2m"]
)
@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
def test_error_against_the_exact_path_falls_with_the_order_of_the_sampler(
    sample: Callable[..., Tensor], order: int, prediction_type: str
) -> None:
    mean, std, start = 0.3, 0.5, noise(64)()
    even = NoiseSchedule(torch.linspace(8, -8, 960, dtype=torch.float64).sigmoid())
    errors = []
    for steps in (20, 40, 80):
        found = sample(
            gaussian_model(mean, std, prediction_type),
            LABELS[:64],
            schedule=even,
            prediction_type=prediction_type,
            num_inference_steps=steps,
            draw_noise=noise(64),
        )
        # On the exact path a Gaussian keeps its place among its own standard deviations; the
        # last step then returns the best prediction.
        first, last = even.alphas_cumprod[[-1, 960 // steps - 1]].tolist()
        place = (start - first**0.5 * mean) / (first * std**2 + 1 - first) ** 0.5
        exact = mean + place * last**0.5 * std**2 / (last * std**2 + 1 - last) ** 0.5
        errors.append((found - exact).abs().max().item())
    for coarse, fine in pairwise(errors):
        assert coarse / fine == pytest.approx(2**order, rel=0.25)


@pytest.mark.parametrize("clip_x_start", [False, True])
def test_dpmpp_2m_is_ddim_where_no_step_lies_between_the_first_and_the_last(
    clip_x_start: bool,
) -> None:
    model = gaussian_model(0.3, 1.5, "epsilon")
    for steps in (1, 2):
        draw = (
            partial(dpmpp_2m, num_inference_steps=steps),
            partial(ddim, num_inference_steps=steps, eta=0.0),
        )
        found, expected = (
            each(model, LABELS[:8], draw_noise=noise(8), clip_x_start=clip_x_start) for each in draw
        )
        torch.testing.assert_close(found, expected, atol=1e-4, rtol=0)


def test_dpmpp_2m_with_one_step_returns_what_the_model_sees_in_the_noise() -> None:
    known = torch.rand(5, *SHAPE, generator=seeded(1)) * 2 - 1

    def model(x_t: Tensor, log_snr: Tensor, labels: Tensor) -> Tensor:
        return known

    for steps in (1, 2, 7, 300):
        found = dpmpp_2m(
            model,
            LABELS[:5],
            prediction_type="sample",
            num_inference_steps=steps,
            draw_noise=noise(5),
        )
        torch.testing.assert_close(found, known, atol=1e-5, rtol=0)


@pytest.mark.parametrize("schedule", [LINEAR, COSINE, CONTINUOUS])
@pytest.mark.parametrize("clip_x_start", [False, True])
def test_ddim_with_all_steps_is_posterior_ddpm(schedule: NoiseSchedule, clip_x_start: bool) -> None:
    model = gaussian_model(0.3, 0.5, "v_prediction")
    changes: dict[str, Any] = {
        "schedule": schedule,
        "clip_x_start": clip_x_start,
        "prediction_type": "v_prediction",
    }
    ancestral = ddpm(model, LABELS[:8], variance="posterior", draw_noise=noise(8), **changes)
    implicit = ddim(
        model, LABELS[:8], num_inference_steps=300, eta=1.0, draw_noise=noise(8), **changes
    )
    torch.testing.assert_close(ancestral, implicit, atol=1e-4, rtol=0)


def test_clip_x_start_keeps_images_in_range() -> None:
    model = gaussian_model(0.0, 1.5, "epsilon")
    draw = partial(ddim, model, LABELS[:8], num_inference_steps=20, eta=1.0)
    assert draw(draw_noise=noise(8)).abs().max() > 1.5
    assert draw(draw_noise=noise(8), clip_x_start=True).abs().max() <= 1


def test_samplers_follow_generator_alone() -> None:
    model, state = gaussian_model(0.3, 0.5, "epsilon"), torch.get_rng_state()
    draw = partial(ddim, model, LABELS[:4], num_inference_steps=5, eta=1.0)
    assert torch.equal(draw(draw_noise=noise(4)), draw(draw_noise=noise(4)))
    assert not torch.equal(draw(draw_noise=noise(4)), draw(draw_noise=noise(4, seed=1)))
    assert torch.equal(torch.get_rng_state(), state)


def test_inference_timesteps_start_at_the_end_and_are_even() -> None:
    assert inference_timesteps(300, 300) == list(range(299, -1, -1))
    assert inference_timesteps(300, 3) == [299, 199, 99]
    assert inference_timesteps(300, 1) == [299]
    for steps in range(1, 301):
        timesteps = inference_timesteps(300, steps)
        gaps = {before - after for before, after in pairwise(timesteps)}
        assert timesteps[0] == 299 and len(timesteps) == steps
        assert timesteps[-1] >= 0 and max(gaps, default=0) - min(gaps, default=0) <= 1


@pytest.mark.parametrize("guidance_scale", [0.0, 1.0, 2.5])
def test_guidance_moves_away_from_no_class(guidance_scale: float) -> None:
    calls: list[int] = []

    def model(x_t: Tensor, log_snr: Tensor, labels: Tensor) -> Tensor:
        calls.append(len(x_t))
        return (x_t + labels.view(-1, 1, 1, 1) + log_snr.view(-1, 1, 1, 1)).bfloat16()

    labels = torch.tensor([4, 5, 6])
    guided = diffusion(model, null_label=10, guidance_scale=guidance_scale).predicting(labels)
    expected = (2 + 10 + guidance_scale * (labels - 10)).view(-1, 1, 1, 1)
    assert torch.equal(guided(torch.zeros(3, *SHAPE), 2.0), expected.expand(3, *SHAPE))
    assert calls == [3 if guidance_scale == 1 else 6]


@pytest.mark.parametrize("preset", ["paper", "released"])
def test_every_step_is_taken_by_default(preset: str) -> None:
    seen: list[Tensor] = []

    def model(x_t: Tensor, log_snr: Tensor, labels: Tensor) -> Tensor:
        seen.append(log_snr)
        assert torch.is_inference_mode_enabled()
        return torch.zeros_like(x_t).bfloat16()

    generator = build_diffusion(
        load_config(["model.width=8", f"diffusion={preset}", "diffusion.num_inference_steps=null"])
    )
    generator.network = Denoiser(model)
    images = generator.sample(LABELS[:1], lambda: torch.zeros(1, 1, 16, 16))
    assert images.dtype == torch.float32
    assert len(seen) == 300 == generator.evaluations_per_image
    assert all(before < after for before, after in pairwise(seen))


@pytest.mark.parametrize("scale", [1.0, 2.0])
@pytest.mark.parametrize("sampler", ["ddpm", "ddim", "dpmpp_2m"])
def test_progress_of_drawing_ends_at_the_number_that_is_expected(
    sampler: str, scale: float
) -> None:
    generator = diffusion(
        lambda x_t, *_: x_t * 0.5,
        sampler=sampler,
        num_inference_steps=4,
        guidance_scale=scale,
        null_label=10,
    )
    told: list[int] = []
    generator.sample(LABELS[:7], lambda: torch.zeros(7, *SHAPE), advance=told.append)
    assert sum(told) == 7 * generator.evaluations_per_image
    assert len(told) == (300 if sampler == "ddpm" else 4)


def test_samplers_reject_what_they_cannot_do() -> None:
    model = gaussian_model(0.3, 0.5, "epsilon")
    for steps in (0, 301):
        with pytest.raises(ValueError, match=f"num_inference_steps must be .* got {steps}"):
            diffusion(model, num_inference_steps=steps)
    with pytest.raises(ValueError, match=r"eta must be in \[0, 1\], got 1.5"):
        diffusion(model, eta=1.5)
    with pytest.raises(ValueError, match=r"num_inference_steps must be .* got 301"):
        diffusion(model, sampler="dpmpp_2m", num_inference_steps=301)
    with pytest.raises(ValueError, match="variance must be one of beta, posterior, got 'learned'"):
        diffusion(model, sampler="ddpm", variance="learned")
    with pytest.raises(ValueError, match="sampler must be one of ddpm, ddim, dpmpp_2m, got 'heun'"):
        diffusion(model, sampler="heun")
    with pytest.raises(ValueError, match="guidance_scale must be 1 for a network without a null"):
        diffusion(model, guidance_scale=2.0)
