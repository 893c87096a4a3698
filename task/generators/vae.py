"""The variational autoencoder, fully connected or convolutional."""

import math
from collections.abc import Iterator, Mapping, Sequence
from itertools import pairwise
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from task.config import Config, VAEConfig
from task.generators.base import Advance, Batch, Generator, NoiseSource


class ClassBiasedLinear(nn.Module):
    """A linear layer with a bias of each class, which is what a one-hot label in its input adds."""

    def __init__(self, num_inputs: int, num_outputs: int, num_classes: int | None) -> None:
        """Make the layer; the biases of the classes begin at 0.

        Args:
            num_inputs: numbers of an input.
            num_outputs: numbers of an output.
            num_classes: None: labels are ignored.
        """
        super().__init__()
        self.linear = nn.Linear(num_inputs, num_outputs)
        self.class_bias = None if num_classes is None else nn.Embedding(num_classes, num_outputs)
        if self.class_bias is not None:
            nn.init.zeros_(self.class_bias.weight)

    def forward(self, inputs: Tensor, labels: Tensor) -> Tensor:
        """Map inputs, [N, num_inputs], of labels, [N] int64, to [N, num_outputs]."""
        outputs: Tensor = self.linear(inputs)
        return outputs if self.class_bias is None else outputs + self.class_bias(labels)


class Encoder(nn.Module):
    """Gives the approximate posterior of an image's latent: a Gaussian of independent numbers."""

    def __init__(
        self,
        *,
        image_shape: tuple[int, int, int],
        hidden_dim: int,
        latent_dim: int,
        conv_channels: Sequence[int],
        num_classes: int | None,
    ) -> None:
        """Make the network.

        Args:
            image_shape: (C, H, W).
            hidden_dim: numbers of the hidden layer.
            latent_dim: numbers of a latent.
            conv_channels: of the convolutions before it, each of which halves the image.
            num_classes: None: labels are ignored.
        """
        super().__init__()
        channels = (image_shape[0], *conv_channels)
        self.convolutions = nn.Sequential()
        for inputs, outputs in pairwise(channels):
            self.convolutions.append(nn.Conv2d(inputs, outputs, 4, stride=2, padding=1))
            self.convolutions.append(nn.LeakyReLU())
        num_features = math.prod(feature_shape(image_shape, conv_channels))
        self.hidden = ClassBiasedLinear(num_features, hidden_dim, num_classes)
        self.output = nn.Linear(hidden_dim, 2 * latent_dim)

    def forward(self, pixels: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Return the means and the logarithms of the variances, each [N, latent_dim].

        Args:
            pixels: [N, C, H, W] float32 in [0, 1].
            labels: [N] int64.
        """
        features = self.convolutions(pixels).flatten(1)
        hidden = F.leaky_relu(self.hidden(features, labels))
        mean, log_variance = self.output(hidden).chunk(2, dim=1)
        return mean, log_variance


class Decoder(nn.Module):
    """The mirror of `Encoder`: gives the pixels of a latent, in logits."""

    def __init__(
        self,
        *,
        image_shape: tuple[int, int, int],
        hidden_dim: int,
        latent_dim: int,
        conv_channels: Sequence[int],
        num_classes: int | None,
    ) -> None:
        """Make the network; arguments as in `Encoder`, whose order the convolutions reverse."""
        super().__init__()
        self.hidden = ClassBiasedLinear(latent_dim, hidden_dim, num_classes)
        self._feature_shape = feature_shape(image_shape, conv_channels)
        self.features = nn.Linear(hidden_dim, math.prod(self._feature_shape))
        channels = (*reversed(conv_channels), image_shape[0])
        self.convolutions = nn.Sequential()
        for inputs, outputs in pairwise(channels):
            self.convolutions.append(nn.LeakyReLU())
            self.convolutions.append(nn.ConvTranspose2d(inputs, outputs, 4, stride=2, padding=1))

    def forward(self, latents: Tensor, labels: Tensor) -> Tensor:
        """Return the logits of pixels in [0, 1], [N, C, H, W].

        Args:
            latents: [N, latent_dim] float32.
            labels: [N] int64.
        """
        hidden = F.leaky_relu(self.hidden(latents, labels))
        logits: Tensor = self.convolutions(self.features(hidden).unflatten(1, self._feature_shape))
        return logits


def feature_shape(
    image_shape: tuple[int, int, int], conv_channels: Sequence[int]
) -> tuple[int, int, int]:
    """Return (C, H, W) of what convolutions that halve an image each make of it."""
    channels, height, width = image_shape
    divisor = 2 ** len(conv_channels)
    return (channels, *conv_channels)[-1], height // divisor, width // divisor


class VAE(Generator):
    """A variational autoencoder.

    Its loss is the negative evidence lower bound (ELBO) of an image in nats, estimated with one
    latent: what the image costs when it is decoded, summed over pixels ("reconstruction"), plus the
    divergence of the latent's posterior from the prior N(0, I) ("kl").

    Attributes:
        encoder: of pixels in [0, 1] and labels, see `Encoder`.
        decoder: of latents and labels, see `Decoder`.
        class_conditional: whether both read the labels; otherwise an image is of any class.
        pixel_std: the standard deviation of a pixel around the decoded one; None: the
            reconstruction is the cross-entropy, which takes a pixel for the probability of white.

    Source: Kingma and Welling, arXiv 1312.6114, equations 7 and 10 and appendix B; with classes:
        Sohn et al., "Learning Structured Output Representation using Deep Conditional Generative
        Models", equation 4.
    """

    title = "variational autoencoder"
    private = frozenset({"adam"})
    parts = MappingProxyType({"encoder": ("encoder.",), "decoder": ("decoder.",)})
    undrawn = frozenset({"encoder"})
    loss_parts = ("reconstruction", "kl")
    measures = loss_parts

    def __init__(
        self,
        encoder: nn.Module,
        decoder: nn.Module,
        *,
        image_shape: tuple[int, int, int],
        latent_dim: int,
        class_conditional: bool,
        pixel_std: float | None = None,
        network_arguments: Mapping[str, Any] = MappingProxyType({}),
    ) -> None:
        """Join two networks.

        Args:
            encoder: as `Encoder`.
            decoder: as `Decoder`.
            image_shape: (C, H, W).
            latent_dim: numbers of a latent.
            class_conditional: whether the networks read the labels.
            pixel_std: > 0, see above.
            network_arguments: what both networks were made with, for an export.
        """
        super().__init__()
        self.encoder, self.decoder = encoder, decoder
        self.image_shape, self.noise_dim = image_shape, latent_dim
        self.class_conditional, self.pixel_std = class_conditional, pixel_std
        self._network_arguments = dict(network_arguments)

    def optimizers(self, lr: float) -> dict[str, torch.optim.Optimizer]:
        """Make the one Adam of both networks."""
        return {"adam": torch.optim.Adam(self.parameters(), lr=lr, fused=True)}

    def losses(self, batch: Batch, rng: torch.Generator) -> Iterator[tuple[str, Tensor]]:
        """Yield the negative ELBO of each image."""
        found = self.example_losses(batch, rng)
        self.means.add(batch, **{name: found[name] for name in self.measures})
        yield "adam", found["loss"]

    def example_losses(self, batch: Batch, rng: torch.Generator) -> dict[str, Tensor]:
        """Return the negative ELBO of each image and its two parts; see the class."""
        drawn = torch.randn(len(batch), *self.noise_shape, generator=rng, device=rng.device)
        images, labels, noise = (each[batch.part] for each in (batch.images, batch.labels, drawn))
        pixels = (images + 1) / 2
        mean, log_variance = (each.float() for each in self.encoder(pixels, labels))
        latents = mean + (log_variance / 2).exp() * noise
        reconstruction = self._reconstruction(self.decoder(latents, labels).float(), pixels)
        kl = (mean.square() + log_variance.exp() - 1 - log_variance).sum(1) / 2
        return {"loss": reconstruction + kl, "reconstruction": reconstruction, "kl": kl}

    def _reconstruction(self, logits: Tensor, pixels: Tensor) -> Tensor:
        """Return the negative log-likelihood of pixels, summed over each image, [N]."""
        if self.pixel_std is None:
            each = F.binary_cross_entropy_with_logits(logits, pixels, reduction="none")
            return each.flatten(1).sum(1)
        distances = (pixels - logits.sigmoid()) / self.pixel_std
        constant = math.log(self.pixel_std) + math.log(2 * math.pi) / 2
        return (distances.square() / 2 + constant).flatten(1).sum(1)

    @torch.inference_mode()
    def sample(
        self, labels: Tensor, noise: NoiseSource, *, advance: Advance = lambda number: None
    ) -> Tensor:
        """Decode a latent of the prior for each label: the mean image, without noise of pixels."""
        logits: Tensor = self.decoder(noise(), labels)
        advance(len(labels))
        return 2 * logits.float().sigmoid() - 1

    def description(self) -> dict[str, object]:
        """Say what the loss and the latents are, and what is drawn."""
        likelihood = "cross-entropy"
        if self.pixel_std is not None:
            likelihood = f"Gaussian, standard deviation {self.pixel_std:g} of pixels in [0, 1]"
        return {
            "reconstruction": f"{likelihood}, summed over pixels",
            "latent": f"{self.noise_shape[0]} numbers",
            "class-conditional": "yes" if self.class_conditional else "no: of any class",
            "draws": "the mean of the pixels",
        }

    def drawing_settings(self) -> dict[str, Any]:
        """Return what the networks were made with."""
        return {"network": self._network_arguments}


def build_vae(config: Config) -> VAE:
    """Make the variational autoencoder of a configuration, with weights from torch's generator.

    Raises:
        TypeError: the configuration is of another family.
    """
    data, model = config.data, config.model
    if not isinstance(model, VAEConfig):
        raise TypeError(f"build_vae takes a configuration of model.family=vae, got {model.family}")
    arguments = {
        "image_shape": (data.channels, data.image_size, data.image_size),
        **model.model_dump(include={"hidden_dim", "latent_dim", "conv_channels"}),
        "num_classes": len(data.classes) if model.class_conditional else None,
    }
    return VAE(
        Encoder(**arguments),
        Decoder(**arguments),
        image_shape=arguments["image_shape"],
        latent_dim=model.latent_dim,
        class_conditional=model.class_conditional,
        pixel_std=model.pixel_std,
        network_arguments=arguments,
    )
