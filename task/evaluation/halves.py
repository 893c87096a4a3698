"""Real images in two halves, one to stand in for generated ones where there are no test images."""

import numpy as np
import torch
from torch import Tensor

from task.checks import require


def halve(order: Tensor, groups: Tensor | None) -> tuple[Tensor, Tensor]:
    """Part images in two halves, and never a patient.

    The first half is as many patients, in the order of their first images, as come nearest to half
    of the images; where images stand alone, it is the smaller one. None of the two is empty.

    Args:
        order: [M] int64, the images, at random.
        groups: [N] int64, equal for the images of one patient, of all that `order` chooses from;
            None: each image stands alone.

    Returns:
        Both halves, each in the order given, [K] int64.

    Raises:
        ValueError: see `can_be_halved`.
    """
    alone = groups is None
    require(
        can_be_halved(order, groups),
        "the training images, without test images,",
        "at least 2" if alone else "of at least 2 patients, a half of whom stands in for these",
        len(order) if alone else "1",
    )
    if groups is None:
        return order[: len(order) // 2], order[len(order) // 2 :]
    owners = groups[order].numpy()
    patients, firsts, sizes = np.unique(owners, return_index=True, return_counts=True)
    by_first = np.argsort(firsts)
    reached = np.cumsum(sizes[by_first])[:-1]
    number = 1 + int(np.abs(2 * reached - len(order)).argmin())
    chosen = torch.from_numpy(np.isin(owners, patients[by_first[:number]]))
    return order[chosen], order[~chosen]


def can_be_halved(order: Tensor, groups: Tensor | None) -> bool:
    """Whether there are two images or more and, where patients are known, of two of these."""
    return len(order if groups is None else np.unique(groups[order].numpy())) >= 2
