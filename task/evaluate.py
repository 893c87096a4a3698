"""All measures of one set of generated images, with the floor of real images beside them."""

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from task.classifier import accuracy, train_classifier
from task.config import require
from task.data import Dataset, ImageSet, random_horizontal_flip
from task.features import (
    FeatureExtractor,
    Features,
    cached_classifier,
    cached_features,
    extract,
)
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
        n_test: real test images; 0 where none are held out.
        n_floor: real images that stand in for generated ones in the floor.
        kid_subset_size: images of each set in one of KID's subsets.
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


@dataclass(frozen=True, kw_only=True)
class Scores:
    """What can be measured of images, generated or real, in the features of an extractor.

    `fid` and `kid` are the metrics of the literature only where the extractor is Inception.
    Without test images, precision to coverage are taken against the training images.

    Attributes:
        inception_score: in [1, K], higher is better; None where the extractor has no classes.
        inception_score_std: over 10 splits.
        fid_train: Frechet distance to the training images, lower is better.
        fid_test: Frechet distance to the test images; None where there are none.
        kid_train: kernel distance to the training images, about 0 for equal sets.
        kid_train_std: over the subsets.
        kid_test: kernel distance to the test images; None where there are none.
        kid_test_std: over the subsets.
        precision: share of the images that lie near test images.
        recall: share of the test images that lie near the images.
        density: how densely the images lie around test images, about 1 for real ones.
        coverage: share of the test images whose neighbourhood holds one of the images.
    """

    inception_score: float | None
    inception_score_std: float | None
    fid_train: float
    fid_test: float | None = None
    kid_train: float
    kid_train_std: float
    kid_test: float | None = None
    kid_test_std: float | None = None
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
            that a generator can honestly reach at that number; `_meetings` says which images.
        classification: None where it was left out or no images are held out to test on.
        pixel_copying: nearest training images, by root mean square difference of pixels in
            [0, 1], mirrored ones included where the data set is trained on mirrored; None where
            it was left out or no images are held out, whose distance is the yardstick.
        feature_copying: the same in the extractor's features.
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

    @classmethod
    def read(cls, found: Mapping[str, Any]) -> "MetricReport":
        """Make the report that `describe` flattened; further names are ignored.

        Raises:
            ValueError: it is none.
        """

        def part(kind: type[Any], prefix: str = "") -> Any:
            named = ((field.name, f"{prefix}{field.name}") for field in dataclasses.fields(kind))
            return kind(**{name: found[key] for name, key in named if key in found})

        def copies(space: str) -> Copying | None:
            if f"{space}_copied" not in found:
                return None
            return Copying(*(found[f"{space}_{name}"] for name in Copying._fields))

        # Of an extractor without classes there is no inception score.
        names = ("inception_score", "inception_score_std")
        found = {f"{prefix}{name}": None for prefix in ("", "floor_") for name in names} | {**found}
        try:
            return cls(
                label=part(Label),
                generated=part(Scores),
                floor=part(Scores, "floor_"),
                classification=part(Classification) if "cas" in found else None,
                pixel_copying=copies("pixel"),
                feature_copying=copies("feature"),
            )
        except (TypeError, KeyError) as error:
            raise ValueError(f"an evaluation lacks what it was measured with ({error})") from error


@dataclass(frozen=True, eq=False)
class RealFeatures:
    """The features of a data set, which need not be extracted anew for each evaluation.

    Attributes:
        train: of the training images.
        test: of the test images; None where there are none.
    """

    train: Features
    test: Features | None


def extract_real(
    dataset: Dataset,
    *,
    extractor: FeatureExtractor,
    horizontal_flip: bool,
    seed: int,
    batch_size: int | None = None,
    cache_dir: Path | None = None,
) -> RealFeatures:
    """Look at the real images as `evaluate_images` does.

    In the paper's range, the images of a set that is trained on mirrored images are mirrored at
    random, because the released code measures against its augmented loaders. Generated images are
    never mirrored. (The released code does that too for CT, where the model has seen both.)

    What was found is kept in `cache_dir`; None: nowhere.
    """

    def look(images: Tensor, number: int) -> Features:
        if _flips(extractor, horizontal_flip):
            images = random_horizontal_flip(images, torch_generator(seed, Stream.METRICS, number))
        if cache_dir is not None:
            return cached_features(extractor, images, batch_size=batch_size, cache_dir=cache_dir)
        return extract(extractor, images, batch_size=batch_size)

    return RealFeatures(
        train=look(dataset.train.images, 0),
        test=look(dataset.test.images, 1) if len(dataset.test) > 0 else None,
    )


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
    batch_size: int | None = None,
    cache_dir: Path | None = None,
    real: RealFeatures | None = None,
    with_classification: bool = True,
    with_copying: bool = True,
) -> MetricReport:
    """Measure generated images in every way that feddm knows.

    Args:
        generated: images with the classes that were asked for; in the paper as many of each as
            the test split has.
        dataset: the real images, in the shape of the generated ones. Without test images
            (`_meetings` says what is measured against what) there is no classification and no
            search for copies.
        extractor: what the metrics look through; it says in which range (`build_extractor`).
        data_name: of the data set, for the label.
        num_classes: of the data set.
        horizontal_flip: whether the data set is trained on mirrored images, `data.horizontal_flip`.
        seed: of splits, subsets, stand-ins and classifiers.
        batch_size: images at a time that the extractor looks at, see `extract`.
        cache_dir: where classifiers of real images are kept; None: nowhere.
        real: from `extract_real` with the same arguments, for more than one evaluation.
        with_classification: whether to train classifiers, which takes the longest on a GPU.
        with_copying: whether to search the nearest training images, which takes the longest on a
            CPU.

    Raises:
        ValueError: there are too few images for a metric (10 of each set; 20 training images
            where there are no test images), images of another shape than the real ones, or, with
            classification, none of some class.
    """
    require(
        generated.images.shape[1:] == dataset.train.images.shape[1:],
        "generated.images",
        f"[N, {', '.join(map(str, dataset.train.images.shape[1:]))}] as the real ones",
        tuple(generated.images.shape),
    )
    if len(dataset.test) == 0:
        with_classification = with_copying = False
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
    meetings, floor_meetings = _meetings(seen, real, seed)
    n_floor = len(floor_meetings["train"].images)
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
        kid_subset_size=min(KID_SUBSET_SIZE, n_floor),
        seed=seed,
    )
    return MetricReport(
        label=label,
        generated=_scores(meetings, label.kid_subset_size, seed),
        floor=_scores(floor_meetings, label.kid_subset_size, seed),
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
        pixel_copying=pixel_copying(
            generated, dataset, horizontal_flip=horizontal_flip, device=extractor.device
        )
        if with_copying
        else None,
        feature_copying=feature_copying(seen, real.train, real.test)
        if with_copying and real.test is not None
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


class _Meeting(NamedTuple):
    """Images that are scored, and the real ones that they are measured against."""

    images: Features
    reals: Features


def _meetings(
    seen: Features, real: RealFeatures, seed: int
) -> tuple[dict[str, _Meeting], dict[str, _Meeting]]:
    """Decide what is measured against what, by split: generated images, and the floor.

    Generated images meet the training and the test images; in the floor test images meet the
    training images, and training images the test images, as many of each as the smallest of the
    three sets has. Without test images one half of the training images, drawn at random, stands
    in for the generated ones, at most as many, and meets the other half.
    """
    train, test = real.train, real.test
    if test is None:
        half = len(train) // 2
        order = _order(len(train), seed, 2)
        stand_ins = train.subset(order[:half][: len(seen)])
        return (
            {"train": _Meeting(seen, train)},
            {"train": _Meeting(stand_ins, train.subset(order[half:]))},
        )
    n_floor = min(len(seen), len(train), len(test))
    return (
        {"train": _Meeting(seen, train), "test": _Meeting(seen, test)},
        {
            "train": _Meeting(_some(test, n_floor, seed, 2), train),
            "test": _Meeting(_some(train, n_floor, seed, 3), test),
        },
    )


def _scores(meetings: dict[str, _Meeting], subset_size: int, seed: int) -> Scores:
    """Score images: the Inception score of those that meet the training images."""
    score = std = None
    probabilities = meetings["train"].images.probabilities
    if probabilities is not None:
        generator = torch_generator(seed, Stream.METRICS, 5)
        score, std = inception_score(probabilities, generator=generator)
    distances = {}
    for split, (images, reals) in meetings.items():
        distances[f"fid_{split}"] = frechet_distance(reals.features, images.features)
        distances[f"kid_{split}"], distances[f"kid_{split}_std"] = kid(
            reals.features,
            images.features,
            subsets=KID_SUBSETS,
            subset_size=subset_size,
            generator=torch_generator(seed, Stream.METRICS, 6),
        )
    images, reals = meetings.get("test", meetings["train"])
    precision, recall = precision_recall(reals.features, images.features)
    density, coverage = density_coverage(reals.features, images.features)
    return Scores(
        inception_score=score,
        inception_score_std=std,
        precision=precision,
        recall=recall,
        density=density,
        coverage=coverage,
        **distances,
    )


def _some(features: Features, number: int, seed: int, purpose: int) -> Features:
    return features.subset(_order(len(features), seed, purpose)[:number])


def _order(number: int, seed: int, purpose: int) -> Tensor:
    return torch.randperm(number, generator=torch_generator(seed, Stream.METRICS, purpose))


def feature_copying(seen: Features, train: Features, test: Features) -> Copying:
    """Compare how near images come to the training images, in features; see `copying`.

    Args:
        seen: of the generated images.
        train: of the training images.
        test: of real images that were not trained on.
    """
    return copying(
        nearest_distances(seen.features, train.features),
        nearest_distances(test.features, train.features),
    )


def pixel_copying(
    generated: ImageSet, dataset: Dataset, *, horizontal_flip: bool, device: torch.device
) -> Copying:
    """Compare how near images come to the training images, in pixels; see `MetricReport`."""
    train = dataset.train.images.flatten(1).to(device)

    def distances(images: Tensor) -> Tensor:
        found = nearest_distances(images.flatten(1).to(device), train)
        if horizontal_flip:
            mirrored = nearest_distances(images.flip(-1).flatten(1).to(device), train)
            found = torch.minimum(found, mirrored)
        return found / (255 * math.sqrt(train.shape[1]))

    return copying(distances(generated.images), distances(dataset.test.images))
