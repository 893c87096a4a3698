"""What the supervisor decides, as functions of data, and what it does, with real processes."""

import json
import os
import signal
import subprocess
import tomllib
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from server_app.submission import (
    SUBMISSION_FILE,
    Submission,
    as_toml,
    read_submission,
    settled_words,
    write_submission,
)
from server_app.superlink import free_port
from server_app.supervise import Supervisor
from server_app.supervision import (
    LONGEST_PAUSE,
    SUPERVISION_FILE,
    ListedRun,
    RunFolder,
    Supervision,
    Verdict,
    attempt,
    earliest,
    failed_without_folder,
    giving_up,
    is_unnamed_start,
    judge,
    read_folder,
    remember,
)
from task.config import anchored, load_config, load_run_config
from task.fingerprint import ROOT, code_fingerprint
from task.run_directory import RunDirectory
from tests.processes import COMMANDS, process, wait_for

FAILED = "finished:failed"


def folder(**values: Any) -> RunFolder:
    submission = Submission(run_id=1, app="/app", fingerprint="f", run_config={})
    defaults: dict[str, Any] = {"supervision": None, "last_round": 4, "begun": True, "holder": None}
    return RunFolder(Path("/runs/night"), submission, **{**defaults, **values})


def listed(**statuses: str) -> dict[int, ListedRun]:
    """Runs by status, `r1="running"`, submitted in this order."""
    return {
        int(name[1:]): ListedRun(int(name[1:]), status, "why", f"2026-01-0{day} 00:00:00Z")
        for day, (name, status) in enumerate(statuses.items(), start=1)
    }


def verdict(folder: RunFolder, runs: dict[int, ListedRun], **values: Any) -> Verdict:
    return judge(folder, runs, **{"attempts": 3, "starting": False, "now": 1e6, **values})


TRIED = Supervision(instead_of=1, run_id=2, attempts=2, since_round=4, submitted_at=1000.0)


@pytest.mark.parametrize(
    ("status", "expected"),
    [
        ("pending", Verdict.GOING),
        ("starting", Verdict.GOING),
        ("running", Verdict.GOING),
        ("finished:completed", Verdict.COMPLETED),
        ("finished:stopped", Verdict.STOPPED),
        (FAILED, Verdict.RESUBMIT),
    ],
)
def test_every_status_of_flower_has_its_verdict(status: str, expected: Verdict) -> None:
    assert verdict(folder(), listed(r1=status)) is expected
    # A run that was submitted for it is judged in its place, before it has taken the folder.
    assert verdict(folder(supervision=TRIED), listed(r1=FAILED, r2=status)) is expected


def test_unknown_status_is_an_error_and_not_a_guess() -> None:
    with pytest.raises(ValueError, match="the status of a run must be known to feddm, got 'lost'"):
        verdict(folder(), listed(r1="lost"))


def test_run_of_another_superlink_is_left_alone() -> None:
    assert verdict(folder(), listed(r7=FAILED)) is Verdict.FOREIGN
    assert verdict(folder(supervision=TRIED), listed(r1=FAILED)) is Verdict.FOREIGN


def test_folder_that_a_process_holds_is_never_submitted_for() -> None:
    for supervision in (None, TRIED, replace(TRIED, attempts=3)):
        held = folder(supervision=supervision, holder="4711")
        assert verdict(held, listed(r1=FAILED, r2=FAILED)) is Verdict.HELD


def test_nothing_is_submitted_while_a_run_starts_whose_folder_is_unknown() -> None:
    runs = listed(r1=FAILED, r9="starting")
    assert is_unnamed_start(runs[9], [folder()])
    assert not is_unnamed_start(replace(runs[9], status="running"), [folder()])
    assert not is_unnamed_start(listed(r1="pending")[1], [folder()])
    assert verdict(folder(), runs, starting=True) is Verdict.WAITING


def test_attempts_without_a_further_round_end_in_giving_up() -> None:
    """Plays failures without progress, as the supervisor would see them."""
    seen, run_id, now = folder(), 1, 0.0
    submitted = 0
    while verdict(seen, listed(**{f"r{run_id}": FAILED}), now=now) is not Verdict.HOPELESS:
        assert verdict(seen, listed(**{f"r{run_id}": FAILED}), now=now) is Verdict.RESUBMIT
        submitted, run_id = submitted + 1, run_id + 1
        done = replace(attempt(seen, now=now), run_id=run_id)
        # Every other one gets as far as its folder.
        named = replace(seen.submission, run_id=run_id if submitted % 2 else seen.run_id)
        seen = replace(seen, supervision=done, submission=named)
        assert seen.run_id == run_id
        now += LONGEST_PAUSE
    assert submitted == 3
    given_up = replace(seen, supervision=giving_up(seen))
    assert verdict(given_up, listed(**{f"r{run_id}": FAILED}), now=now) is Verdict.GIVEN_UP


def test_further_round_makes_attempts_count_anew() -> None:
    stuck = folder(supervision=replace(TRIED, attempts=3))
    assert verdict(stuck, listed(r2=FAILED)) is Verdict.HOPELESS
    further = replace(stuck, last_round=5)
    assert verdict(further, listed(r2=FAILED), now=0.0) is Verdict.RESUBMIT
    assert attempt(further, now=7.0) == Supervision(1, 2, 1, 5, 7.0)


def test_run_that_a_person_resumed_counts_anew_even_when_it_was_given_up() -> None:
    given_up = folder(supervision=replace(TRIED, attempts=3, given_up=True))
    assert verdict(given_up, listed(r2=FAILED)) is Verdict.GIVEN_UP
    by_hand = replace(given_up, submission=replace(given_up.submission, run_id=5))
    assert by_hand.run_id == 5
    assert verdict(by_hand, listed(r2=FAILED, r5="running")) is Verdict.GOING
    assert verdict(by_hand, listed(r2=FAILED, r5=FAILED), now=0.0) is Verdict.RESUBMIT


def test_pauses_grow_between_fruitless_attempts_and_end_at_a_quarter_of_an_hour() -> None:
    pauses = [
        earliest(folder(supervision=replace(TRIED, attempts=n))) - TRIED.submitted_at
        for n in (1, 2, 3, 20, 100)
    ]
    assert pauses == [30, 60, 120, 900, 900]
    waiting = folder(supervision=TRIED)
    assert verdict(waiting, listed(r2=FAILED), now=1059.9) is Verdict.WAITING
    assert verdict(waiting, listed(r2=FAILED), now=1060.1) is Verdict.RESUBMIT


def test_giving_up_without_an_attempt_is_an_error() -> None:
    with pytest.raises(ValueError, match="there were none"):
        giving_up(folder())


def test_only_the_newest_run_counts_as_one_that_failed_without_a_folder() -> None:
    assert failed_without_folder({}, []) is None
    assert failed_without_folder(listed(r7=FAILED, r1=FAILED), [folder()]) is None
    assert failed_without_folder(listed(r1=FAILED, r7="running"), [folder()]) is None
    newest = failed_without_folder(listed(r1=FAILED, r7=FAILED), [folder()])
    assert newest is not None and newest.run_id == 7


def test_words_name_the_very_folder_and_leave_resume_to_the_supervisor() -> None:
    given = {
        "experiment": "demo",
        "seed": "",
        "run_name": "",
        "resume": True,
        "federation.rounds": 3,
        "overrides": "run_name='${experiment}-${now:%H}' data=mnist '+data.root=/a b' resume=true",
    }
    words = settled_words(given, Path("/runs/demo-20"))
    assert words == {
        "experiment": "demo",
        "federation.rounds": 3,
        "overrides": "data=mnist '+data.root=/a b'",
        "output_dir": "/runs",
        "run_name": "demo-20",
    }
    assert settled_words(words, Path("/runs/demo-20")) == words


def test_words_survive_toml_and_give_the_same_configuration() -> None:
    words: dict[str, str | int | float | bool] = {
        "output_dir": 'C:\\a "b" \n 数\U0001f600',
        "run_name": "night",
        "resume": True,
        "federation.rounds": 3,
        "train.lr": 1e-05,
        "partition.beta": float("inf"),
        "overrides": "data=mnist data.classes=[a,b]",
    }

    def flat(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
        found: dict[str, Any] = {}
        for key, value in tree.items():
            nested = isinstance(value, dict)
            found |= flat(value, f"{prefix}{key}.") if nested else {prefix + key: value}
        return found

    read = flat(tomllib.loads(as_toml(words)))
    assert read == words and {k: type(v) for k, v in read.items()} == {
        k: type(v) for k, v in words.items()
    }
    assert load_run_config(read) == load_run_config(words)


def test_submission_reads_back_and_the_folder_says_what_lies_in_it(tmp_path: Path) -> None:
    config = anchored(load_config([f"output_dir={tmp_path}", "run_name=night"]), tmp_path)
    directory = RunDirectory(config)
    submission = write_submission(directory, 2**63 + 1, {"run_name": "", "seed": 1})
    assert submission == read_submission(directory.path / SUBMISSION_FILE)
    assert (submission.app, submission.fingerprint) == (str(ROOT), code_fingerprint())
    held = read_folder(directory.path)
    assert (held.holder, held.begun, held.last_round) == (str(os.getpid()), False, 0)
    directory.write_config(config)
    directory.close()
    remember(directory.path, TRIED)
    free = read_folder(directory.path)
    assert (free.holder, free.begun, free.supervision) == (None, True, TRIED)


@pytest.mark.parametrize("content", ["{", "[]", '{"run_id": 1}', '{"run_id": "1", "app": 1}'])
def test_damaged_files_are_named(tmp_path: Path, content: str) -> None:
    (tmp_path / SUBMISSION_FILE).write_text(content)
    with pytest.raises(ValueError, match=r"submission\.json must be a submission of this feddm"):
        read_folder(tmp_path)
    (tmp_path / SUBMISSION_FILE).write_text(json.dumps(vars(folder().submission)))
    (tmp_path / SUPERVISION_FILE).write_text(content)
    with pytest.raises(ValueError, match=r"supervision\.json must be of this feddm's supervisor"):
        read_folder(tmp_path)


def test_giving_up_is_loud_and_remembered_by_the_next_supervisor(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "night"
    path.mkdir()
    gone = replace(folder().submission, app=str(tmp_path / "gone"))
    (path / SUBMISSION_FILE).write_text(json.dumps(vars(gone)))
    runs = listed(r1=FAILED)
    expected = [Verdict.RESUBMIT, Verdict.HOPELESS, Verdict.GIVEN_UP]
    for verdict_now in expected:
        supervisor = Supervisor("night", tmp_path, attempts=1)
        folders = supervisor.read_folders()
        assert [supervisor.handle(found, runs, folders) for found in folders] == [verdict_now]
    assert supervisor.status([Verdict.GIVEN_UP], runs, folders) == 1
    said = capsys.readouterr().out
    assert f"could not be submitted: its code is not at {gone.app}" in said
    assert f"GIVING UP {path} after 1 attempts without a further complete round" in said
    assert f"given up before: {path}: why" in said
    completed = listed(r1="finished:completed")
    assert supervisor.status([Verdict.COMPLETED], completed, folders) == 0
    assert supervisor.status([Verdict.GOING], listed(r1="running"), folders) is None
    assert supervisor.status([Verdict.STOPPED], listed(r1="finished:stopped"), folders) == 1


def home(tmp_path: Path, port: int) -> dict[str, str]:
    """Write Flower's configuration of a SuperLink named "night"; returns the environment."""
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "config.toml").write_text(
        f'[superlink.night]\naddress = "127.0.0.1:{port}"\ninsecure = true\n'
    )
    return {
        **os.environ,
        "FLWR_HOME": str(tmp_path / "home"),
        "PATH": f"{COMMANDS}{os.pathsep}{os.environ['PATH']}",
    }


def test_supervisor_waits_for_its_superlink_is_alone_and_ends_when_asked(tmp_path: Path) -> None:
    env = home(tmp_path, free_port())
    (tmp_path / "runs").mkdir()
    command: list[str | Path] = [COMMANDS / "feddm-supervise", "night", "--runs", tmp_path / "runs"]
    log = tmp_path / "log"
    with process(command, log=log, cwd=tmp_path, env=env) as started:
        wait_for(lambda: "no answer from the SuperLink" in log.read_text(), seconds=120, what="it")
        second = subprocess.run(
            command, env=env, capture_output=True, text=True, timeout=120, check=False
        )
        assert second.returncode == 1
        assert f"has a supervisor already, process {started.pid}; end it first" in second.stderr
        started.send_signal(signal.SIGTERM)
        assert started.wait(60) == 0
    assert log.read_text().count("no answer") == 1
