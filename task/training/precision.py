"""Which of float32 and bfloat16 is faster on a machine: what `train.precision=auto` asks."""

import copy
import time

import torch

from task.config import Config
from task.generators.base import Generator
from task.training.devices import torch_configured
from task.training.loop import FitOptions, fit

# bfloat16 must win clearly: a close race would be decided by the noise of the machine.
BFLOAT16_ADVANTAGE = 1.2
# So many times slower in the very first turn, it is given no other.
HOPELESS = 5
# After which `precision=auto` settles for what it has measured.
PRECISION_SECONDS = 20.0


def fastest_precision(config: Config, generator: Generator, device: torch.device) -> str:
    """Name the faster of float32 and bfloat16 for a run on this machine.

    On a GPU it is bfloat16 where the GPU computes in it; a CPU is timed, because there it
    depends on the network as well.

    Args:
        config: of the run.
        generator: copied, so left as it is.
        device: where it will be trained.
    """
    if device.type == "cuda":
        native = torch.cuda.is_bf16_supported(including_emulation=False)
        return "bfloat16" if native else "float32"
    train = config.train
    with torch_configured(num_threads=train.num_threads, deterministic=train.deterministic):
        return _timed_precision(generator, channels_last=train.channels_last, device=device)


def _timed_precision(generator: Generator, *, channels_last: bool, device: torch.device) -> str:
    # 32 images say as much as a whole batch and take seconds.
    images = torch.zeros((32, *generator.image_shape), dtype=torch.uint8)

    def seconds(precision: str, num_images: int, epochs: int) -> float:
        trial = copy.deepcopy(generator)
        trial.prepare(num_images)
        options = FitOptions(
            epochs=epochs,
            batch_size=num_images,
            horizontal_flip=False,
            precision=precision,
            channels_last=channels_last,
        )
        return fit(
            trial,
            images[:num_images],
            torch.zeros(num_images, dtype=torch.int64),
            options=options,
            optimizers=trial.optimizers(lr=1e-4),
            rng=torch.Generator(device).manual_seed(0),
        ).seconds

    precisions = ("float32", "bfloat16")
    # The first turn warms up, and spares a CPU that only emulates bfloat16 minutes of it.
    begin = time.monotonic()
    warm_up = {precision: seconds(precision, 8, epochs=1) for precision in precisions}
    if warm_up["bfloat16"] > HOPELESS * warm_up["float32"]:
        return "float32"
    # The best of three interleaved turns counts, on a busy machine of those that it had time for.
    turns: list[dict[str, float]] = []
    while len(turns) < 3 and time.monotonic() - begin < PRECISION_SECONDS:
        turns.append({each: seconds(each, len(images), epochs=2) for each in precisions})
    best = {each: min(turn[each] for turn in turns or [warm_up]) for each in precisions}
    wins = best["bfloat16"] * BFLOAT16_ADVANTAGE < best["float32"]
    return "bfloat16" if wins else "float32"
