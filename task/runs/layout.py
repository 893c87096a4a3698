"""What lies where in the folder of a run, and the small things that are read from it.

<output_dir>/<run_name>/
    config.yaml                     the resolved configuration
    schema.json                     the version of this layout; a random number of the run
    metrics.jsonl                   a `task.runs.records.Record` per line
    partition.json, partition.png   images of each class at each client (simulation)
    pooled.json                     images of each class (centralized)
    data.json                       files used and left out, images that are the same, source and
                                    hashes of all images (simulation, centralized)
    nodes.json                      client numbers by node id; a hospital whose SuperLink has lost
                                    its database has several node ids (deployment)
    hospitals.json                  names of hospitals by client number, where the coordinator has
                                    given them (deployment)
    class_counts.json               classes, and images of each at each client that says so, null
                                    where one does not (deployment)
    start.json                      the weights that it started from (train.start_from)
    machine.json                    the device, with real nodes the server's own; the setting,
                                    versions and code
    times.json                      when, for how long and on which machine the run was worked on,
                                    an entry for each start
    submission.json                 what `flwr run` was given, to be given again
    supervision.json                what feddm-supervise did
    samples/round_0005.png          a grid, a row per class
    checkpoints/round_0005.safetensors   with a checksum, as all weights
    local/client-3.safetensors      the own final weights of a simulated client
    clients/client-3/round_0005.safetensors   what a simulated client keeps between rounds
    model.safetensors               the final weights
    study/study.json                what `feddm study` found, beside its images and classifiers
    report.html                     all of this on one page
    log.txt                         what Flower, Ray and the run said (feddm-train's simulations)
    tensorboard/                    the same metrics and pictures as events
"""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from task.config import MODEL_FILE, Config, read_config

SCHEMA_FILE = "schema.json"
# Of what is in a folder. The first, which wrote no schema.json, named what are fields of a record
# now: `task.runs.first_schema` reads it.
SCHEMA_VERSION = 2
PARTITION_FILE = "partition.json"
POOLED_FILE = "pooled.json"
DATA_FILE = "data.json"
# Of `feddm audit`; the picture holds training images.
AUDIT_FILE, PAIRS_FILE = "audit.json", "audit-pairs.png"
# The number of the last masked sum.
MASKED_SUMS_FILE = "sums.json"
# How often real nodes were asked to train privately, which costs each time.
PRIVATE_TRAININGS_FILE = "private-trainings.json"
NODES_FILE = "nodes.json"
HOSPITALS_FILE = "hospitals.json"
CLASS_COUNTS_FILE = "class_counts.json"
METRICS_FILE = "metrics.jsonl"
SUBMISSION_FILE = "submission.json"
MACHINE_FILE = "machine.json"
START_FILE = "start.json"
TIMES_FILE = "times.json"
REPORT_FILE = "report.html"
STUDY_FOLDER, STUDY_FILE = "study", "study.json"
LOCK_FILE = ".lock"
LOG_FILE = "log.txt"
# Put before the name of a file with weights that cannot be read.
DAMAGED = "damaged-"

# What the error of a run begins with that would end in it again.
DIVERGED = "training has diverged"


def run_path(config: Config) -> Path:
    """Return the folder of a run, which `output_dir` and `run_name` say."""
    return Path(config.output_dir) / config.run_name


@contextmanager
def understood(file: Path) -> Iterator[None]:
    """Say of a file that cannot be understood which it is and what to do.

    Raises:
        ValueError: whatever the block raises that what the file holds can be the cause of.
    """
    try:
        yield
    except (
        ValueError,
        TypeError,
        LookupError,
        AttributeError,
        ArithmeticError,
        RecursionError,
        SafetensorError,
    ) as error:
        why = " ".join(f"{type(error).__name__}: {error}".split())
        raise ValueError(
            f"{file} is not what a run writes ({why}); bring a copy of it back, or move it out of "
            "the folder"
        ) from error


def read_json(file: Path) -> Any:
    """Read a JSON file of a run; None where it is not there.

    Raises:
        ValueError: it is damaged.
    """
    if not file.exists():
        return None
    with understood(file):
        return json.loads(file.read_text(encoding="utf-8"))


def client_numbers(run: Path) -> dict[int, int] | None:
    """Read the client numbers of a run over real nodes by node id; None of any other folder.

    Raises:
        ValueError: they are damaged.
    """
    if not (run / NODES_FILE).exists():
        return None
    numbers = read_json(run / NODES_FILE)
    with understood(run / NODES_FILE):
        if any(type(number) is not int for number in numbers.values()):
            raise TypeError(f"expected a number for each node id, got {numbers!r}")
        return {int(node): number for node, number in numbers.items()}


def hospital_names(run: Path) -> dict[int, str]:
    """Read the names of a run's hospitals by client number; none where there are none.

    Raises:
        ValueError: they are damaged.
    """
    names = read_json(run / HOSPITALS_FILE) or {}
    with understood(run / HOSPITALS_FILE):
        if any(type(name) is not str for name in names.values()):
            raise TypeError(f"expected a name for each client, got {names!r}")
        return {int(client): name for client, name in names.items()}


def weights_file(run: Path, client: int | None = None) -> Path:
    """Return the file of a run's final weights, or of those of one of its simulated clients."""
    return run / (MODEL_FILE if client is None else f"local/client-{client}.safetensors")


def starting_file(start_from: str) -> Path:
    """Return the file of weights that `train.start_from` names, itself or by the run's folder."""
    path = Path(start_from)
    return weights_file(path) if path.is_dir() else path


def is_begun(run: Path) -> bool:
    """Whether the folder of a run holds one that can be resumed."""
    return (run / "config.yaml").exists()


def run_config(run: Path) -> Config:
    """Read the configuration of the run in a folder.

    Raises:
        ValueError: there is no run, or a newer version of feddm has written it.
    """
    if not is_begun(run):
        raise ValueError(f"RUN: {run} holds no run (there is no {run / 'config.yaml'})")
    with understood(run / SCHEMA_FILE):
        version = int((read_json(run / SCHEMA_FILE) or {"version": 1})["version"])
    if version > SCHEMA_VERSION:
        raise ValueError(
            f"{run} is of schema {version}, and this version of feddm reads schemas up to "
            f"{SCHEMA_VERSION}; use the version that wrote it, or a newer one"
        )
    return read_config(run / "config.yaml")


def checkpoints(run: Path) -> list[Path]:
    """List the checkpoints in the folder of a run, by round."""
    return sorted((run / "checkpoints").glob("round_*.safetensors"), key=round_of)


def last_complete_round(run: Path) -> int:
    """Return the last complete round of the run in a folder, 0 before the first."""
    return max((round_of(file) for file in checkpoints(run)), default=0)


def final_round(run: Path) -> int | None:
    """Return the round of the final weights of the run in a folder; None while there are none.

    Raises:
        ValueError: they are damaged.
    """
    file = weights_file(run)
    if not file.is_file():
        return None
    with understood(file), safe_open(file, framework="pt") as weights:
        return int((weights.metadata() or {})["round"])


def round_of(file: Path) -> int:
    """Return the round of "round_0005" with any ending.

    Raises:
        ValueError: the file is named otherwise.
    """
    number = file.stem.removeprefix("round_")
    if not number.isdecimal():
        raise ValueError(
            f"{file} must be named by a round, such as round_0005{file.suffix}; move it out of "
            "the folder of the run"
        )
    return int(number)
