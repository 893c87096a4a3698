"""The network against the paper's own description of it, written down a second time."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from task.config import Config, load_config
from task.generators.diffusion.generator import build_diffusion
from task.generators.diffusion.network import FourierFeatures, UNet

RELEASED = ["model=feddm", "data=cifar10"]
TINY = ["model=tiny", "data=digits"]


def build_unet(config: Config) -> UNet:
    network = build_diffusion(config).network
    assert isinstance(network, UNet)
    return network


def load_by_position(model: nn.Module, weights: dict[str, Tensor]) -> None:
    """Load weights whose names differ and whose order does not."""
    names = model.state_dict()
    model.load_state_dict(dict(zip(names, weights.values(), strict=True)))


def seeded_unet(overrides: list[str], seed: int = 0) -> UNet:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return build_unet(load_config(overrides)).eval()


def count(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def inputs(num: int, channels: int, size: int) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    x_t = torch.randn(num, channels, size, size, generator=generator)
    log_snr = torch.linspace(-10, 9, num)
    return x_t, log_snr, torch.arange(num) % 10


class Sum(nn.Module):
    def __init__(self, main: nn.Module, other: nn.Module):
        super().__init__()
        self.first, self.second = main, other

    def forward(self, x: Tensor) -> Tensor:
        total: Tensor = self.first(x) + self.second(x)
        return total


class Beside(nn.Module):
    """The inner path of one level, put before what came in."""

    def __init__(self, *inner: nn.Module):
        super().__init__()
        self.inner = nn.Sequential(*inner)

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat((self.inner(x), x), dim=1)


def r(a: int, m: int, b: int) -> nn.Module:
    convolutions = nn.Conv2d(a, m, 3, 1, 1), nn.Conv2d(m, b, 3, 1, 1)
    main = nn.Sequential(convolutions[0], nn.ReLU(), convolutions[1], nn.ReLU())
    return Sum(main, nn.Sequential() if a == b else nn.Conv2d(a, b, 1, bias=False))


class ReleasedNetwork(nn.Module):
    """The list of paper.md for c = 64, resolution by resolution, in eval mode."""

    def __init__(self) -> None:
        super().__init__()
        self.frequencies = nn.Parameter(torch.randn(8, 1) / 5)
        self.classes = nn.Embedding(10, 4)
        pool, up = nn.AvgPool2d(2), nn.Upsample(scale_factor=2)
        at_4 = [pool, r(256, 512, 512), r(512, 512, 512), r(512, 512, 512), r(512, 512, 256), up]
        at_8 = [pool, r(128, 256, 256), r(256, 256, 256), Beside(*at_4)]
        at_8 += [r(512, 256, 256), r(256, 256, 128), up]
        at_16 = [pool, r(64, 128, 128), r(128, 128, 128), Beside(*at_8)]
        at_16 += [r(256, 128, 128), r(128, 128, 64), up]
        at_32 = [r(23, 64, 64), r(64, 64, 64), Beside(*at_16), r(128, 64, 64), r(64, 64, 3)]
        self.net = nn.Sequential(*at_32)

    def forward(self, x: Tensor, log_snr: Tensor, labels: Tensor) -> Tensor:
        angles = 2 * torch.pi * log_snr.view(-1, 1) @ self.frequencies.T
        plane = torch.ones(1, 1, *x.shape[2:])
        parts = [self.classes(labels), angles.cos(), angles.sin()]
        planes = (part[..., None, None] * plane for part in parts)
        output: Tensor = self.net(torch.cat([x, *planes], 1))
        return output


def test_unet_equals_released_network_loaded_by_position() -> None:
    oracle, model = ReleasedNetwork(), seeded_unet(RELEASED)
    load_by_position(model, oracle.state_dict())
    with torch.no_grad():
        torch.testing.assert_close(model(*inputs(2, 3, 32)), oracle(*inputs(2, 3, 32)))


def test_unet_has_released_number_of_parameters_and_no_buffers() -> None:
    model = seeded_unet(RELEASED)
    assert count(model) == 23_211_315
    assert list(model.state_dict()) == [name for name, _ in model.named_parameters()]


@pytest.mark.parametrize("data", ["cifar10", "svhn", "fashion_mnist", "mnist"])
def test_paper_preset_is_the_released_network_for_all_of_its_data(data: str) -> None:
    config = load_config(["experiment=paper", f"data={data}"])
    with torch.device("meta"):
        assert count(build_unet(config)) == 23_211_315
    gray = load_config(["experiment=paper", f"data={data}", "data.channels=1"])
    assert gray.data.channels == 1


def test_unet_tiny_is_tiny() -> None:
    assert count(seeded_unet(TINY)) == 840_753


@pytest.mark.parametrize(
    ("channels", "size", "num_poolings", "bottom_blocks"), [(1, 8, 1, 2), (3, 24, 3, 5)]
)
def test_unet_keeps_shape(channels: int, size: int, num_poolings: int, bottom_blocks: int) -> None:
    model = seeded_unet(
        [
            *TINY,
            "model.width=8",
            f"data.channels={channels}",
            f"model.num_poolings={num_poolings}",
            f"model.bottom_blocks={bottom_blocks}",
        ]
    )
    x_t, log_snr, labels = inputs(3, channels, size)
    assert model(x_t, log_snr, labels).shape == x_t.shape


def test_unet_final_relu_is_only_difference_of_final_relu() -> None:
    batch = inputs(4, 1, 16)
    with_relu = seeded_unet([*TINY, "model.final_relu=true"])
    without = seeded_unet([*TINY, "model.final_relu=false"])
    load_by_position(without, with_relu.state_dict())
    main: dict[str, Tensor] = {}
    last_main = without.get_submodule("up.1.1.main")
    last_main.register_forward_hook(lambda *call: main.update(out=call[2]))
    expected = with_relu(*batch)
    difference = expected - without(*batch)
    assert main["out"].min() < 0
    torch.testing.assert_close(difference, (-main["out"]).relu())


def test_unet_last_dropout_is_left_out() -> None:
    model = seeded_unet(RELEASED)
    dropouts = [name for name, module in model.named_modules() if isinstance(module, nn.Dropout2d)]
    assert len(dropouts) == 2 * 16 - 1
    assert "up.2.1.main.4" not in dropouts


def test_unet_null_label_is_one_row_more() -> None:
    plain = seeded_unet(TINY)
    guided = seeded_unet([*TINY, "diffusion.label_dropout=0.1"])
    assert (plain.null_label, guided.null_label, guided.num_classes) == (None, 10, 10)
    assert count(guided) - count(plain) == 4
    x_t, log_snr, labels = inputs(2, 1, 16)
    assert guided(x_t, log_snr, torch.full_like(labels, 10)).isfinite().all()


def test_build_unet_follows_the_caller_seed() -> None:
    first, again, other = seeded_unet(TINY), seeded_unet(TINY), seeded_unet(TINY, seed=1)
    pairs = zip(first.parameters(), again.parameters(), strict=True)
    assert all(torch.equal(one, two) for one, two in pairs)
    assert not torch.equal(first.class_embedding.weight, other.class_embedding.weight)


def test_fourier_features_stay_float32_under_autocast() -> None:
    features, log_snr = FourierFeatures(16), torch.linspace(-10, 9, 50)
    expected = features(log_snr)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(features(log_snr), expected)
    assert expected.dtype == torch.float32
    torch.testing.assert_close(expected[:, :8] ** 2 + expected[:, 8:] ** 2, torch.ones(50, 8))


def test_unet_compiles_without_graph_breaks() -> None:
    model, batch = seeded_unet(TINY), inputs(2, 1, 16)
    compiled: Callable[..., Tensor] = torch.compile(model, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(*batch), model(*batch))


def test_unet_channels_last_changes_nothing() -> None:
    model, (x_t, log_snr, labels) = seeded_unet(TINY), inputs(2, 1, 16)
    expected = model(x_t, log_snr, labels)
    model.to(memory_format=torch.channels_last)
    actual = model(x_t.contiguous(memory_format=torch.channels_last), log_snr, labels)
    torch.testing.assert_close(actual, expected)


@pytest.mark.parametrize("shape", [(1, 1, 16, 18), (1, 3, 16, 16)])
def test_unet_rejects_images_it_cannot_take(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"x_t must be \[N, 1, H, W\].* divisible by 4"):
        seeded_unet(TINY)(torch.zeros(shape), torch.zeros(1), torch.zeros(1, dtype=torch.int64))
