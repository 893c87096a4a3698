"""Whether bfloat16 trains as float32 does: their loss curves against the spread of seeds."""

from collections.abc import Sequence

import numpy as np

from task.training.devices import select_device
from tests.benchmarks.contestants import Contestant
from tests.benchmarks.feddm import Feddm
from tests.benchmarks.report import Figures, available_cores

# Digits, which come with a library; a GPU trains the paper's net, a CPU a narrow one of its kind.
DIGITS = (
    *("experiment=paper", "data=digits", "data.channels=1"),
    *("train.precision=float32", "train.batch_size=64"),
)
NETWORK = {"cpu": ("model.width=16",), "cuda": ("data.image_size=32",)}


def measure(
    *,
    full: bool,
    device: str,
    num_threads: int | None = None,
    further: Sequence[str] = (),
    seeds: int = 3,
    checkpoints: int = 8,
    epochs: int = 2,
) -> Figures:
    """Train in both precisions from the same seeds and compare the held-out losses.

    Args:
        full: not used.
        device: auto, cpu, cuda or cuda:N.
        num_threads: of the CPU; None: a thread per core.
        further: overrides of the configuration.
        seeds: of each precision, at least 2.
        checkpoints: of each curve.
        epochs: between two of them.
    """
    overrides = (*DIGITS, *NETWORK[select_device(device).type], *further)
    with Contestant(Feddm, overrides, device, num_threads or available_cores()) as feddm:
        curves = {
            precision: np.array(
                [
                    feddm.call("loss_curve", seed, precision, checkpoints, epochs)
                    for seed in range(seeds)
                ]
            )
            for precision in ("float32", "bfloat16")
        }
    return compare(curves["float32"], curves["bfloat16"])


def compare(float32: np.ndarray, bfloat16: np.ndarray) -> Figures:
    """Compare curves, [seeds, checkpoints]: the gap of their means with the spread of seeds."""
    gap = float(np.abs(bfloat16.mean(0) - float32.mean(0)).mean())
    spread = float(float32.std(0, ddof=1).mean())
    within = "within" if gap <= spread else "outside"
    return {
        "train.bf16_loss_gap": gap,
        "train.float32_seed_spread": spread,
        "train.float32_last_loss": float(float32[:, -1].mean()),
        "train.bf16_last_loss": float(bfloat16[:, -1].mean()),
        "train.bf16_verdict": f"the loss curves of bfloat16 lie {within} the spread of "
        f"{len(float32)} seeds of float32",
    }
