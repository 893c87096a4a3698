"""The files of a run that keep what was measured of its images, `evaluation-*.json`."""

import json
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from task.checks import require
from task.config import (
    EXTRACTORS,
    IMAGE_RANGES,
    SAMPLER_VALUES,
    Config,
    flat_values,
    read_config,
)
from task.runs.first_schema import translated
from task.runs.layout import read_json, understood
from task.runs.records import Record, Records

# Of the noise that images are drawn from, and of what measures them.
SEEDS = ("seed", "eval.seed")


@dataclass(frozen=True)
class Label:
    """What a figure must carry: figures are comparable where all of this but the data is equal.

    Attributes:
        data: name of the data set.
        extractor: name of the network that the metrics looked through.
        extractor_sha256: of its weights.
        image_range: "correct" or "paper"; never put the two into one column.
        real_flipped: whether all images were mirrored at random, as the released code does with
            CT scans.
        n_generated: generated images.
        n_train: real training images.
        n_test: real test images; 0 where none are held out.
        n_floor: real images that stand in for generated ones in the floor.
        n_scored: generated images behind each of the scores beside the floor.
        n_rarest: generated images of the class that has the fewest; None of an older version.
        seed: of all that is random in the measuring.
    """

    data: str
    extractor: str
    extractor_sha256: str
    image_range: str
    real_flipped: bool
    n_generated: int
    n_train: int
    n_test: int
    n_floor: int
    n_scored: int
    n_rarest: int | None
    seed: int


@dataclass(frozen=True)
class Evaluation:
    """What was measured of one set of generated images, with the same of real ones.

    Attributes:
        label: what the figures hold for.
        records: of `label.n_scored` generated images and of as many real ones.
        whole: of all generated images, where these are more or are measured against more; not to
            be compared with those of real ones.
        drawn: how the images were drawn, by name of the value, and "round".
        name: of the file; empty where it is in none.
        otherwise: how the images were drawn otherwise than the run draws; empty: as the run does.
    """

    label: Label
    records: Records
    whole: Records
    drawn: Mapping[str, Any]
    name: str = ""
    otherwise: str = ""

    @property
    def round(self) -> int:
        """Of the weights that drew the images."""
        number: int = self.drawn["round"]
        return number

    @property
    def num_per_class(self) -> int | None:
        """Images of each class; None: as many as the real ones that they were measured beside."""
        return self.drawn.get("num_per_class")

    def content(self) -> dict[str, Any]:
        """Return it as a file has it; see `evaluation_of`."""
        records = {
            name: [json.loads(each.line()) for each in found.all]
            for name, found in (("records", self.records), ("whole", self.whole))
        }
        return {**asdict(self.label), **self.drawn, **records}


def evaluation_of(
    content: Mapping[str, Any], file: Path | None = None, otherwise: str = ""
) -> Evaluation:
    """Make the evaluation that a file holds, of this version's schema or of the first.

    Args:
        content: of the file.
        file: that holds it.
        otherwise: see `Evaluation`.

    Raises:
        ValueError: it is none.
    """
    names = [field.name for field in fields(Label)]
    with understood(file or Path("an evaluation")):
        given = dict(content)
        if "records" not in given:
            given = _of_first_schema(given)
        records, whole = (
            Records(tuple(Record(**each) for each in given.pop(part)))
            for part in ("records", "whole")
        )
        label = Label(**{name: given.pop(name) for name in names})
        require(isinstance(given["round"], int), "round", "a number", given["round"])
        require(bool(records.all), "records", "at least one", 0)
    return Evaluation(label, records, whole, given, file.name if file else "", otherwise)


# Of the first schema, beside the values of a `Label` and how images are drawn.
NO_SCORES = {"round", "num_inference_steps", "num_per_class", "eval.precision"}


def _of_first_schema(content: dict[str, Any]) -> dict[str, Any]:
    """Make records of the scores of a flat mapping."""
    drawn = {name.removeprefix("diffusion.") for name in SAMPLER_VALUES}
    told = {field.name for field in fields(Label)} | NO_SCORES | drawn
    content.pop("kid_subset_size", None)
    scores = {name: value for name, value in content.items() if name not in told}
    generated = content["n_generated"]
    n_scored = content.get("n_scored", generated)
    # Floors of another number of images are not read, which this number says of the others.
    like = {"n_scored": n_scored} if n_scored == content["n_floor"] else {}
    seen = {name: content[name] for name in ("extractor", "image_range", "seed")}

    def records(values: Mapping[str, Any]) -> list[dict[str, Any]]:
        line = {"round": content["round"], "who": "global"}
        lines = ({**line, "name": name, "value": value} for name, value in values.items())
        return [{"context": seen, **each} for each in translated(lines)]

    whole = {name[6:]: value for name, value in scores.items() if name.startswith("whole_")}
    return {
        "n_rarest": None,
        **{name: value for name, value in content.items() if name in told},
        "n_scored": n_scored,
        "records": records({**scores, "n_generated": generated, **like}),
        "whole": records({**whole, "n_generated": generated}),
    }


def read_evaluations(run: Path) -> list[Evaluation]:
    """Read what was measured of a run's global weights; what was drawn otherwise comes last.

    Raises:
        ValueError: a file is not what a run writes.
    """
    found = []
    pattern = rf"evaluation-({'|'.join(EXTRACTORS)})-({'|'.join(IMAGE_RANGES)})(?:-(.+))?"
    # By their stems, so that what is drawn otherwise comes after what it differs from.
    for file in sorted(run.glob("evaluation-*.json"), key=lambda file: file.stem):
        match = re.fullmatch(pattern, file.stem)
        if match is None or re.match(r"client-\d+", match[3] or ""):
            continue  # of a client's own model
        found.append(evaluation_of(read_json(file), file, match[3] or ""))
    return found


def evaluation_file(run: Path, config: Config, *subjects: str) -> Path:
    """Return the file of a run that keeps what an extractor said in an image range.

    Args:
        run: its folder.
        config: says which extractor and range.
        *subjects: what was measured where it is not the global model, such as "client-3", or not
            as the run draws, see `drawn_otherwise`; empty ones are left out.
    """
    parts = ["evaluation", config.eval.extractor, config.eval.image_range, *subjects]
    return run / ("-".join(filter(None, parts)) + ".json")


def drawn_otherwise(run: Path, config: Config) -> str:
    """Name the values by which images are drawn and measured otherwise than a run does; or "".

    Those that are not named, such as the number of images, stand in the file itself.

    Args:
        run: its folder.
        config: of the drawing.
    """
    own, asked = flat_values(read_config(run / "config.yaml")), flat_values(config)
    drawn = {path: path.partition(".")[2] for path in config.drawing_values}
    names = {**drawn, **{path: path for path in SEEDS}}
    return ",".join(
        f"{name}={asked[path]}" for path, name in names.items() if own[path] != asked[path]
    )


def drawing(config: Config, server_round: int) -> dict[str, Any]:
    """Say how images are drawn, for `Evaluation.drawn`."""
    values, diffusion = flat_values(config), config.diffusion
    drawn = {path.partition(".")[2]: values[path] for path in config.drawing_values}
    if diffusion is not None:
        drawn["num_inference_steps"] = diffusion.num_inference_steps or diffusion.num_timesteps
    drawn = {"round": server_round, **drawn, "eval.precision": config.eval.precision}
    if config.eval.num_per_class is not None:
        drawn["num_per_class"] = config.eval.num_per_class
    return drawn
