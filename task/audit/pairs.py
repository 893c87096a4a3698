"""The generated images that lie nearest to training images, beside these, for their owner."""

import math
from pathlib import Path

import torch
from torch import Tensor

from task.evaluation.near_copies import shifted, shifted_distances
from task.generation.grids import Panel, save_panels

# Rows and columns of the picture.
ROWS, COLUMNS = 4, 6
# Training images at a time, which bounds memory.
BLOCK = 2048


def closest_pairs(
    generated: Tensor, train: Tensor, number: int, *, horizontal_flip: bool, most_shifted: int
) -> tuple[Tensor, Tensor]:
    """Choose generated images that are most like one training image alone, and that one of each.

    They are compared as in the search for copies, `task.evaluation.near_copies.pixel_copying`.

    Args:
        generated: [N, C, H, W] uint8.
        train: [M, C, H, W] uint8.
        number: of pairs at most.
        horizontal_flip: whether training images count mirrored as well.
        most_shifted: pixels by which images may be shifted.

    Returns:
        Their indices and those of the training images, [P] int64 each, the closest first.
    """
    reference = torch.cat([train, train.flip(-1)]) if horizontal_flip else train
    _, relative = shifted_distances(generated, reference, most_shifted)
    chosen = relative.argsort(stable=True)[:number]
    variants = torch.stack([*shifted(generated[chosen], most_shifted)]).flatten(2).double()
    least = torch.full((len(chosen),), math.inf, dtype=torch.float64)
    nearest = torch.zeros(len(chosen), dtype=torch.int64)
    for start in range(0, len(reference), BLOCK):
        block = reference[start : start + BLOCK].flatten(1).double()
        distances, places = torch.cdist(variants, block).amin(0).min(1)
        nearest = torch.where(distances < least, places + start, nearest)
        least = torch.minimum(least, distances)
    return chosen, nearest % len(train)


def save_pairs(
    generated: Tensor, train: Tensor, path: Path, *, horizontal_flip: bool, most_shifted: int
) -> None:
    """Write the closest pairs as a picture that its owner alone may read.

    Args:
        generated: [N, C, H, W] uint8.
        train: [M, C, H, W] uint8.
        path: of the PNG file.
        horizontal_flip: see `closest_pairs`.
        most_shifted: likewise.
    """
    drawn, copied = closest_pairs(
        generated,
        train,
        ROWS * COLUMNS,
        horizontal_flip=horizontal_flip,
        most_shifted=most_shifted,
    )
    rows = max(1, len(drawn) // COLUMNS)
    columns = min(COLUMNS, len(drawn))
    number = rows * columns
    panels = [
        Panel(generated[drawn[:number]], "generated, the closest first"),
        Panel(train[copied[:number]], "the training image that is nearest to each"),
    ]
    save_panels(panels, path, rows=[""] * rows, columns=columns, private=True)
