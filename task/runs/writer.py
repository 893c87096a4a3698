"""The one writer of a run's folder; `task.runs.layout` says what lies where in it."""

from __future__ import annotations

import platform
import time
from collections.abc import Callable, Iterable, Mapping
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any
from uuid import uuid4

from task.config import Config, write_config
from task.files import atomic_path, naming_full_disk, remove_left_overs, write_json
from task.lock import hold
from task.runs.layout import (
    DAMAGED,
    LOCK_FILE,
    METRICS_FILE,
    SCHEMA_FILE,
    SCHEMA_VERSION,
    TIMES_FILE,
    checkpoints,
    last_complete_round,
    read_json,
    round_of,
    run_config,
    run_path,
    weights_file,
)
from task.runs.records import DIVERGENCE, Record, read_records, records_of
from task.runs.resume import check_startable, settled_as

# Whoever only asks what is in a folder does without torch, which takes seconds.
if TYPE_CHECKING:
    import torch

    Tensors = Mapping[str, torch.Tensor]

# A killed process lets go of its lock; its children may need some seconds to end.
LOCK_PATIENCE_SECONDS = 30.0


class RunWriter:
    """The open folder of a run, held by this process alone until it is closed.

    Attributes:
        path: the folder, absolute.
        config: the configuration of the run; a resumed run keeps what it has settled.
        run_id: tells the run from others of its name.
        damaged: what was found of files with weights that cannot be read, a line for each.
    """

    def __init__(self, config: Config) -> None:
        """Create the folder, or open it where `config.resume` is set.

        A resumed run whose newest checkpoint is damaged goes on after the one before.

        Args:
            config: with absolute folders, see `task.config.anchored`.

        Raises:
            ValueError: see `check_startable`, or another process holds the folder, or none of its
                checkpoints can be read.
        """
        check_startable(config)
        self.path = path = run_path(config)
        self._lock = hold(path / LOCK_FILE, "run_name", patience=LOCK_PATIENCE_SECONDS)
        try:
            # Another run may have begun here while this one waited.
            check_startable(config)
        except ValueError:
            self._lock.close()
            raise
        if config.resume:
            config = settled_as(run_config(path), config)
        self.config = config
        self._begun, self._start = datetime.now().astimezone(), time.monotonic()
        self._earlier = self.read_json(TIMES_FILE) or []
        for folder in ("samples", "checkpoints"):
            (path / folder).mkdir(exist_ok=True)
        self._remove_left_overs()
        self.damaged = self._set_damaged_aside()
        self._forget_after(self.last_round)
        # After the metrics, which have been made of this schema.
        stored = self.read_json(SCHEMA_FILE) or {}
        self.run_id = stored.get("id", uuid4().hex)
        self.write_json(SCHEMA_FILE, {"version": SCHEMA_VERSION, "id": self.run_id})
        from torch.utils.tensorboard import SummaryWriter

        self._tensorboard = SummaryWriter(str(path / "tensorboard"), purge_step=self.last_round + 1)

    def write_config(self, config: Config) -> None:
        """Keep and write down the configuration, as resolved."""
        self.config = config
        write_config(config, self.path / "config.yaml")

    def close(self) -> None:
        """Write what is buffered and let go of the folder."""
        try:
            with naming_full_disk(self.path):
                self._tensorboard.close()
        finally:
            self._lock.close()

    @property
    def metrics_file(self) -> Path:
        """The file of all metrics."""
        return self.path / METRICS_FILE

    @property
    def model_file(self) -> Path:
        """The file of the final weights."""
        return weights_file(self.path)

    @property
    def last_round(self) -> int:
        """The last complete round, 0 before the first."""
        return last_complete_round(self.path)

    def record(self, records: Iterable[Record]) -> None:
        """Append records, and hand them to TensorBoard.

        Raises:
            OSError: they cannot be written; a half line at the end is dropped by a resumed run.
        """
        records = list(records)
        with naming_full_disk(self.path):
            with self.metrics_file.open("a", encoding="utf-8") as file:
                file.writelines(map(Record.line, records))
            for each in records:
                self._tensorboard.add_scalar(each.tag, each.value, each.round)

    def record_picture(self, server_round: int, name: str, pixels: torch.Tensor) -> None:
        """Hand a picture, uint8 [C, H, W], to TensorBoard."""
        self._tensorboard.add_image(name, pixels, server_round)
        # Whoever follows the run sees it with its picture, and not two minutes later.
        self._tensorboard.flush()

    def write_json(self, name: str, content: object) -> None:
        """Write a small JSON file, atomically."""
        write_json(self.path / name, content)

    def read_json(self, name: str) -> Any:
        """Read a JSON file of the run; None where it is not there.

        Raises:
            ValueError: it is damaged.
        """
        return read_json(self.path / name)

    def record_time(self) -> None:
        """Write down for how long this process has worked on the run until now."""
        part = {
            "begun": self._begun.isoformat(timespec="seconds"),
            "seconds": round(time.monotonic() - self._start, 1),
            "host": platform.node(),
        }
        self.write_json(TIMES_FILE, [*self._earlier, part])

    def samples_file(self, server_round: int) -> Path:
        """The picture of a round."""
        return self.path / "samples" / f"round_{server_round:04d}.png"

    def save_checkpoint(
        self,
        server_round: int,
        weights: Tensors,
        state: Mapping[str, Tensors],
        *,
        numbers: Callable[[], Mapping[str, float]] = dict,
    ) -> None:
        """Save the weights after a round, which is complete with it, and drop old checkpoints.

        Args:
            server_round: 1-based.
            weights: the global weights.
            state: further groups of tensors that the next round goes on from, by group.
            numbers: returns values of the round, by metric. They are recorded when the file is
                written and not yet in its place, so that no round is complete without them.
        """
        from task.runs.checkpoint import join_groups, write_weights

        file = self.path / "checkpoints" / f"round_{server_round:04d}.safetensors"
        with atomic_path(file) as aside:
            write_weights(aside, join_groups(weights, state), self._metadata(server_round))
            self.record(records_of(server_round, numbers()))

    def forget_checkpoints(self) -> None:
        """Drop all but the last `federation.keep_checkpoints`."""
        for old in checkpoints(self.path)[: -self.config.federation.keep_checkpoints]:
            old.unlink()

    def load_checkpoint(self) -> tuple[Tensors, Mapping[str, Tensors]] | None:
        """Load weights and state of the last complete round; None before the first.

        Raises:
            ValueError: the file is broken.
        """
        from task.runs.checkpoint import load_weights, split_groups

        files = checkpoints(self.path)
        return split_groups(load_weights(files[-1])[0]) if files else None

    def forget_local_models(self) -> None:
        """Drop the weights of clients that an earlier last round has left."""
        for file in self.path.glob("local/*"):
            file.unlink()

    def save_local_model(self, server_round: int, client: int, weights: Tensors) -> None:
        """Save the own weights of a simulated client after the last round."""
        from task.runs.checkpoint import save_weights

        file = weights_file(self.path, client)
        file.parent.mkdir(exist_ok=True)
        save_weights(file, weights, self._metadata(server_round))

    def save_model(self, server_round: int, weights: Tensors) -> None:
        """Save the final weights with configuration and round in their metadata."""
        from task.runs.checkpoint import save_weights

        save_weights(self.model_file, weights, self._metadata(server_round))

    def _metadata(self, server_round: int) -> dict[str, str]:
        from task.runs.checkpoint import weights_metadata

        return weights_metadata(self.config, server_round)

    def _remove_left_overs(self) -> None:
        for file in ("checkpoints/round_*.safetensors", "samples/round_*.png", "local/*"):
            remove_left_overs(self.path / file)
        for path in (self.path / "config.yaml", self.metrics_file, self.model_file):
            remove_left_overs(path)

    def _set_damaged_aside(self) -> list[str]:
        """Rename the newest files with weights where they cannot be read, and say so.

        Raises:
            ValueError: there are checkpoints, and none can be read.
        """
        found = {}
        newest_first = checkpoints(self.path)[::-1]
        for file in newest_first:
            found[file] = what_is_wrong(file)
            if found[file] is None:
                break
        if newest_first and all(found.values()):
            raise ValueError(
                f"resume: no checkpoint of {self.path} can be read ({found[newest_first[0]]}); put "
                "a copy back, or start anew under another run_name"
            )
        if self.model_file.exists():
            found[self.model_file] = what_is_wrong(self.model_file)
        damaged = {file: why for file, why in found.items() if why is not None}
        for file in damaged:
            file.rename(file.with_name(f"{DAMAGED}{file.name}"))
        # Repeated with their rounds: a picture says that its round was evaluated.
        for picture in self.path.glob("samples/round_*.png"):
            if damaged and round_of(picture) > self.last_round:
                picture.unlink()
        return [
            f"{why}; it is kept as {DAMAGED}{file.name}, and the run goes on after round "
            f"{self.last_round}"
            for file, why in damaged.items()
        ]

    def _forget_after(self, server_round: int) -> None:
        """Drop the records of what is about to be repeated: rounds, and that one has diverged."""
        if self.metrics_file.exists():
            known = read_records(self.metrics_file).up_to(server_round).all
            kept = [each for each in known if each.metric != DIVERGENCE]
            with atomic_path(self.metrics_file) as aside:
                aside.write_text("".join(map(Record.line, kept)), "utf-8")


def what_is_wrong(file: Path) -> str | None:
    """Say why a file with weights cannot be read; None where it can."""
    from task.runs.checkpoint import load_weights

    try:
        load_weights(file)
    except ValueError as error:
        return str(error)
    return None
