"""The augmentation study: is a classifier better when generated images fill up its training set?

Real images are split by patient: those that train, those that choose, and those that test, which
neither a generator nor a classifier has seen.
"""

import hashlib
import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from task.checks import require
from task.config.study_config import StudyConfig
from task.data import Dataset, ImageSet
from task.data.split import split_validation
from task.evaluation.distances import neighbor_distances
from task.evaluation.study.arms import (
    Arm,
    ArmKind,
    list_arms,
    places_of_classes,
    real_places,
    synthetic_counts,
)
from task.evaluation.study.classifiers import ClassifierKind, build_classifier
from task.evaluation.study.fitting import (
    NUM_VIEWS,
    Fit,
    Inputs,
    augmented,
    fit_classifier,
    inputs_of,
    num_steps,
)
from task.progress import duration, progress
from task.randomness import Stream, numpy_generator, torch_generator
from task.runs.checkpoint import load_weights, save_weights

# Root mean square difference of pixels in [0, 1], below which two images are called nearly equal.
NEARLY_EQUAL = 0.02
FITS = "fits"


@dataclass(frozen=True, eq=False)
class Hospitals:
    """Whose images are whose.

    Attributes:
        train: [number of training images] int64, the number of the hospital of each.
        validation: [number of validation images] int64, likewise.
        test: [number of test images] int64, likewise.
    """

    train: Tensor
    validation: Tensor
    test: Tensor


@dataclass(frozen=True, eq=False)
class Material:
    """The images of a study.

    Attributes:
        classes: their names.
        train: real, that generators and classifiers are trained on.
        validation: real, that no generator has seen, and that choose among weights and ratios.
        test: real, that neither a generator nor a classifier has seen.
        sources: generated images, by the name of the run that drew them.
        hospitals: whose each image is; None: of one place.
        left_out: by source, how many generated images were left out, by reason.
        nearly_equal: validation and test images that are nearly equal to a training image.
        nearly_equal_within: test images that are nearly equal to a validation image.
    """

    classes: Sequence[str]
    train: ImageSet
    validation: ImageSet
    test: ImageSet
    sources: Mapping[str, ImageSet]
    hospitals: Hospitals | None = None
    left_out: Mapping[str, Mapping[str, int]] = field(default_factory=dict)
    nearly_equal: int = 0
    nearly_equal_within: int = 0

    @property
    def patients(self) -> np.ndarray:
        """Whose each test image is, [N] int64; its own where patients are not known."""
        groups = self.test.groups
        return np.arange(len(self.test)) if groups is None else groups.numpy()


def split_test(
    dataset: Dataset, classes: Sequence[str], study: StudyConfig
) -> tuple[Tensor, Tensor]:
    """Part the test images by patient into those that choose and those that are measured on.

    Not the training images: the generator has seen all of them.

    Returns:
        The places of both among the test images, [M] int64.

    Raises:
        ValueError: a patient is in both splits of the data set, there are no test images, a class
            has no image to train on or to choose by, or fewer than two are measured on.
    """
    require(len(dataset.test) > 0, "the data set", "one with test images", "none")
    train, test = dataset.train, dataset.test
    if train.groups is not None and test.groups is not None:
        shared = np.intersect1d(train.groups.numpy(), test.groups.numpy())
        require(
            len(shared) == 0,
            "the split of the data set",
            "one in which no patient has images on both sides",
            f"{len(shared)} patients on both",
        )
    groups = None if test.groups is None else test.groups.numpy()
    generator = numpy_generator(study.seed, Stream.STUDY, 3)
    measured, chosen = split_validation(
        test.labels.numpy(), study.val_fraction, generator=generator, groups=groups
    )
    for name, labels in (("train on", train.labels), ("choose by", test.labels[chosen])):
        counts = labels.bincount(minlength=len(classes))
        for label in sorted({*test.labels.tolist()}):
            require(
                int(counts[label]) > 0,
                f"images of class {classes[label]} to {name}",
                "at least one (see study.val_fraction)",
                0,
            )
    there = {*test.labels[measured].tolist()}
    require(
        len(there) > 1,
        "the images to measure on",
        "of two classes at least (see study.val_fraction and data.test_fraction)",
        [classes[label] for label in sorted(there)],
    )
    return torch.from_numpy(chosen), torch.from_numpy(measured)


def nearness(images: ImageSet, train: ImageSet, *, mirrors: bool) -> tuple[Tensor, Tensor]:
    """Tell how near images come to training images.

    Args:
        images: to be looked at.
        train: the training images.
        mirrors: whether these count mirrored as well.

    Returns:
        The root mean square difference of pixels in [0, 1] to the nearest, [N] float64, and the
        same beside the next ones; see `neighbor_distances`.
    """
    pixels = train.images
    if mirrors:
        pixels = torch.cat([pixels, pixels.flip(-1)])
    found = neighbor_distances(images.images.flatten(1), pixels.flatten(1))
    return found.distance / (255 * pixels[0].numel() ** 0.5), found.ratio


def count_nearly_equal(images: ImageSet, train: ImageSet, *, mirrors: bool) -> int:
    """Count the images that are equal to a training image, or differ in hardly a pixel."""
    return int((nearness(images, train, mirrors=mirrors)[0] < NEARLY_EQUAL).sum())


def without_copies(
    generated: ImageSet,
    train: ImageSet,
    validation: ImageSet,
    share: float,
    *,
    mirrors: bool,
) -> ImageSet:
    """Leave out generated images that lie nearer to a training image than real ones do.

    Args:
        generated: the images.
        train: the training images.
        validation: real images that were not trained on, which show how near those come; such as
            are nearly equal to a training image say nothing of that.
        share: of these that come as near as what is left out; 0: nothing is left out.
        mirrors: whether training images count mirrored as well.
    """
    if share == 0:
        return generated
    pixels, relative = nearness(generated, train, mirrors=mirrors)
    of_real, usual = nearness(validation, train, mirrors=mirrors)
    usual = usual[of_real >= NEARLY_EQUAL]
    least = usual.quantile(share) if len(usual) else 0.0
    return generated.subset(((relative >= least) & (pixels >= NEARLY_EQUAL)).nonzero().flatten())


@dataclass(frozen=True, eq=False)
class ArmResult:
    """What the classifiers of an arm say.

    Attributes:
        arm: what they were trained on.
        num_real: real images, of each classifier.
        num_synthetic: generated images, likewise.
        fits: the classifiers.
        runs: of those that runs have trained, what is known of each run.
    """

    arm: Arm
    num_real: list[int]
    num_synthetic: list[int]
    fits: list[Fit]
    runs: Sequence[Mapping[str, Any]] = ()


class Study:
    """The classifiers of all arms: trained where they are not on disk yet.

    Attributes:
        kind: the network.
        steps: of the optimizer, of every fit.
    """

    def __init__(
        self,
        material: Material,
        study: StudyConfig,
        folder: Path,
        *,
        mirrors: bool,
        device: torch.device,
    ) -> None:
        """Find the network; nothing is trained yet.

        Args:
            material: the images.
            study: what is to be done.
            folder: where fits are kept, so that a study goes on where it stopped.
            mirrors: whether augmentation may mirror.
            device: that trains.

        Raises:
            FileNotFoundError: weights of the classifier are missing.
            ValueError: there is no such classifier.
        """
        self._material, self._study, self._folder = material, study, folder
        self._mirrors, self._device = mirrors, device
        _, channels, image_size, _ = material.train.images.shape
        self.kind: ClassifierKind = build_classifier(
            study,
            channels=channels,
            image_size=image_size,
            num_classes=len(material.classes),
            device=device,
        )
        self.steps = num_steps(study, len(material.train))
        self._inputs: dict[tuple[str, str], Inputs] = {}
        self._seconds_looking = 0.0

    def results(self, say: Callable[[str], object]) -> Iterator[ArmResult]:
        """Train what is not on disk, and yield the arms that have images, in their order."""
        seeds = range(self._study.num_seeds)
        arms = [
            arm
            for arm in list_arms(self._study, [*self._material.sources], self._hospitals())
            if all(sum(map(len, self._places(arm, seed))) > 0 for seed in seeds)
        ]
        todo = {(arm, seed) for arm in arms for seed in seeds if not self._file(arm, seed).exists()}
        done, start = 0, time.monotonic()
        if todo:
            total = len(arms) * len(seeds)
            say(f"{total - len(todo)} of {total} classifiers are there; {self.steps} steps each")
        for arm in arms:
            for seed in seeds:
                if (arm, seed) in todo:
                    self._save(self._file(arm, seed), self._train(arm, seed))
                    done += 1
                    # Images are looked at once, whatever the number of classifiers.
                    spent = time.monotonic() - start - self._seconds_looking
                    left = spent / done * (len(todo) - done)
                    of = (
                        f"of {arm.fraction:g} of the real images"
                        if arm.hospital is None
                        else f"at hospital {arm.hospital}"
                    )
                    say(
                        f"{arm.title} {of}, seed {seed}: "
                        f"{done} of {len(todo)} trained, about {duration(left)} left"
                    )
            places = [self._places(arm, seed) for seed in seeds]
            yield ArmResult(
                arm,
                [len(real) for real, _ in places],
                [len(generated) for _, generated in places],
                [self._read(self._file(arm, seed)) for seed in seeds],
            )

    def misclassified(self, generated: ImageSet) -> Tensor:
        """Tell in which images a classifier trained on all real ones finds another class, [N]."""
        told = [*self._basis(), self._study.balance, _digest(self._material.train)]
        told.append(_digest(generated))
        file = self._folder / FITS / f"judge-{_short_hash(told)}.safetensors"
        if not file.exists():
            judged = inputs_of(self.kind, generated, self._device)
            train = self._looked_at("real", "train")
            choosing = self._looked_at("real", "validation")
            self._save(file, self._fit(train, choosing, judged, 0, self._study.balance))
        return self._read(file).test.argmax(1) != generated.labels

    def _places(self, arm: Arm, seed: int) -> tuple[Tensor, Tensor]:
        """Say which real and which generated images a classifier is trained on."""
        train, hospitals = self._material.train, self._material.hospitals
        places = real_places(train, arm.fraction, self._study.seed + seed)
        counts = train.labels[places].bincount(minlength=len(self._material.classes)).tolist()
        if arm.kind is ArmKind.SYNTHETIC:
            places = places[:0]
        elif arm.hospital is not None and hospitals is not None:
            places = (hospitals.train == arm.hospital).nonzero().flatten()
        if not arm.is_synthetic:
            return places, places[:0]
        fill = self._study.fill if arm.kind is ArmKind.BOTH else "all"
        wanted = synthetic_counts(counts, arm.ratio, fill)
        # Others in each seed, whose spread is then that of the images as well.
        rng = torch_generator(self._study.seed, Stream.STUDY, 6, seed)
        return places, places_of_classes(self._material.sources[arm.source].labels, wanted, rng)

    def _hospitals(self) -> list[int]:
        """Number those that have images to train and to test a classifier of their own."""
        hospitals = self._material.hospitals
        if not self._study.hospitals or hospitals is None:
            return []
        return sorted({*hospitals.train.tolist()} & {*hospitals.test.tolist()})

    def _train(self, arm: Arm, seed: int) -> Fit:
        of_real, of_synthetic = self._places(arm, seed)
        view = "augmented" if arm.kind is ArmKind.AUGMENTED else "train"
        train = self._looked_at("real", view).subset(of_real)
        if len(of_synthetic):
            generated = self._looked_at("generated", arm.source).subset(of_synthetic)
            train = train.joined(generated) if len(of_real) else generated
        oversamples = arm.kind is ArmKind.OVERSAMPLED
        balance = "oversample" if oversamples else self._study.balance
        validation = self._looked_at("real", "validation").subset(self._choosing(arm.hospital))
        return self._fit(train, validation, self._looked_at("real", "test"), seed, balance)

    def _choosing(self, hospital: int | None) -> Tensor:
        """Return the places of the validation images that choose: a hospital alone has its own."""
        hospitals = self._material.hospitals
        if hospital is None or hospitals is None:
            return torch.arange(len(self._material.validation))
        return (hospitals.validation == hospital).nonzero().flatten()

    def _fit(self, train: Inputs, validation: Inputs, test: Inputs, seed: int, balance: str) -> Fit:
        return fit_classifier(
            self.kind,
            train,
            validation,
            test,
            study=self._study,
            steps=self.steps,
            seed=seed,
            balance=balance,
            num_classes=len(self._material.classes),
            device=self._device,
        )

    def _save(self, file: Path, fit: Fit) -> None:
        file.parent.mkdir(parents=True, exist_ok=True)
        tensors = {"validation": fit.validation, "test": fit.test}
        save_weights(file, tensors, {"step": str(fit.step)})

    def _read(self, file: Path) -> Fit:
        tensors, told = load_weights(file)
        return Fit(tensors["validation"], tensors["test"], int(told["step"]))

    def _file(self, arm: Arm, seed: int) -> Path:
        """Name the file of a classifier by all that decides about it."""
        material, (of_real, of_synthetic) = self._material, self._places(arm, seed)
        told = [*self._basis(), seed, arm.kind.name, self._mirrors, self._study.balance]
        told.append(_digest(material.train, of_real))
        if arm.hospital is not None:
            told.append(_digest(material.validation, self._choosing(arm.hospital)))
        if arm.is_synthetic:
            told.append(_digest(material.sources[arm.source], of_synthetic))
        return self._folder / FITS / f"{arm.key}-seed-{seed}-{_short_hash(told)}.safetensors"

    def _basis(self) -> list[Any]:
        """Return what decides about every classifier."""
        kind, study = self.kind, self._study
        return [
            *(kind.title, kind.sha256, kind.lr, kind.lower_lr, study.fine_tuning),
            *(self.steps, study.batch_size, study.seed),
            *(_digest(getattr(self._material, name)) for name in ("validation", "test")),
        ]

    def _looked_at(self, origin: str, name: str) -> Inputs:
        """Return a set as the trained part of the classifier takes it; computed once."""
        if (origin, name) not in self._inputs:
            start = time.monotonic()
            changes, images = None, self._images(origin, name)
            if name == "augmented" and origin == "real":
                rng = torch_generator(self._study.seed, Stream.STUDY, 4)
                changes = augmented(rng, mirrors=self._mirrors)
            number = len(images) * (1 if changes is None else NUM_VIEWS)
            with progress(number, f"looking at {number:,} images") as advance:
                self._inputs[origin, name] = inputs_of(
                    self.kind, images, self._device, changes=changes, advance=advance
                )
            self._seconds_looking += time.monotonic() - start
        return self._inputs[origin, name]

    def _images(self, origin: str, name: str) -> ImageSet:
        if origin == "generated":
            return self._material.sources[name]
        images: ImageSet = getattr(self._material, "train" if name == "augmented" else name)
        return images


def _digest(images: ImageSet, places: Tensor | None = None) -> str:
    """Return what images and their classes, or those at some places, are known by."""
    chosen = images if places is None else images.subset(places)
    found = hashlib.sha256(chosen.images.contiguous().numpy().data)
    found.update(chosen.labels.numpy().tobytes())
    return found.hexdigest()


def _short_hash(told: Sequence[Any]) -> str:
    return hashlib.sha256(json.dumps(told).encode()).hexdigest()[:16]


def describe_counts(material: Material) -> dict[str, Any]:
    """Return how many images of each class, and how many patients, each split has."""
    number = len(material.classes)
    described: dict[str, Any] = {}
    for name in ("train", "validation", "test"):
        images: ImageSet = getattr(material, name)
        described[name] = {
            "images": len(images),
            "by_class": images.labels.bincount(minlength=number).tolist(),
            "patients": None if images.groups is None else len({*images.groups.tolist()}),
        }
    return described
