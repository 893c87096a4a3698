"""The generated images that lie nearest to training images, beside these, for their owner."""

from pathlib import Path

import torch
from torch import Tensor

from task.evaluation.distances import neighbor_distances
from task.generation.grids import Panel, save_panels

# Rows and columns of the picture.
ROWS, COLUMNS = 4, 6


def closest_pairs(generated: Tensor, train: Tensor, number: int) -> tuple[Tensor, Tensor]:
    """Choose generated images that are most like one training image alone, and that one of each.

    Args:
        generated: [N, C, H, W] uint8.
        train: [M, C, H, W] uint8.
        number: of pairs at most.

    Returns:
        Their indices and those of the training images, [P] int64 each, the closest first.
    """
    _, relative = neighbor_distances(generated.flatten(1), train.flatten(1))
    chosen = relative.argsort(stable=True)[:number]
    reference = train.flatten(1).double()
    nearest = [
        int((reference - generated[index].flatten().double()).square().sum(1).argmin())
        for index in chosen.tolist()
    ]
    return chosen, torch.tensor(nearest, dtype=torch.int64)


def save_pairs(generated: Tensor, train: Tensor, path: Path) -> None:
    """Write the closest pairs as a picture that its owner alone may read.

    Args:
        generated: [N, C, H, W] uint8.
        train: [M, C, H, W] uint8.
        path: of the PNG file.
    """
    drawn, copied = closest_pairs(generated, train, ROWS * COLUMNS)
    rows = max(1, len(drawn) // COLUMNS)
    columns = min(COLUMNS, len(drawn))
    number = rows * columns
    panels = [
        Panel(generated[drawn[:number]], "generated, the closest first"),
        Panel(train[copied[:number]], "the training image that is nearest to each"),
    ]
    save_panels(panels, path, rows=[""] * rows, columns=columns, private=True)
