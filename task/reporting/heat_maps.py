"""Heat maps of how many images of each class each client holds."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.image import AxesImage

from task.checks import require
from task.generation.grids import FONT, INK, write_png

MAP_DPI = 150
MAX_ANNOTATED_CLIENTS = 20
# A map of more clients is no wider, and has no lines between them.
MAX_LINED_CLIENTS = 100


def save_partition_heatmaps(
    maps: Mapping[str, np.ndarray], path: Path, *, classes: Sequence[str]
) -> None:
    """Write heat maps of partitions side by side, with one scale of colors.

    Args:
        maps: by the title above it, or "", the counts of each, [N, C] integers >= 0.
        path: of the PNG file, in a folder that exists.
        classes: C names.

    Raises:
        ValueError: the shape of a map's counts is another.

    Source: figure 3 of the paper.
    """
    for counts in maps.values():
        require(
            counts.ndim == 2 and counts.shape[1] == len(classes) and len(counts) > 0,
            "counts",
            f"[clients, {len(classes)}]",
            counts.shape,
        )
    top = max(1, *(int(counts.max()) for counts in maps.values()))
    narrow = 0.22 if len(maps) == 1 else 0.11
    widths = [
        max((0.55 if _annotated(c) else narrow) * min(len(c), MAX_LINED_CLIENTS), 2.5)
        for c in maps.values()
    ]
    size = (2.3 + sum(widths) + 0.3 * len(maps), 1.3 + 0.42 * len(classes))
    figure = Figure(figsize=size, dpi=MAP_DPI)
    figure.set_layout_engine("constrained", w_pad=0.1, h_pad=0.1)
    every = figure.subplots(1, len(maps), sharey=True, squeeze=False, width_ratios=widths)[0]
    for axes, (title, counts) in zip(every, maps.items(), strict=True):
        image = _draw_map(axes, counts, top)
        axes.set_title(title, loc="left", size=12, weight="bold", pad=10, **FONT)
    every[0].set_yticks(range(len(classes)), list(classes), **FONT)
    every[0].set_ylabel("class", color=INK)
    bar = figure.colorbar(image, ax=every, label="images", pad=0.02 / len(maps), aspect=25)
    bar.outline.set_visible(False)
    bar.ax.tick_params(length=0, colors=INK)
    write_png(figure, path, dpi=MAP_DPI)


def _annotated(counts: np.ndarray) -> bool:
    return len(counts) <= MAX_ANNOTATED_CLIENTS


def _draw_map(axes: Axes, counts: np.ndarray, top: int) -> AxesImage:
    num_clients, num_classes = counts.shape
    annotated = _annotated(counts)
    image = axes.imshow(counts.T, cmap="Blues", vmin=0, vmax=top, aspect="auto")
    step = 1 if annotated else 5 * -(-num_clients // MAX_LINED_CLIENTS)
    axes.set_xticks(range(0, num_clients, step))
    axes.set_xlabel("client", color=INK)
    # White lines between the cells.
    if num_clients <= MAX_LINED_CLIENTS:
        axes.set_xticks(np.arange(1, num_clients) - 0.5, minor=True)
    axes.set_yticks(np.arange(1, num_classes) - 0.5, minor=True)
    axes.grid(which="minor", color="white", linewidth=1.5 if annotated else 0.8)
    axes.tick_params(which="both", length=0, colors=INK)
    axes.spines[:].set_visible(False)
    if annotated:
        for (client, label), count in np.ndenumerate(counts):
            color = "white" if count > 0.6 * top else INK if count else "#aaaaaa"
            axes.text(client, label, str(count), ha="center", va="center", size=8, color=color)
    return image
