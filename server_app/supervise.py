"""`feddm-supervise`: submit runs that failed again, beside a SuperLink, for as long as it helps."""

import fcntl
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Collection, Mapping
from dataclasses import replace
from pathlib import Path
from typing import IO, Annotated, Any

import typer

from server_app.log import log
from server_app.submission import SUBMISSION_FILE, as_toml
from server_app.supervision import (
    ListedRun,
    RunFolder,
    Verdict,
    attempt,
    failed_without_folder,
    fruitless,
    giving_up,
    is_unnamed_start,
    judge,
    read_folder,
    remember,
)
from task.config import require
from task.run_directory import HOW_TO_RESUME

LOCK_FILE = ".supervisor.lock"
# Flower's commands take seconds, and a minute on a machine that is out of breath.
COMMAND_TIMEOUT_SECONDS = 180.0
NAP_SECONDS = 0.2

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


class NoAnswer(Exception):
    """Flower's command did not do what it was asked to; the text says why."""


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
            exists=True,
            file_okay=False,
            resolve_path=True,
            help="The folder with the run directories, at any depth.",
            show_default=False,
        ),
    ],
    attempts: Annotated[
        int,
        typer.Option(
            min=1,
            max=100,
            help="Submissions in a row without a further complete round, then give up.",
        ),
    ] = 3,
    poll: Annotated[float, typer.Option(min=1, help="Seconds between two looks.")] = 10,
    until_done: Annotated[
        bool, typer.Option(help="End when no run is going: 0 if all completed, else 1.")
    ] = False,
) -> None:
    """Submit runs that failed again, with resume=true, until they complete.

    It runs on the SuperLink's host and reads its run directories. A run that a person stopped
    with `flwr stop` is left alone. It ends with status 1 when it gives a run up, and with 0 when
    it is asked to end (SIGTERM).
    """
    # Never in the midst of a submission.
    ending = [False]
    signal.signal(signal.SIGTERM, lambda *_: ending.__setitem__(0, True))
    try:
        lock = hold(runs / LOCK_FILE)
    except ValueError as error:
        typer.echo(f"feddm-supervise: {error}", err=True)
        raise typer.Exit(1) from error
    with lock:
        log(f"supervising the runs in {runs}")
        supervisor = Supervisor(connection, runs, attempts)
        while not ending[0]:
            status = supervisor.look(until_done=until_done)
            if status is not None:
                raise typer.Exit(status)
            deadline = time.monotonic() + poll
            while not ending[0] and time.monotonic() < deadline:
                time.sleep(NAP_SECONDS)
        log("asked to end; the runs go on without a supervisor")


class Supervisor:
    """The runs of one SuperLink whose directories lie in one folder."""

    def __init__(self, connection: str, runs: Path, attempts: int) -> None:
        """Nothing is asked of the SuperLink yet; see `supervise` for the arguments."""
        self._connection = connection
        self._runs = runs
        self._attempts = attempts
        self._answered = True
        self._said: set[tuple[object, ...]] = set()

    def look(self, *, until_done: bool = False) -> int | None:
        """Look once at what Flower lists and at the folders, and do what is to be done.

        Returns:
            The status to end with; None to go on.
        """
        # The folders first: what is listed then is at least as new as what they say.
        folders = self.read_folders()
        try:
            listed = list_runs(self._connection)
        except NoAnswer as reason:
            if self._answered:
                log(f"no answer from the SuperLink, waiting for it: {reason}")
            self._answered = False
            return None
        if not self._answered:
            log("the SuperLink answers again")
        self._answered = True
        self.say_what_has_no_folder(listed, folders)
        verdicts = [self.handle(folder, listed, folders) for folder in folders]
        if Verdict.HOPELESS in verdicts:
            return 1
        return self.status(verdicts, listed, folders) if until_done else None

    def read_folders(self) -> list[RunFolder]:
        """Read every run directory that names its run, and say which cannot be read."""
        folders = []
        for file in sorted(self._runs.rglob(SUBMISSION_FILE)):
            try:
                folders.append(read_folder(file.parent))
            except ValueError as error:
                self.say_once(f"left alone: {error}", file)
        return folders

    def handle(
        self, folder: RunFolder, listed: Mapping[int, ListedRun], folders: Collection[RunFolder]
    ) -> Verdict:
        """Judge a run and do what it asks for."""
        starting = any(is_unnamed_start(run, folders) for run in listed.values())
        now = time.time()
        verdict = judge(folder, listed, attempts=self._attempts, starting=starting, now=now)
        run = listed.get(folder.run_id)
        why = run.details if run is not None else ""
        match verdict:
            case Verdict.RESUBMIT:
                self.submit_again(folder, why, now=now)
            case Verdict.HOPELESS:
                remember(folder.path, giving_up(folder))
                log(
                    f"GIVING UP {folder.path} after {fruitless(folder)} attempts without a further "
                    f"complete round; complete: {folder.last_round}; run {folder.run_id} failed: "
                    f"{why}. Remove the cause; then {HOW_TO_RESUME}"
                )
            case Verdict.GIVEN_UP:
                self.say_once(f"given up before: {folder.path}: {why}", folder.run_id, verdict)
            case Verdict.HELD:
                self.say_once(
                    f"{folder.path}: run {folder.run_id} failed, but process {folder.holder} "
                    "holds its folder; waiting for its end",
                    folder.run_id,
                    verdict,
                )
            case Verdict.COMPLETED | Verdict.STOPPED | Verdict.GOING:
                self.say_once(
                    f"{folder.path}: run {folder.run_id} is {verdict.value}",
                    folder.run_id,
                    verdict,
                )
        return verdict

    def submit_again(self, folder: RunFolder, why: str, *, now: float) -> None:
        """Submit a run once more, and remember the attempt whatever becomes of it."""
        this_attempt = attempt(folder, now=now)
        log(
            f"{folder.path}: run {folder.run_id} failed ({why}) after round {folder.last_round}; "
            f"submitting it again, attempt {this_attempt.attempts} of {self._attempts}"
        )
        # Before, so that a crash in between cannot make attempts endless.
        remember(folder.path, this_attempt)
        try:
            run_id = submit(folder, self._connection)
        except NoAnswer as reason:
            log(f"{folder.path}: could not be submitted: {reason}")
            return
        remember(folder.path, replace(this_attempt, run_id=run_id))
        log(f"{folder.path}: goes on as run {run_id}")

    def say_what_has_no_folder(
        self, listed: Mapping[int, ListedRun], folders: Collection[RunFolder]
    ) -> None:
        """Say of the newest run that it failed before it had a folder, if it did."""
        run = failed_without_folder(listed, folders)
        if run is not None:
            self.say_once(
                f"run {run.run_id} failed and has no folder below {self._runs}, so it is not "
                f"submitted again: {run.details}",
                run.run_id,
            )

    def status(
        self,
        verdicts: Collection[Verdict],
        listed: Mapping[int, ListedRun],
        folders: Collection[RunFolder],
    ) -> int | None:
        """Return the status to end with when nothing is going any more; None before.

        Without any run it is 1: who waits for runs expects one.
        """
        going = any(not run.status.startswith("finished") for run in listed.values())
        open_cases = {Verdict.GOING, Verdict.HELD, Verdict.WAITING, Verdict.RESUBMIT}
        if going or not open_cases.isdisjoint(verdicts):
            return None
        ours = [verdict for verdict in verdicts if verdict is not Verdict.FOREIGN]
        completed = bool(ours) and all(verdict is Verdict.COMPLETED for verdict in ours)
        done = completed and failed_without_folder(listed, folders) is None
        log("all runs completed" if done else "no run is going, and not all completed")
        return 0 if done else 1

    def say_once(self, text: str, *about: object) -> None:
        """Print a line, unless it was printed before about the same."""
        if about not in self._said:
            self._said.add(about)
            log(text)


def hold(path: Path) -> IO[str]:
    """Lock a file until it is closed.

    Raises:
        ValueError: another process holds it.
    """
    file = path.open("a+", encoding="utf-8")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        file.seek(0)
        owner = file.read().strip()
        file.close()
        raise ValueError(
            f"--runs: {path.parent} has a supervisor already, process {owner}; end it first"
        ) from error
    file.truncate(0)
    file.write(str(os.getpid()))
    file.flush()
    return file


def list_runs(connection: str) -> dict[int, ListedRun]:
    """Ask the SuperLink for its runs, by number.

    Raises:
        NoAnswer: it does not answer.
    """
    answer = flwr("list", connection)
    runs = [
        ListedRun(int(run["run-id"]), run["status"], run["status-details"], run["pending-at"])
        for run in answer["runs"]
    ]
    return {run.run_id: run for run in runs}


def submit(folder: RunFolder, connection: str) -> int:
    """Submit a run with the words and the code that it was started with.

    Returns:
        The number of the new run.

    Raises:
        NoAnswer: the code is not there, or the SuperLink does not take the run.
    """
    code = Path(folder.submission.app)
    if not (code / "pyproject.toml").is_file():
        raise NoAnswer(
            f"its code is not at {code}: keep the FLWR_HOME of the SuperLink's host, "
            "and let the supervisor see it under the same path"
        )
    with tempfile.TemporaryDirectory(prefix="feddm-") as aside:
        words = Path(aside) / "run-config.toml"
        run_config = {**folder.submission.run_config, "resume": folder.begun}
        words.write_text(as_toml(run_config), encoding="utf-8")
        answer = flwr("run", str(code), connection, "--run-config", str(words))
    return int(answer["run-id"])


def flwr(*arguments: str) -> dict[str, Any]:
    """Run a command of Flower and return its answer.

    Raises:
        NoAnswer: it failed.
    """
    # That of this environment comes first, whatever the shell has found.
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}"
    command = [shutil.which("flwr", path=path) or "flwr", *arguments, "--format", "json"]
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, check=False, timeout=COMMAND_TIMEOUT_SECONDS
        )
        answer: dict[str, Any] = json.loads(done.stdout)
    except subprocess.TimeoutExpired as error:
        raise NoAnswer(f"`flwr {arguments[0]}` took over {COMMAND_TIMEOUT_SECONDS:g} s") from error
    except ValueError as error:
        said = " ".join(f"{done.stdout} {done.stderr}".split())
        raise NoAnswer(f"`flwr {arguments[0]}` said: {said[-500:]}") from error
    require(isinstance(answer, dict), f"the answer of `flwr {arguments[0]}`", "an object", answer)
    # Flower ends with status 0 and says here that it failed.
    if not answer.get("success"):
        raise NoAnswer(" ".join(str(answer.get("error-message", answer)).split()))
    return answer
