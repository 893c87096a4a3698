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

# Images that are looked at side by side.
SCORED_AT_A_TIME = 128

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

    @property
    def whose(self) -> str:
        """What was attacked, in words."""
        if self.client is None:
            return "All images"
        model = "its own model" if self.is_local else "the global model"
        return f"Images of client {self.client}, on {model}"


def attack_members(
    generator: Generator,
    dataset: Dataset,
    *,
    num_images: int,
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
        num_images: that are attacked of each at most, whole patients drawn at random.
        device: that computes.
        seed: of who is attacked, and of all draws.
        shares: of the clients, each of which is attacked on its own as well.
        local_of: the client whose own model and images these are; None: it is the global model.

    Returns:
        Those that say something: none where the family knows no attack, or too few patients are
        there.
    """
    chosen = [drawn_patients(each, num_images, seed) for each in (dataset.train, dataset.test)]
    if min(map(len, chosen)) == 0:
        return []
    sets = [each.subset(at) for each, at in zip((dataset.train, dataset.test), chosen, strict=True)]
    scores = scores_of_members(generator, sets, device=device, seed=seed)
    whose = [whose_images(each) for each in sets]
    parts: list[tuple[int | None, list[NDArray[np.bool_]]]] = [
        (local_of, [np.ones(len(each), bool) for each in sets])
    ]
    for client, own in (shares or {}).items():
        parts.append((client, [np.isin(at, of) for at, of in zip(chosen, own, strict=True)]))
    found = []
    for name, of_sets in scores.items():
        for whom, masks in parts:
            members, others = (
                Sample(each[mask], patients[mask])
                for each, patients, mask in zip(of_sets, whose, masks, strict=True)
            )
            result = separation(members, others, seed=seed)
            if result is not None:
                found.append(Attack(name, whom, local_of is not None, result))
    return found


def drawn_patients(images: ImageSet, most: int, seed: int) -> NDArray[np.int64]:
    """Draw whole patients at random until there are so many images; returns the images' places."""
    whose = whose_images(images)
    if len(whose) <= most:
        return np.arange(len(whose))
    _, whose = np.unique(whose, return_inverse=True)
    rng = torch_generator(seed, Stream.AUDIT, 0)
    place = torch.randperm(int(whose.max()) + 1, generator=rng).numpy()
    order = np.argsort(place[whose], kind="stable")
    # The last patient is left out where not all of its images fit.
    whole = order[:most][whose[order[:most]] != whose[order[most]]]
    return np.sort(whole if len(whole) else order[:most])


def scores_of_members(
    generator: Generator, sets: Sequence[ImageSet], *, device: torch.device, seed: int
) -> dict[str, list[NDArray[np.float64]]]:
    """Return, by attack, the scores of the images of each set."""
    generator.eval()
    images = torch.cat([each.images for each in sets])
    labels = torch.cat([each.labels for each in sets])
    order = torch.randperm(len(images), generator=torch_generator(seed, Stream.AUDIT, 1))
    found: dict[str, list[torch.Tensor]] = {}
    for indices in torch.split(order, SCORED_AT_A_TIME):
        batch = Batch(normalize(images[indices].to(device)), labels[indices].to(device), indices)
        rng = torch_generator(seed, Stream.AUDIT, 2, device=device)
        with torch.inference_mode():
            for name, scores in generator.member_scores(batch, rng).items():
                found.setdefault(name, []).append(scores.double().cpu())
    back = order.argsort()
    ends = np.cumsum([len(each) for each in sets])[:-1]
    return {name: np.split(torch.cat(scores)[back].numpy(), ends) for name, scores in found.items()}
