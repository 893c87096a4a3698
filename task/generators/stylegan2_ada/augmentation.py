"""Random changes of all images that a discriminator sees, each with a probability.

These are pixel blitting, geometric and color transformations ("bgc"). As long as each leaves some
images alone, a generator does not learn to draw the changes themselves.

Source: arXiv 2006.06676, appendix B.
"""

import math
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor
from torch.nn import functional as F

from task.generators.stylegan2_ada.networks import full_precision

# The scaling filter of the wavelet sym6. Doubling by it and halving by it gives an image back.
SYM6 = (
    *(0.015404109327027373, 0.0034907120842174702, -0.11799011114819057, -0.048311742585633),
    *(0.4910559419267466, 0.787641141030194, 0.3379294217276218, -0.07263752278646252),
    *(-0.021060292512300564, 0.04472490177066578, 0.0017677118642428036, -0.007800708325034148),
)
# Where its mass is centered: pixel m of an image lies at 2 m + CENTER of the doubled one.
CENTER = sum(place * tap for place, tap in enumerate(SYM6)) / math.sqrt(2)
# Pixels that an image is reflected by before it is doubled, and where it then begins.
MARGIN, BEGIN = 3, 5

# How far images are changed: standard deviations, of scales in powers of two, and the largest
# whole shift, in widths of the image.
MAX_SHIFT = 0.125
SHIFT_STD = 0.125
SCALE_STD = 0.2
BRIGHTNESS_STD = 0.2
CONTRAST_STD = 0.5
SATURATION_STD = 1.0


@dataclass(frozen=True)
class ImageChanges:
    """What is done to each of N images.

    Attributes:
        moved: [N] bool, whether the geometry changes.
        geometry: [N, 2, 3] float32, from a place in the result to where it was, (x, y, 1) in pixels
            from the center.
        recolored: [N] bool, whether colors change.
        colors: [N, C, C + 1] float32, of a color and 1.
    """

    moved: Tensor
    geometry: Tensor
    recolored: Tensor
    colors: Tensor

    def __getitem__(self, part: slice) -> "ImageChanges":
        return ImageChanges(
            self.moved[part], self.geometry[part], self.recolored[part], self.colors[part]
        )


def draw_changes(
    number: int, *, channels: int, image_size: int, probability: Tensor, rng: torch.Generator
) -> ImageChanges:
    """Draw what is done to images.

    Args:
        number: of images, N.
        channels: 1 or 3.
        image_size: width and height.
        probability: of each change, [] float32 in [0, 1], on the device of `rng`.
        rng: of every draw.
    """
    draws = _Draws(number, probability, rng)
    moved, geometry = _draw_geometry(draws, image_size)
    recolored, colors = _draw_colors(draws, channels)
    return ImageChanges(moved, geometry, recolored, colors)


class _Draws:
    """Uniform and normal numbers for each image, and whether a change takes place."""

    def __init__(self, number: int, probability: Tensor, rng: torch.Generator) -> None:
        self.probability, self._rng, self._number = probability, rng, number

    def uniform(self) -> Tensor:
        return torch.rand(self._number, generator=self._rng, device=self._rng.device)

    def normal(self) -> Tensor:
        return torch.randn(self._number, generator=self._rng, device=self._rng.device)

    def happens(self, probability: Tensor | None = None) -> Tensor:
        return self.uniform() < (self.probability if probability is None else probability)


def _draw_geometry(draws: _Draws, image_size: int) -> tuple[Tensor, Tensor]:
    zero = torch.zeros_like(draws.uniform())
    changes: list[tuple[Tensor, Tensor]] = []

    def shift(x: Tensor, y: Tensor) -> Tensor:
        return _matrices([[zero + 1, zero, x], [zero, zero + 1, y]])

    def scale(x: Tensor, y: Tensor) -> Tensor:
        return _matrices([[x, zero, zero], [zero, y, zero]])

    def rotate(angle: Tensor) -> Tensor:
        cos, sin = angle.cos(), angle.sin()
        return _matrices([[cos, -sin, zero], [sin, cos, zero]])

    def whole_shift() -> Tensor:
        return torch.round((2 * draws.uniform() - 1) * MAX_SHIFT * image_size)

    # Blitting: a mirror image half of the time, a multiple of 90 degrees, a shift by whole pixels.
    changes.append((draws.happens(), scale(2 * draws.uniform().round() - 1, zero + 1)))
    changes.append((draws.happens(), rotate((draws.uniform() * 4).floor() * (math.pi / 2))))
    changes.append((draws.happens(), shift(whole_shift(), whole_shift())))
    # An angle before the uneven scale and one after it: one of them happens with the probability.
    one_of_two = 1 - (1 - draws.probability).sqrt()
    size = (draws.normal() * SCALE_STD).exp2()
    changes.append((draws.happens(), scale(size, size)))
    changes.append((draws.happens(one_of_two), rotate((2 * draws.uniform() - 1) * math.pi)))
    aspect = (draws.normal() * SCALE_STD).exp2()
    changes.append((draws.happens(), scale(aspect, 1 / aspect)))
    changes.append((draws.happens(one_of_two), rotate((2 * draws.uniform() - 1) * math.pi)))
    far = SHIFT_STD * image_size
    changes.append((draws.happens(), shift(draws.normal() * far, draws.normal() * far)))
    # From a place in the result back to where it was, the last change comes first. As each is as
    # likely as its inverse, none is inverted.
    return _composed(changes[::-1])


def _draw_colors(draws: _Draws, channels: int) -> tuple[Tensor, Tensor]:
    zero = torch.zeros_like(draws.uniform())
    identity = torch.eye(channels, device=zero.device).expand(len(zero), -1, -1)
    # The axis of grays: brightness lies along it, hue and saturation across.
    gray = torch.full((channels, channels), 1 / channels, device=zero.device)
    no_offset = zero[:, None, None].expand(-1, channels, 1)

    def linear(matrices: Tensor) -> Tensor:
        return torch.cat([matrices, no_offset], 2)

    def across(factors: Tensor) -> Tensor:
        return gray + (identity - gray) * factors[:, None, None]

    brightness = (draws.normal() * BRIGHTNESS_STD)[:, None, None].expand(-1, channels, 1)
    contrast = (draws.normal() * CONTRAST_STD).exp2()[:, None, None]
    flip = draws.uniform().round()[:, None, None]
    changes = [
        (draws.happens(), torch.cat([identity, brightness], 2)),
        (draws.happens(), linear(identity * contrast)),
        (draws.happens(), linear(identity - 2 * gray * flip)),
    ]
    if channels == 3:
        angles = (2 * draws.uniform() - 1) * math.pi
        changes.append((draws.happens(), linear(_hue_rotations(angles))))
        saturation = (draws.normal() * SATURATION_STD).exp2()
        changes.append((draws.happens(), linear(across(saturation))))
    return _composed(changes)


def _hue_rotations(angles: Tensor) -> Tensor:
    """Turn colors around the axis of grays: [N] radians to [N, 3, 3]."""
    cos, sin = angles.cos(), angles.sin() / math.sqrt(3)
    mean = (1 - cos) / 3
    rows = [cos + mean, mean - sin, mean + sin]  # a circulant matrix
    return torch.stack([torch.stack(rows[-n:] + rows[:-n], 1) for n in range(3)], 1)


def _matrices(rows: list[list[Tensor]]) -> Tensor:
    """Join rows of [N] values to matrices, [N, rows, columns]."""
    return torch.stack([torch.stack(row, 1) for row in rows], 1)


def _composed(changes: list[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """Join affine changes of which each image has some, the first innermost.

    Args:
        changes: whether each image has it, [N] bool, and what it does, [N, D, D + 1].

    Returns:
        Whether an image has any, [N] bool, and what all do, [N, D, D + 1].
    """
    dim = changes[0][1].shape[1]
    identity = torch.eye(dim, dim + 1, device=changes[0][1].device)
    total, has_any = identity.expand_as(changes[0][1]), torch.zeros_like(changes[0][0])
    for has, change in changes:
        change = torch.where(has[:, None, None], change, identity)
        total = change[:, :, :dim] @ total + F.pad(change[:, :, dim:], (dim, 0))
        has_any = has_any | has
    return has_any, total


def change_images(images: Tensor, changes: ImageChanges) -> Tensor:
    """Change images; those without a change are what they were, to the bit.

    Args:
        images: [N, C, S, S] float32.
        changes: of N images.
    """
    with full_precision(images.device):
        images = images.float()
        warped = warp(images, changes.geometry)
        images = torch.where(changes.moved[:, None, None, None], warped, images)
        channels = images.shape[1]
        matrices, offsets = changes.colors[:, :, :channels], changes.colors[:, :, channels:]
        recolored = (matrices @ images.flatten(2) + offsets).view_as(images)
        return torch.where(changes.recolored[:, None, None, None], recolored, images)


def warp(images: Tensor, geometry: Tensor) -> Tensor:
    """Move images along affine maps, reflected at their borders.

    They are doubled, sampled bilinearly and halved, which blurs less than sampling alone.

    Args:
        images: [N, C, S, S] float32.
        geometry: see `ImageChanges`.
    """
    size = images.shape[-1]
    taps = _doubling_taps(images.device)
    padded = F.pad(images, (MARGIN,) * 4, mode="reflect")
    doubled = _double(_double(padded, taps, dim=2), taps, dim=3)
    begin = BEGIN + 2 * MARGIN
    doubled = doubled[:, :, begin : begin + 2 * size, begin : begin + 2 * size]
    # What halving reads: pixel n at 2 n to 2 n + 11 of the doubled image.
    places = torch.arange(2 * size + 10, device=images.device, dtype=images.dtype)
    places = (places - CENTER - (size - 1)) / 2  # in pixels from the center
    y, x = torch.meshgrid(places, places, indexing="ij")
    targets = torch.stack([x, y, torch.ones_like(x)], -1).flatten(0, 1)
    sources = (targets @ geometry.transpose(1, 2)).view(len(images), *x.shape, 2)
    sources = 2 * sources + CENTER + (size - 1) - BEGIN
    grid = (2 * sources + 1) / (2 * size) - 1
    moved = F.grid_sample(doubled, grid, padding_mode="reflection", align_corners=False)
    return _halve(_halve(moved, taps / 2, dim=2), taps / 2, dim=3)


@cache
def _doubling_taps(device: torch.device) -> Tensor:
    """Return the filter that doubles; copied to a device once, because a step would wait for it."""
    return torch.tensor(SYM6, device=device) * math.sqrt(2)


def _double(x: Tensor, taps: Tensor, *, dim: int) -> Tensor:
    kernel, stride = _along(taps, dim)
    planes = F.conv_transpose2d(x.flatten(0, 1)[:, None], kernel, stride=stride)
    return planes.view(*x.shape[:2], *planes.shape[2:])


def _halve(x: Tensor, taps: Tensor, *, dim: int) -> Tensor:
    kernel, stride = _along(taps, dim)
    planes = F.conv2d(x.flatten(0, 1)[:, None], kernel, stride=stride)
    return planes.view(*x.shape[:2], *planes.shape[2:])


def _along(taps: Tensor, dim: int) -> tuple[Tensor, tuple[int, int]]:
    """Return the kernel and the stride of a filter along rows (2) or columns (3)."""
    return (taps.view(1, 1, -1, 1), (2, 1)) if dim == 2 else (taps.view(1, 1, 1, -1), (1, 2))
