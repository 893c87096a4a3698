"""How the two networks train each other."""

import copy
import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from task.config import load_config
from task.generators.base import Batch
from task.generators.registry import build_generator
from task.generators.stylegan2_ada.generator import (
    Adaptation,
    StyleGAN2ADA,
    path_lengths,
    r1_penalties,
)
from task.training.loop import FitOptions, fit

SMALL = [
    *("model=stylegan2_ada_tiny", "data=digits", "model.channel_base=64", "model.channel_max=8"),
    *("model.latent_dim=8", "train.batch_size=8", "model.path_length_weight=2.0"),
    "model.style_mixing=0.9",
]
OPTIONS = FitOptions(
    epochs=1, batch_size=8, horizontal_flip=False, precision="float32", channels_last=True
)


def small(*overrides: str) -> StyleGAN2ADA:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        generator = build_generator(load_config([*SMALL, *overrides]))
    assert isinstance(generator, StyleGAN2ADA)
    return generator


def batch_of(number: int = 8, rank: int = 0, num_processes: int = 1) -> Batch:
    images = torch.rand(number, 1, 16, 16, generator=torch.Generator().manual_seed(1)) * 2 - 1
    labels, indices = torch.arange(number) % 10, torch.arange(number)
    return Batch(images, labels, indices, rank, num_processes)


def trained(generator: StyleGAN2ADA, number: int, *, precision: str = "float32") -> StyleGAN2ADA:
    images = torch.randint(
        0, 256, (number, 1, 16, 16), generator=torch.Generator().manual_seed(2), dtype=torch.uint8
    )
    fit(
        generator,
        images,
        torch.arange(number) % 10,
        options=replace(OPTIONS, precision=precision),
        optimizers=generator.optimizers(0.0025),
        rng=torch.Generator().manual_seed(3),
    )
    return generator


def noise_of(generator: StyleGAN2ADA, number: int) -> Tensor:
    rng = torch.Generator().manual_seed(4)
    return torch.randn(number, *generator.noise_shape, generator=rng)


def test_r1_penalty_is_the_squared_gradient_of_each_image() -> None:
    discriminator, batch = small("model.deviation_group=1").discriminator, batch_of(3)

    def logits(images: Tensor) -> Tensor:
        return discriminator(images, batch.labels)

    jacobian = torch.autograd.functional.jacobian(logits, batch.images)
    expected = torch.stack([jacobian[n, n].square().sum() for n in range(3)])
    found = r1_penalties(discriminator, batch.images, batch.labels)
    torch.testing.assert_close(found, expected)
    assert (expected > 0).all()


class LinearDiscriminator(nn.Module):
    """<weight, image>, whose squared gradient is that of the weight."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.linspace(-1, 1, 16).view(1, 4, 4))

    def forward(self, images: Tensor, labels: Tensor) -> Tensor:
        return (images * self.weight).sum((1, 2, 3))


def test_r1_penalty_of_a_linear_discriminator_shrinks_its_weight() -> None:
    network = LinearDiscriminator()
    r1_penalties(network, torch.randn(2, 1, 4, 4), torch.zeros(2)).mean().backward()
    torch.testing.assert_close(network.weight.grad, 2 * network.weight.detach())


def test_path_length_is_the_norm_of_the_transposed_jacobian() -> None:
    network, labels = small().generator, torch.tensor([1, 5])
    z, noise = torch.randn(2, 8), torch.randn(2, network.noise_length)
    directions = torch.randn(2, 1, 16, 16)
    found = path_lengths(network, z, labels, noise=noise, directions=directions)
    styles = network.styles(z, labels).detach()
    for number in range(2):
        jacobian = torch.autograd.functional.jacobian(
            lambda s, n=number: network(s[None], noise[n : n + 1])[0], styles[number]
        )
        moved = torch.einsum("chw,chwsd->sd", directions[number], jacobian) / 16
        expected = moved.square().sum(1).mean().sqrt()
        torch.testing.assert_close(found[number], expected)


def test_path_length_penalty_has_a_gradient_in_every_convolution() -> None:
    network = small().generator
    z, noise = torch.randn(2, 8), torch.randn(2, network.noise_length)
    lengths = path_lengths(
        network, z, torch.tensor([0, 1]), noise=noise, directions=torch.randn(2, 1, 16, 16)
    )
    lengths.square().mean().backward()
    assert all(conv.conv.weight.grad.abs().sum() > 0 for conv in network.convs)


def test_probability_follows_the_sign_of_the_discriminator() -> None:
    adaptation = Adaptation()
    found = []
    # Mean signs at real images: 1, 0.75, 0.5, -1 and so on, against a target of 0.6.
    for share_above in (1.0, 0.875, 0.75, 0.0, 0.0, 1.0):
        signs = torch.ones(64)
        signs[round(share_above * 64) :] = -1
        for part in signs.split(16):
            adaptation.see(part)
        adaptation.adapt(target=0.6, kimg=0.64)
        found.append(round(adaptation.probability.item(), 6))
    assert found == [0.1, 0.2, 0.1, 0.0, 0.0, 0.1]


def test_probability_stays_at_most_one() -> None:
    adaptation = Adaptation()
    for _ in range(3):
        adaptation.see(torch.ones(64))
        adaptation.adapt(target=0.6, kimg=0.1)
    assert adaptation.probability.item() == 1


class ScriptedDiscriminator(nn.Module):
    """Says of real images what the script says, and 0 of drawn ones and in the generator's step."""

    def __init__(self, script: list[float]) -> None:
        super().__init__()
        self.logits = [logit for real in script for logit in (real, 0.0, 0.0)]

    def forward(self, images: Tensor, labels: Tensor) -> Tensor:
        return torch.full((len(images),), self.logits.pop(0))


def test_probability_changes_every_four_batches() -> None:
    generator = small("model.r1_gamma=0.0", "model.path_length_weight=0.0", "model.ada_kimg=0.32")
    # Means over four batches of 8: 0.5, 1, 0.75 and again 1.
    script = [1.0, 1.0, 1.0, -1.0, *[1.0] * 4, 1.0, 1.0, 1.0, 0.0, *[1.0] * 4]
    generator.discriminator = ScriptedDiscriminator(script)
    found, batch, rng = [], batch_of(), torch.Generator().manual_seed(0)
    for _ in script:
        assert len(list(generator.losses(batch, rng))) == 2
        found.append(round(generator.adaptation.probability.item(), 6))
    assert found == [*[0] * 7, *[0.1] * 4, *[0.2] * 4, 0.3]


def test_penalties_come_every_few_batches() -> None:
    generator, batch, rng = small(), batch_of(), torch.Generator().manual_seed(0)
    names = []
    for _ in range(17):
        names.append("".join(name[0] for name, _ in generator.losses(batch, rng)))
        generator.after_step()
    with_r1, plain, with_paths = "ddgg", "dg", "dgg"
    assert names == [
        with_r1,
        plain,
        plain,
        plain,
        *([with_paths, plain, plain, plain] * 3),
        with_r1,
    ]


def test_penalties_can_be_switched_off() -> None:
    generator = small("model.r1_gamma=0.0", "model.path_length_weight=0.0")
    losses = generator.losses(batch_of(), torch.Generator().manual_seed(0))
    assert [name for name, _ in losses] == ["discriminator", "generator"]
    for optimizer in generator.optimizers(0.1).values():
        assert optimizer.param_groups[0]["lr"] == 0.1


def test_adam_is_slowed_by_the_steps_of_the_penalties() -> None:
    optimizers = small().optimizers(0.0025)
    for name, share in {"generator": 4 / 5, "discriminator": 16 / 17}.items():
        group = optimizers[name].param_groups[0]
        assert group["lr"] == pytest.approx(0.0025 * share)
        assert group["betas"] == pytest.approx((0, 0.99**share))


def test_each_loss_changes_its_own_network() -> None:
    generator, rng = small(), torch.Generator().manual_seed(0)
    optimizers = generator.optimizers(0.01)
    networks = {"generator": generator.generator, "discriminator": generator.discriminator}
    for name, losses in generator.losses(batch_of(), rng):
        before = {each: copy.deepcopy(network.state_dict()) for each, network in networks.items()}
        optimizers[name].zero_grad()
        losses.mean().backward()
        optimizers[name].step()
        for each, network in networks.items():
            same = all(torch.equal(network.state_dict()[n], t) for n, t in before[each].items())
            assert same == (each != name)
    assert all(p.requires_grad for network in networks.values() for p in network.parameters())


def test_discriminator_learns_to_tell_images_of_one_color() -> None:
    generator, rng = small(), torch.Generator().manual_seed(0)
    optimizer, batch = generator.optimizers(0.01)["discriminator"], batch_of()
    losses = []
    for _ in range(20):
        _, loss = next(generator.losses(batch, rng))
        optimizer.zero_grad()
        loss.mean().backward()
        optimizer.step()
        losses.append(loss.mean().item())
    assert losses[-1] < losses[0] / 2


def test_it_learns_what_each_class_looks_like() -> None:
    """In class 0 the left half of an image is bright, in class 1 the right half."""
    generator = small(
        *("data.image_size=8", "model.channel_base=128", "model.channel_max=16"),
        *("model.latent_dim=16", "model.ema_kimg=0.1", "model.path_length_weight=0.0"),
    )
    rng, labels = torch.Generator().manual_seed(0), torch.arange(320) % 2
    images = torch.randint(0, 60, (320, 1, 8, 8), generator=rng, dtype=torch.uint8)
    images[labels == 0, :, :, :4] += 180
    images[labels == 1, :, :, 4:] += 180
    fit(
        generator,
        images,
        labels,
        options=replace(OPTIONS, epochs=5, batch_size=16),
        optimizers=generator.optimizers(0.005),
        rng=rng,
    )
    noise = noise_of(generator, 32)
    drawn = generator.sample(labels[:32], lambda: noise)
    contrast = drawn[..., :4].mean((1, 2, 3)) - drawn[..., 4:].mean((1, 2, 3))
    expected = 180 / 127.5
    assert contrast[::2].mean().item() == pytest.approx(expected, abs=0.4)
    assert contrast[1::2].mean().item() == pytest.approx(-expected, abs=0.4)


def test_several_processes_have_the_losses_of_one() -> None:
    def mean_loss(number: int) -> float:
        total = 0.0
        for rank in range(number):
            batch, rng = batch_of(8, rank, number), torch.Generator().manual_seed(5)
            name, losses = next(small().losses(batch, rng))
            assert name == "discriminator" and len(losses) == 8 // number
            total += batch.weight * losses.mean().item() / number
        return total

    assert mean_loss(2) == pytest.approx(mean_loss(1), rel=1e-5)


@pytest.mark.slow
def test_processes_agree_on_averages_and_probability() -> None:
    """Real processes, of which each sees half of a batch."""
    images = torch.randint(
        0, 256, (32, 1, 16, 16), generator=torch.Generator().manual_seed(2), dtype=torch.uint8
    )
    states = []
    for number in (1, 2):
        # The half of a batch whose paths are measured is another one with two processes.
        generator = small("model.path_length_weight=0.0", "model.ada_kimg=1.0")
        fit(
            generator,
            images,
            torch.arange(32) % 10,
            options=replace(OPTIONS, num_processes=number),
            optimizers=generator.optimizers(0.0025),
            rng=torch.Generator().manual_seed(3),
        )
        states.append(generator.state_dict())
    one, two = states
    assert one["adaptation.probability"] == two["adaptation.probability"]
    assert one["adaptation.num_batches"] == two["adaptation.num_batches"] == 4
    for name, tensor in one.items():
        torch.testing.assert_close(two[name], tensor, atol=2e-3, rtol=1e-2, msg=name)


def test_average_of_the_weights_follows_them_by_its_half_life() -> None:
    generator = small("model.ema_kimg=0.008", "model.ema_ramp=100.0")
    average, current = generator.generator_ema.constant, generator.generator.constant
    before = average.clone()
    with torch.no_grad():
        current += 1
    for _ in generator.losses(batch_of(), torch.Generator().manual_seed(0)):
        pass
    generator.after_step()  # 8 images are one half-life
    torch.testing.assert_close(average, before + 0.5)


def test_images_are_drawn_from_the_average_and_each_from_its_own_noise() -> None:
    generator = trained(small("model.ema_kimg=1.0"), 16)
    labels, noise = torch.tensor([0, 1, 2]), noise_of(generator, 3)
    counted: list[int] = []
    images = generator.sample(labels, lambda: noise, advance=counted.append)
    assert images.shape == (3, 1, 16, 16) and counted == [3]
    alone = generator.sample(labels[1:2], lambda: noise[1:2])
    torch.testing.assert_close(alone, images[1:2])
    with torch.no_grad():
        generator.generator.constant.zero_()
    assert torch.equal(generator.sample(labels, lambda: noise), images)


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_equal_seeds_give_equal_weights(precision: str) -> None:
    first, second = (trained(small(), 20, precision=precision).state_dict() for _ in range(2))
    assert all(torch.equal(tensor, second[name]) for name, tensor in first.items())
    assert all(tensor.isfinite().all() for tensor in first.values())


def test_counts_and_probability_stay_and_continue() -> None:
    generator = trained(small(), 40)
    assert {name for name in generator.state_dict() if name.startswith("adaptation.")} == {
        *("adaptation.probability", "adaptation.signs", "adaptation.num_batches"),
    }
    other = small()
    other.load_state_dict(generator.state_dict())
    other.start()
    rng = torch.Generator().manual_seed(0)
    # After 5 batches the next penalty of any kind is due at batch 8.
    assert [name for name, _ in other.losses(batch_of(), rng)] == ["discriminator", "generator"]
    # A twentieth of 0.04 kimg, of 2 kimg.
    assert other.half_life_share.item() == pytest.approx(0.04 * 0.05 / 2)


def test_half_life_of_the_average_grows_to_its_full_length_and_no_further() -> None:
    generator = small("model.ema_kimg=0.02", "model.ema_ramp=0.5")
    generator._batch_size = 8
    for expected in (0.2, 0.4, 0.6, 0.8, 1.0, 1.0):
        generator.after_step()
        assert generator.half_life_share.item() == pytest.approx(expected)


def test_measures_are_means_over_batches() -> None:
    generator = small()
    for _ in range(2):
        # So that neither round comes to a change of the probability.
        generator.adaptation.num_batches.zero_()
        generator.adaptation.signs.zero_()
        generator.start()
        generator.adaptation.probability.fill_(0.25)
        losses: list[dict[str, float]] = []
        rng = torch.Generator().manual_seed(0)
        for _ in range(3):
            losses.append({})
            for name, each in generator.losses(batch_of(), rng):
                # A penalty follows under the same name.
                losses[-1].setdefault(name, each.mean().item())
        measured = {name: value.item() for name, value in generator.measured().items()}
        assert measured.keys() == {*generator.measures}
        for network in ("discriminator", "generator"):
            mean = sum(each[network] for each in losses) / 3
            assert measured[f"{network}_loss"] == pytest.approx(mean)
        assert measured["augmentation_probability"] == 0.25
        signs, number = generator.adaptation.signs.tolist()
        assert measured["real_sign"] == pytest.approx(signs / number) and number == 24
    assert generator.why_diverged(measured) == ""


@pytest.mark.parametrize(
    ("name", "value", "expected"),
    [
        ("discriminator_loss", 1e-4, "tells all images apart"),
        ("discriminator_loss", math.nan, "discriminator_loss is nan"),
        ("generator_loss", math.inf, "generator_loss is inf"),
    ],
)
def test_divergence_is_named(name: str, value: float, expected: str) -> None:
    measures = {"discriminator_loss": 1.2, "generator_loss": 0.9, name: value}
    assert expected in small().why_diverged(measures)


def test_no_value_is_read_in_a_step(monkeypatch: pytest.MonkeyPatch) -> None:
    generator, rng, batch = small(), torch.Generator().manual_seed(0), batch_of()

    def refuse(*_: object) -> None:
        raise AssertionError("a GPU would be waited for")

    for name in ("item", "tolist", "__bool__", "__int__", "__float__", "__index__", "numpy"):
        monkeypatch.setattr(Tensor, name, refuse)
    for _ in range(5):
        assert [losses.shape for _, losses in generator.losses(batch, rng)]
        generator.after_step()


def test_only_trained_values_count_as_parameters() -> None:
    generator = small()
    networks = (generator.generator, generator.discriminator)
    assert generator.num_parameters == sum(p.numel() for n in networks for p in n.parameters())


@pytest.mark.parametrize(
    ("word", "expected"),
    [
        ("data.image_size=24", "data.image_size must be a power of 2"),
        ("model.style_mixing=1.5", "model.style_mixing must be in [0, 1]"),
        ("model.r1_gamma=-1.0", "model.r1_gamma must be >= 0"),
    ],
)
def test_what_the_networks_cannot_be_is_refused(word: str, expected: str) -> None:
    with pytest.raises(ValueError) as error:
        load_config([*SMALL, word])
    assert expected in str(error.value)


@pytest.mark.parametrize(
    ("preset", "size", "gamma"),
    [
        ("stylegan2_ada", 32, 0.01),
        ("stylegan2_ada_64", 64, 2e-4 * 64**2 / 32),
        ("stylegan2_ada_128", 128, 2e-4 * 128**2 / 32),
    ],
)
def test_presets_train_images_of_their_size(preset: str, size: int, gamma: float) -> None:
    words = [f"model={preset}", f"data.image_size={size}", "data=cifar10"]
    with torch.device("meta"):
        generator = build_generator(load_config(words))
    assert isinstance(generator, StyleGAN2ADA)
    assert generator.training_options.r1_gamma == pytest.approx(gamma)
    assert generator.training_options.ema_kimg == pytest.approx(10)
    assert generator.image_shape == (3, size, size)
