"""What a report of metrics says, in rows and in words, wherever it is shown."""

import dataclasses
from collections.abc import Sequence

from task.evaluation.copying import Copying
from task.evaluation.evaluate import DRAWS, KID_SUBSETS, Classification, Label, MetricReport
from task.evaluation.features import HASH_DIGITS
from task.evaluation.noise_position import MOST_COMPARED
from task.runs.records import HELD_OUT, TEST, TRAIN

# A metric, and against which images; see `task.runs.records.Record`.
Figure = tuple[str, str | None]

TITLES: dict[Figure, str] = {
    ("noise_position", None): "between real (0) and noise (1) v",
    ("inception_score", None): "inception score ^",
    ("fid", TRAIN): "FID (train) v",
    ("fid", TEST): "FID (test) v",
    ("kid", TRAIN): "KID (train) v",
    ("kid", TEST): "KID (test) v",
    ("precision", None): "precision ^",
    ("recall", None): "recall ^",
    ("density", None): "density ~1",
    ("coverage", None): "coverage ^",
}

# What hospitals say of images, each against its own.
HOSPITAL_TITLES: dict[Figure, str] = {
    ("fid", HELD_OUT): "FID v",
    ("kid", HELD_OUT): "KID v",
    ("class_agreement", HELD_OUT): "found in the class asked for ^",
    ("noise_position", HELD_OUT): TITLES["noise_position", None],
    ("pixel_copied", HELD_OUT): "nearer to training images than held-out ones, pixels v",
    ("feature_copied", HELD_OUT): "nearer to training images than held-out ones, features v",
}

# What the first row of a table holds.
POSITION = (
    "between real and noise: the energy distance to the training images, in pixels or in the "
    "power at each spatial frequency, whichever is larger, as a share of that of noise (the "
    "N(0, 1) that sampling starts from), of at most "
    f"{MOST_COMPARED} images of each; 0 as near as real images, 1 as far as noise"
)

Row = tuple[str, ...]
# The marks of the titles where a page has letters for them.
ARROWS = {" ^": " ↑", " v": " ↓", " ~1": " ≈ 1"}
HEADS: Row = ("metric", "generated", "real")


def format_table(report: MetricReport) -> str:
    """Lay a report out: a metric per line, generated images beside real ones."""
    return lay_out([HEADS, *metric_rows(report)])


def metric_rows(report: MetricReport) -> list[Row]:
    """List what a report holds under `HEADS`: a metric, of generated images, of real ones."""
    rows = _score_rows(report)
    found = report.classification
    if found is not None:
        rows += [
            _accuracy_row(found, report.label),
            ("  trained on all real images ^", "", f"{found.cas_real:.4f}"),
            *_agreement_rows(found),
        ]
    for space, copies in (("pixels", report.pixel_copying), ("features", report.feature_copying)):
        if copies is not None:
            rows += _copying_rows(space, copies)
    return rows


def _accuracy_row(found: Classification, label: Label) -> Row:
    if label.n_generated > label.n_train:  # there are not as many real ones to train on
        return "classification accuracy score ^", f"{found.cas:.4f}", ""
    return "classification accuracy score, same n ^", *_pair(found.cas, found.cas_real_same_n)


def _agreement_rows(found: Classification) -> list[Row]:
    real, chance = found.agreement_real, found.chance_agreement
    rows: list[Row] = [
        ("found in the class asked for ^", f"{found.agreement:.4f}", _with_std(real, None))
    ]
    return rows + ([] if chance is None else [("  by chance", *_pair(chance, chance))])


def lay_out(rows: Sequence[Row]) -> str:
    """Align the columns of a table, names to the left and figures to the right; heads first."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [
        "  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]).rstrip()
        for row in rows
    ]
    return "\n".join([lines[0], "-" * (sum(widths) + 2 * len(widths) - 2), *lines[1:]])


def with_arrows(title: str) -> str:
    """Write the mark at the end of a title as an arrow."""
    for mark, arrow in ARROWS.items():
        if title.endswith(mark):
            return title.removesuffix(mark) + arrow
    return title


def _score_rows(report: MetricReport) -> list[Row]:
    ours, floor = dataclasses.asdict(report.generated), dataclasses.asdict(report.floor)
    label = report.label
    if not label.has_comparable_floor:
        floor = dict.fromkeys(floor)
    if label.kid_subset_size == label.n_floor == label.n_test:
        # Each subset is all there is, which has no spread.
        ours["kid_test_std"] = floor["kid_test_std"] = None
    return [
        (title, *(_with_std(part[name], part.get(f"{name}_std")) for part in (ours, floor)))
        for figure, title in TITLES.items()
        if ours[name := "_".join(filter(None, figure))] is not None
    ]


def _with_std(value: float | None, std: float | None) -> str:
    if value is None:
        return ""
    return f"{value:.4f}" if std is None else f"{value:.4f} +- {std:.4f}"


def _pair(generated: float, real: float) -> tuple[str, str]:
    return f"{generated:.4f}", f"{real:.4f}"


def _copying_rows(space: str, copies: Copying) -> list[Row]:
    rows: list[Row] = [
        (f"nearest training image, {space}", *_pair(copies.generated, copies.held_out))
    ]
    if copies.p_value is not None:
        rows += [
            (f"  nearer than held-out ones, {space} v", f"{copies.copied:.4f}", ""),
            ("    p where nothing is copied", f"{copies.p_value:.4f}", ""),
        ]
    return rows


def caption(report: MetricReport, counts: list[int]) -> list[str]:
    """Say what a table holds for: what was measured through what, and how many images.

    Args:
        report: the table's.
        counts: different numbers of generated images per class, ascending; empty: not known.
    """
    label = report.label
    return [
        f"data {label.data}: {label.n_generated:,} generated images"
        + (f" ({span(counts)} of each class)" if counts else "")
        + f", {label.n_train:,} training and {label.n_test:,} test images; seed {label.seed}",
        *looked_through(label),
        f"real: {stand_ins(label)}",
        scored(label),
        *all_scored(report),
        f"KID: {KID_SUBSETS} subsets of {label.kid_subset_size:,} images; FID depends on n, "
        "compare equal n only",
        *_yardsticks(label),
        *[POSITION] * (report.generated.noise_position is not None),
        "^ higher is better, v lower is better",
    ]


def scored(label: Label) -> str:
    """Say how many generated images are behind the scores beside the floor."""
    if not label.has_comparable_floor:
        return (
            f"the scores are of all {label.n_generated:,} generated images, and those of "
            f"{label.n_floor:,} real ones are not comparable with them: measure again"
        )
    if label.n_floor == label.n_generated:
        return f"generated: all {label.n_floor:,} images, as many as real ones"
    return (
        f"generated: means over {DRAWS} draws of {label.n_floor:,} of the images, as many as real "
        "ones and against the same images"
    )


def all_scored(report: MetricReport) -> list[str]:
    """Say the distances of all generated images, where the scores are of fewer."""
    whole = report.whole
    if whole is None:
        return []
    told = [
        f"{TITLES['fid', reference].removesuffix(' v')} {value:.4f}"
        for reference in (TRAIN, TEST)
        if (value := getattr(whole, f"fid_{reference}")) is not None
    ]
    return [
        f"of all {report.label.n_generated:,} generated images, not comparable with the table: "
        + ", ".join(told)
    ]


def span(counts: Sequence[int]) -> str:
    """Write the range of numbers, "3" or "3-1,200"."""
    return "-".join(f"{number:,}" for number in sorted({min(counts), max(counts)}))


def looked_through(label: Label) -> list[str]:
    """Say what the metrics looked through, and what must not be compared with it."""
    paper, inception = label.image_range == "paper", label.extractor == "inception"
    return [
        f"extractor {label.extractor} {label.extractor_sha256[:HASH_DIGITS]}, image range "
        f"{label.image_range}" + (", all images mirrored at random" * label.real_flipped),
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
        "nearest training image: medians, beside those of held-out test images; nearer than "
        "held-out ones: the share of generated images by which more of them lie near a training "
        "image, relative to its neighbours, and the p value of that share where nothing is copied",
    ]
