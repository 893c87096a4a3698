"""All measures of one set of generated images, with the floor of real images beside them."""

import dataclasses
import math
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from task.classifier import accuracy, train_classifier
from task.config import require
from task.data import Dataset, ImageSet, random_horizontal_flip
from task.features import FeatureExtractor, Features, cached_classifier, extract
from task.metrics import (
    Copying,
    copying,
    density_coverage,
    frechet_distance,
    inception_score,
    kid,
    nearest_distances,
    precision_recall,
)
from task.randomness import Stream, torch_generator

KID_SUBSETS = 100
KID_SUBSET_SIZE = 1000


@dataclass(frozen=True)
class Label:
    """What a figure must carry: figures are comparable where all of this but the data is equal.

    Attributes:
        data: name of the data set.
        extractor: name of the network that the metrics looked through.
        extractor_sha256: of its weights.
        image_range: "correct" or "paper"; never put the two into one column.
        real_flipped: whether real images were mirrored at random, as the released code does.
        n_generated: generated images.
        n_train: real training images.
        n_test: real test images.
        n_floor: real images that stand in for generated ones in the floor.
        kid_subset_size: images of each set in one of KID's subsets; in the floor, n_floor at most.
        seed: of all that is random in the measuring.
    """

    data: str
    extractor: str
    extractor_sha256: str
    image_range: str
    real_flipped: bool
    n_generated: int
    n_train: int
    n_test: int
    n_floor: int
    kid_subset_size: int
    seed: int


@dataclass(frozen=True)
class Scores:
    """What can be measured of images, generated or real, in the features of an extractor.

    `fid` and `kid` are the metrics of the literature only where the extractor is Inception.

    Attributes:
        inception_score: in [1, K], higher is better; None where the extractor has no classes.
        inception_score_std: over 10 splits.
        fid_train: Frechet distance to the training images, lower is better.
        fid_test: Frechet distance to the test images.
        kid_train: kernel distance to the training images, about 0 for equal sets.
        kid_train_std: over the subsets.
        kid_test: kernel distance to the test images.
        kid_test_std: over the subsets.
        precision: share of the images that lie near test images.
        recall: share of the test images that lie near the images.
        density: how densely the images lie around test images, about 1 for real ones.
        coverage: share of the test images whose neighbourhood holds one of the images.
    """

    inception_score: float | None
    inception_score_std: float | None
    fid_train: float
    fid_test: float
    kid_train: float
    kid_train_std: float
    kid_test: float
    kid_test_std: float
    precision: float
    recall: float
    density: float
    coverage: float


@dataclass(frozen=True)
class Classification:
    """Classifiers trained on generated and on real images, all tested on real test images.

    Attributes:
        cas: classification accuracy score: trained on the generated images.
        cas_real_same_n: trained on as many real training images as there are generated ones.
        cas_real: trained on all real training images.
        agreement: share of the generated images that the last of them takes for the class asked.
    """

    cas: float
    cas_real_same_n: float
    cas_real: float
    agreement: float


@dataclass(frozen=True)
class MetricReport:
    """The measures of one set of generated images.

    Attributes:
        label: what the figures hold for.
        generated: the scores.
        floor: the scores of `label.n_floor` real images in place of the generated ones, the best
            that a generator can honestly reach at that number: test images for the Inception
            score and against the training images, training images against the test images.
        classification: None where it was left out.
        pixel_copying: nearest training images, by root mean square difference of pixels in
            [0, 1], mirrored ones included where the data set is trained on mirrored; or None.
        feature_copying: nearest training images in the extractor's features, or None.
    """

    label: Label
    generated: Scores
    floor: Scores
    classification: Classification | None
    pixel_copying: Copying | None
    feature_copying: Copying | None

    def describe(self) -> dict[str, str | int | float | bool]:
        """Flatten the report to plain values, without what was not measured.

        The floor's scores are called `floor_<score>`, the distances `pixel_<name>` and
        `feature_<name>`: `..._generated`, `..._held_out` and `..._copied`.
        """
        found = {**dataclasses.asdict(self.label), **dataclasses.asdict(self.generated)}
        found |= {f"floor_{name}": v for name, v in dataclasses.asdict(self.floor).items()}
        if self.classification is not None:
            found |= dataclasses.asdict(self.classification)
        for space, copies in (("pixel", self.pixel_copying), ("feature", self.feature_copying)):
            if copies is not None:
                found |= {f"{space}_{name}": value for name, value in copies._asdict().items()}
        return {name: value for name, value in found.items() if value is not None}


@dataclass(frozen=True, eq=False)
class RealFeatures:
    """The features of a data set, which need not be extracted anew for each evaluation."""

    train: Features
    test: Features


def extract_real(
    dataset: Dataset,
    *,
    extractor: FeatureExtractor,
    horizontal_flip: bool,
    seed: int,
    batch_size: int = 256,
) -> RealFeatures:
    """Look at the real images as `evaluate_images` does.

    In the paper's range, the images of a set that is trained on mirrored images are mirrored at
    random, because the released code measures against its augmented loaders. Generated images are
    never mirrored. (The released code does that too for CT, where the model has seen both.)
    """
    parts = []
    for number, part in enumerate((dataset.train, dataset.test)):
        images = part.images
        if _flips(extractor, horizontal_flip):
            images = random_horizontal_flip(images, torch_generator(seed, Stream.METRICS, number))
        parts.append(extract(extractor, images, batch_size=batch_size))
    return RealFeatures(*parts)


def _flips(extractor: FeatureExtractor, horizontal_flip: bool) -> bool:
    return horizontal_flip and extractor.image_range == "paper"


def evaluate_images(
    generated: ImageSet,
    dataset: Dataset,
    *,
    extractor: FeatureExtractor,
    data_name: str,
    num_classes: int,
    horizontal_flip: bool,
    seed: int,
    batch_size: int = 256,
    cache_dir: Path | None = None,
    real: RealFeatures | None = None,
    with_classification: bool = True,
    with_copying: bool = True,
) -> MetricReport:
    """Measure generated images in every way that feddm knows.

    Args:
        generated: images with the classes that were asked for; in the paper as many of each as
            the test split has.
        dataset: the real images, in the shape of the generated ones.
        extractor: what the metrics look through; it says in which range (`build_extractor`).
        data_name: of the data set, for the label.
        num_classes: of the data set.
        horizontal_flip: whether the data set is trained on mirrored images, `data.horizontal_flip`.
        seed: of splits, subsets, stand-ins and classifiers.
        batch_size: images at a time that the extractor looks at, >= 1.
        cache_dir: where classifiers of real images are kept; None: nowhere.
        real: from `extract_real` with the same arguments, for more than one evaluation.
        with_classification: whether to train classifiers, which takes the longest on a GPU.
        with_copying: whether to search the nearest training images, which takes the longest on a
            CPU.

    Raises:
        ValueError: there are too few images for a metric (10 of each set), images of another
            shape than the real ones, or, with classification, none of some class.
    """
    require(
        generated.images.shape[1:] == dataset.train.images.shape[1:],
        "generated.images",
        f"[N, {', '.join(map(str, dataset.train.images.shape[1:]))}] as the real ones",
        tuple(generated.images.shape),
    )
    if with_classification:
        _require_every_class(generated, num_classes)
    if real is None:
        real = extract_real(
            dataset,
            extractor=extractor,
            horizontal_flip=horizontal_flip,
            seed=seed,
            batch_size=batch_size,
        )
    seen = extract(extractor, generated.images, batch_size=batch_size)
    n_floor = min(len(generated), len(dataset.train), len(dataset.test))
    label = Label(
        data=data_name,
        extractor=extractor.name,
        extractor_sha256=extractor.sha256,
        image_range=extractor.image_range,
        real_flipped=_flips(extractor, horizontal_flip),
        n_generated=len(generated),
        n_train=len(dataset.train),
        n_test=len(dataset.test),
        n_floor=n_floor,
        kid_subset_size=_subset_size(seen, real.train, real.test),
        seed=seed,
    )
    stand_ins = (_some(real.test, n_floor, seed, 2), _some(real.train, n_floor, seed, 3))
    return MetricReport(
        label=label,
        generated=_scores(seen, seen, real, seed),
        floor=_scores(*stand_ins, real, seed),
        classification=_classification(
            generated,
            dataset,
            num_classes=num_classes,
            horizontal_flip=horizontal_flip,
            seed=seed,
            device=extractor.device,
            cache_dir=cache_dir,
        )
        if with_classification
        else None,
        pixel_copying=_pixel_copying(generated, dataset, horizontal_flip, extractor.device)
        if with_copying
        else None,
        feature_copying=copying(
            nearest_distances(seen.features, real.train.features),
            nearest_distances(real.test.features, real.train.features),
        )
        if with_copying
        else None,
    )


def classification_accuracy_score(
    generated: ImageSet,
    test: ImageSet,
    *,
    num_classes: int,
    horizontal_flip: bool,
    seed: int,
    device: str | torch.device,
) -> float:
    """Train a classifier on generated images and return its accuracy on real ones, in [0, 1].

    Args:
        generated: images with the classes that were asked for.
        test: real images that no part of the generator was trained on.
        num_classes: of the data set.
        horizontal_flip: whether to mirror the training images at random.
        seed: of the classifier.
        device: that trains.

    Raises:
        ValueError: there are no generated images of a class, so it could not be learned.

    Source: Ravuri & Vinyals 2019.
    """
    _require_every_class(generated, num_classes)
    model = train_classifier(
        generated,
        num_classes=num_classes,
        horizontal_flip=horizontal_flip,
        seed=seed,
        device=device,
    )
    return accuracy(model, test.images, test.labels)


def _require_every_class(generated: ImageSet, num_classes: int) -> None:
    missing = sorted(set(range(num_classes)) - set(generated.labels.tolist()))
    require(not missing, "generated.labels", "of every class", f"none of {missing}")


def _classification(
    generated: ImageSet,
    dataset: Dataset,
    *,
    num_classes: int,
    horizontal_flip: bool,
    seed: int,
    device: torch.device,
    cache_dir: Path | None,
) -> Classification:
    def learned(images: ImageSet) -> torch.nn.Module:
        return cached_classifier(
            images,
            num_classes=num_classes,
            horizontal_flip=horizontal_flip,
            seed=seed,
            device=device,
            cache_dir=cache_dir,
        )

    train, test = dataset.train, dataset.test
    whole = part = learned(train)
    if len(generated) < len(train):
        part = learned(train.subset(_order(len(train), seed, 4)[: len(generated)]))
    return Classification(
        cas=classification_accuracy_score(
            generated,
            test,
            num_classes=num_classes,
            horizontal_flip=horizontal_flip,
            seed=seed,
            device=device,
        ),
        cas_real_same_n=accuracy(part, test.images, test.labels),
        cas_real=accuracy(whole, test.images, test.labels),
        agreement=accuracy(whole, generated.images, generated.labels),
    )


def _scores(to_train: Features, to_test: Features, real: RealFeatures, seed: int) -> Scores:
    """Score images, those that meet the training and those that meet the test images."""
    score = std = None
    if to_train.probabilities is not None:
        generator = torch_generator(seed, Stream.METRICS, 5)
        score, std = inception_score(to_train.probabilities, generator=generator)
    kids = [
        kid(
            reals.features,
            seen.features,
            subsets=KID_SUBSETS,
            subset_size=_subset_size(seen, real.train, real.test),
            generator=torch_generator(seed, Stream.METRICS, 6),
        )
        for reals, seen in ((real.train, to_train), (real.test, to_test))
    ]
    precision, recall = precision_recall(real.test.features, to_test.features)
    density, coverage = density_coverage(real.test.features, to_test.features)
    return Scores(
        inception_score=score,
        inception_score_std=std,
        fid_train=frechet_distance(real.train.features, to_train.features),
        fid_test=frechet_distance(real.test.features, to_test.features),
        kid_train=kids[0].mean,
        kid_train_std=kids[0].std,
        kid_test=kids[1].mean,
        kid_test_std=kids[1].std,
        precision=precision,
        recall=recall,
        density=density,
        coverage=coverage,
    )


def _subset_size(*sets: Features) -> int:
    return min(KID_SUBSET_SIZE, *(len(each) for each in sets))


def _some(features: Features, number: int, seed: int, purpose: int) -> Features:
    return features.subset(_order(len(features), seed, purpose)[:number])


def _order(number: int, seed: int, purpose: int) -> Tensor:
    return torch.randperm(number, generator=torch_generator(seed, Stream.METRICS, purpose))


def _pixel_copying(
    generated: ImageSet, dataset: Dataset, horizontal_flip: bool, device: torch.device
) -> Copying:
    train = dataset.train.images.flatten(1).to(device)

    def distances(images: Tensor) -> Tensor:
        found = nearest_distances(images.flatten(1).to(device), train)
        if horizontal_flip:
            mirrored = nearest_distances(images.flip(-1).flatten(1).to(device), train)
            found = torch.minimum(found, mirrored)
        return found / (255 * math.sqrt(train.shape[1]))

    return copying(distances(generated.images), distances(dataset.test.images))
