"""`feddm study`: whether a classifier is better when a run's images fill up its training set."""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from task.checks import require
from task.cli.evaluate import check_same_images, evaluation_config
from task.cli.generate import fill_folder
from task.config import Config
from task.config.study_config import STUDY_PREFIX, StudyConfig, load_study_config
from task.data import Dataset, ImageSet, build_dataset
from task.data.partition import partition_dataset
from task.evaluation.study.arms import real_places, synthetic_counts
from task.evaluation.study.study import (
    Material,
    Study,
    count_nearly_equal,
    describe_counts,
    split_real,
    without_copies,
)
from task.evaluation.study.summary import summarize
from task.files import atomic_path, write_json
from task.generation.folder import describe_origin, open_folder
from task.generation.images import ImageSource
from task.generators.base import Generator
from task.lock import hold
from task.reporting.rendering import render
from task.reporting.report import labels as run_labels
from task.reporting.study_figure import draw_classes, draw_gains
from task.reporting.study_tables import study_notes, study_tables
from task.runs.layout import LOCK_FILE, STUDY_FILE, STUDY_FOLDER, weights_file
from task.runs.run import Run, final_model
from task.training.devices import select_device

DRAWN_FOLDER, TABLE_FILE = "images", "study.md"
# Drawn beyond what is needed, to stand in for what is left out.
SPARE = 1.1
FEW_SEEDS, FEW_TEST_IMAGES = 3, 20

Say = Callable[[str], object]


def study_runs(
    runs: Sequence[Path], overrides: Iterable[str], *, out: Path | None, say: Say
) -> dict[str, Any]:
    """Train classifiers with and without the images of runs, and write down what was found.

    Args:
        runs: folders of finished runs, of the same images.
        overrides: `study.NAME=VALUE` of `conf/study.yaml`, and values of the runs that say how to
            draw, as of `feddm evaluate`.
        out: the folder of the study; None: `study` in the folder of the only run.
        say: takes the text for the reader.

    Raises:
        FileNotFoundError: images, or weights of the classifier, are missing.
        ValueError: a value is wrong, the runs were trained on different images, or a patient is in
            both splits.
    """
    words = list(overrides)
    study = load_study_config(word for word in words if word.startswith(STUDY_PREFIX))
    drawing = [word for word in words if not word.startswith(STUDY_PREFIX)]
    named = dict(zip(run_labels(runs) if len(runs) > 1 else [Run(runs[0]).name], runs, strict=True))
    if out is None:
        require(len(runs) == 1, "--out", "the folder of a study of several runs", None)
        out = runs[0] / STUDY_FOLDER
    configs = {name: evaluation_config(run, drawing, {}) for name, run in named.items()}
    first = next(iter(configs.values()))
    dataset = build_dataset(first, download=True)
    for name, run in named.items():
        _check_same_data(first, configs[name], name)
        check_same_images(run, configs[name], dataset, say=say)
    train, validation = split_real(dataset, first.data.classes, study)
    device = select_device(study.device)
    out.mkdir(parents=True, exist_ok=True)
    with hold(out / LOCK_FILE, "--out", patience=0) as lock:
        material = Material(
            first.data.classes,
            train,
            validation,
            dataset.test,
            {},
            hospitals=_hospital_of_each(Run(next(iter(named.values()))), first, dataset),
            nearly_equal=count_nearly_equal(dataset.train, dataset.test),
        )
        needed, rounds = _needed(material, study), {}
        for name, run in named.items():
            model, rounds[name] = final_model(run, configs[name])
            folder = out / DRAWN_FOLDER / name.replace("/", "-")
            drawn = _drawn(run, configs[name], model, rounds[name], needed, folder, say)
            material = _with_source(material, study, name, drawn, first, dataset, out, device, say)
        found = _studied(material, study, first, rounds, out, device, say)
        lock.truncate(0)
    return found


def _check_same_data(first: Config, other: Config, name: str) -> None:
    ignored = {"root", "cache_dir"}
    ours, theirs = (each.data.model_dump(exclude=ignored) for each in (first, other))
    different = [key for key in ours if ours[key] != theirs.get(key)]
    require(
        not different and first.data.split_seed == other.data.split_seed,
        f"RUN {name}",
        "a run of the same data as the first",
        ", ".join(f"data.{key}={theirs.get(key)}" for key in different),
    )


def _hospital_of_each(run: Run, config: Config, dataset: Dataset) -> torch.Tensor | None:
    """Say at which client of a simulation each test image is; None of a centralized run."""
    if run.partition is None:
        return None
    number = len(run.class_counts)
    whose = torch.zeros(len(dataset.test), dtype=torch.int64)
    for client, indices in enumerate(partition_dataset(config, dataset, number).test_indices):
        whose[torch.as_tensor(indices)] = client
    return whose


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


def _drawn(
    run: Path,
    config: Config,
    model: Generator,
    server_round: int,
    needed: Sequence[int],
    folder: Path,
    say: Say,
) -> ImageSet:
    """Draw images of a run into a folder, or those that it lacks, and read all of them."""
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
    config: Config,
    dataset: Dataset,
    out: Path,
    device: torch.device,
    say: Say,
) -> Material:
    """Add the images of a run to a study, without those that are to be left out."""
    mirrors = config.data.horizontal_flip
    kept = without_copies(drawn, dataset, study.copy_share, mirrors=mirrors)
    left_out = {"near copies of training images": len(drawn) - len(kept)}
    if study.leave_out_misclassified:
        judge = Study(material, study, out, mirrors=mirrors, device=device)
        wrong = judge.misclassified(kept)
        left_out["found in another class"] = int(wrong.sum())
        kept = kept.subset((~wrong).nonzero().flatten())
    for reason, number in left_out.items():
        if number:
            say(f"{name}: {number:,} of {len(drawn):,} images are left out, {reason}")
    return replace(
        material,
        sources={**material.sources, name: kept},
        left_out={**material.left_out, name: left_out},
    )


def _studied(
    material: Material,
    study: StudyConfig,
    config: Config,
    rounds: Mapping[str, int],
    out: Path,
    device: torch.device,
    say: Say,
) -> dict[str, Any]:
    trained = Study(material, study, out, mirrors=config.data.horizontal_flip, device=device)
    odir = config.data.name == "odir"
    found = {
        "schema": 1,
        "rounds": rounds,
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
        else {str(n): count for n, count in enumerate(material.hospitals.bincount().tolist())},
        "left_out": material.left_out,
        "warnings": [*_warnings(material, study)],
        "values": study.model_dump(),
        **summarize(material, study, trained.results(say), odir=odir),
    }
    write_json(out / STUDY_FILE, found)
    with atomic_path(out / TABLE_FILE) as aside:
        aside.write_text(study_page(found), encoding="utf-8")
    draw_gains(found, out)
    draw_classes(found, out)
    for headline in found["headlines"]:
        say(f"{headline['source']}: {headline['sentence']}")
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
        warnings=found["warnings"],
        tables=study_tables(found),
        notes=study_notes(found),
    )


def _warnings(material: Material, study: StudyConfig) -> Iterable[str]:
    if material.nearly_equal:
        yield (
            f"{material.nearly_equal:,} of {len(material.test):,} test images are equal or nearly "
            "equal to a training image: all figures are too good, and a generator may have learned "
            "them."
        )
    if material.test.groups is None:
        yield "Whose images are of one patient is not known: they may be in both splits."
    if study.num_seeds < FEW_SEEDS:
        yield f"Of {study.num_seeds} classifiers an interval says little; raise study.num_seeds."
    counts = material.test.labels.bincount(minlength=len(material.classes)).tolist()
    few = {c: n for c, n in zip(material.classes, counts, strict=True) if n < FEW_TEST_IMAGES}
    if few:
        told = ", ".join(f"{name} {number}" for name, number in few.items())
        yield f"Classes with few test images, of which little can be said: {told}."
    for name, reasons in material.left_out.items():
        number = sum(reasons.values())
        if number:
            told = ", ".join(f"{n:,} {why}" for why, n in reasons.items() if n)
            left = len(material.sources[name])
            yield f"Of the images of {name} {told} are left out; {left:,} are used."
