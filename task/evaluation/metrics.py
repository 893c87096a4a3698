"""Every metric of generated images: name, title, direction, bounds, caption and computation.

A new metric is one more entry here. Evaluations, records, pages, tables, the model card and the
messages of hospitals take it from `METRICS`.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import KW_ONLY, dataclass
from enum import StrEnum
from statistics import fmean
from typing import Literal

import torch

from task.checks import require
from task.evaluation.classifier import accuracy, balanced_accuracy, train_classifier
from task.evaluation.comparison import Comparison, Pair, Pairs, random_order
from task.evaluation.distances import (
    MeanStd,
    frechet_distance,
    inception_score,
    kid,
    share_near,
)
from task.evaluation.features import cached_classifier
from task.evaluation.halves import can_be_halved
from task.evaluation.near_copies import Copying
from task.evaluation.noise_position import MOST_COMPARED, noise_position
from task.runs.records import HELD_OUT, TEST, TRAIN

KID_SUBSETS = 100
KID_SUBSET_SIZE = 1000

SHARE = (0.0, 1.0)
POSITIVE = (0.0, math.inf)


class Use(StrEnum):
    """Where a metric is computed or shown."""

    # By `feddm evaluate` and `eval.final_metrics`.
    EVALUATION = "evaluation"
    # By `eval.metrics_every`.
    ROUNDS = "rounds"
    # By `audit.every`.
    AUDIT = "audit"
    # At the end of every run that draws images there.
    END = "end"
    # By real nodes, each on its own images.
    HOSPITALS = "hospitals"
    # The same, but where a node has images of two classes or more.
    HOSPITALS_OF_CLASSES = "hospitals of classes"
    # In the few lines that say how a run ended.
    SUMMARY = "summary"
    # As a column of the paper's tables of `feddm tables`.
    TABLES = "tables"
    # As a column of its comparison of generators.
    GENERATORS = "generators"


@dataclass(frozen=True)
class Score:
    """A number that a metric gives: a `Record` without the round and whose weights it is of.

    Attributes:
        value: the number.
        std: standard deviation over splits or subsets; None where there is none.
        n: of how many images.
        reference: the images that it was measured against, where the metric leaves a choice.
        real: whether real images stand in for the generated ones.
        whole: whether it is of all generated images, and not to be compared with that of real ones.
    """

    value: float
    std: float | None = None
    _: KW_ONLY
    n: int
    reference: str | None = None
    real: bool = False
    whole: bool = False


@dataclass(frozen=True)
class Metric:
    """A number that says something of generated images.

    Attributes:
        name: in records and files, and, with dashes, in messages.
        title: on pages.
        better: "higher" or "lower", or what real images reach; None: no direction is better.
        bounds: the least and the largest that it can be.
        compute: yields the scores of a comparison; none where it lacks what they need.
        uses: where it is computed and shown.
        caption: what a reader must know of it, without a full stop; may be empty.
        beside: whether a hospital that measures it measures it of real images as well.
        through: what looks at the images, where that is not the extractor.
        most: how many images it compares at most; None: all.
    """

    name: str
    title: str
    _: KW_ONLY
    better: Literal["higher", "lower"] | float | None
    bounds: tuple[float, float]
    compute: Callable[[Comparison], Iterable[Score]]
    uses: frozenset[Use]
    caption: str = ""
    beside: bool = True
    through: str = ""
    most: int | None = None

    def key(self, *, real: bool = False) -> str:
        """Return the name in messages, of generated images or of real ones."""
        return ("floor-" if real else "") + self.name.replace("_", "-")

    @property
    def keys(self) -> dict[str, bool]:
        """The names in messages, with whether they are of real images."""
        return {self.key(real=real): real for real in (False, *[True] * self.beside)}


# By the reference of a score those of its pairs, of which the first that is there counts.
References = Mapping[str | None, tuple[str, ...]]
EACH: References = {name: (name,) for name in (TRAIN, TEST, HELD_OUT)}
TRAINING_IMAGES: References = {None: (TRAIN,)}
TEST_IMAGES: References = {None: (TEST, TRAIN)}


def of_features(
    score: Callable[[Pair], MeanStd | None], references: References
) -> Callable[[Comparison], Iterable[Score]]:
    """Make the `compute` of a metric of features: mean over draws, floor, and all images.

    Args:
        score: of one pair; None where the extractor does not give what it needs.
        references: what is measured against what.
    """

    def compute(comparison: Comparison) -> Iterator[Score]:
        found = comparison.pairs
        if found is None:
            return
        kinds: tuple[tuple[Sequence[Pairs], dict[str, bool]], ...] = (
            (found.draws, {}),
            ([found.floor], {"real": True}),
            ([] if found.whole is None else [found.whole], {"whole": True}),
        )
        for reference, names in references.items():
            for several, kind in kinds:
                pairs = [pair for each in several if (pair := _first(each, names)) is not None]
                scores = [each for pair in pairs if (each := score(pair)) is not None]
                if scores:
                    stds = [each.std for each in scores if each.std is not None]
                    yield Score(
                        fmean(each.mean for each in scores),
                        fmean(stds) if stds else None,
                        n=len(pairs[0].images),
                        reference=reference,
                        **kind,
                    )

    return compute


def _first(pairs: Pairs, names: Sequence[str]) -> Pair | None:
    return next((pairs[name] for name in names if name in pairs), None)


def _inception_score(pair: Pair) -> MeanStd | None:
    probabilities = pair.images.probabilities
    if probabilities is None:
        return None
    return inception_score(probabilities, generator=pair.generator(5))


def _fid(pair: Pair) -> MeanStd:
    return MeanStd(frechet_distance(pair.reference.features, pair.images.features))


def _kid(pair: Pair) -> MeanStd:
    size = min(KID_SUBSET_SIZE, pair.smallest)
    found = kid(
        pair.reference.features,
        pair.images.features,
        subsets=KID_SUBSETS,
        subset_size=size,
        generator=pair.generator(6),
    )
    # Each subset may be all there is, which has no spread.
    whole = len(pair.images) == len(pair.reference) == size
    return MeanStd(found.mean) if whole else found


def _precision(pair: Pair) -> MeanStd:
    return MeanStd(share_near(pair.images.features, pair.reference.features))


def _recall(pair: Pair) -> MeanStd:
    return MeanStd(share_near(pair.reference.features, pair.images.features))


def _density(pair: Pair) -> MeanStd:
    return MeanStd(pair.manifold.density)


def _coverage(pair: Pair) -> MeanStd:
    return MeanStd(pair.manifold.coverage)


def _noise_position(comparison: Comparison) -> Iterator[Score]:
    generated, real = comparison.generated.images, comparison.real
    order = torch.arange(len(real.train))
    halves = len(real.test) >= 2 or can_be_halved(order, real.train.groups)
    if len(generated) >= 2 and len(real.train) >= 4 and halves:
        found = noise_position(
            generated,
            real.train.images,
            real.test.images,
            seed=comparison.seed,
            device=comparison.device,
            groups=real.train.groups,
        )
        yield Score(found.generated, n=len(generated))
        yield Score(found.real, n=found.n_real, real=True)


def _classification_accuracy(comparison: Comparison) -> Iterator[Score]:
    """Test a classifier of generated images, and one of as many real ones, on test images.

    Source: Ravuri & Vinyals 2019.
    """
    generated, train, test = comparison.generated, comparison.real.train, comparison.real.test
    if len(test) == 0:
        return
    number, config = len(generated), comparison.config
    missing = sorted(set(range(len(config.data.classes))) - set(generated.labels.tolist()))
    require(not missing, "generated.labels", "of every class", f"none of {missing}")
    model = train_classifier(
        generated,
        num_classes=len(config.data.classes),
        horizontal_flip=config.data.horizontal_flip,
        seed=comparison.seed,
        device=comparison.device,
    )
    yield Score(accuracy(model, test.images, test.labels), n=number)
    if number <= len(train):  # else there are not as many real ones to train on
        beside = comparison.classifier
        if number < len(train):
            chosen = random_order(len(train), comparison.seed, 4)[:number]
            beside = cached_classifier(config, train.subset(chosen), comparison.device)
        yield Score(accuracy(beside, test.images, test.labels), n=number, real=True)


def _real_accuracy(comparison: Comparison) -> Iterator[Score]:
    train, test = comparison.real.train, comparison.real.test
    if len(test) > 0:
        found = accuracy(comparison.classifier, test.images, test.labels)
        yield Score(found, n=len(train), real=True)


def _class_agreement(comparison: Comparison) -> Iterator[Score]:
    generated, test = comparison.generated, comparison.real.test
    classifier = comparison.classifier
    yield Score(accuracy(classifier, generated.images, generated.labels), n=len(generated))
    if torch.isin(test.labels, generated.labels).any():
        found = balanced_accuracy(classifier, test.images, test.labels, like=generated.labels)
        yield Score(found, n=len(test), real=True)


def _chance_agreement(comparison: Comparison) -> Iterator[Score]:
    labels = comparison.generated.labels
    yield Score(int(labels.bincount().max()) / len(labels), n=len(labels))


def of_copying(
    search: Callable[[Comparison], Copying | None], name: str, *, real: str = ""
) -> Callable[[Comparison], Iterable[Score]]:
    """Make the `compute` of a metric of the nearest training images.

    Args:
        search: finds them; None where there is nothing to hold them against.
        name: of what `Copying` tells of generated images.
        real: of what it tells of held-out ones; empty: nothing.
    """

    def compute(comparison: Comparison) -> Iterator[Score]:
        found = search(comparison)
        if found is not None:
            number, held_out = len(comparison.generated), len(comparison.searched)
            yield Score(getattr(found, name), n=number)
            if real:
                yield Score(getattr(found, real), n=held_out, real=True)

    return compute


FEATURES = frozenset({Use.EVALUATION, Use.ROUNDS})
CLASSES = frozenset({Use.EVALUATION, Use.END, Use.HOSPITALS_OF_CLASSES})
AGAINST = (
    "precision, recall, density and coverage: against the test images, or, where there are none, "
    "against the training images"
)
NEAR = (
    "nearest training image: medians, beside those of held-out images; nearer than held-out ones: "
    "the share of generated images by which more of them lie near a training image, relative to "
    "its neighbors, and the p value of that share where nothing is copied"
)


def _copying_metrics(
    space: str, search: Callable[[Comparison], Copying | None], uses: frozenset[Use]
) -> tuple[Metric, ...]:
    """List what is told of the nearest training images, in pixels or in features."""
    return (
        Metric(
            f"{space}_distance",
            f"nearest training image, {space}s",
            better=None,
            bounds=POSITIVE,
            compute=of_copying(search, "generated", real="held_out"),
            uses=uses,
            caption=NEAR,
        ),
        Metric(
            f"{space}_copied",
            f"nearer to training images than held-out ones, {space}s",
            better="lower",
            bounds=SHARE,
            compute=of_copying(search, "copied"),
            uses=uses | {Use.HOSPITALS, Use.GENERATORS},
            beside=False,
        ),
        Metric(
            f"{space}_p_value",
            f"p where nothing is copied, {space}s",
            better=None,
            bounds=SHARE,
            compute=of_copying(search, "p_value"),
            uses=uses | {Use.HOSPITALS},
            beside=False,
        ),
    )


# In the order of pages.
METRICS = {
    metric.name: metric
    for metric in (
        Metric(
            "noise_position",
            "between real (0) and noise (1)",
            better="lower",
            bounds=POSITIVE,
            compute=_noise_position,
            uses=FEATURES | {Use.END, Use.HOSPITALS, Use.SUMMARY},
            caption="between real and noise: the energy distance to the training images, in pixels "
            "or in the power at each spatial frequency, whichever is larger, as a share of that of "
            f"noise (the N(0, 1) that sampling starts from), of at most {MOST_COMPARED} images of "
            "each; 0 as near as real images, 1 as far as noise",
            through="pixels and spectra",
            most=MOST_COMPARED,
        ),
        Metric(
            "inception_score",
            "IS",
            better="higher",
            bounds=(1.0, math.inf),
            compute=of_features(_inception_score, TRAINING_IMAGES),
            uses=FEATURES | {Use.TABLES},
            caption="IS: the Inception score, over 10 splits of the images",
        ),
        Metric(
            "fid",
            "FD",
            better="lower",
            bounds=POSITIVE,
            compute=of_features(_fid, EACH),
            uses=FEATURES | {Use.HOSPITALS, Use.SUMMARY, Use.TABLES, Use.GENERATORS},
            caption="FD: the Frechet distance of features, FID where these are Inception's; it "
            "depends on n, compare equal n only",
        ),
        Metric(
            "kid",
            "KID",
            better="lower",
            bounds=(-math.inf, math.inf),
            compute=of_features(_kid, EACH),
            uses=FEATURES | {Use.HOSPITALS, Use.GENERATORS},
            caption="KID: the kernel distance of features, that of the literature where these are "
            f"Inception's; {KID_SUBSETS} subsets of at most {KID_SUBSET_SIZE:,} images",
        ),
        Metric(
            "precision",
            "precision",
            better="higher",
            bounds=SHARE,
            compute=of_features(_precision, TEST_IMAGES),
            uses=FEATURES | {Use.SUMMARY, Use.GENERATORS},
            caption=AGAINST,
        ),
        Metric(
            "recall",
            "recall",
            better="higher",
            bounds=SHARE,
            compute=of_features(_recall, TEST_IMAGES),
            uses=FEATURES | {Use.SUMMARY, Use.GENERATORS},
            caption=AGAINST,
        ),
        Metric(
            "density",
            "density",
            better=1.0,
            bounds=POSITIVE,
            compute=of_features(_density, TEST_IMAGES),
            uses=FEATURES | {Use.GENERATORS},
            caption=AGAINST,
        ),
        Metric(
            "coverage",
            "coverage",
            better="higher",
            bounds=SHARE,
            compute=of_features(_coverage, TEST_IMAGES),
            uses=FEATURES | {Use.GENERATORS},
            caption=AGAINST,
        ),
        Metric(
            "cas",
            "classification accuracy score",
            better="higher",
            bounds=SHARE,
            compute=_classification_accuracy,
            uses=frozenset({Use.EVALUATION, Use.GENERATORS}),
            caption="classification accuracy score: on the test images, of a classifier trained on "
            "the generated ones; real: of one trained on as many real ones",
        ),
        Metric(
            "cas_real",
            "classification accuracy, trained on all real images",
            better="higher",
            bounds=SHARE,
            compute=_real_accuracy,
            uses=frozenset({Use.EVALUATION}),
        ),
        Metric(
            "class_agreement",
            "found in the class asked for",
            better="higher",
            bounds=SHARE,
            compute=_class_agreement,
            uses=CLASSES | {Use.SUMMARY},
            caption="found in the class asked for: by a classifier trained on the real training "
            "images; real: held-out ones, in the proportions of the classes of the generated ones",
            through="a classifier trained on the real images",
        ),
        Metric(
            "chance_agreement",
            "found in the class asked for by chance",
            better=None,
            bounds=SHARE,
            compute=_chance_agreement,
            uses=CLASSES,
            beside=False,
        ),
        # Every run ends with a search in pixels, for which no network is needed.
        *_copying_metrics(
            "pixel",
            lambda comparison: comparison.pixel_copying,
            frozenset({Use.EVALUATION, Use.AUDIT, Use.END}),
        ),
        *_copying_metrics(
            "feature", lambda comparison: comparison.feature_copying, frozenset({Use.EVALUATION})
        ),
    )
}


def metrics_of(*uses: Use) -> list[Metric]:
    """List the metrics that have one of some uses."""
    return [metric for metric in METRICS.values() if metric.uses.intersection(uses)]
