"""The networks against loops over images, channels and pixels."""

import math

import pytest
import torch
from torch import Tensor

from task.generators.stylegan2_ada.networks import (
    Discriminator,
    EqualizedConv,
    EqualizedLinear,
    ModulatedConv,
    StyleNetwork,
    blur,
    with_batch_deviation,
)

ARGUMENTS = {
    "image_size": 16,
    "channels": 3,
    "num_classes": 4,
    "latent_dim": 12,
    "mapping_layers": 2,
    "channel_base": 64,
    "channel_max": 8,
}


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


def correlate(image: Tensor, kernel: Tensor) -> Tensor:
    """Slide a kernel, [O, I, k, k], over an image, [I, H, W], without padding, pixel by pixel."""
    size = kernel.shape[-1]
    height, width = (length - size + 1 for length in image.shape[1:])
    rows = [
        torch.stack(
            [(image[:, y : y + size, x : x + size] * kernel).sum((1, 2, 3)) for x in range(width)],
            1,
        )
        for y in range(height)
    ]
    return torch.stack(rows, 1)


def padded(image: Tensor, margin: int) -> Tensor:
    channels, height, width = image.shape
    result = torch.zeros(channels, height + 2 * margin, width + 2 * margin)
    result[:, margin : margin + height, margin : margin + width] = image
    return result


def filtered(image: Tensor, margin: int, gain: float = 1.0) -> Tensor:
    taps = torch.tensor([1.0, 3.0, 3.0, 1.0]) / 8
    kernel = torch.outer(taps, taps) * gain
    planes = [correlate(plane[None], kernel[None, None]) for plane in padded(image, margin)]
    return torch.cat(planes)


def naive_modulated_conv(layer: ModulatedConv, x: Tensor, w: Tensor) -> Tensor:
    """Make a kernel for each image, and convolve it alone."""
    images = []
    for image, style in zip(x, layer.style(w), strict=True):
        kernel = layer.weight * layer.gain * style[None, :, None, None]
        if layer.demodulate:
            kernel = torch.stack([each / (each.square().sum() + 1e-8).sqrt() for each in kernel])
        if layer.up:
            # The image with zeros between its pixels; a transposed kernel is a turned one.
            apart = torch.zeros(image.shape[0], *(2 * n - 1 for n in image.shape[1:]))
            apart[:, ::2, ::2] = image
            convolved = correlate(padded(apart, 2), kernel.flip(2, 3))
            images.append(filtered(convolved, 1, gain=4))
        else:
            images.append(correlate(padded(image, kernel.shape[-1] // 2), kernel))
    return torch.stack(images) * layer.output_gain


@pytest.mark.parametrize(
    ("size", "options"),
    [
        (3, {}),
        (3, {"gain": 1.5}),
        (3, {"up": True}),
        (1, {"demodulate": False}),
        (3, {"demodulate": False, "up": True}),
    ],
)
def test_modulated_conv_is_a_kernel_for_each_image(size: int, options: dict[str, bool]) -> None:
    layer = ModulatedConv(5, 4, size, 6, **options)
    x, w = torch.randn(3, 5, 6, 6), torch.randn(3, 6)
    torch.testing.assert_close(layer(x, w), naive_modulated_conv(layer, x, w))


def test_demodulated_outputs_have_unit_variance_whatever_the_style() -> None:
    layer = ModulatedConv(32, 64, 3, 8)
    outputs = layer(torch.randn(8, 32, 16, 16), 10 * torch.randn(8, 8))
    assert outputs[:, :, 1:-1, 1:-1].var().item() == pytest.approx(1, rel=0.05)


@pytest.mark.parametrize("size", [1, 3])
def test_halving_conv_blurs_and_takes_every_other_pixel(size: int) -> None:
    layer = EqualizedConv(3, 4, size, down=True, activated=False)
    x = torch.randn(2, 3, 8, 8)
    whole = [
        correlate(filtered(image, 1 + size // 2), layer.weight * layer.gain)[:, ::2, ::2]
        for image in x
    ]
    outputs = layer(x)
    assert outputs.shape == (2, 4, 4, 4)
    torch.testing.assert_close(outputs, torch.stack(whole))


def test_blur_keeps_what_is_constant() -> None:
    x = torch.full((1, 2, 8, 8), 3.0)
    torch.testing.assert_close(blur(x, padding=1)[:, :, 1:-1, 1:-1], x[:, :, :5, :5])


def test_activated_layers_keep_the_root_mean_square() -> None:
    x = torch.randn(4096, 64)
    for layer in (EqualizedLinear(64, 64, activated=True), EqualizedLinear(64, 64)):
        assert layer(x).square().mean().item() == pytest.approx(1, rel=0.1)
    slow = EqualizedLinear(64, 64, lr_multiplier=0.01, activated=True)
    assert slow(x).square().mean().item() == pytest.approx(1, rel=0.1)


def naive_batch_deviation(x: Tensor, group_size: int) -> Tensor:
    size = min(group_size, len(x))
    planes = []
    for number in range(len(x)):
        first = number // size * size
        group = torch.stack([x[place % len(x)] for place in range(first, first + size)])
        deviations = ((group - group.mean(0)).square().mean(0) + 1e-8).sqrt()
        planes.append(torch.full_like(x[:1, :1], deviations.mean().item()))
    return torch.cat([x, torch.cat(planes)], 1)


@pytest.mark.parametrize("number", [1, 2, 4, 5, 7, 8])
def test_batch_deviation_is_that_of_each_group(number: int) -> None:
    x = torch.randn(number, 3, 4, 4)
    torch.testing.assert_close(with_batch_deviation(x, 4), naive_batch_deviation(x, 4))


def test_batch_deviation_of_equal_images_is_nothing() -> None:
    x = torch.randn(1, 3, 4, 4).expand(4, -1, -1, -1)
    assert with_batch_deviation(x, 4)[:, 3].max() < 1.1e-4


@pytest.mark.parametrize("image_size", [8, 16, 64])
def test_generator_draws_images_of_a_size_that_the_discriminator_takes(image_size: int) -> None:
    arguments = {**ARGUMENTS, "image_size": image_size}
    network, labels = StyleNetwork(**arguments), torch.tensor([0, 3])
    styles = network.styles(torch.randn(2, 12), labels)
    images = network(styles, torch.randn(2, network.noise_length))
    assert images.shape == (2, 3, image_size, image_size)
    assert network.num_styles == 2 * (int(math.log2(image_size)) - 1)
    assert Discriminator(**arguments, group_size=4)(images, labels).shape == (2,)


def test_every_style_and_every_noise_reaches_the_image() -> None:
    network = StyleNetwork(**ARGUMENTS)
    for conv in network.convs:
        torch.nn.init.constant_(conv.noise_strength, 0.5)
    styles = network.styles(torch.randn(1, 12), torch.tensor([1])).detach().requires_grad_()
    noise = torch.randn(1, network.noise_length, requires_grad=True)
    network(styles, noise).square().sum().backward()
    assert (styles.grad.abs().sum(2) > 0).all()
    assert (noise.grad != 0).float().mean() > 0.99


def test_classes_draw_and_are_judged_apart() -> None:
    network, discriminator = StyleNetwork(**ARGUMENTS), Discriminator(**ARGUMENTS, group_size=1)
    z, labels = torch.randn(1, 12).expand(4, -1), torch.arange(4)
    noise = torch.randn(1, network.noise_length).expand(4, -1)
    images = network(network.styles(z, labels), noise)
    assert (images[0] - images[1]).abs().max() > 1e-3
    logits = discriminator(images[:1].expand(4, -1, -1, -1), labels)
    assert len(set(logits.tolist())) == 4


def test_mixed_styles_are_those_of_the_other_latent_from_the_crossover_on() -> None:
    network, labels = StyleNetwork(**ARGUMENTS), torch.tensor([0, 1, 2])
    z, other = torch.randn(2, 3, 12)
    crossover = torch.tensor([1, 4, network.num_styles])
    mixed = network.styles(z, labels, other=other, crossover=crossover)
    first, second = network.styles(z, labels), network.styles(other, labels)
    for number, place in enumerate(crossover):
        torch.testing.assert_close(mixed[number, :place], first[number, :place])
        torch.testing.assert_close(mixed[number, place:], second[number, place:])
