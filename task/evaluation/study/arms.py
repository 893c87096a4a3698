"""The arms of a study: which images each classifier is trained on."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from enum import StrEnum

import numpy as np
import torch
from torch import Tensor

from task.config.study_config import StudyConfig
from task.data import ImageSet
from task.randomness import Stream, torch_generator


class ArmKind(StrEnum):
    """What an arm is trained on."""

    REAL = "real"
    AUGMENTED = "real, augmented"
    OVERSAMPLED = "real, oversampled"
    SYNTHETIC = "synthetic"
    BOTH = "real + synthetic"
    OWN = "own images of a hospital"
    OWN_BOTH = "own images of a hospital + synthetic"
    RUN = "classifier of a run"


@dataclass(frozen=True)
class Arm:
    """A way to make a training set.

    Attributes:
        kind: what is in it.
        fraction: of the real images that there are, in (0, 1].
        ratio: generated images for each real one; 0 where there are none.
        source: the run that drew them, or that trained the classifier; "" where there is none.
        hospital: whose real images are taken; None: those of all.
    """

    kind: ArmKind
    fraction: float
    ratio: float = 0.0
    source: str = ""
    hospital: int | None = None

    @property
    def title(self) -> str:
        """What it is called, without its fraction and the run that draws."""
        if self.kind is ArmKind.RUN:
            return f"{self.kind} {self.source}"
        return f"real + {self.ratio:g} x synthetic" if self.kind is ArmKind.BOTH else str(self.kind)

    @property
    def is_synthetic(self) -> bool:
        """Whether generated images are among those that it is trained on."""
        return self.ratio > 0

    @property
    def key(self) -> str:
        """A name for files."""
        whose = "" if self.hospital is None else f"-at-{self.hospital}"
        return f"{self.kind.name.lower()}-{self.ratio:g}-of-{self.fraction:g}{whose}"


def list_arms(
    study: StudyConfig, sources: Sequence[str], hospitals: Sequence[int] = ()
) -> Iterator[Arm]:
    """List all arms that are trained, those of real images alone first in each fraction.

    Args:
        study: its ratios and fractions.
        sources: names of the runs that draw.
        hospitals: those whose own images train classifiers as well.
    """
    for fraction in study.real_fractions:
        yield Arm(ArmKind.REAL, fraction)
        yield Arm(ArmKind.AUGMENTED, fraction)
        yield Arm(ArmKind.OVERSAMPLED, fraction)
        for source in sources:
            # As many as real ones, so that both are compared at equal numbers.
            yield Arm(ArmKind.SYNTHETIC, fraction, 1.0, source)
            for ratio in study.ratios:
                yield Arm(ArmKind.BOTH, fraction, ratio, source)
    for hospital in hospitals:
        yield Arm(ArmKind.OWN, 1.0, hospital=hospital)
        for source in sources:
            # As many as all real images, as there is no need for fewer.
            yield Arm(ArmKind.OWN_BOTH, 1.0, 1.0, source, hospital)


def real_places(real: ImageSet, fraction: float, seed: int) -> Tensor:
    """Choose a fraction of the real images, whole patients, [M] int64; of each class at least one.

    Patients are taken in a random order, each while the class of its image has too few.

    Args:
        real: the real images.
        fraction: in (0, 1].
        seed: of the order.
    """
    if fraction == 1:
        return torch.arange(len(real))
    labels = real.labels.numpy()
    groups = np.arange(len(real)) if real.groups is None else real.groups.numpy()
    order = torch.randperm(len(real), generator=torch_generator(seed, Stream.STUDY, 0)).numpy()
    wanted = np.maximum(np.round(fraction * np.bincount(labels)), 1)
    taken: set[int] = set()
    counts = np.zeros(len(wanted))
    for place in order:
        if groups[place] not in taken and counts[labels[place]] < wanted[labels[place]]:
            taken.add(int(groups[place]))
            counts += np.bincount(labels[groups == groups[place]], minlength=len(wanted))
    return torch.from_numpy(np.flatnonzero(np.isin(groups, sorted(taken))))


def synthetic_counts(real_counts: Sequence[int], ratio: float, fill: str) -> list[int]:
    """Say how many generated images of each class an arm takes.

    Args:
        real_counts: real images of each class.
        ratio: generated images for each real one, over all classes.
        fill: "all" in the proportions of the real ones, or "rare": to the rarest classes first,
            until all are equally frequent, then to all alike.

    Returns:
        Their numbers, whose sum is the ratio times the real images, rounded.
    """
    counts = np.array(real_counts, dtype=float)
    number = round(ratio * counts.sum())
    if fill == "all":
        exact = counts / counts.sum() * number
    else:
        # The level up to which `number` images fill the classes, as water fills a vessel.
        levels = np.sort(counts)
        below = np.arange(1, len(counts) + 1)
        reached = (number + np.cumsum(levels)) / below
        level = reached[np.flatnonzero(reached >= levels)[-1]]
        exact = np.maximum(level - counts, 0)
    whole = np.floor(exact).astype(int)
    # Largest remainders first.
    for place in np.argsort(whole - exact, kind="stable")[: number - whole.sum()]:
        whole[place] += 1
    return [int(each) for each in whole]


def places_of_classes(labels: Tensor, counts: Sequence[int], rng: torch.Generator) -> Tensor:
    """Draw so many images of each class, or all where there are fewer, [M] int64, sorted.

    Of the same generator a larger number takes the images of a smaller one and more.
    """
    chosen = [torch.zeros(0, dtype=torch.int64)]
    for label, count in enumerate(counts):
        places = (labels == label).nonzero().flatten()
        chosen.append(places[torch.randperm(len(places), generator=rng)[:count]])
    return torch.cat(chosen).sort().values
