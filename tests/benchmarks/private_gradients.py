"""What gradients of single patients cost: `python -m tests.benchmarks.private_gradients`."""

import time

import torch

from task.config import load_config
from task.generators.base import Batch, Generator
from task.generators.registry import initial_generator
from task.privacy.accounting import Spending
from task.training.private import PrivateSteps, SeededDraws, private_gradient

PATIENTS, DRAWS, REPEATS = 32, 8, 3
MODELS = {
    "tiny, width 8": ["model=tiny", "model.width=8"],
    "tiny, width 16": ["model=tiny", "model.width=16"],
    "tiny, width 32": ["model=tiny", "model.width=32"],
    "vae": ["model=vae", "model.hidden_dim=256", "model.latent_dim=16"],
}


def mean_loss(model: Generator, places: torch.Tensor, rng: torch.Generator) -> torch.Tensor:
    """Compute the loss of images that only differ in their noise."""
    images = torch.zeros(len(places), *model.image_shape)
    ((_, losses),) = model.losses(Batch(images, places % 10, places), rng)
    return losses.mean()


def seconds_of(model: Generator) -> tuple[float, float]:
    """Time a batch of all draws of all patients, and a gradient of each patient."""
    rng = torch.Generator().manual_seed(0)
    everyone = torch.arange(PATIENTS)
    steps = PrivateSteps(spending=Spending(1.0, 1.0, 1), clipping_norm=1.0, noise_draws=DRAWS)

    def backward(places: torch.Tensor, weight: float) -> torch.Tensor:
        loss = mean_loss(model, places, rng)
        (weight * loss).backward()  # type: ignore[no-untyped-call]
        return loss

    def together() -> None:
        model.zero_grad()
        backward(everyone.repeat_interleave(DRAWS), 1.0)

    def each() -> None:
        private_gradient(
            [*model.parameters()],
            everyone.split(1),
            backward,
            steps=steps,
            expected_patients=PATIENTS,
            chunk=DRAWS,
            draws=SeededDraws(rng),
        )

    found = []
    for run in (together, each):
        run()
        times = []
        for _ in range(REPEATS):
            start = time.perf_counter()
            run()
            times.append(time.perf_counter() - start)
        found.append(min(times))
    return found[0], found[1]


def main() -> None:
    """Print a line for each model."""
    torch.set_num_threads(1)
    for name, words in MODELS.items():
        model = initial_generator(load_config(["diffusion=fast"] * ("tiny" in name) + words))
        together, each = seconds_of(model.train())
        print(
            f"{name} ({model.num_parameters:,} weights): a batch of {PATIENTS * DRAWS} images "
            f"{together:.2f} s, gradients of {PATIENTS} patients {each:.2f} s, "
            f"{each / together:.1f} times as long"
        )


if __name__ == "__main__":
    main()
