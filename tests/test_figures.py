import os
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from task.figures import (
    GAP,
    MARGIN,
    TITLE_HEIGHT,
    mosaic,
    save_partition_heatmap,
    save_sample_grid,
)


def samples(rows: int, columns: int, channels: int = 3, size: int = 16) -> Tensor:
    shape = (rows * columns, channels, size, size)
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator)


def pixels(path: Path) -> np.ndarray:
    with Image.open(path) as image:
        return np.asarray(image.convert("RGB"))


@pytest.mark.parametrize(("size", "scale"), [(8, 10), (16, 5), (32, 3), (128, 1)])
def test_mosaic_enlarges_each_pixel_to_a_square(size: int, scale: int) -> None:
    images = samples(2, 3, size=size)
    grid = mosaic(images, 3)
    side = size * scale
    assert grid.shape == (2 * side + GAP, 3 * side + 2 * GAP, 3)
    tile = grid[side + GAP :, side + GAP : 2 * side + GAP]
    expected = images[4].permute(1, 2, 0).numpy().repeat(scale, 0).repeat(scale, 1)
    assert np.array_equal(tile, expected)
    assert (grid[side : side + GAP] == 255).all()


@pytest.mark.parametrize(("title", "top"), [("", MARGIN), ("Round 3", TITLE_HEIGHT)])
def test_sample_grid_holds_the_exact_pixels_below_the_title(
    tmp_path: Path, title: str, top: int
) -> None:
    images = samples(2, 5)
    save_sample_grid(
        images, tmp_path / "grid.png", classes=["cat", "dog"], images_per_class=5, title=title
    )
    picture, grid = pixels(tmp_path / "grid.png"), mosaic(images, 5)
    height, width = grid.shape[:2]
    assert picture.shape[0] == top + height + MARGIN
    assert np.array_equal(picture[top : top + height, -width - MARGIN : -MARGIN], grid)


def test_sample_grid_makes_room_for_names(tmp_path: Path) -> None:
    widths = []
    for names in (["0", "1"], ["automobile", "1"]):
        save_sample_grid(samples(2, 2), tmp_path / "g.png", classes=names, images_per_class=2)
        picture = pixels(tmp_path / "g.png")
        widths.append(picture.shape[1])
        assert (picture[:, :MARGIN] > 200).all(), "a name runs out of the picture"
        assert (picture[:, MARGIN : 2 * MARGIN] < 200).any(), "no name is there"
    assert widths[0] < widths[1]


def test_sample_grid_shows_grey_as_grey(tmp_path: Path) -> None:
    save_sample_grid(samples(1, 2, 1), tmp_path / "g.png", classes=["x"], images_per_class=2)
    tile = pixels(tmp_path / "g.png")[MARGIN:-MARGIN, -MARGIN - 80 : -MARGIN]
    assert np.array_equal(tile[..., 0], tile[..., 2])


@pytest.mark.parametrize("images", [samples(1, 3), samples(2, 2, 2), samples(0, 0)])
def test_sample_grid_refuses_a_wrong_number_of_images(tmp_path: Path, images: Tensor) -> None:
    with pytest.raises(ValueError, match=r"images must be \[4, 1 or 3, H, W\]"):
        save_sample_grid(images, tmp_path / "g.png", classes=["a", "b"], images_per_class=2)
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("num_clients", [1, 10, 20, 21, 50])
def test_heatmap_is_wider_with_more_clients_and_has_its_colours(
    tmp_path: Path, num_clients: int
) -> None:
    counts = np.zeros((num_clients, 10), np.int64)
    counts[0] = 900
    classes = [str(label) for label in range(10)]
    save_partition_heatmap(counts, tmp_path / "map.png", classes=classes, title="beta = 0.5")
    picture = pixels(tmp_path / "map.png")
    assert picture.shape[0] == 825 and 700 < picture.shape[1] < 2200
    assert ((picture == (8, 48, 107)).all(axis=-1)).any(), "the darkest blue is the largest count"


def test_heatmap_of_nothing_can_be_drawn(tmp_path: Path) -> None:
    save_partition_heatmap(np.zeros((2, 2), np.int64), tmp_path / "map.png", classes=["a", "b"])
    assert os.listdir(tmp_path) == ["map.png"]


def test_heatmap_refuses_other_shapes(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"counts must be \[clients, 3\], got \(4, 2\)"):
        save_partition_heatmap(np.ones((4, 2)), tmp_path / "map.png", classes=["a", "b", "c"])
