"""Whether a run can begin or go on in its folder, and which values of two runs may differ."""

import hashlib
import tempfile
from pathlib import Path
from typing import Any

from task.config import (
    Config,
    flat_values,
    settle_extractor,
    settle_precisions,
    unknown_values,
)
from task.runs.layout import START_FILE, is_begun, read_json, run_config, run_path, starting_file

NAMES_AND_PLACES = frozenset({"experiment", "output_dir", "run_name", "resume", "data.cache_dir"})

# A resumed run may change these: none of them touches the weights of a round.
FREE_TO_CHANGE = NAMES_AND_PLACES | frozenset(
    {
        "data.root",
        *("federation.rounds", "federation.num_supernodes", "federation.min_nodes"),
        *("federation.min_replies", "federation.node_wait", "federation.round_timeout"),
        *("federation.keep_checkpoints", "federation.cpus_per_client"),
        *("federation.gpus_per_client", "federation.keep_local_models"),
        *("federation.max_in_flight", "federation.round_attempts"),
        # They choose other values before a run begins.
        *("federation.images_per_client", "train.steps_per_round"),
        *("eval.every", "eval.images_per_class"),
        *("eval.num_images", "eval.metrics_every", "eval.final_metrics", "eval.num_per_class"),
        *("eval.seed", "eval.batch_size", "eval.precision"),
        *("eval.extractor", "eval.image_range"),
        *("eval.inception_weights", "eval.exported_program"),
        *("audit.at_end", "audit.every", "audit.num_images"),
    }
)

# As data.root, these may lie elsewhere; a run that has none stays without.
MOVED_TABLE = "data.patients"
MOVED_WEIGHTS = "train.start_from"

# Runs that differ in nothing else have the same final weights, but for rounding.
WITHOUT_INFLUENCE = (FREE_TO_CHANGE - {"federation.rounds", "federation.num_supernodes"}) | {
    *("train.device", "train.precision", "train.num_threads", "train.channels_last"),
    *("train.deterministic", "train.compile", "train.num_processes"),
}

# Of the section train, what a centralized run does not use.
CLIENT_VALUES = frozenset(
    {"train.client_batch_fraction", "train.client_lr_factor", "train.optimizer_state"}
)


def check_startable(config: Config) -> None:
    """Check that a run can be started, or resumed, in its folder, and make it.

    Raises:
        ValueError: there is a run already, or none to resume, or one of another configuration,
            or the folder cannot be written.
    """
    path = run_path(config)
    try:
        exists = is_begun(path)
    except OSError as error:
        raise ValueError(f"run_name: {path} is no possible folder ({error.strerror})") from error
    if exists and not config.resume:
        raise ValueError(
            f"run_name: {path} already holds a run; pass resume=true to continue it "
            "or another run_name"
        )
    if config.resume and not exists:
        raise ValueError(f"resume: {path} holds no run; check output_dir and run_name")
    if config.resume:
        check_same_run(config, path)
    try:
        path.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=path).close()
    except OSError as error:
        raise ValueError(
            f"output_dir: cannot write to {path} ({error.strerror}); choose another"
        ) from error


def check_same_run(config: Config, path: Path) -> None:
    """Check that a configuration gives the weights of the run in a folder.

    Raises:
        ValueError: it does not; names every key that differs.
    """
    different = different_values(run_config(path), config)
    unknown = [f"{k}={v}" for k, v in unknown_values(path / "config.yaml").items()]
    if unknown:
        raise ValueError(
            f"resume: {path} was trained with {', '.join(unknown)}, which this version of feddm "
            "does not know; resume it with the version that began it"
        )
    differences = [
        f"{key}={asked} (there: {stored})"
        for key, (stored, asked) in different.items()
        if not _is_free(key, config) and not _is_moved(key, stored, asked, path, config)
    ]
    if differences:
        plan = _plans_rounds(config) if "federation.rounds" in different else ""
        raise ValueError(
            f"resume: {path} is a run of another configuration; asked for "
            f"{', '.join(differences)}; pass the words that it was started with"
            + (f" (federation.rounds is fixed by {plan})" if plan else "")
        )


def _is_free(key: str, config: Config) -> bool:
    return key in FREE_TO_CHANGE and not (key == "federation.rounds" and _plans_rounds(config))


def _plans_rounds(config: Config) -> str:
    """Say which value depends on how many rounds there are to be; "" where none does."""
    if config.privacy.epsilon is not None:
        return "privacy.epsilon, to which the noise of as many rounds as were planned keeps"
    if config.train.lr_schedule != "constant":
        return (
            f"train.lr_schedule={config.train.lr_schedule}, which ends with the last of them; "
            "train.start_from begins a new run with the weights of a finished one"
        )
    return ""


def _is_moved(key: str, stored: object, asked: object, path: Path, config: Config) -> bool:
    """Whether two values name two places of the same; of a table, the split will tell it."""
    if key == MOVED_TABLE:
        return bool(stored and asked)
    if (frozen := config.model.frozen_file) is not None and key == frozen.path_value:
        # The SHA-256 is a value of its own, which must be equal.
        return bool(flat_values(config)[frozen.sha256_value])
    if key != MOVED_WEIGHTS or not (stored and asked):
        return False
    file, told = starting_file(str(asked)), read_json(path / START_FILE) or {}
    return file.is_file() and hashlib.sha256(file.read_bytes()).hexdigest() == told.get("sha256")


def different_values(stored: Config, asked: Config) -> dict[str, tuple[Any, Any]]:
    """List the values by which two runs differ, except for their names and places.

    Args:
        stored: of a run, resolved.
        asked: of another, which takes over what it leaves open and `stored` has settled.
    """
    resolved, wanted = flat_values(stored), flat_values(settled_as(stored, asked))
    without_clients = stored.train.mode == asked.train.mode == "centralized"
    return {
        # Models of another family lack the values of this one.
        key: (value, wanted.get(key))
        for key, value in resolved.items()
        if value != wanted.get(key)
        and key not in NAMES_AND_PLACES
        and not (without_clients and is_about_clients(key))
    }


def settled_as(stored: Config, asked: Config) -> Config:
    """Take over what a stored run has settled and a configuration leaves "auto"."""
    asked = settle_extractor(asked, stored.eval.extractor)
    return settle_precisions(asked, train=stored.train.precision, eval=stored.eval.precision)


def is_about_clients(key: str) -> bool:
    """Whether a value says something in a federated run only."""
    about_clients = key.startswith(("partition.", "federation.", "strategy."))
    return (about_clients and key != "federation.rounds") or key in CLIENT_VALUES
