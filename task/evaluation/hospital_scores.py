"""How images that a server drew compare with one hospital's own, in a few numbers."""

from pathlib import Path
from typing import cast

import torch
from torch import Tensor

from task.checks import require
from task.config import MIN_MEASURED_IMAGES, Config
from task.data import Dataset, ImageSet
from task.evaluation.classifier import accuracy, balanced_accuracy
from task.evaluation.copying import feature_copying, pixel_copying
from task.evaluation.distances import frechet_distance, kid
from task.evaluation.evaluate import KID_SUBSET_SIZE, KID_SUBSETS, chance_agreement, extract_real
from task.evaluation.features import Features, build_extractor, cached_classifier, extract
from task.evaluation.noise_position import noise_position
from task.protocol.wire import Key
from task.randomness import Stream, torch_generator

Scores = dict[Key, int | float]


def score_images(
    config: Config, generated: ImageSet, own: Dataset, *, device: torch.device
) -> Scores:
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
        "num-examples", the held-out images, and the scores; "num-examples" of 0 and nothing else
        where a distance would compare fewer than `MIN_MEASURED_IMAGES` images. The scores of a
        classifier are left out where all training images are of one class, which it always finds.

    Raises:
        FileNotFoundError: the extractor's file is missing.
        ValueError: the images have another shape than the run's, or a label is out of range.
    """
    check_generated(config, generated)
    known = generated.subset(torch.isin(generated.labels, own.train.labels))
    compared, stand_ins = in_proportion(
        own.test.labels,
        known.labels,
        own.train.labels,
        num_classes=len(config.data.classes),
        generator=torch_generator(config.eval.seed, Stream.METRICS, 7),
    )
    if min(len(compared), len(own.test)) < MIN_MEASURED_IMAGES:
        return {Key.NUM_EXAMPLES: 0}
    scores: Scores = {
        Key.NUM_EXAMPLES: len(own.test),
        **_scores_of_features(config, known, own, compared, stand_ins, device),
        **_scores_of_pixels(config, known, own, device),
    }
    if len(set(own.train.labels.tolist())) < 2:
        return scores
    return scores | _scores_of_classes(config, known, own, device)


def _scores_of_features(
    config: Config,
    known: ImageSet,
    own: Dataset,
    compared: Tensor,
    stand_ins: Tensor,
    device: torch.device,
) -> Scores:
    """Measure distances and copies in features; the indices are of `in_proportion`."""
    extractor = build_extractor(config, own.train, device)
    seed, batch_size = config.eval.seed, config.eval.batch_size
    real = extract_real(
        own,
        extractor=extractor,
        data_name=config.data.name,
        seed=seed,
        batch_size=batch_size,
        cache_dir=Path(config.data.cache_dir),
    )
    held_out = cast(Features, real.test)  # of images that are there
    seen = extract(extractor, known.images, batch_size=batch_size)
    fid, kernel = _distances(seen.subset(compared), held_out, seed)
    floor_fid, floor_kernel = _distances(real.train.subset(stand_ins), held_out, seed)
    copies = feature_copying(seen, real.train, held_out)
    return {
        Key.FID: fid,
        Key.FLOOR_FID: floor_fid,
        Key.KID: kernel,
        Key.FLOOR_KID: floor_kernel,
        Key.FEATURE_COPIED: copies.copied,
        Key.FEATURE_P_VALUE: cast(float, copies.p_value),
    }


def _scores_of_pixels(
    config: Config, known: ImageSet, own: Dataset, device: torch.device
) -> Scores:
    """Search for copies in pixels, and find the place between real images and noise."""
    position = noise_position(
        known.images, own.train.images, own.test.images, seed=config.eval.seed, device=device
    )
    copies = pixel_copying(known, own, horizontal_flip=config.data.horizontal_flip, device=device)
    return {
        Key.NOISE_POSITION: position.generated,
        Key.FLOOR_NOISE_POSITION: position.real,
        Key.PIXEL_COPIED: copies.copied,
        Key.PIXEL_P_VALUE: cast(float, copies.p_value),
    }


def _scores_of_classes(
    config: Config, known: ImageSet, own: Dataset, device: torch.device
) -> Scores:
    """Let a classifier of the training images find the classes that were asked for."""
    classifier = cached_classifier(
        own.train,
        num_classes=len(config.data.classes),
        horizontal_flip=config.data.horizontal_flip,
        seed=config.eval.seed,
        device=device,
        cache_dir=Path(config.data.cache_dir),
    )
    return {
        Key.CLASS_AGREEMENT: accuracy(classifier, known.images, known.labels),
        Key.HELD_OUT_ACCURACY: balanced_accuracy(
            classifier, own.test.images, own.test.labels, like=known.labels
        ),
        Key.CHANCE_AGREEMENT: chance_agreement(known.labels),
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


def _distances(images: Features, held_out: Features, seed: int) -> tuple[float, float]:
    mean, _ = kid(
        held_out.features,
        images.features,
        subsets=KID_SUBSETS,
        subset_size=min(KID_SUBSET_SIZE, len(images), len(held_out)),
        generator=torch_generator(seed, Stream.METRICS, 6),
    )
    return frechet_distance(held_out.features, images.features), mean
