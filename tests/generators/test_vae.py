"""The variational autoencoder against likelihoods in closed form."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributions import Bernoulli, MultivariateNormal, Normal, kl_divergence

from task.config import load_config
from task.data import build_dataset, normalize
from task.generators.base import Batch, NoiseSource
from task.generators.registry import build_generator
from task.generators.vae import VAE, build_vae
from task.training.loop import fit, fit_options

SHAPE = (1, 2, 2)
# p(x | z) = N(x; WEIGHT z + BIAS, STD^2). Orthogonal columns: the posterior of z is diagonal.
WEIGHT = torch.tensor([[0.04, 0.03], [0.04, -0.03], [0.04, 0.03], [0.04, -0.03]])
BIAS = torch.tensor([0.3, 0.5, 0.6, 0.4])
STD = 0.1
MANY = 20_000


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


class LinearDecoder(nn.Module):
    def forward(self, latents: Tensor, labels: Tensor) -> Tensor:
        return (latents @ WEIGHT.T + BIAS).logit().unflatten(1, SHAPE)


class LinearEncoder(nn.Module):
    """The exact posterior, moved and stretched."""

    def __init__(self, moved: float = 0.0, log_stretch: float = 0.0) -> None:
        super().__init__()
        self.moved, self.log_stretch = moved, log_stretch

    def posterior(self, pixels: Tensor) -> Normal:
        variance = 1 / (1 + WEIGHT.square().sum(0) / STD**2)
        mean = variance / STD**2 * ((pixels.flatten(1) - BIAS) @ WEIGHT)
        return Normal(mean, variance.sqrt().expand_as(mean))

    def forward(self, pixels: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        exact = self.posterior(pixels)
        return exact.mean + self.moved, exact.variance.log() + self.log_stretch


def linear_vae(**changes: float) -> VAE:
    encoder = LinearEncoder(**changes)
    return VAE(
        encoder,
        LinearDecoder(),
        image_shape=SHAPE,
        latent_dim=2,
        class_conditional=False,
        pixel_std=STD,
    )


def small_vae(*words: str) -> VAE:
    """A network of a few thousand parameters, for images of 8x8 with 1 channel and 10 classes."""
    size = ("data.image_size=8", "model.hidden_dim=24", "model.latent_dim=4")
    torch.manual_seed(0)
    return build_vae(load_config(["model=vae", *size, *words]))


def random_batch(num: int = 6, **changes: Any) -> Batch:
    images = torch.rand(num, 1, 8, 8, generator=seeded()) * 2 - 1
    return Batch(images, torch.arange(num), torch.arange(num), **changes)


def drawing(num: int, model: VAE) -> NoiseSource:
    """The same latents at every call."""
    noise = torch.randn(num, *model.noise_shape, generator=seeded(1))
    return lambda: noise


@pytest.mark.parametrize("changes", [{}, {"moved": 0.7}, {"log_stretch": 1.0}])
def test_elbo_of_a_linear_gaussian_model_is_its_likelihood_less_the_gap(
    changes: dict[str, float],
) -> None:
    model = linear_vae(**changes)
    pixels = torch.tensor([0.35, 0.45, 0.7, 0.3]).view(1, *SHAPE)
    label = torch.zeros(MANY, dtype=torch.int64)
    batch = Batch((2 * pixels - 1).expand(MANY, *SHAPE), label, torch.arange(MANY))
    found = model.example_losses(batch, seeded())["loss"]
    covariance = WEIGHT @ WEIGHT.T + STD**2 * torch.eye(4)
    evidence = MultivariateNormal(BIAS, covariance).log_prob(pixels.flatten(1))
    mean, log_variance = model.encoder(pixels, label[:1])
    gap = kl_divergence(
        Normal(mean, (log_variance / 2).exp()), LinearEncoder().posterior(pixels)
    ).sum(1)
    assert (gap > 0.1).all() == bool(changes)
    four_errors = 4 * float(found.std()) / math.sqrt(MANY)
    torch.testing.assert_close(found.mean(), (gap - evidence)[0], atol=four_errors, rtol=0)
    assert four_errors < 0.05


def test_parts_are_the_likelihood_of_bits_and_the_divergence_from_the_prior() -> None:
    model, batch = small_vae(), random_batch()
    batch = Batch(batch.images.sign(), batch.labels, batch.indices)
    found = model.example_losses(batch, seeded())
    pixels = (batch.images + 1) / 2
    mean, log_variance = model.encoder(pixels, batch.labels)
    posterior = Normal(mean, (log_variance / 2).exp())
    torch.testing.assert_close(
        found["kl"], kl_divergence(posterior, Normal(0.0, 1.0)).sum(1), atol=1e-5, rtol=1e-4
    )
    latents = posterior.mean + posterior.stddev * torch.randn(6, 4, generator=seeded())
    decoded = Bernoulli(logits=model.decoder(latents, batch.labels))
    expected = -decoded.log_prob(pixels).flatten(1).sum(1)
    torch.testing.assert_close(found["reconstruction"], expected)
    assert tuple(found) == ("loss", *model.loss_parts)
    torch.testing.assert_close(found["loss"], found["reconstruction"] + found["kl"])


def test_it_has_the_numbers_of_parameters_of_its_layers() -> None:
    words = ["model=vae", "data=cifar10", "data.image_size=64", "model.class_conditional=false"]
    with torch.device("meta"):
        model = build_generator(load_config(words))
    pixels, hidden, latent = 12_288, 2048, 128
    there = pixels * hidden + hidden + hidden * 2 * latent + 2 * latent
    back = latent * hidden + hidden + hidden * pixels + pixels
    assert model.num_parameters == there + back == 51_134_720


@pytest.mark.parametrize("words", [[], ["model=conv_vae"], ["model.pixel_std=0.3"]])
def test_processes_together_compute_the_losses_of_one(words: list[str]) -> None:
    model = small_vae(*words)
    whole = model.example_losses(random_batch(), seeded())
    parts = [
        model.example_losses(random_batch(rank=rank, num_processes=4), seeded())
        for rank in range(4)
    ]
    for name, losses in whole.items():
        torch.testing.assert_close(torch.cat([part[name] for part in parts]), losses)


def test_measures_are_means_over_the_images_of_a_round() -> None:
    model = small_vae()
    for sizes in ((6, 2), (4,)):
        model.start()
        expected = [model.example_losses(random_batch(n), seeded(n)) for n in sizes]
        for num in sizes:
            [(name, losses)] = model.losses(random_batch(num), seeded(num))
            assert name in model.optimizers(lr=0.1) and losses.requires_grad
        measured = model.measured()
        assert tuple(measured) == model.measures
        for name, value in measured.items():
            mean = torch.cat([losses[name] for losses in expected]).double().mean()
            torch.testing.assert_close(value, mean.detach(), rtol=1e-5, atol=0)


@pytest.mark.parametrize("num", [6, 2])
def test_mean_over_processes_is_that_of_all_images(num: int) -> None:
    """Of two images, two of four processes have none of their own."""
    model = small_vae()
    expected = model.example_losses(random_batch(num), seeded())
    measured = []
    for rank in range(4):
        model.start()
        list(model.losses(random_batch(num, rank=rank, num_processes=4), seeded()))
        measured.append(model.measured())
    for name in model.measures:
        mean = torch.stack([each[name] for each in measured]).mean()
        torch.testing.assert_close(mean, expected[name].mean().double(), rtol=1e-5, atol=0)


@pytest.mark.parametrize("preset", ["vae", "conv_vae"])
def test_labels_matter_where_it_is_told_of_classes(preset: str) -> None:
    batch = random_batch()
    other = Batch(batch.images, batch.labels.flip(0), batch.indices)
    for conditional in (True, False):
        model = small_vae(f"model={preset}", f"model.class_conditional={conditional}".lower())
        for parameter in model.parameters():
            nn.init.normal_(parameter, std=0.1)
        for network in (model.encoder, model.decoder):
            assert (
                any("class_bias" in name for name, _ in network.named_parameters()) == conditional
            )
        losses = [model.example_losses(each, seeded())["loss"] for each in (batch, other)]
        assert torch.equal(*losses) != conditional
        drawn = [model.sample(each.labels, drawing(6, model)) for each in (batch, other)]
        assert torch.equal(*drawn) != conditional


@pytest.mark.parametrize("preset", ["vae", "conv_vae"])
def test_images_are_of_any_size_and_channels(preset: str) -> None:
    for size, channels in ((8, 3), (40, 1)):
        model = small_vae(f"model={preset}", f"data.image_size={size}", f"data.channels={channels}")
        told: list[int] = []
        labels = torch.arange(3)
        images = model.sample(labels, drawing(3, model), advance=told.append)
        assert images.shape == (3, channels, size, size)
        assert images.dtype == torch.float32
        assert -1 <= images.min() < images.max() <= 1
        assert told == [3]
        first = model.sample(labels[:1], drawing(1, model))
        torch.testing.assert_close(first, images[:1])


@pytest.mark.parametrize("words", [[], ["model=conv_vae"], ["model.pixel_std=0.3"]])
def test_losses_under_autocast_are_float32_and_nearly_the_same(words: list[str]) -> None:
    model = small_vae(*words)
    expected = model.example_losses(random_batch(), seeded())
    with torch.autocast("cpu", torch.bfloat16):
        found = model.example_losses(random_batch(), seeded())
    for name in ("loss", "reconstruction"):
        assert found[name].dtype == torch.float32
        torch.testing.assert_close(found[name], expected[name], rtol=0.02, atol=0)


@pytest.mark.parametrize(("preset", "epochs"), [("vae", 40), ("conv_vae", 12)])
def test_it_learns_digits_and_their_classes(preset: str, epochs: int) -> None:
    words = ["data=digits", "data.image_size=8", "train.batch_size=64", "train.precision=float32"]
    config = load_config([*words, f"train.local_epochs={epochs}"])
    dataset = build_dataset(config, download=False)
    model, rng = (
        small_vae(f"model={preset}", "model.hidden_dim=128", "model.pixel_std=0.2"),
        seeded(),
    )
    fit(
        model,
        dataset.train.images,
        dataset.train.labels,
        options=fit_options(config),
        optimizers=model.optimizers(lr=3e-3),
        rng=rng,
    )
    images, labels = normalize(dataset.test.images), dataset.test.labels
    found = model.example_losses(Batch(images, labels, torch.arange(len(images))), rng)
    means = torch.stack([images[labels == label].mean(0) for label in range(10)])
    # A decoder that ignores its latent can do no better than the mean image of each class.
    ignoring = -Normal((means[labels] + 1) / 2, 0.2).log_prob((images + 1) / 2).flatten(1).sum(1)
    assert found["reconstruction"].mean() < ignoring.mean() - 5
    assert found["loss"].mean() < ignoring.mean() - 2
    assert 1 < found["kl"].mean() < 20
    wanted = torch.arange(10).repeat(20)
    drawn = model.sample(wanted, drawing(200, model))
    nearest = torch.cdist(drawn.flatten(1), means.flatten(1)).argmin(1)
    assert (nearest == wanted).float().mean() > 0.6  # 0.1 if classes were not told apart


def unchanged(model: VAE) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


@pytest.mark.parametrize(
    "act",
    [
        lambda model: list(model.losses(random_batch(), seeded())),
        lambda model: model.measured(),
        lambda model: model.example_losses(random_batch(), seeded()),
    ],
)
def test_state_is_that_of_the_two_networks_alone(act: Callable[[VAE], object]) -> None:
    model = small_vae()
    before = unchanged(model)
    assert {name.split(".")[0] for name in before} == {"encoder", "decoder"}
    act(model)
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name])


def test_description_names_likelihood_and_whether_labels_are_read() -> None:
    found = small_vae().description()
    assert found["reconstruction"] == "cross-entropy, summed over pixels"
    assert found["class-conditional"] == "yes"
    found = small_vae("model.pixel_std=0.5", "model.class_conditional=false").description()
    assert "Gaussian, standard deviation 0.5" in str(found["reconstruction"])
    assert str(found["class-conditional"]).startswith("no")


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["model=conv_vae", "model.conv_channels=[4,4,4,4]", "data.image_size=24"],
         r"data\.image_size must be a multiple of 16 .*model\.conv_channels\), got 24"),
        (["model=conv_vae", "model.conv_channels=[4,0]"], r"model\.conv_channels must be .*0"),
        (["model=vae", "model.latent_dim=0"], r"model\.latent_dim must be > 0, got 0"),
        (["model=vae", "model.pixel_std=0"], r"model\.pixel_std must be > 0, or null, got 0"),
        (["model=vae", "model.width=8"], r"no such value: model\.width"),
    ],
)  # fmt: skip
def test_values_out_of_range_are_named(words: list[str], expected: str) -> None:
    with pytest.raises(ValueError, match=expected):
        load_config(words)


def test_other_families_and_restoration_are_refused() -> None:
    with pytest.raises(TypeError, match=r"model\.family=vae, got diffusion"):
        build_vae(load_config(["model=tiny"]))
    with pytest.raises(ValueError, match="such as diffusion, got a variational autoencoder"):
        small_vae().restoring()
