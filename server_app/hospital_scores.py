"""What hospitals are asked about generated images, and what their answers say together."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import cast

import torch
from flwr.app import MessageType, MetricRecord, RecordDict
from torch import Tensor

from server_app.log import log
from server_app.messages import record_of
from server_app.replies import LARGEST_METRIC, UnusableReply, check_numbers
from server_app.weighting import Weighting
from task.checks import require
from task.config import MIN_MEASURED_IMAGES, Config
from task.generation.draw_images import balanced_labels
from task.protocol.wire import QUALITY, Key
from task.runs.records import HELD_OUT, SCORING_CLIENTS, Record, read_records
from task.runs.run_directory import METRICS_FILE

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
# The metric of each, and whether real images stand in for the generated ones.
RECORDED: dict[str, tuple[str, bool]] = {
    Key.FID: ("fid", False),
    Key.FLOOR_FID: ("fid", True),
    Key.KID: ("kid", False),
    Key.FLOOR_KID: ("kid", True),
    Key.NOISE_POSITION: ("noise_position", False),
    Key.FLOOR_NOISE_POSITION: ("noise_position", True),
    Key.PIXEL_COPIED: ("pixel_copied", False),
    Key.PIXEL_P_VALUE: ("pixel_p_value", False),
    Key.FEATURE_COPIED: ("feature_copied", False),
    Key.FEATURE_P_VALUE: ("feature_p_value", False),
    Key.CLASS_AGREEMENT: ("class_agreement", False),
    Key.HELD_OUT_ACCURACY: ("class_agreement", True),
    Key.CHANCE_AGREEMENT: ("chance_agreement", False),
}
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


def scoring_settings(config: Config) -> dict[str, str | int]:
    """Return by what images are scored; scores of other settings cannot be compared."""
    chosen = config.eval
    return {
        "extractor": chosen.extractor,
        "image_range": chosen.image_range,
        "seed": chosen.seed,
    }


def is_scored(path: Path, config: Config) -> bool:
    """Whether hospitals have scored the final images of the run in a folder, or are not to."""
    if not wants_scores(config):
        return True
    records = read_records(path / METRICS_FILE).by_round(SCORING_CLIENTS)
    found = records.get(config.federation.rounds)
    number = len(scored_labels(config, last=True))
    return found is not None and (found.n, found.context) == (number, scoring_settings(config))


def score_records(
    server_round: int,
    scores: Scores,
    config: Config,
    *,
    n: int,
    client: int | None = None,
    num_clients: int | None = None,
) -> list[Record]:
    """Make the records of the scores of one hospital, or of all of them together.

    Args:
        server_round: 1-based.
        scores: of `scores_of` or `combined_scores`.
        config: of the run.
        n: how many images were scored.
        client: the hospital; None: all of them.
        num_clients: of how many hospitals they are, where it is all of them.
    """
    records = [Record(server_round, "num_held_out", scores[Key.NUM_EXAMPLES], client=client)]
    for name, (metric, real) in RECORDED.items():
        if name in scores:
            context: dict[str, str | float] = {**scoring_settings(config)}
            if num_clients is not None:
                of_classes = name in CLASS_SCORES
                context["num_clients"] = scores[NUM_CLASS_HOSPITALS] if of_classes else num_clients
            records.append(
                Record(
                    *(server_round, metric, scores[name]),
                    client=client,
                    reference=HELD_OUT,
                    real=real,
                    n=n,
                    context=context,
                )
            )
    return records


def scores_of(content: RecordDict) -> Scores:
    """Return what was asked for of a reply that was checked, and nothing else."""
    metrics = record_of(content, Key.METRICS, MetricRecord)
    if metrics[Key.NUM_EXAMPLES] == 0:
        return {Key.NUM_EXAMPLES: 0}
    asked = (Key.NUM_EXAMPLES, *SCORES, *CLASS_SCORES)
    return {name: cast(int | float, metrics[name]) for name in asked if name in metrics}


def combined_scores(scores: Sequence[Scores], config: Config) -> Scores:
    """Combine the scores of hospitals by `Weighting.combine`, and add their held-out images up.

    Args:
        scores: of each hospital, at least one; "num-examples" is not 0.
        config: of the run.

    Returns:
        The scores that a hospital has, and "num-class-hospitals", of how many those of
        `CLASS_SCORES` are.
    """
    weighing = Weighting.of(config.federation, simulated=False)
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
