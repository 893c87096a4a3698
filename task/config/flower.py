"""The configuration as Flower hands it over: a flat run config."""

import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from task.config.compose import load_config
from task.config.overrides import hydra_override
from task.config.schema import Config, anchored

Word = str | int | float | bool

# What [tool.flwr.app.config] of pyproject.toml lists, beside which Flower takes nothing.
RUN_CONFIG_WORDS = (
    *("experiment", "model", "overrides", "output_dir", "run_name", "resume", "seed"),
    *("data.root", "partition.beta", "train.local_epochs", "federation.num_supernodes"),
    *("federation.clients_per_round", "federation.rounds"),
)


def load_run_config(run_config: Mapping[str, Any], *, has_images: bool = False) -> Config:
    """Compose the configuration of a run, with the paths of this machine; see `compose_run_config`.

    Args:
        run_config: `context.run_config`.
        has_images: whether the images of the run lie on this machine, as in a simulation.

    Raises:
        ValueError: see `load_config`.
    """
    # The working directory is that of whichever process runs the app, so nothing counts from it.
    home = Path.home()
    images_below = home if has_images else None
    return anchored(compose_run_config(run_config, images_below=images_below), home)


def compose_run_config(
    run_config: Mapping[str, Any], *, images_below: Path | None = None
) -> Config:
    """Compose the configuration that Flower's run config asks for, with its paths as they stand.

    An empty string means "what conf/ says". `experiment` and `model` name files of conf/,
    `overrides` is one string of further Hydra overrides; every other key is the path of a value.

    Args:
        run_config: `context.run_config`, flat.
        images_below: see `config_from_hydra`.

    Raises:
        ValueError: see `load_config`.
    """
    given = {key: value for key, value in run_config.items() if value != ""}
    try:
        further = shlex.split(str(given.pop("overrides", "")))
    except ValueError as error:
        raise ValueError(
            f"overrides must be Hydra overrides quoted as in a shell ({error}), "
            f"got {run_config['overrides']}"
        ) from error
    overrides = [hydra_override(key, value) for key, value in given.items()]
    return load_config(overrides + further, images_below=images_below)


def as_run_config(words: Mapping[str, Word]) -> dict[str, Word]:
    """Put the values that Flower does not take by name into `overrides`.

    Raises:
        ValueError: a text cannot be kept in a configuration.
    """
    others = [hydra_override(k, value) for k, value in words.items() if k not in RUN_CONFIG_WORDS]
    taken = {key: value for key, value in words.items() if key in RUN_CONFIG_WORDS}
    if others:
        # What stands in `overrides` wins.
        taken["overrides"] = f"{shlex.join(others)} {taken.get('overrides', '')}".rstrip()
    return taken
