"""How a configuration is composed: Hydra puts `conf/` and overrides together, the schema checks."""

import copy
import re
from collections.abc import Collection, Iterable, Mapping
from functools import cache, lru_cache
from pathlib import Path
from typing import Any

from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from task.checks import require
from task.config.class_folders import classes_below
from task.config.data_config import FILE_SETS
from task.config.hydra_grammar import escaped
from task.config.models import model_schemas
from task.config.overrides import hydra_override, path_of, read_override
from task.config.schema import CONF_DIR, MEASURING_OFF, Config, anchored, checked

# A file of conf/model says them beside the values of its network, the last two where it needs them;
# conf/train takes them from there.
TRAINED_WITH = ("lr", "batch_size", "accumulation", "clip_norm")


def load_config(overrides: Iterable[str] = (), *, images_below: Path | None = None) -> Config:
    """Compose `conf/` with Hydra overrides and check the result.

    Args:
        overrides: as on `feddm-train`'s command line, e.g. `["data=mnist", "partition.beta=0.1"]`.
        images_below: see `config_from_hydra`.

    Raises:
        ValueError: a name is unknown, a value is of the wrong type or out of range.
    """
    words = list(overrides)
    return config_from_hydra(compose_conf(words), words, images_below=images_below)


def compose_conf(overrides: Iterable[str], file: str = "config") -> DictConfig:
    """Compose `conf/` with overrides as they were typed; no value is checked yet.

    Args:
        overrides: see `load_config`.
        file: of conf/ that is composed, without its ending.

    Raises:
        ValueError: a name is unknown.
    """
    read = tuple(read_override(word) for word in overrides)
    return copy.deepcopy(_composition(CONF_DIR, file, read))


# A process composes the same words again and again, at a third of a second each: for each message,
# for each job of a sweep.
@lru_cache(maxsize=128)
def _composition(folder: Path, file: str, overrides: tuple[str, ...]) -> DictConfig:
    # Hydra keeps one composition context per process; the one of feddm-train stays untouched.
    hydra, GlobalHydra.instance().hydra = GlobalHydra.instance().hydra, None
    try:
        with initialize_config_dir(str(folder), version_base="1.3"):
            composed = compose(file, overrides=list(overrides))
    except (HydraException, OmegaConfBaseException) as error:
        raise ValueError(composition_error(error)) from error
    finally:
        GlobalHydra.instance().hydra = hydra
    # Hydra has resolved its own folders: ${now:...} of the same form would keep their time.
    OmegaConf.clear_cache(composed)
    return composed


def words_of_family(words: Iterable[str]) -> list[str]:
    """Leave out the words of a job of a sweep that are for other families than its own.

    Those are forced values of the section `model` that other families have (++model.width=16), and
    of `diffusion` where the family has none.

    Args:
        words: overrides, see `load_config`.

    Raises:
        ValueError: a name is unknown.
    """
    words = list(words)
    family = compose_conf(words).model.get("family")
    own, every = (
        {f"++model.{name}" for schema in schemas.values() for name in schema.model_fields}
        for schemas in (model_schemas(family), model_schemas())
    )
    foreign = ("++diffusion.",) if not diffuses(family) else ()
    return [
        word
        for word in words
        if word.partition("=")[0] not in every - own and not word.startswith(foreign)
    ]


def config_from_hydra(
    composed: DictConfig, words: Iterable[str], *, images_below: Path | None = None
) -> Config:
    """Turn what Hydra composed into a checked `Config`.

    Args:
        composed: whole.
        words: the overrides among what it was composed of.
        images_below: the folder from which a relative `data.root` counts, where the images of the
            run lie on this machine: classes that are left open take the names of their folders.

    Raises:
        ValueError: a value is missing, of the wrong type or out of range, or of diffusion, which
            the family of the model has not.
    """
    values = resolved(composed)
    model = values.get("model") or {}
    words = list(words)
    for name in TRAINED_WITH:
        model.pop(name, None)
        for word in words:
            path = path_of(word)
            require(path != f"model.{name}", path, f"left out; say train.{name}=...", word)
    if not diffuses(model.get("family")):
        others = [name for name, each in model_presets().items() if diffuses(each["family"])]
        way_out = f", or choose another model: {_chosen(others)}"
        _refuse_diffusion(model["family"], words, way_out=way_out)
        # A preset says them for the families that have them.
        values["diffusion"] = None
    if not draws(model.get("family")):
        given = {path_of(word) for word in words}
        for name in MEASURING_OFF.keys() - given:
            section, _, field = name.partition(".")
            values[section][field] = MEASURING_OFF[name]
    data = values["data"]
    by_folders = FILE_SETS.get(data["name"]) in ("image_folder", "dicom_folder")
    if images_below is not None and by_folders and not data["classes"]:
        data["classes"] = classes_below(images_below / Path(data["root"]).expanduser())
    return checked(values)


def diffuses(family: object) -> bool:
    """Whether a family takes the section `diffusion`; true of one that is unknown."""
    return any(schema.diffuses for schema in model_schemas(family).values())


def draws(family: object) -> bool:
    """Whether a family draws images; true of one that is unknown."""
    return any(schema.draws for schema in model_schemas(family).values())


def _refuse_diffusion(family: str, words: Iterable[str], *, way_out: str) -> None:
    for word in words:
        path = path_of(word)
        if path.partition(".")[0] == "diffusion":
            raise ValueError(
                f"{path}: model.family={family} has no diffusion; leave {word} out{way_out}"
            )


@cache
def model_presets() -> dict[str, dict[str, Any]]:
    """Return the section `model` of every file of conf/model, by the name of the file."""
    names = sorted(file.stem for file in (CONF_DIR / "model").glob("*.yaml"))
    return {name: resolved(compose_conf([], f"model/{name}").model) for name in names}


def preset_sweep(experiment: str) -> dict[str, str]:
    """Return what a preset sweeps by itself, by path; nothing where it is unknown."""
    file = CONF_DIR / "experiment" / f"{experiment}.yaml"
    if not file.is_file():
        return {}
    params = OmegaConf.select(OmegaConf.load(file), "hydra.sweeper.params")
    return {str(key): str(values) for key, values in (params or {}).items()}


def resolved(tree: Mapping[Any, Any] | DictConfig) -> dict[str, Any]:
    """Return nested values with what their interpolations stand for.

    Raises:
        ValueError: one stands for nothing.
    """
    try:
        whole: DictConfig = OmegaConf.create(tree)  # type: ignore[arg-type]
        return OmegaConf.to_container(whole, resolve=True)  # type: ignore[return-value]
    except OmegaConfBaseException as error:
        raise ValueError(composition_error(error)) from error


def _chosen(presets: Iterable[str]) -> str:
    return ", ".join(f"model={name}" for name in presets)


def composition_error(error: Exception) -> str:
    """Say in a few words what Hydra or OmegaConf did not accept, and why."""
    reasons = [str(error)] if error.__cause__ is None else [str(error), str(error.__cause__)]
    if unknown := re.match(r"Could not override '(.+)'\.", reasons[0]):
        # Hydra's own words advise to append what no part of feddm would read.
        section, _, name = unknown[1].partition(".")
        others = [preset for preset, values in model_presets().items() if name in values]
        known = f"; it is one of {_chosen(others)}"
        reasons = [f"no such value: {unknown[1]}{known if section == 'model' and others else ''}"]
    return "configuration: " + "; ".join(
        re.split("\nConfig search path|\n +full_key", reason)[0].strip() for reason in reasons
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
    tree, overrides = as_hydra(config), list(overrides)
    if config.diffusion is None:
        _refuse_diffusion(config.model.family, overrides, way_out="")
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
    return anchored(checked(resolved(tree)), Path.cwd())


def as_hydra(config: Config) -> DictConfig:
    """Return the configuration as an OmegaConf tree, which resolves to what it was."""
    tree: DictConfig = OmegaConf.create(_escaped_texts(config.model_dump()))
    return tree


def _escaped_texts(value: Any) -> Any:
    if isinstance(value, str):
        return escaped(value)
    if isinstance(value, list):
        return [_escaped_texts(each) for each in value]
    if isinstance(value, dict):
        return {name: _escaped_texts(each) for name, each in value.items()}
    return value
