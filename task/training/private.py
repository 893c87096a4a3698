"""Steps of DP-SGD: what a hospital trains by when each of its patients is to be protected.

Source: Abadi et al. 2016 (arXiv 1607.00133); several draws of noise for an image, whose gradients
count as one: Dockhorn et al. 2023 (arXiv 2210.09929).
"""

import hashlib
import inspect
import math
import os
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Protocol

import numpy as np
import torch
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components
from torch import Tensor, nn
from torch.optim import Optimizer

from task.checks import require
from task.config import Config
from task.generators.base import Generator
from task.privacy.accounting import LARGEST_EPSILON, Spending, epsilon_of, noise_multiplier_for
from task.training.patient_gradients import MeanLoss, clipped_sum


@dataclass(frozen=True, kw_only=True)
class PrivateSteps:
    """How each patient is protected.

    Attributes:
        spending: the steps of a round, and their noise.
        clipping_norm: the largest L2 norm of a patient's gradient in a step.
        noise_draws: draws of noise of an image, whose mean gradient is clipped.
        noise_share: standard deviation of the noise that is drawn here over that of the whole.
        divisor: of the sum over patients; None: how many are drawn in the mean.
    """

    spending: Spending
    clipping_norm: float
    noise_draws: int
    noise_share: float = 1.0
    divisor: float | None = None

    @classmethod
    def of(cls, config: Config) -> "PrivateSteps | None":
        """Choose the noise of a run, or take what it says; None of a run without privacy."""
        privacy = config.privacy
        if not privacy.is_on:
            return None
        clipping_norm = float(privacy.clipping_norm or 0)
        steps = cls(
            spending=spending_of(config, rounds=1),
            clipping_norm=clipping_norm,
            noise_draws=int(privacy.noise_draws or 0),
        )
        if not sums_gradients(config):
            return steps
        # Nobody says how many patients a hospital has: gradients are in units of the norm.
        share = 1 / math.sqrt(config.federation.min_replies - int(privacy.colluders or 0))
        return replace(steps, noise_share=share, divisor=clipping_norm)


def sums_gradients(config: Config) -> bool:
    """Whether clients send gradients with a share of the noise, by whose sum the server steps."""
    return config.privacy.is_distributed and config.train.mode == "federated"


def spending_of(config: Config, *, rounds: int) -> Spending:
    """Return what rounds of a private run spend on a patient of a hospital that trains in each.

    Or, of a run that protects clients, on one of them.

    Args:
        config: of the run, with privacy.
        rounds: how many.
    """
    privacy = config.privacy
    # Clients count as if each trained in every round.
    rate, delta = float(privacy.sampling_rate or 1), float(privacy.delta or 0)
    steps = max(1, round(config.train.local_epochs / rate))
    if privacy.is_distributed or privacy.protects_clients:
        steps = 1
    noise_multiplier = privacy.noise_multiplier
    if noise_multiplier is None:
        in_all = steps * config.federation.rounds
        noise_multiplier = noise_multiplier_for(float(privacy.epsilon or 0), delta, rate, in_all)
    return Spending(noise_multiplier, rate, steps * rounds)


def epsilon_after(config: Config, rounds: int) -> float:
    """Return the epsilon, at `privacy.delta`, of who is protected after rounds of a private run."""
    return epsilon_of([spending_of(config, rounds=rounds)], float(config.privacy.delta or 0))


def described_privacy(config: Config, epsilon: float) -> str:
    """Say what a private run guarantees, or has, in part of a sentence."""
    privacy, spent = config.privacy, spending_of(config, rounds=1)
    multiplier = f"noise multiplier {spent.noise_multiplier:.4g}"
    if sums_gradients(config):
        multiplier += (
            " of the sum over hospitals, each of which adds a share, and of which at most "
            f"{privacy.colluders} tell the server theirs"
        )
    how = f"{multiplier}, clipping norm {privacy.clipping_norm:g}"
    if privacy.is_on:
        rate = f"a rate of {spent.sampling_rate:g}"
        how = f"DP-SGD, patients drawn by Poisson sampling at {rate}, {how}"
    else:
        how = f"each update clipped, and noise of their mean, {how}"
    if math.isinf(epsilon):
        return f"none, there is {too_little_noise(config)} ({how})"
    return f"epsilon {epsilon:.3g} at delta {privacy.delta:g} for each {privacy.unit} ({how})"


def too_little_noise(config: Config) -> str:
    """Say why a private run guarantees nothing, where its epsilon is infinite."""
    if config.privacy.noise_multiplier == 0:
        return "no noise"
    return f"too little noise: epsilon is beyond {LARGEST_EPSILON:g}"


def check_private_run(generator: Generator, config: Config) -> None:
    """Check that the generator of a run can be trained with the privacy that the run asks for.

    Raises:
        ValueError: it cannot.
    """
    if config.privacy.protects_clients:
        state = generator.shared(generator.state_dict(keep_vars=True))
        others = [
            name
            for name, tensor in state.items()
            if not (isinstance(tensor, nn.Parameter) or name.startswith(tuple(generator.frozen)))
        ]
        require(
            not others,
            "privacy.mechanism",
            f"another with a {generator.title}: beside weights it averages numbers that noise "
            f"would make impossible ({', '.join(others[:3])})",
            config.privacy.mechanism,
        )
    if not config.privacy.is_on:
        return
    optimizers = generator.optimizers(config.train.lr)
    check_private(generator, optimizers)
    if sums_gradients(config):
        _check_sums_of_gradients(generator, optimizers)
    steps = spending_of(config, rounds=1).steps
    require(
        steps >= generator.private_steps,
        "privacy.sampling_rate",
        f"smaller, or train.local_epochs larger: a {generator.title} takes a step of its generator "
        f"after {generator.private_steps} of its discriminator, and a round has {steps}",
        config.privacy.sampling_rate,
    )


def _check_sums_of_gradients(generator: Generator, optimizers: Mapping[str, Optimizer]) -> None:
    groups = [group for each in optimizers.values() for group in each.param_groups]
    trained = {id(each) for group in groups for each in group["params"]}
    require(
        len(optimizers) == 1 and not generator.keeps_state,
        "privacy.noise",
        f"local with a {generator.title}: the server takes the steps of one optimizer, and clients "
        "keep nothing",
        "distributed",
    )
    beside = [name for name, each in generator.named_parameters() if id(each) not in trained]
    require(
        not beside,
        "privacy.noise",
        f"local with a {generator.title} that averages its weights over steps, which the server "
        f"does not ({', '.join(beside[:3])}); or diffusion.ema_decay null, and "
        "federation.ema_decay in its place",
        "distributed",
    )


def check_private(generator: Generator, optimizers: Collection[str]) -> None:
    """Check that each patient's part in the gradients of a generator can be told apart.

    Args:
        generator: in training mode.
        optimizers: names of those that train it.

    Raises:
        ValueError: it cannot.
    """
    alone = {*optimizers} == generator.private
    apart = type(generator).private_losses is not Generator.private_losses
    require(
        len({*optimizers} & generator.private) == 1 and (alone or apart),
        "privacy.mechanism",
        f"none with a {generator.title}, which is trained by {', '.join(sorted(optimizers))}: it "
        "takes one optimizer whose losses look at real images, and losses of it apart from others",
        "dp_sgd",
    )
    mixing = [
        name
        for name, module in generator.named_modules()
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.training
    ]
    require(
        not mixing,
        "privacy.mechanism",
        "none with batch normalization, which mixes images of several patients "
        f"({', '.join(mixing[:3])})",
        "dp_sgd",
    )


# Where torch keeps the words of its Mersenne twister in the state of a generator, 8 bytes each.
TWISTER_WORDS, TWISTER_OFFSET = 624, 24


class TooManyPatientsError(ValueError):
    """A hospital has more patients than `privacy.delta` protects."""


class PrivateDraws(Protocol):
    """Where the draws come from on which a patient's privacy rests: who is drawn, and the noise."""

    def uniform(self, number: int) -> Tensor:
        """Draw numbers of [0, 1), [number] float64 on the CPU."""
        ...

    def normal(self, like: Tensor) -> Tensor:
        """Draw standard normal numbers of the shape and dtype of a tensor, on its device."""
        ...


class SeededDraws:
    """Draws of torch, which repeat: for simulations, and no secret to anybody who has the seed."""

    def __init__(self, rng: torch.Generator) -> None:
        """Draw from a generator, on its device."""
        self._rng = rng

    def uniform(self, number: int) -> Tensor:
        """See `PrivateDraws`."""
        device = self._rng.device
        return torch.rand(number, generator=self._rng, device=device, dtype=torch.float64).cpu()

    def normal(self, like: Tensor) -> Tensor:
        """See `PrivateDraws`."""
        device = self._rng.device
        return torch.randn(like.shape, generator=self._rng, device=device, dtype=like.dtype)


class SecretDraws:
    """Draws from AES-256 in counter mode under a key of the operating system, told to nobody.

    Not torch's: on a CPU its generator takes 32 bits of a seed alone, which can all be tried.
    """

    def __init__(self) -> None:
        """Draw a key."""
        key, counter = os.urandom(32), os.urandom(16)
        self._stream = Cipher(algorithms.AES(key), modes.CTR(counter)).encryptor()

    def uniform(self, number: int) -> Tensor:
        """See `PrivateDraws`."""
        drawn = np.frombuffer(self._stream.update(bytes(8 * number)), dtype="<u8")
        return torch.from_numpy((drawn >> np.uint64(11)).astype(np.float64) * 2.0**-53)

    def normal(self, like: Tensor) -> Tensor:
        """See `PrivateDraws`; by Box and Muller's method."""
        half = (like.numel() + 1) // 2
        # 1 - u is never 0, whose logarithm is none.
        radius = (-2 * torch.log1p(-self.uniform(half))).sqrt_()
        angle = 2 * math.pi * self.uniform(half)
        drawn = torch.cat([radius * angle.cos(), radius * angle.sin()])[: like.numel()]
        return drawn.reshape(like.shape).to(like)


def secret_generator(device: torch.device) -> torch.Generator:
    """Make a torch generator from the operating system's randomness.

    A GPU takes a seed of 64 bits. On a CPU torch takes 32 of them, which can all be tried: there
    all of the state is drawn.
    """
    generator = torch.Generator(device)
    if device.type != "cpu":
        return generator.manual_seed(int.from_bytes(os.urandom(8), "little"))
    state = generator.get_state()
    words = np.frombuffer(os.urandom(4 * TWISTER_WORDS), "<u4").astype(np.uint64)
    packed = torch.from_numpy(words.view(np.uint8))
    state[TWISTER_OFFSET : TWISTER_OFFSET + len(packed)] = packed
    return generator.set_state(state)


def joined_patients(images: Tensor, patients: Tensor) -> Tensor:
    """Make one patient of those who share an image, which would show twice as much of itself.

    Args:
        images: [N, C, H, W] uint8, on any device.
        patients: [N] int64, equal for the images of one patient.

    Returns:
        [N] int64, likewise, on the CPU.
    """
    numbers: dict[bytes, int] = {}
    digests = (hashlib.sha256(image.tobytes()).digest() for image in images.cpu().numpy())
    pixels = np.array([numbers.setdefault(digest, len(numbers)) for digest in digests])
    _, whose = np.unique(patients.cpu().numpy(), return_inverse=True)
    size = int(whose.max()) + 1 + len(numbers)
    edges = (np.ones(len(whose)), (whose, pixels + int(whose.max()) + 1))
    _, joined = connected_components(coo_array(edges, shape=(size, size)), directed=False)
    return torch.from_numpy(joined[whose].astype(np.int64))


class PatientSampler:
    """Draws patients for steps, each by itself, and knows their images."""

    def __init__(self, patients: Tensor) -> None:
        """Take up whose the images are.

        Args:
            patients: [N] int64, equal for the images of one patient.
        """
        order = torch.argsort(patients, stable=True).cpu()
        _, counts = torch.unique_consecutive(patients.cpu()[order], return_counts=True)
        self._images = torch.split(order, counts.tolist())

    def __len__(self) -> int:
        """The number of patients."""
        return len(self._images)

    def draw(self, rate: float, draws: PrivateDraws) -> list[Tensor]:
        """Draw each patient with a probability; returns the images' places of those drawn."""
        drawn = draws.uniform(len(self)) < rate
        return [self._images[patient] for patient in drawn.nonzero().flatten().tolist()]


def private_gradient(
    model: nn.Module,
    parameters: Sequence[nn.Parameter],
    drawn: Sequence[Tensor],
    mean_loss: MeanLoss,
    *,
    steps: PrivateSteps,
    expected_patients: float,
    chunk: int,
    draws: PrivateDraws,
    own: Sequence[nn.Parameter] = (),
) -> Tensor:
    """Leave the noised mean of the clipped gradients of drawn patients in parameters' gradients.

    Args:
        model: that is trained.
        parameters: of the optimizer that takes the step.
        drawn: indices of the images of each patient; it may be empty, and leaves noise alone.
        mean_loss: see `MeanLoss`.
        steps: how they are protected.
        expected_patients: how many are drawn in the mean, by which the sum is divided unless the
            steps have a divisor: who was really drawn must not show in it.
        chunk: draws of images that go through the networks at a time.
        draws: of the noise.
        own: see `clipped_sum`.

    Returns:
        The mean loss of the patients, scalar; it is not protected.
    """
    sums, loss_sum = clipped_sum(
        model,
        parameters,
        drawn,
        mean_loss,
        norm=steps.clipping_norm,
        noise_draws=steps.noise_draws,
        chunk=chunk,
        own=own,
    )
    std = steps.spending.noise_multiplier * steps.clipping_norm * steps.noise_share
    divisor = steps.divisor or expected_patients
    for each, total in zip(parameters, sums, strict=True):
        each.grad = total.add_(draws.normal(total), alpha=std).div_(divisor)
    return loss_sum / max(1, len(drawn))


def gradients_as_updates(optimizers: Mapping[str, Optimizer]) -> dict[str, Optimizer]:
    """Make optimizers of the same weights that move them by the whole gradient, to be summed."""
    return {
        name: torch.optim.SGD([p for group in each.param_groups for p in group["params"]], lr=1.0)
        for name, each in optimizers.items()
    }


def packed_optimizer(optimizers: Mapping[str, Optimizer]) -> Callable[[list[Tensor]], Optimizer]:
    """Return what makes the one optimizer of a model for all of its weights in one tensor.

    Raises:
        ValueError: it has not the same options for all weights.
    """
    ((name, optimizer),) = optimizers.items()
    groups = len(optimizer.param_groups)
    require(groups == 1, "privacy.noise", f"local with {groups} groups of {name}", "distributed")
    known = inspect.signature(type(optimizer)).parameters
    options = {key: value for key, value in optimizer.defaults.items() if key in known}
    return partial(type(optimizer), **options)


def check_patients(num_patients: int, config: Config) -> None:
    """Check that a run's delta and rate suit a hospital with so many patients.

    Raises:
        TooManyPatientsError: delta leaves room for giving a whole patient away.
        ValueError: a step would draw no patient in the mean.
    """
    delta, rate = float(config.privacy.delta or 0), float(config.privacy.sampling_rate or 0)
    if delta * num_patients >= 1:
        raise TooManyPatientsError(
            f"privacy.delta must be below 1 / {num_patients}, the patients of this hospital, got "
            f"{delta:g}: a mechanism that gives one of them away in every run would pass"
        )
    require(
        rate * num_patients >= 1,
        "privacy.sampling_rate",
        f"at least 1 / {num_patients}, or a step of a hospital with {num_patients} patients draws "
        "none in the mean",
        rate,
    )
