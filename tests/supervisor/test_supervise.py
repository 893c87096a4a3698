"""What the supervisor decides, as functions of data, and what it does, with real processes."""

import json
import os
import resource
import signal
import subprocess
import threading
import tomllib
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest

from server_app.launch.superlink import free_port
from server_app.supervisor import supervise
from server_app.supervisor.alerts import alert
from server_app.supervisor.decisions import (
    ATTEMPTS,
    LONGEST_PAUSE,
    NAMING_SECONDS,
    SUPERVISION_FILE,
    ListedRun,
    RunFolder,
    Supervision,
    Verdict,
    all_pauses,
    attempt,
    failed_without_folder,
    giving_up,
    is_unnamed_start,
    judge,
    pause_after,
    read_folder,
    remember,
)
from server_app.supervisor.last_listed import FORGOTTEN, LAST_LISTED_FILE
from server_app.supervisor.submission import (
    Submission,
    read_as,
    settled_words,
    write_submission,
)
from server_app.supervisor.supervise import Supervisor
from task.code_version import ROOT, code_fingerprint
from task.config import anchored, load_config, load_run_config
from task.lock import hold
from task.runs.commands import as_toml
from task.runs.layout import DIVERGED, SUBMISSION_FILE
from task.runs.writer import RunWriter
from tests.processes import COMMANDS, process, wait_for

FAILED = "finished:failed"


def folder(**values: Any) -> RunFolder:
    submission = Submission(run_id=1, app="/app", fingerprint="f", run_config={})
    defaults: dict[str, Any] = {"supervision": None, "last_round": 4, "begun": True, "holder": None}
    return RunFolder(Path("/runs/night"), submission, **{**defaults, **values})


def listed(**statuses: str) -> dict[int, ListedRun]:
    """Runs by status, `r1="running"`, submitted in this order."""
    return {
        int(name[1:]): ListedRun(int(name[1:]), status, "why", float(second), float(second))
        for second, (name, status) in enumerate(statuses.items())
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
    assert is_unnamed_start(runs[9], [folder()], now=1e6)
    # Its process may have begun, and not have come to its folder yet.
    running = replace(runs[9], status="running", changed_at=1e6)
    assert is_unnamed_start(running, [folder()], now=1e6 + NAMING_SECONDS - 1)
    assert not is_unnamed_start(running, [folder()], now=1e6 + NAMING_SECONDS)
    assert not is_unnamed_start(listed(r1="pending")[1], [folder()], now=1e6)
    assert not is_unnamed_start(listed(r1="running")[1], [folder()], now=1.0)
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
    assert verdict(by_hand, listed(r2=FAILED, r5=FAILED), now=1.0) is Verdict.RESUBMIT


def test_pauses_grow_up_to_an_hour_and_outlast_a_night() -> None:
    assert [pause_after(n) for n in (1, 2, 3, 20, 100)] == [30, 60, 120, 3600, 3600]
    assert all_pauses(1) == 0 and all_pauses(4) == 210
    assert 6 < all_pauses(ATTEMPTS) / 3600 < 12


def test_pause_counts_from_the_failure_and_not_from_the_submission() -> None:
    waiting = folder(supervision=TRIED)
    (failed,) = listed(r2=FAILED).values()
    # The attempt ran for an hour before it failed.
    late = {2: replace(failed, changed_at=4600.0)}
    assert verdict(waiting, late, now=4659.9) is Verdict.WAITING
    assert verdict(waiting, late, now=4660.1) is Verdict.RESUBMIT
    # The submission was not taken: what is listed failed before it.
    early = {2: replace(failed, changed_at=900.0)}
    assert verdict(waiting, early, now=1059.9) is Verdict.WAITING
    assert verdict(waiting, early, now=1060.1) is Verdict.RESUBMIT


def test_run_that_diverged_is_not_submitted_again(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    on_disk(tmp_path / "night")
    (failed,) = listed(r1=FAILED).values()

    def handle(reason: str) -> list[Verdict]:
        details = f"ServerApp failed with exception: {reason}"
        return handled(Supervisor("night", tmp_path, 1), {1: replace(failed, details=details)})

    assert handle(f"{DIVERGED} in round 3 (why); start anew") == [Verdict.DIVERGED]
    assert "night: run 1 is not submitted again: ServerApp failed" in capsys.readouterr().out
    # A node's words, which stand within an error, decide nothing.
    assert handle(f"round 3: 0 replies (client 1: {DIVERGED} in round 3)") == [Verdict.RESUBMIT]


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
    # Flower knows a dozen words; the others are overrides.
    overrides = f"train.lr=1e-05 {words['overrides']}"
    expected = {**words, "overrides": overrides}
    del expected["train.lr"]
    assert read == expected
    assert {k: type(v) for k, v in read.items()} == {k: type(v) for k, v in expected.items()}
    assert load_run_config(read) == load_run_config(words)


def test_submission_reads_back_and_the_folder_says_what_lies_in_it(tmp_path: Path) -> None:
    config = anchored(load_config([f"output_dir={tmp_path}", "run_name=night"]), tmp_path)
    directory = RunWriter(config)
    submission = write_submission(directory, 2**63 + 1, {"run_name": "", "seed": 1})
    assert submission == read_as(Submission, directory.path / SUBMISSION_FILE)
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
    with pytest.raises(ValueError, match=r"supervision\.json must be a supervision of this feddm"):
        read_folder(tmp_path)


def on_disk(path: Path, **values: Any) -> RunFolder:
    """Write the submission of a run into a new folder."""
    path.mkdir()
    submission = replace(folder().submission, **values)
    (path / SUBMISSION_FILE).write_text(json.dumps(vars(submission)))
    return read_folder(path)


def handled(supervisor: Supervisor, runs: dict[int, ListedRun]) -> list[Verdict]:
    folders, _ = supervisor.read_folders()
    return [supervisor.handle(found, runs, folders) for found in folders]


def test_giving_up_is_loud_and_remembered_by_the_next_supervisor(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path, gone = tmp_path / "night", tmp_path / "gone"
    on_disk(path, app=str(gone))
    on_disk(tmp_path / "other", run_id=7)
    runs = listed(r1=FAILED, r7="running")
    for expected in (Verdict.RESUBMIT, Verdict.HOPELESS, Verdict.GIVEN_UP):
        supervisor = Supervisor("night", tmp_path, attempts=1)
        # The other run is supervised all the same.
        assert handled(supervisor, runs) == [expected, Verdict.GOING]
    said = capsys.readouterr().out
    assert f"could not be submitted: its code is not at {gone}" in said
    assert f"GIVING UP {path} after 1 attempts without a further complete round" in said
    assert f"then, in {gone}:\ncat > words.toml" in said
    assert "\nflwr run . night --run-config words.toml\n" in said
    assert f"{path}: run 1 was given up before: why" in said


def test_status_is_that_of_the_runs_that_were_going_or_were_submitted_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    on_disk(tmp_path / "old", run_id=1)
    on_disk(tmp_path / "new", run_id=2)
    old = {"r1": "finished:stopped"}

    def statuses(*answers: dict[str, str]) -> list[int | None]:
        (tmp_path / LAST_LISTED_FILE).unlink(missing_ok=True)  # another night
        supervisor = Supervisor("night", tmp_path, attempts=1)
        found = []
        for answer in answers:
            monkeypatch.setattr(supervise, "list_runs", lambda _, a=answer: listed(**a))
            found.append(supervisor.look(until_done=True))
        return found

    going = {**old, "r2": "running"}
    assert statuses(going, {**old, "r2": "finished:completed"}) == [None, 0]
    assert statuses(going, {**old, "r2": "finished:stopped"}) == [None, 1]
    assert statuses(going, {**old, "r2": "finished:completed", "r9": FAILED}) == [None, 1]
    assert statuses({**old, "r2": "finished:completed"}) == [1]
    assert "was going since the start; nothing to wait for" in capsys.readouterr().out
    # What failed before is submitted again, in vain here, and then given up.
    assert statuses({**old, "r2": FAILED}, {**old, "r2": FAILED}) == [None, 1]
    assert "GIVING UP" in capsys.readouterr().out


def test_run_that_a_new_database_has_forgotten_is_submitted_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for number, name in enumerate(("going", "stopped", "done", "diverged", "unknown"), start=1):
        on_disk(tmp_path / name, run_id=number, app=str(tmp_path / "gone"))
    before = listed(r1="running", r2="finished:stopped", r3="finished:completed", r4=FAILED)
    before[4] = replace(before[4], details=f"failed: {DIVERGED}")

    def look(supervisor: Supervisor, runs: dict[int, ListedRun]) -> str:
        monkeypatch.setattr(supervise, "list_runs", lambda _: dict(runs))
        supervisor.look()
        return capsys.readouterr().out

    look(Supervisor("night", tmp_path, attempts=2), before)
    # Another process finds another database.
    again = Supervisor("night", tmp_path, attempts=2)
    said = look(again, {})
    assert f"{tmp_path / 'going'}: run 1 failed ({FORGOTTEN}) after round" in said
    assert "feddm-hospitals restore night" in said
    assert f"{tmp_path / 'stopped'}: run 2 is stopped by a person" in said
    assert f"{tmp_path / 'done'}: run 3 is completed" in said
    assert "run 4 is not submitted again" in said
    assert f"{tmp_path / 'unknown'}: left alone, this SuperLink does not list its run 5" in said
    assert "to be submitted again after" in look(again, {}) and look(again, {}) == ""
    # A back-up of before knows one that was stopped as going, and Flower soon as failed.
    for status in ("running", FAILED):
        older = listed(r2=status)
        flwr = Mock()
        monkeypatch.setattr(supervise, "flwr", flwr)
        said = look(Supervisor("night", tmp_path, attempts=2), older)
        assert "run 2 was finished:stopped, and stays so" in said
        stopped = [call.args for call in flwr.call_args_list]
        assert stopped == [("stop", "2", "night")] * (status == "running")
    kept = tmp_path / LAST_LISTED_FILE
    kept.write_text(kept.read_text()[:-9])
    said = look(Supervisor("night", tmp_path, attempts=2), {})
    assert f"{kept} is not what feddm-supervise writes" in said and "remove it" in said


def test_run_of_other_code_is_not_submitted(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    on_disk(tmp_path / "night", app=str(ROOT), fingerprint="0" * 16)
    handled(Supervisor("night", tmp_path, attempts=3), listed(r1=FAILED))
    said = capsys.readouterr().out
    assert (
        f"has the fingerprint {code_fingerprint()}, and the run was started with {'0' * 16}" in said
    )


def test_unwritable_disk_waits_and_counts_no_attempt(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    found = on_disk(tmp_path / "night", app=str(ROOT), fingerprint=code_fingerprint())
    supervisor = Supervisor("night", tmp_path, attempts=1)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, limits[1]))
    try:
        assert [handled(supervisor, listed(r1=FAILED)) for _ in range(2)] == [[Verdict.WAITING]] * 2
        stuck = replace(found, supervision=replace(TRIED, instead_of=1, attempts=3))
        assert supervisor.handle(stuck, listed(r2=FAILED), [stuck]) is Verdict.WAITING
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert read_folder(found.path).supervision is None
    assert [file.name for file in found.path.iterdir()] == [SUBMISSION_FILE]
    assert capsys.readouterr().out.count("waiting, it is tried again: [Errno 27]") == 1


def test_folder_that_moved_or_cannot_be_read_waits(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    moved = on_disk(tmp_path / "moved", app=str(tmp_path / "gone"))
    (tmp_path / "broken" / SUBMISSION_FILE).mkdir(parents=True)
    supervisor = Supervisor("night", tmp_path, attempts=3)
    folders, all_read = supervisor.read_folders()
    assert folders == [moved] and not all_read
    moved.path.rename(tmp_path / "elsewhere")
    assert supervisor.handle(moved, listed(r1=FAILED), folders) is Verdict.WAITING
    said = capsys.readouterr().out
    assert said.count(f"{tmp_path / 'broken'}: waiting") == 1
    assert said.count(f"{moved.path}: waiting") == 1


def test_each_wait_is_said_once_and_a_held_folder_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = on_disk(tmp_path / "night", app=str(tmp_path / "gone")).path
    supervisor = Supervisor("night", tmp_path, attempts=3)
    for _ in range(3):
        handled(supervisor, listed(r1=FAILED))
        handled(supervisor, listed(r7=FAILED))
    said = capsys.readouterr().out
    assert said.count("could not be submitted") == said.count("to be submitted again after") == 1
    assert said.count(f"{path}: left alone, this SuperLink does not list its run 1") == 1
    with hold(path / ".lock", "run_name", patience=0.0):
        for _ in range(2):
            assert handled(supervisor, listed(r1=FAILED)) == [Verdict.HELD]
        assert capsys.readouterr().out.count("holds its folder") == 1
        monkeypatch.setattr(supervise, "REPEAT_SECONDS", 0.0)
        handled(supervisor, listed(r1=FAILED))
        assert capsys.readouterr().out.count("holds its folder") == 1


def test_what_needs_a_hand_is_said_and_told_until_that_has_worked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    told, script = tmp_path / "told.txt", tmp_path / "alert.sh"
    script.write_text(f"#!/bin/sh\ncat >> '{told}'\n")
    monkeypatch.setenv("FEDDM_ALERT", f"{script} --secret=hunter2")
    monkeypatch.setattr(supervise, "REPEAT_SECONDS", 0.0)
    (runs := tmp_path / "runs").mkdir()
    database = tmp_path / "superlink.db"
    database.write_bytes(b"")
    database.with_name("superlink.db-wal").write_bytes(b"\0" * 2000)
    supervisor = Supervisor("night", runs, attempts=3, database=database, max_database=1e-6)
    # Pending since long before this supervisor: the SuperLink may just have been started again.
    pending = {1: replace(listed(r1="pending")[1], changed_at=1.0)}
    monkeypatch.setattr(supervise, "list_runs", lambda connection: pending)
    supervisor.look()
    said = capsys.readouterr().out
    assert "pending" not in said and "more than --max-database=1e-06" in said
    # Nobody could be told, and what it was to be told by is not written down.
    assert "FEDDM_ALERT" in said and "did not take the message: PermissionError" in said
    assert "hunter2" not in said
    script.chmod(0o700)
    monkeypatch.setattr(supervise, "STUCK_SECONDS", -1.0)
    for _ in range(3):
        supervisor.look()
    said = capsys.readouterr().out
    assert said.count("run 1 has been pending for more than") == 3  # said again
    lines = told.read_text().splitlines()
    assert len(lines) == 2 and "superlink.db has" in " ".join(lines)
    script.write_text("#!/bin/sh\nexit 3\n")

    def silent(connection: str) -> dict[int, ListedRun]:
        raise supervise.NoAnswer("nobody is there")

    monkeypatch.setattr(supervise, "list_runs", silent)
    supervisor.look()
    said = capsys.readouterr().out
    assert "no answer from the SuperLink, waiting for it" in said
    assert "has not answered for" in said and "did not take the message: status 3" in said


def test_alert_is_posted_to_an_address_which_no_log_names(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    took: list[bytes] = []

    class Hook(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            took.append(self.rfile.read(int(self.headers["Content-Length"])))
            statuses = {"/token-4711": 200, "/moved": 302}
            self.send_response(statuses.get(self.path, 404))
            self.send_header("Location", "/token-4711")
            self.end_headers()

        def log_message(self, *_: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Hook) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        address = f"http://127.0.0.1:{server.server_port}"
        monkeypatch.setenv("FEDDM_ALERT", f"{address}/token-4711")
        assert alert("run 1 diverged: \u03b5")
        assert took == ["run 1 diverged: \u03b5\n".encode()]
        for elsewhere in ("token-4712", "moved"):
            monkeypatch.setenv("FEDDM_ALERT", f"{address}/{elsewhere}")
            assert not alert("again")
        server.shutdown()
    assert not alert("nobody is there")
    said = capsys.readouterr().out
    assert "did not take the message: 404" in said and "URLError" in said
    assert "token" not in said


def test_what_is_no_answer_of_flower_is_said_to_be_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = {"run-id": "7", "status": "running", "status-details": "N/A", "finished-at": "N/A"}
    run |= dict.fromkeys(["pending-at", "starting-at"], "1970-01-01 00:00:05Z")
    run |= {"running-at": "1970-01-01 00:01:00Z"}
    command = tmp_path / "flwr"
    monkeypatch.setattr("sys.executable", str(tmp_path / "python"))

    def answered(answer: object) -> dict[int, ListedRun]:
        command.write_text(f"#!/bin/sh\ncat <<'END'\n{json.dumps(answer)}\nEND\n")
        command.chmod(0o755)
        return supervise.list_runs("night")

    assert answered({"success": True, "runs": [run]}) == {
        7: ListedRun(7, "running", "N/A", 5.0, 60.0)
    }
    for runs in (None, [{}], ["7"], [{**run, "run-id": "x"}], [{**run, "running-at": "noon"}]):
        with pytest.raises(supervise.NoAnswer, match="a list that is none of Flower's"):
            answered({"success": True, "runs": runs})
    for answer in ([], {"success": False, "error-message": "away"}):
        with pytest.raises(supervise.NoAnswer):
            answered(answer)
    with pytest.raises(supervise.NoAnswer, match="gave no number of a run"):
        command.write_text("#!/bin/sh\necho '{\"success\": true}'\n")
        supervise.submit(tmp_path, tmp_path, connection="night")


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
    # Flower takes a connection for a path where an app lies in a folder of that name.
    (tmp_path / "night").mkdir()
    (tmp_path / "night" / "pyproject.toml").touch()
    env |= {"FLWR_HOME": "home", "all_proxy": "socks5://127.0.0.1:1"}
    runs = tmp_path / "new" / "runs"
    command: list[str | Path] = [COMMANDS / "feddm-supervise", "night", "--runs", runs]
    log = tmp_path / "log"
    with process(command, log=log, cwd=tmp_path, env=env) as started:
        wait_for(lambda: "no answer from the SuperLink" in log.read_text(), seconds=600, what="it")
        second = subprocess.run(
            command, env=env, capture_output=True, text=True, timeout=600, check=False
        )
        assert second.returncode == 1
        assert f"{runs} is in use by process {started.pid}; end it first" in second.stderr
        started.send_signal(signal.SIGTERM)
        assert started.wait(60) == 0
    assert log.read_text().count("no answer") == 1
    # It asked; `flwr list` has not refused the words it was given.
    for misled in ("No such option", "Invalid value", "migrat", "socks", "not found"):
        assert misled not in log.read_text()
