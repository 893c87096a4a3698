"""Attacks on a model: who was among the images that it was trained on?"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from task.audit.roc import Sample, Separation, separation
from task.data import Dataset, ImageSet, normalize
from task.evaluation.comparison import whose_images
from task.generators.base import Batch, Generator
from task.randomness import Stream, torch_generator

# Images that are looked at side by side, where a batch of training has as many.
MOST_SIDE_BY_SIDE = 128
# So many times as many members as others, or the other way round: more make an AUC hardly surer.
UNEVEN = 2

# The images of a client, as indices of the training and of the test images.
Shares = Mapping[int, tuple[NDArray[np.int64], NDArray[np.int64]]]


@dataclass(frozen=True)
class Attack:
    """What came of one attack.

    Attributes:
        name: of the attack.
        client: whose images were attacked; None: all.
        is_local: whether the client's own model was attacked, and not the global one.
        found: how well it tells members.
    """

    name: str
    client: int | None
    is_local: bool
    found: Separation


def attack_members(
    generator: Generator,
    dataset: Dataset,
    *,
    num_images: int,
    batch_size: int,
    device: torch.device,
    seed: int,
    shares: Shares | None = None,
    local_of: int | None = None,
) -> list[Attack]:
    """Attack a model in every way that its family knows, as a whole and client by client.

    Members and others are looked at together, in random order.

    Args:
        generator: on the device, and left in eval mode.
        dataset: the training images are the members, the test images the others.
        num_images: that are attacked of each at most, and of each client; see `drawn_images`. Of
            the more plentiful of both at most `UNEVEN` times as many as there are of the other.
        batch_size: images that are looked at side by side.
        device: that computes.
        seed: of who is attacked, and of all draws.
        shares: of the clients, each of which is attacked on its own as well.
        local_of: the client whose own model and images these are; None: it is the global model.

    Returns:
        Those that say something: none where the family knows no attack, too few patients are
        there, or scores are not finite, as of a model that has diverged.
    """
    sets = dataset.train, dataset.test
    every = tuple(np.arange(len(each)) for each in sets)
    # By client the images of its part, of each set; None: all.
    owned: dict[int | None, Sequence[NDArray[np.int64]]] = {local_of: every}
    owned.update((shares or {}).items())
    parts = {
        client: [
            drawn_images(images, among, min(num_images, UNEVEN * min(map(len, own))), seed)
            for images, among in zip(sets, own, strict=True)
        ]
        for client, own in owned.items()
    }
    chosen = [np.unique(np.concatenate(each)) for each in zip(*parts.values(), strict=True)]
    if min(map(len, chosen)) == 0:
        return []
    attacked = [each.subset(torch.from_numpy(at)) for each, at in zip(sets, chosen, strict=True)]
    scores = member_scores_of(generator, attacked, batch_size=batch_size, device=device, seed=seed)
    whose = [whose_images(each) for each in attacked]
    found = []
    for name, of_sets in scores.items():
        for whom, part in parts.items():
            places = [np.searchsorted(at, own) for at, own in zip(chosen, part, strict=True)]
            members, others = (
                Sample(each[at], patients[at])
                for each, patients, at in zip(of_sets, whose, places, strict=True)
            )
            result = separation(members, others, seed=seed)
            if result is not None:
                found.append(Attack(name, whom, local_of is not None, result))
    return found


def drawn_images(
    images: ImageSet, among: NDArray[np.int64], most: int, seed: int
) -> NDArray[np.int64]:
    """Draw images at random, of as many patients as can be, and evenly many of each.

    Args:
        images: all.
        among: indices of those to draw of.
        most: images to draw at most.
        seed: of the draws.

    Returns:
        Sorted indices.
    """
    rng = torch_generator(seed, Stream.AUDIT, 0)
    order = among[torch.randperm(len(among), generator=rng).numpy()]
    _, whose = np.unique(whose_images(images)[order], return_inverse=True)
    # The number of an image among those of its patient: first one of each, then a second.
    by_patient = np.argsort(whose, kind="stable")
    counts = np.bincount(whose)
    turn = np.empty(len(order), np.int64)
    turn[by_patient] = np.arange(len(order)) - np.repeat(np.cumsum(counts) - counts, counts)
    return np.sort(order[np.argsort(turn, kind="stable")[:most]])


def attack_names(generator: Generator, device: torch.device) -> list[str]:
    """List the attacks that a family knows.

    Args:
        generator: on the device; left in eval mode.
        device: that computes.
    """
    one = torch.zeros(1, *generator.image_shape, dtype=torch.uint8)
    image = ImageSet(one, torch.zeros(1, dtype=torch.int64))
    return [*member_scores_of(generator, [image], batch_size=1, device=device, seed=0)]


def member_scores_of(
    generator: Generator,
    sets: Sequence[ImageSet],
    *,
    batch_size: int,
    device: torch.device,
    seed: int,
) -> dict[str, list[NDArray[np.float64]]]:
    """Return, by attack whose scores are all finite, the scores of the images of each set."""
    generator.eval()
    images = torch.cat([each.images for each in sets])
    labels = torch.cat([each.labels for each in sets])
    order = torch.randperm(len(images), generator=torch_generator(seed, Stream.AUDIT, 1))
    found: dict[str, list[torch.Tensor]] = {}
    for indices in torch.split(order, min(batch_size, MOST_SIDE_BY_SIDE)):
        batch = Batch(normalize(images[indices].to(device)), labels[indices].to(device), indices)
        rng = torch_generator(seed, Stream.AUDIT, 2, device=device)
        with torch.inference_mode():
            for name, scores in generator.member_scores(batch, rng).items():
                found.setdefault(name, []).append(scores.double().cpu())
    back = order.argsort()
    ends = np.cumsum([len(each) for each in sets])[:-1]
    joined = {name: torch.cat(scores)[back] for name, scores in found.items()}
    return {
        name: np.split(scores.numpy(), ends)
        for name, scores in joined.items()
        if bool(scores.isfinite().all())
    }
