"""The GAN of residual blocks against singular values, its published shapes, and plain sums."""

import copy
import math

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from task.config import load_config
from task.generators.base import Batch
from task.generators.registry import build_generator, weightless_generator
from task.generators.resnet_gan import (
    ConditionalBatchNorm,
    ProjectionDiscriminator,
    ResNetGAN,
    ResNetGenerator,
    SpectralConv2d,
    SpectralNorm,
    block_channels,
    modulated_channels,
)

SHAPE = (1, 16, 16)


def small(num_classes: int = 3, seed: int = 0, **changes: float) -> ResNetGAN:
    options = {"width": 4, "latent_dim": 8, "discriminator_steps": 1, "ema_decay": 0.9} | changes
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return ResNetGAN(SHAPE, num_classes=num_classes, **options)  # type: ignore[arg-type]


def rng(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def batch(num: int = 6, rank: int = 0, num_processes: int = 1) -> Batch:
    images = torch.rand(num, *SHAPE, generator=rng(7)) * 2 - 1
    return Batch(images, torch.arange(num) % 3, torch.arange(num), rank, num_processes)


def step(model: ResNetGAN, rng: torch.Generator, num_steps: int = 1) -> None:
    optimizers = model.optimizers(1e-3)
    for _ in range(num_steps):
        for name, losses in model.losses(batch(), rng):
            optimizers[name].zero_grad()
            losses.mean().backward()
            optimizers[name].step()
        model.after_step()


@pytest.mark.parametrize(
    ("size", "factors"),
    [(32, [16, 16, 8, 4]), (64, [16, 16, 8, 4, 2]), (128, [16, 16, 8, 4, 2, 1])],
)
def test_blocks_double_the_start(size: int, factors: list[int]) -> None:
    assert block_channels(1, size) == factors


def test_modulated_channels_are_the_published_ones() -> None:
    assert modulated_channels(1, 128) == [16, 16, 16, 16, 8, 8, 4, 4, 2, 2, 1]
    assert 2 * sum(modulated_channels(64, 128)) == 11_904


def test_conditional_batch_norm_equals_that_of_torch_per_class() -> None:
    norm, plain = ConditionalBatchNorm(5, 3), nn.BatchNorm2d(5, affine=False)
    nn.init.normal_(norm.gain, generator=rng(1))
    nn.init.normal_(norm.bias, generator=rng(2))
    features, labels = torch.randn(7, 5, 4, 4, generator=rng()), torch.arange(7) % 3
    normal = plain(features)
    for place, label in enumerate(labels):
        expected = normal[place] * norm.gain[label, :, None, None] + norm.bias[label, :, None, None]
        torch.testing.assert_close(norm(features, labels)[place], expected)
    fresh = ConditionalBatchNorm(5, 3)
    fresh(features, labels)
    torch.testing.assert_close(fresh.mean, plain.running_mean)
    torch.testing.assert_close(fresh.variance, plain.running_var)


def test_generator_equals_its_blocks_written_down_again() -> None:
    torch.manual_seed(0)
    model = ResNetGenerator((3, 8, 8), width=2, latent_dim=4, num_classes=1).eval()
    z, labels = torch.randn(2, 4), torch.zeros(2, dtype=torch.int64)
    block = model.blocks[0]

    def up(x: Tensor) -> Tensor:
        return x.repeat_interleave(2, 2).repeat_interleave(2, 3)

    def normal(x: Tensor) -> Tensor:
        return x / (1 + 1e-5) ** 0.5

    start = model.linear(z).reshape(2, 32, 4, 4)
    hidden = block.conv1(up(normal(start).relu()))  # type: ignore[operator]
    hidden = block.conv2(normal(hidden).relu()) + block.skip(up(start))  # type: ignore[operator]
    expected = torch.tanh(model.last(normal(hidden).relu()))
    torch.testing.assert_close(model(z, labels), expected)


def test_modulation_of_ones_and_zeros_changes_nothing_and_others_do() -> None:
    model = small().generator.eval()
    z, labels = torch.randn(2, 8, generator=rng()), torch.tensor([0, 2])
    counts = modulated_channels(4, 16)
    same = [(torch.ones(2, count), torch.zeros(2, count)) for count in counts]
    torch.testing.assert_close(model(z, labels, same), model(z, labels))
    for place, count in enumerate(counts):
        other = list(same)
        other[place] = (torch.full((2, count), 1.5), torch.full((2, count), 0.2))
        assert not torch.allclose(model(z, labels, other), model(z, labels), atol=1e-4)


def test_spectral_norm_approaches_the_largest_singular_value() -> None:
    weight = torch.randn(6, 4, 3, 3, generator=rng())
    norm = SpectralNorm(6)
    for _ in range(300):
        norm(weight)
    expected = weight / torch.linalg.matrix_norm(weight.flatten(1), 2)
    torch.testing.assert_close(norm(weight), expected)
    # The average of several clients' vectors is shorter than 1.
    norm.eval()
    norm.vector *= 0.3
    torch.testing.assert_close(norm(weight), expected)


def test_spectral_norm_follows_in_training_alone() -> None:
    layer = SpectralConv2d(2, 3, 3)
    before = layer.norm.vector.clone()
    layer.eval()(torch.zeros(1, 2, 4, 4))
    assert torch.equal(layer.norm.vector, before)
    layer.train()(torch.zeros(1, 2, 4, 4))
    assert not torch.equal(layer.norm.vector, before)


def test_discriminator_is_linear_in_features_with_a_direction_for_each_class() -> None:
    torch.manual_seed(0)
    model = ProjectionDiscriminator(SHAPE, width=4, num_classes=3).eval()
    images, labels = batch().images, batch().labels
    features = model.blocks(images).relu().sum((2, 3))
    assert model.classes is not None
    embedded = model.classes.norm(model.classes.weight)[labels]
    expected = model.score(features)[:, 0] + (embedded * features).sum(1)
    torch.testing.assert_close(model(images, labels), expected)


def test_losses_are_the_hinge_ones_and_each_network_has_its_own() -> None:
    model = small().train()
    twin = copy.deepcopy(model)
    draws = rng()
    losses = model.losses(batch(), draws)
    name, of_discriminator = next(losses)
    assert name == "discriminator"
    latents = torch.randn(6, 8, generator=(same := rng()))
    both = torch.cat([batch().images, twin.generator(latents, batch().labels).detach()])
    real, fake = twin.discriminator(both, batch().labels.repeat(2)).chunk(2)
    expected = functional.relu(1 - real) + functional.relu(1 + fake)
    torch.testing.assert_close(of_discriminator, expected)
    of_discriminator.mean().backward()
    assert all(each.grad is None for each in model.generator.parameters())
    model.discriminator.zero_grad()
    name, of_generator = next(losses)
    assert name == "generator"
    drawn = twin.generator(torch.randn(6, 8, generator=same), batch().labels)
    torch.testing.assert_close(of_generator, -twin.discriminator(drawn, batch().labels))
    of_generator.mean().backward()
    assert all(each.grad is None for each in model.discriminator.parameters())
    assert any(each.grad is not None for each in model.generator.parameters())
    assert next(losses, None) is None
    assert all(each.requires_grad for each in model.discriminator.parameters())


def test_discriminator_takes_as_many_steps_as_asked() -> None:
    names = [name for name, _ in small(discriminator_steps=3).losses(batch(), rng())]
    assert names == ["discriminator"] * 3 + ["generator"]


def test_processes_draw_the_same_latents_and_use_their_part() -> None:
    drawn = []
    for part in (batch(), batch(rank=0, num_processes=2), batch(rank=1, num_processes=2)):
        drawn.append(small()._latents(part, rng()))
    assert torch.equal(drawn[0], torch.cat(drawn[1:]))


def test_moving_average_begins_with_short_memory() -> None:
    model = small(ema_decay=0.5)
    before = model.generator_ema.last.weight.clone()
    nn.init.ones_(model.generator.last.weight)
    model.after_step()
    torch.testing.assert_close(model.generator_ema.last.weight, before * 2 / 11 + 9 / 11)
    for _ in range(20):
        model.after_step()
    before = model.generator_ema.last.weight.clone()
    nn.init.zeros_(model.generator.last.weight)
    model.after_step()
    torch.testing.assert_close(model.generator_ema.last.weight, before * 0.5)


def test_what_says_how_long_was_trained_stays_small_among_the_weights() -> None:
    model = small(ema_decay=0.999)
    for number in range(1, 31):
        model.after_step()
        assert float(model.averaged_share) == pytest.approx(9 / (10 + number))
    model.averaged_share.fill_(0.0010001)
    model.after_step()
    assert float(model.averaged_share) == pytest.approx(0.001)


def test_same_seed_gives_the_same_weights() -> None:
    first, second, other = small(), small(), small()
    for model, seed in ((first, 1), (second, 1), (other, 2)):
        step(model, rng(seed), num_steps=2)
    states = [model.state_dict() for model in (first, second, other)]
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])
    assert any(not torch.equal(states[0][name], states[2][name]) for name in states[0])


def test_sampling_uses_the_moving_average_and_leaves_its_statistics() -> None:
    model = small().train()
    step(model, rng())
    before = {name: each.clone() for name, each in model.state_dict().items()}
    latents, advanced = torch.randn(2, 8, generator=rng()), []
    images = model.sample(torch.tensor([0, 1]), lambda: latents, advance=advanced.append)
    expected = copy.deepcopy(model.generator_ema).eval()(latents, torch.tensor([0, 1]))
    assert torch.equal(images, expected) and images.shape == (2, *SHAPE)
    assert advanced == [2] and images.abs().max() <= 1
    assert all(torch.equal(each, before[name]) for name, each in model.state_dict().items())


def test_it_measures_means_over_the_steps_since_it_was_asked() -> None:
    model = small(discriminator_steps=2)
    losses: dict[str, list[Tensor]] = {"discriminator": [], "generator": []}
    draws = rng()
    for _ in range(3):
        for name, each in model.losses(batch(), draws):
            losses[name].append(each.detach().mean())
    measured = model.measured()
    assert {*measured} == {*model.measures}
    for name, each in losses.items():
        torch.testing.assert_close(measured[f"{name}_loss"].float(), torch.stack(each).mean())
    assert -1 <= measured["real_sign"] <= 1
    model.start()
    assert model.measured() == {}


def test_a_discriminator_that_has_won_is_named() -> None:
    told = {"generator_loss": 1.0, "real_sign": 1.0}
    assert small().why_diverged({"discriminator_loss": 1.2, **told}) == ""
    assert "discriminator" in small().why_diverged({"discriminator_loss": 0.0, **told})
    infinite = {"discriminator_loss": math.inf, **told}
    assert small().why_diverged(infinite) == "discriminator_loss is inf"
    lost = {"discriminator_loss": 1.2, **told, "generator_loss": math.nan}
    assert small().why_diverged(lost) == "generator_loss is nan"


def test_it_trains_in_bfloat16() -> None:
    model = small()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        for _, losses in model.losses(batch(), rng()):
            assert losses.dtype == torch.float32 and losses.isfinite().all()
            losses.mean().backward()
    assert all(each.dtype == torch.float32 for each in model.state_dict().values())


@pytest.mark.parametrize("conditional", [True, False])
def test_labels_make_a_difference_where_asked(conditional: bool) -> None:
    asked = f"model.class_conditional={str(conditional).lower()}"
    config = load_config(["model=resnet_gan", "data=digits", "model.width=2", asked])
    model = build_generator(config)
    assert isinstance(model, ResNetGAN)
    for name, parameter in model.generator_ema.named_parameters():
        if name.endswith("gain"):
            nn.init.normal_(parameter, generator=rng(1))
    latents = torch.randn(1, 128, generator=rng()).expand(2, -1)
    first, second = model.eval().sample(torch.tensor([3, 8]), lambda: latents)
    assert torch.equal(first, second) is not conditional


def test_its_parameters_do_not_count_the_average() -> None:
    config = load_config(["model=resnet_gan", "data=cifar10"])
    model = weightless_generator(config)
    assert isinstance(model, ResNetGAN)
    trained = [*model.generator.parameters(), *model.discriminator.parameters()]
    assert model.num_parameters == sum(each.numel() for each in trained)


def test_sizes_that_blocks_do_not_reach_are_refused() -> None:
    with pytest.raises(ValueError, match=r"data.image_size must be one of 8, 16, .* got 24"):
        load_config(["model=resnet_gan", "data=cifar10", "data.image_size=24"])
