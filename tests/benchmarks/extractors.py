"""Which extractor puts known faults of real images in order, and how clearly it sees the mildest.

Held-out real images stand for generated ones: blurred, noisy, blended with an image of another
class, with fewer of some classes, or replaced by training images, each in three degrees.
"""

import tempfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from statistics import mean, stdev

import torch
from torch import Tensor
from torchvision.transforms.functional import gaussian_blur

from task.config import Config, load_config
from task.data import Dataset, ImageSet, build_dataset
from task.evaluation.distances import (
    density_coverage,
    frechet_distance,
    kid,
    neighbor_distances,
    share_near,
)
from task.evaluation.features import build_extractor, extract
from task.evaluation.near_copies import copying_test
from task.training.devices import select_device
from tests.benchmarks.report import CHECKOUT, Figures

SHARED = CHECKOUT.parent / "shared" / "data"
EXTRACTORS = ("classifier", "efficientnet")
# Splits of the real images, over which spread and means are taken.
SPLITS = 3
# By fault its degrees, from mild to grave: pixels, standard deviation of 255, weight of the other
# image, share of the images of half of the classes, share of the images.
DEGREES: dict[str, tuple[float, ...]] = {
    "blur": (0.4, 0.7, 1.2),
    "noise": (4.0, 10.0, 25.0),
    "blend": (0.1, 0.2, 0.4),
    "drop": (0.3, 0.6, 1.0),
    "copies": (0.1, 0.3, 0.6),
}


def measure(*, full: bool, device: str) -> Figures:
    """Measure faults of blood cells and of Fashion-MNIST through each extractor.

    Args:
        full: 300 faulty images against 1,200 real ones in place of 100 against 400.
        device: auto, cpu, cuda or cuda:N.

    Returns:
        By data set, extractor, fault and metric the share of pairs of degrees (none among them)
        that are in order, `..._share`, and how many standard deviations over splits the mildest
        degree lies above none, `..._sigmas`. For copies the metric is the share that is found.

    Raises:
        FileNotFoundError: the real images are not there.
    """
    number = 600 if full else 200
    found: Figures = {"extractors.images": float(number)}
    with tempfile.TemporaryDirectory() as folder:
        for words in _data_sets(Path(folder)):
            config = load_config([*words, f"data.cache_dir={folder}/cache"])
            dataset = build_dataset(config, download=False)
            for name in EXTRACTORS:
                chosen = config.changed({"eval.extractor": name})
                label = f"extractors.{config.data.name}.{name}"
                found |= _faults(chosen, dataset, number, device, label)
    return found


def _data_sets(folder: Path) -> list[list[str]]:
    if not SHARED.is_dir():
        raise FileNotFoundError(f"the real images are not in {SHARED}")
    with zipfile.ZipFile(SHARED / "bccd.zip") as archive:
        archive.extractall(folder / "cells")
    (root,) = {found.parent for found in (folder / "cells").rglob("train")}
    return [
        [
            "data=blood_cells",
            f"data.root={root}",
            "data.test_fraction=0.3",
        ],
        ["data=fashion_mnist", f"data.root={SHARED}"],
    ]


def _faults(config: Config, dataset: Dataset, number: int, device: str, label: str) -> Figures:
    """Measure each fault in each degree, over splits of the images that the classifier saw not."""
    extractor = build_extractor(config, dataset.train, select_device(device))
    scores: dict[tuple[str, str], list[list[float]]] = {}

    def features(images: Tensor) -> Tensor:
        return extract(extractor, images).features

    for split in range(SPLITS):
        generator = torch.Generator().manual_seed(split)
        order = torch.randperm(len(dataset.test), generator=generator)[: number // 2]
        rest = torch.randperm(len(dataset.train), generator=generator)[: 2 * number]
        images = dataset.test.subset(order)
        reference = dataset.train.subset(rest)
        real = features(reference.images)
        for fault, degrees in DEGREES.items():
            values = [
                _metrics(features(each), real, fault, features, dataset, order)
                for each in (
                    _faulty(images, reference, fault, degree, generator)
                    for degree in (0.0, *degrees)
                )
            ]
            for metric in values[0]:
                of_split = [value[metric] for value in values]
                scores.setdefault((fault, metric), []).append(of_split)
    return {
        f"{label}.{fault}_{metric}_{unit}": value
        for (fault, metric), splits in scores.items()
        for unit, value in (("share", _in_order(splits)), ("sigmas", _sigmas(splits)))
    }


def _metrics(
    found: Tensor,
    real: Tensor,
    fault: str,
    features: Callable[[Tensor], Tensor],
    dataset: Dataset,
    taken: Tensor,
) -> dict[str, float]:
    """Return metrics that grow with a fault."""
    if fault == "copies":
        others = torch.ones(len(dataset.test), dtype=torch.bool)
        others[taken] = False
        held_out = features(dataset.test.images[others][: len(found)])
        _, share = copying_test(
            neighbor_distances(found, real).ratio, neighbor_distances(held_out, real).ratio
        )
        return {"copied": share}
    size = min(len(found), len(real))
    near = kid(
        real, found, subsets=10, subset_size=size, generator=torch.Generator().manual_seed(0)
    )
    return {
        "fd": frechet_distance(real, found),
        "kid": near.mean,
        "precision": 1 - share_near(found, real),
        "recall": 1 - share_near(real, found),
        "coverage": 1 - density_coverage(real, found).coverage,
    }


def _faulty(
    images: ImageSet, reference: ImageSet, fault: str, degree: float, generator: torch.Generator
) -> Tensor:
    """Return images [N, C, H, W] uint8 with a fault; those of degree 0 as they are."""
    real = images.images
    if fault == "drop":
        kept = _kept(images.labels, degree, generator)
        return real[kept[torch.randint(len(kept), (len(real),), generator=generator)]]
    if degree == 0:
        return real
    if fault == "blur":
        blurred: Tensor = gaussian_blur(real, kernel_size=[9, 9], sigma=[degree])
        return blurred
    if fault == "noise":
        noise = torch.randn(real.shape, generator=generator) * degree
        return (real + noise).round().clamp(0, 255).byte()
    order = torch.randperm(len(real), generator=generator)
    if fault == "blend":
        other = torch.stack(
            [
                real[next(i for i in order.roll(n).tolist() if images.labels[i] != label)]
                for n, label in enumerate(images.labels)
            ]
        )
        return (real * (1 - degree) + other * degree).round().byte()
    number = round(degree * len(real))
    return torch.cat([reference.images[:number], real[order[number:]]])


def _kept(labels: Tensor, degree: float, generator: torch.Generator) -> Tensor:
    """Return the indices of images that a drop of half of the classes leaves, [M] int64."""
    classes = sorted(set(labels.tolist()))
    dropped = torch.tensor(classes[(len(classes) + 1) // 2 :])
    drawn = torch.rand(len(labels), generator=generator) < degree
    return (~(torch.isin(labels, dropped) & drawn)).nonzero().flatten()


def _in_order(splits: list[list[float]]) -> float:
    pairs = [
        values[milder] < values[graver]
        for values in splits
        for graver in range(len(values))
        for milder in range(graver)
    ]
    return mean(map(float, pairs))


def _sigmas(splits: list[list[float]]) -> float:
    """Return how far the mildest degree lies above none, in standard deviations of none."""
    none, mild = ([values[degree] for values in splits] for degree in (0, 1))
    spread = stdev(none)
    return (mean(mild) - mean(none)) / spread if spread > 0 else 0.0
