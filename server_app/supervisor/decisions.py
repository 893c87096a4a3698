"""What to do about the runs of a folder, from what Flower lists and what lies on the disk."""

import math
from collections.abc import Collection, Mapping
from dataclasses import asdict, dataclass, replace
from enum import Enum
from pathlib import Path

from server_app.supervisor.submission import Submission, read_as
from task.checks import require
from task.files import write_json
from task.lock import holder
from task.runs.layout import DIVERGED, LOCK_FILE, SUBMISSION_FILE, is_begun, last_complete_round

SUPERVISION_FILE = "supervision.json"

# Seconds from the failure of an attempt to the next, doubled with each; many causes, such as a
# hospital that is restarted, go away by themselves. All together they outlast a night.
FIRST_PAUSE, LONGEST_PAUSE = 30.0, 3600.0
ATTEMPTS = 14

STARTING = ("pending", "starting")
# A run's process imports its libraries before it names its folder.
NAMING_SECONDS = 120.0


@dataclass(frozen=True)
class ListedRun:
    """What `flwr list` says of a run.

    Attributes:
        run_id: Flower's number of it.
        status: "pending", "starting", "running" or "finished:" with "completed", "failed" or
            "stopped".
        details: why it ended so.
        submitted_at: seconds since the epoch.
        changed_at: when it took this status, in seconds since the epoch.
    """

    run_id: int
    status: str
    details: str
    submitted_at: float
    changed_at: float

    @property
    def is_over(self) -> bool:
        """Whether it has ended, well or not."""
        return self.status.startswith("finished")

    @property
    def has_diverged(self) -> bool:
        """Whether it failed because training diverged; Flower puts words before the error."""
        return self.details.partition(": ")[2].startswith(DIVERGED)


@dataclass(frozen=True)
class Supervision:
    """What a supervisor has done for a run.

    Attributes:
        instead_of: the run that the directory named when this was written.
        run_id: the run that was submitted for it; the one that failed, while there is none.
        attempts: submissions without a further complete round.
        since_round: the last complete round before the first of them.
        submitted_at: of the last one, seconds since the epoch.
        given_up: whether there will be no more.
    """

    instead_of: int
    run_id: int
    attempts: int
    since_round: int
    submitted_at: float
    given_up: bool = False


@dataclass(frozen=True)
class RunFolder:
    """What lies on the disk of a run.

    Attributes:
        path: its folder.
        submission: how it was started.
        supervision: what was done for it; None while nothing was.
        last_round: the last complete one.
        begun: whether there is something to resume.
        holder: the process that has the folder open; None where none has.
    """

    path: Path
    submission: Submission
    supervision: Supervision | None
    last_round: int
    begun: bool
    holder: str | None

    @property
    def supervised(self) -> Supervision | None:
        """What was done for the run that holds the folder; None where a person started it."""
        done = self.supervision
        known = self.submission.run_id
        return done if done is not None and known in (done.instead_of, done.run_id) else None

    @property
    def run_id(self) -> int:
        """Flower's number of the run that holds the folder, or is about to."""
        return self.submission.run_id if self.supervised is None else self.supervised.run_id


class Verdict(Enum):
    """What a run asks for."""

    FOREIGN = "another SuperLink's"
    GOING = "going"
    COMPLETED = "completed"
    STOPPED = "stopped by a person"
    HELD = "failed, and a process still holds the folder"
    WAITING = "failed, and not to be submitted yet"
    RESUBMIT = "failed, and to be submitted again"
    HOPELESS = "failed, and attempts do not help"
    GIVEN_UP = "given up before"
    DIVERGED = "failed, and would fail alike again"


def judge(
    folder: RunFolder,
    runs: Mapping[int, ListedRun],
    *,
    attempts: int,
    starting: bool,
    now: float,
) -> Verdict:
    """Say what a run asks for.

    Args:
        folder: what is on the disk.
        runs: what Flower lists.
        attempts: how many submissions in a row may bring no further complete round.
        starting: whether a run starts whose folder nobody knows yet; it might be this one.
        now: seconds since the epoch.

    Raises:
        ValueError: Flower says a status that this does not know.
    """
    run = runs.get(folder.run_id)
    if run is None:
        return Verdict.FOREIGN
    if run.status in (*STARTING, "running"):
        return Verdict.GOING
    ended = {"finished:completed": Verdict.COMPLETED, "finished:stopped": Verdict.STOPPED}
    if run.status in ended:
        return ended[run.status]
    require(run.status == "finished:failed", "the status of a run", "known to feddm", run.status)
    if run.has_diverged:
        return Verdict.DIVERGED
    done = folder.supervised
    if done is not None and done.given_up:
        return Verdict.GIVEN_UP
    if folder.holder is not None:
        return Verdict.HELD
    if fruitless(folder) >= attempts:
        return Verdict.HOPELESS
    return Verdict.WAITING if starting or now < earliest(folder, run) else Verdict.RESUBMIT


def fruitless(folder: RunFolder) -> int:
    """Count the submissions since the last complete round."""
    done = folder.supervised
    return 0 if done is None or folder.last_round > done.since_round else done.attempts


def earliest(folder: RunFolder, run: ListedRun) -> float:
    """Return when a run may be submitted again, in seconds since the epoch.

    Args:
        folder: what is on the disk.
        run: that holds the folder, and failed.
    """
    count = fruitless(folder)
    if folder.supervised is None or count == 0:
        return run.changed_at
    # A submission that was not taken has left no run that could fail.
    return max(folder.supervised.submitted_at, run.changed_at) + pause_after(count)


def pause_after(count: int) -> float:
    """Return the seconds from the failure of the attempt of this number, from 1, to the next."""
    return min(math.ldexp(FIRST_PAUSE, count - 1), LONGEST_PAUSE)


def all_pauses(attempts: int) -> float:
    """Return the seconds of all pauses between so many attempts."""
    return sum(pause_after(count) for count in range(1, attempts))


def attempt(folder: RunFolder, *, now: float) -> Supervision:
    """Return what to remember before a run is submitted again."""
    return Supervision(
        instead_of=folder.submission.run_id,
        run_id=folder.run_id,
        attempts=fruitless(folder) + 1,
        since_round=folder.last_round,
        submitted_at=now,
    )


def giving_up(folder: RunFolder) -> Supervision:
    """Return what to remember of a run that further attempts do not help."""
    if folder.supervised is None:
        raise ValueError(f"{folder.path}: a run is given up after attempts, and there were none")
    return replace(folder.supervised, given_up=True)


def is_unnamed_start(run: ListedRun, folders: Collection[RunFolder], *, now: float) -> bool:
    """Whether a run starts, or has just begun to run, and no folder names it yet."""
    new = run.status == "running" and now < run.changed_at + NAMING_SECONDS
    named = {folder.run_id for folder in folders}
    return (new or run.status in STARTING) and run.run_id not in named


def failed_without_folder(
    runs: Mapping[int, ListedRun], folders: Collection[RunFolder]
) -> ListedRun | None:
    """Return the newest run where it failed and no folder names it; earlier ones are history."""
    newest = max(runs.values(), key=lambda run: run.submitted_at, default=None)
    if newest is None or newest.run_id in {folder.run_id for folder in folders}:
        return None
    return newest if newest.status == "finished:failed" else None


def read_folder(path: Path) -> RunFolder:
    """Read what lies in the folder of a run.

    Raises:
        ValueError: a file is no file of this version of feddm.
        OSError: a file cannot be read.
    """
    supervision = path / SUPERVISION_FILE
    return RunFolder(
        path=path,
        submission=read_as(Submission, path / SUBMISSION_FILE),
        supervision=read_as(Supervision, supervision) if supervision.exists() else None,
        last_round=last_complete_round(path),
        begun=is_begun(path),
        holder=holder(path / LOCK_FILE),
    )


def remember(path: Path, supervision: Supervision) -> None:
    """Write down, in the folder of a run, what was done for it.

    Raises:
        OSError: it cannot be written.
    """
    write_json(path / SUPERVISION_FILE, asdict(supervision))
