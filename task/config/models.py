"""The section `model`: the network of a generator, with a schema for each family.

A new family of generators is one subclass of `ModelConfig`, its entry in `MODELS` (or a call of
`task.generators.registry.register` in a package of its own), and one file in `conf/model/`. Beside
the values of its schema that file says `lr` and `batch_size`, and may say `accumulation` and
`clip_norm`; `conf/train/` takes them.
"""

from functools import cache
from importlib.metadata import entry_points
from typing import Any, ClassVar, Literal, Self

from pydantic import Field, model_validator

from task.checks import require, require_one_of
from task.config.data_config import DataConfig
from task.config.frozen_file import FrozenFile
from task.config.section import FineTuning, PositiveFloat, PositiveInt, Section


class ModelConfig(Section):
    """The network of a generator; `family` says of which.

    Attributes:
        accumulates: whether a step may be on the gradients of several batches.
        draws: whether it draws images; where not, the values of the section `eval` that ask for
            measured images are off.
        diffuses: whether the family takes the section `diffusion`, which is null for others.
        drawing_values: paths of the values of this section that change how images are drawn from
            weights, and no weights.
        loss_values: paths of those that say what the loss is of: losses cannot be compared where
            they differ.
        frozen_file: the file that training reads and leaves as it is; None in a family without.
        not_private: why it cannot be trained with differential privacy; "" where it can.
    """

    accumulates: ClassVar[bool] = True
    draws: ClassVar[bool] = True
    diffuses: ClassVar[bool] = False
    drawing_values: ClassVar[tuple[str, ...]] = ()
    loss_values: ClassVar[tuple[str, ...]] = ()
    frozen_file: ClassVar[FrozenFile | None] = None
    not_private: ClassVar[str] = ""
    family: str

    def check_images(self, data: DataConfig) -> None:
        """Raise a ValueError unless the network takes images of this shape."""

    def check_label_dropout(self, label_dropout: float) -> None:
        """Raise a ValueError unless labels can be hidden of the network at this rate."""


class UNetConfig(ModelConfig):
    """The U-Net of the released code and its smaller relatives."""

    diffuses = True
    family: Literal["diffusion"]
    width: PositiveInt
    num_poolings: PositiveInt
    bottom_blocks: int = Field(ge=2)
    final_relu: bool
    dropout: float = Field(ge=0, lt=1, description="in [0, 1)")
    class_embedding_dim: PositiveInt
    fourier_features: int = Field(
        gt=0, multiple_of=2, description="a positive even number (cosines and sines)"
    )

    def check_images(self, data: DataConfig) -> None:
        """Raise a ValueError unless every pooling halves the images."""
        divisor = 2**self.num_poolings
        expected = f"a multiple of {divisor} (2 to the power of model.num_poolings)"
        require(data.image_size % divisor == 0, "data.image_size", expected, data.image_size)


class AttentionUNetConfig(ModelConfig):
    """The U-Net with attention of the package denoising-diffusion-pytorch."""

    diffuses = True
    family: Literal["attention_unet"]
    width: int = Field(ge=4, multiple_of=2, description="an even number >= 4 (sines and cosines)")
    width_multipliers: list[PositiveInt] = Field(min_length=1)
    class_conditional: bool
    dropout: float = Field(ge=0, lt=1, description="in [0, 1)")

    def check_images(self, data: DataConfig) -> None:
        """Raise a ValueError unless every level but the last halves the images."""
        divisor = 2 ** (len(self.width_multipliers) - 1)
        expected = (
            f"a multiple of {divisor} (2 to the power of one less than the "
            f"{len(self.width_multipliers)} model.width_multipliers)"
        )
        require(data.image_size % divisor == 0, "data.image_size", expected, data.image_size)

    def check_label_dropout(self, label_dropout: float) -> None:
        """Raise a ValueError where labels are hidden of a network that sees none."""
        require(
            self.class_conditional or label_dropout == 0,
            "diffusion.label_dropout",
            "0 with model.class_conditional=false, which sees no labels",
            label_dropout,
        )


class VAEConfig(ModelConfig):
    """The variational autoencoder, fully connected or with convolutions."""

    loss_values = ("model.pixel_std",)
    family: Literal["vae"]
    hidden_dim: PositiveInt
    latent_dim: PositiveInt
    conv_channels: list[PositiveInt]
    class_conditional: bool
    pixel_std: PositiveFloat | None

    def check_images(self, data: DataConfig) -> None:
        """Raise a ValueError unless every convolution halves the images."""
        divisor = 2 ** len(self.conv_channels)
        expected = f"a multiple of {divisor} (2 to the power of the number of model.conv_channels)"
        require(data.image_size % divisor == 0, "data.image_size", expected, data.image_size)


class StyleGAN2ADAConfig(ModelConfig):
    """The networks of StyleGAN2 and how they are trained, see conf/model/stylegan2_ada.yaml."""

    accumulates = False
    not_private = (
        "its augmentation follows what the discriminator says of real images, which it compares "
        "with each other"
    )
    family: Literal["stylegan2_ada"]
    latent_dim: PositiveInt
    mapping_layers: PositiveInt
    channel_base: PositiveInt
    channel_max: PositiveInt
    deviation_group: PositiveInt
    style_mixing: float = Field(ge=0, le=1, description="in [0, 1]")
    r1_gamma: float | None = Field(
        ge=0, description=">= 0 (0: off), or null for what suits the size of image and batch"
    )
    r1_interval: PositiveInt
    path_length_weight: float = Field(ge=0, description=">= 0 (0: off)")
    path_length_interval: PositiveInt
    ema_kimg: float | None = Field(gt=0, description="> 0, or null for what suits the batch")
    ema_ramp: PositiveFloat
    ada_target: float = Field(gt=-1, le=1, description="in (-1, 1] (1: no augmentation)")
    ada_kimg: PositiveFloat

    def check_images(self, data: DataConfig) -> None:
        """Raise a ValueError unless the images double from 4x4."""
        size = data.image_size
        require(
            size & (size - 1) == 0,
            "data.image_size",
            "a power of 2 with model.family=stylegan2_ada, such as 32, 64 or 128",
            size,
        )


class ResNetGANConfig(ModelConfig):
    """A GAN of residual blocks."""

    accumulates = False
    family: Literal["resnet_gan"]
    width: PositiveInt
    latent_dim: PositiveInt
    class_conditional: bool
    discriminator_steps: PositiveInt
    ema_decay: float = Field(ge=0, lt=1, description="in [0, 1) (0: off)")

    def check_images(self, data: DataConfig) -> None:
        """Raise a ValueError unless blocks that double 4x4 reach the size of the images."""
        _require_doubled_size(data)


class SmallGANConfig(ModelConfig):
    """A pretrained generator of which scales and shifts of channels are trained."""

    drawing_values = ("model.truncation",)
    frozen_file: ClassVar[FrozenFile] = FrozenFile(
        "model.pretrained",
        "model.pretrained_sha256",
        expected="a finished run of model=resnet_gan, or its model.safetensors",
    )
    family: Literal["small_gan"]
    pretrained: str
    pretrained_sha256: str = Field(
        pattern="^([0-9a-f]{64})?$", description="64 hexadecimal digits, or empty for any file"
    )
    width: PositiveInt
    latent_dim: PositiveInt
    class_conditional: bool
    latent_noise: float = Field(ge=0, description=">= 0")
    perceptual_weight: float = Field(ge=0, description=">= 0 (0: pixels alone)")
    latent_weight: float = Field(ge=0, description=">= 0")
    regularization_weight: float = Field(ge=0, description=">= 0")
    truncation: PositiveFloat

    def check_images(self, data: DataConfig) -> None:
        """Raise a ValueError unless the base draws such images, and each of them has one latent."""
        _require_doubled_size(data)
        require(
            not data.horizontal_flip,
            "data.horizontal_flip",
            "false with model=small_gan, whose one latent per image cannot draw its mirror as well",
            data.horizontal_flip,
        )


class ClassifierConfig(ModelConfig):
    """A classifier, which reads images and draws none."""

    draws = False
    family: Literal["classifier"]
    network: Literal["efficientnet", "small"]
    fine_tuning: FineTuning

    @model_validator(mode="after")
    def _check(self) -> Self:
        require(
            self.network != "small" or self.fine_tuning == "head",
            "model.fine_tuning",
            "left out with model.network=small, all of which is trained",
            self.fine_tuning,
        )
        return self


def _require_doubled_size(data: DataConfig) -> None:
    sizes = (8, 16, 32, 64, 128)
    expected = f"one of {', '.join(map(str, sizes))} (4 doubled by up to 5 blocks)"
    require(data.image_size in sizes, "data.image_size", expected, data.image_size)


MODELS: dict[str, type[ModelConfig]] = {
    "diffusion": UNetConfig,
    "attention_unet": AttentionUNetConfig,
    "vae": VAEConfig,
    "stylegan2_ada": StyleGAN2ADAConfig,
    "resnet_gan": ResNetGANConfig,
    "small_gan": SmallGANConfig,
    "classifier": ClassifierConfig,
}


def model_schemas(family: object = None) -> dict[str, type[ModelConfig]]:
    """Return the schema of a family by its name, or those of all where no family has the name.

    Packages of others are asked for a family that feddm does not know.
    """
    if not isinstance(family, str):
        return MODELS
    if family not in MODELS:
        _load_installed_families()
    return {family: MODELS[family]} if family in MODELS else MODELS


# By family, of those that a package beside feddm has brought: its name and version.
PACKAGES: dict[str, str] = {}


@cache
def _load_installed_families() -> None:
    """Let packages beside feddm register their families.

    Raises:
        ValueError: one cannot be imported.
    """
    for found in entry_points(group="feddm.generators"):
        package = "" if found.dist is None else f"{found.dist.name} {found.dist.version}"
        known = set(MODELS)
        try:
            found.load()
        except (ImportError, AttributeError) as error:
            raise ValueError(
                f"model.family: the package {package} brings a family of generators in "
                f"{found.value} that cannot be imported ({error}); install what it needs, or "
                "uninstall it"
            ) from error
        PACKAGES.update(dict.fromkeys(set(MODELS) - known, package))


def package_of(family: str) -> str:
    """Name the package beside feddm that has brought a family, and its version; "" of feddm's."""
    return PACKAGES.get(family, "")


def of_family(value: object) -> object:
    """Check the values of a network by the schema of its family."""
    if not isinstance(value, dict):
        return value
    family: Any = value.get("family")
    schemas = model_schemas(family)
    require_one_of("model.family", family, tuple(schemas))
    return schemas[family].model_validate(value)
