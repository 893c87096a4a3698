"""Noise schedules, and at which times a batch is noised.

A schedule is a table of alphas_cumprod, the share of an image's variance that is left at each
timestep; everything else follows from it. All of it is float64, and none of it is a buffer.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from task.checks import require
from task.config import Config, require_diffusion

# The largest float64 below 1.
BELOW_ONE = 1 - 2.0**-53

# As many as torch's own engine has: the first billion points are distinct.
SOBOL_DIGITS = 30


@dataclass(frozen=True, eq=False)
class NoiseSchedule:
    """How much of the image is left at each time.

    Attributes:
        alphas_cumprod: [T] float64 in (0, 1), falling, on the CPU; timesteps are 0-based.
        continuous: whether training noises at any time in [0, 1), or at the T timesteps only.
        name: for reports.
    """

    alphas_cumprod: Tensor
    continuous: bool = False
    name: str = ""

    @property
    def num_timesteps(self) -> int:
        """T, the number of timesteps."""
        return len(self.alphas_cumprod)

    def alphas_cumprod_at(self, times: Tensor) -> Tensor:
        """Look up what is left of the images at given times.

        Args:
            times: [N] float64 in [0, 1), as `sample_times` draws them.

        Returns:
            [N] float64 in (0, 1), on the device of `times`.
        """
        if self.continuous:
            return continuous_alphas_cumprod(times)
        # A blocking copy would stop the CPU until the GPU has caught up, at every batch.
        table = self.alphas_cumprod.to(times.device, non_blocking=True)
        return table[(times * self.num_timesteps).long()]


def build_schedule(config: Config) -> NoiseSchedule:
    """Make the schedule of a configuration.

    Raises:
        ValueError: `diffusion.schedule` is unknown, or too short for `linear`.
    """
    diffusion = require_diffusion(config)
    name, num_timesteps = diffusion.schedule, diffusion.num_timesteps
    if name == "linear":
        return NoiseSchedule(linear_alphas_cumprod(num_timesteps), name=name)
    if name == "cosine":
        return NoiseSchedule(cosine_alphas_cumprod(num_timesteps), name=name)
    if name == "sigmoid":
        return NoiseSchedule(sigmoid_alphas_cumprod(num_timesteps), name=name)
    if name == "continuous":
        times = _timesteps(1, num_timesteps + 1) / num_timesteps
        return NoiseSchedule(continuous_alphas_cumprod(times), continuous=True, name=name)
    raise ValueError(
        f"diffusion.schedule must be linear, cosine, sigmoid or continuous, got {name!r}"
    )


def _timesteps(start: int, end: int) -> Tensor:
    # On the CPU even where a network is made on the meta device.
    return torch.arange(start, end, dtype=torch.float64, device="cpu")


def linear_alphas_cumprod(num_timesteps: int) -> Tensor:
    """Return the textbook's schedule, stretched from its 1000 steps to `num_timesteps`.

    Betas rise from 1e-4 to 0.02, times 1000 / T: unscaled, fewer steps would leave a visible
    image at the end (alphas_cumprod = 0.048 at T = 300), which sampling does not start from.

    Raises:
        ValueError: T <= 20, where a beta would reach 1.

    Source: Ho et al. 2020, section 4; the scaling: Nichol & Dhariwal 2021, their code.
    """
    require(
        num_timesteps > 20,
        "diffusion.num_timesteps",
        "> 20 with diffusion.schedule=linear (its last beta is 20 / num_timesteps)",
        num_timesteps,
    )
    scale = 1000 / num_timesteps
    ends = 1e-4 * scale, 0.02 * scale
    betas = torch.linspace(*ends, num_timesteps, dtype=torch.float64, device="cpu")
    return (1 - betas).cumprod(0)


def cosine_alphas_cumprod(num_timesteps: int) -> Tensor:
    """Return the cosine schedule with offset s = 0.008 and betas of at most 0.999.

    Source: Nichol & Dhariwal 2021, equation 17.
    """
    times = _timesteps(0, num_timesteps + 1) / num_timesteps
    signal = ((times + 0.008) / 1.008 * math.pi / 2).cos() ** 2
    betas = 1 - signal[1:] / signal[:-1]
    return (1 - betas.clamp(max=0.999)).cumprod(0)


def sigmoid_alphas_cumprod(num_timesteps: int) -> Tensor:
    """Return the sigmoid schedule from -3 to 3 at temperature 1, with betas of at most 0.999.

    Source: Jabri et al. 2022, "Scalable Adaptive Computation for Iterative Generation", figure 8.
    """
    times = _timesteps(0, num_timesteps + 1) / num_timesteps
    falling = torch.sigmoid(3 - 6 * times)
    signal = (falling - falling[-1]) / (falling[0] - falling[-1])
    betas = 1 - signal[1:] / signal[:-1]
    return (1 - betas.clamp(max=0.999)).cumprod(0)


def continuous_alphas_cumprod(times: Tensor) -> Tensor:
    """Return exp(-(1e-4 + 10 u^2)) at the times u in [0, 1].

    Source: the released code, log-SNR(u) = -log(expm1(1e-4 + 10 u^2)).
    """
    return torch.exp(-(1e-4 + 10 * times.double() ** 2))


def log_snr(alphas_cumprod: Tensor) -> Tensor:
    """Return log(alphas_cumprod / (1 - alphas_cumprod)) in float64, of the same shape."""
    return torch.logit(alphas_cumprod.double())


def sample_times(num: int, timestep_sampling: str, generator: torch.Generator) -> Tensor:
    """Draw the times at which a batch is noised, each uniform over [0, 1).

    Args:
        num: N, the size of the batch.
        timestep_sampling: "uniform", N independent draws; "stratified", one in each of N equal
            strata, in random order; "sobol", N points of a freshly scrambled Sobol sequence.
        generator: source of the draws, on the device that they are wanted on.

    Returns:
        [N] float64 in [0, 1), on the generator's device.

    Raises:
        ValueError: `timestep_sampling` is unknown.
    """
    device = generator.device
    if timestep_sampling == "uniform":
        return torch.rand(num, dtype=torch.float64, generator=generator, device=device)
    if timestep_sampling == "stratified":
        strata = torch.randperm(num, generator=generator, device=device)
        draws = torch.rand(num, dtype=torch.float64, generator=generator, device=device)
        times = (strata + draws) / num
    elif timestep_sampling == "sobol":
        times = scrambled_sobol(num, generator)
    else:
        raise ValueError(
            "diffusion.timestep_sampling must be uniform, stratified or sobol, "
            f"got {timestep_sampling!r}"
        )
    # The sum of the strata can round up to 1.
    return times.clamp(max=BELOW_ONE)


def scrambled_sobol(num: int, generator: torch.Generator) -> Tensor:
    """Draw the first points of a freshly scrambled Sobol sequence of one dimension.

    `torch.quasirandom.SobolEngine` does it on the CPU, from a seed that a GPU would have to be
    waited for at every batch.

    Returns:
        [num] float64 in [0, 1), on the generator's device.

    Source: Matousek 1998 (a random lower triangular matrix, then a random shift, of the digits).
    """
    device = generator.device
    places = torch.arange(SOBOL_DIGITS, device=device)
    index = torch.arange(num, device=device)
    # In one dimension the digits of a point are those of the Gray code of its number.
    digits = ((index ^ (index >> 1))[:, None] >> places & 1).double()
    size = (SOBOL_DIGITS, SOBOL_DIGITS)
    matrix = torch.randint(2, size, generator=generator, device=device).tril(-1).double()
    matrix.fill_diagonal_(1)
    shift = torch.randint(2, size[:1], generator=generator, device=device)
    return (digits @ matrix.T + shift) % 2 @ 0.5 ** (places + 1).double()
