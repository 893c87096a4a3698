"""The configuration in the folder of a run: written, and read again by any later version."""

import logging
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

import yaml  # type: ignore[import-untyped]
from omegaconf import OmegaConf

from task.checks import require
from task.config.compose import as_hydra, compose_conf, model_presets, resolved
from task.config.models import model_schemas
from task.config.schema import (
    CONF_DIR,
    STRATEGY_VALUES,
    Config,
    config_of,
    flat_values,
    leaves,
    schema_fields,
    value_paths,
)
from task.files import atomic_path

# What runs did whose configuration lacks the value, where conf/ may have another by now.
BEFORE_WRITTEN = {
    "audit.at_end": False,
    "data.fit": "stretch",
    "data.patient_pattern": "",
    "data.patients": "",
    "diffusion": None,
    "model.family": "diffusion",
    "strategy.name": "fedavg",
    **{f"strategy.{name}": None for name in STRATEGY_VALUES},
    "train.lr_schedule": "constant",
    "train.warmup_rounds": 0,
}


def write_config(config: Config, path: Path) -> None:
    """Write the resolved configuration as YAML, atomically."""
    with atomic_path(path) as aside:
        aside.write_text(OmegaConf.to_yaml(as_hydra(config)), encoding="utf-8")


def read_config(path: Path) -> Config:
    """Read a configuration that `write_config` of this version of feddm, or of another, wrote.

    A value that it lacks is what runs did before it could be chosen (`BEFORE_WRITTEN`), else the
    default of conf/ for its experiment, its data set and the model that is most like its own; one
    that is unknown here is left out. Both are logged.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is not the configuration of a run, or a value is wrong.
    """
    try:
        stored = _stored_values(path)
        known = schema_fields(_family(stored)).keys()
        missing, unknown = known - stored.keys(), stored.keys() - known
        defaults = {}
        if missing:
            model = next(iter(nearest_models(stored)), None)
            defaults = _defaults(stored.get("experiment"), stored.get("data.name"), model)
        # Where a run lies is known without its configuration.
        place = {"output_dir": str(path.parent.parent), "run_name": path.parent.name}
        values = defaults | BEFORE_WRITTEN | place | stored
        config = config_of({name: value for name, value in values.items() if name in known})
    except (yaml.YAMLError, ValueError) as error:
        raise ValueError(f"{path} is not a configuration of this feddm: {error}") from error
    for name in sorted(missing):
        why = (
            "which runs did before it was written" if name in BEFORE_WRITTEN else "as conf/ has it"
        )
        _log_once(f"{path} has no {name}; taken for {flat_values(config)[name]!r}, {why}")
    for name in sorted(unknown):
        _log_once(f"{path} has {name}, which this version of feddm does not know; left out")
    return config


def unknown_values(path: Path) -> dict[str, Any]:
    """Return the values of a written configuration that this version of feddm does not know."""
    stored = _stored_values(path)
    known = schema_fields(stored.get("model.family"))
    return {name: value for name, value in stored.items() if name not in known}


def _stored_values(path: Path) -> dict[str, Any]:
    """Read the values of a written configuration, by dotted path."""
    stored = yaml.safe_load(path.read_bytes())
    sections = {name.partition(".")[0] for name in value_paths() if "." in name}
    needed = {"data", "diffusion", "model", "train"}
    if lacking := needed - set(stored if isinstance(stored, dict) else ()):
        raise ValueError(f"it has no section {', '.join(sorted(lacking))}")
    for name in sections & stored.keys():
        if stored[name] is not None or name != "diffusion":
            require(isinstance(stored[name], dict), name, "a mapping", stored[name])
    values = leaves(resolved(stored))
    family = _family(values)
    # Of a family that is unknown this is all that is to be said.
    if stored["diffusion"] is None and [*model_schemas(family)] == [family]:
        require("diffusion" in schema_fields(family), "diffusion", "a mapping", None)
    return values


def _family(stored: Mapping[str, Any]) -> object:
    return stored.get("model.family", BEFORE_WRITTEN["model.family"])


def nearest_models(stored: Mapping[str, Any]) -> list[str]:
    """Name the files of conf/model that agree in most with values of a run, by dotted path.

    Several may agree in as much; none is of a family that has no file there.
    """
    agreeing = {
        name: sum(stored.get(f"model.{key}") == value for key, value in model.items())
        for name, model in model_presets().items()
        if model["family"] == _family(stored)
    }
    most = max(agreeing.values(), default=0)
    return [name for name, number in agreeing.items() if number == most]


@cache
def _defaults(experiment: object, data: object, model: str | None) -> dict[str, Any]:
    """Return the values of conf/ by dotted path, for an experiment, a data set and a model."""
    given = {"experiment": experiment, "data": data, "model": model}
    known = {
        group: name
        for group, name in given.items()
        if name in {file.stem for file in (CONF_DIR / group).glob("*.yaml")}
    }
    return leaves(resolved(compose_conf([f"{group}={name}" for group, name in known.items()])))


@cache
def _log_once(text: str) -> None:
    logging.getLogger(__name__).warning(text)
