"""Where images of known faults lie between real ones (0) and noise (1)."""

import torch
from torch import Tensor
from torchvision.transforms.functional import gaussian_blur

from task.config import load_config
from task.data import build_dataset
from task.evaluation.noise_position import noise_position, starting_noise
from task.training.devices import select_device
from tests.benchmarks.report import Figures


def measure(*, full: bool, device: str) -> Figures:
    """Let faulty real digits, and smoothed noise, stand for generated ones.

    Args:
        full: not used.
        device: that computes.

    Returns:
        By fault the place of as many images as are held out.
    """
    dataset = build_dataset(load_config([]), download=False)
    train, held_out = dataset.train.images, dataset.test.images
    noise = starting_noise(len(held_out), held_out.shape[1:], seed=1)
    faulty = {
        "blurred_by_1_pixel": _blurred(held_out, 1),
        "blurred_by_4_pixels": _blurred(held_out, 4),
        "noise_smoothed_over_3x3": torch.nn.functional.avg_pool2d(
            noise.float(), 3, stride=1, padding=1, count_include_pad=False
        ).byte(),
        "one_gray": torch.full_like(held_out, 128),
    }
    found: Figures = {}
    for name, images in faulty.items():
        place = noise_position(images, train, held_out, seed=0, device=select_device(device))
        found |= {"realism.held_out": place.real, f"realism.{name}": place.generated}
    return found


def _blurred(images: Tensor, sigma: int) -> Tensor:
    return gaussian_blur(images, kernel_size=[6 * sigma + 1] * 2, sigma=[float(sigma)] * 2)
