"""Generated images beside real ones, and what the metrics share of looking at them."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from task.checks import require
from task.config import Config
from task.data import Dataset, ImageSet, random_horizontal_flip
from task.evaluation.distances import Manifold, density_coverage
from task.evaluation.features import (
    FeatureExtractor,
    Features,
    cached_classifier,
    cached_features,
    extract,
)
from task.evaluation.halves import halve
from task.evaluation.near_copies import Copying, feature_copying, pixel_copying
from task.randomness import Stream, torch_generator
from task.runs.records import TEST, TRAIN

# Of as many generated images as the floor has real ones, where there are more.
DRAWS = 10
# Numbers below it are taken by other random choices.
FIRST_DRAW = 100
# The released evaluation mirrors their images at random, real and generated ones; no others.
MIRRORED = frozenset({"sars_cov_2_ct"})


@dataclass(frozen=True, eq=False)
class RealFeatures:
    """The features of a data set, which need not be extracted anew for each evaluation.

    Attributes:
        train: of the training images.
        test: of the test images; None where there are none.
        groups: [N] int64, equal for the training images of one patient; None: not known.
    """

    train: Features
    test: Features | None
    groups: Tensor | None = None

    @property
    def held_out(self) -> Features:
        """Of the test images, which are there."""
        if self.test is None:
            raise ValueError("there are no test images")
        return self.test


@dataclass(frozen=True, eq=False)
class Pair:
    """Features of images that are scored, and of the real ones that they are measured against.

    Attributes:
        images: that are scored.
        reference: the real ones.
        seed: of all that is random in measuring.
        smallest: how many images the smallest of the compared sets has.
    """

    images: Features
    reference: Features
    seed: int
    smallest: int

    def generator(self, purpose: int) -> torch.Generator:
        """Make the random generator of a metric."""
        return torch_generator(self.seed, Stream.METRICS, purpose)

    @cached_property
    def manifold(self) -> Manifold:
        """Density and coverage, of which one costs as much as both."""
        return density_coverage(self.reference.features, self.images.features)


# By reference.
Pairs = Mapping[str, Pair]


@dataclass(frozen=True, eq=False)
class FeaturePairs:
    """What is measured against what.

    Attributes:
        draws: of the generated images, as many as `floor` has real ones; one where that is all.
        floor: real images in place of the generated ones, the best that a generator can honestly
            reach at that number.
        whole: all generated images against all real ones; None where that is the one draw.
    """

    draws: Sequence[Pairs]
    floor: Pairs
    whole: Pairs | None = None

    @property
    def smallest(self) -> int:
        """How many images the smallest of the compared sets has."""
        return next(iter(self.floor.values())).smallest


@dataclass(frozen=True, eq=False)
class Comparison:
    """Generated images beside real ones.

    Attributes:
        config: of the run; its data set, `eval.seed`, `eval.batch_size` and `data.cache_dir` count.
        generated: images with the classes that were asked for.
        real: the real images; those that were not trained on as the test split, maybe empty.
        device: that computes.
        features: of the generated images; None: metrics of features say nothing.
        real_features: of the real images.
        pairs: of these features.
        most_searched: held-out images that are searched for copies, one of each patient, drawn at
            random; None: all patients.

    Raises:
        ValueError: the generated images have another shape than the real ones.
    """

    config: Config
    generated: ImageSet
    real: Dataset
    device: torch.device
    features: Features | None = None
    real_features: RealFeatures | None = None
    pairs: FeaturePairs | None = None
    most_searched: int | None = None

    def __post_init__(self) -> None:
        shape = self.real.train.images.shape[1:]
        require(
            self.generated.images.shape[1:] == shape,
            "generated.images",
            f"[N, {', '.join(map(str, shape))}] as the real ones",
            tuple(self.generated.images.shape),
        )

    @property
    def seed(self) -> int:
        """Of all that is random in measuring."""
        return self.config.eval.seed

    @cached_property
    def classifier(self) -> nn.Module:
        """Trained on all real training images."""
        return cached_classifier(self.config, self.real.train, self.device)

    @cached_property
    def searched(self) -> Tensor:
        """Which held-out images are searched for copies beside the generated ones: [M] int64."""
        order = random_order(len(self.real.test), self.seed, 8)
        return one_of_each_patient(self.real.test, order)[: self.most_searched]

    @cached_property
    def pixel_copying(self) -> Copying | None:
        """Of the nearest training images in pixels; None without held-out images."""
        if len(self.real.test) == 0:
            return None
        return pixel_copying(
            self.generated.images,
            self.real.train.images,
            self.real.test.images[self.searched],
            horizontal_flip=self.config.data.horizontal_flip,
            device=self.device,
        )

    @cached_property
    def feature_copying(self) -> Copying | None:
        """Of the nearest training images in features; None without features or held-out images."""
        real = self.real_features
        if self.features is None or real is None or real.test is None:
            return None
        return feature_copying(self.features, real.train, real.test.subset(self.searched))


def extract_real(
    config: Config, dataset: Dataset, extractor: FeatureExtractor, *, keep: bool = False
) -> RealFeatures:
    """Look at real images as `looked_at` says.

    Args:
        config: of the run.
        dataset: the real images.
        extractor: of `build_extractor`.
        keep: whether what was found is kept in `data.cache_dir`.
    """

    def look(images: Tensor, purpose: int) -> Features:
        images = looked_at(config, extractor, images, purpose)
        size = config.eval.batch_size
        if keep:
            folder = Path(config.data.cache_dir)
            return cached_features(extractor, images, batch_size=size, cache_dir=folder)
        return extract(extractor, images, batch_size=size)

    return RealFeatures(
        train=look(dataset.train.images, 0),
        test=look(dataset.test.images, 1) if len(dataset.test) > 0 else None,
        groups=dataset.train.groups,
    )


def mirrors(config: Config, extractor: FeatureExtractor) -> bool:
    """Whether images are mirrored at random, as the released code does with CT scans."""
    return extractor.image_range == "paper" and config.data.name in MIRRORED


def looked_at(config: Config, extractor: FeatureExtractor, images: Tensor, purpose: int) -> Tensor:
    """Return images as they are looked at, mirrored at random where `mirrors` says so."""
    if not mirrors(config, extractor):
        return images
    generator = torch_generator(config.eval.seed, Stream.METRICS, purpose)
    return random_horizontal_flip(images, generator)


def paired(features: Features, real: RealFeatures, seed: int) -> FeaturePairs:
    """Decide what is measured against what.

    In the floor test images meet the training images, and training images the test images, as
    many of each as the smallest of the three sets has. Without test images one half of the
    training images, drawn at random by whole patients, stands in for the generated ones, at most
    as many, and meets the other half. Generated images meet the same images as those of the floor,
    and are as many.

    Args:
        features: of the generated images.
        real: of the real ones.
        seed: of what is drawn.

    Raises:
        ValueError: there are no test images, and the training images are all of one patient.
    """
    train, test = real.train, real.test

    def against(images: Features, references: Mapping[str, Features]) -> Pairs:
        return {name: Pair(images, reals, seed, number) for name, reals in references.items()}

    if test is None:
        stand_ins, others = training_halves(len(train), real.groups, seed)
        number = min(len(features), len(stand_ins))
        references = {TRAIN: train.subset(others)}
        floor = against(train.subset(stand_ins[:number]), references)
    else:
        number = min(len(features), len(train), len(test))
        references = {TRAIN: train, TEST: test}
        floor = {
            TRAIN: Pair(_some(test, number, seed, 2), train, seed, number),
            TEST: Pair(_some(train, number, seed, 3), test, seed, number),
        }
    draws = [features]
    if number < len(features):
        draws = [_some(features, number, seed, FIRST_DRAW + draw) for draw in range(DRAWS)]
    whole = None
    if number < len(features) or test is None:
        whole = against(features, {TRAIN: train} if test is None else references)
    return FeaturePairs([against(draw, references) for draw in draws], floor, whole)


def training_halves(number: int, groups: Tensor | None, seed: int) -> tuple[Tensor, Tensor]:
    """Halve the training images for the floor without test images.

    Args:
        number: of them.
        groups: see `halve`.
        seed: `eval.seed`.

    Returns:
        The indices of those that stand in for generated images, and of those that these meet.
    """
    return halve(random_order(number, seed, 2), groups)


def _some(features: Features, number: int, seed: int, purpose: int) -> Features:
    return features.subset(random_order(len(features), seed, purpose)[:number])


def whose_images(images: ImageSet) -> NDArray[np.int64]:
    """Return whose the images are, [N]; each its own where that is not known."""
    if images.groups is None:
        return np.arange(len(images))
    return np.asarray(images.groups.cpu().numpy())


def one_of_each_patient(images: ImageSet, order: Tensor) -> Tensor:
    """Take the first image of each patient, [M] int64.

    Images of one patient are alike: more of them would count one look several times.

    Args:
        images: of one patient or of several.
        order: [N] int64, of the images.
    """
    _, first = np.unique(whose_images(images)[order.numpy()], return_index=True)
    return order[torch.from_numpy(np.sort(first))]


def random_order(number: int, seed: int, purpose: int) -> Tensor:
    """Shuffle so many indices."""
    return torch.randperm(number, generator=torch_generator(seed, Stream.METRICS, purpose))
