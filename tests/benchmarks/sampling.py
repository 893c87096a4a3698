"""Drawing images against the rate of the network alone."""

from collections.abc import Sequence
from functools import partial
from statistics import median

from task.config import load_config
from task.generation.batches import CPU_BATCH_SIZE, GPU_BATCH_SIZE
from task.training.devices import select_device
from tests.benchmarks.contestants import Contestant, take_turns
from tests.benchmarks.feddm import PAPER, Feddm
from tests.benchmarks.report import Figures, available_cores

FULL_COUNT = 10_000


def measure(
    *,
    full: bool,
    device: str,
    overrides: Sequence[str] = PAPER,
    batch_size: int | None = None,
    turns: int = 3,
    num_threads: int | None = None,
) -> Figures:
    """Draw images and call the network alone, in turns.

    Args:
        full: whether to draw 10,000 images in all steps, on a GPU, instead of a batch in a few.
        device: auto, cpu, cuda or cuda:N.
        overrides: of the network and its sampler.
        batch_size: images side by side; None: as many as a run draws.
        turns: that count.
        num_threads: of the CPU; None: a thread per core.
    """
    config, on_gpu = load_config(overrides), select_device(device).type == "cuda"
    batch = batch_size or (GPU_BATCH_SIZE if on_gpu else CPU_BATCH_SIZE)
    all_steps = config.diffusion.num_inference_steps or config.diffusion.num_timesteps
    whole = full and on_gpu
    steps = all_steps if whole else 20 if on_gpu else 4
    count, turns = (FULL_COUNT, 1) if whole else (batch, turns)
    few_steps = (*overrides, f"diffusion.num_inference_steps={steps}")
    with Contestant(Feddm, few_steps, device, num_threads or available_cores()) as feddm:
        rates = take_turns(
            {
                "draw": partial(feddm.call, "draw", count, batch),
                "forward": partial(feddm.call, "forward", batch, steps),
            },
            turns,
        )
        precision = feddm.call("settled_precision")
    drawn, forward = median(rates["draw"]), median(rates["forward"])
    taken = f"measured in {steps} steps"
    return {
        "sample.images_per_second": drawn * steps / all_steps,
        "sample.share_of_forward_rate": drawn * steps / forward,
        "sample.forward_images_per_second": forward,
        "sample.steps": all_steps,
        "sample.taken": taken if whole else f"{taken}, extrapolated to {all_steps}",
        "sample.batch_size": batch,
        "sample.precision": precision,
    }
