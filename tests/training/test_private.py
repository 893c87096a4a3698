import copy
import math
from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import pytest
import torch
from scipy.stats import binom, kstest
from torch import Tensor, nn

from task.config import Config, load_config
from task.generators.base import Batch, Generator
from task.generators.registry import initial_generator
from task.generators.small_gan import SmallGAN, build_small_gan
from task.privacy.accounting import Spending, epsilon_of, noise_multiplier_for
from task.training.loop import FitOptions, fit, fit_options
from task.training.patient_gradients import clipped, clipped_sum
from task.training.private import (
    PatientSampler,
    PrivateSteps,
    SecretDraws,
    SeededDraws,
    TooManyPatientsError,
    check_patients,
    check_private,
    check_private_run,
    epsilon_after,
    gradients_as_updates,
    joined_patients,
    private_gradient,
    secret_generator,
    spending_of,
)
from tests.training.generators import Known

PRIVATE = load_config(
    ["privacy=dp_sgd", "model=vae", "federation.rounds=3", "train.local_epochs=2"]
)
WITHOUT_ROUNDING = 2e-6  # of what is left of a gradient that was scaled down


def steps(noise: float, *, norm: float = 1.0, draws: int = 1, rate: float = 1.0) -> PrivateSteps:
    spending = Spending(noise, rate, steps=1)
    return PrivateSteps(spending=spending, clipping_norm=norm, noise_draws=draws)


def options_of(private: PrivateSteps | None, *, batch_size: int) -> FitOptions:
    return FitOptions(
        epochs=1,
        batch_size=batch_size,
        horizontal_flip=False,
        precision="float32",
        channels_last=False,
        private=private,
    )


class Linear(Known):
    """Its loss is -weight . image, whose gradient is minus the image."""

    private = frozenset({"sgd"})
    image_shape = (1, 128, 128)

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(128 * 128))

    def losses(self, batch: Batch, rng: torch.Generator) -> Iterator[tuple[str, Tensor]]:
        yield "sgd", -batch.images.flatten(1) @ self.weight


def gradient_of(
    drawn: list[Tensor], private: PrivateSteps, seed: int = 0, chunk: int = 64
) -> tuple[Tensor, list[list[int]]]:
    """Compute the gradient of a weight whose loss is its product with points of a plane."""
    points = torch.tensor([[3.0, 4.0], [3.0, 4.0], [0.3, 0.4], [math.inf, 0.0]])
    model = nn.Linear(2, 1, bias=False)
    nn.init.zeros_(model.weight)
    looked_at = []

    def mean_loss(indices: Tensor) -> Tensor:
        looked_at.append(indices.tolist())
        return model(points[indices]).mean()

    rng = torch.Generator().manual_seed(seed)
    private_gradient(
        model,
        [model.weight],
        drawn,
        mean_loss,
        steps=private,
        expected_patients=4.0,
        chunk=chunk,
        draws=SeededDraws(rng),
    )
    assert model.weight.grad is not None
    return model.weight.grad[0], looked_at


def test_gradients_of_two_patients_are_clipped_each_and_noised_once() -> None:
    # The first has two images, with gradients (3, 4); the second's is shorter than the norm.
    drawn = [torch.tensor([0, 1]), torch.tensor([2])]
    noise = torch.randn(2, generator=torch.Generator().manual_seed(0))
    expected = (torch.tensor([0.6, 0.8]) + torch.tensor([0.3, 0.4]) + 2.0 * noise) / 4
    found, looked_at = gradient_of(drawn, steps(2.0, draws=3))
    assert torch.allclose(found, expected, atol=WITHOUT_ROUNDING)
    assert looked_at == [[0, 0, 0, 1, 1, 1], [2, 2, 2]]
    # The noise grows with the norm, and images that do not fit into memory together count alike.
    expected = (torch.tensor([1.5, 2.0]) + torch.tensor([0.3, 0.4]) + 2.5 * 2.0 * noise) / 4
    found, looked_at = gradient_of(drawn, steps(2.0, norm=2.5, draws=3), chunk=4)
    assert torch.allclose(found, expected, atol=1e-5)
    assert looked_at[:2] == [[0, 0, 0, 1], [1, 1]]


class Bent(nn.Module):
    """A small network whose loss of an image depends on all of its layers, and draws nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(1, 3, 3), nn.GroupNorm(1, 3), nn.SiLU(), nn.Flatten(), nn.Linear(48, 2)
        )
        self.images = torch.rand(40, 1, 6, 6, generator=torch.Generator().manual_seed(1))

    def mean_loss(self, indices: Tensor) -> Tensor:
        return self.layers(self.images[indices]).square().sum(1).mean()


@pytest.mark.parametrize("norm", [0.5, 1e6])
def test_patients_who_are_looked_at_together_count_as_one_after_another(norm: float) -> None:
    torch.manual_seed(0)
    model = Bent()
    # The images of a patient are 1, 3, or the only one of its number.
    patients = [*torch.arange(20).split(1), *torch.arange(20, 38).split(3), torch.tensor([38, 39])]
    found = [
        clipped_sum(
            model,
            [*model.parameters()],
            patients,
            model.mean_loss,
            norm=norm,
            noise_draws=2,
            chunk=64,
            memory=memory,
        )
        for memory in (0, 1 << 20)
    ]
    for alone, together in zip(*(sums for sums, _ in found), strict=True):
        assert torch.allclose(alone, together, rtol=1e-4, atol=1e-5)
    assert torch.allclose(found[0][1], found[1][1])
    # The oracle: a backward pass for each patient.
    expected = [torch.zeros_like(each) for each in model.parameters()]
    for images in patients:
        each = torch.autograd.grad(model.mean_loss(images), [*model.parameters()])
        length = torch.cat([gradient.flatten() for gradient in each]).norm()
        for total, gradient in zip(expected, each, strict=True):
            total += gradient * min(1.0, float(norm / length))
    for wanted, (sums, _) in zip([expected] * 2, found, strict=True):
        assert all(
            torch.allclose(a, b, rtol=1e-4, atol=1e-5) for a, b in zip(wanted, sums, strict=True)
        )


def test_patients_who_are_looked_at_together_have_draws_of_their_own_that_repeat() -> None:
    model = nn.Linear(4, 1, bias=False)
    drawn = []
    for seed in (0, 0, 1):
        rng = torch.Generator().manual_seed(seed)

        def mean_loss(indices: Tensor, rng: torch.Generator = rng) -> Tensor:
            return model(torch.randn(len(indices), 4, generator=rng)).mean()

        alone = [
            clipped_sum(
                model,
                [model.weight],
                [torch.tensor([0])] * number,
                mean_loss,
                norm=1e9,
                noise_draws=1,
                chunk=64,
            )[0][0]
            for number in (4, 1)
        ]
        drawn.append(torch.cat(alone))
    assert torch.equal(drawn[0], drawn[1]) and not torch.equal(drawn[0], drawn[2])
    # Four equal draws would sum up to four times one.
    assert not torch.allclose(drawn[0][0] / 4, drawn[0][1], atol=0.1)


def test_nobody_drawn_leaves_noise_and_an_overflowing_patient_leaves_nothing() -> None:
    noise = torch.randn(2, generator=torch.Generator().manual_seed(0))
    assert torch.equal(gradient_of([], steps(2.0))[0], 2.0 * noise / 4)
    broken = gradient_of([torch.tensor([3]), torch.tensor([2])], steps(0.0))[0]
    assert torch.allclose(broken, torch.tensor([0.075, 0.1]), atol=WITHOUT_ROUNDING)


def test_no_patient_is_longer_than_the_norm() -> None:
    found = gradient_of([torch.tensor([0])], steps(0.0))[0]
    assert 0.9999 < float(4 * found.double().norm()) <= 1
    long = torch.randn(1, 3_000_000, generator=torch.Generator().manual_seed(0))
    (scaled,) = clipped([long], 1.0)
    assert 0.9999 < float(scaled.double().norm()) <= 1


def test_hospital_draws_its_share_of_the_noise_in_units_of_the_norm() -> None:
    images = torch.randint(256, (6, 1, 128, 128), dtype=torch.uint8)
    found = []
    for noise in (0.0, 8.0):
        private = replace(steps(noise, norm=0.5), noise_share=0.25, divisor=0.5)
        model = Linear()
        fit(
            model,
            images,
            torch.zeros(6, dtype=torch.int64),
            options=replace(options_of(private, batch_size=6), clip_norm=1e-9),
            optimizers=gradients_as_updates(model.optimizers(123.0)),
            rng=torch.Generator().manual_seed(0),
        )
        found.append(model.weight.detach())
    # No optimizer, no learning rate and no clipping of what has its noise.
    assert (found[1] - found[0]).std() == pytest.approx(8.0 * 0.25, rel=0.02)
    assert found[0].norm() <= 6.0  # six patients, each as long as the norm at most
    assert found[0].norm() > 1.0


def test_patients_are_drawn_whole_and_each_by_itself() -> None:
    sampler = PatientSampler(torch.tensor([5, 2, 5, 9, 2, 5]))
    assert len(sampler) == 3
    draws = SecretDraws()
    drawn = [sampler.draw(0.3, draws) for _ in range(4000)]
    told = {tuple(images.tolist()) for each in drawn for images in each}
    assert told == {(1, 4), (0, 2, 5), (3,)}
    sizes = np.bincount([len(each) for each in drawn], minlength=4) / len(drawn)
    # As many together as of three coins: batches may be empty.
    assert np.allclose(sizes, binom.pmf(range(4), 3, 0.3), atol=0.03)
    assert len(sampler.draw(1.0, draws)) == 3


def test_patients_who_share_an_image_are_one() -> None:
    images = torch.arange(6, dtype=torch.uint8).reshape(6, 1, 1, 1)
    images[4] = images[0]  # of the patients 7 and 9
    joined = joined_patients(images, torch.tensor([7, 7, 8, 5, 9, 9])).tolist()
    assert joined[0] == joined[1] == joined[4] == joined[5]
    assert len({*joined}) == 3


def test_secret_generator_has_a_state_of_its_own_that_no_seed_leads_to() -> None:
    one, other = (secret_generator(torch.device("cpu")) for _ in range(2))
    words = one.get_state()[24 : 24 + 8 * 624].numpy().view(np.uint64)
    twister = np.random.MT19937()
    key = {"key": words.astype(np.uint32), "pos": 624}
    twister.state = {"bit_generator": "MT19937", "state": key}
    # All of the words are those of the twister, whose outputs torch takes two at a time.
    expected = twister.random_raw(2000)[1::2] & 0x7FFFFFFF
    assert torch.randint(2**31, (1000,), generator=one).tolist() == expected.tolist()
    assert not torch.equal(torch.rand(9, generator=one), torch.rand(9, generator=other))


def test_secret_draws_are_those_of_their_distributions_and_never_repeat() -> None:
    draws, other = SecretDraws(), SecretDraws()
    uniform = draws.uniform(100_001)
    assert kstest(uniform.numpy(), "uniform").pvalue > 1e-6
    assert float(uniform.min()) >= 0 and float(uniform.max()) < 1
    normal = draws.normal(torch.zeros(333, 301))
    assert normal.shape == (333, 301) and normal.dtype == torch.float32
    assert kstest(normal.flatten().double().numpy(), "norm").pvalue > 1e-6
    again = other.normal(normal)
    assert abs(float(torch.corrcoef(torch.stack([normal.flatten(), again.flatten()]))[0, 1])) < 0.02
    assert not torch.equal(draws.normal(normal), normal)


def test_without_noise_and_clipping_a_step_is_that_of_all_images() -> None:
    images = torch.randint(256, (6, 1, 128, 128), dtype=torch.uint8)
    labels = torch.zeros(6, dtype=torch.int64)
    found = []
    for private in (None, steps(0.0, norm=1e9)):
        model = Linear()
        options = options_of(private, batch_size=6)
        rng = torch.Generator().manual_seed(0)
        fit(model, images, labels, options=options, optimizers=model.optimizers(1.0), rng=rng)
        found.append(model.weight.detach())
    assert torch.allclose(*found, atol=1e-5)
    assert found[0].abs().max() > 0.1


def audited_epsilon(private: PrivateSteps, delta: float, seed: int) -> float:
    """Bound the epsilon of one training from below, with 95 % confidence.

    Source: Steinke et al. 2023 (arXiv 2305.08846), Theorem 5.2, but for its terms in delta, which
    lower the bound by less than 0.01 here.
    """
    number = 500
    rng = torch.Generator().manual_seed(seed)
    canaries = 255 * torch.randint(2, (number, 1, 128, 128), generator=rng).byte()
    included = torch.rand(number, generator=rng) < 0.5
    model = Linear()
    options = options_of(private, batch_size=1)
    fit(
        model,
        canaries[included],
        torch.zeros(int(included.sum()), dtype=torch.int64),
        options=options,
        optimizers=model.optimizers(1.0),
        rng=rng,
    )
    scores = (canaries.flatten(1).float() / 127.5 - 1) @ model.weight.detach()
    guessed = torch.cat([scores.argsort()[: number // 4], scores.argsort()[-number // 4 :]])
    right = int((included[guessed] == (scores[guessed] > scores.median())).sum())
    assert delta < 1e-4
    found = [
        epsilon
        for epsilon in np.arange(0, 8, 0.01)
        if binom.sf(right - 1, len(guessed), 1 / (1 + math.exp(-epsilon))) < 0.05
    ]
    return float(max(found, default=0.0))


def test_canaries_show_no_more_than_the_epsilon_claimed_and_more_without_noise() -> None:
    claimed, delta = 3.0, 1e-5
    noise = noise_multiplier_for(claimed, delta, 1.0, steps=4)
    assert epsilon_of([Spending(noise, 1.0, 4)], delta) <= claimed
    found = {
        multiplier: audited_epsilon(
            PrivateSteps(spending=Spending(multiplier, 1.0, 4), clipping_norm=1.0, noise_draws=1),
            delta,
            seed=0,
        )
        for multiplier in (noise, 0.0)
    }
    assert 0 < found[noise] < claimed < found[0.0]


def test_private_training_repeats_and_differs_with_the_seed() -> None:
    images = torch.randint(256, (30, 1, 16, 16), dtype=torch.uint8)
    labels = torch.arange(30) % 10
    model = initial_generator(PRIVATE)
    found = []
    for seed in (1, 1, 2):
        trained = copy.deepcopy(model)
        result = fit(
            trained,
            images,
            labels,
            options=fit_options(PRIVATE, precision="float32"),
            optimizers=trained.optimizers(1e-3),
            rng=torch.Generator().manual_seed(seed),
            patients=torch.arange(30) // 3,
        )
        assert math.isfinite(result.loss)
        found.append(torch.cat([each.flatten() for each in trained.parameters()]))
    assert torch.equal(found[0], found[1])
    assert not torch.equal(found[0], found[2])


def test_noise_of_a_run_is_chosen_for_all_of_its_rounds() -> None:
    # 2 epochs at a rate of 0.2 are 10 steps a round.
    assert spending_of(PRIVATE, rounds=3).steps == 30
    assert epsilon_after(PRIVATE, 1) < epsilon_after(PRIVATE, 3) <= 10
    given = ["privacy=dp_sgd", "privacy.epsilon=null", "privacy.noise_multiplier=1.5"]
    config = load_config([*given, "model=vae"])
    assert spending_of(config, rounds=1).noise_multiplier == 1.5


def trained_privately(model: Generator, *, noise: float, rate: float = 0.5) -> Generator:
    images = torch.randint(256, (12, 1, 16, 16), generator=torch.Generator().manual_seed(5))
    model.prepare(12)
    fit(
        model,
        images.byte(),
        torch.arange(12) % 10,
        options=options_of(
            replace(steps(noise, rate=rate, draws=2), spending=Spending(noise, rate, 4)),
            batch_size=8,
        ),
        optimizers=model.optimizers(0.01),
        rng=torch.Generator().manual_seed(0),
        patients=torch.arange(12) // 2,
    )
    return model


def resnet_gan() -> Generator:
    torch.manual_seed(0)
    return initial_generator(
        load_config(["model=resnet_gan", "model.width=4", "++model.discriminator_steps=2"])
    )


def test_gan_is_private_in_its_discriminator_and_learns_of_images_by_it_alone() -> None:
    start, model = resnet_gan(), trained_privately(resnet_gan(), noise=1.0)
    moved = {
        name
        for (name, one), other in zip(
            start.state_dict().items(), model.state_dict().values(), strict=True
        )
        if not torch.equal(one, other)
    }
    for network in ("generator.", "discriminator.", "generator_ema."):
        assert [name for name in moved if name.startswith(network)]
    # Nobody is drawn, and without noise: all that moves looks at no image, labels included.
    found = []
    for seed in (5, 6):
        torch.manual_seed(seed)
        other = resnet_gan()
        labels = torch.randint(10, (12,), generator=torch.Generator().manual_seed(seed))
        images = torch.randint(256, (12, 1, 16, 16), generator=torch.Generator().manual_seed(seed))
        rng = torch.Generator().manual_seed(0)
        batch = Batch(images / 127.5 - 1, labels, torch.arange(12))
        before = {name: each.clone() for name, each in other.state_dict().items()}
        losses = other.private_losses(batch, rng)
        assert losses.shape == (12,)
        after = other.state_dict()
        assert all(torch.equal(after[name], before[name]) for name in before)
        rng = torch.Generator().manual_seed(0)
        ((name, public),) = other.public_losses(8, rng)
        assert name == "generator" and public.shape == (8,)
        found.append(public.detach())
    assert torch.equal(*found)


def test_latent_of_a_patient_does_not_depend_on_who_else_is_drawn() -> None:
    # In the second step patient 1 is drawn, or nobody.
    found = []
    for also in (torch.tensor([1]), None):
        latents = nn.Parameter(torch.zeros(2))
        model = nn.ParameterDict({"scale": nn.Parameter(torch.ones(1)), "latents": latents})
        optimizer = torch.optim.Adam([latents], lr=0.1)
        for drawn in ([torch.tensor([0])], [] if also is None else [also]):
            clipped_sum(
                model,
                [model["scale"]],
                drawn,
                lambda images, model=model: (model["scale"] * model["latents"][images]).sum(),
                norm=1.0,
                noise_draws=1,
                chunk=8,
                own=[latents],
            )
            optimizer.step()
        found.append(float(latents.detach()[0]))
    assert found[0] == found[1] != 0


def test_latents_of_single_images_are_trained_beside_what_is_protected() -> None:
    config = load_config(["model=small_gan", "model.width=4", "model.perceptual_weight=0"])
    models = []
    for noise in (0.0, 50.0):
        torch.manual_seed(0)
        model = build_small_gan(config)
        model._is_loaded = True  # a generator with random weights does here
        models.append(trained_privately(model, noise=noise, rate=1.0))
    for model in models:
        assert isinstance(model, SmallGAN) and model.latents is not None
        # Each image has moved its own latent, which has no noise: at most lr a step.
        assert model.latents.detach().abs().min() > 0
        assert model.latents.detach().abs().max() <= 4 * 0.01 * 1.5
    shifts = [model.get_parameter("shift").detach() for model in models]
    assert not torch.allclose(*shifts, atol=1e-3)
    with pytest.raises(ValueError, match=r"privacy\.noise must be local with a GAN with adapted"):
        check_private_run(models[0], load_config(["experiment=private"]))


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (
            ["privacy=dp_clients", "model=resnet_gan"],
            "privacy.mechanism must be another .* noise wo",
        ),
        (
            ["privacy=dp_sgd", "model=resnet_gan", "model.discriminator_steps=9"],
            r"privacy.sampling_rate must be smaller, .* after 9 of its .*, and a round has 5",
        ),
        (
            ["experiment=private", "model=tiny", "diffusion=fast", "diffusion.ema_decay=0.9"],
            r"privacy.noise must be local .*\(average.*federation.ema_decay",
        ),
        (
            ["experiment=private", "model=resnet_gan", "model.width=4"],
            "privacy.noise must be local with a GAN",
        ),
    ],
)
def test_run_whose_privacy_its_generator_cannot_have_is_refused(
    words: list[str], said: str
) -> None:
    config = load_config(["train.local_epochs=1", *words])
    with pytest.raises(ValueError, match=said):
        check_private_run(initial_generator(config), config)
    check_private_run(initial_generator(PRIVATE), PRIVATE)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["model=stylegan2_ada_tiny"], r"model.family must be another with .*: its augmentation"),
        (["model=vae", "train.num_processes=2"], "train.num_processes must be 1"),
        (["model=vae", "privacy.noise_multiplier=1"], "privacy.epsilon must be null where"),
        (["model=vae", "privacy.epsilon=null"], "privacy.epsilon must be null where"),
        (["model=vae", "privacy.delta=null"], "privacy.delta must be a value"),
        (["model=vae", "privacy.sampling_rate=0"], r"privacy.sampling_rate must be in \(0, 1\]"),
    ],
)
def test_impossible_privacy_is_named(words: list[str], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        load_config(["privacy=dp_sgd", *words])


def test_models_that_mix_patients_are_refused() -> None:
    gan = initial_generator(load_config(["model=stylegan2_ada_tiny", "data.image_size=32"]))
    with pytest.raises(ValueError, match="it takes one optimizer"):
        check_private(gan, gan.optimizers(0.1))
    classifier = initial_generator(load_config(["model=classifier", "model.network=small"]))
    with pytest.raises(ValueError, match="batch normalization, which mixes"):
        check_private(classifier, classifier.optimizers(0.1))


@pytest.mark.parametrize(
    ("number", "error", "said"),
    [
        (10_000, TooManyPatientsError, "privacy.delta must be below 1 / 10000"),
        (4, ValueError, "privacy.sampling_rate must be at least 1 / 4"),
    ],
)
def test_hospitals_that_a_run_does_not_suit_are_refused(
    number: int, error: type[Exception], said: str
) -> None:
    config: Config = PRIVATE
    with pytest.raises(error, match=said):
        check_patients(number, config)
    check_patients(100, config)
