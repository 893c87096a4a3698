"""One classifier of a study: its images, its steps, and the weights that validation chooses."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from task.config.study_config import StudyConfig
from task.data import ImageSet, normalize
from task.efficientnet import ENLARGED_AT_ONCE
from task.evaluation.study.classifiers import ClassifierKind
from task.randomness import Stream, seeded_global_generator, torch_generator

# Changed copies of each image that an augmented arm is trained on.
NUM_VIEWS = 4
# Of classic augmentation: turns in degrees, shifts in shares of the side, contrast and brightness.
TURN_DEGREES, SHIFT, CONTRAST = 10.0, 0.1, 0.15
# Times that a fit looks at the validation images.
NUM_LOOKS = 20
DECAY = 1e-2
LEAST_STEPS, MOST_STEPS, REAL_EPOCHS = 200, 2000, 20
IMAGES_AT_ONCE = 256


@dataclass(frozen=True, eq=False)
class Inputs:
    """Images as the trained part of a classifier takes them, with their classes.

    Attributes:
        values: [V, N, ...] float32, of V views.
        labels: [N] int64.
    """

    values: Tensor
    labels: Tensor

    def subset(self, places: Tensor) -> "Inputs":
        """Take some images, [M] int64, in that order."""
        return Inputs(self.values[:, places], self.labels[places])

    def joined(self, other: "Inputs") -> "Inputs":
        """Put other images behind these; of both the fewer views."""
        views = min(len(self.values), len(other.values))
        values = torch.cat([self.values[:views], other.values[:views]], 1)
        return Inputs(values, torch.cat([self.labels, other.labels]))


@torch.no_grad()
def inputs_of(
    kind: ClassifierKind,
    images: ImageSet,
    device: torch.device,
    *,
    changes: Callable[[Tensor], Tensor] | None = None,
    advance: Callable[[int], None] = lambda number: None,
) -> Inputs:
    """Apply what is frozen of a classifier to images, once.

    Args:
        kind: the classifier.
        images: to be looked at.
        device: that computes.
        changes: makes views of images, float32 in [-1, 1]; see `augmented`. None: one, as it is.
        advance: is told of each image that is done.
    """
    views = []
    for view in range(1 if changes is None else NUM_VIEWS):
        found = []
        for chunk in torch.split(images.images, ENLARGED_AT_ONCE):
            pixels = normalize(chunk)
            if changes is not None and view > 0:  # the first is the image itself
                pixels = changes(pixels)
            found.append(kind.frozen(pixels.to(device)).float().cpu())
            advance(len(chunk))
        views.append(torch.cat(found))
    return Inputs(torch.stack(views), images.labels)


def augmented(rng: torch.Generator, *, mirrors: bool) -> Callable[[Tensor], Tensor]:
    """Make what turns, shifts, brightens and, where it may, mirrors each image at random.

    Args:
        rng: of the changes, on the CPU.
        mirrors: whether an image may be mirrored from left to right.
    """

    def spread(number: int, most: float) -> Tensor:
        return (2 * torch.rand(number, generator=rng) - 1) * most

    def changed(images: Tensor) -> Tensor:
        number = len(images)
        turn = spread(number, TURN_DEGREES).deg2rad()
        cosine, sine = turn.cos(), turn.sin()
        if mirrors:
            sign = torch.where(torch.rand(number, generator=rng) < 0.5, -1.0, 1.0)
        else:
            sign = torch.ones(number)
        # A shift by a share of the side, in coordinates from -1 to 1.
        shifts = [spread(number, 2 * SHIFT) for _ in range(2)]
        rows = [sign * cosine, -sine, shifts[0], sign * sine, cosine, shifts[1]]
        maps = torch.stack(rows, 1).view(number, 2, 3)
        grid = F.affine_grid(maps, list(images.shape), align_corners=False)
        moved = F.grid_sample(images, grid, padding_mode="reflection", align_corners=False)
        gain, offset = (spread(number, CONTRAST).view(-1, 1, 1, 1) for _ in range(2))
        return (moved * (1 + gain) + offset).clamp(-1, 1)

    return changed


@dataclass(frozen=True, eq=False)
class Fit:
    """What a trained classifier says.

    Attributes:
        validation: probabilities of the validation images, [N, C] float32.
        test: those of the test images, [M, C] float32.
        step: the optimizer step whose weights said it; of a classifier that a run has trained, the
            round.
    """

    validation: Tensor
    test: Tensor
    step: int


def num_steps(study: StudyConfig, num_real: int) -> int:
    """Return the optimizer steps of every fit of a study with so many real images."""
    epochs = REAL_EPOCHS * -(-num_real // study.batch_size)
    return study.num_steps or max(LEAST_STEPS, min(epochs, MOST_STEPS))


def fit_classifier(
    kind: ClassifierKind,
    train: Inputs,
    validation: Inputs,
    test: Inputs,
    *,
    study: StudyConfig,
    steps: int,
    seed: int,
    balance: str,
    num_classes: int,
    device: torch.device,
) -> Fit:
    """Train a classifier, and keep the weights that are best on validation images.

    Args:
        kind: the classifier.
        train: what it is trained on; a view of each image is drawn in each step.
        validation: the cross-entropy of these, each class counting alike, chooses the weights;
            without any the last ones are kept.
        test: what it is applied to.
        study: its batch size and seed.
        steps: of the optimizer.
        seed: which classifier of the arm this is.
        balance: "weights", "oversample" or "none".
        num_classes: number of classes.
        device: that trains.
    """
    # The same for all arms, whose differences are then those of their images.
    rng = torch_generator(study.seed, Stream.STUDY, 1, seed)
    with seeded_global_generator(torch_generator(study.seed, Stream.STUDY, 2, seed)):
        network = kind.make().to(device)
        optimizer = torch.optim.AdamW(
            kind.parameter_groups(network), weight_decay=DECAY, fused=True
        )
        rates = [group["lr"] for group in optimizer.param_groups]
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rates, total_steps=steps + 1)
        counts = train.labels.bincount(minlength=num_classes).clamp(min=1)
        rare = 1 / counts.double()
        weights = rare / rare[train.labels].mean() if balance == "weights" else None
        chances = rare[train.labels] if balance == "oversample" else None
        of_class = None if weights is None else weights.float().to(device)
        best, chosen, at = float("inf"), None, 0
        batches = _batches(len(train.labels), study.batch_size, chances, rng)
        for step in range(1, steps + 1):
            places = next(batches)
            views = torch.randint(len(train.values), places.shape, generator=rng)
            logits = network.train()(train.values[views, places].to(device))
            labels = train.labels[places].to(device)
            # Divided by the batch and not by its weights: a batch of rare classes weighs more.
            loss = F.cross_entropy(logits, labels, weight=of_class, reduction="sum") / len(places)
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            schedule.step()
            if step % max(1, steps // NUM_LOOKS) == 0 or step == steps:
                value = -float(step)
                if len(validation.labels):
                    found = _probabilities(network, validation, device)
                    value = balanced_cross_entropy(found, validation.labels)
                if value < best:
                    best, chosen, at = (
                        value,
                        {k: v.clone() for k, v in network.state_dict().items()},
                        step,
                    )
        if chosen is None:
            raise RuntimeError("no weights have a finite loss on the validation images")
        network.load_state_dict(chosen)
    said = [_probabilities(network, each, device) for each in (validation, test)]
    return Fit(said[0], said[1], at)


def _batches(number: int, size: int, chances: Tensor | None, rng: torch.Generator):  # type: ignore[no-untyped-def]
    """Yield places of batches without end: of epochs in a new order, or drawn by chances."""
    if chances is not None:
        while True:
            yield torch.multinomial(chances, size, replacement=True, generator=rng)
    rest = torch.zeros(0, dtype=torch.int64)
    while True:
        while len(rest) < size:
            rest = torch.cat([rest, torch.randperm(number, generator=rng)])
        yield rest[:size]
        rest = rest[size:]


@torch.no_grad()
def _probabilities(network: nn.Module, inputs: Inputs, device: torch.device) -> Tensor:
    network.eval()
    chunks = torch.split(inputs.values[0], IMAGES_AT_ONCE)
    return torch.cat([network(chunk.to(device)).float().softmax(1).cpu() for chunk in chunks])


def balanced_cross_entropy(probabilities: Tensor, labels: Tensor) -> float:
    """Return the mean over the classes that there are of the mean negative log-likelihood."""
    losses = F.nll_loss(probabilities.double().clamp(min=1e-12).log(), labels, reduction="none")
    present = sorted({*labels.tolist()})
    return float(torch.stack([losses[labels == label].mean() for label in present]).mean())
