"""The U-Net of the released code: the network that predicts, from a noisy image, what was added.

It holds no buffers, so that its `state_dict` is its parameters and nothing else is averaged. It
imports nothing but torch, because `feddm export` ships this file beside the weights.
"""

import math
from itertools import pairwise
from types import MappingProxyType

import torch
from torch import Tensor, nn
from torch.nn import functional


class FourierFeatures(nn.Module):
    """Cosines and sines of the log-SNR at trained frequencies."""

    def __init__(self, num_features: int, std: float = 0.2) -> None:
        """Draw `num_features / 2` frequencies from N(0, `std`^2)."""
        super().__init__()
        self.weight = nn.Parameter(torch.randn(num_features // 2, 1) * std)

    def forward(self, log_snr: Tensor) -> Tensor:
        """Embed log-SNRs, [N] float32, as [N, num_features] float32 in [-1, 1]."""
        # A product and not a linear layer, which autocast would run in bfloat16: its 8 bits are
        # too few for phases of tens of radians.
        phases = 2 * math.pi * log_snr[:, None] * self.weight[:, 0]
        return torch.cat([phases.cos(), phases.sin()], dim=1)


class ResidualBlock(nn.Module):
    """Two 3x3 convolutions, each with channel dropout and ReLU, beside a skip connection."""

    def __init__(
        self,
        in_channels: int,
        mid_channels: int,
        out_channels: int,
        *,
        dropout: float,
        last_dropout: bool = True,
        last_relu: bool = True,
    ) -> None:
        """Make the block; `last_dropout` and `last_relu` follow its second convolution."""
        super().__init__()
        self.main = nn.Sequential(
            nn.Conv2d(in_channels, mid_channels, 3, padding=1),
            nn.Dropout2d(dropout),
            nn.ReLU(),
            nn.Conv2d(mid_channels, out_channels, 3, padding=1),
            nn.Dropout2d(dropout) if last_dropout else nn.Identity(),
            nn.ReLU() if last_relu else nn.Identity(),
        )
        self.skip = (
            nn.Identity()
            if in_channels == out_channels
            else nn.Conv2d(in_channels, out_channels, 1, bias=False)
        )

    def forward(self, features: Tensor) -> Tensor:
        """Map [N, in_channels, H, W] to [N, out_channels, H, W]."""
        return torch.add(self.main(features), self.skip(features))


class UNet(nn.Module):
    """A class-conditional U-Net of residual blocks, without normalization or attention.

    Modules are made in the order in which data passes them, which is the order of the
    parameters of the released code.

    Attributes:
        channels: of the images.
        num_classes: number of real classes.
        null_label: the label that stands for "no class", or None where there is none.
    """

    # Of `Generator.parts`.
    parts = MappingProxyType(
        {
            "down": ("log_snr_embedding.", "class_embedding.", "down."),
            "middle": ("bottom.",),
            "up": ("up.",),
        }
    )

    def __init__(
        self,
        *,
        channels: int,
        num_classes: int,
        null_class: bool,
        width: int,
        num_poolings: int,
        bottom_blocks: int,
        final_relu: bool,
        dropout: float,
        class_embedding_dim: int,
        fourier_features: int,
    ) -> None:
        """Make the network with weights from torch's global generator.

        Args:
            channels: of the images.
            num_classes: number of classes.
            null_class: whether there is one label more, which stands for "no class".
            width: channels at full resolution; each pooling doubles them.
            num_poolings: how often the resolution is halved.
            bottom_blocks: residual blocks at the lowest resolution, >= 2.
            final_relu: whether the very last block ends in a ReLU, as the others do.
            dropout: probability in [0, 1) of dropping a channel.
            class_embedding_dim: channels of the class embedding.
            fourier_features: channels of the log-SNR embedding, even.
        """
        super().__init__()
        self.channels = channels
        self.num_classes = num_classes
        self.null_label: int | None = num_classes if null_class else None

        def block(*sizes: int) -> ResidualBlock:
            return ResidualBlock(*sizes, dropout=dropout)

        *widths, bottom = (width * 2**level for level in range(num_poolings + 1))
        inputs = channels + class_embedding_dim + fourier_features
        self.log_snr_embedding = FourierFeatures(fourier_features)
        self.class_embedding = nn.Embedding(num_classes + null_class, class_embedding_dim)
        self.down = nn.ModuleList(
            nn.Sequential(block(before, here, here), block(here, here, here))
            for before, here in pairwise([inputs, *widths])
        )
        self.bottom = nn.Sequential(
            block(widths[-1], bottom, bottom),
            *(block(bottom, bottom, bottom) for _ in range(bottom_blocks - 2)),
            block(bottom, bottom, widths[-1]),
        )
        self.up = nn.ModuleList(
            nn.Sequential(block(2 * here, here, here), block(here, here, after))
            for here, after in pairwise(reversed(widths))
        )
        last = ResidualBlock(
            width, width, channels, dropout=dropout, last_dropout=False, last_relu=final_relu
        )
        self.up.append(nn.Sequential(block(2 * width, width, width), last))

    def forward(self, x_t: Tensor, log_snr: Tensor, labels: Tensor) -> Tensor:
        """Predict, for noisy images, what the prediction type says.

        Args:
            x_t: [N, C, H, W] float, about [-1, 1]; H and W divisible by 2^num_poolings.
            log_snr: [N] float32, log(alphas_cumprod / (1 - alphas_cumprod)).
            labels: [N] int64, classes or `null_label`.

        Returns:
            [N, C, H, W], of autocast's type under autocast.

        Raises:
            ValueError: the images do not have the channels or the size that the network needs.
        """
        self.check_images(x_t)
        embedding = torch.cat([self.class_embedding(labels), self.log_snr_embedding(log_snr)], 1)
        planes = embedding[:, :, None, None].expand(-1, -1, *x_t.shape[2:])
        features = torch.cat([x_t, planes], dim=1)
        skips = []
        for level in self.down:
            skips.append(level(features))
            features = functional.avg_pool2d(skips[-1], 2)
        output: Tensor = self.bottom(features)
        for level, skip in zip(self.up, reversed(skips), strict=True):
            upsampled = functional.interpolate(output, scale_factor=2.0, mode="nearest")
            output = level(torch.cat([upsampled, skip], dim=1))
        return output

    def check_images(self, x_t: Tensor) -> None:
        """Raise a ValueError unless `x_t` has channels and a size that the network can take.

        Raises:
            ValueError: it has not.
        """
        divisor = 2 ** len(self.down)
        _, channels, height, width = x_t.shape
        if channels != self.channels or height % divisor or width % divisor:
            raise ValueError(
                f"x_t must be [N, {self.channels}, H, W] with H and W divisible by {divisor} "
                f"(2 to the power of num_poolings), got {list(x_t.shape)}"
            )
