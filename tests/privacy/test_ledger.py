"""The hospital's ledger: what it adds up, whom it knows again, and what a crash leaves."""

import math
import stat
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from task.privacy.accounting import Spending, epsilon_of
from task.privacy.append_only import DamagedFileError
from task.privacy.ledger import BudgetExhaustedError, Charge, Ledger

DELTA = 1e-5
# At full batches steps add up as one with less noise, which is quickly accounted for.
STEPS = Spending(noise_multiplier=10.0, sampling_rate=1.0, steps=3)
PATIENTS = [[b"ann-left", b"ann-right"], [b"bob"]]


def ledger(folder: Path, max_epsilon: float | None = None) -> Ledger:
    return Ledger(folder / "privacy", max_epsilon, DELTA)


def charge(number: int = 1, run: str = "7", spending: Spending = STEPS) -> Charge:
    return Charge(run, f"run-{run}", number, spending)


def epsilon(steps: int) -> float:
    return epsilon_of([Spending(STEPS.noise_multiplier, 1.0, steps)], DELTA)


def test_rounds_and_runs_add_up_on_each_patient(tmp_path: Path) -> None:
    assert ledger(tmp_path).charge(charge(1), PATIENTS) == pytest.approx(epsilon(3))
    # A new process, and a round that is trained once more.
    for number in (2, 2):
        spent = ledger(tmp_path).charge(charge(number), PATIENTS)
    assert spent == pytest.approx(epsilon(9))
    # Who is new has spent nothing; who is known by one name of several is the same.
    assert ledger(tmp_path).charge(charge(1, "8"), [[b"cleo"]]) == pytest.approx(epsilon(3))
    both = [[b"cleo"], [b"ann-right", b"ann-2027"]]
    assert ledger(tmp_path).charge(charge(2, "8"), both) == pytest.approx(epsilon(12))
    # By a name that has come to a known one.
    renamed = ledger(tmp_path).charge(charge(1, "9"), [[b"ann-2027"]])
    assert renamed == pytest.approx(epsilon(15))
    first, second, third = ledger(tmp_path).runs()
    assert (first.run_id, first.rounds, first.steps, first.patients) == ("7", 3, 9, 2)
    assert (second.run_name, second.rounds, second.patients) == ("run-8", 2, 2)
    assert [first.epsilon, second.epsilon, third.epsilon] == pytest.approx(
        [epsilon(9), epsilon(6), epsilon(3)]
    )
    assert ledger(tmp_path).spent() == (pytest.approx(epsilon(15)), 3)


def test_round_that_would_pass_the_limit_is_refused_and_not_written(tmp_path: Path) -> None:
    limit = epsilon(7)
    ledger(tmp_path, limit).charge(charge(1), PATIENTS)
    ledger(tmp_path, limit).charge(charge(1, "8"), PATIENTS)
    before = (tmp_path / "privacy" / "ledger.jsonl").read_bytes()
    with pytest.raises(BudgetExhaustedError, match=r"max-epsilon=.* would be .* is spent; `feddm"):
        ledger(tmp_path, limit).charge(charge(1, "9"), [[b"cleo"], [b"bob"]])
    assert (tmp_path / "privacy" / "ledger.jsonl").read_bytes() == before
    assert ledger(tmp_path, limit).charge(charge(), [[b"cleo"]]) == pytest.approx(epsilon(3))
    noiseless = Spending(0.0, 1.0, 1)
    with pytest.raises(BudgetExhaustedError, match="would be inf"):
        ledger(tmp_path, 1e6).charge(charge(spending=noiseless), [[b"cleo"]])
    # Without a limit it is written down all the same.
    assert ledger(tmp_path).charge(charge(spending=noiseless), [[b"cleo"]]) == math.inf


def test_what_is_kept_names_no_patient_and_is_the_owners_alone(tmp_path: Path) -> None:
    ledger(tmp_path).charge(charge(), PATIENTS)
    ledger(tmp_path).charge(charge(2), PATIENTS)
    files = [file for file in (tmp_path / "privacy").rglob("*") if file.is_file()]
    sets = [file for file in files if file.suffix == ".txt"]
    assert len(sets) == 1
    for file in files:
        assert b"ann" not in file.read_bytes()
        assert stat.S_IMODE(file.stat().st_mode) & 0o077 == 0 or file.name.endswith(".lock")
    # Another hospital, with a key of its own, calls the same patient otherwise.
    (tmp_path / "other").mkdir()
    ledger(tmp_path / "other").charge(charge(), PATIENTS)
    (other,) = (tmp_path / "other").rglob("*.txt")
    assert not set(sets[0].read_text().split()) & set(other.read_text().split())


def test_damage_is_named_and_never_resets(tmp_path: Path) -> None:
    for number in (1, 2, 3):
        ledger(tmp_path).charge(charge(number), PATIENTS)
    file = tmp_path / "privacy" / "ledger.jsonl"
    whole = file.read_bytes()
    lines = whole.splitlines(keepends=True)
    changed = whole.replace(b'"steps": 3', b'"steps": 0', 1)
    for content, line in (
        (changed, 2),
        (b"".join([*lines[:2], *lines[3:]]), 3),
        (b"".join([*lines[:3], lines[2], lines[3]]), 4),
        (b"".join(lines[1:]), 1),
        (whole[:-20] + b"\n", 4),
    ):
        file.write_bytes(content)
        for use in (ledger(tmp_path).runs, lambda: ledger(tmp_path).charge(charge(), PATIENTS)):
            with pytest.raises(DamagedFileError, match=f"ledger.jsonl, line {line}: .* backup"):
                use()
        assert file.read_bytes() == content
    for content in (b"", whole[:20], None):
        file.unlink() if content is None else file.write_bytes(content)
        with pytest.raises(DamagedFileError, match="line 1: it is missing"):
            ledger(tmp_path).charge(charge(), PATIENTS)
    file.write_bytes(whole)
    (kept,) = (tmp_path / "privacy" / "patients").iterdir()
    content = kept.read_bytes()
    for damage in (content[:-1], None):
        kept.unlink() if damage is None else kept.write_bytes(damage)
        with pytest.raises(DamagedFileError, match=r"set of patients .* (damaged|missing)"):
            ledger(tmp_path).spent()
    kept.write_bytes(content)
    (tmp_path / "privacy" / "key").unlink()
    with pytest.raises(DamagedFileError, match="key beside it is missing"):
        ledger(tmp_path).charge(charge(), PATIENTS)


def test_torn_last_line_was_never_spent(tmp_path: Path) -> None:
    for number in (1, 2):
        ledger(tmp_path).charge(charge(number), PATIENTS)
    file = tmp_path / "privacy" / "ledger.jsonl"
    whole = file.read_bytes()
    last = len(whole.splitlines(keepends=True)[-1])
    for cut in range(1, last, 7):
        file.write_bytes(whole[:-cut])
        assert ledger(tmp_path).runs()[0].steps == 3
        ledger(tmp_path).charge(charge(2), PATIENTS)
        assert ledger(tmp_path).runs()[0].steps == 6


def test_two_runs_at_once_are_both_charged(tmp_path: Path) -> None:
    def spend(run: str) -> None:
        for number in range(5):
            ledger(tmp_path).charge(charge(number, run), PATIENTS)

    threads = [threading.Thread(target=spend, args=(run,)) for run in ("7", "8")]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [run.steps for run in ledger(tmp_path).runs()] == [15, 15]


# Forks a process for every call of the system that a charge makes, kills it before and after that
# call, and looks at what it has left. Torch is not imported, so that a fork takes milliseconds.
KILLED = """
import os, shutil, signal, sys
from pathlib import Path
from task.privacy.accounting import Spending, epsilon_of
from task.privacy.ledger import Charge, Ledger

assert "torch" not in sys.modules
CALLS = "mkdir open write ftruncate flush fsync replace unlink chmod close flock".split()
delta, step = 1e-5, Spending(10.0, 1.0, 1)
limit = epsilon_of([Spending(10.0, 1.0, 3)], delta)
for steps in (1, 2, 3):
    epsilon_of([Spending(10.0, 1.0, steps)], delta)

def charge(folder, run, *patients):
    ledger = Ledger(folder / "privacy", limit, delta)
    ledger.charge(Charge(run, run, 1, step), [[name] for name in patients])

def steps(folder):
    return sum(run.steps for run in Ledger(folder / "privacy", limit, delta).runs())

def kill_at(number):
    seen = 0
    def look(frame, event, function):
        nonlocal seen
        seen += event in ("c_call", "c_return") and function.__name__ in CALLS
        if seen == number:
            os.kill(os.getpid(), signal.SIGKILL)
    sys.setprofile(look)

for before in (0, 1):
    start = Path(sys.argv[1]) / f"{before}"
    start.mkdir()
    for _ in range(before):
        charge(start, "before", b"ann")
    outcomes, number, done = [], 0, False
    while not done:
        number += 1
        folder = Path(sys.argv[1]) / f"{before}-{number}"
        shutil.copytree(start, folder)
        child = os.fork()
        if child == 0:
            kill_at(number)
            charge(folder, "killed", b"ann", b"bob")
            sys.setprofile(None)
            os._exit(0)
        done = not os.WIFSIGNALED(os.waitpid(child, 0)[1])
        outcomes.append(steps(folder) - before)
        charge(folder, "after", b"ann", b"cleo")
        assert steps(folder) == before + outcomes[-1] + 1, number
    # Nothing is there, and then all of it, at the latest when the charge says so.
    assert outcomes == sorted(outcomes) and {*outcomes} == {0, 1}, outcomes
    print(number)
"""


def test_process_killed_at_any_step_of_a_charge_forgets_nothing(tmp_path: Path) -> None:
    command = [sys.executable, "-c", KILLED, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert all(int(number) > 40 for number in done.stdout.split())
