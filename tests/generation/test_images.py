import io
import re
from pathlib import Path

import pytest
import torch
from PIL import Image

from task.generation.images import GeneratedImages, ImageSource, class_labels
from task.generators.noise import NOISE_BLOCK
from task.runs.layout import run_config
from task.runs.run import final_model, load_run
from tests.cli.test_cli import finished_run

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return finished_run(tmp_path_factory.mktemp("runs"), "data=digits", "data.test_fraction=0.1")


def source(run: Path, seed: int = 0) -> ImageSource:
    config = run_config(run).changed({"seed": seed, "eval.batch_size": 2 * NOISE_BLOCK})
    return ImageSource(config, final_model(run, config)[0], CPU)


def test_names_of_classes_win_over_numbers() -> None:
    assert class_labels(["b", "0", "a"], ["a", "0", 0]) == [2, 1, 0]
    assert class_labels(["b", "0"], None) == [0, 1]
    with pytest.raises(ValueError, match="class must be one of b, a, or a number from 0 to 1, got"):
        class_labels(["b", "a"], ["2"])
    with pytest.raises(ValueError, match="classes must be different ones"):
        class_labels(["b", "a"], ["a", 1])
    with pytest.raises(ValueError, match="classes must be at least one"):
        class_labels(["b", "a"], [])


def test_single_class_needs_no_list() -> None:
    names = [str(digit) for digit in range(13)]
    assert class_labels(names, "12") == class_labels(names, 12) == [12]


def test_images_depend_on_seed_class_and_place_alone(run: Path) -> None:
    whole = source(run).draw(3, range(3 * NOISE_BLOCK))
    part = source(run).draw(3, range(NOISE_BLOCK, 2 * NOISE_BLOCK + 7))
    difference = part.int() - whole[NOISE_BLOCK : 2 * NOISE_BLOCK + 7].int()
    assert difference.abs().max() <= 1  # of 255, for rounding
    assert len(whole.flatten(1).unique(dim=0)) == len(whole)
    first, told = range(8), list[int]()
    drawing = source(run)
    drawing.draw(3, first, told.append)
    assert told == [len(first)] * drawing.evaluations
    for other in (source(run, seed=1).draw(3, first), source(run).draw(4, first)):
        assert (other.int() - whole[:8].int()).abs().amax((1, 2, 3)).min() > 10


def test_sample_gives_classes_in_the_order_asked_for_whatever_else_is_drawn(run: Path) -> None:
    both = load_run(run).sample(classes=["3", 1], num_images=4)
    assert both.images.shape == (8, 1, 8, 8)
    assert both.labels.tolist() == [3] * 4 + [1] * 4
    alone = load_run(str(run)).sample(classes=[1], num_images=4)
    assert torch.equal(both.images[4:], alone.images)
    assert len(load_run(run).sample(num_images=1)) == 10
    otherwise = load_run(run).sample([1], 4, sampler="dpmpp_2m", num_inference_steps=2)
    assert not torch.equal(otherwise.images, alone.images)


def test_generated_images_show_themselves_as_a_grid() -> None:
    levels = torch.arange(6, dtype=torch.uint8).view(6, 1, 1, 1).expand(6, 3, 8, 8) * 40
    images = GeneratedImages(levels, torch.tensor([0, 0, 0, 1, 1, 1]))
    assert [image.mode for image in images.to_pil()] == ["RGB"] * 6
    picture = Image.open(io.BytesIO(images._repr_png_()))
    tile = 48 + 4
    assert picture.size == (3 * tile - 4, 2 * tile - 4)
    assert [picture.getpixel((x * tile, y * tile))[0] for y in (0, 1) for x in (0, 1, 2)] == [
        *(0, 40, 80, 120, 160, 200)
    ]
    gray = GeneratedImages(levels[:5, :1], torch.tensor([0, 0, 1, 1, 1]))
    assert gray.to_pil()[2].getpixel((0, 0)) == 80
    assert gray.grid().size == (2 * tile - 4, 3 * tile - 4)


def test_what_cannot_be_drawn_is_refused(run: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="holds no run"):
        load_run(tmp_path)
    loaded = load_run(run)
    with pytest.raises(ValueError, match="num_images must be >= 1, got 0"):
        loaded.sample([0], 0)
    with pytest.raises(TypeError, match=r"unknown keyword steps; known: clip_x_start, eta, .*"):
        loaded.sample([0], steps=2)
    with pytest.raises(ValueError, match=r"client must be one whose weights .*, got 5"):
        loaded.sample([0], client=5)
    with pytest.raises(ValueError, match=r"diffusion.guidance_scale must be 1 unless"):
        loaded.sample([0], guidance_scale=2)


def test_five_lines_of_the_guide_draw_images(
    run: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    guide = (Path(__file__).resolve().parents[2] / "docs" / "generate.md").read_text(
        encoding="utf-8"
    )
    blocks = re.findall(r"```python\n(.*?)```", guide, flags=re.S)
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "demo").symlink_to(run)
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {}
    for block in blocks:
        exec(block, names)
    images = names["images"]
    assert isinstance(images, GeneratedImages) and len(images) == 16
    assert (tmp_path / "threes.png").is_file()
