"""Samplers against models whose best prediction is known in closed form."""

import math
from collections.abc import Callable
from functools import partial
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from task.config import load_config
from task.generators.diffusion.noise_schedule import NoiseSchedule, build_schedule
from task.generators.diffusion.objective import Model
from task.generators.diffusion.sampler import (
    GuidedModel,
    NoiseSource,
    Sampler,
    block_noise,
    build_sampler,
    ddim_sample,
    ddpm_sample,
    dpmpp_2m_sample,
    evaluations_per_image,
    sample_batches,
    to_uint8,
)
from task.generators.diffusion.samplers import inference_timesteps
from task.generators.noise import NOISE_BLOCK

SHAPE = (1, 4, 4)
PREDICTION_TYPES = ("epsilon", "v_prediction", "sample")
LINEAR, COSINE, CONTINUOUS = (
    build_schedule(load_config([f"diffusion.schedule={name}"]))
    for name in ("linear", "cosine", "continuous")
)


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def noise(num: int, seed: int = 0) -> NoiseSource:
    return partial(torch.randn, num, *SHAPE, generator=seeded(seed))


def gaussian_model(mean: Tensor | float, std: float, prediction_type: str) -> Model:
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


ddim = partial(ddim_sample, schedule=LINEAR, prediction_type="epsilon", clip_x_start=False)
ddpm = partial(ddpm_sample, schedule=LINEAR, prediction_type="epsilon", clip_x_start=False)
dpmpp_2m = partial(dpmpp_2m_sample, schedule=LINEAR, prediction_type="epsilon", clip_x_start=False)
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
def test_guided_model_moves_away_from_no_class(guidance_scale: float) -> None:
    calls: list[int] = []

    def model(x_t: Tensor, log_snr: Tensor, labels: Tensor) -> Tensor:
        calls.append(len(x_t))
        return (x_t + labels.view(-1, 1, 1, 1) + log_snr.view(-1, 1, 1, 1)).bfloat16()

    x_t, log_snr, labels = torch.zeros(3, *SHAPE), torch.arange(3.0), torch.tensor([4, 5, 6])
    guided = GuidedModel(model, guidance_scale, null_label=10)(x_t, log_snr, labels)
    expected = (log_snr + 10 + guidance_scale * (labels - 10)).view(-1, 1, 1, 1)
    assert torch.equal(guided, expected.expand_as(x_t))
    assert calls == [6]


@pytest.mark.parametrize(("guidance_scale", "size"), [(1.0, 2), (3.0, 4)])
def test_build_sampler_guides_only_where_asked(guidance_scale: float, size: int) -> None:
    sizes: list[int] = []

    def model(x_t: Tensor, log_snr: Tensor, labels: Tensor) -> Tensor:
        sizes.append(len(x_t))
        return torch.zeros_like(x_t)

    sampler = build_sampler(
        load_config(
            [
                "diffusion.label_dropout=0.1",
                f"diffusion.guidance_scale={guidance_scale}",
                "diffusion.num_inference_steps=3",
            ]
        )
    )
    assert sampler(model, LABELS[:2], lambda: torch.zeros(2, 1, 16, 16)).shape == (2, 1, 16, 16)
    assert sizes == [size] * 3


@pytest.mark.parametrize("preset", ["paper", "released"])
def test_build_sampler_takes_every_step_by_default(preset: str) -> None:
    seen: list[Tensor] = []

    def model(x_t: Tensor, log_snr: Tensor, labels: Tensor) -> Tensor:
        seen.append(log_snr)
        assert torch.is_inference_mode_enabled()
        return torch.zeros_like(x_t).bfloat16()

    config = load_config([f"diffusion={preset}", "diffusion.num_inference_steps=null"])
    images = build_sampler(config)(model, LABELS[:1], lambda: torch.zeros(1, 1, 16, 16))
    assert images.dtype == torch.float32
    assert len(seen) == 300
    assert all(before < after for before, after in pairwise(seen))


class Counted(nn.Module):
    def forward(self, x_t: Tensor, log_snr: Tensor, labels: Tensor) -> Tensor:
        assert not self.training
        return x_t * 0.5


def batches(sampler: Sampler, model: nn.Module, labels: Tensor, batch_size: int | None) -> Tensor:
    return sample_batches(
        sampler,
        model,
        labels,
        image_shape=(1, 16, 16),
        batch_size=batch_size,
        block_generator=seeded,
    )


@pytest.mark.parametrize("training", [True, False])
def test_sample_batches_covers_all_labels_and_restores_mode(training: bool) -> None:
    def sampler(model: Model, labels: Tensor, draw_noise: NoiseSource) -> Tensor:
        assert len(labels) <= 3
        assert draw_noise().shape == (len(labels), 1, 16, 16)
        return model(torch.zeros(len(labels), 1, 1, 1), labels, labels) + labels.view(-1, 1, 1, 1)

    model = Counted().train(training)
    images = batches(sampler, model, torch.arange(7), 3)
    assert images.flatten().tolist() == list(range(7))
    assert model.training is training


def test_sample_batches_restores_mode_after_failure_and_gives_trainable_tensors() -> None:
    model = Counted().train()
    sampler = build_sampler(load_config(["diffusion.num_inference_steps=1"]))
    assert not batches(sampler, model, LABELS[:2], 4).is_inference()

    def failing(*_: object) -> Tensor:
        raise RuntimeError("lost")

    with pytest.raises(RuntimeError, match="lost"):
        batches(failing, model, LABELS[:2], 4)
    assert model.training


@pytest.mark.parametrize("scale", [1, 2])
@pytest.mark.parametrize("steps", ["ddpm", "ddim", "dpmpp_2m"])
def test_progress_of_drawing_ends_at_the_number_that_is_expected(steps: str, scale: int) -> None:
    words = [f"diffusion.sampler={steps}", "diffusion.num_timesteps=6"]
    words += [f"diffusion.num_inference_steps={'null' if steps == 'ddpm' else 4}"]
    words += [f"diffusion.guidance_scale={scale}"]
    words += [] if scale == 1 else ["diffusion.label_dropout=0.1"]
    config = load_config(words)
    told: list[int] = []
    sample_batches(
        build_sampler(config),
        Counted(),
        LABELS[:7],
        image_shape=(1, 16, 16),
        batch_size=3,
        block_generator=seeded,
        advance=told.append,
    )
    assert sum(told) == 7 * evaluations_per_image(config)
    assert len(told) == 3 * evaluations_per_image(config) / scale


@pytest.mark.parametrize("name", ["ddpm", "ddim", "dpmpp_2m"])
def test_images_depend_on_their_place_and_not_on_the_batch_size(name: str) -> None:
    steps = "null" if name == "ddpm" else "4"
    sampler = build_sampler(
        load_config([f"diffusion.sampler={name}", f"diffusion.num_inference_steps={steps}"])
    )
    labels = torch.arange(4 * NOISE_BLOCK + 7) % 10
    whole = batches(sampler, Counted(), labels, len(labels))
    for batch_size in (NOISE_BLOCK, 3 * NOISE_BLOCK, NOISE_BLOCK - 13, None):
        found = batches(sampler, Counted(), labels, batch_size)
        torch.testing.assert_close(found, whole, atol=1e-5, rtol=1e-5)
    # More labels behind them change nothing, which lets a longer list go on where one stopped.
    for part in (1, NOISE_BLOCK, 2 * NOISE_BLOCK + 3):
        found = batches(sampler, Counted(), labels[:part], None)
        torch.testing.assert_close(found, whole[:part], atol=1e-5, rtol=1e-5)
    assert len(whole.flatten(1).unique(dim=0)) == len(labels)


def test_block_noise_is_standard_normal_and_new_at_every_call() -> None:
    draw_noise = block_noise(range(20, 220), (3, 8, 8), seeded)
    first, second = draw_noise(), draw_noise()
    assert first.shape == (200, 3, 8, 8)
    for drawn in (first, second):
        assert drawn.mean() == pytest.approx(0, abs=0.03)
        assert drawn.std() == pytest.approx(1, abs=0.03)
    assert (first * second).mean() == pytest.approx(0, abs=0.03)
    of_block_1 = torch.randn(NOISE_BLOCK, 3, 8, 8, generator=seeded(1))
    assert torch.equal(first[NOISE_BLOCK - 20 : 2 * NOISE_BLOCK - 20], of_block_1)


def test_to_uint8_rounds_and_clamps() -> None:
    images = torch.tensor([-2.0, -1.0, -1 + 0.9 / 255, 0.0, 1 - 1.1 / 255, 1.0, 7.0])
    assert to_uint8(images).tolist() == [0, 0, 0, 128, 254, 255, 255]
    levels = torch.arange(256)
    assert torch.equal(to_uint8(levels / 127.5 - 1), levels.to(torch.uint8))
    cut = to_uint8(images, truncated=True).tolist()
    assert cut == [math.floor((min(max(x, -1), 1) + 1) * 127.5) for x in images.tolist()]
    assert cut != to_uint8(images).tolist()


def test_samplers_reject_what_they_cannot_do() -> None:
    model = gaussian_model(0.3, 0.5, "epsilon")
    for steps in (0, 301):
        with pytest.raises(ValueError, match=f"num_inference_steps must be .* got {steps}"):
            ddim(model, LABELS, num_inference_steps=steps, eta=0.0, draw_noise=noise(512))
    with pytest.raises(ValueError, match=r"eta must be in \[0, 1\], got 1.5"):
        ddim(model, LABELS, num_inference_steps=3, eta=1.5, draw_noise=noise(512))
    with pytest.raises(ValueError, match=r"num_inference_steps must be .* got 301"):
        dpmpp_2m(model, LABELS, num_inference_steps=301, draw_noise=noise(512))
    with pytest.raises(ValueError, match="variance must be one of beta, posterior, got 'learned'"):
        ddpm(model, LABELS, variance="learned", draw_noise=noise(512))
    with pytest.raises(ValueError, match="batch_size must be >= 1, or None, got 0"):
        batches(lambda *_: LABELS, Counted(), LABELS, 0)
    with pytest.raises(TypeError, match=r"images must be floating-point .* got torch.uint8"):
        to_uint8(torch.zeros(1, dtype=torch.uint8))
    config = load_config()
    config.diffusion.sampler = "heun"
    with pytest.raises(ValueError, match="sampler must be one of ddpm, ddim, dpmpp_2m, got 'heun'"):
        build_sampler(config)
