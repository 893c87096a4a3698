"""A U-Net with attention: the network of the package denoising-diffusion-pytorch.

With equal weights its outputs are those of that package's `Unet` as it comes, so that results can
be compared. It holds no buffers, and imports nothing but torch.
"""

import math
from collections.abc import Sequence
from functools import partial
from itertools import pairwise
from types import MappingProxyType

import torch
from torch import Tensor, nn
from torch.nn import functional

NUM_HEADS = 4
HEAD_CHANNELS = 32
# Keys and values that are trained, and that every position attends to beside the image's own.
NUM_MEMORIES = 4
MAX_PERIOD = 10_000
# Of the sigmoid schedule by which a log-SNR is told as a timestep.
SIGMOID_START, SIGMOID_END = -3.0, 3.0
NUM_TIMESTEPS = 1000


def timesteps_of(log_snr: Tensor) -> Tensor:
    """Return the 0-based timestep at which the sigmoid schedule of 1000 has a log-SNR.

    It rises from -1 to 999 as the log-SNR falls from infinity to minus infinity, so that the
    network can tell any two noise levels of any schedule apart, and needs no table of its own.
    Of the schedule's own log-SNRs the last gives 998.999, because the schedule does not let it
    fall to minus infinity, and the others whole numbers, but for rounding.

    Args:
        log_snr: [N] float32.

    Returns:
        [N] float32.

    Source: Jabri et al. 2022, the sigmoid schedule, solved for the time.
    """
    low, high = (1 / (1 + math.exp(-end)) for end in (SIGMOID_START, SIGMOID_END))
    share = (low + (high - low) * torch.sigmoid(-log_snr)).clamp(low, high)
    times = (torch.logit(share) - SIGMOID_START) / (SIGMOID_END - SIGMOID_START)
    return NUM_TIMESTEPS * times - 1


class SinusoidalFeatures(nn.Module):
    """Sines and cosines of a time at fixed frequencies."""

    def __init__(self, num_features: int) -> None:
        """Take `num_features` / 2 frequencies from 1 to 1 / 10,000."""
        super().__init__()
        self.num_frequencies = num_features // 2

    def forward(self, times: Tensor) -> Tensor:
        """Embed times, [N] float32, as [N, num_features] float32 in [-1, 1]."""
        places = torch.arange(self.num_frequencies, device=times.device, dtype=torch.float32)
        falls = -math.log(MAX_PERIOD) / (self.num_frequencies - 1)
        phases = times[:, None] * torch.exp(falls * places)
        return torch.cat([phases.sin(), phases.cos()], dim=1)


class ChannelNorm(nn.Module):
    """Divides each pixel by the root mean square over its channels; with a trained scale."""

    def __init__(self, channels: int) -> None:
        """Scale by 1 at first."""
        super().__init__()
        self.scale = nn.Parameter(torch.ones(channels, 1, 1))

    def forward(self, features: Tensor) -> Tensor:
        """Map [N, channels, H, W] to the same shape and type."""
        norm = torch.linalg.vector_norm(features, dim=1, keepdim=True, dtype=torch.float32)
        factor = math.sqrt(features.shape[1]) / norm.clamp(min=1e-12)
        scaled: Tensor = features * factor.to(features.dtype) * self.scale.to(features.dtype)
        return scaled


class ConvNormAct(nn.Module):
    """A 3x3 convolution, a norm, scale and shift where they are given, SiLU, and dropout."""

    def __init__(self, in_channels: int, out_channels: int, dropout: float) -> None:
        """Make the layers; `dropout` is the probability in [0, 1) of dropping a value."""
        super().__init__()
        self.conv = nn.Conv2d(in_channels, out_channels, 3, padding=1)
        self.norm = ChannelNorm(out_channels)
        self.dropout = nn.Dropout(dropout)

    def forward(self, features: Tensor, scale_shift: Tensor | None = None) -> Tensor:
        """Map [N, in, H, W] to [N, out, H, W]; `scale_shift` is [N, 2 out]."""
        features = self.norm(self.conv(features))
        if scale_shift is not None:
            scale, shift = scale_shift[:, :, None, None].to(features.dtype).chunk(2, dim=1)
            features = torch.addcmul(shift, features, scale + 1)
        output: Tensor = self.dropout(functional.silu(features))
        return output


class ConditionedBlock(nn.Module):
    """Two convolutions, the first one scaled and shifted by the condition, beside a skip."""

    def __init__(self, in_channels: int, out_channels: int, condition: int, dropout: float) -> None:
        """Make the block for conditions of `condition` channels."""
        super().__init__()
        self.condition = nn.Linear(condition, 2 * out_channels)
        self.first = ConvNormAct(in_channels, out_channels, dropout)
        # The package drops nothing after the second.
        self.second = ConvNormAct(out_channels, out_channels, 0.0)
        self.skip = (
            nn.Identity()
            if in_channels == out_channels
            else nn.Conv2d(in_channels, out_channels, 1)
        )

    def forward(self, features: Tensor, condition: Tensor) -> Tensor:
        """Map [N, in, H, W], under conditions that SiLU has passed, [N, condition]."""
        inner = self.second(self.first(features, self.condition(condition)))
        return torch.add(inner, self.skip(features))


class FullAttention(nn.Module):
    """Attention of every position to all, beside a skip connection."""

    def __init__(self, channels: int) -> None:
        """Make projections and memories."""
        super().__init__()
        inner = NUM_HEADS * HEAD_CHANNELS
        self.norm = ChannelNorm(channels)
        self.memories = nn.Parameter(torch.randn(2, NUM_HEADS, NUM_MEMORIES, HEAD_CHANNELS))
        self.to_qkv = nn.Conv2d(channels, 3 * inner, 1, bias=False)
        self.output = nn.Conv2d(inner, channels, 1)

    def forward(self, features: Tensor) -> Tensor:
        """Map [N, channels, H, W] to the same shape."""
        num, _, height, width = features.shape
        qkv = self.to_qkv(self.norm(features))
        # [3, N, heads, positions, channels of a head]
        split = qkv.reshape(num, 3, NUM_HEADS, HEAD_CHANNELS, -1).permute(1, 0, 2, 4, 3)
        queries, keys, values = split.unbind()
        memories = self.memories.to(qkv.dtype)[:, None].expand(-1, num, -1, -1, -1)
        keys = torch.cat([memories[0], keys], dim=2)
        values = torch.cat([memories[1], values], dim=2)
        found = functional.scaled_dot_product_attention(queries, keys, values)
        found = found.transpose(2, 3).reshape(num, -1, height, width)
        return torch.add(self.output(found), features)


class LinearAttention(nn.Module):
    """Attention whose cost grows with the pixels and not with their square, beside a skip.

    Source: Shen et al. 2018, "Efficient Attention", with memories.
    """

    def __init__(self, channels: int) -> None:
        """Make projections and memories."""
        super().__init__()
        inner = NUM_HEADS * HEAD_CHANNELS
        self.norm = ChannelNorm(channels)
        self.memories = nn.Parameter(torch.randn(2, NUM_HEADS, HEAD_CHANNELS, NUM_MEMORIES))
        self.to_qkv = nn.Conv2d(channels, 3 * inner, 1, bias=False)
        self.output = nn.Sequential(nn.Conv2d(inner, channels, 1), ChannelNorm(channels))

    def forward(self, features: Tensor) -> Tensor:
        """Map [N, channels, H, W] to the same shape."""
        num, _, height, width = features.shape
        qkv = self.to_qkv(self.norm(features))
        # [N, heads, channels of a head, positions] each
        queries, keys, values = qkv.reshape(num, 3, NUM_HEADS, HEAD_CHANNELS, -1).unbind(1)
        memories = self.memories.to(qkv.dtype)[:, None].expand(-1, num, -1, -1, -1)
        keys = torch.cat([memories[0], keys], dim=3).softmax(dim=3)
        values = torch.cat([memories[1], values], dim=3).to(keys.dtype)
        queries = queries.softmax(dim=2) * HEAD_CHANNELS**-0.5
        found = (values @ keys.transpose(2, 3)) @ queries
        return torch.add(self.output(found.reshape(num, -1, height, width)), features)


class Level(nn.Module):
    """Two blocks and an attention at one resolution, and what leads to the next."""

    def __init__(
        self,
        in_channels: int,
        channels: int,
        resize: nn.Module,
        *,
        condition: int,
        dropout: float,
        full_attention: bool,
    ) -> None:
        """Make a level of `channels`, whose blocks each take `in_channels`."""
        super().__init__()
        self.first = ConditionedBlock(in_channels, channels, condition, dropout)
        self.second = ConditionedBlock(in_channels, channels, condition, dropout)
        self.attention = FullAttention(channels) if full_attention else LinearAttention(channels)
        self.resize = resize


class DownLevel(Level):
    """A level on the way down, which leaves behind what comes of each of its blocks."""

    def forward(self, features: Tensor, condition: Tensor, skips: list[Tensor]) -> Tensor:
        """Map [N, in, H, W] to the input of the next level, and append two to `skips`."""
        skips.append(self.first(features, condition))
        skips.append(self.attention(self.second(skips[-1], condition)))
        output: Tensor = self.resize(skips[-1])
        return output


class UpLevel(Level):
    """A level on the way up, which takes up what one on the way down has left."""

    def forward(self, features: Tensor, condition: Tensor, skips: list[Tensor]) -> Tensor:
        """Map [N, in, H, W] to the input of the next level, and take the last two of `skips`."""
        features = self.first(torch.cat([features, skips.pop()], dim=1), condition)
        features = self.second(torch.cat([features, skips.pop()], dim=1), condition)
        output: Tensor = self.resize(self.attention(features))
        return output


def _convolution(in_channels: int, out_channels: int) -> nn.Module:
    return nn.Conv2d(in_channels, out_channels, 3, padding=1)


def _halving(in_channels: int, out_channels: int) -> nn.Module:
    return nn.Sequential(nn.PixelUnshuffle(2), nn.Conv2d(4 * in_channels, out_channels, 1))


def _doubling(in_channels: int, out_channels: int) -> nn.Module:
    return nn.Sequential(
        nn.Upsample(scale_factor=2.0, mode="nearest"), _convolution(in_channels, out_channels)
    )


class AttentionUNet(nn.Module):
    """A U-Net of normalized residual blocks, with linear and, innermost, full attention.

    Attributes:
        channels: of the images.
        num_classes: number of real classes.
        null_label: the label that stands for "no class", or None where there is none.
    """

    # Of `Generator.parts`.
    parts = MappingProxyType(
        {
            "down": ("input.", "time_embedding.", "class_embedding.", "down."),
            "middle": ("bottom_first.", "bottom_attention.", "bottom_second."),
            "up": ("up.", "final.", "output."),
        }
    )

    def __init__(
        self,
        *,
        channels: int,
        num_classes: int,
        null_class: bool,
        width: int,
        width_multipliers: Sequence[int],
        class_conditional: bool,
        dropout: float,
    ) -> None:
        """Make the network with weights from torch's global generator.

        Args:
            channels: of the images.
            num_classes: number of classes.
            null_class: whether there is one label more, which stands for "no class".
            width: channels of the first convolution, even and >= 4.
            width_multipliers: channels of each level over `width`; between levels the resolution
                is halved.
            class_conditional: whether an embedding of the label is added to that of the time.
            dropout: probability in [0, 1) of dropping a value in the first half of a block.
        """
        super().__init__()
        self.channels, self.num_classes = channels, num_classes
        self.null_label: int | None = num_classes if null_class else None
        self.divisor = 2 ** (len(width_multipliers) - 1)
        condition = 4 * width
        widths = [width, *(width * multiplier for multiplier in width_multipliers)]
        levels, last = [*enumerate(pairwise(widths))], len(width_multipliers) - 1
        down, up = (
            partial(level, condition=condition, dropout=dropout) for level in (DownLevel, UpLevel)
        )

        self.input = nn.Conv2d(channels, width, 7, padding=3)
        self.time_embedding = nn.Sequential(
            SinusoidalFeatures(width),
            nn.Linear(width, condition),
            nn.GELU(),
            nn.Linear(condition, condition),
        )
        self.class_embedding = (
            nn.Embedding(num_classes + null_class, condition) if class_conditional else None
        )
        self.down, self.up = nn.ModuleList(), nn.ModuleList()
        for level, (here, after) in levels:
            resize = _convolution(here, after) if level == last else _halving(here, after)
            self.down.append(down(here, here, resize, full_attention=level == last))
        bottom = widths[-1]
        self.bottom_first = ConditionedBlock(bottom, bottom, condition, dropout)
        self.bottom_attention = FullAttention(bottom)
        self.bottom_second = ConditionedBlock(bottom, bottom, condition, dropout)
        for level, (after, here) in reversed(levels):
            resize = _convolution(here, after) if level == 0 else _doubling(here, after)
            self.up.append(up(here + after, here, resize, full_attention=level == last))
        self.final = ConditionedBlock(2 * width, width, condition, dropout)
        self.output = nn.Conv2d(width, channels, 1)

    def forward(self, x_t: Tensor, log_snr: Tensor, labels: Tensor) -> Tensor:
        """Predict, for noisy images, what the prediction type says.

        Args:
            x_t: [N, C, H, W] float, about [-1, 1]; H and W divisible by `divisor`.
            log_snr: [N] float32, log(alphas_cumprod / (1 - alphas_cumprod)).
            labels: [N] int64, classes or `null_label`; of no effect without classes.

        Returns:
            [N, C, H, W], of autocast's type under autocast.

        Raises:
            ValueError: the images do not have the channels or the size that the network needs.
        """
        self.check_images(x_t)
        condition = self.time_embedding(timesteps_of(log_snr))
        if self.class_embedding is not None:
            condition = condition + self.class_embedding(labels)
        condition = functional.silu(condition)
        first = features = self.input(x_t)
        skips: list[Tensor] = []
        for level in self.down:
            features = level(features, condition, skips)
        features = self.bottom_attention(self.bottom_first(features, condition))
        features = self.bottom_second(features, condition)
        for level in self.up:
            features = level(features, condition, skips)
        features = self.final(torch.cat([features, first], dim=1), condition)
        output: Tensor = self.output(features)
        return output

    def check_images(self, x_t: Tensor) -> None:
        """Raise a ValueError unless `x_t` has channels and a size that the network can take.

        Raises:
            ValueError: it has not.
        """
        _, channels, height, width = x_t.shape
        if channels != self.channels or height % self.divisor or width % self.divisor:
            raise ValueError(
                f"x_t must be [N, {self.channels}, H, W] with H and W divisible by {self.divisor} "
                f"(2 to the power of the levels but one), got {list(x_t.shape)}"
            )
