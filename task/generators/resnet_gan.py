"""A class-conditional GAN of residual blocks: one that trains alone, and the base of others."""

import copy
from collections.abc import Iterator, Mapping, Sequence
from itertools import pairwise
from types import MappingProxyType
from typing import Self

import torch
from torch import Tensor, nn
from torch.nn import functional

from task.config import Config, ResNetGANConfig
from task.generators.base import Advance, Batch, Generator, NoiseSource

# The side of the feature maps that the first linear layer makes, and the widths from there on.
START_SIZE = 4
BLOCK_FACTORS = (16, 16, 8, 4, 2, 1)
# Mean hinge loss of a round below which the discriminator leaves the generator nothing to learn.
WON = 1e-3

# Of each place, what features are multiplied by and what is added to them, both [N, C].
Modulation = Sequence[tuple[Tensor, Tensor]]


def block_channels(width: int, image_size: int) -> list[int]:
    """List the channels of the 4x4 start and after each block that doubles the size.

    Args:
        width: that `BLOCK_FACTORS` are multiples of.
        image_size: 8, 16, 32, 64 or 128.
    """
    num_blocks = (image_size // START_SIZE).bit_length() - 1
    return [factor * width for factor in BLOCK_FACTORS[: num_blocks + 1]]


def modulated_channels(width: int, image_size: int) -> list[int]:
    """List the channels of each place of a `Modulation`: the start, and two in each block."""
    channels = block_channels(width, image_size)
    inner = [count for pair in pairwise(channels) for count in pair]
    return [channels[0], *inner]


def modulate(features: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    """Multiply and shift the channels of features, [N, C, H, W], by [N, C] each."""
    scale, shift = (each[:, :, None, None].to(features.dtype) for each in (scale, shift))
    return torch.addcmul(shift, features, scale)


class ConditionalBatchNorm(nn.Module):
    """Batch normalization with a gain and a bias for each class, or one for all of them."""

    def __init__(self, channels: int, num_classes: int) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.ones(num_classes, channels))
        self.bias = nn.Parameter(torch.zeros(num_classes, channels))
        self.register_buffer("mean", torch.zeros(channels))
        self.register_buffer("variance", torch.ones(channels))
        self.mean: Tensor
        self.variance: Tensor

    def forward(self, features: Tensor, labels: Tensor) -> Tensor:
        """Normalize [N, C, H, W]; `labels`, [N] int64, make no difference to a single class."""
        normal = functional.batch_norm(features, self.mean, self.variance, training=self.training)
        rows = labels if len(self.gain) > 1 else torch.zeros_like(labels)
        return modulate(normal, self.gain[rows], self.bias[rows])


class UpBlock(nn.Module):
    """A residual block that doubles the size of features."""

    def __init__(self, in_channels: int, out_channels: int, num_classes: int) -> None:
        super().__init__()
        self.norm1 = ConditionalBatchNorm(in_channels, num_classes)
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, padding=1)
        self.norm2 = ConditionalBatchNorm(out_channels, num_classes)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1)
        self.skip = nn.Conv2d(in_channels, out_channels, 1)

    def forward(self, features: Tensor, labels: Tensor, modulation: Modulation) -> Tensor:
        """Map [N, in_channels, H, W] to [N, out_channels, 2H, 2W]; of `modulation` two places."""
        first, second = modulation or (None, None)
        hidden = self.norm1(features, labels)
        hidden = functional.relu(hidden if first is None else modulate(hidden, *first))
        hidden = self.conv1(functional.interpolate(hidden, scale_factor=2.0, mode="nearest"))
        hidden = self.norm2(hidden, labels)
        hidden = self.conv2(
            functional.relu(hidden if second is None else modulate(hidden, *second))
        )
        # A 1x1 convolution may as well see the small features.
        skipped = functional.interpolate(self.skip(features), scale_factor=2.0, mode="nearest")
        return torch.add(hidden, skipped)


class ResNetGenerator(nn.Module):
    """Draws images from latents: a linear layer and residual blocks that double the size.

    Source: Miyato et al. 2018, arXiv 1802.05957, table 4; Miyato & Koyama 2018, arXiv 1802.05637.
    """

    def __init__(
        self, image_shape: tuple[int, int, int], *, width: int, latent_dim: int, num_classes: int
    ) -> None:
        """Make the network for square images.

        Args:
            image_shape: (C, H, W); see `block_channels`.
            width: channels of the last block.
            latent_dim: of a latent.
            num_classes: that have a gain and a bias of their own; 1: labels make no difference.
        """
        super().__init__()
        channels = block_channels(width, image_shape[1])
        self.linear = nn.Linear(latent_dim, channels[0] * START_SIZE**2)
        self.blocks = nn.ModuleList(
            UpBlock(count, following, num_classes) for count, following in pairwise(channels)
        )
        self.norm = ConditionalBatchNorm(channels[-1], 1)
        self.last = nn.Conv2d(channels[-1], image_shape[0], 3, padding=1)
        initialize(self)

    def forward(self, latents: Tensor, labels: Tensor, modulation: Modulation = ()) -> Tensor:
        """Draw an image for each latent.

        Args:
            latents: [N, latent_dim] float32.
            labels: [N] int64.
            modulation: of the places of `modulated_channels`; empty: none.

        Returns:
            [N, C, H, W] float32 in [-1, 1].
        """
        features = self.linear(latents).unflatten(1, (-1, START_SIZE, START_SIZE))
        if modulation:
            features = modulate(features, *modulation[0])
        for number, block in enumerate(self.blocks):
            features = block(features, labels, modulation[2 * number + 1 : 2 * number + 3])
        features = functional.relu(self.norm(features, torch.zeros_like(labels)))
        images: Tensor = self.last(features).float().tanh()
        return images


class SpectralNorm(nn.Module):
    """Divides a matrix by its largest singular value, which one power iteration a step follows.

    Source: Miyato et al. 2018, arXiv 1802.05957, algorithm 1.
    """

    def __init__(self, num_rows: int) -> None:
        super().__init__()
        self.register_buffer("vector", functional.normalize(torch.randn(num_rows), dim=0))
        self.vector: Tensor

    def forward(self, weight: Tensor) -> Tensor:
        """Return a weight of spectral norm 1; its first axis are the rows, its others columns."""
        # bfloat16 would lose the norm's digits.
        with torch.autocast(weight.device.type, enabled=False):
            matrix = weight.flatten(1)
            with torch.no_grad():
                # Whatever the length of the vector: aggregation averages those of clients.
                right = functional.normalize(self.vector @ matrix, dim=0)
                left = functional.normalize(matrix @ right, dim=0)
                if self.training:
                    self.vector.copy_(left)
            return weight / torch.dot(left, matrix @ right)


class SpectralConv2d(nn.Conv2d):
    """A convolution whose weight has a spectral norm of 1."""

    def __init__(self, in_channels: int, out_channels: int, size: int) -> None:
        super().__init__(in_channels, out_channels, size, padding=size // 2)
        self.norm = SpectralNorm(out_channels)

    def forward(self, features: Tensor) -> Tensor:
        """Map [N, in_channels, H, W] to [N, out_channels, H, W]."""
        return functional.conv2d(features, self.norm(self.weight), self.bias, padding=self.padding)


class SpectralLinear(nn.Linear):
    """A linear layer whose weight has a spectral norm of 1."""

    def __init__(self, in_features: int, out_features: int, *, bias: bool = True) -> None:
        super().__init__(in_features, out_features, bias=bias)
        self.norm = SpectralNorm(out_features)

    def forward(self, features: Tensor) -> Tensor:
        """Map [N, in_features] to [N, out_features]."""
        return functional.linear(features, self.norm(self.weight), self.bias)


class DownBlock(nn.Module):
    """A residual block that halves the size of features, or leaves it."""

    def __init__(
        self, in_channels: int, out_channels: int, *, halves: bool = True, first: bool = False
    ) -> None:
        """Make the block; the first one sees images, which take no ReLU."""
        super().__init__()
        self.conv1 = SpectralConv2d(in_channels, out_channels, 3)
        self.conv2 = SpectralConv2d(out_channels, out_channels, 3)
        self.skip = SpectralConv2d(in_channels, out_channels, 1)
        self.halves, self.first = halves, first

    def forward(self, features: Tensor) -> Tensor:
        """Map [N, in_channels, H, W] to [N, out_channels, H/2, W/2], or of the same size."""
        hidden = self.conv1(features if self.first else functional.relu(features))
        hidden = self.conv2(functional.relu(hidden))
        if self.halves:
            hidden, features = (functional.avg_pool2d(each, 2) for each in (hidden, features))
        return torch.add(hidden, self.skip(features))


class ProjectionDiscriminator(nn.Module):
    """Scores images, and how well they go with their labels.

    Source: Miyato & Koyama 2018, arXiv 1802.05637, eq. 4.
    """

    def __init__(self, image_shape: tuple[int, int, int], *, width: int, num_classes: int) -> None:
        """Make the network for square images; with one class labels make no difference."""
        super().__init__()
        widths = block_channels(width, image_shape[1])[:0:-1]
        channels = [image_shape[0], *widths]
        self.blocks = nn.Sequential(
            *(
                DownBlock(count, following, first=number == 0)
                for number, (count, following) in enumerate(zip(channels, widths, strict=False))
            ),
            DownBlock(channels[-1], channels[-1], halves=False),
        )
        self.score = SpectralLinear(channels[-1], 1)
        self.classes = (
            SpectralLinear(channels[-1], num_classes, bias=False) if num_classes > 1 else None
        )
        initialize(self)

    def forward(self, images: Tensor, labels: Tensor) -> Tensor:
        """Score images, [N, C, H, W] float32, with labels, [N] int64; returns [N] float32."""
        features = functional.relu(self.blocks(images)).sum((2, 3))
        score: Tensor = self.score(features).float()[:, 0]
        if self.classes is not None:
            # Its row of a label is what the paper's embedding of the label is.
            score = score + self.classes(features).float().gather(1, labels[:, None])[:, 0]
        return score


def initialize(network: nn.Module) -> None:
    """Draw the weights of all linear layers and convolutions uniformly, after Glorot; no biases."""
    for layer in network.modules():
        if isinstance(layer, nn.Conv2d | nn.Linear):
            nn.init.xavier_uniform_(layer.weight)
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)


class ResNetGAN(Generator):
    """A generator and a discriminator of residual blocks that train against each other.

    Images are drawn by a moving average of the generator. All three networks travel: the average
    of moving averages over clients is the moving average of averages.

    Attributes:
        generator: as it is trained.
        generator_ema: its moving average.
        discriminator: tells images from real ones.
        averaged_share: that the generator has in its moving average after a step, [] float32.
    """

    title = "GAN of residual blocks"
    private = frozenset({"discriminator"})
    parts = MappingProxyType(
        {"generator": ("generator.", "generator_ema."), "discriminator": ("discriminator.",)}
    )
    undrawn = frozenset({"discriminator"})
    measures: tuple[str, ...] = ("discriminator_loss", "generator_loss", "real_sign")

    def __init__(
        self,
        image_shape: tuple[int, int, int],
        *,
        width: int,
        latent_dim: int,
        num_classes: int,
        discriminator_steps: int,
        ema_decay: float,
    ) -> None:
        """Make the networks.

        Args:
            image_shape: (C, H, W), square; see `block_channels`.
            width: channels at the full size.
            latent_dim: of a latent.
            num_classes: of the labels; 1: they make no difference.
            discriminator_steps: of the discriminator before each of the generator.
            ema_decay: of the moving average, in [0, 1); smaller in its first steps.
        """
        super().__init__()
        self.image_shape, self.noise_dim = image_shape, latent_dim
        self.private_steps, self.num_classes = discriminator_steps, num_classes
        self.discriminator_steps, self.ema_decay = discriminator_steps, ema_decay
        self.generator = ResNetGenerator(
            image_shape, width=width, latent_dim=latent_dim, num_classes=num_classes
        )
        self.discriminator = ProjectionDiscriminator(
            image_shape, width=width, num_classes=num_classes
        )
        self.generator_ema = copy.deepcopy(self.generator).requires_grad_(False).eval()
        # Not the number of steps, which would be by far the largest of the weights that are sent.
        self.register_buffer("averaged_share", torch.tensor(0.9))
        self.averaged_share: Tensor

    def train(self, mode: bool = True) -> Self:
        """Set the mode of the networks that are trained."""
        super().train(mode)
        self.generator_ema.eval()
        return self

    def optimizers(self, lr: float) -> dict[str, torch.optim.Optimizer]:
        """Make an Adam for each network, without momentum."""
        return {
            name: torch.optim.Adam(network.parameters(), lr=lr, betas=(0.0, 0.9), fused=True)
            for name, network in (
                ("discriminator", self.discriminator),
                ("generator", self.generator),
            )
        }

    def losses(self, batch: Batch, rng: torch.Generator) -> Iterator[tuple[str, Tensor]]:
        """Yield the hinge losses: of the discriminator, some times, and of the generator.

        Source: Lim & Ye 2017, arXiv 1705.02894.
        """
        images, labels = batch.images[batch.part], batch.labels[batch.part]
        for _ in range(self.discriminator_steps):
            with torch.no_grad():
                drawn = self.generator(self._latents(batch, rng), labels)
            both = self.discriminator(torch.cat([images, drawn]), torch.cat([labels, labels]))
            real, fake = both.chunk(2)
            loss = functional.relu(1 - real) + functional.relu(1 + fake)
            self.means.add(batch, discriminator_loss=loss, real_sign=real.sign())
            yield "discriminator", loss
        loss = self._generator_losses(self._latents(batch, rng), labels)
        self.means.add(batch, generator_loss=loss)
        yield "generator", loss

    def private_losses(self, batch: Batch, rng: torch.Generator) -> Tensor:
        """Return the discriminator's hinge losses.

        The drawn images are of any classes, and neither they nor the discriminator move statistics:
        those of the generator's normalization travel, and would tell of the patient's classes.
        """
        labels = self._any_labels(len(batch), rng)
        for network in (self.generator, self.discriminator):
            network.eval()
        # Of several patients at once, batch normalization takes features of its statistics' type.
        with torch.no_grad(), torch.autocast(rng.device.type, enabled=False):
            drawn = self.generator(self._latents(batch, rng), labels)
        images = torch.cat([batch.images, drawn])
        real, fake = self.discriminator(images, torch.cat([batch.labels, labels])).chunk(2)
        for network in (self.generator, self.discriminator):
            network.train()
        return functional.relu(1 - real) + functional.relu(1 + fake)

    def public_losses(self, num_images: int, rng: torch.Generator) -> Iterator[tuple[str, Tensor]]:
        """Yield the generator's hinge losses, of images of any classes."""
        labels = self._any_labels(num_images, rng)
        latents = torch.randn(num_images, *self.noise_shape, generator=rng, device=rng.device)
        yield "generator", self._generator_losses(latents, labels)

    def _generator_losses(self, latents: Tensor, labels: Tensor) -> Tensor:
        # The discriminator's gradients would be computed for nothing.
        self.discriminator.requires_grad_(False)
        try:
            losses: Tensor = -self.discriminator(self.generator(latents, labels), labels)
        finally:
            self.discriminator.requires_grad_(True)
        return losses

    def _any_labels(self, number: int, rng: torch.Generator) -> Tensor:
        shape = (number,)
        return torch.randint(self.num_classes, shape, generator=rng, device=rng.device)

    def _latents(self, batch: Batch, rng: torch.Generator) -> Tensor:
        drawn = torch.randn(len(batch), *self.noise_shape, generator=rng, device=rng.device)
        return drawn[batch.part]

    @torch.inference_mode()
    def member_scores(self, batch: Batch, rng: torch.Generator) -> dict[str, Tensor]:
        """Attack by the discriminator, which holds images for real that it was trained on."""
        return {"discriminator": self.discriminator(batch.images, batch.labels)}

    @torch.no_grad()
    def after_step(self) -> None:
        """Follow the generator, normalization statistics included, with its moving average."""
        # After n steps 9 / (10 + n): at first it forgets quickly what was drawn at random.
        share = self.averaged_share / (1 + self.averaged_share / 9)
        self.averaged_share.copy_(share.clamp(min=1 - self.ema_decay))
        averages = self.generator_ema.state_dict().values()
        for average, value in zip(averages, self.generator.state_dict().values(), strict=True):
            average.lerp_(value, self.averaged_share)

    def why_diverged(self, measures: Mapping[str, float]) -> str:
        """Say where a measure is not finite or the discriminator has won; "" where neither."""
        wrong = super().why_diverged(measures)
        # Nobody says it of a training with differential privacy.
        if wrong or measures.get("discriminator_loss", WON) >= WON:
            return wrong
        return (
            "the discriminator's loss was 0 for a whole round: it tells all images apart, and the "
            "generator learns nothing"
        )

    @torch.inference_mode()
    def sample(
        self, labels: Tensor, noise: NoiseSource, *, advance: Advance = lambda number: None
    ) -> Tensor:
        """Draw an image for each label by the moving average of the generator."""
        images: Tensor = self.generator_ema(noise(), labels)
        advance(len(labels))
        return images

    def description(self) -> dict[str, object]:
        """Say what is trained against what."""
        return {
            "loss": "hinge, projection discriminator with spectral normalization",
            "discriminator steps": self.discriminator_steps,
            "moving average": f"of the generator, decay {self.ema_decay:g} a step",
        }


def build_resnet_gan(config: Config) -> ResNetGAN:
    """Make the GAN of a configuration, with weights from torch's global generator."""
    data, model = config.data, config.model
    if not isinstance(model, ResNetGANConfig):
        raise TypeError(f"config.model must be a ResNetGANConfig, got {type(model).__name__}")
    return ResNetGAN(
        (data.channels, data.image_size, data.image_size),
        width=model.width,
        latent_dim=model.latent_dim,
        num_classes=len(data.classes) if model.class_conditional else 1,
        discriminator_steps=model.discriminator_steps,
        ema_decay=model.ema_decay,
    )
