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
    TRAINED_WITH,
    Config,
    Word,
    as_run_config,
    flat_values,
    hydra_override,
    load_config,
    model_presets,
    preset_sweep,
)
from task.runs.layout import (
    DIVERGED,
    NODES_FILE,
    checkpoints,
    is_begun,
    round_of,
    run_config,
    weights_file,
)
from task.runs.records import Record
from task.runs.resume import NAMES_AND_PLACES

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
        if any(change.lstrip("+").startswith(f"{group}.") for change in changes):
            before = groups
            for option in _group_options(group, config):
                others = _changes(values, [*before, option])
                if len(others) + 1 < len(changes):
                    groups, changes = [*before, option], others
    return [*groups, *changes]


def training_command(config: Config) -> str:
    """Return the line for a shell that trains a run once more."""
    # Of a preset that trains several runs this is one.
    single = ["hydra.mode=RUN"] if preset_sweep(config.experiment) else []
    return shlex.join(["feddm-train", *training_words(config), *single])


def resuming_command(config: Config, run: Path) -> str:
    """Return the line for a shell that goes on with a run of this machine where its folder is now.

    Args:
        config: of the run, resolved.
        run: its folder.
    """
    # The digits lie in their library; files of other sets may be anywhere.
    root = {} if config.data.name in (*FILE_SETS, "digits") else {"data.root": config.data.root}
    values = [hydra_override(key, value) for key, value in {**root, **_folder_of(run)}.items()]
    return f"{training_command(config)} {shlex.join([*values, 'resume=true'])}"


def resubmitting_command(
    words: Mapping[str, Word], run: Path, *, connection: str = "CONNECTION"
) -> str:
    """Return the lines for a shell that let real nodes go on with a run where its folder is now.

    Args:
        words: of the run's submission.
        run: its folder.
        connection: name of the SuperLink's; else a word to be replaced.
    """
    return _submitting({**words, **_folder_of(run), "resume": is_begun(run)}, connection)


def require_weights(run: Path) -> None:
    """Raise a ValueError unless the run in a folder has its final weights.

    Raises:
        ValueError: it has none.
    """
    if not weights_file(run).is_file():
        how = f"finish it with {resuming_command(run_config(run), run)}"
        if (run / NODES_FILE).exists():
            how = describe_report_of(run)
        raise ValueError(f"no final weights in {run}: {how}")


def describe_report_of(run: Path) -> str:
    """Say where the command stands that goes on with a run; that for real nodes has many lines."""
    return f"`{shlex.join(['feddm', 'report', str(run)])}` shows how to go on with it"


def describe_divergence(config: Config, run: Path, divergence: Record) -> str:
    """Say in which round a run has diverged, what was saved before, and what to change.

    Args:
        config: of the run.
        run: its folder.
        divergence: the record of it.
    """
    lr = config.train.lr
    good = [file for file in checkpoints(run) if round_of(file) < divergence.round]
    saved = f"the last good checkpoint is {good[-1]}" if good else "no checkpoint is good"
    harmful = (
        " (or with federation.max_update_norm, where the update norm of a single client "
        "is far above the others)"
    )
    return (
        f"{DIVERGED} in round {divergence.round} ({divergence.context['reason']}); {saved}; "
        "resume=true would repeat the same: start a new run with a smaller learning rate than "
        f"train.lr={lr:g}, such as train.lr={lr / 10:g}"
        f"{' or train.client_lr_factor=1' if config.train.client_lr_factor > 1 else ''}"
        f"{harmful if config.train.mode == 'federated' else ''}"
    )


def _folder_of(run: Path) -> dict[str, str]:
    return {"output_dir": str(run.resolve().parent), "run_name": run.resolve().name}


def submitting_command(words: Mapping[str, Word]) -> str:
    """Return the lines for a shell that let real nodes train once more.

    Args:
        words: of the run's submission.
    """
    return _submitting({k: word for k, word in words.items() if k not in PLACES}, "CONNECTION")


def _submitting(words: Mapping[str, Word], connection: str) -> str:
    """Hand the words over in a file, because Flower takes a line of them apart in its own way."""
    lines = as_toml(words).rstrip("\n")
    submit = f"flwr run . {shlex.quote(connection)} --run-config words.toml"
    return f"cat > words.toml <<'END'\n{lines}\nEND\n{submit}"


def as_toml(words: Mapping[str, Word]) -> str:
    """Write words as the TOML file that `flwr run --run-config` reads."""
    # A string of JSON is one of TOML, where it holds no pair of surrogates and no raw DEL.
    taken = as_run_config(words)
    return "".join(f"{key} = {_toml_value(value)}\n" for key, value in taken.items())


def _toml_value(value: Word) -> str:
    if type(value) is float:
        return repr(value)
    return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")


def _group_options(group: str, config: Config) -> list[str]:
    names = sorted(file.stem for file in (CONF_DIR / group).glob("*.yaml"))
    if group == "model":
        presets, family = model_presets(), config.model.family
        names = [name for name in names if presets[name]["family"] == family]
    return [f"{group}={name}" for name in names]


def _identifying_values(config: Config) -> dict[str, Any]:
    ignored = set(PLACES)
    if config.data.name not in FILE_SETS:
        ignored.add("data.root")  # of a packaged set: where it is kept
    return {path: value for path, value in flat_values(config).items() if path not in ignored}


def _changes(values: Mapping[str, Any], overrides: list[str]) -> list[str]:
    """List what else composes some values, beside overrides."""
    composed = flat_values(load_config(overrides))
    changed = {path: value for path, value in values.items() if composed.get(path) != value}
    if "model.family" not in changed:
        return [hydra_override(path, value) for path, value in changed.items()]
    # The section of another family has other values: it is replaced whole.
    model = {path: value for path, value in values.items() if path.startswith("model.")}
    # What conf/ takes from the file of a model must be given without one.
    trained_with = {path: values[path] for path in (f"train.{name}" for name in TRAINED_WITH)}
    others = {path: value for path, value in changed.items() if path not in model} | trained_with
    return [
        "~model",
        *(f"+{hydra_override(*each)}" for each in model.items()),
        *(hydra_override(*each) for each in others.items()),
    ]
