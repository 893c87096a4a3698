"""Grids of images as PNG files, and the way back from a grid to its images."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.text import Text
from matplotlib.transforms import IdentityTransform
from PIL import Image
from torch import Tensor

from task.checks import require
from task.files import atomic_path

# Sizes of the grids in pixels; the margin of the names is measured.
TILE = 80
GAP = 4
MARGIN = 16
PANEL_GAP = 2 * MARGIN
TITLE_HEIGHT = 40
STRIP_HEIGHT = 24
GRID_DPI = 100
# The name under which the PNG of a grid says where its images lie.
GRID_PLACE = "feddm-grid"

INK = "#222222"
# Names are no formulas: a "$" in one would be drawn as mathematics, or fail to be.
FONT: dict[str, Any] = {"family": "DejaVu Sans", "color": INK, "parse_math": False}


@dataclass(frozen=True)
class Panel:
    """One of the grids that stand side by side in a picture.

    Attributes:
        images: [rows * columns, C, H, W] uint8 with C in {1, 3}, row after row.
        title: above the grid; empty: none.
    """

    images: Tensor
    title: str = ""


@dataclass(frozen=True)
class GridPlace:
    """Where in a picture of one grid its images lie, in pixels.

    Attributes:
        left: of the first image.
        top: of the first image.
        height: of an image.
        width: of an image.
        rows: of the grid.
        columns: of the grid.
    """

    left: int
    top: int
    height: int
    width: int
    rows: int
    columns: int


def read_grid(path: Path) -> bytes | None:
    """Cut the images of a sample grid out of its picture, with nothing between them.

    Args:
        path: of a file of `save_sample_grid`.

    Returns:
        A PNG without names and margins, transparent between the images; None of a picture that
        does not say where its images lie.

    Raises:
        ValueError: what it says of them is something else.
        OSError: it is no picture.
    """
    place = _grid_place(path)
    if place is None:
        return None
    pixels = _cut_out(path, place, "RGBA")
    between = (np.arange(pixels.shape[0]) % (place.height + GAP) >= place.height)[:, None]
    between = between | (np.arange(pixels.shape[1]) % (place.width + GAP) >= place.width)
    pixels[between] = 0
    file = BytesIO()
    Image.fromarray(pixels).save(file, "PNG", optimize=True)
    return file.getvalue()


def grid_images(path: Path, image_size: int) -> Tensor:
    """Read the images of a sample grid as they were before they were enlarged.

    Args:
        path: of a file of `save_sample_grid`.
        image_size: their height and width.

    Returns:
        [rows, columns, 3, image_size, image_size] uint8.

    Raises:
        ValueError: it does not say where its images lie, or they are of another size.
        OSError: it is no picture.
    """
    place = _grid_place(path)
    if place is None:
        raise ValueError(f"{path} does not say where its images lie")
    require(place.height % image_size == 0, f"{path}", f"of images of {image_size}", place.height)
    pixels = np.pad(_cut_out(path, place, "RGB"), ((0, GAP), (0, GAP), (0, 0)))
    down, right, scale = place.height + GAP, place.width + GAP, place.height // image_size
    tiles = pixels.reshape(place.rows, down, place.columns, right, 3)
    images = tiles[:, : place.height : scale, :, : place.width : scale]
    return torch.from_numpy(images.transpose(0, 2, 4, 1, 3).copy())


def _grid_place(path: Path) -> GridPlace | None:
    with Image.open(path) as picture:
        said = picture.info.get(GRID_PLACE)
    try:
        return None if said is None else GridPlace(**json.loads(said))
    except TypeError as error:
        raise ValueError(f"the place of a grid in {path}: {error}") from error


def _cut_out(path: Path, place: GridPlace, mode: str) -> np.ndarray:
    """Return the pixels of a picture from its first image to its last one."""
    right = place.left + place.columns * (place.width + GAP) - GAP
    bottom = place.top + place.rows * (place.height + GAP) - GAP
    with Image.open(path) as picture:
        return np.asarray(picture.convert(mode).crop((place.left, place.top, right, bottom))).copy()


def save_sample_grid(
    images: Tensor,
    path: Path,
    *,
    classes: Sequence[str],
    images_per_class: int,
    title: str = "",
) -> None:
    """Write a grid of images, a row per class with its name at the left; see `save_panels`.

    Args:
        images: [K * P, C, H, W] uint8 with C in {1, 3}, class after class.
        path: of the PNG file, in a folder that exists.
        classes: K names.
        images_per_class: P > 0.
        title: above the grid; empty: none.

    Raises:
        ValueError: the shape of `images` is another.
    """
    save_panels([Panel(images, title)], path, rows=classes, columns=images_per_class)


def save_panels(
    panels: Sequence[Panel],
    path: Path,
    *,
    rows: Sequence[str],
    columns: int,
    tile: int = TILE,
    panels_per_line: int | None = None,
    num_colors: int = 0,
    private: bool = False,
) -> None:
    """Write grids of images side by side, the names of their rows at the left.

    Every pixel of an image becomes a square of whole pixels, so that nothing is blurred.

    Args:
        panels: at least one, all with images of one size.
        path: of the PNG file, in a folder that exists.
        rows: the names of the rows.
        columns: of each grid, > 0.
        tile: the least height and width of an image in the picture, in pixels.
        panels_per_line: at most so many stand side by side, the rest below; None: all.
        num_colors: of the strip of dominant colors on top of each grid; 0: no strip.
        private: whether its owner alone may read the file.

    Raises:
        ValueError: the shape of a panel's images is another.
    """
    for panel in panels:
        _require_grid(panel.images, len(rows), columns)
    grids = [mosaic(panel.images, columns, tile=tile) for panel in panels]
    grid_height = len(grids[0])
    if num_colors:
        grids = [_below_strip(g, p.images, num_colors) for g, p in zip(grids, panels, strict=True)]
    num_lines = -(-len(panels) // (panels_per_line or len(panels)))
    per_line = -(-len(panels) // num_lines)
    figure = Figure(dpi=GRID_DPI, facecolor="white")
    titles = [_text(figure, panel.title, size=14, weight="bold") for panel in panels]
    names = [[_text(figure, row, size=12, ha="right") for row in rows] for _ in range(num_lines)]
    left = MARGIN + (_widest(figure, names[0]) + MARGIN if any(rows) else 0)
    top = TITLE_HEIGHT if any(panel.title for panel in panels) else MARGIN
    height, width = len(grids[0]), max(grids[0].shape[1], _widest(figure, titles))
    total_width = left + per_line * (width + PANEL_GAP) - PANEL_GAP + MARGIN
    line_height = top + height + MARGIN
    total_height = num_lines * line_height
    figure.set_size_inches(total_width / GRID_DPI, total_height / GRID_DPI)
    for number, (grid, title) in enumerate(zip(grids, titles, strict=True)):
        line, place = divmod(number, per_line)
        x = left + place * (width + PANEL_GAP)
        # matplotlib counts pixels from the lower left corner.
        y = total_height - (line + 1) * line_height + MARGIN
        figure.figimage(grid, xo=x, yo=y, origin="upper")
        title.set_position((x, y + height + top / 2))
        step = (grid_height + GAP) / len(rows)
        for row, name in enumerate(names[line]):
            name.set_position((left - MARGIN, y + grid_height - row * step - (step - GAP) / 2))
    metadata = {}
    if len(panels) == 1 and not num_colors:
        down, right = (grid.shape[0] + GAP) // len(rows), (grid.shape[1] + GAP) // columns
        tiles = GridPlace(left, top, down - GAP, right - GAP, len(rows), columns)
        metadata = {GRID_PLACE: json.dumps(asdict(tiles))}
    write_png(figure, path, dpi=GRID_DPI, private=private, metadata=metadata)


def _text(figure: Figure, text: str, **style: Any) -> Text:
    return figure.text(0, 0, text, va="center", transform=IdentityTransform(), **style, **FONT)


def _widest(figure: Figure, texts: Sequence[Text]) -> int:
    renderer = FigureCanvasAgg(figure).get_renderer()  # type: ignore[no-untyped-call]
    return int(np.ceil(max(text.get_window_extent(renderer).width for text in texts)))


def _require_grid(images: Tensor, rows: int, columns: int) -> None:
    require(
        images.ndim == 4 and len(images) == rows * columns > 0 and images.shape[1] in (1, 3),
        "images",
        f"[{rows * columns}, 1 or 3, H, W] ({columns} of each of {rows} classes)",
        tuple(images.shape),
    )


def mosaic(images: Tensor, columns: int, *, tile: int = TILE) -> np.ndarray:
    """Lay images out in rows on white, enlarged to tiles of at least `tile` pixels.

    Args:
        images: [rows * columns, C, H, W] uint8 with C in {1, 3}.
        columns: > 0.
        tile: the least height and width of an image, in pixels.

    Returns:
        [height, width, 3] uint8, with `GAP` white pixels between the tiles.
    """
    scale = -(-tile // min(images.shape[-2:]))
    tiles = _rgb(images).repeat(scale, axis=1).repeat(scale, axis=2)
    tiles = np.pad(tiles, ((0, 0), (0, GAP), (0, GAP), (0, 0)), constant_values=255)
    _, height, width, _ = tiles.shape
    grid = tiles.reshape(-1, columns, height, width, 3).swapaxes(1, 2)
    return grid.reshape(-1, columns * width, 3)[:-GAP, :-GAP]


def _rgb(images: Tensor) -> np.ndarray:
    return images.expand(-1, 3, -1, -1).permute(0, 2, 3, 1).cpu().numpy()


def _below_strip(grid: np.ndarray, images: Tensor, num_colors: int) -> np.ndarray:
    strip = color_strip(*dominant_colors(images, num_colors), width=grid.shape[1])
    white = np.full((2 * GAP, *grid.shape[1:]), 255, np.uint8)
    return np.concatenate([strip, white, grid])


def dominant_colors(images: Tensor, num_colors: int) -> tuple[np.ndarray, np.ndarray]:
    """Find the dominant colors of images: the means of k clusters of their pixels.

    Args:
        images: [N, C, H, W] uint8 with C in {1, 3}, N > 0.
        num_colors: k > 0; fewer come back where the images have fewer colors.

    Returns:
        The colors, [k, 3] uint8, and their shares of the pixels, [k] float64, falling.

    Source: figures 4 and 5 of the paper.
    """
    from sklearn.cluster import KMeans  # type: ignore[import-untyped]

    colors, counts = np.unique(_rgb(images).reshape(-1, 3), axis=0, return_counts=True)
    clusters = KMeans(min(num_colors, len(colors)), n_init=4, random_state=0)
    clusters.fit(colors, sample_weight=counts)
    shares = np.bincount(clusters.labels_, weights=counts) / counts.sum()
    order = np.argsort(-shares, kind="stable")
    return clusters.cluster_centers_.round().astype(np.uint8)[order], shares[order]


def color_strip(colors: np.ndarray, shares: np.ndarray, *, width: int) -> np.ndarray:
    """Lay colors out side by side, each as wide as its share.

    Args:
        colors: [k, 3] uint8.
        shares: [k], >= 0, with a sum of 1.
        width: of the strip, in pixels.

    Returns:
        [STRIP_HEIGHT, width, 3] uint8.
    """
    edges = np.rint(np.cumsum([0, *shares]) * width).astype(int)
    line = colors.repeat(np.diff(edges), axis=0)
    return np.tile(line, (STRIP_HEIGHT, 1, 1))


def write_png(
    figure: Figure,
    path: Path,
    *,
    dpi: int,
    private: bool = False,
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Write a figure so that a reader sees the old file or the new one, never a part of it."""
    with atomic_path(path, private=private) as aside:
        figure.savefig(aside, format="png", dpi=dpi, metadata=metadata)
