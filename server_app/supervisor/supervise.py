"""`feddm-supervise`: submit runs that failed again, beside a SuperLink, for as long as it helps."""

import math
import signal
import tempfile
import time
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from datetime import datetime
from pathlib import Path
from typing import Annotated

import typer

from server_app.launch.flwr_command import NoAnswer, flwr, local_environment
from server_app.log import log
from server_app.supervisor.alerts import alert
from server_app.supervisor.decisions import (
    ATTEMPTS,
    FIRST_PAUSE,
    LONGEST_PAUSE,
    STARTING,
    ListedRun,
    RunFolder,
    Verdict,
    all_pauses,
    attempt,
    earliest,
    failed_without_folder,
    fruitless,
    giving_up,
    is_unnamed_start,
    judge,
    read_folder,
    remember,
)
from server_app.supervisor.last_listed import FORGOTTEN, LastListed
from task.checks import require
from task.code_version import fingerprint_of
from task.lock import hold
from task.runs.commands import as_toml, resubmitting_command
from task.runs.layout import SUBMISSION_FILE

SUPERVISOR_LOCK = ".supervisor.lock"
NAP_SECONDS = 0.2
# What may need a person's hand is said again.
REPEAT_SECONDS = 600.0
# Of a run that nothing starts, and of a SuperLink that does not answer.
STUCK_SECONDS = 300.0
GIBIBYTE = 1 << 30
MOST_RUNS = 1_000_000

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


def main() -> None:
    """Run `feddm-supervise`."""
    app()


@app.command()
def supervise(
    connection: Annotated[
        str,
        typer.Argument(
            help="The SuperLink's name in the config.toml of FLWR_HOME, as for `flwr run`.",
            show_default=False,
        ),
    ],
    runs: Annotated[
        Path,
        typer.Option(
            file_okay=False,
            resolve_path=True,
            help="The folder with the run directories, at any depth; made where there is none.",
            show_default=False,
        ),
    ],
    attempts: Annotated[
        int,
        typer.Option(
            min=1,
            max=100,
            help="Submissions in a row without a further complete round, then give up. The pauses "
            f"between them grow from {FIRST_PAUSE:g} s to {LONGEST_PAUSE / 60:g} min; those of "
            f"{ATTEMPTS} sum to about {all_pauses(ATTEMPTS) / 3600:.0f} hours.",
        ),
    ] = ATTEMPTS,
    poll: Annotated[float, typer.Option(min=1, help="Seconds between two looks.")] = 10,
    database: Annotated[
        Path | None,
        typer.Option(help="The SuperLink's --database, whose size is looked at."),
    ] = None,
    max_database: Annotated[
        float, typer.Option(min=0, help="GiB from which on --database is too large.")
    ] = 4.0,
    until_done: Annotated[
        bool,
        typer.Option(
            help="End when no run is going: 0 if all completed that were going at the start, came "
            "later or were submitted again; 1 if one of them did not, or there were none.",
        ),
    ] = False,
) -> None:
    """Submit runs that failed again, with resume=true, until they complete.

    It runs on the SuperLink's host and reads its run directories. A run that a person stopped
    with `flwr stop` is left alone, and so is one that has diverged. A run that it gives up it
    names, and goes on with the others. Without --until-done it ends only when it is asked to
    (SIGTERM, SIGHUP), with 0. What needs a person's hand is also given to the command that the
    variable FEDDM_ALERT names, on its standard input, or posted to the address that it is.
    """
    try:
        runs.mkdir(parents=True, exist_ok=True)
        lock = hold(runs / SUPERVISOR_LOCK, "--runs", patience=0.0)
    except (OSError, ValueError) as error:
        typer.echo(f"feddm-supervise: {error}", err=True)
        raise typer.Exit(1) from error
    with lock:
        supervisor = Supervisor(
            connection, runs, attempts, database=database, max_database=max_database
        )
        raise typer.Exit(supervisor.watch(poll, until_done=until_done))


class Supervisor:
    """The runs of one SuperLink whose directories lie in one folder."""

    def __init__(
        self,
        connection: str,
        runs: Path,
        attempts: int,
        *,
        database: Path | None = None,
        max_database: float = math.inf,
    ) -> None:
        """Nothing is asked of the SuperLink yet; see `supervise` for the arguments."""
        self._database, self._max_database = database, max_database
        self._connection = connection
        self._runs = runs
        self._attempts = attempts
        self._last_listed = LastListed(runs)
        self._answered = True
        self._silent_since: float | None = None
        # What somebody was told of, and when that was tried last.
        self._told: set[object] = set()
        self._tried_at: dict[object, float] = {}
        # When this supervisor saw a run first that nothing had started.
        self._waiting_since: dict[int, float] = {}
        self._said: dict[object, float] = {}
        # The runs that were over at the first look; None before it.
        self._history: set[int] | None = None

    def watch(self, poll: float, *, until_done: bool) -> int:
        """Look again and again, until nothing is going or this process is asked to end.

        Args:
            poll: seconds between two looks.
            until_done: whether to end when nothing is going.

        Returns:
            The status to end with.
        """
        # Not an exception, which could come in the midst of a submission.
        ending: list[int] = []
        for number in (signal.SIGTERM, signal.SIGHUP):
            if signal.getsignal(number) is not signal.SIG_IGN:  # as nohup leaves it
                signal.signal(number, lambda number, _: ending.append(number))
        log(f"supervising the runs in {self._runs}")
        while not ending:
            status = self.look(until_done=until_done)
            if status is not None:
                return status
            deadline = time.monotonic() + poll
            while not ending and time.monotonic() < deadline:
                time.sleep(NAP_SECONDS)
        log("asked to end; the runs go on without a supervisor")
        return 0

    def look(self, *, until_done: bool = False) -> int | None:
        """Look once at what Flower lists and at the folders, and do what is to be done.

        Returns:
            The status to end with; None to go on.
        """
        # The folders first: what is listed then is at least as new as what they say.
        folders, all_read = self.read_folders()
        try:
            listed = list_runs(self._connection)
        except NoAnswer as reason:
            self.say_silence(reason)
            return None
        if not self._answered:
            log("the SuperLink answers again")
        self._answered, self._silent_since = True, None
        forgotten, over = self.remembered_runs(listed, folders)
        listed |= over
        self.look_for_stuck(listed)
        if self._history is None:
            self._history = {run.run_id for run in listed.values() if run.is_over}
        listed |= forgotten
        lost = failed_without_folder(listed, folders)
        if lost is not None:
            self.say_once(
                f"run {lost.run_id} failed and has no folder below {self._runs}, so it is not "
                f"submitted again: {lost.details}"
            )
        verdicts = {folder.run_id: self.handle(folder, listed, folders) for folder in folders}
        return self.status(verdicts, listed, lost) if until_done and all_read else None

    def remembered_runs(
        self, listed: Mapping[int, ListedRun], folders: Collection[RunFolder]
    ) -> tuple[dict[int, ListedRun], dict[int, ListedRun]]:
        """Return the runs of which more is known than the SuperLink lists, and tell of them.

        Returns:
            Those that it has forgotten, and those that were over and that its database, which is
            an older one, revives. The latter are stopped.
        """
        try:
            found = self._last_listed.forgotten(listed, folders, now=time.time())
            over = self._last_listed.over_before(listed)
            self._last_listed.keep({**listed, **found, **over}, folders)
        except (OSError, ValueError) as error:
            self.say_trouble(self._runs, error)
            return {}, {}
        for run in over.values():
            status = listed[run.run_id].status
            self.say_once(
                f"run {run.run_id} was {run.status}, and stays so: the SuperLink's database is an "
                f"older one, which lists it as {status}",
                about=(run.run_id, "over before"),
            )
            if not listed[run.run_id].is_over:
                self.stop(run)
        for run in found.values():
            if run.details == FORGOTTEN:
                self.say_once(
                    f"run {run.run_id} was going, and {FORGOTTEN}. The run is submitted again; "
                    "where the hospitals are not registered any more, let them in again: "
                    f"feddm-hospitals restore {self._connection}",
                    urgent=True,
                )
        return found, over

    def stop(self, run: ListedRun) -> None:
        """Stop a run that an older database has revived."""
        try:
            flwr("stop", str(run.run_id), self._connection, environment=local_environment())
        except NoAnswer as reason:
            self.say_once(f"run {run.run_id} could not be stopped, it is tried again: {reason}")

    def say_silence(self, reason: NoAnswer) -> None:
        """Say that the SuperLink does not answer, and tell it where that lasts."""
        now = time.monotonic()
        if self._answered:
            log(f"no answer from the SuperLink, waiting for it: {reason}")
        self._answered = False
        self._silent_since = self._silent_since or now
        if now - self._silent_since > STUCK_SECONDS:
            self.say_once(
                f"the SuperLink has not answered for {STUCK_SECONDS / 60:.0f} minutes: {reason}",
                about=("silent", self._silent_since),
                urgent=True,
            )

    def look_for_stuck(self, listed: Mapping[int, ListedRun]) -> None:
        """Say which runs nothing starts, and where the SuperLink's database has grown too large."""
        now = time.monotonic()
        waiting = {run_id for run_id, run in listed.items() if run.status in STARTING}
        self._waiting_since = {run_id: self._waiting_since.get(run_id, now) for run_id in waiting}
        for run_id in waiting:
            run = listed[run_id]
            if now - self._waiting_since[run_id] > STUCK_SECONDS:
                self.say_once(
                    f"run {run.run_id} has been {run.status} for more than "
                    f"{STUCK_SECONDS / 60:.0f} minutes: nothing starts it. The SuperLink's "
                    "flower-superexec may have died: restart the SuperLink, and the run begins",
                    about=(run.run_id, "stuck"),
                    again=REPEAT_SECONDS,
                    urgent=True,
                )
        if self._database is None:
            return
        try:
            beside = self._database.with_name(f"{self._database.name}-wal")
            size = self._database.stat().st_size / GIBIBYTE
            if beside.exists():
                size += beside.stat().st_size / GIBIBYTE
        except OSError as error:
            self.say_trouble(self._database, error)
            return
        if size > self._max_database:
            self.say_once(
                f"{self._database} has {size:.1f} GiB, more than --max-database="
                f"{self._max_database:g}: a node may have sent what no round holds; with the "
                "SuperLink stopped, VACUUM makes it small again (docs/deployment.md, section 8)",
                about=(self._database, "large"),
                again=REPEAT_SECONDS,
                urgent=True,
            )

    def read_folders(self) -> tuple[list[RunFolder], bool]:
        """Read every run directory that names its run, and say which cannot be read.

        Returns:
            What was read, and whether nothing is left that may be readable later.
        """
        folders, all_read = [], True
        try:
            files = sorted(self._runs.rglob(SUBMISSION_FILE))
        except OSError as error:
            self.say_trouble(self._runs, error)
            return [], False
        for file in files:
            try:
                folders.append(read_folder(file.parent))
            except ValueError as error:
                self.say_once(f"left alone: {error}", about=file)
            except OSError as error:
                self.say_trouble(file.parent, error)
                all_read = False
        return folders, all_read

    def handle(
        self, folder: RunFolder, listed: Mapping[int, ListedRun], folders: Collection[RunFolder]
    ) -> Verdict:
        """Judge a run and do what it asks for; what cannot be done now waits."""
        now = time.time()
        starting = any(is_unnamed_start(run, folders, now=now) for run in listed.values())
        try:
            verdict = judge(folder, listed, attempts=self._attempts, starting=starting, now=now)
            run = listed.get(folder.run_id)
            if run is None:
                self.say_once(
                    f"{folder.path}: left alone, this SuperLink does not list its run "
                    f"{folder.run_id}"
                )
            elif verdict is Verdict.RESUBMIT:
                self.submit_again(folder, run, now=now)
            elif verdict is Verdict.HOPELESS:
                self.give_up(folder, run)
            else:
                self.say_verdict(folder, run, verdict)
        except (OSError, ValueError) as error:
            self.say_trouble(folder.path, error)
            return Verdict.WAITING
        return verdict

    def submit_again(self, folder: RunFolder, run: ListedRun, *, now: float) -> None:
        """Submit a run once more, and remember the attempt unless the disk hindered it.

        Raises:
            OSError: the words or what is remembered cannot be written.
        """
        this_attempt = attempt(folder, now=now)
        self.say_once(
            f"{folder.path}: run {run.run_id} failed ({run.details}) after round "
            f"{folder.last_round}; submitting it again, attempt {this_attempt.attempts} of "
            f"{self._attempts}"
        )
        try:
            with submittable(folder) as arguments:
                # Before, so that a crash in between cannot make attempts endless.
                remember(folder.path, this_attempt)
                self.make_present(run)
                run_id = submit(*arguments, connection=self._connection)
        except NoAnswer as reason:
            remember(folder.path, this_attempt)
            self.make_present(run)
            log(f"{folder.path}: could not be submitted: {reason}")
            return
        log(f"{folder.path}: goes on as run {run_id}")
        remember(folder.path, replace(this_attempt, run_id=run_id))

    def give_up(self, folder: RunFolder, run: ListedRun) -> None:
        """Say that a run is given up, and remember it.

        Raises:
            OSError: it cannot be remembered.
        """
        self.make_present(run)
        words, code = folder.submission.run_config, folder.submission.app
        self.say_once(
            f"GIVING UP {folder.path} after {fruitless(folder)} attempts without a further "
            f"complete round; complete: {folder.last_round}; run {run.run_id} failed: "
            f"{run.details}. Remove the cause; then, in {code}:\n"
            f"{resubmitting_command(words, folder.path, connection=self._connection)}",
            about=(run.run_id, Verdict.GIVEN_UP),
            urgent=True,
        )
        remember(folder.path, giving_up(folder))

    def make_present(self, run: ListedRun) -> None:
        """Count a run in for the status, which was over at the first look."""
        if self._history is not None:
            self._history.discard(run.run_id)

    def say_verdict(self, folder: RunFolder, run: ListedRun, verdict: Verdict) -> None:
        """Say where a run stands, which asks for nothing now."""
        text, again = f"run {run.run_id} is {verdict.value}", math.inf
        # Of a run that this supervisor has given up it has said so.
        about = (run.run_id, verdict) if verdict is Verdict.GIVEN_UP else None
        if verdict is Verdict.GIVEN_UP:
            text = f"run {run.run_id} was given up before: {run.details}"
        elif verdict is Verdict.DIVERGED:
            text = f"run {run.run_id} is not submitted again: {run.details}"
        elif verdict is Verdict.HELD:
            text = (
                f"run {run.run_id} failed, but process {folder.holder} holds its folder; "
                "waiting for its end"
            )
            again = REPEAT_SECONDS
        elif verdict is Verdict.WAITING:
            due = datetime.fromtimestamp(earliest(folder, run)).astimezone()
            text = (
                f"run {run.run_id} failed ({run.details}); to be submitted again after "
                f"{due.isoformat(' ', 'seconds')}, and not while another run starts"
            )
        urgent = verdict is Verdict.DIVERGED
        self.say_once(f"{folder.path}: {text}", about=about, again=again, urgent=urgent)

    def say_trouble(self, path: Path, error: OSError | ValueError) -> None:
        """Say that nothing can be done for a folder now."""
        # Not its text, which may hold the name of a temporary file.
        kind = getattr(error, "errno", None)
        about = (path, type(error), kind)
        self.say_once(f"{path}: waiting, it is tried again: {error}", about=about)

    def status(
        self,
        verdicts: Mapping[int, Verdict],
        listed: Mapping[int, ListedRun],
        lost: ListedRun | None,
    ) -> int | None:
        """Return the status to end with when nothing is going any more; None before.

        Args:
            verdicts: by the number of the run.
            listed: what Flower lists.
            lost: of `failed_without_folder`.
        """
        open_cases = {Verdict.GOING, Verdict.HELD, Verdict.WAITING, Verdict.RESUBMIT}
        going = any(not run.is_over for run in listed.values())
        if going or not open_cases.isdisjoint(verdicts.values()):
            return None
        present = listed.keys() - (self._history or set())
        ours = {verdict for run_id, verdict in verdicts.items() if run_id in present}
        is_lost = lost is not None and lost.run_id in present
        if not ours and not is_lost:
            log(f"no run of {self._runs} was going since the start; nothing to wait for")
            return 1
        done = ours == {Verdict.COMPLETED} and not is_lost
        log("all runs completed" if done else "no run is going, and not all completed")
        return 0 if done else 1

    def say_once(
        self,
        text: str,
        *,
        about: object = None,
        again: float = math.inf,
        urgent: bool = False,
    ) -> None:
        """Print a line, unless it was printed before.

        Args:
            text: the line.
            about: what it is about, where a line with other words may have said the same.
            again: seconds after which it is printed again.
            urgent: whether somebody is told as well, by `alert`, until that has worked once.
        """
        now, key = time.monotonic(), about or text
        if key not in self._said or now - self._said[key] >= again:
            self._said[key] = now
            log(text)
        untold = urgent and key not in self._told
        if untold and now - self._tried_at.get(key, -math.inf) >= REPEAT_SECONDS:
            self._tried_at[key] = now
            if alert(text):
                self._told.add(key)


def list_runs(connection: str) -> dict[int, ListedRun]:
    """Ask the SuperLink for its runs, by number.

    Raises:
        NoAnswer: it does not answer, or not as Flower does.
    """
    # Without a limit it lists the newest 20.
    arguments = ("list", connection, "--limit", str(MOST_RUNS))
    answer = flwr(*arguments, environment=local_environment())
    try:
        runs = [listed_run(run) for run in answer["runs"]]
    except (KeyError, TypeError, ValueError) as error:
        raise NoAnswer(f"`flwr list` gave a list that is none of Flower's: {error!r}") from error
    return {run.run_id: run for run in runs}


def listed_run(said: Mapping[str, str]) -> ListedRun:
    """Read what `flwr list` says of a run.

    Raises:
        KeyError, TypeError, ValueError: it is not what Flower says.
    """
    times = [
        datetime.fromisoformat(said[step]).timestamp()
        for step in ("pending-at", "starting-at", "running-at", "finished-at")
        if said[step] != "N/A"
    ]
    require(bool(times), "the times of a run", "there", said)
    return ListedRun(
        int(said["run-id"]), str(said["status"]), str(said["status-details"]), times[0], times[-1]
    )


@contextmanager
def submittable(folder: RunFolder) -> Iterator[tuple[Path, Path]]:
    """Yield the code that a run was started with, and a file with its words.

    Raises:
        NoAnswer: the code is not there any more.
        OSError: the disk does not allow it.
    """
    code = Path(folder.submission.app)
    if not (code / "pyproject.toml").is_file():
        raise NoAnswer(
            f"its code is not at {code}: keep the FLWR_HOME of the SuperLink's host, "
            "and let the supervisor see it under the same path"
        )
    found, started_with = fingerprint_of(code), folder.submission.fingerprint
    if found != started_with:
        raise NoAnswer(
            f"the code at {code} has the fingerprint {found}, and the run was started with "
            f"{started_with}: put that code back"
        )
    with tempfile.TemporaryDirectory(prefix="feddm-") as aside:
        words = Path(aside) / "run-config.toml"
        run_config = {**folder.submission.run_config, "resume": folder.begun}
        words.write_text(as_toml(run_config), encoding="utf-8")
        yield code, words


def submit(code: Path, words: Path, *, connection: str) -> int:
    """Submit a run.

    Args:
        code: folder of the app.
        words: TOML file with its run config.
        connection: name of the SuperLink's.

    Returns:
        The number of the new run.

    Raises:
        NoAnswer: the SuperLink does not take it.
    """
    arguments = ("run", str(code), connection, "--run-config", str(words))
    answer = flwr(*arguments, environment=local_environment())
    try:
        return int(answer["run-id"])
    except (KeyError, TypeError, ValueError) as error:
        raise NoAnswer(f"`flwr run` gave no number of a run: {answer}") from error
