"""Read back what finished runs left behind: configuration, final weights, measurements."""

import json
import logging
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from torch import Tensor

from task.checks import require
from task.config import (
    FILE_SETS,
    GENERATION_VALUES,
    Config,
    changed_config,
    flat_values,
    read_config,
)
from task.generation.images import GeneratedImages, ImageSource, class_labels
from task.generation.restoration import RESTORATION_VALUES, Restorer, known_part, restoration_config
from task.generators.base import Generator
from task.generators.registry import build_generator, weightless_generator
from task.runs.checkpoint import load_weights
from task.runs.evaluations import Evaluation, read_evaluations
from task.runs.layout import PARTITION_FILE, run_config, weights_file
from task.runs.repeat import require_weights
from task.training.devices import select_device


def log_unreadable(run: Path, error: Exception) -> None:
    """Log that a run cannot be read and is left out."""
    logging.getLogger(__name__).warning("%s is left out: %s", run, error)


@dataclass(frozen=True)
class FinishedRun:
    """A run that has its final weights.

    Attributes:
        path: its folder.
        config: as resolved.
        partition: of partition.json; None for a centralised run.
    """

    path: Path
    config: Config
    partition: dict[str, Any] | None

    @cached_property
    def evaluations(self) -> list[Evaluation]:
        """What was measured of its images, drawn as the run draws.

        Raises:
            ValueError: a file is not what a run writes.
        """
        return [found for found in read_evaluations(self.path) if not found.otherwise]

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

    def sample(
        self,
        classes: Iterable[str | int] | str | int | None = None,
        num_images: int = 16,
        *,
        client: int | None = None,
        seed: int | None = None,
        device: str | None = None,
        batch_size: int | None = None,
        **drawing: str | float,
    ) -> GeneratedImages:
        """Draw images from the final weights, the same that `feddm generate` writes.

        Args:
            classes: names or labels, or one; None: every class. See `class_labels`.
            num_images: of each class.
            client: a client whose own weights draw, which the run has kept; None: the global ones.
            seed: of the noise; None: the run's.
            device: "auto", "cpu", "cuda" or "cuda:N"; None: the run's.
            batch_size: images at a time; None: the run's. It changes rounding alone.
            **drawing: how to draw where not as the run draws: sampler, num_inference_steps, eta,
                variance, guidance_scale, clip_x_start, with the values of `conf/diffusion`.

        Returns:
            Images and labels, class after class.

        Raises:
            TypeError: a keyword is unknown.
            ValueError: a class, a client or a value is wrong.
        """
        options = _options(
            GENERATION_VALUES, drawing, seed=seed, device=device, batch_size=batch_size
        )
        config = changed_config(self.config, options=options, names=GENERATION_VALUES)
        labels = class_labels(config.data.classes, classes)
        model, _ = final_model(self.path, config, client)
        source = ImageSource(config, model, select_device(config.train.device))
        return source.draw_classes(labels, num_images)

    def restore(
        self,
        images: Tensor,
        label: str | int,
        num_images: int = 1,
        *,
        mask: Tensor | None = None,
        upscale: int | None = None,
        colorize: bool = False,
        jump_length: int | None = None,
        num_resamples: int | None = None,
        client: int | None = None,
        seed: int | None = None,
        device: str | None = None,
        batch_size: int | None = None,
        **drawing: float,
    ) -> GeneratedImages:
        """Fill in what pictures lack, as `feddm restore` does: one of three tasks.

        Args:
            images: [N, C, H, W] uint8; for the task's shapes see `known_part`.
            label: name or label of the class that all of them are of.
            num_images: for each picture.
            mask: [H, W] bool, true where to fill.
            upscale: how many times larger the images are to be.
            colorize: whether to colour grey pictures.
            jump_length: steps that are taken back at a time; None: RePaint's.
            num_resamples: how often each stretch of that length is walked; None: RePaint's.
            client: see `sample`.
            seed: see `sample`.
            device: see `sample`.
            batch_size: see `sample`.
            **drawing: num_inference_steps, guidance_scale, clip_x_start; else the run's.

        Returns:
            Images that agree with the pictures, those for one picture side by side.

        Raises:
            TypeError: `images` or `mask` is of another dtype, or a keyword unknown.
            ValueError: a value or a shape is wrong.
        """
        options = _options(
            RESTORATION_VALUES, drawing, seed=seed, device=device, batch_size=batch_size
        )
        config = restoration_config(self.config, options=options)
        known, projection = known_part(
            config, images, mask=mask, upscale=upscale, colorize=colorize
        )
        (number,) = class_labels(config.data.classes, [label])
        return Restorer(
            config,
            final_model(self.path, config, client)[0],
            known,
            projection=projection,
            label=number,
            num_images=num_images,
            jump_length=jump_length,
            num_resamples=num_resamples,
            device=select_device(config.train.device),
        ).images()


def _options(
    names: Collection[str],
    drawing: Mapping[str, object],
    *,
    seed: int | None,
    device: str | None,
    batch_size: int | None,
) -> dict[str, object]:
    """Name keywords of a method as `changed_config` does."""
    prefix = "diffusion."
    known = {name.removeprefix(prefix) for name in names if name.startswith(prefix)}
    if unknown := sorted(drawing.keys() - known):
        raise TypeError(f"unknown keyword {unknown[0]}; known: {', '.join(sorted(known))}")
    return {
        **{prefix + name: value for name, value in drawing.items()},
        "seed": seed,
        "train.device": device,
        "eval.batch_size": batch_size,
    }


def load_run(path: str | Path) -> FinishedRun:
    """Read a finished run, to look at it or to draw from its model.

    Args:
        path: its folder.

    Raises:
        ValueError: there is no run, it is not finished, or it is of another version of feddm.
    """
    folder = Path(path).expanduser()
    run_config(folder)
    require_weights(folder)
    return _read_run(folder)


def find_runs(
    folder: Path, unreadable: Callable[[Path, Exception], object] = log_unreadable
) -> list[FinishedRun]:
    """Find every finished run in a folder and below it, sorted by path.

    Args:
        folder: to look in.
        unreadable: is told of each run that cannot be read, and why; it is left out.
    """
    found = []
    for file in sorted(folder.rglob("config.yaml")):
        if weights_file(file.parent).is_file():
            try:
                run = _read_run(file.parent)
                _ = run.evaluations  # which are read here, so that damaged ones are told of
                found.append(run)
            except (ValueError, OSError) as error:
                unreadable(file.parent, error)
    return found


def _read_run(path: Path) -> FinishedRun:
    partition = path / PARTITION_FILE
    return FinishedRun(
        path=path,
        config=read_config(path / "config.yaml"),
        partition=_read_mapping(partition) if partition.exists() else None,
    )


def _read_mapping(file: Path) -> dict[str, Any]:
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{file} is no JSON: {error}") from error
    require(isinstance(content, dict), str(file), "a mapping", content)
    return dict(content)


def kept_clients(run: Path) -> list[int]:
    """Number the clients whose own final weights a run has kept, ascending."""
    return sorted(
        int(file.stem.removeprefix("client-")) for file in run.glob("local/client-*.safetensors")
    )


def final_model(run: Path, config: Config, client: int | None = None) -> tuple[Generator, int]:
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
    if client is None:
        require_weights(run)
    weights, metadata = load_weights(file)
    require("round" in metadata, f"the metadata of {file}", "with a round", metadata)
    broken = [name for name, tensor in weights.items() if not tensor.isfinite().all()]
    require(not broken, str(file), "finite weights", f"NaN or infinity in {broken[:3]}")
    try:
        # First without memory: a changed configuration may ask for more than there is.
        weightless_generator(config).load_state_dict(weights, assign=True)
        model = build_generator(config)
        model.load_state_dict(weights)
    except RuntimeError as error:
        raise ValueError(f"{file} does not fit the network of {run}/config.yaml: {error}") from None
    return model, int(metadata["round"])
