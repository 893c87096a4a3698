"""What was submitted to start a run, written down where the run can be submitted again."""

import shlex
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TypeVar

from pydantic import TypeAdapter, ValidationError

from task.code_version import ROOT, code_fingerprint
from task.config import Word
from task.runs.layout import SUBMISSION_FILE
from task.runs.writer import RunWriter

Stored = TypeVar("Stored")

# What a resubmission says by itself.
SETTLED = ("output_dir", "run_name", "resume")


@dataclass(frozen=True)
class Submission:
    """The run that holds a run directory, or held it last.

    Attributes:
        run_id: Flower's number of the run.
        app: absolute folder of the code that ran, from which `flwr run` makes the same bundle.
        fingerprint: of that code.
        run_config: what starts the run in this very directory, but for `resume`.
    """

    run_id: int
    app: str
    fingerprint: str
    run_config: dict[str, Word]


def write_submission(
    directory: RunWriter, run_id: int, run_config: Mapping[str, Word]
) -> Submission:
    """Write down, in its directory, how a run was started.

    Args:
        directory: of the run, open.
        run_id: Flower's number of the run.
        run_config: `context.run_config`.
    """
    words = settled_words(run_config, directory.path)
    submission = Submission(run_id, str(ROOT), code_fingerprint(), words)
    directory.write_json(SUBMISSION_FILE, asdict(submission))
    return submission


def settled_words(run_config: Mapping[str, Word], path: Path) -> dict[str, Word]:
    """Return the words of a run without those that say nothing, and with the name of its folder.

    A name may have been made from the time of day, and `resume` depends on what is there.

    Args:
        run_config: `context.run_config`.
        path: folder of the run, absolute.
    """
    given = {key: value for key, value in run_config.items() if value != ""}
    overrides = [
        override
        for override in shlex.split(str(given.pop("overrides", "")))
        if override.split("=")[0].lstrip("+") not in SETTLED
    ]
    words = {key: value for key, value in given.items() if key not in SETTLED}
    if overrides:
        words["overrides"] = shlex.join(overrides)
    return {**words, "output_dir": str(path.parent), "run_name": path.name}


def read_as(kind: type[Stored], file: Path) -> Stored:
    """Read a JSON file with the fields of a dataclass: a `Submission` or a `Supervision`.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: its fields are others; names the first that is.
    """
    try:
        return TypeAdapter(kind).validate_json(file.read_bytes(), strict=True)
    except ValidationError as error:
        first = error.errors()[0]
        field = ".".join(map(str, first["loc"])) or "its text"
        raise ValueError(
            f"{file} must be a {kind.__name__.lower()} of this feddm; {field}: {first['msg']}"
        ) from error
