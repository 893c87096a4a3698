"""Which runs can be compared: what their figures are figures of, and how long they were trained."""

from collections.abc import Callable, Mapping
from typing import Any

from task.runs.run import Run

Values = Mapping[str, Any]


def data_values(run: Run) -> Values:
    """Say what images are measured against: figures of other data are of something else."""
    return {
        name: run.values[f"data.{name}"] for name in ("name", "classes", "image_size", "channels")
    }


def loss_values(run: Run) -> Values:
    """Say what a loss is of: the data and an objective."""
    return {**data_values(run), **{path: run.values[path] for path in run.config.loss_values}}


def alike(runs: Mapping[str, Run], values: Callable[[Run], Values]) -> dict[str, dict[str, Run]]:
    """Put runs together of which some values, and the images, are equal.

    Args:
        runs: by label.
        values: of a run, `data_values` or `loss_values`.

    Returns:
        The runs of each group by label, by what to write behind the name of a figure of theirs;
        nothing where there is one group.
    """
    groups: dict[Any, dict[str, Run]] = {}
    hashed = all(run.data_hashes for run in runs.values())
    for label, run in runs.items():
        key = repr(values(run)), run.data_hashes["all"] if hashed else None
        groups.setdefault(key, {})[label] = run
    if len(groups) == 1:
        return {"": dict(runs)}
    return {f" (of {', '.join(group)} alone)": group for group in groups.values()}


def incomparable(runs: Mapping[str, Run]) -> list[str]:
    """Say in sentences what keeps figures of runs from being compared; first what weighs most."""
    found = []
    if len(alike(runs, data_values)) > 1:
        data = _listed(runs, _data)
        found.append(f"The data differ, so that no figures are set beside each other: {data}.")
    elif len(alike(runs, loss_values)) > 1:
        found.append("The losses are those of different objectives and cannot be compared.")
    if len({_epochs(run) for run in runs.values()}) > 1:
        rounds = _listed(runs, _rounds)
        found.append(
            f"The training is unequally long ({rounds}): a better figure may be that of the longer "
            "one."
        )
    if len({_clients(run) for run in runs.values()}) > 1:
        found.append(f"Those who trained differ: {_listed(runs, _clients)}.")
    return [*found, *_seeds(runs)]


def _listed(runs: Mapping[str, Run], say: Any) -> str:
    return "; ".join(f"{label}: {say(run)}" for label, run in runs.items())


def _data(run: Run) -> str:
    data = run.config.data
    digest = f", SHA-256 {run.data_hashes['all'][:12]}" if run.data_hashes else ""
    number = "" if run.num_images is None else f", {run.num_images:,} training images"
    return (
        f"{data.name}, {len(data.classes)} classes, {data.image_size}x{data.image_size}{number}"
        f"{digest}"
    )


def _epochs(run: Run) -> int:
    return run.rounds_done * run.config.train.local_epochs


def _rounds(run: Run) -> str:
    return f"{run.rounds_done} rounds of {run.config.train.local_epochs} local epochs"


def _clients(run: Run) -> str:
    return run.setting if run.setting == "centralized" else f"{len(run.clients)} clients"


def _seeds(runs: Mapping[str, Run]) -> list[str]:
    seeds = {run.config.seed for run in runs.values()}
    if len(seeds) == 1:
        return []
    return [f"The seeds differ: {_listed(runs, lambda run: str(run.config.seed))}."]
