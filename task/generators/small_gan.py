"""Batch statistics adaptation: a frozen generator learns small sets by scales and shifts alone."""

import math
from collections.abc import Callable, Iterator, Sequence
from types import MappingProxyType
from typing import Self

import torch
from safetensors import SafetensorError
from safetensors.torch import load as load_tensors
from torch import Tensor, nn

from task.checks import require
from task.config import Config, SmallGANConfig
from task.efficientnet import check_pretrained, enlarged, pretrained_efficientnet
from task.generators.base import Advance, Batch, Generator, NoiseSource
from task.generators.resnet_gan import Modulation, ResNetGenerator, modulated_channels

# What a pretrained file names the moving average of its generator by.
PRETRAINED_PREFIX = "generator_ema."
# Draws of the prior that the latents of an image are compared with.
PRIOR_DRAWS = 10

# Smaller images are enlarged for the network of the perceptual part, which knows 224x224: this
# costs a fifth of that.
PERCEPTUAL_SIDE = 96

# Feature maps of images, [N, C, H, W] float32 in [-1, 1], of several depths of a network.
PerceptualFeatures = Callable[[Tensor], Sequence[Tensor]]


class SmallGAN(Generator):
    """A frozen generator of which the scales and shifts of channels are trained, without a critic.

    Each training image has a latent, from which the generator is to draw it. Latents describe
    single images and never leave a client; of a generator of width 64 for images of 128x128, 11,904
    numbers travel, or as many for each class.

    Attributes:
        base: the frozen generator.
        scale: [R, P] float32, of all places of `modulated_channels` after each other; R: 1, or the
            number of classes.
        shift: likewise.
        latents: [number of training images, latent_dim] float32; None before `prepare`.

    Source: Noguchi & Harada 2019, arXiv 1904.01774. There the first linear layer is trained as
    well, at a learning rate of 1e-7, which is left out.
    """

    title = "GAN with adapted batch statistics"
    private = frozenset({"adam"})
    local: frozenset[str] = frozenset({"latents"})
    parts = MappingProxyType({"shift": ("shift",), "scale": ("scale",)})
    bound_to_images = True
    frozen: frozenset[str] = frozenset({"base."})
    # Of the latents; that of a few thousand scales adds nothing of note.
    local_optimizers: frozenset[str] = frozenset({"adam"})
    # The distance of latents hides that of images in the loss.
    measures: tuple[str, ...] = ("reconstruction", "latent_distance")

    def __init__(
        self,
        image_shape: tuple[int, int, int],
        *,
        width: int,
        latent_dim: int,
        num_classes: int,
        loss: "AdaptationLoss",
        truncation: float,
        pretrained: str = "",
        pretrained_sha256: str = "",
    ) -> None:
        """Make the networks; `load_frozen` reads the base.

        Args:
            image_shape: (C, H, W), square.
            width: of the pretrained generator.
            latent_dim: of the pretrained generator.
            num_classes: that have scales and shifts of their own; 1: shared by all.
            loss: of images.
            truncation: latents are drawn from N(0, I) between -truncation and truncation.
            pretrained: see `read_pretrained`; empty: it cannot be trained.
            pretrained_sha256: see `read_pretrained`.
        """
        super().__init__()
        self.image_shape, self.noise_dim = image_shape, latent_dim
        self.loss, self.truncation = loss, truncation
        self._pretrained, self._sha256 = pretrained, pretrained_sha256
        self._is_loaded = False
        self._channels = modulated_channels(width, image_shape[1])
        self.base = ResNetGenerator(image_shape, width=width, latent_dim=latent_dim, num_classes=1)
        self.base.requires_grad_(False).eval()
        self.scale = nn.Parameter(torch.ones(num_classes, sum(self._channels)))
        self.shift = nn.Parameter(torch.zeros(num_classes, sum(self._channels)))
        self.register_parameter("latents", None)
        self.latents: nn.Parameter | None

    def train(self, mode: bool = True) -> Self:
        """Set the mode; the frozen generator normalizes by what it was trained with."""
        super().train(mode)
        self.base.eval()
        return self

    @property
    def num_parameters(self) -> int:
        """The number of trained values that clients share."""
        return self.scale.numel() + self.shift.numel()

    def load_frozen(self) -> None:
        """Read the frozen generator from the pretrained file.

        Raises:
            FileNotFoundError: there is no such file, or the loss looks through a network whose
                package is not installed.
            ValueError: none is named, it is not the file of the run, or does not fit.
        """
        weights = read_pretrained(self._pretrained, self._sha256)
        fit_pretrained(self.base, weights, self._pretrained)
        self.loss.load_features()
        self._is_loaded = True

    def prepare(self, num_images: int) -> None:
        """Make a latent for each training image, all 0.

        Raises:
            RuntimeError: the frozen generator was not loaded.
        """
        if not self._is_loaded:
            raise RuntimeError("load_frozen must be called before training")
        self.latents = nn.Parameter(self.scale.new_zeros(num_images, *self.noise_shape))

    def optimizers(self, lr: float) -> dict[str, torch.optim.Optimizer]:
        """Make the Adam of scales, shifts and latents."""
        trained = [each for each in (self.scale, self.shift, self.latents) if each is not None]
        return {"adam": torch.optim.Adam(trained, lr=lr, fused=True)}

    def losses(self, batch: Batch, rng: torch.Generator) -> Iterator[tuple[str, Tensor]]:
        """Yield the losses of drawing the images of a batch from their latents."""
        if self.latents is None:
            raise RuntimeError("prepare must be called before training")
        latents, part = self.latents[batch.indices], batch.part
        noise = torch.randn(latents.shape, generator=rng, device=rng.device)
        shape = (PRIOR_DRAWS * len(batch), *self.noise_shape)
        prior = torch.randn(shape, generator=rng, device=rng.device)
        labels = batch.labels[part]
        noisy = (latents + self.loss.latent_noise * noise)[part]
        drawn = self.base(noisy, labels, self._modulation(labels))
        reconstruction = self.loss.of_images(drawn, batch.images[part])
        distances = latent_distances(latents, prior)[part]
        self.means.add(batch, reconstruction=reconstruction, latent_distance=distances)
        losses = reconstruction + self.loss.latent_weight * distances
        yield "adam", losses + self.loss.regularization_weight * self._regularization(labels)

    def _modulation(self, labels: Tensor) -> Modulation:
        rows = self._rows(labels)
        scales, shifts = (self._by_place(each[rows]) for each in (self.scale, self.shift))
        return list(zip(scales, shifts, strict=True))

    def _rows(self, labels: Tensor) -> Tensor:
        return labels if len(self.scale) > 1 else torch.zeros_like(labels)

    def _by_place(self, channels: Tensor) -> Sequence[Tensor]:
        return torch.split(channels, self._channels, dim=1)

    def _regularization(self, labels: Tensor) -> Tensor:
        """Sum, over the places, the mean squared distances of scales to 1 and of shifts to 0.

        Of the rows of the labels alone, [N] float32: one without images would be drawn back to the
        base where it is not trained, and its adaptation at other clients undone.
        """
        places = [*self._by_place(self.scale - 1), *self._by_place(self.shift)]
        return torch.stack([each.square().mean(1) for each in places]).sum(0)[self._rows(labels)]

    @torch.inference_mode()
    def sample(
        self, labels: Tensor, noise: NoiseSource, *, advance: Advance = lambda number: None
    ) -> Tensor:
        """Draw an image for each label, from latents near 0."""
        latents = truncated(noise(), self.truncation)
        images: Tensor = self.base(latents, labels, self._modulation(labels))
        advance(len(labels))
        return images

    def description(self) -> dict[str, object]:
        """Say what is adapted and how latents are drawn."""
        rows = len(self.scale)
        return {
            "adaptation": f"{self.num_parameters:,} scales and shifts"
            + (f", a set for each of {rows} classes" if rows > 1 else ", shared by all classes"),
            "latents": f"N(0, I) between -{self.truncation:g} and {self.truncation:g}",
        }


class PretrainedMaps:
    """Looks at images through a network trained on ImageNet, at several depths.

    No module, so that its weights are none of the generator's.
    """

    def __init__(self) -> None:
        """Read the weights.

        Raises:
            FileNotFoundError: their package is not installed.
            ValueError: they are others than the published ones.
        """
        file = check_pretrained("model.perceptual_weight > 0", "model.perceptual_weight=0")
        self._network = pretrained_efficientnet(file, "cpu")

    def __call__(self, images: Tensor) -> Sequence[Tensor]:
        """Return feature maps; see `PerceptualFeatures`."""
        side = max(PERCEPTUAL_SIDE, images.shape[-1])
        return self._network.to(images.device).maps(enlarged(images, side))


class AdaptationLoss:
    """How far drawn images are from those that they are to be, and the weights of the other terms.

    Attributes:
        latent_noise: deviation of what is added to latents in training.
        latent_weight: of `latent_distances`.
        regularization_weight: of the distance of scales and shifts to those of the base.
    """

    def __init__(
        self,
        *,
        latent_noise: float,
        latent_weight: float,
        regularization_weight: float,
        perceptual_weight: float = 0.0,
        features: PerceptualFeatures | None = None,
    ) -> None:
        """Take the weights; `perceptual_weight` is that of the distances of each feature map."""
        self.latent_noise, self.latent_weight = latent_noise, latent_weight
        self.regularization_weight = regularization_weight
        self.perceptual_weight, self._features = perceptual_weight, features

    def load_features(self) -> None:
        """Load what the perceptual part looks through, where it has a weight.

        Raises:
            FileNotFoundError: its package is not installed.
            ValueError: its weights are others than the published ones.
        """
        if self.perceptual_weight > 0 and self._features is None:
            self._features = PretrainedMaps()

    def of_images(self, drawn: Tensor, images: Tensor) -> Tensor:
        """Return the mean absolute differences of pixels and, weighted, of features, [N] float32.

        Args:
            drawn: [N, C, H, W] float32 in [-1, 1].
            images: likewise; what `drawn` is to be.
        """
        losses = mean_distances(drawn, images)
        if self._features is None:
            return losses
        with torch.no_grad():
            wanted = self._features(images)
        distances = map(mean_distances, self._features(drawn), wanted)
        return losses + self.perceptual_weight * torch.stack([*distances]).sum(0)


def mean_distances(these: Tensor, others: Tensor) -> Tensor:
    """Return the mean absolute difference of each pair, [N] float32."""
    return (these.float() - others.float()).abs().flatten(1).mean(1)


def latent_distances(latents: Tensor, prior: Tensor) -> Tensor:
    """Tell how far latents and draws of a prior are apart, both ways.

    Args:
        latents: [N, D] float32.
        prior: [M, D] float32.

    Returns:
        [N] float32: the squared distance of each latent to the nearest draw, plus the mean over
        draws of those to the nearest latent.
    """
    # bfloat16 would lose the small distances in the products.
    with torch.autocast(latents.device.type, enabled=False):
        products = latents @ prior.T
        distances = latents.square().sum(1, keepdim=True) - 2 * products + prior.square().sum(1)
        return distances.amin(1) + distances.amin(0).mean()


def truncated(noise: Tensor, limit: float) -> Tensor:
    """Turn standard normal noise into that of a normal distribution cut off at -limit and limit."""
    inside = math.erf(limit / math.sqrt(2))
    # In float64, or noise of 6 deviations would be rounded to infinity.
    within = torch.erf(noise.double() / math.sqrt(2)) * inside
    return (torch.erfinv(within) * math.sqrt(2)).clamp(-limit, limit).to(noise.dtype)


def read_pretrained(path: str, sha256: str = "") -> dict[str, Tensor]:
    """Read the generator of a finished run of model=resnet_gan.

    Args:
        path: of the run's folder, or of its model.safetensors.
        sha256: that the file must have; empty: any.

    Returns:
        Its tensors by the names of `ResNetGenerator`.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is another file than `sha256` tells, or holds no such generator.
    """
    content, _ = SmallGANConfig.frozen_file.read(path, sha256)
    try:
        tensors = load_tensors(content)
    except SafetensorError as error:
        raise ValueError(
            f"model.pretrained must be a readable safetensors file, got that of {path}: {error}"
        ) from error
    weights = {
        name.removeprefix(PRETRAINED_PREFIX): tensor
        for name, tensor in tensors.items()
        if name.startswith(PRETRAINED_PREFIX)
    }
    require(
        weights != {},
        "model.pretrained",
        f"a run of model=resnet_gan, whose tensors are named {PRETRAINED_PREFIX}*",
        path,
    )
    return weights


def fit_pretrained(base: ResNetGenerator, weights: dict[str, Tensor], path: str) -> None:
    """Load the weights of a generator of any classes into one without, by the mean of theirs.

    Raises:
        ValueError: a tensor is missing, unknown or of another shape, which is named.
    """
    weights = {
        name: tensor.mean(0, keepdim=True)
        if name.endswith((".gain", ".bias")) and tensor.dim() == 2
        else tensor
        for name, tensor in weights.items()
    }
    found = {name: tuple(tensor.shape) for name, tensor in weights.items()}
    wanted = {name: tuple(tensor.shape) for name, tensor in base.state_dict().items()}
    for name in sorted(found.keys() | wanted.keys()):
        require(
            found.get(name) == wanted.get(name),
            "model.pretrained",
            "of the same model.width, model.latent_dim, data.image_size and data.channels: "
            f"{name} of {path} of shape {wanted.get(name)}",
            found.get(name),
        )
    base.load_state_dict(weights)


def build_small_gan(config: Config) -> SmallGAN:
    """Make the adapted GAN of a configuration, its frozen part not yet loaded."""
    data, model = config.data, config.model
    if not isinstance(model, SmallGANConfig):
        raise TypeError(f"config.model must be a SmallGANConfig, got {type(model).__name__}")
    loss = AdaptationLoss(
        latent_noise=model.latent_noise,
        latent_weight=model.latent_weight,
        regularization_weight=model.regularization_weight,
        perceptual_weight=model.perceptual_weight,
    )
    return SmallGAN(
        (data.channels, data.image_size, data.image_size),
        width=model.width,
        latent_dim=model.latent_dim,
        num_classes=len(data.classes) if model.class_conditional else 1,
        loss=loss,
        truncation=model.truncation,
        pretrained=model.pretrained,
        pretrained_sha256=model.pretrained_sha256,
    )
