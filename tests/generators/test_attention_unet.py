"""The U-Net with attention against the package whose network it is, and the average drawn from."""

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from task.config import load_config
from task.generators.base import Batch
from task.generators.diffusion.attention_unet import (
    HEAD_CHANNELS,
    NUM_HEADS,
    AttentionUNet,
    FullAttention,
    LinearAttention,
    timesteps_of,
)
from task.generators.diffusion.generator import Diffusion, build_diffusion
from task.generators.diffusion.noise_schedule import log_snr, sigmoid_alphas_cumprod
from task.generators.diffusion.objective import loss_weights
from task.generators.registry import weightless_generator

SURVEY = ("model=attention_unet", "diffusion=survey")
SMALL = (
    *SURVEY,
    *("data=digits", "model.width=8", "model.width_multipliers=[1,2]"),
    *("diffusion.num_inference_steps=3", "diffusion.ema_decay=0.75"),
)


def small_network(*, channels: int = 3, class_conditional: bool = False) -> AttentionUNet:
    return AttentionUNet(
        channels=channels,
        num_classes=10,
        null_class=False,
        width=16,
        width_multipliers=[1, 2, 4],
        class_conditional=class_conditional,
        dropout=0.0,
    ).eval()


def small_diffusion(*overrides: str) -> Diffusion:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return build_diffusion(load_config([*SMALL, *overrides]))


def noise_levels(num: int) -> Tensor:
    return torch.linspace(-15, 9, num)


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (("model.class_conditional=false",), 35_711_491),
        ((), 35_711_491 + 10 * 256),
        (("diffusion.label_dropout=0.1",), 35_711_491 + 11 * 256),
    ],
)
def test_preset_has_the_number_of_parameters_of_the_package(
    overrides: Sequence[str], expected: int
) -> None:
    config = load_config([*SURVEY, "data=cifar10", *overrides])
    assert weightless_generator(config).num_parameters == expected


@pytest.mark.parametrize(
    ("width", "multipliers", "height"), [(64, (1, 2, 4, 8), 16), (16, (1, 2), 10)]
)
def test_outputs_and_gradients_equal_those_of_the_package(
    width: int, multipliers: tuple[int, ...], height: int
) -> None:
    package: Any = pytest.importorskip(
        "denoising_diffusion_pytorch", reason="the dependency group peers is not installed"
    )
    torch.manual_seed(0)
    theirs = package.Unet(dim=width, dim_mults=multipliers)
    ours = AttentionUNet(
        channels=3,
        num_classes=1,
        null_class=False,
        width=width,
        width_multipliers=multipliers,
        class_conditional=False,
        dropout=0.0,
    )
    # The modules are made in one order; the package's scales have one dimension more.
    pairs = zip(ours.state_dict().items(), theirs.state_dict().values(), strict=True)
    ours.load_state_dict({name: their.reshape(mine.shape) for (name, mine), their in pairs})
    x_t, levels = torch.randn(3, 3, height, 16), noise_levels(3)
    found = ours(x_t, levels, torch.zeros(3).long())
    expected = theirs(x_t, timesteps_of(levels))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    for output in (found, expected):
        output.square().mean().backward()
    for mine, their in zip(ours.parameters(), theirs.parameters(), strict=True):
        assert mine.grad is not None
        torch.testing.assert_close(mine.grad, their.grad.reshape(mine.shape), rtol=1e-2, atol=1e-4)


def test_sigmoid_schedule_and_weights_of_the_loss_equal_those_of_the_package() -> None:
    package: Any = pytest.importorskip(
        "denoising_diffusion_pytorch", reason="the dependency group peers is not installed"
    )
    theirs = package.GaussianDiffusion(package.Unet(dim=8, dim_mults=(1,)), image_size=8)
    found = sigmoid_alphas_cumprod(theirs.num_timesteps)
    torch.testing.assert_close(found.float(), theirs.alphas_cumprod, rtol=1e-4, atol=1e-8)
    survey = load_config([*SURVEY, "data=cifar10"]).diffusion
    assert survey is not None and theirs.objective == "pred_v"
    weights = loss_weights(found, survey.prediction_type, survey.loss_weighting)
    torch.testing.assert_close(weights.float(), theirs.loss_weight, rtol=1e-4, atol=1e-8)


def test_timesteps_of_the_sigmoid_schedule_are_those_that_were_noised_at() -> None:
    found = timesteps_of(log_snr(sigmoid_alphas_cumprod(1000)).float())
    torch.testing.assert_close(found, torch.arange(1000.0), rtol=0, atol=2e-3)


def test_every_noise_level_has_a_timestep() -> None:
    found = timesteps_of(torch.tensor([-torch.inf, -40.0, 0.0, 40.0, torch.inf]))
    torch.testing.assert_close(found, torch.tensor([999.0, 999.0, 499.0, -1.0, -1.0]))


def heads_of(attention: nn.Module, features: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return queries, keys and values, [N, heads, positions, channels], without the memories."""
    qkv = attention.to_qkv(attention.norm(features))  # type: ignore[operator]
    parts = qkv.flatten(2).transpose(1, 2).chunk(3, dim=2)
    queries, keys, values = (
        each.unflatten(2, (NUM_HEADS, HEAD_CHANNELS)).transpose(1, 2) for each in parts
    )
    return queries, keys, values


@torch.no_grad()
def test_full_attention_weighs_every_position_and_memory() -> None:
    torch.manual_seed(0)
    attention, features = FullAttention(8), torch.randn(2, 8, 2, 3)
    queries, keys, values = heads_of(attention, features)
    expected = torch.empty(2, NUM_HEADS, HEAD_CHANNELS, 6)
    for image in range(2):
        for head in range(NUM_HEADS):
            known = torch.cat([attention.memories[0, head], keys[image, head]])
            worth = torch.cat([attention.memories[1, head], values[image, head]])
            for place, query in enumerate(queries[image, head]):
                shares = (known @ query / HEAD_CHANNELS**0.5).softmax(0)
                expected[image, head, :, place] = shares @ worth
    expected = attention.output(expected.reshape(2, -1, 2, 3)) + features
    torch.testing.assert_close(attention(features), expected)


@torch.no_grad()
def test_linear_attention_sums_values_by_channel_of_the_keys() -> None:
    torch.manual_seed(0)
    attention, features = LinearAttention(8), torch.randn(2, 8, 2, 3)
    queries, keys, values = heads_of(attention, features)
    expected = torch.empty(2, NUM_HEADS, HEAD_CHANNELS, 6)
    for image in range(2):
        for head in range(NUM_HEADS):
            known = torch.cat([attention.memories[0, head].T, keys[image, head]]).softmax(0)
            worth = torch.cat([attention.memories[1, head].T, values[image, head]])
            for place, query in enumerate(queries[image, head]):
                shares = known @ query.softmax(0) / HEAD_CHANNELS**0.5
                expected[image, head, :, place] = shares @ worth
    expected = attention.output(expected.reshape(2, -1, 2, 3)) + features
    torch.testing.assert_close(attention(features), expected)


@torch.no_grad()
def test_labels_matter_where_the_network_is_class_conditional_alone() -> None:
    torch.manual_seed(0)
    x_t = torch.randn(1, 3, 8, 8).expand(2, -1, -1, -1)
    for class_conditional in (False, True):
        network = small_network(class_conditional=class_conditional)
        one, other = network(x_t, torch.zeros(2), torch.tensor([1, 2]))
        assert torch.allclose(one, other, atol=1e-6) != class_conditional


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_network_trains_in_channels_last_and_under_autocast(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    network, x_t = small_network(class_conditional=True), torch.randn(2, 3, 8, 12)
    arguments = (noise_levels(2), torch.tensor([1, 2]))
    expected = network(x_t, *arguments)
    network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
        found = network(x_t.to(memory_format=torch.channels_last), *arguments)
    assert found.dtype == dtype
    tolerance = 0.1 if dtype == torch.bfloat16 else 1e-4
    torch.testing.assert_close(found.float(), expected, rtol=tolerance, atol=tolerance)
    found.float().square().mean().backward()
    lacking = [name for name, each in network.named_parameters() if each.grad is None]
    assert lacking == []


@pytest.mark.parametrize("shape", [(1, 3, 10, 8), (1, 3, 8, 10), (1, 1, 8, 8)])
def test_images_that_do_not_fit_are_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"\[N, 3, H, W\] with H and W divisible by 4"):
        small_network()(torch.zeros(shape), torch.zeros(1), torch.zeros(1).long())


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (
            ("data=digits", "model.width_multipliers=[1,2,4,8,8,8]"),
            "data.image_size must be a multiple of 32",
        ),
        (
            ("data=cifar10", "model.class_conditional=false", "diffusion.label_dropout=0.1"),
            "diffusion.label_dropout must be 0 with model.class_conditional=false",
        ),
        (("data=cifar10", "diffusion.ema_decay=1"), "ema_decay"),
        (("data=cifar10", "model.width=7"), "model.width"),
    ],
)
def test_configurations_that_cannot_be_trained_are_refused(
    overrides: Sequence[str], words: str
) -> None:
    with pytest.raises(ValueError, match=words):
        load_config([*SURVEY, *overrides])


def test_it_trains_as_the_survey_did() -> None:
    config = load_config([*SURVEY, "experiment=paper", "run_name=x"])
    train = config.train
    assert (train.batch_size, train.accumulation) == (32, 2)
    assert (train.lr, train.clip_norm) == (8e-5, 1.0)
    # Others take steps on one batch, and on gradients of any size.
    others = load_config(["run_name=x"]).train
    assert (others.accumulation, others.clip_norm) == (1, None)
    words = ["train.accumulation=3", "train.clip_norm=null"]
    chosen = load_config([*SURVEY, *words, "run_name=x"]).train
    assert (chosen.accumulation, chosen.clip_norm) == (3, None)


def test_larger_images_train_and_are_drawn() -> None:
    generator = small_diffusion("data.image_size=128", "model.width_multipliers=[1,1,2,2]")
    rng = torch.Generator().manual_seed(0)
    labels = torch.arange(2)
    batch = Batch(torch.rand(2, 1, 128, 128, generator=rng) * 2 - 1, labels, labels)
    adam = generator.optimizers(1e-3)["adam"]
    before = {name: value.clone() for name, value in generator.network.state_dict().items()}
    ((_, losses),) = generator.losses(batch, rng)
    losses.mean().backward()
    adam.step()
    generator.after_step()
    after = generator.network.state_dict()
    assert losses.isfinite().all()
    assert any(not torch.equal(after[name], value) for name, value in before.items())
    drawn = generator.sample(labels, lambda: torch.randn(2, 1, 128, 128, generator=rng))
    assert drawn.shape == (2, 1, 128, 128) and drawn.isfinite().all()


def train(generator: Diffusion, steps: int) -> list[dict[str, Tensor]]:
    """Train on noise and return the network's weights after each step."""
    rng = torch.Generator().manual_seed(0)
    images, labels = torch.rand(4, 1, 8, 8) * 2 - 1, torch.arange(4)
    adam = generator.optimizers(1e-2)["adam"]
    after = []
    for _ in range(steps):
        ((_, losses),) = generator.losses(Batch(images, labels, labels), rng)
        adam.zero_grad()
        losses.mean().backward()
        adam.step()
        generator.after_step()
        after.append({k: v.clone() for k, v in generator.network.state_dict().items()})
    return after


def test_average_is_the_mean_of_the_steps_by_how_long_ago_they_were() -> None:
    generator = small_diffusion()
    steps = train(generator, 3)
    shares = torch.tensor([0.75**2, 0.75, 1.0]) / (0.75**2 + 0.75 + 1)
    assert generator.average is not None
    for name, found in generator.average.state_dict().items():
        expected = sum(share * step[name] for share, step in zip(shares, steps, strict=True))
        torch.testing.assert_close(found, expected)
    torch.testing.assert_close(generator.average_weight, torch.tensor([1 - 0.75**3]))


def test_average_travels_with_the_weights_and_goes_on_from_there() -> None:
    first, second = small_diffusion(), small_diffusion("seed=1")
    train(first, 2)
    second.load_state_dict({name: value.clone() for name, value in first.state_dict().items()})
    names = [*first.network.state_dict()]
    averages = [f"average.{name}" for name in names]
    assert sorted(first.state_dict()) == sorted([*names, *averages, "average_weight"])
    for generator in (first, second):
        torch.manual_seed(0)
        train(generator, 1)
    for name, value in first.state_dict().items():
        assert torch.equal(value, second.state_dict()[name]), name


def test_images_are_drawn_from_the_average() -> None:
    generator, labels = small_diffusion(), torch.arange(2)
    train(generator, 2)
    noise = torch.randn(2, 1, 8, 8)
    drawn = generator.sample(labels, lambda: noise)
    assert generator.average is not None
    generator.network.load_state_dict(generator.average.state_dict())
    generator.average = None
    assert torch.equal(generator.sample(labels, lambda: noise), drawn)


def test_optimizer_and_number_of_parameters_leave_the_average_out() -> None:
    with_average, without = small_diffusion(), small_diffusion("diffusion.ema_decay=null")
    assert with_average.num_parameters == without.num_parameters
    (group,) = with_average.optimizers(1e-3)["adam"].param_groups
    assert sum(each.numel() for each in group["params"]) == without.num_parameters
    assert not any(name.startswith("average") for name in without.state_dict())
