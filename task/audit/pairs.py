"""The generated images that lie nearest to training images, beside these, for their owner."""

from pathlib import Path

from torch import Tensor

from task.evaluation.distances import Nearest
from task.generation.grids import Panel, save_panels

# Rows and columns of the picture.
ROWS, COLUMNS = 4, 6


def closest_pairs(found: Nearest, number: int) -> tuple[Tensor, Tensor]:
    """Choose generated images that are most like one training image alone, and that one of each.

    Args:
        found: the training images that are nearest to the generated ones.
        number: of pairs at most.

    Returns:
        Their indices and those of the training images, [P] int64 each, the closest first.
    """
    chosen = found.ratio.argsort(stable=True)[:number]
    return chosen, found.place[chosen]


def save_pairs(generated: Tensor, train: Tensor, found: Nearest, path: Path) -> None:
    """Write the closest pairs as a picture that its owner alone may read.

    Args:
        generated: [N, C, H, W] uint8.
        train: [M, C, H, W] uint8.
        found: see `closest_pairs`.
        path: of the PNG file.
    """
    drawn, copied = closest_pairs(found, ROWS * COLUMNS)
    rows = max(1, len(drawn) // COLUMNS)
    columns = min(COLUMNS, len(drawn))
    number = rows * columns
    panels = [
        Panel(generated[drawn[:number]], "generated, the closest first"),
        Panel(train[copied[:number]], "the training image that is nearest to each"),
    ]
    save_panels(panels, path, rows=[""] * rows, columns=columns, private=True)
