"""What an evaluation says, in rows and in words, wherever it is shown."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict
from typing import Any, NamedTuple

from task.evaluation.comparison import DRAWS
from task.evaluation.features import HASH_DIGITS
from task.evaluation.metrics import METRICS, Metric, Use
from task.runs.evaluations import Evaluation, Label
from task.runs.records import HELD_OUT, TEST, TRAIN, Record, Records

REFERENCES = (None, TRAIN, TEST, HELD_OUT)
Row = tuple[str, ...]
HEADS: Row = ("metric", "generated", "real")


class Quantity(NamedTuple):
    """A metric, by its name, and the images that it is measured against."""

    name: str
    reference: str | None = None

    @property
    def metric(self) -> Metric:
        """What `METRICS` says of it."""
        return METRICS[self.name]

    @property
    def title(self) -> str:
        """What is measured against what."""
        title = self.metric.title
        return f"{title} ({self.reference})" if self.reference in (TRAIN, TEST) else title

    @property
    def heading(self) -> str:
        """The title with an arrow to what is better."""
        better, arrows = self.metric.better, {"higher": " ↑", "lower": " ↓", None: ""}
        return self.title + (f" ≈ {better:g}" if isinstance(better, float) else arrows[better])

    def found(
        self, records: Records, *, real: bool = False, client: int | None = None
    ) -> Record | None:
        """Return what was recorded last of it, of generated images or of real ones."""
        return records.last(self.name, reference=self.reference, real=real, client=client)


def quantities(*uses: Use) -> list[Quantity]:
    """List all that can be measured, with one of some uses or of any."""
    return [
        Quantity(metric.name, reference)
        for metric in METRICS.values()
        if not uses or metric.uses.intersection(uses)
        for reference in REFERENCES
    ]


def measured(
    records: Records, *uses: Use, references: Iterable[str | None] = REFERENCES
) -> Iterator[tuple[Quantity, Record | None, Record | None]]:
    """List what was measured of the whole run: a quantity, of generated images and of real ones."""
    for quantity in quantities(*uses):
        found = [quantity.found(records, real=real) for real in (False, True)]
        if quantity.reference in references and any(found):
            yield quantity, found[0], found[1]


def format_table(evaluation: Evaluation) -> str:
    """Lay an evaluation out: a metric per line, generated images beside real ones."""
    return lay_out([HEADS, *metric_rows(evaluation)])


def metric_rows(evaluation: Evaluation) -> list[Row]:
    """List what an evaluation holds under `HEADS`: a metric, of generated images, of real ones."""
    return [
        (quantity.heading, with_std(generated), with_std(real))
        for quantity, generated, real in measured(evaluation.records)
    ]


def with_std(record: Record | None) -> str:
    """Write a value with its standard deviation; nothing where there is none."""
    if record is None:
        return ""
    spread = "" if record.std is None else f" +- {record.std:.4f}"
    return f"{record.value:.4f}{spread}"


def lay_out(rows: Sequence[Row]) -> str:
    """Align the columns of a table, names to the left and figures to the right; heads first."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [
        "  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]).rstrip()
        for row in rows
    ]
    return "\n".join([lines[0], "-" * (sum(widths) + 2 * len(widths) - 2), *lines[1:]])


def caption(evaluation: Evaluation, counts: list[int]) -> list[str]:
    """Say what a table holds for: what was measured through what, and how many images.

    Args:
        evaluation: the table's.
        counts: different numbers of generated images per class, ascending; empty: not known.
    """
    return [
        *label_caption(evaluation.label, counts),
        *all_scored(evaluation),
        *metric_captions(evaluation.records),
    ]


def label_caption(label: Label, counts: list[int]) -> list[str]:
    """Say what figures hold for; see `caption`."""
    nothing_held_out = (
        "no images are held out: all is measured against the training images, where copies of "
        "them score best, and there is no search for copies"
    )
    return [
        f"data {label.data}: {label.n_generated:,} generated images"
        + (f" ({span(counts)} of each class)" if counts else "")
        + f", {label.n_train:,} training and {label.n_test:,} test images; seed {label.seed}",
        *looked_through(label),
        f"real: {stand_ins(label)}",
        scored(label),
        *[nothing_held_out] * (label.n_test == 0),
    ]


def metric_captions(records: Records) -> list[str]:
    """List what a reader must know of the metrics that were measured."""
    found = dict.fromkeys(quantity.metric.caption for quantity, *_ in measured(records))
    return [*filter(None, found)]


def scored(label: Label) -> str:
    """Say how many generated images are behind the scores beside the floor."""
    if label.n_floor != label.n_scored:
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


def all_scored(evaluation: Evaluation) -> list[str]:
    """Say the distances of all generated images, where the scores are of fewer."""
    told = [
        f"{quantity.heading} {generated.value:.4f}"
        for quantity, generated, _ in measured(evaluation.whole, Use.SUMMARY)
        if generated is not None
    ]
    if not told:
        return []
    return [
        f"of all {evaluation.label.n_generated:,} generated images, not comparable with the table: "
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
        *["FD is not FID: the scores of the literature look through Inception"] * (not inception),
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


def flat_evaluation(evaluation: Evaluation) -> dict[str, Any]:
    """Return an evaluation as one row of a spreadsheet, with names such as "floor_fid_test"."""
    label = asdict(evaluation.label)
    row = {"eval.seed": label.pop("seed"), **label, **evaluation.drawn}
    for prefix, records in (("", evaluation.records), ("whole_", evaluation.whole)):
        for each in records.all:
            parts = [prefix + "floor_" * each.real + each.metric, each.reference]
            name = "_".join(filter(None, parts))
            row[name] = each.value
            if each.std is not None:
                row[f"{name}_std"] = each.std
    return row
