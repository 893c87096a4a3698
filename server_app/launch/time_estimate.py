"""How long a run is going to take, from a few steps that are timed on this machine."""

import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from task.config import Config
from task.generators.base import Generator
from task.generators.registry import can_draw, initial_generator
from task.training.devices import autocast, move, select_device, torch_configured
from task.training.loop import fit, timed_options

# Seconds that a timing takes beyond its first images, and images of a timed step at most.
TIMED_SECONDS, TIMED_IMAGES = 1.0, 32
# Timed steps at least: on a GPU the first one of each size chooses its algorithms, for seconds.
MIN_STEPS = {"cuda": 3}


@dataclass(frozen=True)
class Estimate:
    """Seconds of the stages of a run.

    Attributes:
        training: of all rounds.
        drawing: of grids, and of the images that are measured.
    """

    training: float
    drawing: float

    @property
    def total(self) -> float:
        """Seconds of the whole run, without starting and measuring, which take less."""
        return self.training + self.drawing


def estimate_seconds(config: Config, sizes: Sequence[int], *, rounds: range) -> Estimate:
    """Estimate how long a run is going to take.

    Args:
        config: of the run.
        sizes: training images of each hospital, or of the pooled data.
        rounds: 1-based, those that are still to come.
    """
    device = select_device(config.train.device)
    # Modules draw their first weights, of no use here, from the global generator.
    with torch.random.fork_rng(devices=[]):
        model = initial_generator(config)
    move(model, device, channels_last=config.train.channels_last)
    precision = config.train.precision
    precisions = ("float32", "bfloat16") if precision == "auto" else (precision,)
    per_trained = min(seconds_to_train(config, model, device, each) for each in precisions)
    drawing = 0.0
    if can_draw(model, config):
        per_drawn = min(seconds_to_draw(model, device, each) for each in precisions)
        drawing = images_to_draw(config, rounds) * per_drawn
    share = (config.federation.clients_per_round or len(sizes)) / len(sizes)
    # Hospitals train side by side, and a round is over when the largest has finished.
    passes = max(sum(sizes) * min(1.0, share) / at_once(config, device), max(sizes))
    training = len(rounds) * config.train.local_epochs * passes * per_trained
    return Estimate(training, drawing)


def at_once(config: Config, device: torch.device) -> int:
    """Return how many hospitals train at the same time, each as fast as alone."""
    if config.train.mode == "centralized":
        return 1
    if device.type == "cuda":
        return max(1, torch.cuda.device_count())
    return max(1, (os.cpu_count() or 1) // config.federation.cpus_per_client)


def images_to_draw(config: Config, rounds: range) -> int:
    """Count the images that a run draws in some of its rounds."""
    last, evaluation = config.federation.rounds, config.eval
    grids = sum(number % evaluation.every == 0 or number == last for number in rounds)
    every = evaluation.metrics_every
    measured = sum(every is not None and number % every == 0 for number in rounds)
    classes = len(config.data.classes)
    per_grid = classes * evaluation.images_per_class
    final = evaluation.num_images
    if evaluation.final_metrics and evaluation.num_per_class is not None:
        final = classes * evaluation.num_per_class
    return grids * per_grid + measured * evaluation.num_images + final


def seconds_to_train(
    config: Config, model: Generator, device: torch.device, precision: str
) -> float:
    """Time training steps; returns the seconds that an image takes."""
    train = config.train
    model.prepare(train.trained_batch_size)
    optimizers = model.optimizers(train.trained_lr)
    rng = torch.Generator(device).manual_seed(0)
    # No two alike, which would be images of one patient.
    shape = (max(train.trained_batch_size, TIMED_IMAGES), *model.image_shape)
    images = torch.randint(
        256, shape, generator=torch.Generator().manual_seed(0), dtype=torch.uint8
    )

    def step(num_images: int) -> None:
        fit(
            model,
            images[:num_images],
            torch.zeros(num_images, dtype=torch.int64),
            options=timed_options(config, epochs=1, batch_size=num_images, precision=precision),
            optimizers=optimizers,
            rng=rng,
        )

    with torch_configured(num_threads=train.num_threads, deterministic=train.deterministic):
        return seconds_per_image(step, train.trained_batch_size, device)


def seconds_to_draw(model: Generator, device: torch.device, precision: str) -> float:
    """Time evaluations of a network; returns the seconds that an image takes with all of them."""
    model.eval()

    @torch.inference_mode()
    def step(num_images: int) -> None:
        noise = torch.zeros(num_images, *model.noise_shape, device=device)
        labels = torch.zeros(num_images, dtype=torch.int64, device=device)
        with autocast(device, precision):
            model.sampling_step(labels, lambda: noise).sum().item()

    return model.evaluations_per_image * seconds_per_image(step, TIMED_IMAGES, device)


def seconds_per_image(step: Callable[[int], None], most: int, device: torch.device) -> float:
    """Time a step for about `TIMED_SECONDS`; what else runs on the machine only adds to the least.

    Args:
        step: runs on so many images.
        most: images of a step.
        device: that it runs on.
    """

    def seconds(num_images: int) -> float:
        start = time.perf_counter()
        step(num_images)
        return time.perf_counter() - start

    seconds(1)  # warms up
    alone = min(seconds(1) for _ in range(3))
    num_images = max(1, min(most, TIMED_IMAGES, int(TIMED_SECONDS / alone)))
    found = [alone]
    if num_images > 1:
        found = [seconds(num_images) for _ in range(MIN_STEPS.get(device.type, 1))]
    while sum(found) + min(found) < TIMED_SECONDS:
        found.append(seconds(num_images))
    return min(found) / num_images
