"""Pictures of which a part is known, filled in, enlarged or colored by a generator that can.

What is known of an image is its orthogonal projection onto some subspace: the pixels outside a
mask, the means of blocks, or the brightness of colors.
"""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional as F

from task.checks import require
from task.config import Config, changed_config
from task.data import normalize
from task.data.shape import LUMA
from task.generation.batches import block_noise, fitting_batch_size, to_uint8
from task.generation.images import GeneratedImages
from task.generators.base import Generator, Projection
from task.randomness import Stream, torch_generator
from task.training.devices import autocast, move

# What a caller may change of a run's configuration.
RESTORATION_VALUES = frozenset(
    {
        *("seed", "train.device", "eval.batch_size", "eval.precision"),
        *("diffusion.num_inference_steps", "diffusion.guidance_scale", "diffusion.clip_x_start"),
    }
)


@dataclass(frozen=True, eq=False)
class Mask:
    """Some pixels are known.

    Attributes:
        known: [H, W] bool, true where a pixel is.
    """

    known: Tensor

    def __call__(self, images: Tensor) -> Tensor:
        """Black the unknown pixels out, to 0."""
        return images * self.known.to(images.device)

    def least(self, values: Tensor) -> Tensor:
        """Return the values: each pixel stands alone."""
        return values


@dataclass(frozen=True)
class BlockMean:
    """The means of square blocks are known.

    Attributes:
        size: height and width of a block; divides those of the images.
    """

    size: int

    def __call__(self, images: Tensor) -> Tensor:
        """Replace each pixel by the mean of its block."""
        return enlarge(F.avg_pool2d(images, self.size), self.size)

    def least(self, values: Tensor) -> Tensor:
        """Replace each value by the least of its block."""
        return enlarge(-F.max_pool2d(-values, self.size), self.size)


@dataclass(frozen=True)
class Luma:
    """The brightness of each pixel is known, of images with 3 channels."""

    def __call__(self, images: Tensor) -> Tensor:
        """Keep of each color its part along that of brightness, ITU-R BT.601."""
        weights = LUMA.to(images)[:, None, None]
        brightness = (images * weights).sum(1, keepdim=True)
        return brightness * weights / weights.square().sum()

    def least(self, values: Tensor) -> Tensor:
        """Replace each value by the least of its pixel."""
        return values.amin(1, keepdim=True).expand_as(values)


def enlarge(images: Tensor, factor: int) -> Tensor:
    """Turn each pixel of [N, C, H, W] into a block of `factor` x `factor`."""
    return images.repeat_interleave(factor, -1).repeat_interleave(factor, -2)


def picture_shape(
    config: Config, *, mask: bool, upscale: int | None, colorize: bool
) -> tuple[int, int, int]:
    """Return (C, H, W) that a picture must have for a task.

    Raises:
        ValueError: there is not exactly one task, or the run's images do not fit it.
    """
    asked = mask + (upscale is not None) + colorize
    require(asked == 1, "one of mask, upscale and colorize", "given, no more", asked)
    channels, size = config.data.channels, config.data.image_size
    if upscale is not None:
        fits = upscale > 1 and size % upscale == 0
        require(fits, "upscale", f"> 1 and a divisor of data.image_size={size}", upscale)
        size //= upscale
    if colorize:
        require(channels == 3, "data.channels", "3 for colorize", channels)
        channels = 1
    return channels, size, size


def restoration_config(
    config: Config, overrides: Iterable[str] = (), *, options: Mapping[str, object | None]
) -> Config:
    """Change a run's configuration for restoring; see `task.config.changed_config`."""
    if config.diffusion is not None:
        # RePaint's steps are those of ddim with eta = 1, whatever the run draws with, and may skip.
        config = config.changed({"diffusion.sampler": "ddim", "diffusion.eta": 1.0})
    names = RESTORATION_VALUES & config.generation_values
    return changed_config(config, overrides, options=options, names=names)


def known_part(
    config: Config,
    images: Tensor,
    *,
    mask: Tensor | None = None,
    upscale: int | None = None,
    colorize: bool = False,
) -> tuple[Tensor, Projection]:
    """Say what pictures tell about the images that are wanted.

    Args:
        config: of the run, for the shape of its images.
        images: [N, *`picture_shape`] uint8; with `mask` as large as the model's images, with
            `upscale` [N, C, H / upscale, W / upscale], with `colorize` [N, 1, H, W].
        mask: [H, W] bool, true where a picture is to be filled.
        upscale: how many times larger than the pictures the images are.
        colorize: whether the pictures lack their colors.

    Returns:
        Images that have the known projection, [N, C, H, W] float32 in [-1, 1], and the projection.

    Raises:
        TypeError: the pictures are not uint8, or the mask not bool.
        ValueError: not exactly one of `mask`, `upscale`, `colorize` is given, or shapes do not fit.
    """
    shape = picture_shape(config, mask=mask is not None, upscale=upscale, colorize=colorize)
    fits = images.ndim == 4 and len(images) > 0 and tuple(images.shape[1:]) == shape
    require(fits, "images", f"of shape (N, {', '.join(map(str, shape))})", tuple(images.shape))
    if mask is not None:
        if mask.dtype != torch.bool:
            raise TypeError(f"mask must be bool, true where to fill, got {mask.dtype}")
        require(mask.shape == shape[1:], "mask", f"of shape {shape[1:]}", tuple(mask.shape))
        require(bool(mask.any()), "mask", "true (white) somewhere", "nothing to fill")
        return normalize(images), Mask(~mask)
    if upscale is not None:
        return enlarge(normalize(images), upscale), BlockMean(upscale)
    return normalize(images).expand(-1, config.data.channels, -1, -1), Luma()


class Restorer:
    """Draws images of a class that have known projections, several for each of them.

    Attributes:
        label: of the class.
        device: that draws.
    """

    def __init__(
        self,
        config: Config,
        generator: Generator,
        known: Tensor,
        projection: Projection,
        *,
        label: int,
        num_images: int,
        device: torch.device,
        **options: int | None,
    ) -> None:
        """Bring a generator to a device, and check all that can be checked before drawing.

        Args:
            config: of the run, with its seed, `eval.batch_size` and `eval.precision`.
            generator: moved to `device`, and set to evaluate.
            known: [N, C, H, W] float32, see `known_part`.
            projection: see `known_part`.
            label: of the class.
            num_images: for each of `known`, >= 1.
            device: that draws.
            **options: see `Generator.restoring`.

        Raises:
            ValueError: a number is out of range, or the generator cannot restore.
        """
        require(num_images >= 1, "num_images", ">= 1", num_images)
        self.label, self.device = label, device
        self._config, self._num_images = config, num_images
        self._known, self._projection = known, projection
        self._generator = generator
        self._restore = generator.restoring(**options)
        move(generator, device, channels_last=config.train.channels_last)
        generator.eval()
        with autocast(device, config.eval.precision):
            self._batch_size = config.eval.batch_size or fitting_batch_size(generator, device)

    def __len__(self) -> int:
        return len(self._known) * self._num_images

    def batches(self) -> Iterator[Tensor]:
        """Draw all images, uint8 [N, C, H, W] on the CPU, those for one of `known` side by side."""
        places = range(len(self))
        for start in places[:: self._batch_size]:
            yield self._draw(places[start : start + self._batch_size])

    def images(self) -> GeneratedImages:
        """Draw all images at once."""
        return GeneratedImages(torch.cat([*self.batches()]), torch.full((len(self),), self.label))

    def _draw(self, places: range) -> Tensor:
        key = (self._config.seed, Stream.RESTORED_IMAGES, self.label)
        generator = partial(torch_generator, *key, device=self.device)
        known = self._known[[place // self._num_images for place in places]].to(self.device)
        with autocast(self.device, self._config.eval.precision):
            images = self._restore(
                torch.full((len(places),), self.label, device=self.device),
                block_noise(places, self._generator.image_shape, generator),
                known,
                self._projection,
            )
        return to_uint8(images).cpu()
