"""What the server draws and measures itself: the sample grid and the final images."""

from dataclasses import dataclass

import torch
from torch import Tensor

from task.classifier import accuracy, train_classifier
from task.config import Config
from task.data import Dataset
from task.randomness import Stream, torch_generator
from task.sampler import build_sampler, sample_batches, to_uint8
from task.unet import UNet


@dataclass(frozen=True)
class Agreement:
    """How far a classifier trained on real images finds in generated ones what was asked for.

    Attributes:
        generated: share of the generated images that it takes for the class asked for.
        real: share of the real test images that it gets right, the most one can hope for; None
            where the data set has no test images.
        num_images: how many generated images it saw.
    """

    generated: float
    real: float | None
    num_images: int


def sample_grid(config: Config, model: UNet, device: torch.device) -> Tensor:
    """Draw the images of a grid: the same noise in every round, so that rounds can be compared.

    Returns:
        [K * P, C, H, W] uint8 on the CPU, class after class.
    """
    labels = torch.arange(len(config.data.classes)).repeat_interleave(config.eval.images_per_class)
    return _draw(config, model, labels, device, Stream.SAMPLE_GRID)


def class_agreement(
    config: Config, model: UNet, dataset: Dataset, device: torch.device
) -> Agreement:
    """Draw `eval.num_images` images, as many of each class, and show them to a classifier."""
    labels = torch.arange(config.eval.num_images) % len(config.data.classes)
    images = _draw(config, model, labels, device, Stream.FINAL_IMAGES)
    classifier = train_classifier(
        dataset.train,
        num_classes=len(config.data.classes),
        horizontal_flip=config.data.horizontal_flip,
        seed=config.seed,
        device=device,
    )
    return Agreement(
        generated=accuracy(classifier, images, labels),
        real=accuracy(classifier, dataset.test.images, dataset.test.labels)
        if len(dataset.test) > 0
        else None,
        num_images=len(images),
    )


def _draw(
    config: Config, model: UNet, labels: Tensor, device: torch.device, stream: Stream
) -> Tensor:
    images = sample_batches(
        build_sampler(config),
        model.to(device),
        labels.to(device),
        batch_size=config.eval.batch_size,
        generator=torch_generator(config.seed, stream, device=device),
    )
    return to_uint8(images).cpu()
