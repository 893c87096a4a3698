"""The project's own training and sampling, as a run would have them, to be timed."""

from collections.abc import Sequence

import torch
from torch import Tensor

from task.config import Config, load_config, settle_precisions
from task.data import build_dataset
from task.generation.draw_images import balanced_labels, draw_images
from task.generators.base import Generator
from task.generators.registry import build_generator
from task.randomness import Stream, seeded_global_generator, torch_generator
from task.training.devices import (
    autocast,
    compile_where_wanted,
    configure_torch,
    keep_freed_memory,
    move,
    select_device,
)
from task.training.loop import fit, fit_options, held_out_losses
from task.training.precision import fastest_precision
from tests.benchmarks.contestants import timed
from tests.benchmarks.flops import count_flop, matmul_rate

PAPER = ("experiment=paper",)
# Of a step whose operations are counted: what a discriminator compares with each other at least.
FLOP_IMAGES = 4
# That are trained on at a time at most, in a family that has a number for each.
MOST_IMAGES = 10_000


def random_images(config: Config, count: int) -> tuple[Tensor, Tensor]:
    """Draw pixels, [count, C, H, W] uint8, and labels, [count] int64."""
    data = config.data
    generator = torch.Generator().manual_seed(0)
    shape = (count, data.channels, data.image_size, data.image_size)
    pixels = torch.randint(256, shape, dtype=torch.uint8, generator=generator)
    return pixels, balanced_labels(count, len(data.classes))


def new_model(config: Config, seed: int = 0) -> Generator:
    """Make the generator of a configuration, with the weights of a seed."""
    with seeded_global_generator(torch_generator(seed, Stream.MODEL_INIT)):
        return build_generator(config)


class Feddm:
    """A process of the project that trains or draws.

    Attributes:
        precision: what `train.precision` settles to on this machine.
    """

    def __init__(self, overrides: Sequence[str], device: str, num_threads: int) -> None:
        """Set the process up as a run does, but with all the threads that the others have."""
        keep_freed_memory()
        configure_torch(num_threads=num_threads, deterministic=False)
        self.config = load_config(overrides)
        self.device = select_device(device)
        self.model = new_model(self.config)
        self.model.load_frozen()
        compile_where_wanted(
            self.model, self.config.train.compile, self.device, deterministic=False
        )
        self.precision = self._settled_precision()
        self.config = settle_precisions(self.config, eval=self.precision)
        self.model.prepare(MOST_IMAGES)
        move(self.model, self.device, channels_last=self.config.train.channels_last)
        self.optimizers = self.model.optimizers(self.config.train.lr)
        self.generator = torch.Generator(self.device).manual_seed(0)

    def _settled_precision(self) -> str:
        train = self.config.train
        if train.precision != "auto":
            return train.precision
        return fastest_precision(self.config, self.model, self.device)

    def settled_precision(self) -> str:
        """Return `precision`."""
        return self.precision

    def flop_per_image(self) -> int:
        """Count what a training step computes for an image.

        The second step counts: the first may have what comes every so many steps, and warms up
        where it is timed.
        """
        images, labels = random_images(self.config, FLOP_IMAGES)
        model, generator = new_model(self.config), torch.Generator().manual_seed(0)
        model.load_frozen()
        model.prepare(FLOP_IMAGES)
        options = fit_options(
            self.config, epochs=1, batch_size=FLOP_IMAGES, precision="float32", accumulation=1
        )
        optimizers = model.optimizers(lr=1e-4)

        def work() -> None:
            fit(model, images, labels, options=options, optimizers=optimizers, rng=generator)

        work()
        return count_flop(work) // FLOP_IMAGES

    def matmul_rate(self) -> float:
        """Measure the FLOP/s of bfloat16 matrix products here and now."""
        return matmul_rate(self.device)

    def train(self, batch_size: int, steps: int, precision: str | None = None) -> float:
        """Train for some steps and return the images per second."""
        images, labels = random_images(self.config, batch_size * steps)
        seconds = timed(self.device, lambda: self._epoch(images, labels, batch_size, precision))
        return len(images) / seconds

    def _epoch(
        self, images: Tensor, labels: Tensor, batch_size: int, precision: str | None
    ) -> None:
        precision = precision or self.precision
        fit(
            self.model,
            images,
            labels,
            options=fit_options(self.config, epochs=1, batch_size=batch_size, precision=precision),
            optimizers=self.optimizers,
            rng=self.generator,
        )

    def draw(self, count: int, batch_size: int) -> float:
        """Draw images as a run does and return the images per second."""
        config = self.config.changed({"eval.batch_size": batch_size})
        labels = balanced_labels(count, len(config.data.classes))

        def work() -> None:
            draw_images(config, self.model, labels, device=self.device, stream=Stream.FINAL_IMAGES)

        return count / timed(self.device, work)

    @torch.inference_mode()
    def forward(self, batch_size: int, calls: int) -> float:
        """Call the network alone and return the images per second."""
        images, labels = (t.to(self.device) for t in random_images(self.config, batch_size))
        x_t = images.float().div(127.5).sub(1)
        self.model.eval()

        def work() -> None:
            with autocast(self.device, self.config.eval.precision):
                for _ in range(calls):
                    self.model.sampling_step(labels, lambda: x_t)

        return calls * batch_size / timed(self.device, work)

    def loss_curve(self, seed: int, precision: str, checkpoints: int, epochs: int) -> list[float]:
        """Train anew on the data set, and return the held-out loss at every checkpoint.

        Args:
            seed: of weights and all draws of training.
            precision: of training; the loss is always measured in float32, on the same draws.
            checkpoints: losses, from the first `epochs` epochs on.
            epochs: between two of them.
        """
        dataset = build_dataset(self.config, download=False)
        self.model = new_model(self.config, seed)
        compile_where_wanted(
            self.model, self.config.train.compile, self.device, deterministic=False
        )
        move(self.model, self.device, channels_last=self.config.train.channels_last)
        self.optimizers = self.model.optimizers(self.config.train.lr)
        self.generator = torch_generator(seed, Stream.TRAIN, device=self.device)
        losses = []
        for _ in range(checkpoints):
            for _ in range(epochs):
                images, labels = dataset.train.images, dataset.train.labels
                self._epoch(images, labels, self.config.train.batch_size, precision)
            found = held_out_losses(
                self.model,
                dataset.test.images,
                dataset.test.labels,
                options=fit_options(self.config, precision="float32"),
                rng=torch.Generator(self.device).manual_seed(0),
            )
            if found is None:
                raise ValueError(f"model must have a loss of an image, got a {self.model.title}")
            losses.append(found["loss"])
        return losses
