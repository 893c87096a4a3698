"""Batch statistics adaptation: what is trained, what leaves a client, and its loss."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from task.config import load_config
from task.efficientnet import pretrained_file
from task.generators.base import Batch
from task.generators.registry import build_generator, initial_generator, weightless_generator
from task.generators.resnet_gan import ResNetGAN, ResNetGenerator
from task.generators.small_gan import (
    AdaptationLoss,
    SmallGAN,
    fit_pretrained,
    latent_distances,
    truncated,
)
from task.protocol.wire import WeightLayout

SHAPE = (1, 16, 16)
WEIGHTS = {"latent_noise": 0.01, "latent_weight": 0.1, "regularization_weight": 0.02}


def rng(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.fixture
def pretrained(tmp_path: Path) -> Path:
    """The folder of a run of model=resnet_gan with three classes."""
    torch.manual_seed(5)
    gan = ResNetGAN(
        SHAPE, width=2, latent_dim=8, num_classes=3, discriminator_steps=1, ema_decay=0.9
    )
    for name, each in gan.generator_ema.named_parameters():
        if name.endswith(("gain", "bias")):
            each.normal_(generator=rng(1))
    save_file(gan.state_dict(), tmp_path / "model.safetensors")
    return tmp_path


def small(pretrained: Path | None, num_classes: int = 2, **changes: Any) -> SmallGAN:
    options = {"width": 2, "latent_dim": 8, "truncation": 0.3, "loss": AdaptationLoss(**WEIGHTS)}
    options |= changes
    path = "" if pretrained is None else str(pretrained)
    return SmallGAN(SHAPE, num_classes=num_classes, pretrained=path, **options)


def ready(pretrained: Path, num_images: int = 4, **changes: Any) -> SmallGAN:
    model = small(pretrained, **changes)
    model.load_frozen()
    model.prepare(num_images)
    return model.train()


def batch(indices: list[int], **part: int) -> Batch:
    images = torch.rand(10, *SHAPE, generator=rng(7)) * 2 - 1
    return Batch(images[indices], torch.tensor(indices) % 2, torch.tensor(indices), **part)


def fit(model: SmallGAN, num_steps: int, lr: float = 0.03) -> list[float]:
    draws, adam, seen = rng(), model.optimizers(lr)["adam"], []
    for _ in range(num_steps):
        [(name, losses)] = model.losses(batch([0, 1, 2, 3]), draws)
        assert name == "adam"
        adam.zero_grad()
        losses.mean().backward()
        adam.step()
        seen.append(float(losses.detach().mean()))
    return seen


def test_11904_numbers_are_trained_and_travel() -> None:
    words = ["model=small_gan", "data=cifar10", "data.image_size=128", "data.horizontal_flip=false"]
    words += ["model.pretrained=/elsewhere"]
    shared = weightless_generator(load_config([*words, "model.class_conditional=false"]))
    by_class = weightless_generator(load_config(words))
    assert (shared.num_parameters, by_class.num_parameters) == (11_904, 119_040)


def test_only_scales_and_shifts_are_in_a_message(pretrained: Path) -> None:
    """The frozen part and the latents are left out, by value and by name."""
    model = ready(pretrained)
    before = {name: each.clone() for name, each in model.state_dict().items()}
    fit(model, 3)
    state = model.state_dict()
    kept = {name for name in state if name.startswith((*model.local, *model.frozen))}
    packed = WeightLayout.of(model, kept).pack(state).tobytes()
    expected = torch.cat([model.scale.detach().flatten(), model.shift.detach().flatten()])
    assert packed == expected.numpy().tobytes()
    assert len(packed) == 4 * model.num_parameters
    # What does not travel is what the file had, and what the client's own images made.
    changed = {name for name in state if not torch.equal(state[name], before[name])}
    assert changed == {"scale", "shift", "latents"}


def test_frozen_generator_draws_as_the_pretrained_mean_over_classes(pretrained: Path) -> None:
    model = small(pretrained, num_classes=5)
    model.load_frozen()
    file = pretrained / "model.safetensors"
    latents = torch.randn(4, 8, generator=rng())
    images = model.sample(torch.tensor([0, 1, 2, 4]), lambda: latents)
    # Nothing is adapted yet, so all classes are alike.
    assert torch.equal(images, model.sample(torch.zeros(4, dtype=torch.int64), lambda: latents))
    gan = ResNetGAN(
        SHAPE, width=2, latent_dim=8, num_classes=3, discriminator_steps=1, ema_decay=0.9
    )
    gan.load_state_dict(load_file(file))
    source = gan.generator_ema
    for name, each in source.named_parameters():
        if name.endswith(("gain", "bias")) and each.dim() == 2:
            each.copy_(each.mean(0, keepdim=True).expand_as(each))
    expected = source.eval()(truncated(latents, 0.3), torch.zeros(4, dtype=torch.int64))
    torch.testing.assert_close(images, expected)


def test_a_file_and_its_run_are_the_same(pretrained: Path) -> None:
    models = [small(pretrained), small(pretrained / "model.safetensors")]
    for model in models:
        model.load_frozen()
    states = [model.state_dict() for model in models]
    assert all(torch.equal(each, states[1][name]) for name, each in states[0].items())


def test_loss_is_the_sum_of_its_parts(pretrained: Path) -> None:
    def features(images: Tensor) -> list[Tensor]:
        return [images[:, :, ::2], 3 * images]

    loss = AdaptationLoss(**WEIGHTS, perceptual_weight=0.5, features=features)
    model = ready(pretrained, num_images=10, loss=loss)
    with torch.no_grad():
        for each in (model.scale, model.shift, model.latents):
            assert each is not None
            each.normal_(generator=rng(3))
    given, same = batch([7, 1, 4]), rng(4)
    [(_, losses)] = model.losses(given, rng(4))
    assert model.latents is not None
    z = model.latents.detach()[given.indices]
    noise, prior = torch.randn(3, 8, generator=same), torch.randn(30, 8, generator=same)
    rows = [(model.scale[label], model.shift[label]) for label in given.labels]
    places = [16 * 2, 16 * 2, 16 * 2, 16 * 2, 8 * 2]
    assert sum(places) == model.scale.shape[1]
    scales, shifts = (
        torch.stack([row[which] for row in rows]).split(places, 1) for which in (0, 1)
    )
    drawn = model.base(z + 0.01 * noise, given.labels, list(zip(scales, shifts, strict=True)))
    difference = (drawn - given.images).abs()
    pixels = difference.mean((1, 2, 3))
    seen = 0.5 * (difference[:, :, ::2].mean((1, 2, 3)) + 3 * pixels)
    squared = torch.cdist(z, prior).square()
    apart = 0.1 * (squared.amin(1) + squared.amin(0).mean())
    regular = sum(
        (scale - 1).square().mean(1) + shift.square().mean(1)
        for scale, shift in zip(scales, shifts, strict=True)
    )
    torch.testing.assert_close(losses, pixels + seen + apart + 0.02 * regular)
    measured = model.measured()
    assert {*measured} == {*model.measures}
    torch.testing.assert_close(measured["reconstruction"].float(), (pixels + seen).mean())
    torch.testing.assert_close(measured["latent_distance"].float(), apart.mean() / 0.1)


def test_class_without_images_here_keeps_what_others_have_adapted(pretrained: Path) -> None:
    model = ready(pretrained)
    with torch.no_grad():
        model.scale.fill_(1.3)
        model.shift.fill_(0.3)
    adam, draws = model.optimizers(0.03)["adam"], rng()
    for _ in range(5):
        given = batch([0, 2])
        assert given.labels.tolist() == [0, 0]
        [(_, losses)] = model.losses(given, draws)
        adam.zero_grad()
        losses.mean().backward()
        adam.step()
    assert model.scale[1].eq(1.3).all() and model.shift[1].eq(0.3).all()
    assert not model.scale[0].eq(1.3).any()


def test_processes_compute_their_part_of_the_same_losses(pretrained: Path) -> None:
    model = ready(pretrained, num_images=10)
    whole, *parts = (
        next(model.losses(batch([5, 0, 3, 2], **part), rng()))[1]
        for part in ({}, {"rank": 0, "num_processes": 2}, {"rank": 1, "num_processes": 2})
    )
    torch.testing.assert_close(torch.cat(parts), whole)


def test_it_learns_to_draw_its_images(pretrained: Path) -> None:
    loss = AdaptationLoss(latent_noise=0.0, latent_weight=0.0, regularization_weight=0.0)
    losses = fit(ready(pretrained, loss=loss), 150)
    assert losses[-1] < 0.8 * losses[0]


def test_same_seed_gives_the_same_weights(pretrained: Path) -> None:
    first, second = ready(pretrained), ready(pretrained)
    fit(first, 3)
    fit(second, 3)
    assert all(
        torch.equal(each, second.state_dict()[name]) for name, each in first.state_dict().items()
    )


def test_latents_and_draws_are_compared_both_ways() -> None:
    latents = torch.tensor([[0.0, 0.0], [3.0, 4.0]])
    prior = torch.tensor([[0.0, 1.0], [3.0, 4.0], [3.0, 5.0]])
    # To the nearest draw: 1 and 0; of the draws to the nearest latent: 1, 0 and 1.
    expected = torch.tensor([1.0, 0.0]) + 2 / 3
    torch.testing.assert_close(latent_distances(latents, prior), expected)


def test_truncated_noise_has_the_distribution_that_is_left() -> None:
    noise = torch.randn(200_000, generator=rng())
    drawn = truncated(noise, 1.0)
    kept = noise[noise.abs() < 1]
    quantiles = torch.linspace(0.05, 0.95, 19)
    torch.testing.assert_close(
        drawn.quantile(quantiles), kept[:100_000].quantile(quantiles), atol=0.015, rtol=0
    )
    extreme = truncated(torch.tensor([-40.0, 0.0, 40.0]), 0.3)
    torch.testing.assert_close(extreme, torch.tensor([-0.3, 0.0, 0.3]))


def test_what_is_drawn_from_needs_no_pretrained_file(pretrained: Path) -> None:
    trained = ready(pretrained)
    fit(trained, 2)
    held = {name: each for name, each in trained.state_dict().items() if name != "latents"}
    words = ("model.width=2", "model.latent_dim=8", "model.class_conditional=false")
    elsewhere = "model.pretrained=/nowhere"
    config = load_config(["model=small_gan", "data=digits", *words, elsewhere])
    model = build_generator(config)
    held["scale"], held["shift"] = held["scale"][:1], held["shift"][:1]
    model.load_state_dict(held)
    images = model.eval().sample(torch.tensor([4]), lambda: torch.zeros(1, 8))
    assert images.shape == (1, *SHAPE)


def test_training_begins_with_what_is_frozen(pretrained: Path) -> None:
    words = ("model.width=2", "model.latent_dim=8", "model.perceptual_weight=0")
    config = load_config(
        ["model=small_gan", "data=digits", *words, f"model.pretrained={pretrained}"]
    )
    model, drawing = initial_generator(config), build_generator(config)
    held = load_file(pretrained / "model.safetensors")["generator_ema.last.weight"]
    assert torch.equal(model.state_dict()["base.last.weight"], held)
    assert not torch.equal(drawing.state_dict()["base.last.weight"], held)


def test_training_before_the_file_is_read_is_refused(pretrained: Path) -> None:
    with pytest.raises(RuntimeError, match="load_frozen must be called"):
        small(pretrained).prepare(3)


@pytest.mark.parametrize(
    ("pretrained_as", "error", "expected"),
    [
        (None, ValueError, "model.pretrained must be a finished run of model=resnet_gan"),
        ("nowhere", FileNotFoundError, "there is no .*nowhere"),
        ("text.safetensors", ValueError, r"model\.pretrained must be a readable safetensors file"),
        ("other.safetensors", ValueError, r"whose tensors are named generator_ema\.\*"),
    ],
)
def test_files_that_are_no_generator_are_named(
    tmp_path: Path, pretrained_as: str | None, error: type[Exception], expected: str
) -> None:
    (tmp_path / "text.safetensors").write_text("no tensors")
    save_file({"weight": torch.zeros(2)}, tmp_path / "other.safetensors")
    path = None if pretrained_as is None else tmp_path / pretrained_as
    with pytest.raises(error, match=expected):
        small(path).load_frozen()


def test_another_file_than_that_of_the_run_is_refused(pretrained: Path) -> None:
    with pytest.raises(ValueError, match=r"model.pretrained must be the file of SHA-256 0000"):
        small(pretrained, pretrained_sha256="0" * 64).load_frozen()


def test_other_widths_are_named_with_their_shape(pretrained: Path) -> None:
    with pytest.raises(ValueError, match=r"of the same model.width.*of shape \(48,\), got \(32,\)"):
        small(pretrained, width=3).load_frozen()


def test_fitting_to_another_size_is_refused_before_anything_is_loaded() -> None:
    base = ResNetGenerator((1, 32, 32), width=2, latent_dim=8, num_classes=1)
    before = {name: each.clone() for name, each in base.state_dict().items()}
    other = ResNetGenerator(SHAPE, width=2, latent_dim=8, num_classes=1)
    with pytest.raises(ValueError, match=r"data.image_size"):
        fit_pretrained(base, other.state_dict(), "run")
    assert all(torch.equal(each, before[name]) for name, each in base.state_dict().items())


def test_perceptual_part_needs_its_package(
    pretrained: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("task.efficientnet.pretrained_file", lambda: None)
    loss = AdaptationLoss(**WEIGHTS, perceptual_weight=0.001)
    with pytest.raises(FileNotFoundError, match=r"or choose model\.perceptual_weight=0"):
        small(pretrained, loss=loss).load_frozen()


@pytest.mark.skipif(pretrained_file() is None, reason="the extra `pretrained` is not installed")
def test_perceptual_part_reaches_latents_and_leaves_the_weights_of_the_model(
    pretrained: Path,
) -> None:
    without = {"latent_noise": 0.0, "latent_weight": 0.0, "regularization_weight": 0.0}
    gradients = []
    for weight in (0.0, 0.001):
        loss = AdaptationLoss(**without, perceptual_weight=weight)
        model = ready(pretrained, loss=loss)
        assert {name.split(".")[0] for name in model.state_dict()} == {
            *("base", "scale", "shift", "latents")
        }
        [(_, losses)] = model.losses(batch([0, 1]), rng())
        losses.mean().backward()
        assert model.latents is not None and model.latents.grad is not None
        gradients.append(model.latents.grad)
    assert not torch.allclose(*gradients)
    assert gradients[1].isfinite().all()


def test_mirrored_images_are_refused() -> None:
    with pytest.raises(ValueError, match=r"data.horizontal_flip must be false with"):
        load_config(["model=small_gan", "model.pretrained=x", "data=cifar10"])
