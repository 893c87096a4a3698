"""Draw images with an exported model, and write them as PNG files.

Needs NumPy and Pillow. The same seed draws the same images from every format, and with
`feddm generate` in float32, but for rounding.
"""

import argparse
import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from task.generators.diffusion.samplers import draw_by_settings
from task.generators.noise import generation_noise

# model(x_t [N, C, H, W] float32, log_snr [N] float32, labels [N] int64) -> [N, C, H, W] float32
Model = Callable[[np.ndarray, np.ndarray, np.ndarray], np.ndarray]
Settings = dict[str, Any]

DRAWN_AT_ONCE = 100

# Read when PyTorch is imported, which is after this file: otherwise its threads wait for each other
# in busy loops, and take the cores from whoever is to compute on a machine that others use, too.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")


def read_settings(folder: Path | str) -> Settings:
    """Read the config.json of an export."""
    settings: Settings = json.loads((Path(folder) / "config.json").read_text(encoding="utf-8"))
    return settings


def draw(
    model: Model,
    labels: np.ndarray,
    *,
    settings: Settings,
    draw_noise: Callable[[], np.ndarray],
    **sampling: Any,
) -> np.ndarray:
    """Draw an image of each label.

    Args:
        model: see `Model`.
        labels: [N] int64.
        settings: see `read_settings`.
        draw_noise: returns standard normal noise, [N, C, H, W] float32, new at every call.
        **sampling: what to change of `settings["sampling"]`, see `draw_by_settings`.

    Returns:
        [N, C, H, W] float32, about [-1, 1].

    Raises:
        ValueError: see `draw_by_settings`.
    """

    def predict(x_t: np.ndarray, log_snr: float, labels: np.ndarray) -> np.ndarray:
        return model(x_t, np.full(len(labels), log_snr, np.float32), labels)

    images: np.ndarray = draw_by_settings(
        settings, predict, labels, draw_noise=draw_noise, **sampling
    )
    return images


def to_pixels(images: np.ndarray) -> np.ndarray:
    """Turn images in [-1, 1], [N, C, H, W], into uint8 [N, H, W] or [N, H, W, 3]."""
    pixels = ((images.clip(-1, 1) + 1) * 127.5).round().astype(np.uint8).transpose(0, 2, 3, 1)
    return pixels[..., 0] if pixels.shape[-1] == 1 else pixels


def main(
    load_model: Callable[[Path], Model], folder: Path, words: Sequence[str] | None = None
) -> None:
    """Draw images as the command line asks.

    Args:
        load_model: loads the model of a folder.
        folder: of the export.
        words: of the command line; None: those of the process.
    """
    settings = read_settings(folder)
    classes = settings["classes"]
    parser = argparse.ArgumentParser(description="Draw images with this model.")
    parser.add_argument("--class", dest="drawn", choices=classes, help="to draw; else every class")
    parser.add_argument("--num", type=int, default=4, help="images of each class (%(default)s)")
    parser.add_argument(
        "--seed", type=int, default=settings["seed"], help="of the noise (%(default)s)"
    )
    parser.add_argument("--steps", type=int, help="fewer are faster, with ddim and dpmpp_2m")
    parser.add_argument("--guidance-scale", type=float, help="of a model with a null label")
    parser.add_argument("--out", type=Path, default=Path("images"), help="folder (%(default)s)")
    chosen = parser.parse_args(words)
    check(chosen, settings, parser.error)
    sampling = {"num_inference_steps": chosen.steps, "guidance_scale": chosen.guidance_scale}
    sampling = {name: value for name, value in sampling.items() if value is not None}
    model, shape = load_model(folder), image_shape(settings)
    for name in [chosen.drawn] if chosen.drawn else classes:
        label = classes.index(name)
        drawn = chosen.out / settings["folders"][label]
        drawn.mkdir(parents=True, exist_ok=True)
        for start in range(0, chosen.num, DRAWN_AT_ONCE):
            places = range(start, min(start + DRAWN_AT_ONCE, chosen.num))
            labels = np.full(len(places), label, np.int64)
            draw_noise = generation_noise(places, shape, seed=chosen.seed, label=label)
            images = draw(model, labels, settings=settings, draw_noise=draw_noise, **sampling)
            for number, pixels in enumerate(to_pixels(images), start):
                write_png(drawn / f"{number:06d}.png", pixels, settings["notice"])


def check(
    chosen: argparse.Namespace, settings: Settings, refuse: Callable[[str], NoReturn]
) -> None:
    """Check the numbers of a command line; `refuse` is told of one that is out of range."""
    most = len(settings["alphas_cumprod"])
    if chosen.num < 1:
        refuse(f"--num must be at least 1, got {chosen.num}")
    if chosen.seed < 0:
        refuse(f"--seed must be at least 0, got {chosen.seed}")
    if chosen.steps is not None and not 1 <= chosen.steps <= most:
        refuse(f"--steps must be between 1 and {most}, got {chosen.steps}")
    if chosen.guidance_scale not in (None, 1) and settings["null_label"] is None:
        refuse("--guidance-scale must be 1 for a model without a null label")


def write_png(file: Path, pixels: np.ndarray, notice: str) -> None:
    """Write an image of `to_pixels` as a PNG file that says what it is."""
    info = PngInfo()
    info.add_text("Software", "feddm")
    info.add_text("Comment", notice)
    Image.fromarray(pixels).save(file, pnginfo=info)


def image_shape(settings: Settings) -> tuple[int, int, int]:
    """Return (C, H, W) of the images."""
    size = settings["image_size"]
    return settings["channels"], size, size
