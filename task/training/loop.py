"""The local training loop and the held-out loss, on whatever device and in whatever precision."""

import time
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from task.data import normalize, random_horizontal_flip
from task.generators.diffusion.objective import Objective
from task.randomness import seeded_global_generator
from task.training.devices import autocast, move


@dataclass(frozen=True)
class TrainResult:
    """What a client reports of its local epochs.

    Attributes:
        loss: mean over the images of all epochs.
        seconds: wall-clock time.
        images_per_second: images that went through the network, over `seconds`.
    """

    loss: float
    seconds: float
    images_per_second: float


def new_optimizer(model: nn.Module, lr: float) -> torch.optim.Adam:
    """Make the Adam of the paper over a model."""
    return torch.optim.Adam(model.parameters(), lr=lr, fused=True)


def train_epochs(
    model: nn.Module,
    images: Tensor,
    labels: Tensor,
    *,
    objective: Objective,
    optimizer: torch.optim.Optimizer,
    epochs: int,
    batch_size: int,
    horizontal_flip: bool,
    precision: str,
    channels_last: bool,
    generator: torch.Generator,
    rank: int = 0,
) -> TrainResult:
    """Run epochs over images, such as the local epochs of one client.

    Args:
        model: trained in place, on the device of `generator`, and left in training mode.
        images: [N, C, H, W] uint8.
        labels: [N] int64.
        objective: the loss of a batch.
        optimizer: of the model's parameters, see `new_optimizer`; every round of a client has a
            new one.
        epochs: passes over the images, each in a new order; the last partial batch counts.
        batch_size: images per step.
        horizontal_flip: mirror each image with probability 1/2.
        precision: "float32", or "bfloat16" for autocast over float32 weights.
        channels_last: memory format of images and weights.
        generator: of every draw; its device is the one that is trained on.
        rank: of this process among those that train the model together, see
            `task.training.distributed`; each drops channels of its own.

    Raises:
        ValueError: there are no images, or no such precision.

    Source: Algorithm 1 of the paper, the lines of the client.
    """
    if len(images) == 0:
        raise ValueError("a client needs at least 1 image to train, got 0")
    device = generator.device
    memory_format = torch.channels_last if channels_last else torch.contiguous_format
    move(model, device, channels_last=channels_last)
    model.train()
    images, labels = images.to(device), labels.to(device)
    loss_sum = torch.zeros((), device=device, dtype=torch.float64)
    start = time.perf_counter()
    with seeded_global_generator(generator, rank):
        for _ in range(epochs):
            order = torch.randperm(len(images), generator=generator, device=device)
            for batch in torch.split(order, batch_size):
                x_start = normalize(images[batch]).to(memory_format=memory_format)
                if horizontal_flip:
                    x_start = random_horizontal_flip(x_start, generator)
                with autocast(device, precision):
                    loss = objective(model, x_start, labels[batch], generator)
                optimizer.zero_grad(set_to_none=True)
                loss.backward()  # type: ignore[no-untyped-call]
                optimizer.step()
                # Read once at the end: reading a loss in the step would wait for the GPU.
                loss_sum += loss.detach().double() * len(batch)
    seen = epochs * len(images)
    mean_loss = float(loss_sum / seen)
    seconds = time.perf_counter() - start
    return TrainResult(mean_loss, seconds, seen / seconds)


@torch.no_grad()  # not inference_mode: the model may be moved here and trained afterwards
def held_out_loss(
    model: nn.Module,
    images: Tensor,
    labels: Tensor,
    *,
    objective: Objective,
    batch_size: int,
    precision: str,
    channels_last: bool,
    generator: torch.Generator,
) -> float:
    """Return the mean loss over images without training; arguments as in `train_epochs`.

    The same generator state gives the same times and noise, so that rounds can be compared.

    Raises:
        ValueError: there are no images, or no such precision.
    """
    if len(images) == 0:
        raise ValueError("a held-out loss needs at least 1 image, got 0")
    device = generator.device
    memory_format = torch.channels_last if channels_last else torch.contiguous_format
    move(model, device, channels_last=channels_last)
    model.eval()
    loss_sum = torch.zeros((), device=device, dtype=torch.float64)
    for batch, batch_labels in zip(
        torch.split(images, batch_size), torch.split(labels, batch_size), strict=True
    ):
        x_start = normalize(batch.to(device)).to(memory_format=memory_format)
        with autocast(device, precision):
            loss = objective(model, x_start, batch_labels.to(device), generator)
        loss_sum += loss.double() * len(batch)
    return float(loss_sum / len(images))
