"""The metrics of generated images, with the same of real images beside them."""

from collections.abc import Iterable, Iterator
from dataclasses import replace

import torch

from task.config import Config
from task.data import Dataset, ImageSet
from task.evaluation.comparison import (
    Comparison,
    RealFeatures,
    extract_real,
    looked_at,
    mirrors,
    paired,
)
from task.evaluation.features import FeatureExtractor, extract
from task.evaluation.metrics import Metric, Score, Use, metrics_of
from task.progress import progress
from task.runs.evaluations import Evaluation, Label, drawing
from task.runs.records import Record, Records

# Held-out images that every run searches for copies beside the generated ones.
MOST_SEARCHED = 1000


def scores_of(comparison: Comparison, metrics: Iterable[Metric]) -> Iterator[tuple[Metric, Score]]:
    """Compute metrics of generated images and of real ones.

    Raises:
        ValueError: there are too few images for one of them, or none of some class.
    """
    for metric in metrics:
        with progress(1, f"measuring {metric.title}"):
            scores = [*metric.compute(comparison)]
        yield from ((metric, score) for score in scores)


def _record(server_round: int, metric: Metric, score: Score, **context: object) -> Record:
    return Record(
        server_round,
        metric.name,
        score.value,
        reference=score.reference,
        real=score.real,
        std=score.std,
        n=score.n,
        context=context,
    )


def evaluate_images(
    config: Config,
    generated: ImageSet,
    dataset: Dataset,
    *,
    extractor: FeatureExtractor,
    server_round: int,
    real: RealFeatures | None = None,
    use: Use = Use.EVALUATION,
) -> Evaluation:
    """Measure generated images as a configuration says.

    Args:
        config: of the run, with absolute folders.
        generated: images with the classes that were asked for; in the paper as many of each as
            the test split has.
        dataset: the real images, in the shape of the generated ones. Without test images
            (`paired` says what is measured against what) there is no search for copies.
        extractor: of `build_extractor`.
        server_round: whose weights drew the images.
        real: of `extract_real`, where it is known.
        use: which metrics are computed.

    Raises:
        ValueError: there are too few images for a metric (10 of each set; 20 training images
            where there are no test images), images of another shape than the real ones, or none
            of some class.
    """
    comparison = Comparison(config, generated, dataset, extractor.device)
    real = real or extract_real(config, dataset, extractor)
    images = looked_at(config, extractor, generated.images, 9)
    features = extract(extractor, images, batch_size=config.eval.batch_size)
    pairs = paired(features, real, config.eval.seed)
    comparison = replace(comparison, features=features, real_features=real, pairs=pairs)
    label = _label(comparison, extractor, pairs.smallest)
    told = {name: getattr(label, name) for name in ("extractor", "image_range", "seed")}
    records: dict[bool, list[Record]] = {False: [], True: []}
    for metric, score in scores_of(comparison, metrics_of(use)):
        records[score.whole].append(_record(server_round, metric, score, **told))
    scored, whole = (Records(tuple(records[is_whole])) for is_whole in (False, True))
    return Evaluation(label, scored, whole, drawing(config, server_round))


def _label(comparison: Comparison, extractor: FeatureExtractor, smallest: int) -> Label:
    generated, real, config = comparison.generated, comparison.real, comparison.config
    return Label(
        data=config.data.name,
        extractor=extractor.name,
        extractor_sha256=extractor.sha256,
        image_range=extractor.image_range,
        real_flipped=mirrors(config, extractor),
        n_generated=len(generated),
        n_train=len(real.train),
        n_test=len(real.test),
        n_floor=smallest,
        n_scored=smallest,
        n_rarest=int(generated.labels.bincount(minlength=len(config.data.classes)).min()),
        seed=comparison.seed,
    )


def quick_measures(
    config: Config,
    generated: ImageSet,
    dataset: Dataset,
    *,
    server_round: int,
    device: torch.device,
    use: Use = Use.END,
) -> Records:
    """Measure what every run ends with: classes, the place between real and noise, and copies.

    Args:
        config: of the run, with absolute folders.
        generated: images with the classes that were asked for.
        dataset: the real ones.
        server_round: whose weights drew the images.
        device: that computes.
        use: which of these are measured.
    """
    comparison = Comparison(config, generated, dataset, device, most_searched=MOST_SEARCHED)
    found = [
        _record(server_round, metric, score)
        for metric, score in scores_of(comparison, metrics_of(use))
    ]
    held_out = len(comparison.searched)
    if held_out > 0:
        found.append(Record(server_round, "num_held_out", held_out))
    return Records(tuple(found))
