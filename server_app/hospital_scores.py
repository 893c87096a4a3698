"""What hospitals are asked about generated images, and what their answers say together."""

from collections.abc import Container, Sequence
from pathlib import Path
from typing import Any

import torch
from flwr.app import MessageType, MetricRecord, RecordDict
from torch import Tensor

from server_app.log import log
from server_app.messages import record_of
from server_app.replies import LARGEST_METRIC, read_numbers
from server_app.weighting import Weighting
from task.checks import require
from task.config import MIN_MEASURED_IMAGES, Config
from task.evaluation.hospital_scores import HospitalScores
from task.evaluation.metrics import Use, metrics_of
from task.generation.draw_images import balanced_labels
from task.protocol.wire import SCORES, Key
from task.runs.layout import METRICS_FILE
from task.runs.records import HELD_OUT, SCORING_CLIENTS, Record, Records, read_records

SCORES_TYPE = f"{MessageType.EVALUATE}.{SCORES}"


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
    if not config.model.draws:
        return
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
    silent_with = {
        "privacy.mechanism=dp_sgd": config.privacy.is_on,
        "federation.secure_aggregation=true": config.federation.secure_aggregation,
    }
    for setting, is_on in silent_with.items():
        require(
            not is_on,
            "eval.num_images",
            f"0, and eval.final_metrics false, with real nodes and {setting}: scores would be "
            "those of single hospitals, which say none",
            config.eval.num_images,
        )
    require(
        config.eval.extractor != "exported",
        "eval.extractor",
        "classifier, efficientnet or inception with real nodes, which load no program from outside",
        config.eval.extractor,
    )


def read_scores(content: RecordDict) -> HospitalScores:
    """Return the scores of a reply, and nothing else of it.

    Raises:
        UnusableReply: a score is missing or is no number that it can be.
    """
    metrics = record_of(content, Key.METRICS, MetricRecord)
    if metrics.get(Key.NUM_EXAMPLES) == 0:  # too few held-out images
        return {Key.NUM_EXAMPLES: 0}
    return read_numbers(content, expected_scores(metrics))


def expected_scores(scores: Container[str]) -> dict[str, tuple[float, float]]:
    """Return the least and the largest value of each score that a hospital owes.

    Those of its own classifier are owed by one that has sent any: one with images of a single
    class has none.
    """
    of_classes = any(metric.key() in scores for metric in metrics_of(Use.HOSPITALS_OF_CLASSES))
    uses = [Use.HOSPITALS, *([Use.HOSPITALS_OF_CLASSES] if of_classes else [])]
    return {
        key: (max(metric.bounds[0], -LARGEST_METRIC), min(metric.bounds[1], LARGEST_METRIC))
        for metric in metrics_of(*uses)
        for key in metric.keys
    }


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
    server_round: int, scores: HospitalScores, config: Config, *, n: int, client: int
) -> list[Record]:
    """Make the records of the scores of one hospital.

    Args:
        server_round: 1-based.
        scores: of `read_scores`.
        config: of the run.
        n: how many images were scored.
        client: the hospital.
    """
    fields: dict[str, Any] = {"client": client, "n": n, "context": scoring_settings(config)}
    return [
        Record(server_round, "num_held_out", scores[Key.NUM_EXAMPLES], client=client),
        *(
            Record(server_round, name, scores[key], reference=HELD_OUT, real=real, **fields)
            for key, (name, real) in _names().items()
            if key in scores
        ),
    ]


def combined_records(
    server_round: int, scores: Sequence[HospitalScores], config: Config, *, n: int
) -> list[Record]:
    """Combine the scores of hospitals by `Weighting.combine`, and add their held-out images up.

    Args:
        server_round: 1-based.
        scores: of each hospital, at least one; "num-examples" is not 0.
        config: of the run.
        n: how many images were scored.
    """
    weighting = Weighting.of(config, simulated=False)
    total = sum(hospital[Key.NUM_EXAMPLES] for hospital in scores)
    records = [Record(server_round, "num_held_out", total)]
    for key, (name, real) in _names().items():
        told = [(int(each[Key.NUM_EXAMPLES]), each[key]) for each in scores if key in each]
        if told:
            context = {**scoring_settings(config), "num_clients": len(told)}
            value = weighting.combine(told)
            fields: dict[str, Any] = {"real": real, "n": n, "context": context}
            records.append(Record(server_round, name, value, reference=HELD_OUT, **fields))
    return records


def _names() -> dict[str, tuple[str, bool]]:
    """Return the metric of each key, and whether it is of real images."""
    asked = metrics_of(Use.HOSPITALS, Use.HOSPITALS_OF_CLASSES)
    return {key: (metric.name, real) for metric in asked for key, real in metric.keys.items()}


def describe_scores(records: Records, num_hospitals: int, config: Config) -> str:
    """Say what hospitals found together, in one line."""
    extractor = config.eval.extractor
    own = "each hospital's own classifier" if extractor == "classifier" else extractor
    found = []
    for metric in metrics_of(Use.HOSPITALS, Use.HOSPITALS_OF_CLASSES):
        value = records.value(metric.name, reference=HELD_OUT)
        real = records.value(metric.name, reference=HELD_OUT, real=True)
        if value is not None:
            beside = "" if real is None else f" (real images {real:.4g})"
            found.append(f"{metric.title} {value:.4g}{beside}")
    return (
        f"images scored at {num_hospitals} hospitals on {records.value('num_held_out'):.0f} "
        f"held-out images: {', '.join(found)} (extractor: {own}, image range "
        f"{config.eval.image_range})"
    )
