"""How often the search for copies alarms where nothing is copied, and how often it finds copies."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from task.config import load_config
from task.data import build_dataset
from task.evaluation.distances import neighbor_distances
from task.evaluation.near_copies import copying_test
from tests.benchmarks.report import Figures

# Of generated images; the numbers of held-out ones are given.
GENERATED = 500
# A copy differs from a training image by noise of this standard deviation, of 255.
COPY_NOISE = 5.0
SIGNIFICANT = 0.01


def measure(
    *,
    full: bool,
    device: str,
    held_out: Sequence[int] = (10, 30, 60, 179),
    trials: int = 200,
    copies: Sequence[float] = (0.05, 0.2, 0.5),
) -> Figures:
    """Let real digits stand for honest generated ones, and training images with noise for copies.

    Args:
        full: ten times as many trials.
        device: not used.
        held_out: numbers of held-out images.
        trials: splits of the digits at random, for each number.
        copies: shares of the generated images.

    Returns:
        By number of held-out images the share of trials with p < 0.01 without copies and with
        each share of them; and of alarms by the rule that more than 1 % and three standard errors
        of it are as near as the nearest 1 % of the held-out ones.
    """
    dataset = build_dataset(load_config(["data.image_size=8"]), download=False)
    images = torch.cat([dataset.train.images, dataset.test.images]).flatten(1)
    trials *= 10 if full else 1
    found: Figures = {"copying.trials": float(trials)}
    for number in held_out:
        counts: dict[str | float, int] = dict.fromkeys(("threshold", 0.0, *copies), 0)
        generator = torch.Generator().manual_seed(number)
        for _ in range(trials):
            for kind, alarmed in _trial(images, number, copies, generator).items():
                counts[kind] += alarmed
        words: dict[str | float, str] = {
            **{"threshold": "threshold_false_alarm", 0.0: "false_alarm"},
            **{share: f"found_{share * 100:.0f}_percent" for share in copies},
        }
        found |= {
            f"copying.{words[kind]}_share_of_{number}": count / trials
            for kind, count in counts.items()
        }
    return found


def _trial(
    images: Tensor, held_out: int, copies: Sequence[float], generator: torch.Generator
) -> dict[str | float, bool]:
    order = torch.randperm(len(images), generator=generator)
    honest, held, train = (
        images[part] for part in torch.tensor_split(order, (GENERATED, GENERATED + held_out))
    )
    nearest, relative, _ = neighbor_distances(honest, train)
    held_nearest, held_relative, _ = neighbor_distances(held, train)
    near = (nearest <= held_nearest.quantile(0.01)).double().mean()
    alarms: dict[str | float, bool] = {
        "threshold": bool(near > 0.01 + 3 * math.sqrt(0.01 * 0.99 / GENERATED)),
        0.0: copying_test(relative, held_relative)[0] < SIGNIFICANT,
    }
    for share in copies:
        number = round(share * GENERATED)
        noise = COPY_NOISE * torch.randn(number, images.shape[1], generator=generator)
        copied = (train[:number] + noise).clamp(0, 255)
        theirs = neighbor_distances(copied, train.float()).ratio
        mixed = torch.cat([relative[number:], theirs])
        alarms[share] = copying_test(mixed, held_relative)[0] < SIGNIFICANT
    return alarms
