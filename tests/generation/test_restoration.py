import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from task.config import load_config
from task.data.shape import LUMA
from task.generation.batches import to_uint8
from task.generation.restoration import (
    BlockMean,
    Luma,
    Mask,
    Restorer,
    known_part,
    restoration_config,
)
from task.generators.base import NoiseSource, Projection
from task.generators.diffusion.repaint import into_range, repaint_moves
from task.runs.layout import run_config
from task.runs.run import final_model, load_run
from tests.cli.test_cli import assert_fails_in_one_line, feddm, finished_run
from tests.generators.denoisers import diffusion

SHAPE = (3, 8, 8)
TOP_HALF = Mask((torch.arange(8) < 4)[:, None].expand(8, 8))
PROJECTIONS = [TOP_HALF, BlockMean(4), Luma()]
LEVELS = torch.arange(64, dtype=torch.uint8).view(8, 8) * 4
LOWER_HALF = ~TOP_HALF.known


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return finished_run(tmp_path_factory.mktemp("runs"), "data=digits", "data.test_fraction=0.1")


def noise(number: int, shape: tuple[int, ...] = SHAPE) -> NoiseSource:
    generator = torch.Generator().manual_seed(0)
    return lambda: torch.randn(number, *shape, generator=generator)


def pictures(number: int) -> Tensor:
    return torch.rand(number, *SHAPE, generator=torch.Generator().manual_seed(1)) * 2 - 1


def repaint(model: Callable[..., Tensor], known: Tensor, **changes: Any) -> Tensor:
    walk = {name: changes.pop(name) for name in ("jump_length", "num_resamples") if name in changes}
    projection = changes.pop("projection")
    draw_noise = changes.pop("draw_noise", noise(len(known), tuple(known.shape[1:])))
    settings = {"prediction_type": "sample", "num_inference_steps": 20, "sampler": "ddim"}
    restore = diffusion(model, **(settings | changes)).restoring(
        **({"jump_length": 5, "num_resamples": 2} | walk)
    )
    labels = torch.zeros(len(known), dtype=torch.int64)
    return restore(labels, draw_noise, known, projection)


def white_gaussian(mean: float, std: float) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """The exact model, as "sample", of pixels that are independent."""

    def model(x_t: Tensor, log_snr: Tensor, labels: Tensor) -> Tensor:
        share = log_snr.sigmoid().view(-1, 1, 1, 1)
        gain = share.sqrt() * std**2 / (share * std**2 + 1 - share)
        return mean + gain * (x_t - share.sqrt() * mean)

    return model


def correlated_pairs(correlation: float, std: float) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """The exact model, as "sample", of images of two pixels."""
    covariance = std**2 * torch.tensor([[1, correlation], [correlation, 1]])

    def model(x_t: Tensor, log_snr: Tensor, labels: Tensor) -> Tensor:
        share = log_snr[0].sigmoid()
        gain = (
            share.sqrt() * covariance @ (share * covariance + (1 - share) * torch.eye(2)).inverse()
        )
        return (x_t.flatten(1) @ gain.T).view_as(x_t)

    return model


@pytest.mark.parametrize("projection", PROJECTIONS)
def test_projections_are_orthogonal(projection: Projection) -> None:
    one, other = pictures(4), pictures(8)[4:]
    once = projection(one)
    torch.testing.assert_close(projection(once), once, atol=1e-6, rtol=0)
    torch.testing.assert_close((once * other).sum(), (one * projection(other)).sum())
    assert not torch.allclose(once, one)


@pytest.mark.parametrize("projection", PROJECTIONS)
def test_projections_work_where_the_images_are(projection: Projection) -> None:
    images = pictures(4).to("meta")
    assert projection(images).device.type == "meta"
    assert into_range(images, images, projection).device.type == "meta"


@pytest.mark.parametrize("projection", PROJECTIONS)
def test_restored_part_of_independent_pixels_has_their_distribution(
    projection: Projection,
) -> None:
    # Where all pixels are independent and alike, nothing that is known tells of the rest.
    mean, std = 0.05, 0.3
    known = pictures(200) * 0.1 + mean
    found = repaint(
        white_gaussian(mean, std),
        known,
        projection=projection,
        num_inference_steps=300,
        jump_length=50,
    )
    rest = found - mean - projection(found - mean)
    free = SHAPE[0] * 64 - {TOP_HALF: 96, PROJECTIONS[1]: 12, PROJECTIONS[2]: 64}[projection]
    assert rest.mean() == pytest.approx(0, abs=0.01)
    assert math.sqrt(rest.square().sum() / (200 * free)) == pytest.approx(std, rel=0.05)


def test_more_resamples_come_closer_to_the_conditional_distribution() -> None:
    correlation, std, number = 0.9, 0.3, 1500
    known = torch.rand(number, 1, 1, 2, generator=torch.Generator().manual_seed(1)) * 1.2 - 0.6
    slopes = []
    for num_resamples in (1, 3, 10):
        found = repaint(
            correlated_pairs(correlation, std),
            known,
            projection=Mask(torch.tensor([[True, False]])),
            num_inference_steps=100,
            jump_length=1,
            num_resamples=num_resamples,
        )
        given, drawn = found.flatten(1).T
        slopes.append(float((given * drawn).mean() / given.square().mean()))
    # Of a Gaussian: the mean is correlation * given, the deviation std * sqrt(1 - correlation^2).
    assert slopes[0] < slopes[1] < slopes[2] < correlation
    assert slopes[2] == pytest.approx(correlation, abs=0.08)
    expected = std * math.sqrt(1 - correlation**2)
    assert float((drawn - slopes[2] * given).std()) == pytest.approx(expected, rel=0.15)


@pytest.mark.parametrize("projection", PROJECTIONS)
def test_images_agree_with_what_is_known_and_stay_in_range(projection: Projection) -> None:
    known = pictures(6).clamp(-1, -0.6)
    found = repaint(white_gaussian(0.0, 1.0), known, projection=projection)
    assert found.abs().max() <= 1
    torch.testing.assert_close(projection(found), projection(known), atol=1e-5, rtol=0)
    assert not torch.allclose(found, known, atol=0.1)


def test_enlarged_and_colored_pictures_give_back_the_given_one() -> None:
    config = load_config(["data.channels=3", "data.image_size=8", "model.num_poolings=1"])
    generator = torch.Generator().manual_seed(0)
    small = torch.randint(256, (3, 3, 2, 2), generator=generator, dtype=torch.uint8)
    gray = torch.randint(256, (3, 1, 8, 8), generator=generator, dtype=torch.uint8)
    for picture, task in ((small, {"upscale": 4}), (gray, {"colorize": True})):
        known, projection = known_part(config, picture, **task)  # type: ignore[arg-type]
        found = to_uint8(repaint(white_gaussian(0.0, 1.0), known, projection=projection)).float()
        if "upscale" in task:
            again = torch.nn.functional.avg_pool2d(found, 4)
        else:
            again = (found * LUMA[:, None, None]).sum(1, keepdim=True)
        torch.testing.assert_close(again, picture.float(), atol=0.5 + 1e-3, rtol=0)
        assert (found - found.mean((1, 2, 3), keepdim=True)).std() > 10


def test_into_range_leaves_images_in_range_alone() -> None:
    known, images = pictures(2), pictures(4)[2:]
    assert torch.allclose(into_range(images, known, BlockMean(4)), images, atol=1e-6)


def test_repaint_moves_jumps_as_the_code_of_repaint_does() -> None:
    # t of its get_schedule_jump(t_T=8, jump_length=2, jump_n_sample=3) is the steps left, less one.
    t_values = [7, 6, 5, 4, 5, 6, 5, 4, 5, 6, 5, 4, 3, 2, 3, 4, 3, 2, 3, 4, 3, 2]
    t_values += [1, 0, 1, 2, 1, 0, 1, 2, 1, 0, -1]
    walk = [*repaint_moves(8, 2, 3)]
    visited = [8]
    for before, after in walk:
        assert before == visited[-1]
        step = 1 if after > before else -1
        visited += range(before + step, after + step, step)
    assert [left - 1 for left in visited] == t_values
    assert [*repaint_moves(3, 10, 1)] == [(3, 2), (2, 1), (1, 0)]


def test_impossible_tasks_are_refused() -> None:
    gray = load_config(["data.image_size=8", "model.num_poolings=1"])
    one = torch.zeros(1, 1, 8, 8, dtype=torch.uint8)
    hole = torch.ones(8, 8, dtype=torch.bool)
    with pytest.raises(ValueError, match="one of mask, upscale and colorize must be given"):
        known_part(gray, one)
    with pytest.raises(ValueError, match=r"data\.channels must be 3 for colorize, got 1"):
        known_part(gray, one, colorize=True)
    with pytest.raises(ValueError, match=r"upscale must be > 1 and a divisor of .*=8, got 3"):
        known_part(gray, one, upscale=3)
    with pytest.raises(ValueError, match=r"images must be of shape \(N, 1, 4, 4\)"):
        known_part(gray, one, upscale=2)
    with pytest.raises(ValueError, match=r"mask must be true .white. somewhere"):
        known_part(gray, one, mask=~hole)
    with pytest.raises(TypeError, match="mask must be bool"):
        known_part(gray, one, mask=hole.byte())
    with pytest.raises(
        ValueError, match=r"jump_length must be >= 1 and below the 4 steps .*--num-resamples 1"
    ):
        [*repaint_moves(4, 10, 2)]
    with pytest.raises(ValueError, match="known must be in"):
        repaint(white_gaussian(0, 1), 2 * pictures(1), projection=Luma())


def test_restore_command_and_method_keep_the_known_pixels(run: Path, tmp_path: Path) -> None:
    levels, mask = LEVELS, LOWER_HALF
    Image.fromarray(levels.numpy()).save(tmp_path / "ramp.png")
    Image.fromarray(mask.numpy()).save(tmp_path / "mask.png")
    out = tmp_path / "out"
    words = [run, tmp_path / "ramp.png", "--class", 3, "--num", 2, "--out", out]
    words += ["--jump-length", 1, "--num-resamples", 2]
    result = feddm("restore", *words, "--mask", tmp_path / "mask.png")
    assert result.exit_code == 0, result.output
    files = sorted(out.iterdir())
    assert [file.name for file in files] == ["ramp-0.png", "ramp-1.png"]
    assert "synthetic" in Image.open(files[0]).text["Comment"]  # type: ignore[attr-defined]
    by_method = load_run(run).restore(
        levels[None, None], 3, 2, mask=mask, jump_length=1, num_resamples=2
    )
    for file, image in zip(files, by_method.images, strict=True):
        pixels = torch.from_numpy(np.array(Image.open(file)))
        assert torch.equal(pixels, image[0])
        assert torch.equal(pixels[:4], levels[:4]) and not torch.equal(pixels[4:], levels[4:])
    again = feddm("restore", *words, "--mask", tmp_path / "mask.png")
    assert_fails_in_one_line(again, "--out must be a folder without images of these names")
    small = ["restore", run, tmp_path / "ramp.png", "--class", 3, "--out", tmp_path / "large"]
    assert_fails_in_one_line(
        feddm(*small, "--upscale", 2), "ramp.png must be 4 x 4 pixels", "8 x 8"
    )
    assert_fails_in_one_line(feddm(*small, "--upscale", 5), "upscale must be > 1 and a divisor")
    unknown = ["restore", *words[:2], "--class", "x", "--out", tmp_path / "large", "--colorize"]
    assert_fails_in_one_line(feddm(*unknown), "class must be one of 0, 1")
    far = feddm(*small, "--mask", tmp_path / "mask.png", "--jump-length", 4)
    assert_fails_in_one_line(far, "jump_length must be >= 1 and below the 4 steps")
    lost = feddm(*small, "--mask", tmp_path / "mask.png", "--client", 7)
    assert_fails_in_one_line(lost, "client must be one whose weights")
    typo = feddm(*small, "--mask", tmp_path / "mask.png", "diffusion.num_inference_step=10")
    assert_fails_in_one_line(typo, "an override must be NAME=VALUE", "diffusion.num_inference_step")
    assert_fails_in_one_line(feddm(*small), "one of mask, upscale and colorize must be given")
    assert not (tmp_path / "large").exists()
    gray = tmp_path / "gray.png"
    Image.fromarray(levels.numpy()).save(gray)
    assert_fails_in_one_line(feddm(*small, "--mask", gray), "black (known) or white", "[4, 8, 12]")
    assert_fails_in_one_line(
        feddm(*small, "--mask", tmp_path / "mask.png", "diffusion.eta=0"), "an override must be"
    )


@pytest.mark.parametrize("num_steps", [1, 2, 4])
def test_few_steps_take_shorter_jumps(run: Path, num_steps: int) -> None:
    images = load_run(run).restore(
        LEVELS[None, None], 3, mask=LOWER_HALF, num_inference_steps=num_steps
    )
    assert torch.equal(images.images[0, 0, :4], LEVELS[:4])


def test_batches_of_a_restorer_are_drawn_one_after_another(run: Path) -> None:
    config = restoration_config(run_config(run), options={"eval.batch_size": 2})
    known, projection = known_part(config, LEVELS.expand(3, 1, 8, 8), mask=LOWER_HALF)
    drawn = []

    def count(*arguments: object) -> None:
        drawn.append(arguments)

    model, _ = final_model(run, config)
    model.network.register_forward_hook(count)
    restorer = Restorer(
        config,
        model,
        known,
        projection=projection,
        label=3,
        num_images=2,
        jump_length=None,
        num_resamples=1,
        device=torch.device("cpu"),
    )
    batches = restorer.batches()
    assert not drawn and next(batches).shape == (2, 1, 8, 8)
    assert len(drawn) == config.diffusion.num_inference_steps
    assert [len(batch) for batch in batches] == [2, 2] and len(restorer) == 6
    with pytest.raises(TypeError, match="unknown keyword eta; known: clip_x_start, guidance_scale"):
        load_run(run).restore(LEVELS[None, None], 3, mask=LOWER_HALF, eta=0)
