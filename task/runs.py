"""Read back what finished runs left behind: configuration, final weights, measurements."""

import json
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from task.checkpoint import load_weights
from task.config import (
    EXTRACTORS,
    FILE_SETS,
    IMAGE_RANGES,
    Config,
    flat_values,
    read_config,
    require,
)
from task.run_directory import PARTITION_FILE, weights_file
from task.unet import UNet, build_unet


@dataclass(frozen=True)
class FinishedRun:
    """A run that has its final weights.

    Attributes:
        path: its folder.
        config: as resolved.
        evaluations: the content of its evaluation-<extractor>-<image range>.json files, sorted
            by name: `MetricReport.describe()` and how the images were drawn.
        partition: of partition.json; None for a centralised run.
    """

    path: Path
    config: Config
    evaluations: tuple[dict[str, Any], ...]
    partition: dict[str, Any] | None

    @cached_property
    def values(self) -> dict[str, Any]:
        """The configuration by dotted path."""
        return flat_values(self.config)

    @property
    def data_values(self) -> dict[str, Any]:
        """What tells data sets apart: where packaged ones lie does not."""
        ignored = {"data.cache_dir", "data.on_corrupt"}
        if self.config.data.name not in FILE_SETS:
            ignored.add("data.root")
        return {k: v for k, v in self.values.items() if k.startswith("data.") and k not in ignored}


def find_runs(folder: Path) -> list[FinishedRun]:
    """Find every finished run in a folder and below it, sorted by path.

    Raises:
        ValueError: a run's configuration is of another version of feddm.
    """
    return [
        _read_run(config_file.parent)
        for config_file in sorted(folder.rglob("config.yaml"))
        if weights_file(config_file.parent).is_file()
    ]


def load_run(path: Path) -> FinishedRun:
    """Read the finished run in a folder.

    Raises:
        ValueError: there is none, it has no final weights, or it is of another version of feddm.
    """
    require((path / "config.yaml").is_file(), "RUN", "the folder of a run", str(path))
    run = _read_run(path)
    if not weights_file(path).is_file():
        raise no_final_weights(run.config, path)
    return run


def _read_run(path: Path) -> FinishedRun:
    partition = path / PARTITION_FILE
    return FinishedRun(
        path=path,
        config=read_config(path / "config.yaml"),
        evaluations=tuple(
            json.loads(file.read_text(encoding="utf-8"))
            for extractor in sorted(EXTRACTORS)
            for image_range in IMAGE_RANGES
            if (file := path / f"evaluation-{extractor}-{image_range}.json").exists()
        ),
        partition=json.loads(partition.read_text(encoding="utf-8")) if partition.exists() else None,
    )


def kept_clients(run: Path) -> list[int]:
    """Number the clients whose own final weights a run has kept, ascending."""
    return sorted(
        int(file.stem.removeprefix("client-")) for file in run.glob("local/client-*.safetensors")
    )


def final_model(run: Path, config: Config, client: int | None = None) -> tuple[UNet, int]:
    """Build the network of a run with its final weights; returns it and their round.

    Args:
        run: its folder.
        config: of the run.
        client: the number of a client whose own weights to take; None: the global ones.

    Raises:
        ValueError: there are none, or they are not weights of this network.
    """
    file = weights_file(run, client)
    if client is not None and not file.is_file():
        kept = ", ".join(map(str, kept_clients(run))) or "none"
        raise ValueError(
            f"client must be one whose weights are in {file.parent} ({kept}), got {client}; a "
            f"run with federation.keep_local_models=[{client}] keeps them"
        )
    if not file.is_file():
        raise no_final_weights(config, run)
    weights, metadata = load_weights(file)
    require("round" in metadata, f"the metadata of {file}", "with a round", metadata)
    broken = [name for name, tensor in weights.items() if not tensor.isfinite().all()]
    require(not broken, str(file), "finite weights", f"NaN or infinity in {broken[:3]}")
    model = build_unet(config)
    try:
        model.load_state_dict(weights)
    except RuntimeError as error:
        raise ValueError(f"{file} does not fit the network of {run}/config.yaml: {error}") from None
    return model, int(metadata["round"])


def no_final_weights(config: Config, run: Path) -> ValueError:
    """Make the error that says how to get the final weights of a run."""
    return ValueError(
        f"no final weights in {run}: finish it with feddm-train output_dir={config.output_dir} "
        f"run_name={config.run_name} resume=true and the words that it was started with"
    )
