"""Noise schedules against known values and formulas written another way."""

import math

import pytest
import torch
from torch.quasirandom import SobolEngine

from task.config import load_config
from task.generators.diffusion.noise_schedule import (
    BELOW_ONE,
    NoiseSchedule,
    build_schedule,
    cosine_alphas_cumprod,
    log_snr,
    sample_times,
    scrambled_sobol,
)

SCHEDULES = ("linear", "cosine", "sigmoid", "continuous")


def schedule_of(name: str, num_timesteps: int = 300) -> NoiseSchedule:
    return build_schedule(
        load_config(
            [
                f"diffusion.schedule={name}",
                f"diffusion.num_timesteps={num_timesteps}",
                "diffusion.num_inference_steps=null",
            ]
        )
    )


def betas_of(schedule: NoiseSchedule) -> torch.Tensor:
    """The variance that each step adds, [T]; nothing precedes step 0."""
    before = torch.cat([torch.ones(1, dtype=torch.float64), schedule.alphas_cumprod[:-1]])
    return 1 - schedule.alphas_cumprod / before


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize(("num_timesteps", "left"), [(1000, 4.0358e-5), (300, 3.4e-5)])
def test_linear_leaves_known_rest_of_image(num_timesteps: int, left: float) -> None:
    assert schedule_of("linear", num_timesteps).alphas_cumprod[-1] == pytest.approx(left, rel=0.01)


def test_linear_betas_are_scaled_textbook_betas() -> None:
    betas = betas_of(schedule_of("linear"))
    expected = [(1e-4 + (0.02 - 1e-4) * step / 299) * 1000 / 300 for step in range(300)]
    torch.testing.assert_close(betas, torch.tensor(expected, dtype=torch.float64))


def test_linear_rejects_betas_of_one() -> None:
    schedule_of("linear", 21)
    with pytest.raises(ValueError, match=r"num_timesteps must be > 20 .* got 20"):
        schedule_of("linear", 20)


def test_cosine_equals_paper_formula() -> None:
    def signal(step: int) -> float:
        return math.cos((step / 300 + 0.008) / (1 + 0.008) * math.pi / 2) ** 2

    schedule = schedule_of("cosine")
    expected = [signal(step) / signal(0) for step in range(1, 300)]
    assert schedule.alphas_cumprod[:-1].tolist() == pytest.approx(expected, rel=1e-9)
    assert betas_of(schedule)[-1].item() == pytest.approx(0.999)


def test_continuous_equals_released_log_snr() -> None:
    schedule = schedule_of("continuous")
    expected = [-math.log(math.expm1(1e-4 + 10 * (step / 300) ** 2)) for step in range(1, 301)]
    assert log_snr(schedule.alphas_cumprod).tolist() == pytest.approx(expected, rel=1e-9)
    times = torch.tensor([0.0, 0.123, 0.999], dtype=torch.float64)
    expected = [math.exp(-(1e-4 + 10 * time**2)) for time in times.tolist()]
    assert schedule.alphas_cumprod_at(times).tolist() == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("name", SCHEDULES)
def test_schedule_falls_within_bounds(name: str) -> None:
    schedule = schedule_of(name)
    assert schedule.num_timesteps == 300
    assert schedule.alphas_cumprod.dtype == torch.float64
    assert (schedule.alphas_cumprod.diff() < 0).all()
    assert 0 < schedule.alphas_cumprod[-1] < 1e-4
    assert schedule.alphas_cumprod[0] > 0.99
    assert ((betas_of(schedule) > 0) & (betas_of(schedule) < 1)).all()


def test_alphas_cumprod_at_takes_each_discrete_timestep_equally() -> None:
    schedule = schedule_of("cosine", 50)
    times = (torch.arange(200, dtype=torch.float64) + 0.5) / 200
    expected = schedule.alphas_cumprod.repeat_interleave(4)
    assert torch.equal(schedule.alphas_cumprod_at(times), expected)


def test_alphas_cumprod_at_stays_in_table_at_last_time() -> None:
    last = torch.tensor([BELOW_ONE], dtype=torch.float64)
    for num_timesteps in range(2, 300):
        schedule = NoiseSchedule(cosine_alphas_cumprod(num_timesteps))
        assert schedule.alphas_cumprod_at(last) == schedule.alphas_cumprod[-1]


def test_log_snr_is_stable_at_both_ends() -> None:
    ends = torch.tensor([1e-12, 0.5, 1 - 1e-12], dtype=torch.float64)
    expected = [math.log(1e-12), 0.0, -math.log(1e-12)]
    assert log_snr(ends).tolist() == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("timestep_sampling", ["uniform", "stratified", "sobol"])
def test_sample_times_are_uniform_and_follow_generator_alone(timestep_sampling: str) -> None:
    state = torch.get_rng_state()
    times = sample_times(4096, timestep_sampling, seeded())
    assert torch.equal(times, sample_times(4096, timestep_sampling, seeded()))
    assert not torch.equal(times, sample_times(4096, timestep_sampling, seeded(1)))
    assert torch.equal(torch.get_rng_state(), state)
    assert times.dtype == torch.float64
    assert ((times >= 0) & (times < 1)).all()
    assert times.mean() == pytest.approx(1 / 2, abs=0.02)
    assert times.var() == pytest.approx(1 / 12, abs=0.005)


@pytest.mark.parametrize("timestep_sampling", ["stratified", "sobol"])
def test_sample_times_put_one_in_each_stratum(timestep_sampling: str) -> None:
    strata = (sample_times(64, timestep_sampling, seeded()) * 64).long()
    assert torch.equal(strata.sort().values, torch.arange(64))
    assert not torch.equal(strata, torch.arange(64))


def test_unscrambled_sobol_points_are_those_of_torchs_engine(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def zeros(_high: int, size: tuple[int, ...], **_: object) -> torch.Tensor:
        return torch.zeros(size, dtype=torch.int64)

    monkeypatch.setattr(torch, "randint", zeros)
    engine = SobolEngine(1, scramble=False)
    expected = engine.draw(1000, dtype=torch.float64)[:, 0]
    assert torch.equal(scrambled_sobol(1000, seeded()), expected)


def test_scrambling_keeps_every_dyadic_stretch_of_points_spread() -> None:
    times = scrambled_sobol(256, seeded())
    for start in range(0, 256, 32):
        strata = (times[start : start + 32] * 32).long()
        assert torch.equal(strata.sort().values, torch.arange(32))
    firsts = torch.stack([scrambled_sobol(1, seeded(seed))[0] for seed in range(400)])
    assert firsts.mean() == pytest.approx(1 / 2, abs=0.05)


def test_sample_times_stay_below_one_when_sum_rounds_up(monkeypatch: pytest.MonkeyPatch) -> None:
    def largest(num: int, **_: object) -> torch.Tensor:
        return torch.full((num,), BELOW_ONE, dtype=torch.float64)

    monkeypatch.setattr(torch, "rand", largest)
    assert sample_times(32, "stratified", seeded()).max() == BELOW_ONE


def test_sample_times_rejects_unknown_word() -> None:
    with pytest.raises(ValueError, match=r"timestep_sampling must be .* got 'latin'"):
        sample_times(4, "latin", seeded())


def test_build_schedule_rejects_unknown_word() -> None:
    config = load_config()
    diffusion = config.diffusion.model_copy(update={"schedule": "quadratic"})
    config = config.model_copy(update={"diffusion": diffusion})
    with pytest.raises(ValueError, match=r"diffusion.schedule must be .* got 'quadratic'"):
        build_schedule(config)
