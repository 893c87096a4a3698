"""The networks of StyleGAN2: mapping, skip generator and residual discriminator.

Source: arXiv 1912.04958 (StyleGAN2), 2006.06676 (the conditional networks), 1710.10196 (equalized
learning rates, the standard deviation over a batch).
"""

import math
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn import functional as F

# Of the smallest feature maps, which hold a learned constant.
BASE_SIZE = 4
# About what a leaky ReLU takes off the root mean square of its inputs. Weights and biases bring it,
# which has the same effect as scaling the outputs, and takes no pass over them.
ACTIVATION_GAIN = math.sqrt(2)


def full_precision(device: torch.device) -> torch.autocast:
    """Return a context without autocast, for what bfloat16 is too coarse for."""
    return torch.autocast(device.type, enabled=False)


def activate(x: Tensor) -> Tensor:
    """Apply the activation function of all layers."""
    return F.leaky_relu(x, 0.2)


def normalize_second_moment(x: Tensor) -> Tensor:
    """Scale vectors, [N, D], to a mean square of 1."""
    return x * (x.square().mean(1, keepdim=True) + 1e-8).rsqrt()


def blur(x: Tensor, *, padding: int, stride: int = 1) -> Tensor:
    """Filter images, [N, C, H, W], by [1, 3, 3, 1] along both axes, with zeros around them."""
    taps = x.new_full((4,), 1 / 8)  # filled on the device, which a copy would wait for
    taps[1:3] = 3 / 8
    kernel = torch.outer(taps, taps).expand(x.shape[1], 1, 4, 4)
    return F.conv2d(x, kernel, padding=padding, stride=stride, groups=x.shape[1])


class EqualizedLinear(nn.Module):
    """A linear layer whose weights are scaled as they are used, so that all learn at one rate."""

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        bias: float = 0.0,
        lr_multiplier: float = 1.0,
        activated: bool = False,
    ) -> None:
        """Draw weights.

        Args:
            in_features: length of the inputs.
            out_features: length of the outputs.
            bias: every bias at first.
            lr_multiplier: of the layer's learning rate.
            activated: whether the activation function follows.
        """
        super().__init__()
        self.weight = nn.Parameter(torch.randn(out_features, in_features) / lr_multiplier)
        self.bias = nn.Parameter(torch.full((out_features,), bias / lr_multiplier))
        self.activated = activated
        self.bias_gain = lr_multiplier * (ACTIVATION_GAIN if activated else 1)
        self.gain = self.bias_gain / math.sqrt(in_features)

    def forward(self, x: Tensor) -> Tensor:
        """Map vectors, [N, D]."""
        x = F.linear(x, self.weight * self.gain, self.bias * self.bias_gain)
        return activate(x) if self.activated else x


class EqualizedConv(nn.Module):
    """A convolution whose weights are scaled as they are used; it may halve the images."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int,
        *,
        down: bool = False,
        activated: bool = True,
    ) -> None:
        """Draw weights.

        Args:
            in_channels: of the inputs.
            out_channels: of the outputs.
            kernel_size: odd.
            down: whether the images are blurred and halved.
            activated: whether a bias and the activation function follow.
        """
        super().__init__()
        self.weight = nn.Parameter(torch.randn(out_channels, in_channels, kernel_size, kernel_size))
        self.bias = nn.Parameter(torch.zeros(out_channels)) if activated else None
        self.gain = (ACTIVATION_GAIN if activated else 1) / math.sqrt(in_channels * kernel_size**2)
        self.down = down

    def forward(self, x: Tensor) -> Tensor:
        """Convolve images, [N, C, H, W]."""
        if self.bias is None:
            return self._convolve(x, None)
        return activate(self._convolve(x, self.bias * ACTIVATION_GAIN))

    def _convolve(self, x: Tensor, bias: Tensor | None) -> Tensor:
        padding, weight = self.weight.shape[-1] // 2, self.weight * self.gain
        if not self.down:
            return F.conv2d(x, weight, bias, padding=padding)
        if padding == 0:  # a 1x1 convolution needs the pixels that are left alone
            return F.conv2d(blur(x, padding=1, stride=2), weight, bias)
        return F.conv2d(blur(x, padding=1 + padding), weight, bias, stride=2)


class ModulatedConv(nn.Module):
    """A convolution whose input channels each image's style scales.

    With demodulation each output channel has, for inputs of unit variance, unit variance. Scaling
    what goes in and what comes out is the same as a kernel for each image, and faster.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int,
        style_dim: int,
        *,
        demodulate: bool = True,
        up: bool = False,
        gain: float = 1.0,
    ) -> None:
        """Draw weights.

        Args:
            in_channels: of the inputs.
            out_channels: of the outputs.
            kernel_size: odd.
            style_dim: length of the vectors that say the style.
            demodulate: whether to keep the variance of the outputs.
            up: whether the images are doubled and blurred.
            gain: of the outputs.
        """
        super().__init__()
        self.weight = nn.Parameter(torch.randn(out_channels, in_channels, kernel_size, kernel_size))
        self.style = EqualizedLinear(style_dim, in_channels, bias=1.0)
        self.gain = 1 / math.sqrt(in_channels * kernel_size**2)
        self.demodulate, self.up, self.output_gain = demodulate, up, gain

    def forward(self, x: Tensor, w: Tensor) -> Tensor:
        """Convolve images.

        Args:
            x: [N, C, H, W].
            w: [N, style_dim].
        """
        weight, styles = self.weight * self.gain, self.style(w)
        x = x * styles[:, :, None, None]
        if self.up:
            # Its output has a margin of one row and column, which the blur takes off.
            x = F.conv_transpose2d(x, 4 * weight.transpose(0, 1), stride=2)
            x = blur(x, padding=1)
        else:
            x = F.conv2d(x, weight, padding=weight.shape[-1] // 2)
        if not self.demodulate:
            return x * self.output_gain
        with full_precision(x.device):
            power = styles.float().square() @ weight.square().sum((2, 3)).T
            scales = (power + 1e-8).rsqrt() * self.output_gain
            x = x * scales[:, :, None, None].to(x.dtype)
        return x


class MappingNetwork(nn.Module):
    """Maps latents and classes to the vectors that say the style, or classes alone."""

    def __init__(
        self,
        latent_dim: int,
        num_classes: int,
        out_dim: int,
        *,
        num_layers: int,
        lr_multiplier: float = 0.01,
    ) -> None:
        """Draw weights.

        Args:
            latent_dim: length of a latent; 0: there are none.
            num_classes: that labels tell apart.
            out_dim: length of the outputs and of what lies between.
            num_layers: of the network.
            lr_multiplier: of the layers' learning rate.
        """
        super().__init__()
        self.latent_dim = latent_dim
        self.embedding = nn.Embedding(num_classes, out_dim)
        dims = [latent_dim + out_dim, *[out_dim] * num_layers]
        self.layers = nn.ModuleList(
            EqualizedLinear(before, after, lr_multiplier=lr_multiplier, activated=True)
            for before, after in pairwise(dims)
        )

    def forward(self, z: Tensor | None, labels: Tensor) -> Tensor:
        """Map latents, [N, latent_dim], with labels, [N] int64, to [N, out_dim]."""
        x = normalize_second_moment(self.embedding(labels))
        if z is not None:
            x = torch.cat([normalize_second_moment(z), x], 1)
        for layer in self.layers:
            x = layer(x)
        return x


class StyledConv(nn.Module):
    """A modulated convolution, noise, a bias and an activation."""

    def __init__(
        self, in_channels: int, out_channels: int, style_dim: int, *, up: bool = False
    ) -> None:
        """Draw weights; arguments as of `ModulatedConv`."""
        super().__init__()
        self.conv = ModulatedConv(
            in_channels, out_channels, 3, style_dim, up=up, gain=ACTIVATION_GAIN
        )
        self.noise_strength = nn.Parameter(torch.zeros(()))
        self.bias = nn.Parameter(torch.zeros(out_channels))

    def forward(self, x: Tensor, w: Tensor, noise: Tensor) -> Tensor:
        """Convolve images, [N, C, H, W], add noise, [N, 1, H', W'], and activate."""
        x = self.conv(x, w)
        x = x + (noise * (self.noise_strength * ACTIVATION_GAIN)).to(x.dtype)
        return activate(x + (self.bias * ACTIVATION_GAIN)[:, None, None].to(x.dtype))


class ToImage(nn.Module):
    """What turns features into an image: a 1x1 convolution without demodulation."""

    def __init__(self, in_channels: int, image_channels: int, style_dim: int) -> None:
        """Draw weights; arguments as of `ModulatedConv`."""
        super().__init__()
        self.conv = ModulatedConv(in_channels, image_channels, 1, style_dim, demodulate=False)
        self.bias = nn.Parameter(torch.zeros(image_channels))

    def forward(self, x: Tensor, w: Tensor) -> Tensor:
        """Turn features, [N, C, H, W], into float32 images."""
        image: Tensor = self.conv(x, w).float() + self.bias[:, None, None]
        return image


def channels_at(size: int, *, channel_base: int, channel_max: int) -> int:
    """Return how many channels feature maps of a size have."""
    return max(1, min(channel_base // size, channel_max))


class StyleNetwork(nn.Module):
    """The generator network: mapping and synthesis, whose blocks' images are summed.

    Attributes:
        latent_dim: length of a latent and of a style vector.
        num_styles: how many style vectors the synthesis takes.
        noise_sizes: width of the noise of each convolution.
    """

    def __init__(
        self,
        *,
        image_size: int,
        channels: int,
        num_classes: int,
        latent_dim: int,
        mapping_layers: int,
        channel_base: int,
        channel_max: int,
    ) -> None:
        """Draw weights.

        Args:
            image_size: a power of 2, at least 8.
            channels: of the images.
            num_classes: that labels tell apart.
            latent_dim: length of a latent and of a style vector.
            mapping_layers: of the mapping network.
            channel_base: of feature maps of width s there are channel_base / s,
            channel_max: and at most so many.
        """
        super().__init__()
        sizes = [2**n for n in range(2, image_size.bit_length())]
        widths = [channels_at(s, channel_base=channel_base, channel_max=channel_max) for s in sizes]
        self.latent_dim = latent_dim
        self.num_styles = 2 * len(sizes)
        self.noise_sizes = [BASE_SIZE, *(size for size in sizes[1:] for _ in range(2))]
        self.mapping = MappingNetwork(
            latent_dim, num_classes, latent_dim, num_layers=mapping_layers
        )
        self.constant = nn.Parameter(torch.randn(widths[0], BASE_SIZE, BASE_SIZE))
        self.convs = nn.ModuleList([StyledConv(widths[0], widths[0], latent_dim)])
        for before, after in pairwise(widths):
            self.convs.append(StyledConv(before, after, latent_dim, up=True))
            self.convs.append(StyledConv(after, after, latent_dim))
        self.to_images = nn.ModuleList(ToImage(width, channels, latent_dim) for width in widths)

    @property
    def noise_length(self) -> int:
        """How many values the noise of all convolutions has for an image."""
        return sum(size**2 for size in self.noise_sizes)

    def forward(self, styles: Tensor, noise: Tensor) -> Tensor:
        """Make images of styles.

        Args:
            styles: [N, num_styles, latent_dim], of `styles`.
            noise: [N, noise_length] float32, standard normal.

        Returns:
            [N, C, H, W] float32, in about [-1, 1].
        """
        noises = torch.split(noise, [size**2 for size in self.noise_sizes], dim=1)
        planes = [
            each.view(-1, 1, size, size)
            for each, size in zip(noises, self.noise_sizes, strict=True)
        ]
        x = self.constant.expand(len(styles), -1, -1, -1)
        x = self.convs[0](x, styles[:, 0], planes[0])
        # The image of a block shares its style with the first convolution of the next one.
        image: Tensor = self.to_images[0](x, styles[:, 1])
        for block, to_image in enumerate(list(self.to_images)[1:], start=1):
            for place in (2 * block - 1, 2 * block):
                x = self.convs[place](x, styles[:, place], planes[place])
            # But for the border, bilinear doubling is the filter [1, 3, 3, 1].
            image = F.interpolate(image, scale_factor=2, mode="bilinear")
            image = image + to_image(x, styles[:, 2 * block + 1])
        return image

    def styles(
        self,
        z: Tensor,
        labels: Tensor,
        *,
        other: Tensor | None = None,
        crossover: Tensor | None = None,
    ) -> Tensor:
        """Map latents to styles, those of two latents mixed where another is given.

        Args:
            z: [N, latent_dim], standard normal.
            labels: [N] int64.
            other: [N, latent_dim], whose styles the later layers take.
            crossover: [N] int64, the first of those layers.

        Returns:
            [N, num_styles, latent_dim].
        """
        repeated: Tensor = self.mapping(z, labels)[:, None].expand(-1, self.num_styles, -1)
        if other is None or crossover is None:
            return repeated
        places = torch.arange(self.num_styles, device=z.device)
        first = (places < crossover[:, None])[:, :, None]
        return torch.where(first, repeated, self.mapping(other, labels)[:, None])


def with_batch_deviation(x: Tensor, group_size: int) -> Tensor:
    """Append how much the features of a group of images differ, as a channel.

    A group is `group_size` images that follow each other, or all of a smaller batch. The first
    images fill the last group up.

    Args:
        x: [N, C, H, W].
        group_size: >= 1.

    Returns:
        [N, C + 1, H, W].
    """
    number, (height, width) = len(x), x.shape[2:]
    size = min(group_size, number)
    groups = -(-number // size)
    filled = torch.cat([x, x[: groups * size - number]])
    with full_precision(x.device):
        features = filled.float().reshape(groups, size, -1)
        variance = features.var(1, correction=0)
        deviation = (variance + 1e-8).sqrt().mean(1)
    each = deviation.repeat_interleave(size)[:number].to(x.dtype)
    return torch.cat([x, each[:, None, None, None].expand(-1, 1, height, width)], 1)


class DiscriminatorBlock(nn.Module):
    """Two convolutions that halve the images, beside a path that skips them."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        """Draw weights."""
        super().__init__()
        self.first = EqualizedConv(in_channels, in_channels, 3)
        self.second = EqualizedConv(in_channels, out_channels, 3, down=True)
        self.skip = EqualizedConv(in_channels, out_channels, 1, down=True, activated=False)

    def forward(self, x: Tensor) -> Tensor:
        """Halve features, [N, C, H, W]."""
        total: Tensor = self.second(self.first(x)) + self.skip(x)
        return total / math.sqrt(2)


class Discriminator(nn.Module):
    """Tells real images of a class from drawn ones, by a projection on the class."""

    def __init__(
        self,
        *,
        image_size: int,
        channels: int,
        num_classes: int,
        latent_dim: int,
        mapping_layers: int,
        channel_base: int,
        channel_max: int,
        group_size: int,
    ) -> None:
        """Draw weights; arguments as of `StyleNetwork` and `with_batch_deviation`."""
        super().__init__()
        sizes = [2**n for n in range(2, image_size.bit_length())][::-1]
        widths = [channels_at(s, channel_base=channel_base, channel_max=channel_max) for s in sizes]
        self.group_size = group_size
        self.from_image = EqualizedConv(channels, widths[0], 1)
        self.blocks = nn.ModuleList(
            DiscriminatorBlock(before, after) for before, after in pairwise(widths)
        )
        self.conv = EqualizedConv(widths[-1] + 1, widths[-1], 3)
        self.hidden = EqualizedLinear(widths[-1] * BASE_SIZE**2, widths[-1], activated=True)
        self.output = EqualizedLinear(widths[-1], latent_dim)
        self.mapping = MappingNetwork(0, num_classes, latent_dim, num_layers=mapping_layers)

    def forward(self, images: Tensor, labels: Tensor) -> Tensor:
        """Return the logit of each image being real.

        Args:
            images: [N, C, H, W] float32, in about [-1, 1].
            labels: [N] int64.

        Returns:
            [N] float32.
        """
        x = self.from_image(images)
        for block in self.blocks:
            x = block(x)
        x = self.conv(with_batch_deviation(x, self.group_size))
        x = self.hidden(x.flatten(1))
        directions = self.mapping(None, labels).float()
        logits: Tensor = (self.output(x).float() * directions).sum(1)
        return logits / math.sqrt(directions.shape[1])
