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
    first_of_class,
    list_arms,
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
class Material:
    """The images of a study.

    Attributes:
        classes: their names.
        train: real, that classifiers are trained on.
        validation: real, that choose among weights and among ratios.
        test: real, that neither a generator nor a classifier has seen.
        sources: generated images, by the name of the run that drew them.
        hospitals: [number of test images] int64, whose each is; None: of one place.
        left_out: by source, how many generated images were left out, by reason.
        nearly_equal: test images that are nearly equal to a training image.
    """

    classes: Sequence[str]
    train: ImageSet
    validation: ImageSet
    test: ImageSet
    sources: Mapping[str, ImageSet]
    hospitals: Tensor | None = None
    left_out: Mapping[str, Mapping[str, int]] = field(default_factory=dict)
    nearly_equal: int = 0

    @property
    def patients(self) -> np.ndarray:
        """Whose each test image is, [N] int64; its own where patients are not known."""
        groups = self.test.groups
        return np.arange(len(self.test)) if groups is None else groups.numpy()


def split_real(
    dataset: Dataset, classes: Sequence[str], study: StudyConfig
) -> tuple[ImageSet, ImageSet]:
    """Part the training images by patient into those that train and those that choose.

    Raises:
        ValueError: a patient is in both splits of the data set, there are no test images, or a
            class has no image left to train on or to choose by.
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
    groups = None if train.groups is None else train.groups.numpy()
    generator = numpy_generator(study.seed, Stream.STUDY, 3)
    kept, chosen = split_validation(
        train.labels.numpy(), study.val_fraction, generator=generator, groups=groups
    )
    parts = train.subset(kept), train.subset(chosen)
    for name, part in (("train on", parts[0]), ("choose by", parts[1])):
        counts = part.labels.bincount(minlength=len(classes))
        for label in sorted({*test.labels.tolist()}):
            require(
                int(counts[label]) > 0,
                f"images of class {classes[label]} to {name}",
                "at least one (see study.val_fraction)",
                0,
            )
    return parts


def count_nearly_equal(train: ImageSet, test: ImageSet) -> int:
    """Count the test images that are equal to a training image, or differ in hardly a pixel."""
    distances, _ = neighbor_distances(test.images.flatten(1), train.images.flatten(1))
    scale = 255 * train.images[0].numel() ** 0.5
    return int((distances / scale < NEARLY_EQUAL).sum())


def without_copies(
    generated: ImageSet, dataset: Dataset, share: float, *, mirrors: bool
) -> ImageSet:
    """Leave out generated images that lie nearer to a training image than real ones do.

    Nearness is that of `neighbor_distances`, beside the next training images.

    Args:
        generated: the images.
        dataset: the real images; those of its test split show how near real images come.
        share: of the test images that come as near as what is left out.
        mirrors: whether training images count mirrored as well.
    """
    if share == 0:
        return generated
    train = dataset.train.images
    if mirrors:
        train = torch.cat([train, train.flip(-1)])
    near, usual = (
        neighbor_distances(images.images.flatten(1), train.flatten(1))[1]
        for images in (generated, dataset.test)
    )
    return generated.subset((near >= usual.quantile(share)).nonzero().flatten())


@dataclass(frozen=True, eq=False)
class ArmResult:
    """What the classifiers of an arm say.

    Attributes:
        arm: what they were trained on.
        num_real: real images, of each classifier.
        num_synthetic: generated images, likewise.
        fits: the classifiers.
    """

    arm: Arm
    num_real: list[int]
    num_synthetic: list[int]
    fits: list[Fit]


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
        self._inputs: dict[str, Inputs] = {}

    def results(self, say: Callable[[str], object]) -> Iterator[ArmResult]:
        """Train what is not on disk, and yield the arms in their order."""
        arms = [*list_arms(self._study, [*self._material.sources])]
        seeds = range(self._study.num_seeds)
        todo = [(arm, seed) for arm in arms for seed in seeds if self._read(arm, seed) is None]
        done, start = 0, time.monotonic()
        if todo:
            total = len(arms) * len(seeds)
            say(f"{total - len(todo)} of {total} classifiers are there; {self.steps} steps each")
        for arm in arms:
            for seed in seeds:
                if (arm, seed) in todo:
                    self._train(arm, seed)
                    done += 1
                    left = (time.monotonic() - start) / done * (len(todo) - done)
                    say(
                        f"{arm.title} of {arm.fraction:g} of the real images, seed {seed}: "
                        f"{done} of {len(todo)} trained, about {duration(left)} left"
                    )
            yield self._result(arm)

    def _result(self, arm: Arm) -> ArmResult:
        fits, real, synthetic = [], [], []
        for seed in range(self._study.num_seeds):
            fit = self._read(arm, seed)
            if fit is None:
                raise RuntimeError(f"the fit of {arm.title} of seed {seed} is not on disk")
            fits.append(fit)
            of_real, of_synthetic = self._places(arm, seed)
            real.append(len(of_real))
            synthetic.append(len(of_synthetic))
        return ArmResult(arm, real, synthetic, fits)

    def _places(self, arm: Arm, seed: int) -> tuple[Tensor, Tensor]:
        """Say which real and which generated images a classifier is trained on."""
        train = self._material.train
        places = real_places(train, arm.fraction, self._study.seed + seed)
        if not arm.source:
            return places, torch.zeros(0, dtype=torch.int64)
        counts = train.labels[places].bincount(minlength=len(self._material.classes)).tolist()
        fill = "all" if arm.kind is ArmKind.SYNTHETIC else self._study.fill
        wanted = synthetic_counts(counts, arm.ratio, fill)
        chosen = first_of_class(self._material.sources[arm.source].labels, wanted)
        return (places[:0] if arm.kind is ArmKind.SYNTHETIC else places), chosen

    def _train(self, arm: Arm, seed: int) -> None:
        of_real, of_synthetic = self._places(arm, seed)
        views = "augmented" if arm.kind is ArmKind.AUGMENTED else "train"
        train = self._looked_at(views).subset(of_real)
        if arm.source:
            generated = self._looked_at(arm.source).subset(of_synthetic)
            train = generated if arm.kind is ArmKind.SYNTHETIC else train.joined(generated)
        fit = fit_classifier(
            self.kind,
            train,
            self._looked_at("validation"),
            self._looked_at("test"),
            study=self._study,
            steps=self.steps,
            seed=seed,
            balance="oversample" if arm.kind is ArmKind.OVERSAMPLED else self._study.balance,
            num_classes=len(self._material.classes),
            device=self._device,
        )
        tensors = {"validation": fit.validation, "test": fit.test}
        told = {"fingerprint": self._fingerprint(arm, seed), "step": str(fit.step)}
        file = self._file(arm, seed)
        file.parent.mkdir(parents=True, exist_ok=True)
        save_weights(file, tensors, told)

    def _read(self, arm: Arm, seed: int) -> Fit | None:
        """Read a classifier's answers; None where there are none, or those of another one."""
        file = self._file(arm, seed)
        if not file.is_file():
            return None
        tensors, told = load_weights(file)
        if told.get("fingerprint") != self._fingerprint(arm, seed):
            return None
        return Fit(tensors["validation"], tensors["test"], int(told["step"]))

    def _file(self, arm: Arm, seed: int) -> Path:
        folder = self._folder / FITS / (arm.source or "real")
        return folder / f"{arm.key}-seed-{seed}.safetensors"

    def _fingerprint(self, arm: Arm, seed: int) -> str:
        """Return what changes where anything does that decides about a classifier."""
        values = self._study.model_dump(
            include={"fine_tuning", "balance", "fill", "seed", "batch_size", "copy_share"}
        )
        told = [
            *(self.kind.title, self.kind.lr, self.kind.lower_lr, self.steps, seed, arm.key),
            *(values, self._mirrors, self._digests()[arm.source] if arm.source else ""),
            *(self._digests()[name] for name in ("train", "validation", "test")),
        ]
        return hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()

    def _digests(self) -> Mapping[str, str]:
        if not hasattr(self, "_digest_of"):
            self._digest_of = {name: _digest(images) for name, images in self._sets().items()}
        return self._digest_of

    def _sets(self) -> dict[str, ImageSet]:
        given = self._material
        real = {"train": given.train, "validation": given.validation, "test": given.test}
        return {**given.sources, **real}

    def _looked_at(self, name: str) -> Inputs:
        """Return a set as the trained part of the classifier takes it; computed once."""
        if name not in self._inputs:
            changes = None
            images = self._sets().get(name, self._material.train)
            if name == "augmented":
                rng = torch_generator(self._study.seed, Stream.STUDY, 4)
                changes = augmented(rng, mirrors=self._mirrors)
            number = len(images) * (1 if changes is None else NUM_VIEWS)
            with progress(number, f"looking at {number:,} images") as advance:
                self._inputs[name] = inputs_of(
                    self.kind, images, self._device, changes=changes, advance=advance
                )
        return self._inputs[name]

    def misclassified(self, generated: ImageSet) -> Tensor:
        """Tell in which images a classifier trained on all real ones finds another class, [N]."""
        fit = fit_classifier(
            self.kind,
            self._looked_at("train"),
            self._looked_at("validation"),
            inputs_of(self.kind, generated, self._device),
            study=self._study,
            steps=self.steps,
            seed=0,
            balance=self._study.balance,
            num_classes=len(self._material.classes),
            device=self._device,
        )
        return fit.test.argmax(1) != generated.labels


def _digest(images: ImageSet) -> str:
    found = hashlib.sha256(images.images.contiguous().numpy().data)
    found.update(images.labels.numpy().tobytes())
    return found.hexdigest()


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
