"""Inverse problems without training: images that agree with what is known, filled in by a model.

What is known of an image is its orthogonal projection P onto some subspace: the pixels outside a
mask, the means of blocks, the brightness of colours. Sampling takes the known part from the image,
noised, and the rest, I - P, from the model: x_{t-1} = P(q_sample(known)) + (I - P)(model's step).

Sources: RePaint (Lugmayr et al. 2022, arXiv 2201.09865, Algorithm 1 and its jumps, section 4.2)
for masks; that P may be any linear projection: ILVR (Choi et al. 2021, arXiv 2108.02938) with a
low-pass filter in the place of P, and DDNM (Wang, Yu & Zhang 2023, arXiv 2212.00490), which
projects the predicted x_start in the place of x_{t-1}. What differs from RePaint: steps may skip
timesteps, with the posterior variance (its code learns the variance); the known part is noised to
the level of x_{t-1}, the images that it goes into (the paper prints alpha-bar_t for x_{t-1} in
equation 8a; here it is that of x_{t-1}, as its code effectively does); after a jump back the known
part is the re-noised one, where its code noises the known images anew; and the last image is
brought into [-1, 1] without touching its known part.
"""

import dataclasses
import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Protocol

import torch
from torch import Tensor
from torch.nn import functional as F

from task.checks import require, require_one_of
from task.config import DIFFUSION_CHOICES, Config, changed_config
from task.data import normalize
from task.data.shape import LUMA
from task.generation.images import GeneratedImages, image_shape
from task.generators.diffusion.noise_schedule import NoiseSchedule, build_schedule
from task.generators.diffusion.objective import Model
from task.generators.diffusion.sampler import (
    NoiseSource,
    block_noise,
    fitting_batch_size,
    guided,
    predicting,
    to_uint8,
)
from task.generators.diffusion.samplers import ddim_steps, see, take
from task.generators.diffusion.unet import UNet
from task.randomness import Stream, torch_generator
from task.training.devices import autocast, move

# RePaint's own, for its 250 steps.
JUMP_LENGTH = 10
NUM_RESAMPLES = 10

# What a caller may change of a run's configuration.
RESTORATION_VALUES = frozenset(
    {
        *("seed", "train.device", "eval.batch_size", "eval.precision"),
        *("diffusion.num_inference_steps", "diffusion.guidance_scale", "diffusion.clip_x_start"),
    }
)


class Projection(Protocol):
    """An orthogonal projection onto what is known of images."""

    def __call__(self, images: Tensor) -> Tensor:
        """Project images, [N, C, H, W] float32."""
        ...

    def least(self, values: Tensor) -> Tensor:
        """Give the values, [N, C, H, W], that P ties to each other the least one of them."""
        ...


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
        """Keep of each colour its part along that of brightness, ITU-R BT.601."""
        weights = LUMA.to(images)[:, None, None]
        brightness = (images * weights).sum(1, keepdim=True)
        return brightness * weights / weights.square().sum()

    def least(self, values: Tensor) -> Tensor:
        """Replace each value by the least of its pixel."""
        return values.amin(1, keepdim=True).expand_as(values)


def enlarge(images: Tensor, factor: int) -> Tensor:
    """Turn each pixel of [N, C, H, W] into a block of `factor` x `factor`."""
    return images.repeat_interleave(factor, -1).repeat_interleave(factor, -2)


@torch.inference_mode()
def repaint_sample(
    model: Model,
    labels: Tensor,
    *,
    known: Tensor,
    projection: Projection,
    schedule: NoiseSchedule,
    prediction_type: str,
    num_inference_steps: int,
    jump_length: int,
    num_resamples: int,
    clip_x_start: bool,
    draw_noise: NoiseSource,
) -> Tensor:
    """Draw images that have a known projection.

    Args:
        model: see `task.generators.diffusion.objective`.
        labels: [N] int64, what to draw.
        known: [N, C, H, W] float32 in [-1, 1], any images that have the known projection.
        projection: onto what is known.
        schedule: the model's.
        prediction_type: what the model returns.
        num_inference_steps: 1 to T, see `task.generators.diffusion.samplers.inference_timesteps`.
        jump_length: steps that are taken back at a time, see `resampling_walk`.
        num_resamples: how often each stretch of that length is walked, >= 1; 1: no jumps.
        clip_x_start: whether to clamp each prediction of x_start to [-1, 1].
        draw_noise: source of all noise, beside `labels`.

    Returns:
        [N, C, H, W] float32 in [-1, 1], with the projection of `known` but for rounding.

    Raises:
        ValueError: a number is out of range, or `prediction_type` unknown.

    Source: see the module.
    """
    require_one_of("prediction_type", prediction_type, DIFFUSION_CHOICES["prediction_type"])
    require(bool((known.abs() <= 1).all()), "known", "in [-1, 1]", known.abs().max().item())
    predict = predicting(model, labels)
    # By how many are left to take, less one.
    steps = ddim_steps(schedule.alphas_cumprod.tolist(), num_inference_steps, eta=1.0)[::-1]
    # Likewise: clean images first.
    levels = [1.0, *(step.alpha_cumprod for step in steps)]
    x_t = draw_noise()
    for left, to in resampling_walk(num_inference_steps, jump_length, num_resamples):
        here, after = levels[left], levels[to]
        if to > left:
            x_t = noised(x_t, after / here, draw_noise)
            continue
        step = steps[left - 1]
        x_start = see(
            step, x_t, predict, prediction_type=prediction_type, clip_x_start=clip_x_start
        )
        x_t = take(step, x_t, x_start, x_start, draw_noise)
        target = noised(known, after, draw_noise) if to > 0 else known
        x_t = x_t + projection(target - x_t)
    return into_range(x_t, known, projection)


def noised(images: Tensor, share: float, draw_noise: NoiseSource) -> Tensor:
    """Noise images so that `share` of their variance is left; see `q_sample`."""
    return math.sqrt(share) * images + math.sqrt(1 - share) * draw_noise()


def resampling_walk(
    num_inference_steps: int, jump_length: int, num_resamples: int
) -> Iterator[tuple[int, int]]:
    """Walk from noise to images with jumps back: yields steps left, before and after each move.

    A move down is a step of the model; a move up adds the noise of `jump_length` steps at once.

    Args:
        num_inference_steps: n, >= 1.
        jump_length: in [1, n) where there are jumps.
        num_resamples: >= 1, how often the model walks from each landing to the next.

    Raises:
        ValueError: a number is out of range.

    Source: RePaint, section 4.2 and `get_schedule_jump` of its code.
    """
    require_walk(num_inference_steps, jump_length, num_resamples)
    jumps = dict.fromkeys(
        range(1, num_inference_steps - jump_length + 1, jump_length), num_resamples - 1
    )
    left = num_inference_steps
    while left > 0:
        yield left, left - 1
        left -= 1
        if jumps.get(left, 0) > 0:
            jumps[left] -= 1
            yield left, left + jump_length
            left += jump_length


def require_walk(num_inference_steps: int, jump_length: int, num_resamples: int) -> None:
    """Raise a ValueError unless a walk is possible; see `resampling_walk`.

    Raises:
        ValueError: a number is out of range.
    """
    require(num_resamples >= 1, "num_resamples", ">= 1 (1: no jumps back)", num_resamples)
    require(
        num_resamples == 1 or 1 <= jump_length < num_inference_steps,
        "jump_length",
        f">= 1 and below the {num_inference_steps} steps (pass a smaller --jump-length, or "
        "--num-resamples 1 for no jumps)",
        jump_length,
    )


def into_range(images: Tensor, known: Tensor, projection: Projection) -> Tensor:
    """Bring images into [-1, 1] without a change of their projection.

    They move towards `known`, which is in range and has that projection; pixels that the
    projection ties to each other move by the same share.
    """
    deviation = images - known
    room = (deviation.sign() - known) / torch.where(deviation == 0, 1, deviation)
    share = torch.where(deviation == 0, 1, room).clamp(max=1)
    return (known + projection.least(share) * deviation).clamp(-1, 1)


def picture_shape(
    config: Config, *, mask: bool, upscale: int | None, colorize: bool
) -> tuple[int, int, int]:
    """Return (C, H, W) that a picture must have for a task.

    Raises:
        ValueError: there is not exactly one task, or the run's images do not fit it.
    """
    asked = mask + (upscale is not None) + colorize
    require(asked == 1, "one of mask, upscale and colorize", "given, no more", asked)
    channels, size, _ = image_shape(config)
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
    # RePaint's steps are those of ddim with eta = 1, whatever the run draws with, and may skip.
    diffusion = dataclasses.replace(config.diffusion, sampler="ddim", eta=1.0)
    config = dataclasses.replace(config, diffusion=diffusion)
    return changed_config(config, overrides, options=options, names=RESTORATION_VALUES)


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
        colorize: whether the pictures lack their colours.

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
        model: UNet,
        known: Tensor,
        *,
        projection: Projection,
        label: int,
        num_images: int,
        jump_length: int | None,
        num_resamples: int | None,
        device: torch.device,
    ) -> None:
        """Bring a model to a device, and check all that can be checked before drawing.

        Args:
            config: of the run, with its seed, steps, guidance, `eval.batch_size` and
                `eval.precision`.
            model: moved to `device`, and set to evaluate.
            known: [N, C, H, W] float32, see `known_part`.
            projection: see `known_part`.
            label: of the class.
            num_images: for each of `known`, >= 1.
            jump_length: see `repaint_sample`; None: RePaint's, or less where there are few steps.
            num_resamples: likewise.
            device: that draws.

        Raises:
            ValueError: a number is out of range.
        """
        require(num_images >= 1, "num_images", ">= 1", num_images)
        self.label, self.device = label, device
        self._config, self._known, self._num_images = config, known, num_images
        diffusion = config.diffusion
        num_steps = diffusion.num_inference_steps or diffusion.num_timesteps
        if jump_length is None:
            jump_length = max(1, min(JUMP_LENGTH, num_steps - 1))
        if num_resamples is None:
            num_resamples = NUM_RESAMPLES if num_steps > 1 else 1
        require_walk(num_steps, jump_length, num_resamples)
        move(model, device, channels_last=config.train.channels_last)
        model.eval()
        self._sample = partial(
            repaint_sample,
            guided(model, config),
            projection=projection,
            schedule=build_schedule(config),
            prediction_type=diffusion.prediction_type,
            num_inference_steps=num_steps,
            jump_length=jump_length,
            num_resamples=num_resamples,
            clip_x_start=diffusion.clip_x_start,
        )
        with autocast(device, config.eval.precision):
            self._batch_size = config.eval.batch_size or fitting_batch_size(
                model, image_shape(config), device
            )

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
            images = self._sample(
                torch.full((len(places),), self.label, device=self.device),
                known=known,
                draw_noise=block_noise(places, image_shape(self._config), generator),
            )
        return to_uint8(images).cpu()
