"""The folder of one run: what it was, how it went, and the weights that came out.

<output_dir>/<run_name>/
    config.yaml                     the resolved configuration
    metrics.jsonl                   a `task.runs.records.Record` per line
    partition.json, partition.png   images of each class at each client (simulation)
    pooled.json                     images of each class (centralised)
    data.json                       files used and left out, images that are the same, source and
                                    hashes of all images (simulation, centralised)
    nodes.json                      client numbers by node id (deployment)
    class_counts.json               classes, and images of each at each client that says so, null
                                    where one does not (deployment)
    machine.json                    the device, with real nodes the server's own; the setting,
                                    versions and code
    times.json                      when, for how long and on which machine the run was worked on,
                                    an entry for each start
    submission.json                 what `flwr run` was given, to be given again
    supervision.json                what feddm-supervise did
    samples/round_0005.png          a grid, a row per class
    checkpoints/round_0005.safetensors   with a checksum, as all weights
    local/client-3.safetensors      the own final weights of a simulated client
    model.safetensors               the final weights
    report.html                     all of this on one page
    log.txt                         what Flower, Ray and the run said (feddm-train's simulations)
    tensorboard/                    the same metrics and pictures as events
"""

from __future__ import annotations

import fcntl
import json
import os
import platform
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping
from datetime import datetime
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from task.config import (
    Config,
    flat_values,
    read_config,
    settle_precisions,
    unknown_values,
    write_config,
)
from task.files import atomic_path, naming_full_disk, remove_left_overs, write_json
from task.runs.records import Record, read_records, records_of

# Whoever only asks what is in a folder does without torch, which takes seconds.
if TYPE_CHECKING:
    import torch

    Tensors = Mapping[str, torch.Tensor]

NAMES_AND_PLACES = frozenset({"experiment", "output_dir", "run_name", "resume", "data.cache_dir"})

# A resumed run may change these: none of them touches the weights of a round.
FREE_TO_CHANGE = NAMES_AND_PLACES | frozenset(
    {
        "data.root",
        *("federation.rounds", "federation.num_supernodes", "federation.min_nodes"),
        *("federation.min_replies", "federation.node_wait", "federation.round_timeout"),
        *("federation.keep_checkpoints", "federation.cpus_per_client"),
        *("federation.gpus_per_client", "federation.keep_local_models"),
        *("federation.max_in_flight", "federation.round_attempts"),
        # They choose other values before a run begins.
        *("federation.images_per_client", "train.steps_per_round"),
        *("eval.every", "eval.images_per_class"),
        *("eval.num_images", "eval.metrics_every", "eval.final_metrics", "eval.num_per_class"),
        *("eval.seed", "eval.batch_size", "eval.precision"),
        *("eval.extractor", "eval.image_range"),
        *("eval.inception_weights", "eval.exported_program"),
    }
)

# Runs that differ in nothing else have the same final weights, but for rounding.
WITHOUT_INFLUENCE = (FREE_TO_CHANGE - {"federation.rounds", "federation.num_supernodes"}) | {
    *("train.device", "train.precision", "train.num_threads", "train.channels_last"),
    *("train.deterministic", "train.compile", "train.num_processes"),
}

# A killed process lets go of its lock; its children may need some seconds to end.
LOCK_PATIENCE_SECONDS = 30.0

PARTITION_FILE = "partition.json"
POOLED_FILE = "pooled.json"
DATA_FILE = "data.json"
NODES_FILE = "nodes.json"
CLASS_COUNTS_FILE = "class_counts.json"
METRICS_FILE = "metrics.jsonl"
SUBMISSION_FILE = "submission.json"
MACHINE_FILE = "machine.json"
TIMES_FILE = "times.json"
REPORT_FILE = "report.html"
LOCK_FILE = ".lock"
LOG_FILE = "log.txt"
# Put before the name of a file with weights that cannot be read.
DAMAGED = "damaged-"

# What the error of a run begins with that would end in it again.
DIVERGED = "training has diverged"


def run_path(config: Config) -> Path:
    """Return the folder of a run, which `output_dir` and `run_name` say."""
    return Path(config.output_dir) / config.run_name


def check_startable(config: Config) -> None:
    """Check that a run can be started, or resumed, in its folder, and make it.

    Raises:
        ValueError: there is a run already, or none to resume, or one of another configuration,
            or the folder cannot be written.
    """
    path = run_path(config)
    try:
        exists = is_begun(path)
    except OSError as error:
        raise ValueError(f"run_name: {path} is no possible folder ({error.strerror})") from error
    if exists and not config.resume:
        raise ValueError(
            f"run_name: {path} already holds a run; pass resume=true to continue it "
            "or another run_name"
        )
    if config.resume and not exists:
        raise ValueError(f"resume: {path} holds no run; check output_dir and run_name")
    if config.resume:
        check_same_run(config, path)
    try:
        path.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=path).close()
    except OSError as error:
        raise ValueError(
            f"output_dir: cannot write to {path} ({error.strerror}); choose another"
        ) from error


def check_same_run(config: Config, path: Path) -> None:
    """Check that a configuration gives the weights of the run in a folder.

    Raises:
        ValueError: it does not; names every key that differs.
    """
    different = different_values(read_config(path / "config.yaml"), config)
    unknown = [f"{k}={v}" for k, v in unknown_values(path / "config.yaml").items()]
    if unknown:
        raise ValueError(
            f"resume: {path} was trained with {', '.join(unknown)}, which this version of feddm "
            "does not know; resume it with the version that began it"
        )
    differences = [
        f"{key}={asked} (there: {stored})"
        for key, (stored, asked) in different.items()
        if key not in FREE_TO_CHANGE
    ]
    if differences:
        raise ValueError(
            f"resume: {path} is a run of another configuration; asked for "
            f"{', '.join(differences)}; pass the words that it was started with"
        )


def different_values(stored: Config, asked: Config) -> dict[str, tuple[Any, Any]]:
    """List the values by which two runs differ, except for their names and places.

    Args:
        stored: of a run, resolved.
        asked: of another, which takes the resolved precisions where it leaves them open.
    """
    resolved, wanted = flat_values(stored), flat_values(with_precisions_of(stored, asked))
    without_clients = stored.train.mode == asked.train.mode == "centralized"
    return {
        key: (value, wanted[key])
        for key, value in resolved.items()
        if value != wanted[key]
        and key not in NAMES_AND_PLACES
        and not (without_clients and is_about_clients(key))
    }


def with_precisions_of(stored: Config, asked: Config) -> Config:
    """Take over the precisions that a stored run has settled and a configuration leaves open."""
    return settle_precisions(asked, train=stored.train.precision, eval=stored.eval.precision)


def is_about_clients(key: str) -> bool:
    """Whether a value says something in a federated run only."""
    return key.startswith(("partition.", "federation.")) and key != "federation.rounds"


class RunDirectory:
    """The open folder of a run, held by this process alone until it is closed.

    Attributes:
        path: the folder, absolute.
        config: the configuration of the run; a resumed run keeps its resolved precisions.
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
            config = with_precisions_of(read_config(path / "config.yaml"), config)
        self.config = config
        self._begun, self._start = datetime.now().astimezone(), time.monotonic()
        self._earlier = self.read_json(TIMES_FILE) or []
        for folder in ("samples", "checkpoints"):
            (path / folder).mkdir(exist_ok=True)
        self._remove_left_overs()
        self.damaged = self._set_damaged_aside()
        self._forget_after(self.last_round)
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
        from task.runs.checkpoint import write_weights

        # No name of a weight holds a slash.
        beside = {f"{group}/{n}": t for group, tensors in state.items() for n, t in tensors.items()}
        file = self.path / "checkpoints" / f"round_{server_round:04d}.safetensors"
        with atomic_path(file) as aside:
            write_weights(aside, {**weights, **beside}, self._metadata(server_round))
            self.record(records_of(server_round, numbers()))
        for old in checkpoints(self.path)[: -self.config.federation.keep_checkpoints]:
            old.unlink()

    def load_checkpoint(self) -> tuple[Tensors, dict[str, Tensors]] | None:
        """Load weights and state of the last complete round; None before the first.

        Raises:
            ValueError: the file is broken.
        """
        from task.runs.checkpoint import load_weights

        files = checkpoints(self.path)
        if not files:
            return None
        groups: dict[str, dict[str, torch.Tensor]] = {"": {}}
        for name, tensor in load_weights(files[-1])[0].items():
            group, _, own_name = name.rpartition("/")
            groups.setdefault(group, {})[own_name] = tensor
        weights = groups.pop("")
        return weights, dict(groups)

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

    def final_round(self) -> int | None:
        """The round of the final weights; None while there are none."""
        from task.runs.checkpoint import load_weights

        if not self.model_file.exists():
            return None
        return int(load_weights(self.model_file)[1]["round"])

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
        """Drop the metrics of rounds that were not completed; they are about to be repeated."""
        if self.metrics_file.exists():
            kept = read_records(self.metrics_file).up_to(server_round)
            with atomic_path(self.metrics_file) as aside:
                aside.write_text("".join(map(Record.line, kept.all)), "utf-8")


def read_json(file: Path) -> Any:
    """Read a JSON file of a run; None where it is not there.

    Raises:
        ValueError: it is damaged.
    """
    if not file.exists():
        return None
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{file} is damaged ({error}); bring a copy of it back") from error


def client_numbers(run: Path) -> dict[int, int] | None:
    """Read the client numbers of a run over real nodes by node id; None of any other folder.

    Raises:
        ValueError: they are damaged.
    """
    if not (run / NODES_FILE).exists():
        return None
    numbers = read_json(run / NODES_FILE)
    if isinstance(numbers, dict):
        pairs = [(node, number) for node, number in numbers.items() if type(number) is int]
        if len(pairs) == len(numbers) and all(node.isdecimal() for node in numbers):
            return {int(node): number for node, number in pairs}
    raise ValueError(
        f"{run / NODES_FILE} is damaged: it must hold a number for each node id; bring a copy of "
        "it back"
    )


def what_is_wrong(file: Path) -> str | None:
    """Say why a file with weights cannot be read; None where it can."""
    from task.runs.checkpoint import load_weights

    try:
        load_weights(file)
    except ValueError as error:
        return str(error)
    return None


def weights_file(run: Path, client: int | None = None) -> Path:
    """Return the file of a run's final weights, or of those of one of its simulated clients."""
    return run / ("model.safetensors" if client is None else f"local/client-{client}.safetensors")


def is_begun(run: Path) -> bool:
    """Whether the folder of a run holds one that can be resumed."""
    return (run / "config.yaml").exists()


def run_config(run: Path) -> Config:
    """Read the configuration of the run in a folder.

    Raises:
        ValueError: there is no run, or it is of another version of feddm.
    """
    if not is_begun(run):
        raise ValueError(f"RUN: {run} holds no run (there is no {run / 'config.yaml'})")
    return read_config(run / "config.yaml")


def checkpoints(run: Path) -> list[Path]:
    """List the checkpoints in the folder of a run, by round."""
    return sorted((run / "checkpoints").glob("round_*.safetensors"), key=round_of)


def last_complete_round(run: Path) -> int:
    """Return the last complete round of the run in a folder, 0 before the first."""
    return max((round_of(file) for file in checkpoints(run)), default=0)


def hold(path: Path, field: str, *, patience: float) -> IO[str]:
    """Lock a file, and write this process's number into it, until it is closed.

    Args:
        path: the file; made where there is none.
        field: what names its folder, for the error.
        patience: seconds to wait for another process to let go of it.

    Raises:
        ValueError: another process holds it.
        OSError: it cannot be written.
    """
    file = path.open("a+", encoding="utf-8")
    deadline = time.monotonic() + patience
    while True:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            break
        except BlockingIOError as error:
            if time.monotonic() >= deadline:
                file.seek(0)
                owner = file.read().strip()
                file.close()
                raise ValueError(
                    f"{field}: {path.parent} is in use by process {owner}; end it first"
                ) from error
            time.sleep(0.5)
    file.truncate(0)
    file.write(str(os.getpid()))
    file.flush()
    return file


def holder(run: Path) -> str | None:
    """Return the number of the process that has the folder of a run open; None where none has."""
    try:
        with (run / LOCK_FILE).open("r", encoding="utf-8") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
            except BlockingIOError:
                return file.read().strip() or "of unknown number"
    except FileNotFoundError:
        pass
    return None


def round_of(file: Path) -> int:
    """Return the round of "round_0005" with any ending.

    Raises:
        ValueError: the file is named otherwise.
    """
    number = file.stem.removeprefix("round_")
    if not number.isdecimal():
        raise ValueError(
            f"{file} must be named by a round, such as round_0005{file.suffix}; move it out of "
            "the folder of the run"
        )
    return int(number)
