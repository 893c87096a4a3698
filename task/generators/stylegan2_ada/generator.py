"""The generator of StyleGAN2-ADA: two networks that train each other, and what regularizes them."""

import copy
import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, cast

import torch
from torch import Tensor, distributed, nn
from torch.nn import functional as F

from task.config import Config, StyleGAN2ADAConfig
from task.generators.base import Advance, Batch, Generator, NoiseSource
from task.generators.stylegan2_ada.augmentation import ImageChanges, change_images, draw_changes
from task.generators.stylegan2_ada.networks import Discriminator, StyleNetwork, full_precision

# Of the running mean of path lengths.
PATH_LENGTH_DECAY = 0.01
# Batches after which the probability of augmentation changes.
ADA_INTERVAL = 4
# Below it, a discriminator's mean loss over a round says that it tells all images apart; it is
# 2 log 2 where it tells none apart.
DISCRIMINATOR_WON = 0.01


@dataclass(frozen=True, kw_only=True)
class GanTraining:
    """How the networks are trained.

    Attributes:
        style_mixing: share of the drawn images that take their styles from two latents.
        r1_gamma: weight of the discriminator's squared gradient at real images.
        r1_interval: batches from one such step to the next.
        path_length_weight: of the generator's path length penalty; 0: none.
        path_length_interval: batches from one such step to the next.
        ema_kimg: half-life of the weights' moving average, in thousands of images.
        ema_ramp: the half-life is at most this share of the images seen so far.
        ada_target: of the mean sign of the discriminator at real images.
        ada_kimg: thousands of images in which the probability of augmentation goes from 0 to 1.
    """

    style_mixing: float
    r1_gamma: float
    r1_interval: int
    path_length_weight: float
    path_length_interval: int
    ema_kimg: float
    ema_ramp: float
    ada_target: float
    ada_kimg: float


class Adaptation(nn.Module):
    """What a client's own discriminator has shown, which says how much is augmented.

    Attributes:
        probability: of each change of an image, [] float32.
        signs: sum of the discriminator's signs at real images since the last change of
            `probability`, and how many images these were, [2] float32.
        num_batches: trained on so far, [] int64.
    """

    probability: Tensor
    signs: Tensor
    num_batches: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("probability", torch.zeros(()))
        self.register_buffer("signs", torch.zeros(2))
        self.register_buffer("num_batches", torch.zeros((), dtype=torch.int64))

    @torch.no_grad()
    def see(self, signs: Tensor) -> None:
        """Note the signs of the discriminator's logits at real images, [N]."""
        self.signs += torch.stack([signs.sum(), torch.ones_like(signs).sum()])

    @torch.no_grad()
    def adapt(self, *, target: float, kimg: float) -> None:
        """Augment more where the mean sign is above the target, and less where it is below.

        Source: arXiv 2006.06676, section 3.1.
        """
        total, number = self.signs
        step = (total / number - target).sign() * number / (1000 * kimg)
        self.probability.copy_((self.probability + step).clamp(0, 1))
        self.signs.zero_()


class StyleGAN2ADA(Generator):
    """StyleGAN2 with adaptive discriminator augmentation.

    All images that the discriminator sees are augmented. Its optimizer and the probability of
    augmentation stay at a client: both follow the client's own images. The server is told what the
    probability was, as one of the `measures`.

    Attributes:
        generator: draws, and is trained.
        generator_ema: the moving average of its weights, which images are drawn from.
        discriminator: tells real images from drawn ones.
        adaptation: how much is augmented.
        path_length_mean: of the path lengths so far, [] float32.
        half_life_share: of `GanTraining.ema_kimg`, that the moving average has reached, [] float32
            in [0, 1]; averaged over clients.
    """

    title = "StyleGAN2-ADA"
    local = frozenset({"adaptation."})
    private = frozenset({"discriminator"})
    parts = MappingProxyType(
        {"generator": ("generator.", "generator_ema."), "discriminator": ("discriminator.",)}
    )
    undrawn = frozenset({"discriminator"})
    deterministic_on_gpu = False  # the gradients of the augmentation's padding and sampling
    local_optimizers = frozenset({"discriminator"})
    measures = (
        *("discriminator_loss", "generator_loss"),
        *("augmentation_probability", "real_sign"),
    )
    path_length_mean: Tensor
    half_life_share: Tensor

    def __init__(
        self,
        generator: StyleNetwork,
        discriminator: Discriminator,
        training: GanTraining,
        *,
        image_shape: tuple[int, int, int],
        network_arguments: Mapping[str, Any],
    ) -> None:
        """Join the networks.

        Args:
            generator: draws images of the shape.
            discriminator: takes them.
            training: how they are trained.
            image_shape: (C, H, W).
            network_arguments: what the generator was made with, for an export.
        """
        super().__init__()
        self.generator, self.discriminator, self.training_options = (
            generator,
            discriminator,
            training,
        )
        self.generator_ema = copy.deepcopy(generator).requires_grad_(False)
        self.adaptation = Adaptation()
        self.register_buffer("path_length_mean", torch.zeros(()))
        # Not the number of images, which would be by far the largest of the weights that are sent.
        self.register_buffer("half_life_share", torch.zeros(()))
        self.image_shape = image_shape
        # A latent, and what each convolution adds.
        self.noise_dim = generator.latent_dim + generator.noise_length
        self._network_arguments = dict(network_arguments)
        # `adaptation.num_batches` and the size of the last batch: reading a tensor in a step
        # would wait for the device.
        self._num_batches = self._batch_size = 0

    def start(self) -> None:
        """Continue the count of batches of this client, and begin to measure."""
        super().start()
        self._num_batches = int(self.adaptation.num_batches)

    def optimizers(self, lr: float) -> dict[str, torch.optim.Optimizer]:
        """Make an Adam for each network, slowed by the steps that regularization adds."""
        options = self.training_options
        intervals = {
            "generator": options.path_length_interval if options.path_length_weight > 0 else None,
            "discriminator": options.r1_interval if options.r1_gamma > 0 else None,
        }
        return {
            name: _rescaled_adam(getattr(self, name), lr, interval)
            for name, interval in intervals.items()
        }

    def losses(self, batch: Batch, rng: torch.Generator) -> Iterator[tuple[str, Tensor]]:
        """Yield the discriminator's loss and the generator's, every few batches with a penalty."""
        options = self.training_options
        self._batch_size = len(batch)
        real = self._augmented(batch.images[batch.part], batch, rng)
        yield "discriminator", self._discriminator_losses(real, batch, rng)
        if options.r1_gamma > 0 and self._num_batches % options.r1_interval == 0:
            penalties = r1_penalties(self.discriminator, real, batch.labels[batch.part])
            yield "discriminator", penalties * (options.r1_gamma / 2 * options.r1_interval)
        with _fixed(self.discriminator):
            yield "generator", self._generator_losses(batch, rng)
        due = self._num_batches % options.path_length_interval == 0
        if options.path_length_weight > 0 and due:
            penalties = self._path_length_penalties(batch, rng)
            yield "generator", penalties * options.path_length_weight * options.path_length_interval
        self._adapt(batch)

    def _augmented(self, images: Tensor, batch: Batch, rng: torch.Generator) -> Tensor:
        """Change the images of this process's part as the discriminator is to see them."""
        changes: ImageChanges = draw_changes(
            len(batch),
            channels=self.image_shape[0],
            image_size=self.image_shape[1],
            probability=self.adaptation.probability,
            rng=rng,
        )
        return change_images(images, changes[batch.part])

    def _drawn(self, batch: Batch, rng: torch.Generator) -> Tensor:
        """Draw images with the labels of this process's part, some with mixed styles."""
        z, noise = self._draw_noise(batch, rng)
        other, _ = self._draw_noise(batch, rng, layers=False)
        size, device, num_styles = len(batch), rng.device, self.generator.num_styles
        crossover = torch.randint(1, num_styles, (size,), generator=rng, device=device)
        mixed = torch.rand(size, generator=rng, device=device) < self.training_options.style_mixing
        crossover = torch.where(mixed, crossover, num_styles)[batch.part]
        labels = batch.labels[batch.part]
        styles = self.generator.styles(z, labels, other=other, crossover=crossover)
        images: Tensor = self.generator(styles, noise)
        return images

    def _draw_noise(
        self, batch: Batch, rng: torch.Generator, *, layers: bool = True
    ) -> tuple[Tensor, Tensor]:
        """Draw latents, and with `layers` the noise of the convolutions, for a process's part."""
        latent_dim = self.generator.latent_dim
        length = self.noise_shape[0] if layers else latent_dim
        drawn = torch.randn(len(batch), length, generator=rng, device=rng.device)[batch.part]
        return drawn[:, :latent_dim], drawn[:, latent_dim:]

    def _discriminator_losses(self, real: Tensor, batch: Batch, rng: torch.Generator) -> Tensor:
        labels = batch.labels[batch.part]
        with torch.no_grad():
            drawn = self._augmented(self._drawn(batch, rng), batch, rng)
        real_logits = self.discriminator(real, labels)
        losses = F.softplus(-real_logits) + F.softplus(self.discriminator(drawn, labels))
        signs = real_logits.detach().sign()
        self.adaptation.see(signs)
        self.means.add(batch, discriminator_loss=losses, real_sign=signs)
        return losses

    def _generator_losses(self, batch: Batch, rng: torch.Generator) -> Tensor:
        drawn = self._augmented(self._drawn(batch, rng), batch, rng)
        losses = F.softplus(-self.discriminator(drawn, batch.labels[batch.part]))
        self.means.add(batch, generator_loss=losses)
        return losses

    def _path_length_penalties(self, batch: Batch, rng: torch.Generator) -> Tensor:
        """Return the squared deviation of path lengths from their mean, for half of the images."""
        z, noise = self._draw_noise(batch, rng)
        labels = batch.labels[batch.part]
        half = slice((len(labels) + 1) // 2)
        directions = torch.randn((len(batch), *self.image_shape), generator=rng, device=rng.device)[
            batch.part
        ]
        lengths = path_lengths(
            self.generator, z[half], labels[half], noise=noise[half], directions=directions[half]
        )
        mean = lengths.detach().mean()
        if batch.num_processes > 1:
            distributed.all_reduce(mean)
            mean /= batch.num_processes
        # A new tensor and not the buffer, which the next step changes.
        expected = self.path_length_mean.lerp(mean, PATH_LENGTH_DECAY)
        self.path_length_mean.copy_(expected)
        return (lengths - expected).square()

    def _adapt(self, batch: Batch) -> None:
        options = self.training_options
        self._num_batches += 1
        self.adaptation.num_batches += 1
        if self._num_batches % ADA_INTERVAL == 0:
            if batch.num_processes > 1:
                distributed.all_reduce(self.adaptation.signs)
            self.adaptation.adapt(target=options.ada_target, kimg=options.ada_kimg)

    @torch.no_grad()
    def after_step(self) -> None:
        """Move the average of the generator's weights on by a batch."""
        options, kimg = self.training_options, self._batch_size / 1000
        grown = self.half_life_share + kimg * options.ema_ramp / options.ema_kimg
        self.half_life_share.copy_(grown.clamp(max=1))
        change = 1 - torch.exp2(-kimg / (self.half_life_share * options.ema_kimg))
        pairs = zip(self.generator_ema.parameters(), self.generator.parameters(), strict=True)
        for average, current in pairs:
            average.lerp_(current, change)

    @torch.inference_mode()
    def member_scores(self, batch: Batch, rng: torch.Generator) -> dict[str, Tensor]:
        """Attack by the discriminator, which holds images for real that it was trained on."""
        return {"discriminator": self.discriminator(batch.images, batch.labels)}

    def measured(self) -> dict[str, Tensor]:
        """Return the means since `start`, and with what probability images are augmented now."""
        return super().measured() | {"augmentation_probability": self.adaptation.probability}

    def why_diverged(self, measures: Mapping[str, float]) -> str:
        """Say where a loss is not finite or the discriminator has won; see `measures`."""
        if wrong := super().why_diverged(measures):
            return wrong
        loss = measures["discriminator_loss"]
        if loss < DISCRIMINATOR_WON:
            return (
                f"discriminator_loss was {loss:.2g} over a whole round: the discriminator tells "
                "all images apart, and the generator learns nothing from it (a larger "
                "model.r1_gamma or a smaller model.ada_kimg holds it back)"
            )
        return ""

    @torch.inference_mode()
    def sample(
        self, labels: Tensor, noise: NoiseSource, *, advance: Advance = lambda number: None
    ) -> Tensor:
        """Draw an image for each label from the averaged weights."""
        drawn, latent_dim = noise(), self.generator.latent_dim
        network = self.generator_ema
        images: Tensor = network(
            network.styles(drawn[:, :latent_dim], labels), drawn[:, latent_dim:]
        )
        advance(len(labels))
        return images

    def description(self) -> dict[str, object]:
        """Say how it is trained."""
        options = self.training_options
        return {
            "loss": f"non-saturating, R1 with gamma {options.r1_gamma:g}",
            "path length weight": options.path_length_weight,
            "style mixing": options.style_mixing,
            "augmentation": f"adaptive, target {options.ada_target:g}",
            "drawn from": f"moving average, half-life {options.ema_kimg:g} thousand images",
        }

    def drawing_settings(self) -> dict[str, Any]:
        """Return what the generator network is made with."""
        return {"network": self._network_arguments}


def r1_penalties(discriminator: Discriminator, images: Tensor, labels: Tensor) -> Tensor:
    """Return the squared norm of a discriminator's gradient at each image, [N] float32.

    The gradient is that at the images as they are seen, so augmented.

    Source: arXiv 1801.04406, equation 9.
    """
    images = images.detach().requires_grad_()
    with full_precision(images.device):
        # Not called: compiled networks have no second derivative.
        logits = discriminator.forward(images, labels)
        (gradient,) = torch.autograd.grad(logits.sum(), images, create_graph=True)
    return gradient.square().sum((1, 2, 3))


def path_lengths(
    generator: StyleNetwork, z: Tensor, labels: Tensor, *, noise: Tensor, directions: Tensor
) -> Tensor:
    """Return how far each image moves along a random direction as its styles change, [N] float32.

    Args:
        generator: of the images.
        z: [N, latent_dim], standard normal.
        labels: [N] int64.
        noise: [N, noise_length], standard normal.
        directions: [N, C, H, W], standard normal.

    Source: arXiv 1912.04958, section 3.2.
    """
    with full_precision(z.device):
        styles = generator.styles(z, labels)
        # Not called: compiled networks have no second derivative.
        images = generator.forward(styles, noise)
        height, width = images.shape[2:]
        moved = (images * directions).sum() / math.sqrt(height * width)
        (gradient,) = torch.autograd.grad(moved, styles, create_graph=True)
    return gradient.square().sum(2).mean(1).sqrt()


@contextmanager
def _fixed(network: nn.Module) -> Iterator[None]:
    """Spare the gradients of a network that others are computed through."""
    network.requires_grad_(False)
    try:
        yield
    finally:
        network.requires_grad_(True)


def _rescaled_adam(network: nn.Module, lr: float, interval: int | None) -> torch.optim.Adam:
    """Make an Adam that takes a further step every `interval` batches as if it took none.

    Source: arXiv 1912.04958, appendix B, lazy regularization.
    """
    share = 1.0 if interval is None else interval / (interval + 1)
    betas = (0.0, 0.99**share)
    return torch.optim.Adam(network.parameters(), lr=lr * share, betas=betas, fused=True)


def build_stylegan2_ada(config: Config) -> StyleGAN2ADA:
    """Make the networks of a configuration, with weights from torch's global generator."""
    # By its family the registry has found this function, and the schema its class.
    model = cast(StyleGAN2ADAConfig, config.model)
    data, batch_size = config.data, config.train.trained_batch_size
    arguments = {
        "image_size": data.image_size,
        "channels": data.channels,
        "num_classes": len(data.classes),
        "latent_dim": model.latent_dim,
        "mapping_layers": model.mapping_layers,
        "channel_base": model.channel_base,
        "channel_max": model.channel_max,
    }
    r1_gamma, ema_kimg = model.r1_gamma, model.ema_kimg
    training = GanTraining(
        style_mixing=model.style_mixing,
        r1_gamma=2e-4 * data.image_size**2 / batch_size if r1_gamma is None else r1_gamma,
        r1_interval=model.r1_interval,
        path_length_weight=model.path_length_weight,
        path_length_interval=model.path_length_interval,
        ema_kimg=batch_size * 10 / 32 if ema_kimg is None else ema_kimg,
        ema_ramp=model.ema_ramp,
        ada_target=model.ada_target,
        ada_kimg=model.ada_kimg,
    )
    return StyleGAN2ADA(
        StyleNetwork(**arguments),
        Discriminator(**arguments, group_size=model.deviation_group),
        training,
        image_shape=(data.channels, data.image_size, data.image_size),
        network_arguments=arguments,
    )
