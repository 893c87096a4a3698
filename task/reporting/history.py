"""What happened in a run, finished or not, read back from its folder."""

import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import datetime, timedelta
from functools import cached_property
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from task.config import Config
from task.generators.base import Generator
from task.generators.registry import weightless_generator
from task.lock import holder
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
    SUBMISSION_FILE,
    TIMES_FILE,
    last_complete_round,
    round_of,
    run_config,
    weights_file,
)
from task.runs.records import TRAIN, Records, read_records
from task.runs.repeat import Word

POOLED = "pooled"


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


@dataclass(frozen=True, eq=False)
class RunHistory:
    """All that the folder of a run says of it.

    Values of rounds that were not completed are left out, as a resumed run forgets them.

    Attributes:
        path: the folder.
        config: as resolved.
        rounds_done: complete rounds.
        finished: whether the final weights are there and of the last round asked for.
        running: whether another process holds the folder.
        setting: "simulation", "real nodes" or "centralised".
        device: that trained, or, with real nodes, drew; None where it was not written down.
        versions: of what ran, by name; empty where they were not written down.
        code: its fingerprint; None where it was not written down.
        records: of complete rounds.
        class_counts: training images of each class by client number, or under `POOLED`; None of
            a client that does not say.
        evaluations: of the global weights.
        grids: pictures of samples by round.
        run_config: what `flwr run` was given; None where it was not asked.
        work_times: in order; empty of a run that did not write them down.
        data_source: where the images are from; None where they are not on one machine, or where
            it was not written down.
        data_hashes: of the images: "all" and "train"; empty where there is no `data_source`.
        trained_on_test: test images of each class that are training images too; None where it was
            not written down.
    """

    path: Path
    config: Config
    rounds_done: int
    finished: bool
    running: bool
    setting: str
    device: str | None
    versions: Mapping[str, str]
    code: str | None
    records: Records
    class_counts: Mapping[int | str, list[int] | None]
    evaluations: tuple[Evaluation, ...]
    grids: Mapping[int, Path]
    run_config: Mapping[str, Word] | None
    work_times: tuple[WorkTime, ...]
    data_source: str | None
    data_hashes: Mapping[str, str]
    trained_on_test: list[int] | None

    @property
    def name(self) -> str:
        """The name of the run's folder."""
        return self.path.resolve().name

    @property
    def current_evaluations(self) -> tuple[Evaluation, ...]:
        """Those of the newest weights: a run that was prolonged keeps files of earlier ones."""
        return self.of_round(self.rounds_done).evaluations

    def of_round(self, number: int) -> "RunHistory":
        """Leave out what was measured of the weights of other rounds."""
        return replace(
            self,
            rounds_done=number,
            evaluations=tuple(each for each in self.evaluations if each.round == number),
            records=self.records.of_round(number),
        )

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
        spent = [self.records.series(name) for name in ("round_seconds", "seconds_evaluating")]
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
        for client, series in self.records.of_clients("loss", reference=TRAIN).items():
            states |= {(number, client): "trained" for number in series}
        for each in self.records.left_out:
            if each.client is not None and each.context["activity"] == "train":
                states[each.round, each.client] = "left out"
        return states


def read_history(run: Path) -> RunHistory:
    """Read what the folder of a run says, whether it is finished, going on, or was ended.

    Raises:
        ValueError: there is no run, or a file is not what this version of feddm writes.
    """
    config = run_config(run)
    final = _final_round(run)
    rounds_done = max(last_complete_round(run), final or 0)
    machine = _read_json(run / MACHINE_FILE) or {}
    data = _read_json(run / DATA_FILE) or {}
    return RunHistory(
        path=run,
        config=config,
        rounds_done=rounds_done,
        finished=final == config.federation.rounds,
        running=holder(run / LOCK_FILE) not in (None, str(os.getpid())),
        setting=machine.get("setting") or _setting(run, config),
        device=machine.get("device"),
        versions=machine.get("versions", {}),
        code=machine.get("code"),
        records=_recorded(run, rounds_done),
        class_counts=_class_counts(run, len(config.data.classes)),
        evaluations=tuple(read_evaluations(run)),
        grids={round_of(file): file for file in sorted(run.glob("samples/round_*.png"))},
        run_config=_submitted_words(run / SUBMISSION_FILE),
        work_times=_work_times(run / TIMES_FILE),
        data_source=data.get("source"),
        data_hashes=data.get("sha256", {}),
        trained_on_test=(data.get("duplicates") or {}).get("in_both"),
    )


def _work_times(file: Path) -> tuple[WorkTime, ...]:
    if not file.exists():
        return ()
    with _naming(file):
        return tuple(
            WorkTime(datetime.fromisoformat(part["begun"]), float(part["seconds"]), part["host"])
            for part in json.loads(file.read_text(encoding="utf-8"))
        )


def _setting(run: Path, config: Config) -> str:
    # Of a run that did not write it down.
    if config.train.mode == "centralized":
        return "centralised"
    return "real nodes" if (run / NODES_FILE).exists() else "simulation"


@contextmanager
def _naming(file: Path) -> Iterator[None]:
    """Say of a file that cannot be understood which it is and what to do."""
    try:
        yield
    except (
        ValueError,
        TypeError,
        LookupError,
        AttributeError,
        ArithmeticError,
        RecursionError,
        SafetensorError,
    ) as error:
        why = " ".join(f"{type(error).__name__}: {error}".split())
        raise ValueError(
            f"{file} is not what a run writes ({why}); mend it, or move it out of the folder"
        ) from error


def _recorded(run: Path, rounds_done: int) -> Records:
    with _naming(run / METRICS_FILE):
        return read_records(run / METRICS_FILE).up_to(rounds_done)


def _final_round(run: Path) -> int | None:
    file = weights_file(run)
    if not file.is_file():
        return None
    with _naming(file), safe_open(file, framework="pt") as weights:
        return int((weights.metadata() or {})["round"])


def _class_counts(run: Path, num_classes: int) -> dict[int | str, list[int] | None]:
    for name in (POOLED_FILE, PARTITION_FILE, CLASS_COUNTS_FILE):
        content = _read_json(run / name)
        if content is not None:
            with _naming(run / name):
                counts = _counts_of(name, content)
                for each in counts.values():
                    _check_counts(each, num_classes)
            return counts
    return {}


def _check_counts(counts: list[int] | None, num_classes: int) -> None:
    if counts is not None and [type(number) for number in counts] != [int] * num_classes:
        raise ValueError(f"expected {num_classes} numbers, got {counts!r}")


def _counts_of(name: str, content: Mapping[str, Any]) -> dict[int | str, list[int] | None]:
    if name == POOLED_FILE:
        return {POOLED: content["train_counts"]}
    if name == PARTITION_FILE:
        return dict(enumerate(content["train_counts"]))
    return {int(client): counts for client, counts in content["clients"].items()}


def _submitted_words(file: Path) -> Mapping[str, Word] | None:
    words = (_read_json(file) or {}).get("run_config")
    with _naming(file):
        if not isinstance(words, dict | None):
            raise TypeError(f"run_config must be an object, got {type(words).__name__}")
    return words


def _read_json(file: Path) -> dict[str, Any] | None:
    if not file.exists():
        return None
    with _naming(file):
        content = json.loads(file.read_text(encoding="utf-8"))
        if not isinstance(content, dict):
            raise TypeError(f"expected an object, got {type(content).__name__}")
        return content
