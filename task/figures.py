"""The pictures of a run: sample grids and the heat map of a partition, as PNG files."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from torch import Tensor

from task.config import require
from task.files import atomic_path

# Sizes of the sample grid in pixels; the margin of the names is measured.
TILE = 80
GAP = 4
MARGIN = 16
TITLE_HEIGHT = 40
GRID_DPI = 100

MAP_DPI = 150
MAX_ANNOTATED_CLIENTS = 20

INK = "#222222"
FONT: dict[str, Any] = {"family": "DejaVu Sans", "color": INK}


def save_sample_grid(
    images: Tensor,
    path: Path,
    *,
    classes: Sequence[str],
    images_per_class: int,
    title: str = "",
) -> None:
    """Write a grid of images, a row per class with its name at the left.

    Every pixel of an image becomes a square of whole pixels, so that nothing is blurred.

    Args:
        images: [K * P, C, H, W] uint8 with C in {1, 3}, class after class.
        path: of the PNG file, in a folder that exists.
        classes: K names.
        images_per_class: P > 0.
        title: above the grid; empty: none.

    Raises:
        ValueError: the shape of `images` is another.
    """
    rows, columns = len(classes), images_per_class
    require(
        images.ndim == 4 and len(images) == rows * columns > 0 and images.shape[1] in (1, 3),
        "images",
        f"[{rows * columns}, 1 or 3, H, W] ({columns} of each of {rows} classes)",
        tuple(images.shape),
    )
    grid = mosaic(images, columns)
    height, width = grid.shape[:2]
    figure = Figure(dpi=GRID_DPI, facecolor="white")
    canvas = FigureCanvasAgg(figure)
    names = [figure.text(0, 0, name, ha="right", va="center", size=12, **FONT) for name in classes]
    heading = figure.text(0, 0, title, ha="left", va="center", size=14, weight="bold", **FONT)
    renderer = canvas.get_renderer()  # type: ignore[no-untyped-call]
    widths = [text.get_window_extent(renderer).width for text in names]
    left = MARGIN + int(np.ceil(max(widths))) + MARGIN
    top = TITLE_HEIGHT if title else MARGIN
    total = (left + width + MARGIN, top + height + MARGIN)
    figure.set_size_inches(total[0] / GRID_DPI, total[1] / GRID_DPI)
    figure.figimage(grid, xo=left, yo=MARGIN, origin="upper")
    step = (height + GAP) / rows
    for row, text in enumerate(names):
        middle = MARGIN + height - row * step - (step - GAP) / 2
        text.set_position(((left - MARGIN) / total[0], middle / total[1]))
    heading.set_position((left / total[0], 1 - top / 2 / total[1]))
    write_png(figure, path, dpi=GRID_DPI)


def mosaic(images: Tensor, columns: int) -> np.ndarray:
    """Lay images out in rows on white, enlarged to tiles of at least `TILE` pixels.

    Args:
        images: [rows * columns, C, H, W] uint8 with C in {1, 3}.
        columns: > 0.

    Returns:
        [height, width, 3] uint8, with `GAP` white pixels between the tiles.
    """
    scale = -(-TILE // min(images.shape[-2:]))
    tiles = images.expand(-1, 3, -1, -1).permute(0, 2, 3, 1).cpu().numpy()
    tiles = tiles.repeat(scale, axis=1).repeat(scale, axis=2)
    tiles = np.pad(tiles, ((0, 0), (0, GAP), (0, GAP), (0, 0)), constant_values=255)
    _, height, width, _ = tiles.shape
    grid = tiles.reshape(-1, columns, height, width, 3).swapaxes(1, 2)
    return grid.reshape(-1, columns * width, 3)[:-GAP, :-GAP]


def save_partition_heatmap(
    counts: np.ndarray, path: Path, *, classes: Sequence[str], title: str = ""
) -> None:
    """Write the heat map of how many images of each class each client holds.

    Args:
        counts: [N, C] integers >= 0.
        path: of the PNG file, in a folder that exists.
        classes: C names.
        title: above the map; empty: none.

    Raises:
        ValueError: the shape of `counts` is another.

    Source: figure 3 of the paper.
    """
    require(
        counts.ndim == 2 and counts.shape[1] == len(classes) and len(counts) > 0,
        "counts",
        f"[clients, {len(classes)}]",
        counts.shape,
    )
    num_clients = len(counts)
    annotated = num_clients <= MAX_ANNOTATED_CLIENTS
    cell = 0.55 if annotated else 0.22
    figure = Figure(
        figsize=(2.6 + max(cell * num_clients, 2.5), 1.3 + 0.42 * len(classes)),
        dpi=MAP_DPI,
    )
    figure.set_layout_engine("constrained", w_pad=0.1, h_pad=0.1)
    axes = figure.add_subplot()
    top = max(int(counts.max()), 1)
    image = axes.imshow(counts.T, cmap="Blues", vmin=0, vmax=top, aspect="auto")
    axes.set_xticks(range(0, num_clients, 1 if annotated else 5))
    axes.set_yticks(range(len(classes)), list(classes))
    axes.set_xlabel("client", color=INK)
    axes.set_ylabel("class", color=INK)
    axes.set_title(title, loc="left", size=12, weight="bold", color=INK, pad=10)
    # White lines between the cells.
    axes.set_xticks(np.arange(1, num_clients) - 0.5, minor=True)
    axes.set_yticks(np.arange(1, len(classes)) - 0.5, minor=True)
    axes.grid(which="minor", color="white", linewidth=1.5 if annotated else 0.8)
    axes.tick_params(which="both", length=0, colors=INK)
    axes.spines[:].set_visible(False)
    bar = figure.colorbar(image, ax=axes, label="images", pad=0.02, aspect=25)
    bar.outline.set_visible(False)
    bar.ax.tick_params(length=0, colors=INK)
    if annotated:
        for (client, label), count in np.ndenumerate(counts):
            color = "white" if count > 0.6 * top else INK if count else "#aaaaaa"
            axes.text(client, label, str(count), ha="center", va="center", size=8, color=color)
    write_png(figure, path, dpi=MAP_DPI)


def write_png(figure: Figure, path: Path, *, dpi: int) -> None:
    """Write a figure so that a reader sees the old file or the new one, never a part of it."""
    with atomic_path(path) as aside:
        figure.savefig(aside, format="png", dpi=dpi)
