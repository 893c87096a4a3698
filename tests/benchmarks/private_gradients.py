"""What gradients of single patients cost: `python -m tests.benchmarks.private_gradients`."""

import time
from functools import partial

import torch

from task.config import load_config
from task.generators.base import Batch, Generator, NothingMeasured
from task.generators.registry import initial_generator
from task.training.patient_gradients import GRADIENT_MEMORY, clipped_sum

PATIENTS, DRAWS, REPEATS = 32, 8, 3
MODELS = {
    "tiny, width 8": ["model=tiny", "model.width=8"],
    "tiny, width 16": ["model=tiny", "model.width=16"],
    "tiny, width 32": ["model=tiny", "model.width=32"],
    "conv_vae": ["model=conv_vae", "data.image_size=32"],
    "vae": ["model=vae", "model.hidden_dim=256", "model.latent_dim=16"],
}


def mean_loss(model: Generator, places: torch.Tensor, rng: torch.Generator) -> torch.Tensor:
    """Compute the loss of images that only differ in their noise."""
    images = torch.zeros(1, *model.image_shape).expand(len(places), -1, -1, -1)
    ((_, losses),) = model.losses(Batch(images, places % 10, places), rng)
    return losses.mean()


def seconds_of(model: Generator) -> list[float]:
    """Time a batch of all draws of all patients, their gradients one by one, and together."""
    rng = torch.Generator().manual_seed(0)
    patients = torch.arange(PATIENTS).split(1)
    model.means = NothingMeasured()

    def batch() -> None:
        model.zero_grad()
        places = torch.arange(PATIENTS).repeat_interleave(DRAWS)
        mean_loss(model, places, rng).backward()  # type: ignore[no-untyped-call]

    def gradients(memory: int) -> None:
        clipped_sum(
            model,
            [*model.parameters()],
            patients,
            partial(mean_loss, model, rng=rng),
            norm=1.0,
            noise_draws=DRAWS,
            chunk=PATIENTS * DRAWS,
            memory=memory,
        )

    found = []
    for run in (batch, partial(gradients, 0), partial(gradients, GRADIENT_MEMORY)):
        run()
        times = []
        for _ in range(REPEATS):
            start = time.perf_counter()
            run()
            times.append(time.perf_counter() - start)
        found.append(min(times))
    return found


def main() -> None:
    """Print a line for each model."""
    torch.set_num_threads(1)
    for name, words in MODELS.items():
        model = initial_generator(load_config(["diffusion=fast"] * ("tiny" in name) + words))
        batch, alone, together = seconds_of(model.train())
        print(
            f"{name} ({model.num_parameters:,} weights): a batch of {PATIENTS * DRAWS} images "
            f"{batch:.2f} s; gradients of {PATIENTS} patients {alone / batch:.1f} times as long "
            f"one after another, {together / batch:.1f} times together"
        )


if __name__ == "__main__":
    main()
