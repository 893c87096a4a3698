"""Search generated images for copies of training images, in pixels and in features."""

from dataclasses import dataclass

import torch
from torch import Tensor

from task.audit.findings import Search
from task.config import Config
from task.data import Dataset, ImageSet
from task.evaluation.comparison import extract_real, looked_at, one_of_each_patient
from task.evaluation.copy_measures import CopyMeasures, measure_copies
from task.evaluation.distances import Nearest
from task.evaluation.features import FeatureExtractor, extract
from task.evaluation.near_copies import Copying, TrainingImages
from task.progress import progress
from task.randomness import Stream, torch_generator

# Of images, to either side, at which a copy is still one.
MOST_SHIFTED = 1


@dataclass(frozen=True)
class MeasuredSearch(Search):
    """A search for copies, with further figures.

    Attributes:
        measures: that describe and find nothing.
    """

    measures: CopyMeasures


def search_copies(
    config: Config,
    generated: Tensor,
    dataset: Dataset,
    *,
    extractor: FeatureExtractor | None,
    device: torch.device,
) -> tuple[list[MeasuredSearch], Nearest]:
    """Search generated images for copies of training images.

    Args:
        config: `data.horizontal_flip`, `eval.seed` and `eval.batch_size` count.
        generated: [N, C, H, W] uint8.
        dataset: the training images, two at least, and as its test split those that were held out.
        extractor: whose features are compared; None: pixels alone are.
        device: that computes.

    Returns:
        The searches, and the training images that are nearest to the generated ones in pixels.
    """
    train, held_out = dataset.train.images, dataset.test.images
    pixels = TrainingImages(train.to(device), config.data.horizontal_flip, MOST_SHIFTED)
    search, nearest = _searched("pixels", pixels, generated, held_out, config.eval.seed)
    if extractor is None:
        return [search], nearest
    real = extract_real(config, dataset, extractor)
    seen = looked_at(config, extractor, generated, 9)
    found = extract(extractor, seen, batch_size=config.eval.batch_size)
    in_features, _ = _searched(
        f"features ({extractor.name})",
        TrainingImages(real.train.features),
        found.features,
        real.held_out.features,
        config.eval.seed,
    )
    return [search, in_features], nearest


def single_images(held_out: ImageSet, seed: int) -> ImageSet:
    """Draw one image of each patient at random, to be searched beside generated ones."""
    order = torch.randperm(len(held_out), generator=torch_generator(seed, Stream.AUDIT, 3))
    return held_out.subset(one_of_each_patient(held_out, order))


def _searched(
    space: str, train: TrainingImages, generated: Tensor, held_out: Tensor, seed: int
) -> tuple[MeasuredSearch, Nearest]:
    with progress(1, f"searching for copies in {space}"):
        near, real = train.nearest(generated), train.nearest(held_out)
        measures = measure_copies(train, near, real, seed=seed)
    return MeasuredSearch(
        space, Copying.of(near, real), len(generated), len(held_out), measures
    ), near
