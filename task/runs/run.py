"""The one reader of a run's folder: what happened, what was measured, and the final model."""

import logging
import os
from collections.abc import Callable, Collection, Iterable, Mapping
from copy import copy
from dataclasses import dataclass
from datetime import datetime, timedelta
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from task.checks import require
from task.config import (
    FILE_SETS,
    Config,
    Word,
    changed_config,
    flat_values,
)
from task.generation.images import GeneratedImages, ImageSource, class_labels
from task.generation.restoration import RESTORATION_VALUES, Restorer, known_part, restoration_config
from task.generators.base import Generator
from task.generators.registry import can_draw, drawing_generator, weightless_generator
from task.lock import holder
from task.runs.checkpoint import load_weights
from task.runs.commands import require_weights
from task.runs.evaluations import Evaluation, read_evaluations
from task.runs.layout import (
    CLASS_COUNTS_FILE,
    DATA_FILE,
    LOCK_FILE,
    MACHINE_FILE,
    METRICS_FILE,
    NODES_FILE,
    PARTITION_FILE,
    POOLED_FILE,
    START_FILE,
    STUDY_FILE,
    STUDY_FOLDER,
    SUBMISSION_FILE,
    TIMES_FILE,
    final_round,
    hospital_names,
    last_complete_round,
    read_json,
    round_of,
    run_config,
    understood,
    weights_file,
)
from task.runs.records import (
    DIVERGENCE,
    IN_SUM,
    SECONDS_EVALUATING,
    TRAIN,
    Record,
    Records,
    read_records,
)
from task.runs.starting_weights import describe_starting_weights
from task.training.devices import select_device

POOLED = "pooled"


def log_unreadable(run: Path, error: Exception) -> None:
    """Log that a run cannot be read and is left out."""
    logging.getLogger(__name__).warning("%s is left out: %s", run, error)


@dataclass(frozen=True)
class WorkTime:
    """A time in which a process worked on a run, from a start to an end or an interruption.

    Attributes:
        begun: with the time zone of the machine.
        seconds: until the last thing that was written down.
        host: name of the machine.
    """

    begun: datetime
    seconds: float
    host: str

    @property
    def ended(self) -> datetime:
        """When the last thing was written down."""
        return self.begun + timedelta(seconds=self.seconds)


class Run:
    """The folder of a run, finished or not, as it is read; `task.runs.layout` says what is in it.

    A file is read when it is asked for. Numbers of rounds that were not completed are left out, as
    a resumed run forgets them.

    Attributes:
        path: the folder.
        config: as resolved.

    Raises:
        ValueError: there is no run, it is of a newer version, or, at any attribute, a file is not
            what a run writes.
    """

    def __init__(self, path: Path) -> None:
        """Read the configuration alone."""
        self.path = path
        self.config = run_config(path)

    @property
    def name(self) -> str:
        """The name of the run's folder."""
        return self.path.resolve().name

    @cached_property
    def final_round(self) -> int | None:
        """The round of the final weights; None while there are none."""
        return final_round(self.path)

    @cached_property
    def rounds_done(self) -> int:
        """Complete rounds."""
        return max(last_complete_round(self.path), self.final_round or 0)

    @property
    def finished(self) -> bool:
        """Whether the final weights are there and of the last round asked for."""
        return self.final_round == self.config.federation.rounds

    @cached_property
    def running(self) -> bool:
        """Whether another process holds the folder."""
        return holder(self.path / LOCK_FILE) not in (None, str(os.getpid()))

    @cached_property
    def records(self) -> Records:
        """What was measured and counted in complete rounds."""
        return self._all_records.up_to(self.rounds_done)

    @property
    def divergence(self) -> Record | None:
        """Of the round that diverged, if the last start of the run ended in that; else None."""
        return self._all_records.last(DIVERGENCE)

    @cached_property
    def _all_records(self) -> Records:
        return read_records(self.path / METRICS_FILE)

    @cached_property
    def evaluations(self) -> list[Evaluation]:
        """What was measured of the global weights; what was drawn otherwise comes last."""
        return read_evaluations(self.path)

    @property
    def main_evaluations(self) -> list[Evaluation]:
        """Those of images that were drawn as the run draws."""
        return [each for each in self.evaluations if not each.otherwise]

    @property
    def final_evaluations(self) -> list[Evaluation]:
        """Those of the weights of the last round asked for, drawn as the run draws."""
        rounds = self.config.federation.rounds
        return [each for each in self.main_evaluations if each.round == rounds]

    @property
    def current_evaluations(self) -> list[Evaluation]:
        """Those of the newest weights: a run that was prolonged keeps files of earlier ones."""
        return self.of_round(self.rounds_done).evaluations

    def of_round(self, number: int) -> "Run":
        """Leave out what was measured of the weights of other rounds."""
        run = copy(self)
        run.rounds_done = number
        run.evaluations = [each for each in self.evaluations if each.round == number]
        run.records = self.records.of_round(number)
        return run

    @cached_property
    def partition(self) -> dict[str, Any] | None:
        """Of partition.json; None where no simulation dealt the images out."""
        return self._object(PARTITION_FILE)

    @cached_property
    def class_counts(self) -> dict[int | str, list[int] | None]:
        """Training images of each class by client number, or under `POOLED`.

        None of a client that does not say.
        """
        for name in (POOLED_FILE, PARTITION_FILE, CLASS_COUNTS_FILE):
            content = self._object(name)
            if content is not None:
                with understood(self.path / name):
                    counts = _counts_of(name, content)
                    for each in counts.values():
                        _check_counts(each, len(self.config.data.classes))
                return counts
        return {}

    @property
    def setting(self) -> str:
        """Which it is: "simulation", "real nodes" or "centralized"."""
        if self.config.train.mode == "centralized":
            return "centralized"
        setting: str | None = self._machine.get("setting")
        if setting is not None:
            return setting
        # Of a run that did not write it down.
        return "real nodes" if (self.path / NODES_FILE).exists() else "simulation"

    @cached_property
    def hospitals(self) -> Mapping[int, str]:
        """Names of real nodes' hospitals by client number, those that the coordinator has given."""
        return hospital_names(self.path)

    @property
    def device(self) -> str | None:
        """That trained, or, with real nodes, drew; None where it was not written down."""
        return self._machine.get("device")

    @property
    def versions(self) -> Mapping[str, str]:
        """Of what ran, by name; empty where they were not written down."""
        return dict(self._machine.get("versions", {}))

    @property
    def code(self) -> str | None:
        """The fingerprint of what ran; None where it was not written down."""
        return self._machine.get("code")

    @property
    def study(self) -> dict[str, Any] | None:
        """What a study of its images found; None where there was none."""
        return self._object(f"{STUDY_FOLDER}/{STUDY_FILE}")

    @property
    def started_from(self) -> str | None:
        """The weights that it started from, in a few words; None: new ones."""
        told = self._object(START_FILE)
        with understood(self.path / START_FILE):
            return None if told is None else describe_starting_weights(told)

    @property
    def data_source(self) -> str | None:
        """Where the images are from; None where they are on several machines, or not told."""
        return self._data.get("source")

    @property
    def data_hashes(self) -> Mapping[str, str]:
        """Of the images: "all" and "train"; empty where there is no `data_source`."""
        return dict(self._data.get("sha256", {}))

    @property
    def trained_on_test(self) -> list[int] | None:
        """Test images of each class that are training images too; None where it was not told."""
        return (self._data.get("duplicates") or {}).get("in_both")

    @cached_property
    def grids(self) -> dict[int, Path]:
        """Pictures of samples by round."""
        return {round_of(file): file for file in sorted(self.path.glob("samples/round_*.png"))}

    @cached_property
    def submitted(self) -> Mapping[str, Word] | None:
        """What `flwr run` was given; None where it was not asked."""
        words = (self._object(SUBMISSION_FILE) or {}).get("run_config")
        with understood(self.path / SUBMISSION_FILE):
            if not isinstance(words, dict | None):
                raise TypeError(f"run_config must be an object, got {type(words).__name__}")
        return words

    @cached_property
    def work_times(self) -> list[WorkTime]:
        """When it was worked on, in order; empty of a run that did not write it down."""
        file = self.path / TIMES_FILE
        with understood(file):
            return [
                WorkTime(
                    datetime.fromisoformat(each["begun"]), float(each["seconds"]), each["host"]
                )
                for each in read_json(file) or []
            ]

    @cached_property
    def _machine(self) -> dict[str, Any]:
        return self._object(MACHINE_FILE) or {}

    @cached_property
    def _data(self) -> dict[str, Any]:
        return self._object(DATA_FILE) or {}

    def _object(self, name: str) -> dict[str, Any] | None:
        content = read_json(self.path / name)
        with understood(self.path / name):
            if not isinstance(content, dict | None):
                raise TypeError(f"expected an object, got {type(content).__name__}")
        return content

    @property
    def clients(self) -> list[int]:
        """The numbers of all clients that the folder knows of, ascending."""
        counted = {client for client in self.class_counts if isinstance(client, int)}
        return sorted(counted.union(self.records.clients))

    @cached_property
    def generator(self) -> Generator:
        """What was trained, without weights."""
        return weightless_generator(self.config)

    @property
    def draws(self) -> bool:
        """Whether there are weights that images are drawn from."""
        return can_draw(self.generator, self.config)

    @property
    def num_images(self) -> int | None:
        """The training images of all that say how many they have; None where none does."""
        known = [sum(counts) for counts in self.class_counts.values() if counts is not None]
        told = [
            each.n or 0
            for client in self.clients
            if (each := self.records.last("loss", reference=TRAIN, client=client))
        ]
        known = known or list(filter(None, told))
        return sum(known) if known else None

    @property
    def seconds(self) -> float:
        """The time of the whole run: of all its starts, with the drawing and measuring at its end.

        Of a run that did not write it down, the time of all rounds, with their evaluations.
        """
        if self.work_times:
            return sum(each.seconds for each in self.work_times)
        spent = [self.records.series(name) for name in ("round_seconds", SECONDS_EVALUATING)]
        return sum(sum(series.values()) for series in spent)

    def participation(self) -> dict[tuple[int, int], str]:
        """Say of each round and client whether it "trained", or why it did not.

        It was "left out", or "not asked"; where every client is asked, it was "not there".
        """
        absent = "not there" if self.config.federation.clients_per_round is None else "not asked"
        states = {
            (number, client): absent
            for number in range(1, self.rounds_done + 1)
            for client in self.clients
        }
        losses = self.records.of_clients("loss", reference=TRAIN)
        # Of clients that say no loss, and none of runs before it was recorded.
        norms, summed = (self.records.of_clients(name) for name in ("update_norm", IN_SUM))
        for of_clients in (losses, norms, summed):
            for client, series in of_clients.items():
                states |= {(number, client): "trained" for number in series}
        for each in self.records.left_out:
            if each.client is not None and each.context["activity"] == "train":
                states[each.round, each.client] = "left out"
        return states

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
                variance, guidance_scale, clip_x_start, with the values of `conf/diffusion`; of a
                family without diffusion what its schema names (`ModelConfig.drawing_values`).

        Returns:
            Images and labels, class after class.

        Raises:
            TypeError: a keyword is unknown.
            ValueError: a class, a client or a value is wrong.
        """
        names = self.config.generation_values
        options = _options(names, drawing, seed=seed, device=device, batch_size=batch_size)
        config = changed_config(self.config, options=options, names=names)
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
            colorize: whether to color gray pictures.
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
        names = RESTORATION_VALUES & self.config.generation_values
        options = _options(names, drawing, seed=seed, device=device, batch_size=batch_size)
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
    known = {
        path.partition(".")[2]: path for path in names if path.startswith(("diffusion.", "model."))
    }
    if unknown := sorted(drawing.keys() - known.keys()):
        raise TypeError(f"unknown keyword {unknown[0]}; known: {', '.join(sorted(known))}")
    return {
        **{known[name]: value for name, value in drawing.items()},
        "seed": seed,
        "train.device": device,
        "eval.batch_size": batch_size,
    }


def load_run(path: str | Path) -> Run:
    """Read a finished run, to look at it or to draw from its model.

    Args:
        path: its folder.

    Raises:
        ValueError: there is no run, it is not finished, or it is of another version of feddm.
    """
    run = Run(Path(path).expanduser())
    require_weights(run.path)
    return run


def find_runs(
    folder: Path, unreadable: Callable[[Path, Exception], object] = log_unreadable
) -> list[Run]:
    """Find every finished run in a folder and below it, sorted by path.

    Args:
        folder: to look in.
        unreadable: is told of each run that cannot be read, and why; it is left out.
    """
    found = []
    for file in sorted(folder.rglob("config.yaml")):
        if weights_file(file.parent).is_file():
            try:
                run = Run(file.parent)
                # Read here, so that a damaged file leaves out this run alone.
                _ = run.evaluations, run.partition
                found.append(run)
            except (ValueError, OSError) as error:
                unreadable(file.parent, error)
    return found


def _counts_of(name: str, content: Mapping[str, Any]) -> dict[int | str, list[int] | None]:
    if name == POOLED_FILE:
        return {POOLED: content["train_counts"]}
    if name == PARTITION_FILE:
        return dict(enumerate(content["train_counts"]))
    return {int(client): counts for client, counts in content["clients"].items()}


def _check_counts(counts: list[int] | None, num_classes: int) -> None:
    if counts is not None and [type(number) for number in counts] != [int] * num_classes:
        raise ValueError(f"expected {num_classes} numbers, got {counts!r}")


def kept_clients(run: Path) -> list[int]:
    """Number the clients whose own final weights a run has kept, ascending."""
    return sorted(
        int(file.stem.removeprefix("client-")) for file in run.glob("local/client-*.safetensors")
    )


def final_model(run: Path, config: Config, client: int | None = None) -> tuple[Generator, int]:
    """Build the generator of a run with its final weights, to draw from; see `trained_model`.

    Raises:
        ValueError: it is no generator, there are no weights, or they are not of this network.
    """
    require(
        config.model.draws,
        f"the run {run}",
        "one of a model that draws images",
        f"model.family={config.model.family}",
    )
    return trained_model(run, config, client)


def trained_model(run: Path, config: Config, client: int | None = None) -> tuple[Generator, int]:
    """Build the network of a run with its final weights; returns it and their round.

    Args:
        run: its folder.
        config: of the run.
        client: the number of a client whose own weights to take; None: the global ones.

    Raises:
        ValueError: there are no weights, or they are not of this network.
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
        with torch.device("meta"):
            drawing_generator(config, weights).load_shared(weights, assign=True)
        model = drawing_generator(config, weights)
        model.load_shared(weights)
    except RuntimeError as error:
        raise ValueError(f"{file} does not fit the network of {run}/config.yaml: {error}") from None
    lacking = [part for part in model.kept_parts if part not in model.undrawn]
    lacking = [p for p in lacking if not any(n.startswith(model.parts[p]) for n in weights)]
    require(
        not lacking or not config.model.draws,
        str(file),
        "whole weights: the parts that federation.local names have stayed at the hospitals, whose "
        "own models draw with them (in a new run federation.drawn_by=clients collects them)",
        f"none of {', '.join(lacking)}",
    )
    return model, int(metadata["round"])
