"""An image of any size to what the model sees: a square, of its size, gray or in color."""

import torch
from torch import Tensor
from torch.nn import functional as F

from task.checks import require_one_of
from task.config import choices
from task.data.images import resize

# JPEG leaves the black around a fundus photograph a little gray.
BLACK = 16

# ITU-R BT.601, as Pillow's own conversion to gray.
LUMA = torch.tensor([0.299, 0.587, 0.114])


def crop_round_field(pixels: Tensor) -> Tensor:
    """Cut the central square out of the round field of a fundus photograph.

    Args:
        pixels: [C, H, W] in [0, 255], black around the field.

    Returns:
        [C, S, S], S the shorter side of the smallest box around everything that is not black.

    Raises:
        ValueError: all of it is black.
    """
    bright = pixels.amax(0) > BLACK
    if not bright.any():
        raise ValueError("all of it is black")
    rows, columns = (torch.nonzero(bright.any(axis)).flatten() for axis in (1, 0))
    (top, bottom), (left, right) = ((int(s[0]), int(s[-1]) + 1) for s in (rows, columns))
    side = min(bottom - top, right - left)
    top += (bottom - top - side) // 2
    left += (right - left - side) // 2
    return pixels[:, top : top + side, left : left + side]


def to_square(pixels: Tensor, fit: str) -> Tensor:
    """Cut or pad an image to a square of its own resolution.

    Args:
        pixels: [C, H, W] in [0, 255].
        fit: "crop" takes the largest square in the middle, "pad" adds 0 on both sides of the
            shorter side, "stretch" leaves the image as it is, to be stretched in resizing.

    Returns:
        [C, S, S] with "crop" and "pad".

    Raises:
        ValueError: `fit` is another.
    """
    require_one_of("data.fit", fit, choices("data.fit"))
    if fit == "stretch":
        return pixels
    height, width = pixels.shape[-2:]
    side = min(height, width) if fit == "crop" else max(height, width)
    more_rows, more_columns = side - height, side - width  # negative to crop, as `pad` takes them
    left, top = more_columns // 2, more_rows // 2
    return F.pad(pixels, [left, more_columns - left, top, more_rows - top])


def resize_decoded(pixels: Tensor, image_size: int, channels: int) -> Tensor:
    """Bring a decoded image to the shape that the model sees.

    Args:
        pixels: [C, H, W] float32 in [0, 255].
        image_size: height and width; other proportions are stretched, as the paper's code does.
        channels: 1 turns colors into gray, 3 repeats gray.

    Returns:
        [channels, image_size, image_size] uint8.
    """
    if len(pixels) > channels:
        pixels = (pixels * LUMA[:, None, None]).sum(0, keepdim=True)
    return resize(pixels[None], image_size)[0].expand(channels, -1, -1)
