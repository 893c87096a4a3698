"""`feddm study`: whether a classifier is better when a run's images fill up its training set."""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import chain, count
from pathlib import Path
from typing import Any

import torch

from task.checks import require
from task.cli.evaluate import check_same_images, evaluation_config
from task.cli.generate import fill_folder
from task.config import Config
from task.config.study_config import STUDY_PREFIX, StudyConfig, load_study_config
from task.data import Dataset, ImageSet, build_dataset
from task.evaluation.study.arms import real_places, synthetic_counts
from task.evaluation.study.classifiers import build_classifier
from task.evaluation.study.hospitals import hospital_of_each
from task.evaluation.study.run_classifiers import (
    ReadingRun,
    by_all_but_seed,
    classifier_arm,
    unlike_arms,
)
from task.evaluation.study.study import (
    ArmResult,
    Material,
    Study,
    count_nearly_equal,
    describe_counts,
    split_test,
    without_copies,
)
from task.evaluation.study.summary import check_bootstraps, summarize
from task.files import atomic_path, file_sha256, write_json
from task.generation.folder import describe_origin, open_folder
from task.generation.images import ImageSource
from task.lock import hold
from task.reporting.rendering import render
from task.reporting.report import labels as run_labels
from task.reporting.study_figure import draw_classes, draw_gains
from task.reporting.study_tables import study_notes, study_tables
from task.runs.layout import LOCK_FILE, STUDY_FILE, STUDY_FOLDER, run_config, weights_file
from task.runs.run import Run, final_model
from task.training.devices import select_device

DRAWN_FOLDER, TABLE_FILE = "images", "study.md"
# Drawn beyond what is needed, to stand in for what is left out.
SPARE = 1.1
FEW_SEEDS, FEW_TEST_IMAGES = 3, 20
UNKNOWN_IMAGES = (
    "Which images the run was trained on was not written down, as by hospitals: the test images "
    "may be among them."
)

Say = Callable[[str], object]


def study_runs(
    runs: Sequence[Path], overrides: Iterable[str], *, out: Path | None, say: Say
) -> dict[str, Any]:
    """Train classifiers with and without the images of runs, and write down what was found.

    Args:
        runs: folders of finished runs, of the same images; one at least draws images, and those of
            `model=classifier` are compared as they are, runs that differ in their seed together.
        overrides: `study.NAME=VALUE` of `conf/study.yaml`, and values of the runs that say how to
            draw, as of `feddm evaluate`.
        out: the folder of the study; None: `study` in the folder of the only run that draws.
        say: takes the text for the reader.

    Raises:
        FileNotFoundError: images, or weights of the classifier, are missing.
        ValueError: a value is wrong, the runs were trained on different images, or a patient is in
            both splits.
    """
    words = list(overrides)
    study = load_study_config(word for word in words if word.startswith(STUDY_PREFIX))
    given = _GivenRuns.read(runs, [word for word in words if not word.startswith(STUDY_PREFIX)])
    if out is None:
        several = "the folder of a study of several generators"
        require(len(given.generators) == 1, "--out", several, None)
        out = next(iter(given.generators.values())) / STUDY_FOLDER
    given.check(study)
    device = select_device(study.device)
    _build_classifier(study, given.first, device)
    reading = {
        name: [ReadingRun.of(each, given.named[each], given.configs[each]) for each in names]
        for name, names in given.classifiers.items()
    }
    dataset = build_dataset(given.first, download=True)
    warnings = [
        doubt
        for name, run in given.named.items()
        for doubt in _doubts(run, given.configs[name], dataset)
    ]
    warnings += unlike_arms(given.first, study, [each[0].config for each in reading.values()])
    material = _real_material(given, dataset, study, warnings)
    out.mkdir(parents=True, exist_ok=True)
    with hold(out / LOCK_FILE, "--out", patience=0) as lock:
        needed, weights = _needed(material, study), {}
        for name, run in given.generators.items():
            weights[name] = file_sha256(weights_file(run))
            folder = out / DRAWN_FOLDER / name.replace("/", "-")
            drawn = _drawn(run, given.configs[name], needed, folder, say)
            mirrors = given.first.data.horizontal_flip
            material = _with_source(material, study, name, drawn, out, mirrors, device)
        told = {
            "weights_sha256": weights,
            "warnings": [*dict.fromkeys(warnings), *_warnings(material, study)],
        }
        arms = [classifier_arm(name, each, material, device) for name, each in reading.items()]
        found = _studied(material, study, given.first, told, arms, out, device, say)
        lock.truncate(0)
    return found


@dataclass(frozen=True)
class _GivenRuns:
    """The runs of a study.

    Attributes:
        named: their folders, by name.
        configs: of each.
    """

    named: Mapping[str, Path]
    configs: Mapping[str, Config]

    @classmethod
    def read(cls, runs: Sequence[Path], words: Sequence[str]) -> "_GivenRuns":
        """Read the configurations of runs, with values that say how to draw.

        Raises:
            ValueError: a name or a value is wrong, or none of them draws.
        """
        names = run_labels(runs) if len(runs) > 1 else [Run(runs[0]).name]
        # A classifier has no values of drawing, and reads the same images.
        of_data = [word for word in words if word.startswith("data.")]
        configs = {
            name: evaluation_config(run, words if run_config(run).model.draws else of_data, {})
            for name, run in zip(names, runs, strict=True)
        }
        found = cls(dict(zip(names, runs, strict=True)), configs)
        require(len(found.generators) > 0, "RUN", "one at least that draws images", names)
        return found

    @cached_property
    def generators(self) -> dict[str, Path]:
        """Those that draw."""
        return {name: run for name, run in self.named.items() if self.configs[name].model.draws}

    @cached_property
    def classifiers(self) -> dict[str, list[str]]:
        """Names of the others by that of the first of an arm, which differ in their seeds."""
        others = {n: config for n, config in self.configs.items() if n not in self.generators}
        return by_all_but_seed(others)

    @property
    def first(self) -> Config:
        """Whose data it is."""
        return self.configs[next(iter(self.generators))]

    def check(self, study: StudyConfig) -> None:
        """Check that the runs can be studied so.

        Raises:
            ValueError: they cannot.
        """
        require(
            not self.classifiers or 1 in study.real_fractions,
            "study.real_fractions",
            "a list with 1.0 beside classifiers of runs, which are trained on all images",
            study.real_fractions,
        )
        check_bootstraps(study, len(self.generators), len(self.classifiers))
        for name, config in self.configs.items():
            _check_same_data(self.first, config, name)


def _build_classifier(study: StudyConfig, config: Config, device: torch.device) -> None:
    """Find the network before any image is drawn: its weights may be missing."""
    build_classifier(
        study,
        channels=config.data.channels,
        image_size=config.data.image_size,
        num_classes=len(config.data.classes),
        device=device,
    )


def _real_material(
    given: _GivenRuns, dataset: Dataset, study: StudyConfig, warnings: list[str]
) -> Material:
    """Part the real images; none are generated yet."""
    classes, mirrors = given.first.data.classes, given.first.data.horizontal_flip
    chosen, measured = split_test(dataset, classes, study)
    validation, test = (dataset.test.subset(places) for places in (chosen, measured))
    reading = [given.named[name] for names in given.classifiers.values() for name in names]
    return Material(
        classes,
        dataset.train,
        validation,
        test,
        {},
        hospital_of_each(given.generators.values(), reading, dataset, (chosen, measured), warnings),
        nearly_equal=count_nearly_equal(dataset.test, dataset.train, mirrors=mirrors),
        nearly_equal_within=count_nearly_equal(test, validation, mirrors=mirrors),
    )


def _check_same_data(first: Config, other: Config, name: str) -> None:
    ignored = {"root", "cache_dir"}
    ours, theirs = (each.data.model_dump(exclude=ignored) for each in (first, other))
    different = [key for key in ours if ours[key] != theirs.get(key)]
    require(
        not different,
        f"RUN {name}",
        "a run of the same data as the first",
        ", ".join(f"data.{key}={theirs.get(key)}" for key in different),
    )


def _doubts(path: Path, config: Config, dataset: Dataset) -> Iterator[str]:
    """Say why the test images may be among those that a run has seen; no paths, see `_warnings`."""
    run, said = Run(path), list[str]()
    check_same_images(path, config, dataset, say=said.append)
    if said:
        yield (
            "A run was trained on other images than those of this study: the test images may be "
            "among them."
        )
    if not run.data_hashes:
        yield UNKNOWN_IMAGES
    if run.started_from is not None or config.model.frozen_file is not None:
        yield (
            "A run began with weights of another training, on images that are not looked for here: "
            "the test images may be among them."
        )


def _needed(material: Material, study: StudyConfig) -> list[int]:
    """Say how many generated images of each class the arms take at most, with some to spare."""
    number, most = len(material.classes), [0] * len(material.classes)
    for fraction in study.real_fractions:
        for seed in range(study.num_seeds):
            places = real_places(material.train, fraction, study.seed + seed)
            counts = material.train.labels[places].bincount(minlength=number).tolist()
            for ratio, fill in [*((each, study.fill) for each in study.ratios), (1.0, "all")]:
                most = [*map(max, most, synthetic_counts(counts, ratio, fill))]
    return [math.ceil(SPARE * each) for each in most]


def _drawn(run: Path, config: Config, needed: Sequence[int], folder: Path, say: Say) -> ImageSet:
    """Draw images of a run into a folder, or those that it lacks, and read all of them."""
    model, server_round = final_model(run, config)
    source = ImageSource(config, model, select_device(config.train.device))
    origin = describe_origin(
        config,
        source,
        weights=weights_file(run),
        server_round=server_round,
        client=None,
        scale=1,
    )
    asked = {label: count for label, count in enumerate(needed) if count}
    with open_folder(folder, config.data.classes, origin=origin, asked=asked) as images:
        for label, count in asked.items():
            fill_folder(images, source, [label], num_images=count, say=say)
        images.write_manifest()
        pixels = [images.read(label, place) for label, n in asked.items() for place in range(n)]
    labels = torch.tensor([*asked]).repeat_interleave(torch.tensor([*asked.values()]))
    return ImageSet(torch.stack(pixels), labels)


def _with_source(
    material: Material,
    study: StudyConfig,
    name: str,
    drawn: ImageSet,
    out: Path,
    mirrors: bool,
    device: torch.device,
) -> Material:
    """Add the images of a run to a study, without those that are to be left out."""
    kept = without_copies(
        drawn, material.train, material.validation, study.copy_share, mirrors=mirrors
    )
    left_out = {"near copies of training images": len(drawn) - len(kept)}
    if study.leave_out_misclassified and len(kept):
        judge = Study(material, study, out, mirrors=mirrors, device=device)
        wrong = judge.misclassified(kept)
        left_out["found in another class"] = int(wrong.sum())
        kept = kept.subset((~wrong).nonzero().flatten())
    return replace(
        material,
        sources={**material.sources, name: kept},
        left_out={**material.left_out, name: left_out},
    )


def _studied(
    material: Material,
    study: StudyConfig,
    config: Config,
    told: Mapping[str, Any],
    classifiers: Sequence[ArmResult],
    out: Path,
    device: torch.device,
    say: Say,
) -> dict[str, Any]:
    trained = Study(material, study, out, mirrors=config.data.horizontal_flip, device=device)
    odir = config.data.name == "odir"
    found = {
        "schema": 1,
        "data": config.data.name,
        "classes": list(config.data.classes),
        "classifier": trained.kind.title,
        "steps": trained.steps,
        "num_seeds": study.num_seeds,
        "balance": study.balance,
        "num_bootstraps": study.num_bootstraps,
        "images": describe_counts(material),
        "hospitals": {}
        if material.hospitals is None
        else {str(n): count for n, count in enumerate(material.hospitals.test.bincount().tolist())},
        "left_out": material.left_out,
        "values": study.model_dump(),
        **told,
        **summarize(material, study, chain(trained.results(say), classifiers), odir=odir),
    }
    write_json(out / STUDY_FILE, found)
    with atomic_path(out / TABLE_FILE) as aside:
        aside.write_text(study_page(found), encoding="utf-8")
    draw_gains(found, out)
    draw_classes(found, out)
    for headline in found["headlines"]:
        say(f"{headline['source']}: {headline['sentence']}")
    if found["at_hospitals_sentence"]:
        say(found["at_hospitals_sentence"])
    for warning in found["warnings"]:
        say(f"warning: {warning}")
    say(f"written to {out}")
    return found


def study_page(found: dict[str, Any]) -> str:
    """Write what a study found as a page in Markdown."""
    return render(
        "study.md",
        sources=[each["source"] for each in found["headlines"]],
        headlines=found["headlines"],
        hospitals=found["at_hospitals_sentence"],
        warnings=found["warnings"],
        tables=study_tables(found),
        notes=study_notes(found),
    )


def _warnings(material: Material, study: StudyConfig) -> Iterable[str]:
    """Say what weakens a study; no names of runs, because an export tells it, too."""
    if material.nearly_equal:
        number = len(material.validation) + len(material.test)
        yield (
            f"{material.nearly_equal:,} of {number:,} validation and test images are equal or "
            "nearly equal to a training image: all figures are too good, and a generator may have "
            "learned them."
        )
    if material.nearly_equal_within:
        yield (
            f"{material.nearly_equal_within:,} of {len(material.test):,} test images are equal or "
            "nearly equal to a validation image."
        )
    if material.test.groups is None:
        yield "Whose images are of one patient is not known: they may be in both splits."
    if study.num_seeds < FEW_SEEDS:
        yield f"study.num_seeds={study.num_seeds} leaves intervals that say little; raise it."
    counts = material.test.labels.bincount(minlength=len(material.classes)).tolist()
    few = {c: n for c, n in zip(material.classes, counts, strict=True) if n < FEW_TEST_IMAGES}
    if few:
        told = ", ".join(f"{name} {number}" for name, number in few.items())
        yield f"Classes with few test images, of which little can be said: {told}."
    for (name, reasons), place in zip(material.left_out.items(), count(1), strict=False):
        which = "generated images" if len(material.sources) == 1 else f"images of generator {place}"
        told = ", ".join(f"{number:,} {why}" for why, number in reasons.items() if number)
        if told:
            yield f"Left out of the {which}: {told}; {len(material.sources[name]):,} are used."
        kept = material.sources[name].labels.bincount(minlength=len(material.classes)).tolist()
        gone = [c for c, number in zip(material.classes, kept, strict=True) if number == 0]
        if gone:
            yield f"No {which} are left of the classes {', '.join(gone)}."
