"""What hospitals are asked about generated images, and what their answers say together."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import cast

import torch
from flwr.app import MessageType, MetricRecord, RecordDict
from torch import Tensor

from server_app.aggregation import Weighing
from server_app.exchange import LARGEST_METRIC, UnusableReply, check_numbers
from server_app.log import log
from server_app.messages import record_of
from task.checks import require
from task.config import MIN_MEASURED_IMAGES, Config
from task.generation.draw_images import balanced_labels
from task.protocol.wire import QUALITY, Key
from task.runs.run_directory import read_metrics

QUALITY_TYPE = f"{MessageType.EVALUATE}.{QUALITY}"

Scores = dict[str, int | float]

SHARE = (0.0, 1.0)
# All that is written down of a reply, with the least and the largest that it may be.
SCORES: dict[str, tuple[float, float]] = {
    Key.FID: (0.0, LARGEST_METRIC),
    Key.FLOOR_FID: (0.0, LARGEST_METRIC),
    Key.KID: (-LARGEST_METRIC, LARGEST_METRIC),
    Key.FLOOR_KID: (-LARGEST_METRIC, LARGEST_METRIC),
    Key.NOISE_POSITION: (0.0, LARGEST_METRIC),
    Key.FLOOR_NOISE_POSITION: (0.0, LARGEST_METRIC),
    Key.PIXEL_COPIED: SHARE,
    Key.PIXEL_P_VALUE: SHARE,
    Key.FEATURE_COPIED: SHARE,
    Key.FEATURE_P_VALUE: SHARE,
}
# Of a hospital's own classifier; one with images of a single class has none of them.
CLASS_SCORES: dict[str, tuple[float, float]] = {
    Key.CLASS_AGREEMENT: SHARE,
    Key.HELD_OUT_ACCURACY: SHARE,
    Key.CHANCE_AGREEMENT: SHARE,
}
SCORED = "quality_scored"
NUM_CLASS_HOSPITALS = "num-class-hospitals"


def scored_labels(config: Config, *, last: bool) -> Tensor:
    """List the classes of the images that hospitals score, [N] int64, as many of each.

    They are `eval.num_images`; after the last round `eval.num_per_class` of each class where
    `eval.final_metrics` asks for them.
    """
    num_classes = len(config.data.classes)
    per_class = config.eval.num_per_class
    if last and config.eval.final_metrics and per_class is not None:
        return torch.arange(num_classes).repeat_interleave(per_class)
    return balanced_labels(config.eval.num_images, num_classes)


def wants_scores(config: Config) -> bool:
    """Whether hospitals are to score images at the end of a run; not where they are too few."""
    return len(scored_labels(config, last=True)) >= MIN_MEASURED_IMAGES


def check_scoring(config: Config) -> None:
    """Check that hospitals can do what is asked, and say so where nothing is.

    Raises:
        ValueError: they cannot.
    """
    if not wants_scores(config):
        require(
            not config.eval.final_metrics,
            "eval.num_images",
            f"at least {MIN_MEASURED_IMAGES} for eval.final_metrics with real nodes, which score "
            "as many (or give eval.num_per_class)",
            config.eval.num_images,
        )
        log(f"no images are scored: eval.num_images is below {MIN_MEASURED_IMAGES}")
        return
    require(
        config.eval.extractor != "exported",
        "eval.extractor",
        "classifier or inception with real nodes, which load no program from outside",
        config.eval.extractor,
    )


def check_scores(content: RecordDict) -> None:
    """Check the scores of a reply; a hospital with too few held-out images has none.

    Raises:
        UnusableReply: a score is missing or is no number that it can be.
    """
    if Key.METRICS not in content:
        raise UnusableReply(f"no record {Key.METRICS.value!r} in the reply")
    metrics = record_of(content, Key.METRICS, MetricRecord)
    if metrics.get(Key.NUM_EXAMPLES) != 0:
        check_numbers(metrics, SCORES | (CLASS_SCORES if has_class_scores(metrics) else {}))


def has_class_scores(scores: Mapping[str, object]) -> bool:
    """Whether a hospital says how often its classifier finds the class."""
    return any(name in scores for name in CLASS_SCORES)


def describe_scoring(config: Config) -> str:
    """Say by what the images after the last round are scored: figures of other words differ."""
    chosen = config.eval
    return (
        f"{len(scored_labels(config, last=True))} images, extractor {chosen.extractor}, "
        f"image range {chosen.image_range}, seed {chosen.seed}"
    )


def is_scored(path: Path, config: Config) -> bool:
    """Whether hospitals have scored the final images of the run in a folder, or are not to."""
    told = {"round": config.federation.rounds, "name": SCORED, "value": describe_scoring(config)}
    return not wants_scores(config) or any(
        all(metric[name] == value for name, value in told.items()) for metric in read_metrics(path)
    )


def scores_of(content: RecordDict) -> Scores:
    """Return what was asked for of a reply that was checked, and nothing else."""
    metrics = record_of(content, Key.METRICS, MetricRecord)
    if metrics[Key.NUM_EXAMPLES] == 0:
        return {Key.NUM_EXAMPLES: 0}
    asked = (Key.NUM_EXAMPLES, *SCORES, *CLASS_SCORES)
    return {name: cast(int | float, metrics[name]) for name in asked if name in metrics}


def combined_scores(scores: Sequence[Scores], config: Config) -> Scores:
    """Combine the scores of hospitals by `Weighing.combine`, and add their held-out images up.

    Args:
        scores: of each hospital, at least one; "num-examples" is not 0.
        config: of the run.

    Returns:
        The scores that a hospital has, and "num-class-hospitals", of how many those of
        `CLASS_SCORES` are.
    """
    weighing = Weighing.of(config.federation, simulated=False)
    of_classes = [hospital for hospital in scores if has_class_scores(hospital)]
    combined: Scores = {
        name: weighing.combine(
            [(int(hospital[Key.NUM_EXAMPLES]), hospital[name]) for hospital in tellers]
        )
        for names, tellers in ((SCORES, scores), (CLASS_SCORES, of_classes))
        for name in names
        if tellers
    }
    total = sum(hospital[Key.NUM_EXAMPLES] for hospital in scores)
    return {Key.NUM_EXAMPLES: total, NUM_CLASS_HOSPITALS: len(of_classes), **combined}


def describe_means(means: Scores, num_hospitals: int, config: Config) -> str:
    """Say what hospitals found together, in one line."""
    own = "each hospital's own classifier" if config.eval.extractor == "classifier" else "inception"
    found = "the asked class was looked for at no hospital with two classes or more"
    if has_class_scores(means):
        found = (
            f"the asked class found in {means[Key.CLASS_AGREEMENT]:.1%} (of held-out images in "
            f"{means[Key.HELD_OUT_ACCURACY]:.1%}, by chance in {means[Key.CHANCE_AGREEMENT]:.1%}; "
            f"{means[NUM_CLASS_HOSPITALS]} hospitals)"
        )
    return (
        f"images scored at {num_hospitals} hospitals on {means[Key.NUM_EXAMPLES]} held-out images: "
        f"FID {means[Key.FID]:.2f} (their own floor {means[Key.FLOOR_FID]:.2f}), "
        f"KID {means[Key.KID]:.4f} ({means[Key.FLOOR_KID]:.4f}), {found}, "
        f"between real (0) and noise (1) {means[Key.NOISE_POSITION]:.2f} "
        f"({means[Key.FLOOR_NOISE_POSITION]:.2f}) (extractor: {own}, image range "
        f"{config.eval.image_range})"
    )
