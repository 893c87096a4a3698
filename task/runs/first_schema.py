"""Lines of metrics.jsonl as the first schema of a run's folder had them, made into records.

Each line was an object of "round", "who" ("global" or "client-3"), "name" and "value". The name
held what are fields of a `Record` now: "floor_kid_test_std" or "quality_floor_fid".
"""

import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

# The metric, the images it was measured against, and whether real ones stood in.
RENAMED: dict[str, tuple[str, str | None, bool]] = {
    "train_loss": ("loss", "train", False),
    "test_loss": ("loss", "test", False),
    "fid_train": ("fid", "train", False),
    "fid_test": ("fid", "test", False),
    "kid_train": ("kid", "train", False),
    "kid_test": ("kid", "test", False),
    "agreement": ("class_agreement", None, False),
    "agreement_real": ("class_agreement", None, True),
    "classifier_test_accuracy": ("class_agreement", None, True),
    "held_out_accuracy": ("class_agreement", None, True),
    "cas_real_same_n": ("cas", None, True),
    "cas_real": ("cas_real", None, True),
    "pixel_generated": ("pixel_distance", None, False),
    "pixel_held_out": ("pixel_distance", None, True),
    "feature_generated": ("feature_distance", None, False),
    "feature_held_out": ("feature_distance", None, True),
    "num_hospitals": ("num_scoring_clients", None, False),
    "num_examples": ("num_held_out", None, False),
    "num_held_out_searched": ("num_held_out", None, False),
}
# Numbers of images, which are fields of the records beside them.
NUMBERS = {
    *("train_num_examples", "test_num_examples", "num_generated_images", "n_generated", "n_scored"),
    *("num_noise_position_real", "quality_num_class_hospitals", "quality_scored"),
}
# Of as many generated images as were drawn, and not as there are real ones.
OF_ALL = ("noise_position", "class_agreement", "chance_agreement", "cas", "pixel_", "feature_")
# Of real images, whose number was not written down.
OF_REAL = (
    *("classifier_test_accuracy", "agreement_real", "cas_real"),
    *("pixel_held_out", "feature_held_out"),
)
# Of no images.
COUNTED = (
    *("num_", "seconds", "round_", "overhead_", "images_per"),
    "update_norm",
    "counted_images",
)
SCORED = re.compile(r"(\d+) images, extractor (\S+), image range (\S+), seed (\d+)")

Line = Mapping[str, Any]


def is_of_first_schema(line: Line) -> bool:
    """Whether an object of metrics.jsonl is of the first schema."""
    return "who" in line


def translated(lines: Iterable[Line]) -> Iterator[dict[str, Any]]:
    """Make the fields of records from all lines of a run, in order.

    Raises:
        KeyError: a line lacks something.
        ValueError: a line is not of the first schema.
    """
    groups: dict[tuple[int, int | None], dict[str, Any]] = {}
    for line in lines:
        client = None if line["who"] == "global" else int(line["who"].removeprefix("client-"))
        # A number that was recorded twice is the last one.
        groups.setdefault((line["round"], client), {})[line["name"]] = line["value"]
    for (number, client), values in groups.items():
        for name, value in values.items():
            if name not in NUMBERS and not name.startswith("whole_") and _is_like(name, values):
                yield {
                    "round": number,
                    "client": client,
                    "value": value,
                    **_fields(name, values, groups.get((number, None), {}), client),
                }


def _is_like(name: str, values: Line) -> bool:
    """Whether a floor is of as many images as the scores beside it; one without a number is not."""
    if name.endswith("_std") and name.removesuffix("_std") in values:
        return False  # a field of the record of the mean
    is_floor = name.startswith("floor_") and name != "floor_noise_position"
    return not is_floor or "n_scored" in values


def _fields(name: str, values: Line, of_round: Line, client: int | None) -> dict[str, Any]:
    if name.endswith("_left_out"):
        activity = name.removesuffix("_left_out").replace("quality", "scores")
        context = {"activity": activity, "reason": values[name]}
        return {"metric": "left_out", "value": 1, "context": context}
    is_score = name.startswith("quality_")
    base = name.removeprefix("quality_").removeprefix("floor_")
    if client is not None and base not in RENAMED:
        base = base.removeprefix("train_")
    metric, reference, real = RENAMED.get(base, (base, None, False))
    fields = {"metric": metric, "real": real or "floor_" in name}
    if is_score:
        return fields | _score_fields(metric, values, of_round)
    n, std = _number(name, metric, values), values.get(f"{name}_std")
    return fields | {"reference": reference, "n": n, "std": std}


def _number(name: str, metric: str, values: Line) -> Any:
    """Find how many images a number is of."""
    if metric == "loss":
        return values.get(name.replace("loss", "num_examples"))
    if name == "floor_noise_position":
        return values.get("num_noise_position_real")
    if name in OF_REAL or metric.startswith(COUNTED):
        return None
    scored = None if metric.startswith(OF_ALL) else values.get("n_scored")
    return values.get("num_generated_images", scored or values.get("n_generated"))


def _score_fields(metric: str, values: Line, of_round: Line) -> dict[str, Any]:
    """Say what was scored at a hospital, or at all of them together, and by what."""
    if metric == "num_held_out":
        return {}
    clients = None if metric == "num_scoring_clients" else values.get("quality_num_hospitals")
    if metric in ("class_agreement", "chance_agreement"):
        clients = values.get("quality_num_class_hospitals", clients)
    context = {} if clients is None else {"num_clients": clients}
    said = SCORED.fullmatch(of_round.get("quality_scored", ""))
    if said:
        context |= {"extractor": said[2], "image_range": said[3], "seed": int(said[4])}
    return {
        "reference": None if metric == "num_scoring_clients" else "held_out",
        "n": int(said[1]) if said else None,
        "context": context,
    }
