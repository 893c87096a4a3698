"""`feddm evaluate`: images from a run's final weights, measured beside real ones."""

import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path

from task.config import (
    DRAWING_VALUES,
    Config,
    changed_config,
    value_paths,
)
from task.data import build_dataset
from task.evaluate import KID_SUBSETS, Label, MetricReport
from task.features import HASH_DIGITS, build_extractor
from task.measure import (
    draw_images,
    drawn_otherwise,
    evaluation_file,
    full_labels,
    measure_images,
    write_report,
)
from task.metrics import Copying
from task.randomness import Stream
from task.runs import final_model, run_config
from task.train import select_device

TITLES = {
    "inception_score": "inception score ^",
    "fid_train": "FID (train) v",
    "fid_test": "FID (test) v",
    "kid_train": "KID (train) v",
    "kid_test": "KID (test) v",
    "precision": "precision ^",
    "recall": "recall ^",
    "density": "density ~1",
    "coverage": "coverage ^",
}

Row = tuple[str, ...]


def evaluation_config(
    run: Path, overrides: Iterable[str], options: Mapping[str, object | None]
) -> Config:
    """Read the configuration of a run, with what is to be measured otherwise.

    Args:
        run: its folder.
        overrides: `name=value`, of values that say how to draw and measure, not what was trained.
        options: by name as well; None leaves a value as it is. They win over `overrides`.

    Returns:
        The configuration with absolute paths; new relative ones count from the working directory.

    Raises:
        ValueError: there is no run, or a name or value is wrong.
    """
    return changed_config(run_config(run), overrides, options=options, names=_measuring_values())


def _measuring_values() -> set[str]:
    used = {"extractor", "image_range", "batch_size", "precision", "num_per_class", "seed"}
    used |= {"inception_weights", "exported_program"}
    return {path for path in value_paths() if path.removeprefix("eval.") in used} | {
        "data.root",
        "data.cache_dir",
        "train.device",
        *DRAWING_VALUES,
    }


def evaluate_run(run: Path, config: Config, *, say: Callable[[str], object]) -> MetricReport:
    """Draw images from the final weights of a run, measure them, and keep what was found.

    Args:
        run: the folder of the run; `evaluation-<extractor>-<image_range>.json` is written there,
            with another ending where the images are drawn otherwise than the run draws.
        config: see `evaluation_config`.
        say: takes the text for the reader.

    Raises:
        FileNotFoundError: files of the data set or of the extractor are missing.
        ValueError: there are no final weights, or they do not fit, or there are too few images.
    """
    device = select_device(config.train.device)
    model, last = final_model(run, config)
    dataset = build_dataset(config, download=True)
    # Before the images, which may take hours: its files may be missing.
    extractor = build_extractor(config, dataset.train, device)
    labels = full_labels(config, dataset)
    say(f"drawing {len(labels):,} images on {device}")
    images = draw_images(config, model, labels, device=device, stream=Stream.EVALUATED_IMAGES)
    say("measuring them")
    report = measure_images(config, images, dataset, extractor=extractor)
    otherwise = drawn_otherwise(run, config)
    title = f"{run.resolve().name}, round {last} of {config.federation.rounds}"
    title += f", drawn with {otherwise}" if otherwise else ""
    say(f"\n{title}\n\n{format_table(report)}\n")
    counts = sorted(set(labels.bincount().tolist()))
    say("\n".join(f"- {line}" for line in caption(report, counts)))
    file = evaluation_file(run, config, otherwise)
    write_report(file, report, config, last)
    say(f"\nwritten to {file}")
    return report


def format_table(report: MetricReport) -> str:
    """Lay a report out: a metric per line, generated images beside real ones."""
    rows = [("metric", "generated", "real"), *_score_rows(report)]
    found = report.classification
    if found is not None:
        rows += [
            ("classification accuracy score, same n ^", *_pair(found.cas, found.cas_real_same_n)),
            ("  trained on all real images ^", "", f"{found.cas_real:.4f}"),
            ("found in the class asked for ^", f"{found.agreement:.4f}", ""),
        ]
    for space, copies in (("pixels", report.pixel_copying), ("features", report.feature_copying)):
        if copies is not None:
            rows += _copying_rows(space, copies)
    return lay_out(rows)


def lay_out(rows: Sequence[Row]) -> str:
    """Align the columns of a table, names to the left and figures to the right; heads first."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [
        "  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]).rstrip()
        for row in rows
    ]
    return "\n".join([lines[0], "-" * (sum(widths) + 2 * len(widths) - 2), *lines[1:]])


def _score_rows(report: MetricReport) -> list[Row]:
    ours, floor = dataclasses.asdict(report.generated), dataclasses.asdict(report.floor)
    rows: list[Row] = []
    for name, title in TITLES.items():
        if ours[name] is not None:
            generated, real = (
                _with_std(part[name], part.get(f"{name}_std")) for part in (ours, floor)
            )
            rows.append((title, generated, real))
    return rows


def _with_std(value: float, std: float | None) -> str:
    return f"{value:.4f}" if std is None else f"{value:.4f} +- {std:.4f}"


def _pair(generated: float, real: float) -> tuple[str, str]:
    return f"{generated:.4f}", f"{real:.4f}"


def _copying_rows(space: str, copies: Copying) -> list[Row]:
    return [
        (f"nearest training image, {space}", *_pair(copies.generated, copies.held_out)),
        (f"  as near as the nearest 1 % of real, {space}", *_pair(copies.copied, 0.01)),
    ]


def caption(report: MetricReport, counts: list[int]) -> list[str]:
    """Say what a table holds for: what was measured through what, and how many images.

    Args:
        report: the table's.
        counts: different numbers of generated images per class, ascending.
    """
    label = report.label
    fewer = (
        f"the real column has fewer images than the generated one ({label.n_floor:,} against "
        f"{label.n_generated:,}), which makes its FID larger"
    )
    return [
        f"data {label.data}: {label.n_generated:,} generated images ({span(counts)} of each "
        f"class), {label.n_train:,} training and {label.n_test:,} test images; seed {label.seed}",
        *looked_through(label),
        f"real: {stand_ins(label)}",
        *[fewer] * (label.n_floor < label.n_generated),
        f"KID: {KID_SUBSETS} subsets of {label.kid_subset_size:,} images; FID depends on n, "
        "compare equal n only",
        *_yardsticks(label),
        "^ higher is better, v lower is better",
    ]


def span(counts: Sequence[int]) -> str:
    """Write the range of numbers, "3" or "3-1,200"."""
    return "-".join(f"{number:,}" for number in sorted({min(counts), max(counts)}))


def looked_through(label: Label) -> list[str]:
    """Say what the metrics looked through, and what must not be compared with it."""
    paper, inception = label.image_range == "paper", label.extractor == "inception"
    return [
        f"extractor {label.extractor} {label.extractor_sha256[:HASH_DIGITS]}, image range "
        f"{label.image_range}" + (", real images mirrored at random" * label.real_flipped),
        *["the wrapped range of the published tables: never beside correct figures"] * paper,
        *["not the scores of the literature, which look through Inception"] * (not inception),
    ]


def stand_ins(label: Label) -> str:
    """Say which real images stand in for generated ones in the floor."""
    number = f"{label.n_floor:,} real images in place of the generated ones, "
    if label.n_test == 0:
        others = label.n_train - label.n_train // 2
        return f"{number}training images drawn at random, against {others:,} others of them"
    return (
        f"{number}the fewest of the three sets (test images against the training images and for "
        "the inception score, training images against the test images)"
    )


def _yardsticks(label: Label) -> list[str]:
    if label.n_test == 0:
        return [
            "no images are held out: all is measured against the training images, where copies of "
            "them score best, and there is no classification and no search for copies"
        ]
    return [
        "precision, recall, density and coverage: against the test images",
        "nearest training image: medians, beside those of held-out test images",
    ]
