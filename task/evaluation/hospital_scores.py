"""How images that a server drew compare with one hospital's own, in a few numbers."""

import torch
from torch import Tensor

from task.checks import require
from task.config import MIN_MEASURED_IMAGES, Config
from task.data import Dataset, ImageSet
from task.evaluation.comparison import Comparison, FeaturePairs, Pair, extract_real
from task.evaluation.evaluate import scores_of
from task.evaluation.features import build_extractor, extract
from task.evaluation.metrics import Use, metrics_of
from task.protocol.wire import Key
from task.randomness import Stream, torch_generator
from task.runs.records import HELD_OUT

# By `Metric.key`, and "num-examples": the held-out images.
HospitalScores = dict[str, int | float]


def score_images(
    config: Config, generated: ImageSet, own: Dataset, *, device: torch.device
) -> HospitalScores:
    """Score generated images against the images of one hospital.

    Distances to the held-out images are those of generated images and, for the floor, of training
    images. Both are as many, of each class in the proportion of the held-out ones, because a
    distance depends on the number of images and on the mixture of their classes. All generated
    images of the classes that were trained on are shown to the classifier and searched for copies.

    Args:
        config: of the run, with the hospital's own extractor and cache.
        generated: images with the classes that were asked for.
        own: the hospital's training images, and those that it holds out, as the test split.
        device: that computes.

    Returns:
        The scores; "num-examples" of 0 and nothing else where a distance would compare fewer than
        `MIN_MEASURED_IMAGES` images. The scores of a classifier are left out where all training
        images are of one class, which it always finds.

    Raises:
        FileNotFoundError: the extractor's file is missing.
        ValueError: the images have another shape than the run's, or a label is out of range.
    """
    check_generated(config, generated)
    known = generated.subset(torch.isin(generated.labels, own.train.labels))
    seed = config.eval.seed
    compared, stand_ins = in_proportion(
        own.test.labels,
        known.labels,
        own.train.labels,
        num_classes=len(config.data.classes),
        generator=torch_generator(seed, Stream.METRICS, 7),
    )
    smallest = min(len(compared), len(own.test))
    if smallest < MIN_MEASURED_IMAGES:
        return {Key.NUM_EXAMPLES: 0}
    extractor = build_extractor(config, own.train, device)
    real = extract_real(config, own, extractor, keep=True)
    features = extract(extractor, known.images, batch_size=config.eval.batch_size)
    generated_pair, floor = (
        {HELD_OUT: Pair(chosen, real.held_out, seed, smallest)}
        for chosen in (features.subset(compared), real.train.subset(stand_ins))
    )
    comparison = Comparison(
        config, known, own, device, features, real, FeaturePairs([generated_pair], floor)
    )
    of_classes = [Use.HOSPITALS_OF_CLASSES] if len(set(own.train.labels.tolist())) > 1 else []
    scores = scores_of(comparison, metrics_of(Use.HOSPITALS, *of_classes))
    return {
        Key.NUM_EXAMPLES: len(own.test),
        **{metric.key(real=score.real): score.value for metric, score in scores},
    }


def check_generated(config: Config, generated: ImageSet) -> None:
    """Check that images are such as the model of a run draws.

    Raises:
        ValueError: they have another shape, or a label is out of range.
    """
    data = config.data
    shape = (data.channels, data.image_size, data.image_size)
    require(
        tuple(generated.images.shape[1:]) == shape,
        "generated images",
        f"[N, {', '.join(map(str, shape))}]",
        tuple(generated.images.shape),
    )
    labels, num_classes = generated.labels, len(data.classes)
    require(
        bool(((labels >= 0) & (labels < num_classes)).all()),
        "generated labels",
        f"in [0, {num_classes})",
        sorted(set(labels.tolist()))[:num_classes],
    )


def in_proportion(
    held_out: Tensor, *others: Tensor, num_classes: int, generator: torch.Generator
) -> list[Tensor]:
    """Choose images of several sets at random, as many of each class from every one of them.

    They are as many as the sets have in the proportions of the held-out images, rounded down. A
    class that one of the sets lacks is left out.

    Args:
        held_out: labels, [N] int64 in [0, num_classes).
        *others: labels of the sets to choose from.
        num_classes: number of classes.
        generator: on the CPU, chooses.

    Returns:
        Indices into each of the sets, [M] int64, M equal for all.
    """
    wanted = held_out.bincount(minlength=num_classes)
    counts = [labels.bincount(minlength=num_classes) for labels in others]
    there = torch.stack(counts).amin(0)
    shared = ((wanted > 0) & (there > 0)).nonzero().flatten()
    if len(shared) == 0:
        return [wanted.new_empty(0) for _ in others]
    scarcest = shared[(there[shared].double() / wanted[shared]).argmin()]
    # Whole numbers, because a rounded quotient could lose an image of the scarcest class.
    chosen = torch.minimum(wanted * there[scarcest] // wanted[scarcest], there)
    return [_some_of_each(labels, chosen, generator) for labels in others]


def _some_of_each(labels: Tensor, counts: Tensor, generator: torch.Generator) -> Tensor:
    order = torch.randperm(len(labels), generator=generator)
    return torch.cat(
        [order[labels[order] == label][:count] for label, count in enumerate(counts.tolist())]
    )
