"""Hold images out: a share of every class, and never a part of a patient."""

import numpy as np

from task.checks import require


def split_validation(
    labels: np.ndarray,
    fraction: float,
    *,
    generator: np.random.Generator,
    groups: np.ndarray | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """Hold a share of every class out.

    Of a class with n images, round(n * fraction) are held out, but never none and never all; a
    class with a single image keeps it for training. With `groups`, whole groups are held out
    instead, in the same way: a group counts as one of the rarest class that it has images of, so
    that all images of a class may come to lie on one side where few groups have them.

    Args:
        labels: [N] int64.
        fraction: in (0, 1).
        generator: chooses the images.
        groups: [N] int64, equal for the images of one patient.

    Returns:
        The indices of the training and of the held-out images, each sorted, [M] int64.

    Raises:
        ValueError: `fraction` is not in (0, 1).
    """
    require(0 < fraction < 1, "fraction", "between 0 and 1, exclusive", fraction)
    if groups is not None:
        return _split_groups(labels, fraction, groups, generator)
    held_out = np.zeros(len(labels), dtype=bool)
    for label in np.unique(labels):
        members = generator.permutation(np.flatnonzero(labels == label))
        share = min(max(round(len(members) * fraction), 1), len(members) - 1)
        held_out[members[:share]] = True
    return np.flatnonzero(~held_out), np.flatnonzero(held_out)


def _split_groups(
    labels: np.ndarray, fraction: float, groups: np.ndarray, generator: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    members, group_labels = rarest_labels(labels, groups)
    _, held_out = split_validation(group_labels, fraction, generator=generator)
    chosen = np.isin(members, held_out)
    return np.flatnonzero(~chosen), np.flatnonzero(chosen)


def rarest_labels(labels: np.ndarray, groups: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Say of each group which class it counts as: the rarest that it has images of.

    Args:
        labels: [N] int64.
        groups: [N] int64, equal for the images of one patient.

    Returns:
        The place of each image's group among the sorted groups, [N] int64, and the class of each
        of these, [G] int64.
    """
    sizes = np.bincount(labels, minlength=1)
    # The last of each group to be written stays: its image of the rarest class.
    order = np.argsort(-sizes[labels], kind="stable")
    _, members = np.unique(groups, return_inverse=True)
    group_labels = np.zeros(members.max(initial=-1) + 1, dtype=np.int64)
    group_labels[members[order]] = labels[order]
    return members, group_labels
