"""A small convolutional classifier, trained on real images to judge generated ones."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from task.checks import require
from task.classifier_networks import convolutional_network
from task.data import ImageSet, normalize, random_horizontal_flip
from task.progress import tracked
from task.randomness import Stream, torch_generator

BATCH_SIZE = 128
MAX_LR = 3e-3
WEIGHT_DECAY = 1e-2
# Small sets are seen MAX_EPOCHS times, large ones as often as MAX_STEPS allows, at least once.
MAX_EPOCHS = 20
MAX_STEPS = 2000


def train_classifier(
    train: ImageSet,
    *,
    num_classes: int,
    horizontal_flip: bool,
    seed: int,
    device: str | torch.device,
) -> nn.Sequential:
    """Train a classifier on real images.

    The same seed gives the same weights on a CPU at the same number of threads.

    Args:
        train: square images of at least 8x8.
        num_classes: number of classes; labels are below it.
        horizontal_flip: whether to mirror images at random.
        seed: of the run.
        device: that trains.

    Returns:
        The classifier in eval mode, on `device`: normalized images to logits [N, num_classes].

    Raises:
        ValueError: there are no images, a label is out of range or the images are too small.
    """
    require(len(train) > 0, "train", "at least one image", 0)
    top = int(train.labels.max())
    require(top < num_classes, "labels", f"below num_classes={num_classes}", top)
    _, channels, image_size, _ = train.images.shape
    generator = torch_generator(seed, Stream.CLASSIFIER)
    # Modules draw their first weights from the CPU's global generator and no other.
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(generator.initial_seed())
        model = convolutional_network(channels, image_size, num_classes).to(device)
    batches = -(-len(train) // BATCH_SIZE)
    epochs = max(1, min(MAX_EPOCHS, MAX_STEPS // batches))
    optimizer = torch.optim.AdamW(model.parameters(), lr=MAX_LR, weight_decay=WEIGHT_DECAY)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, MAX_LR, epochs=epochs, steps_per_epoch=batches
    )
    steps = (
        chosen
        for _ in range(epochs)
        for chosen in torch.split(torch.randperm(len(train), generator=generator), BATCH_SIZE)
    )
    for chosen in tracked(steps, epochs * batches, "training a classifier"):
        images = train.images[chosen]
        if horizontal_flip:
            images = random_horizontal_flip(images, generator)
        logits = model(normalize(images.to(device)))
        optimizer.zero_grad()
        loss = F.cross_entropy(logits, train.labels[chosen].to(device))
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        schedule.step()
    return model.eval()


@torch.no_grad()
def classify(model: nn.Module, images: Tensor, *, batch_size: int = 512) -> Tensor:
    """Name the most likely class of each image.

    Args:
        model: from `train_classifier`; is set to eval mode.
        images: [N, C, H, W] uint8.
        batch_size: images at a time, > 0.

    Returns:
        [N] int64, on the CPU.
    """
    device = next(model.parameters()).device
    model.eval()
    batches = torch.split(images, batch_size)
    return torch.cat([model(normalize(batch.to(device))).argmax(1).cpu() for batch in batches])


def balanced_accuracy(
    model: nn.Module, images: Tensor, labels: Tensor, *, like: Tensor, batch_size: int = 512
) -> float:
    """Return the accuracy on images whose classes come in the proportions of other labels.

    Classes of which there is no image are left out.

    Args:
        model: from `train_classifier`.
        images: [N, C, H, W] uint8.
        labels: [N] int64, on the CPU.
        like: [M] int64, whose proportions count.
        batch_size: images at a time, > 0.

    Raises:
        ValueError: no image is of a class of `like`.
    """
    right = (classify(model, images, batch_size=batch_size) == labels).double()
    number = int(torch.cat([labels, like]).max()) + 1
    counts, wanted = (each.bincount(minlength=number).double() for each in (labels, like))
    wanted[counts == 0] = 0
    require(
        bool(wanted.sum() > 0),
        "labels",
        "some of the classes asked for",
        sorted(set(labels.tolist())),
    )
    shares = labels.bincount(right, minlength=number) / counts.clamp(min=1)
    return float((shares * wanted).sum() / wanted.sum())


def accuracy(model: nn.Module, images: Tensor, labels: Tensor, *, batch_size: int = 512) -> float:
    """Return the share of images, in [0, 1], in which the classifier finds the class asked for.

    Args:
        model: from `train_classifier`.
        images: [N, C, H, W] uint8.
        labels: [N] int64, on the CPU.
        batch_size: images at a time, > 0.

    Raises:
        ValueError: there are no images, or not one label for each.
    """
    require(len(images) == len(labels) > 0, "labels", f"one per image ({len(images)})", len(labels))
    return (classify(model, images, batch_size=batch_size) == labels).double().mean().item()
