"""All measures of one set of generated images, with the floor of real images beside them."""

import dataclasses
import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

from task.checks import require
from task.config import Config
from task.data import Dataset, ImageSet, random_horizontal_flip
from task.evaluation.classifier import accuracy, balanced_accuracy, train_classifier
from task.evaluation.copying import Copying, feature_copying, pixel_copying
from task.evaluation.distances import (
    density_coverage,
    frechet_distance,
    inception_score,
    kid,
    precision_recall,
)
from task.evaluation.features import (
    FeatureExtractor,
    Features,
    cached_classifier,
    cached_features,
    extract,
)
from task.evaluation.noise_position import noise_position
from task.progress import progress
from task.randomness import Stream, torch_generator
from task.reporting.published import MIRRORED
from task.runs.records import Record, records_of

T = TypeVar("T")

KID_SUBSETS = 100
KID_SUBSET_SIZE = 1000
# Of as many generated images as the floor has real ones, where there are more.
DRAWS = 10
# The scores whose names say against which images.
OF_REFERENCE = ("fid_train", "fid_test", "kid_train", "kid_test")
# Numbers below it are taken by other random choices.
FIRST_DRAW = 100
# Held-out images that every run searches for copies beside the generated ones.
MOST_SEARCHED = 1000


@dataclass(frozen=True)
class Label:
    """What a figure must carry: figures are comparable where all of this but the data is equal.

    Attributes:
        data: name of the data set.
        extractor: name of the network that the metrics looked through.
        extractor_sha256: of its weights.
        image_range: "correct" or "paper"; never put the two into one column.
        real_flipped: whether all images were mirrored at random, as the released code does with
            CT scans.
        n_generated: generated images.
        n_train: real training images.
        n_test: real test images; 0 where none are held out.
        n_floor: real images that stand in for generated ones in the floor.
        kid_subset_size: images of each set in one of KID's subsets.
        seed: of all that is random in the measuring.
        n_scored: generated images behind each of the scores beside the floor, as many as
            `n_floor`; None of an older version, which scored `n_generated`.
        n_rarest: generated images of the class that has the fewest; None of an older version.
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
    n_scored: int | None = None
    n_rarest: int | None = None

    @property
    def has_comparable_floor(self) -> bool:
        """Whether the floor is of as many images as the scores are."""
        return self.n_floor == (self.n_generated if self.n_scored is None else self.n_scored)


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
        noise_position: how far the images are from training images, as a share of how far noise
            is; see `task.evaluation.noise_position`. None of an older version.
    """

    inception_score: float | None = None
    inception_score_std: float | None = None
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
    noise_position: float | None = None


@dataclass(frozen=True)
class Classification:
    """Classifiers trained on generated and on real images, all tested on real test images.

    Attributes:
        cas: classification accuracy score: trained on the generated images.
        cas_real_same_n: trained on as many real training images as there are generated ones, or
            on all where these are fewer.
        cas_real: trained on all real training images.
        agreement: share of the generated images that the last of them takes for the class asked.
        agreement_real: the same of the real test images, their classes in the proportions of the
            generated ones; None of an older version.
        chance_agreement: the agreement that one class for every image would have.
    """

    cas: float
    cas_real_same_n: float
    cas_real: float
    agreement: float
    agreement_real: float | None = None
    chance_agreement: float | None = None


@dataclass(frozen=True)
class MetricReport:
    """The measures of one set of generated images.

    Attributes:
        label: what the figures hold for.
        generated: the scores of `label.n_scored` generated images: where these are fewer than
            there are, means over `DRAWS` draws of them.
        floor: the scores of as many real images in place of the generated ones, the best that a
            generator can honestly reach at that number; `_meetings` says which images.
        whole: the scores of all generated images, where they are more or are measured against
            more; not to be compared with the floor.
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
    whole: Scores | None = None

    def describe(self) -> dict[str, str | int | float | bool]:
        """Flatten the report to plain values, without what was not measured.

        The floor's scores are called `floor_<score>`, those of all images `whole_<score>`, the
        distances `pixel_<name>` and `feature_<name>`, with the names of `Copying`.
        """
        found = {**dataclasses.asdict(self.label), **dataclasses.asdict(self.generated)}
        for prefix, scores in (("floor", self.floor), ("whole", self.whole)):
            if scores is not None:
                found |= {f"{prefix}_{name}": v for name, v in dataclasses.asdict(scores).items()}
        if self.classification is not None:
            found |= dataclasses.asdict(self.classification)
        for space, copies in (("pixel", self.pixel_copying), ("feature", self.feature_copying)):
            if copies is not None:
                found |= {f"{space}_{name}": value for name, value in copies._asdict().items()}
        return {name: value for name, value in found.items() if value is not None}

    def records(self, server_round: int) -> list[Record]:
        """Make the records of all scores; those of `whole` are in the evaluation's file alone.

        Args:
            server_round: whose weights drew the images.
        """
        label = self.label
        settings = {
            "extractor": label.extractor,
            "image_range": label.image_range,
            "seed": label.seed,
        }
        n_scored = label.n_generated if label.n_scored is None else label.n_scored
        records = _score_records(server_round, self.generated, settings, n=n_scored)
        if label.has_comparable_floor:
            records += _score_records(
                server_round, self.floor, settings, n=label.n_floor, real=True
            )
        found = self.classification
        values: dict[str, float | None] = {}
        if found is not None:
            real = {"cas": found.cas_real_same_n, "class_agreement": found.agreement_real}
            records += _told(server_round, real, real=True, context=settings)
            values = {
                "cas": found.cas,
                "cas_real": found.cas_real,
                "class_agreement": found.agreement,
                "chance_agreement": found.chance_agreement,
            }
        for space, copies in (("pixel", self.pixel_copying), ("feature", self.feature_copying)):
            if copies is not None:
                values |= {f"{space}_{name}": value for name, value in copies._asdict().items()}
        if self.pixel_copying is not None:
            records += _told(server_round, {"num_held_out": label.n_test})
        return records + _told(server_round, values, n=label.n_generated, context=settings)

    @classmethod
    def from_description(cls, found: Mapping[str, Any]) -> "MetricReport":
        """Make the report that `describe` has flattened; further values are left aside.

        Raises:
            ValueError: it is no such description.
        """

        def part(kind: type[T], prefix: str = "") -> T | None:
            names = inspect.signature(kind).parameters
            known = {name: found[prefix + name] for name in names if prefix + name in found}
            return kind(**known) if known else None

        try:
            label, generated, floor = part(Label), part(Scores), part(Scores, "floor_")
            if label is None or generated is None or floor is None:
                raise TypeError("no scores")
            return cls(
                label=label,
                generated=generated,
                floor=floor,
                classification=part(Classification),
                pixel_copying=part(Copying, "pixel_"),
                feature_copying=part(Copying, "feature_"),
                whole=part(Scores, "whole_"),
            )
        except TypeError as error:
            raise ValueError(f"no measurements of this version of feddm: {error}") from error


def _told(server_round: int, values: Mapping[str, float | None], **fields: Any) -> list[Record]:
    """Make records of what was measured."""
    measured = {metric: value for metric, value in values.items() if value is not None}
    return records_of(server_round, measured, **fields)


def _score_records(
    server_round: int, scores: Scores, settings: Mapping[str, Any], *, n: int, real: bool = False
) -> list[Record]:
    values = dataclasses.asdict(scores)
    records = []
    for name, value in values.items():
        if value is not None and not name.endswith("_std"):
            metric, _, reference = name.partition("_") if name in OF_REFERENCE else (name, "", "")
            records.append(
                Record(
                    *(server_round, metric, value),
                    reference=reference or None,
                    real=real,
                    std=values.get(f"{name}_std"),
                    n=n,
                    context=settings,
                )
            )
    return records


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
    data_name: str,
    seed: int,
    batch_size: int | None = None,
    cache_dir: Path | None = None,
) -> RealFeatures:
    """Look at the real images as `evaluate_images` does.

    In the paper's range the images of `published.MIRRORED` sets are mirrored at random, as in the
    released code, and so are the generated ones.

    What was found is kept in `cache_dir`; None: nowhere.
    """

    def look(images: Tensor, number: int) -> Features:
        images = _as_released(images, extractor, data_name, seed, number)
        if cache_dir is not None:
            return cached_features(extractor, images, batch_size=batch_size, cache_dir=cache_dir)
        return extract(extractor, images, batch_size=batch_size)

    return RealFeatures(
        train=look(dataset.train.images, 0),
        test=look(dataset.test.images, 1) if len(dataset.test) > 0 else None,
    )


def _mirrors(extractor: FeatureExtractor, data_name: str) -> bool:
    return extractor.image_range == "paper" and data_name in MIRRORED


def _as_released(
    images: Tensor, extractor: FeatureExtractor, data_name: str, seed: int, purpose: int
) -> Tensor:
    """Mirror images at random where the released code does."""
    if not _mirrors(extractor, data_name):
        return images
    return random_horizontal_flip(images, torch_generator(seed, Stream.METRICS, purpose))


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
            data_name=data_name,
            seed=seed,
            batch_size=batch_size,
        )
    looked_at = _as_released(generated.images, extractor, data_name, seed, 9)
    seen = extract(extractor, looked_at, batch_size=batch_size)
    draws, floor_meetings, whole = _meetings(seen, real, seed)
    position = noise_position(
        generated.images,
        dataset.train.images,
        dataset.test.images,
        seed=seed,
        device=extractor.device,
    )
    label = _label(
        generated,
        dataset,
        extractor,
        data_name=data_name,
        num_classes=num_classes,
        n_floor=len(floor_meetings["train"].images),
        seed=seed,
    )

    def scores(meetings: Meetings, place: float) -> Scores:
        found = _scores(meetings, label.kid_subset_size, seed)
        return dataclasses.replace(found, noise_position=place)

    return MetricReport(
        label=label,
        generated=_mean([scores(meetings, position.generated) for meetings in draws]),
        floor=scores(floor_meetings, position.real),
        whole=None if whole is None else scores(whole, position.generated),
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


def _label(
    generated: ImageSet,
    dataset: Dataset,
    extractor: FeatureExtractor,
    *,
    data_name: str,
    num_classes: int,
    n_floor: int,
    seed: int,
) -> Label:
    return Label(
        data=data_name,
        extractor=extractor.name,
        extractor_sha256=extractor.sha256,
        image_range=extractor.image_range,
        real_flipped=_mirrors(extractor, data_name),
        n_generated=len(generated),
        n_train=len(dataset.train),
        n_test=len(dataset.test),
        n_floor=n_floor,
        kid_subset_size=min(KID_SUBSET_SIZE, n_floor),
        seed=seed,
        n_scored=n_floor,
        n_rarest=int(generated.labels.bincount(minlength=num_classes).min()),
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


def chance_agreement(labels: Tensor) -> float:
    """Return the share of the most frequent class, which one class for every image would find."""
    return int(labels.bincount().max()) / len(labels)


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
        agreement_real=balanced_accuracy(whole, test.images, test.labels, like=generated.labels),
        chance_agreement=chance_agreement(generated.labels),
    )


class _Meeting(NamedTuple):
    """Images that are scored, and the real ones that they are measured against."""

    images: Features
    reals: Features


Meetings = dict[str, _Meeting]


def _meetings(
    seen: Features, real: RealFeatures, seed: int
) -> tuple[list[Meetings], Meetings, Meetings | None]:
    """Decide what is measured against what, by split.

    In the floor test images meet the training images, and training images the test images, as
    many of each as the smallest of the three sets has. Without test images one half of the
    training images, drawn at random, stands in for the generated ones, at most as many, and meets
    the other half. Generated images meet the same images as those of the floor, and are as many.

    Returns:
        Draws of so many generated images, one where all are drawn; the floor; and all generated
        images against all real ones, None where that is the one draw.
    """
    train, test = real.train, real.test
    if test is None:
        order = _order(len(train), seed, 2)
        number = min(len(seen), len(train) // 2)
        references = {"train": train.subset(order[len(train) // 2 :])}
        floor = {"train": _Meeting(train.subset(order[:number]), references["train"])}
    else:
        number = min(len(seen), len(train), len(test))
        references = {"train": train, "test": test}
        floor = {
            "train": _Meeting(_some(test, number, seed, 2), train),
            "test": _Meeting(_some(train, number, seed, 3), test),
        }
    draws = [seen]
    if number < len(seen):
        draws = [_some(seen, number, seed, FIRST_DRAW + draw) for draw in range(DRAWS)]
    against = [{split: _Meeting(d, reals) for split, reals in references.items()} for d in draws]
    everything = {"train": train} if test is None else references
    if number == len(seen) and test is not None:
        return against, floor, None
    return against, floor, {split: _Meeting(seen, reals) for split, reals in everything.items()}


def _mean(scores: Sequence[Scores]) -> Scores:
    values = [dataclasses.asdict(each) for each in scores]
    means: dict[str, Any] = {
        name: None if value is None else fmean(each[name] for each in values)
        for name, value in values[0].items()
    }
    return Scores(**means)


@progress(1, "comparing features with those of real images")
def _scores(meetings: Meetings, subset_size: int, seed: int) -> Scores:
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


def measure_images(
    config: Config,
    generated: ImageSet,
    dataset: Dataset,
    *,
    extractor: FeatureExtractor,
    real: RealFeatures | None = None,
    full: bool = True,
) -> MetricReport:
    """Measure generated images as a configuration says; see `evaluate_images`.

    Args:
        config: of the run, with absolute folders.
        generated: the images.
        dataset: the real ones.
        extractor: of `build_extractor`.
        real: of `extract_real`, where it is known.
        full: whether to train classifiers and to search for copies as well.
    """
    return evaluate_images(
        generated,
        dataset,
        extractor=extractor,
        data_name=config.data.name,
        num_classes=len(config.data.classes),
        horizontal_flip=config.data.horizontal_flip,
        seed=config.eval.seed,
        batch_size=config.eval.batch_size,
        cache_dir=Path(config.data.cache_dir),
        real=real,
        with_classification=full,
        with_copying=full,
    )


def quick_measures(
    config: Config,
    generated: ImageSet,
    dataset: Dataset,
    server_round: int,
    *,
    device: torch.device,
) -> list[Record]:
    """Measure what every run ends with: classes, the place between real and noise, and copies.

    Args:
        config: of the run, with absolute folders.
        generated: images with the classes that were asked for.
        dataset: the real ones.
        server_round: whose weights drew the images.
        device: that computes.

    Returns:
        Records of "class_agreement", "chance_agreement" and, where there are real images for it,
        "noise_position" and "pixel_..." of `Copying`, with those of real images.
    """
    flip, seed = config.data.horizontal_flip, config.eval.seed
    train, test = dataset.train, dataset.test
    classifier = cached_classifier(
        train,
        num_classes=len(config.data.classes),
        horizontal_flip=flip,
        seed=seed,
        device=device,
        cache_dir=Path(config.data.cache_dir),
    )
    found: dict[str, float | None] = {
        "class_agreement": accuracy(classifier, generated.images, generated.labels),
        "chance_agreement": chance_agreement(generated.labels),
    }
    real: list[Record] = []
    if torch.isin(test.labels, generated.labels).any():
        known = balanced_accuracy(classifier, test.images, test.labels, like=generated.labels)
        real.append(Record(server_round, "class_agreement", known, real=True))
    if len(generated) >= 2 and len(train) >= 4:
        place = noise_position(
            generated.images, train.images, test.images, seed=seed, device=device
        )
        found["noise_position"] = place.generated
        real.append(Record(server_round, "noise_position", place.real, real=True, n=place.n_real))
    if len(test) > 0:
        order = torch.randperm(len(test), generator=torch_generator(seed, Stream.METRICS, 8))
        held_out = test.subset(order[:MOST_SEARCHED])
        searched = Dataset(train, held_out)
        copies = pixel_copying(generated, searched, horizontal_flip=flip, device=device)
        found |= {f"pixel_{name}": value for name, value in copies._asdict().items()}
        real.append(Record(server_round, "num_held_out", len(held_out)))
    return [*_told(server_round, found, n=len(generated)), *real]
