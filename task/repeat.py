"""The words that repeat a run, for either of its two commands."""

import json
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from task.config import (
    CONF_DIR,
    FILE_SETS,
    FITTED_VALUES,
    OWN_IMAGES,
    Config,
    flat_values,
    hydra_override,
    load_config,
)
from task.run_directory import NAMES_AND_PLACES

Word = str | int | float | bool

# Where a run lies says nothing of what it is.
PLACES = NAMES_AND_PLACES - {"experiment"}
# Of these groups a configuration does not say which option it began with.
NAMELESS_GROUPS = ("model", "diffusion", "partition")


def training_words(config: Config) -> list[str]:
    """Return the Hydra overrides that compose the configuration of a run, but for its places.

    Args:
        config: of a run, resolved.
    """
    groups = [f"experiment={config.experiment}"]
    values = _identifying_values(config)
    if load_config(groups).data.name != config.data.name:
        groups += [
            f"data={config.data.name}",
            hydra_override("data.classes", config.data.classes),
        ]
    if config.data.name in OWN_IMAGES:
        # Even where conf/ has the same: feddm-train fits what it is not given.
        groups += [hydra_override(path, flat_values(config)[path]) for path in FITTED_VALUES]
    changes = _changes(values, groups)
    for group in NAMELESS_GROUPS:
        if any(change.startswith(f"{group}.") for change in changes):
            for option in _options(group):
                others = _changes(values, [*groups, option])
                if len(others) + 1 < len(changes):
                    groups, changes = [*groups, option], others
    return [*groups, *changes]


def training_command(config: Config) -> str:
    """Return the line for a shell that trains a run once more."""
    return shlex.join(["feddm-train", *training_words(config)])


def resuming_command(config: Config, run: Path, words: Mapping[str, Word] | None) -> str:
    """Return the lines for a shell that go on with a run where its folder is now.

    Args:
        config: of the run, resolved.
        run: its folder.
        words: of the run's submission; None of a run that was not submitted to real nodes.
    """
    place = {"output_dir": str(run.resolve().parent), "run_name": run.resolve().name}
    if words is not None:
        return _submitting({**words, **place, "resume": True})
    # The digits lie in their library; files of other sets may be anywhere.
    root = {} if config.data.name in (*FILE_SETS, "digits") else {"data.root": config.data.root}
    values = [hydra_override(key, value) for key, value in {**root, **place}.items()]
    return shlex.join(["feddm-train", *training_words(config), *values, "resume=true"])


def submitting_command(words: Mapping[str, Word]) -> str:
    """Return the lines for a shell that let real nodes train once more.

    Args:
        words: of the run's submission.
    """
    return _submitting({key: word for key, word in words.items() if key not in PLACES})


def _submitting(words: Mapping[str, Word]) -> str:
    """Hand the words over in a file, because Flower takes a line of them apart in its own way."""
    lines = as_toml(words).rstrip("\n")
    return f"cat > words.toml <<'END'\n{lines}\nEND\nflwr run . CONNECTION --run-config words.toml"


def as_toml(words: Mapping[str, Word]) -> str:
    """Write words as the TOML file that `flwr run --run-config` reads."""
    # A string of JSON is one of TOML, where it holds no pair of surrogates and no raw DEL.
    return "".join(f"{k} = {_toml_value(value)}\n" for k, value in words.items())


def _toml_value(value: Word) -> str:
    if type(value) is float:
        return repr(value)
    return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")


def _options(group: str) -> list[str]:
    return [f"{group}={file.stem}" for file in sorted((CONF_DIR / group).glob("*.yaml"))]


def _identifying_values(config: Config) -> dict[str, Any]:
    ignored = set(PLACES)
    if config.data.name not in FILE_SETS:
        ignored.add("data.root")  # of a packaged set: where it is kept
    return {path: value for path, value in flat_values(config).items() if path not in ignored}


def _changes(values: Mapping[str, Any], overrides: list[str]) -> list[str]:
    """List the values that overrides do not compose yet."""
    composed = flat_values(load_config(overrides))
    return [
        hydra_override(path, value) for path, value in values.items() if composed[path] != value
    ]
