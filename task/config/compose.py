"""How a configuration is composed: Hydra puts `conf/` and overrides together, the schema checks."""

import dataclasses
import re
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import Any

from hydra import compose, initialize_config_dir
from hydra.core.config_store import ConfigStore
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from task.checks import require
from task.config.class_folders import classes_below
from task.config.grammar import escaped
from task.config.overrides import hydra_override, read_override
from task.config.schema import CONF_DIR, FILE_SETS, Config, anchored, leaves, value_paths


def register_schema() -> None:
    """Make the types known to Hydra under the name that `conf/config.yaml` asks for."""
    ConfigStore.instance().store(name="schema", node=Config)


def load_config(overrides: Iterable[str] = (), *, images_below: Path | None = None) -> Config:
    """Compose `conf/` with Hydra overrides and check the result.

    Args:
        overrides: as on `feddm-train`'s command line, e.g. `["data=mnist", "partition.beta=0.1"]`.
        images_below: see `config_from_hydra`.

    Raises:
        ValueError: a name is unknown, a value is of the wrong type or out of range.
    """
    try:
        return config_from_hydra(compose_conf(overrides), images_below=images_below)
    except (HydraException, OmegaConfBaseException) as error:
        raise ValueError(composition_error(error)) from error


def compose_conf(overrides: Iterable[str]) -> DictConfig:
    """Compose `conf/` with overrides as they were typed; nothing is checked yet."""
    read = [read_override(word) for word in overrides]
    register_schema()
    # Hydra keeps one composition context per process; the one of feddm-train stays untouched.
    hydra, GlobalHydra.instance().hydra = GlobalHydra.instance().hydra, None
    try:
        with initialize_config_dir(str(CONF_DIR), version_base="1.3"):
            return compose("config", overrides=read)
    finally:
        GlobalHydra.instance().hydra = hydra


def config_from_hydra(composed: DictConfig, *, images_below: Path | None = None) -> Config:
    """Turn what Hydra composed into a checked `Config`.

    Args:
        composed: whole.
        images_below: the folder from which a relative `data.root` counts, where the images of the
            run lie on this machine: classes that are left open take the names of their folders.

    Raises:
        ValueError: a value is missing, of the wrong type or out of range.
    """
    try:
        known = {p for path in value_paths() for p in (path, path.split(".")[0])}
        unknown = leaves(OmegaConf.to_container(composed)).keys() - known  # type: ignore[arg-type]
        if unknown:
            raise ValueError(f"configuration: no such value: {', '.join(sorted(unknown))}")
        if images_below is not None and are_named_by_folders(composed.data):
            root = images_below / Path(composed.data.root).expanduser()
            composed = OmegaConf.merge(composed, {"data": {"classes": classes_below(root)}})  # type: ignore[assignment]
        config = OmegaConf.to_object(composed)
    except OmegaConfBaseException as error:
        raise ValueError(composition_error(error)) from error
    if not isinstance(config, Config):
        raise TypeError(f"expected a composed Config, got {type(config).__name__}")
    return config


def are_named_by_folders(data: DictConfig) -> bool:
    """Whether the classes of a data set, not checked yet, are to be the names of its folders."""
    return FILE_SETS.get(data.name) in ("image_folder", "dicom_folder") and not data.classes


def composition_error(error: Exception) -> str:
    """Say in a few words what Hydra or OmegaConf did not accept, and why."""
    reasons = [str(error)] if error.__cause__ is None else [str(error), str(error.__cause__)]
    # Hydra speaks of its own insides, and advises to append what no part of feddm would read.
    return "configuration: " + "; ".join(
        re.split("\nConfig search path|\nTo append to your config", reason)[0].strip()
        for reason in reasons
    )


def changed_config(
    config: Config,
    overrides: Iterable[str] = (),
    *,
    options: Mapping[str, object | None],
    names: Collection[str],
) -> Config:
    """Change some values of a run's configuration, to work with what came out of it.

    Args:
        config: of the run.
        overrides: `name=value` each.
        options: by name as well; None leaves a value as it is. They win over `overrides`.
        names: of the values that may be changed.

    Returns:
        The configuration with absolute paths; new relative ones count from the working directory.

    Raises:
        ValueError: a name is none of `names`, or a value is wrong.
    """
    tree = as_hydra(config)
    given = {name: value for name, value in options.items() if value is not None}
    words = [*overrides, *(hydra_override(name, value) for name, value in given.items())]
    try:
        for word in words:
            name, equals, _ = word.partition("=")
            expected = f"NAME=VALUE with a name of {', '.join(sorted(names))}"
            require(name in names and equals != "", "an override", expected, word)
            override = OverridesParser.create().parse_override(read_override(word))
            require(not override.is_sweep_override(), name, "one value", word)
            OmegaConf.update(tree, name, override.value())
    except (HydraException, OmegaConfBaseException) as error:
        raise ValueError(composition_error(error)) from error
    return anchored(config_from_hydra(tree), Path.cwd())


def as_hydra(config: Config) -> DictConfig:
    """Return the configuration as an OmegaConf tree, which can be written as YAML."""
    tree: DictConfig = OmegaConf.structured(_escaped_texts(config))
    return tree


def _escaped_texts(value: Any) -> Any:
    """Return a configuration, or a part of it, whose texts OmegaConf resolves to what they were."""
    if isinstance(value, str):
        return escaped(value)
    if isinstance(value, list):
        return [_escaped_texts(each) for each in value]
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        names = [field.name for field in dataclasses.fields(value)]
        return dataclasses.replace(
            value, **{name: _escaped_texts(getattr(value, name)) for name in names}
        )
    return value
