import os
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from task.generation.grids import (
    GAP,
    MARGIN,
    PANEL_GAP,
    STRIP_HEIGHT,
    TITLE_HEIGHT,
    Panel,
    color_strip,
    dominant_colors,
    grid_images,
    mosaic,
    read_grid,
    save_panels,
    save_sample_grid,
)
from task.reporting.heat_maps import save_partition_heatmaps


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


def test_images_are_cut_out_of_a_grid_to_the_pixel(tmp_path: Path) -> None:
    images, file = samples(2, 3), tmp_path / "grid.png"
    save_sample_grid(images, file, classes=["cat", "a dog"], images_per_class=3, title="Round 1")
    cut = read_grid(file)
    assert cut is not None
    with Image.open(BytesIO(cut)) as picture:
        found = np.asarray(picture)
    assert picture.mode == "RGBA"
    grid, shown = mosaic(images, 3), found[..., 3] > 0
    assert found.shape[:2] == grid.shape[:2]
    assert np.array_equal(found[shown][:, :3], grid[shown])
    assert shown.sum() == 6 * 80 * 80
    again = grid_images(file, images.shape[-1])
    assert torch.equal(again.flatten(0, 1), images.expand(-1, 3, -1, -1))
    Image.new("L", (8, 8)).save(file)
    assert read_grid(file) is None
    with pytest.raises(ValueError, match="does not say where its images lie"):
        grid_images(file, 8)


def test_names_are_no_formulas(tmp_path: Path) -> None:
    for name in ("$\\frac$", "a$_b$"):
        file = tmp_path / "grid.png"
        save_sample_grid(samples(1, 1), file, classes=[name], images_per_class=1, title=name)
        save_partition_heatmaps({name: np.ones((2, 1), int)}, file, classes=[name])


def test_sample_grid_shows_gray_as_gray(tmp_path: Path) -> None:
    save_sample_grid(samples(1, 2, 1), tmp_path / "g.png", classes=["x"], images_per_class=2)
    tile = pixels(tmp_path / "g.png")[MARGIN:-MARGIN, -MARGIN - 80 : -MARGIN]
    assert np.array_equal(tile[..., 0], tile[..., 2])


@pytest.mark.parametrize("images", [samples(1, 3), samples(2, 2, 2), samples(0, 0)])
def test_sample_grid_refuses_a_wrong_number_of_images(tmp_path: Path, images: Tensor) -> None:
    with pytest.raises(ValueError, match=r"images must be \[4, 1 or 3, H, W\]"):
        save_sample_grid(images, tmp_path / "g.png", classes=["a", "b"], images_per_class=2)
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("num_clients", [1, 10, 20, 21, 50])
def test_heatmap_is_wider_with_more_clients_and_has_its_colors(
    tmp_path: Path, num_clients: int
) -> None:
    counts = np.zeros((num_clients, 10), np.int64)
    counts[0] = 900
    classes = [str(label) for label in range(10)]
    save_partition_heatmaps({"beta = 0.5": counts}, tmp_path / "map.png", classes=classes)
    picture = pixels(tmp_path / "map.png")
    assert picture.shape[0] == 825 and 700 < picture.shape[1] < 2200
    assert ((picture == (8, 48, 107)).all(axis=-1)).any(), "the darkest blue is the largest count"


def test_heatmap_of_nothing_can_be_drawn(tmp_path: Path) -> None:
    save_partition_heatmaps({"": np.zeros((2, 2), int)}, tmp_path / "map.png", classes=["a", "b"])
    assert os.listdir(tmp_path) == ["map.png"]


def test_heatmap_refuses_other_shapes(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"counts must be \[clients, 3\], got \(4, 2\)"):
        save_partition_heatmaps(
            {"": np.ones((4, 2))}, tmp_path / "map.png", classes=["a", "b", "c"]
        )


def test_panels_stand_side_by_side_and_below_with_their_exact_pixels(tmp_path: Path) -> None:
    panels = [Panel(samples(2, 3) + number, f"client {number}") for number in range(3)]
    save_panels(panels, tmp_path / "p.png", rows=["", ""], columns=3, panels_per_line=2)
    picture = pixels(tmp_path / "p.png")
    height, width, _ = mosaic(panels[0].images, 3).shape
    line = TITLE_HEIGHT + height + MARGIN
    assert picture.shape == (2 * line, 2 * MARGIN + 2 * width + PANEL_GAP, 3)
    for number, panel in enumerate(panels):
        x = MARGIN + number % 2 * (width + PANEL_GAP)
        y = TITLE_HEIGHT + number // 2 * line
        assert np.array_equal(picture[y : y + height, x : x + width], mosaic(panel.images, 3))
        assert (picture[y - TITLE_HEIGHT : y, x : x + width] < 100).any(), "no title is there"
    assert (picture[line:, MARGIN + width :] == 255).all()


def test_panels_share_lines_evenly(tmp_path: Path) -> None:
    panels = [Panel(samples(1, 1))] * 4
    save_panels(panels, tmp_path / "p.png", rows=[""], columns=1, panels_per_line=3)
    assert pixels(tmp_path / "p.png").shape[:2] == (
        2 * (MARGIN + 80 + MARGIN),
        MARGIN + 80 + PANEL_GAP + 80 + MARGIN,
    )


def test_panel_is_as_wide_as_its_title(tmp_path: Path) -> None:
    panels = [Panel(samples(1, 1), "a title far longer than one tile"), Panel(samples(1, 1), "b")]
    save_panels(panels, tmp_path / "p.png", rows=[""], columns=1)
    picture = pixels(tmp_path / "p.png")
    heading = (picture[:TITLE_HEIGHT] < 200).any(axis=(0, 2))
    right_tile = picture.shape[1] - MARGIN - (picture.shape[1] - 2 * MARGIN - PANEL_GAP) // 2
    assert heading[right_tile : right_tile + 20].any(), "the second title is not above its tile"
    assert not heading[right_tile - PANEL_GAP + 1 : right_tile].any(), "titles run together"
    assert not heading[-MARGIN:].any()


def test_panels_have_their_dominant_colors_on_top(tmp_path: Path) -> None:
    red, blue = solid((255, 0, 0)), solid((0, 0, 255))
    panels = [Panel(torch.cat([red, red, red, blue])), Panel(torch.cat([blue, red, blue, blue]))]
    save_panels(panels, tmp_path / "p.png", rows=["", ""], columns=2, tile=20, num_colors=2)
    picture = pixels(tmp_path / "p.png")
    width = 2 * 24 + GAP
    for number, (most, least) in enumerate(((red, blue), (blue, red))):
        x = MARGIN + number * (width + PANEL_GAP)
        strip = picture[MARGIN : MARGIN + STRIP_HEIGHT, x : x + width]
        assert (strip[:, : width * 3 // 4] == most[0, :, 0, 0].numpy()).all()
        assert (strip[:, width * 3 // 4 :] == least[0, :, 0, 0].numpy()).all()
    below = picture[MARGIN + STRIP_HEIGHT :, MARGIN : MARGIN + width]
    assert (below[: 2 * GAP] == 255).all()
    assert np.array_equal(below[2 * GAP : -MARGIN], mosaic(panels[0].images, 2, tile=20))


def test_panels_refuse_another_number_of_images(tmp_path: Path) -> None:
    panels = [Panel(samples(2, 2)), Panel(samples(2, 3))]
    with pytest.raises(ValueError, match=r"images must be \[4, .* got \(6, 3, 16, 16\)"):
        save_panels(panels, tmp_path / "p.png", rows=["a", "b"], columns=2)
    assert os.listdir(tmp_path) == []


def solid(color: tuple[int, int, int]) -> Tensor:
    return torch.tensor(color, dtype=torch.uint8).reshape(1, 3, 1, 1).expand(1, 3, 8, 8)


def test_dominant_colors_are_the_means_of_clusters_by_share() -> None:
    near = [(10, 10, 10), (12, 10, 10), (250, 0, 0), (0, 250, 0), (0, 250, 0), (0, 250, 2)]
    images = torch.cat([solid(color) for color in near])
    colors, shares = dominant_colors(images, 3)
    assert colors.tolist() == [[0, 250, 1], [11, 10, 10], [250, 0, 0]]
    assert shares.tolist() == pytest.approx([3 / 6, 2 / 6, 1 / 6])


def test_dominant_colors_of_gray_images_are_gray_and_no_more_than_there_are() -> None:
    images = torch.tensor([0, 0, 0, 200], dtype=torch.uint8).reshape(1, 1, 2, 2)
    colors, shares = dominant_colors(images, 5)
    assert colors.tolist() == [[0, 0, 0], [200, 200, 200]]
    assert shares.tolist() == [0.75, 0.25]


def test_dominant_colors_are_the_same_each_time() -> None:
    first, second = (dominant_colors(samples(2, 5), 5) for _ in range(2))
    assert np.array_equal(first[0], second[0]) and np.array_equal(first[1], second[1])
    assert first[1].sum() == pytest.approx(1) and (np.diff(first[1]) <= 0).all()


def test_color_strip_fills_its_width() -> None:
    colors = np.array([[1, 2, 3], [4, 5, 6], [7, 8, 9]], np.uint8)
    strip = color_strip(colors, np.array([1 / 3] * 3), width=100)
    assert strip.shape == (STRIP_HEIGHT, 100, 3) and strip.dtype == np.uint8
    assert [int((strip[0, :, 0] == color).sum()) for color in (1, 4, 7)] == [33, 34, 33]


def test_heatmaps_share_one_scale(tmp_path: Path) -> None:
    maps = {"beta=0.1": np.full((3, 2), 500), "beta=5": np.full((3, 2), 1000)}
    save_partition_heatmaps(maps, tmp_path / "maps.png", classes=["a", "b"])
    picture = pixels(tmp_path / "maps.png")
    darkest, middle = (8, 48, 107), (107, 174, 214)  # of Blues at 1000 and at 500 of 1000
    halves = picture[:, : picture.shape[1] // 2], picture[:, picture.shape[1] // 2 : -300]
    # The second map begins right of the middle of the picture, which the bar is part of.
    assert is_there(halves[0], middle) and is_there(halves[1], darkest)
    assert not is_there(halves[0], darkest)


def is_there(picture: np.ndarray, color: tuple[int, int, int]) -> bool:
    return bool((np.abs(picture.astype(int) - color).max(axis=-1) <= 2).sum() > 5000)


@pytest.mark.parametrize("num_clients", [10, 50])
def test_three_heatmaps_are_no_wider_with_many_clients(tmp_path: Path, num_clients: int) -> None:
    maps = {f"beta={beta}": np.ones((num_clients, 10), np.int64) for beta in (0.1, 0.5, 5)}
    save_partition_heatmaps(
        maps, tmp_path / "maps.png", classes=[str(label) for label in range(10)]
    )
    assert pixels(tmp_path / "maps.png").shape[:2] == (825, 2955)


def test_heatmaps_refuse_other_shapes(tmp_path: Path) -> None:
    maps = {"a": np.ones((4, 2)), "b": np.ones((4, 3))}
    with pytest.raises(ValueError, match=r"counts must be \[clients, 2\], got \(4, 3\)"):
        save_partition_heatmaps(maps, tmp_path / "map.png", classes=["a", "b"])
