"""A hospital's ledger: what every run has spent on which of its patients, on the hospital's disk.

A client charges a round's steps of DP-SGD before the first of them, so that what is written is
never less than what was spent, wherever the process is killed:

    ledger = ledger_of(node)  # of task.protocol.node
    ledger.charge(
        Charge(run_id, run_name, server_round, Spending(noise_multiplier, sampling_rate, steps)),
        names_of_patients(images),  # of task.privacy.patients
    )

A round that is trained once more is charged once more: it draws other noise. Nothing is ever taken
back, and a run that goes on finds what it has spent.

The folder holds `ledger.jsonl`, an `AppendOnlyFile`; `key`, which only its owner may read; and
`patients/` with a file for each set of patients, named by its hash. A patient is known by all names
given, such as the files and the pixels of the patient's images, each hashed under the key. Patients
who ever shared a name are one and the same from then on.
"""

import hashlib
import hmac
import os
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from task.files import atomic_path, remove_left_overs
from task.privacy.accounting import Spending, epsilon_of
from task.privacy.append_only import AppendOnlyFile, DamagedFileError, Entry, sync_folder

LEDGER_FILE = "ledger.jsonl"
KEY_FILE = "key"
KEY_BYTES = 32
PATIENT_SETS = "patients"
WAY_OUT = (
    "bring the whole folder back from a backup that is not older than the last run; without one, "
    "what was spent is unknown: train on none of these patients, or move the folder away and let "
    "max-epsilon count from now on alone"
)

# A patient's names, such as files and pixels of images.
Names = Sequence[bytes]
Hashes = frozenset[str]


class BudgetExhaustedError(ValueError):
    """A patient's epsilon would pass what the hospital allows."""


@dataclass(frozen=True)
class Charge:
    """What a round of a run spends on each of its patients.

    Attributes:
        run_id: of the run, which no other has.
        run_name: as people call it.
        server_round: 1-based.
        spending: the round's steps.
    """

    run_id: str
    run_name: str
    server_round: int
    spending: Spending


@dataclass(frozen=True)
class RunSpending:
    """What a run has spent on this hospital's patients.

    Attributes:
        run_id: see `Charge`.
        run_name: see `Charge`.
        rounds: that were charged, repeated ones each time.
        steps: of all of them.
        patients: who saw any of them.
        epsilon: of the patient on whom the run has spent most, by this run alone.
    """

    run_id: str
    run_name: str
    rounds: int
    steps: int
    patients: int
    epsilon: float


class Ledger:
    """The ledger of one hospital."""

    def __init__(self, folder: Path, max_epsilon: float | None, delta: float) -> None:
        """Name the folder; nothing is read or written yet.

        Args:
            folder: of the ledger alone; made where it is not there.
            max_epsilon: that no patient's epsilon may pass, over all runs; None: no limit.
            delta: at which epsilon is computed, in (0, 1).
        """
        self.folder, self.max_epsilon, self.delta = folder, max_epsilon, delta
        self._file = AppendOnlyFile(folder / LEDGER_FILE, "privacy ledger", WAY_OUT)
        self._sets: dict[str, tuple[Hashes, ...]] = {}

    def charge(self, charge: Charge, patients: Sequence[Names]) -> float:
        """Write down what a round spends, before it does.

        Args:
            charge: the round.
            patients: who can be drawn for a step, each by every name known; at least one name each.

        Returns:
            The epsilon of the patient on whom most is spent, with this round.

        Raises:
            BudgetExhaustedError: it would pass `max_epsilon`; nothing is written.
            DamagedFileError: the ledger is not as it was written.
            OSError: it cannot be written.
            ValueError: a patient has no name, or another process holds the ledger.
        """
        with self._held() as key:
            hashed = _hashed(patients, key)
            epsilon = self._require_budget(charge.spending, hashed)
            record = {
                "time": datetime.now(UTC).isoformat(timespec="seconds"),
                "run": charge.run_id,
                "name": charge.run_name,
                "round": charge.server_round,
                "noise_multiplier": charge.spending.noise_multiplier,
                "sampling_rate": charge.spending.sampling_rate,
                "steps": charge.spending.steps,
                "patients": self._keep_set(hashed),
            }
            self._file.append(record)
        return epsilon

    def runs(self) -> list[RunSpending]:
        """Return what each run has spent, in the order of their first charges.

        Raises:
            DamagedFileError: see `charge`.
        """
        charges: dict[str, list[Entry]] = defaultdict(list)
        for entry in self._entries():
            charges[entry["run"]].append(entry)
        found = []
        for run, entries in charges.items():
            steps = _steps_of(entries)
            held_in = self._held_in(steps)
            found.append(
                RunSpending(
                    run_id=run,
                    run_name=entries[-1]["name"],
                    rounds=len(entries),
                    steps=sum(entry["steps"] for entry in entries),
                    patients=len(held_in),
                    epsilon=self._most(held_in, steps),
                )
            )
        return found

    def spent(self) -> tuple[float, int]:
        """Return the epsilon of the patient on whom most was spent, and the number of patients.

        Raises:
            DamagedFileError: see `charge`.
        """
        steps = _steps_of(self._entries())
        held_in = self._held_in(steps)
        return self._most(held_in, steps), len(held_in)

    def _require_budget(self, further: Spending, patients: Sequence[Hashes]) -> float:
        """Return the epsilon of the patient on whom most is spent with further steps."""
        steps = _steps_of(self._entries())
        held_in = self._held_in(steps, patients)
        most = self._most(held_in, steps, [further])
        if self.max_epsilon is not None and most > self.max_epsilon:
            raise BudgetExhaustedError(
                f"max-epsilon={self.max_epsilon:g}: a patient's epsilon would be {most:.4g} at "
                f"privacy-delta={self.delta:g}, of which {self._most(held_in, steps):.4g} is "
                "spent; `feddm privacy` says by which runs. Take no part in this run, leave those "
                "patients out, or allow more"
            )
        return most

    def _held_in(
        self, sets: Iterable[str], only: Sequence[Hashes] | None = None
    ) -> dict[str, frozenset[str]]:
        """Return which sets each patient is in.

        Args:
            sets: names of sets of patients.
            only: these patients; None: all of the sets.

        Returns:
            By one name of each patient.
        """
        members = {name: self._read_set(name) for name in sets}
        same = _Joined()
        for patients in (*members.values(), only or ()):
            for patient in patients:
                same.join(patient)
        found: dict[str, set[str]] = {same.find(min(patient)): set() for patient in only or ()}
        for name, patients in members.items():
            for one in {same.find(min(patient)) for patient in patients}:
                if only is None or one in found:
                    found.setdefault(one, set()).add(name)
        return {one: frozenset(names) for one, names in found.items()}

    def _most(
        self,
        held_in: Mapping[str, frozenset[str]],
        steps: Mapping[str, Sequence[Spending]],
        further: Sequence[Spending] = (),
    ) -> float:
        """Return the largest epsilon of any patient, after further steps."""
        return max(
            (
                epsilon_of([*further, *(each for name in sets for each in steps[name])], self.delta)
                for sets in {*held_in.values()}
            ),
            default=0.0,
        )

    def _entries(self) -> list[Entry]:
        """Read the charges."""
        if not self._file.has_begun() and (self.folder / KEY_FILE).exists():
            raise self._file.damaged(1, "it is missing")
        return self._file.read()

    @contextmanager
    def _held(self) -> Iterator[bytes]:
        """Keep other processes from charging; yields the key of the hashes."""
        if not self.folder.exists():
            self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            for above in (self.folder.parent, self.folder.parent.parent):
                sync_folder(above)
        with self._file.held():
            entries = self._entries()
            # Before the key, so that a key without a ledger is a ledger that was lost.
            self._file.begin()
            yield self._key(is_new=not entries)

    def _key(self, *, is_new: bool) -> bytes:
        """Read the key of the hashes; in a new ledger it is made."""
        file = self.folder / KEY_FILE
        if is_new and not file.exists():
            remove_left_overs(file)
            with atomic_path(file, private=True) as aside:
                aside.write_bytes(os.urandom(KEY_BYTES))
            sync_folder(self.folder)
        key = file.read_bytes() if file.exists() else b""
        if len(key) != KEY_BYTES:
            raise self._file.damaged(1, f"the file {KEY_FILE} beside it is missing or damaged")
        return key

    def _keep_set(self, patients: Iterable[Hashes]) -> str:
        """Write a set of patients, unless it is there; returns its name."""
        lines = sorted({" ".join(sorted(names)) for names in patients})
        content = "".join(f"{line}\n" for line in lines)
        name = hashlib.sha256(content.encode()).hexdigest()
        folder = self.folder / PATIENT_SETS
        if not folder.exists():
            folder.mkdir(mode=0o700)
            sync_folder(self.folder)
        file = folder / f"{name}.txt"
        if not file.exists():
            remove_left_overs(file)
            with atomic_path(file, private=True) as aside:
                aside.write_text(content, encoding="ascii")
        # Also where a process that was killed has put it there.
        sync_folder(folder)
        return name

    def _read_set(self, name: str) -> tuple[Hashes, ...]:
        if name not in self._sets:
            file = self.folder / PATIENT_SETS / f"{name}.txt"
            content = file.read_bytes() if file.exists() else b""
            if hashlib.sha256(content).hexdigest() != name:
                problem = "damaged" if file.exists() else "missing"
                raise DamagedFileError(
                    f"{file}: this set of patients of {LEDGER_FILE} is {problem}; {WAY_OUT}"
                )
            lines = content.decode("ascii").splitlines()
            self._sets[name] = tuple(frozenset(line.split()) for line in lines)
        return self._sets[name]


class _Joined:
    """Names, those of one patient joined."""

    def __init__(self) -> None:
        self._above: dict[str, str] = {}

    def find(self, name: str) -> str:
        """Return the name that stands for all that are joined with one."""
        while (above := self._above.get(name, name)) != name:
            self._above[name] = self._above.get(above, above)
            name = above
        return name

    def join(self, names: Iterable[str]) -> None:
        """Join names."""
        first, *others = sorted(names)
        for other in others:
            self._above[self.find(other)] = self.find(first)


def _steps_of(entries: Iterable[Entry]) -> dict[str, list[Spending]]:
    """Return the steps that each set of patients has seen, those of one kind joined."""
    steps: dict[str, Counter[tuple[float, float]]] = defaultdict(Counter)
    for entry in entries:
        kind = entry["noise_multiplier"], entry["sampling_rate"]
        steps[entry["patients"]][kind] += entry["steps"]
    return {
        name: [Spending(*kind, number) for kind, number in kinds.items()]
        for name, kinds in steps.items()
    }


def _hashed(patients: Sequence[Names], key: bytes) -> list[Hashes]:
    for number, names in enumerate(patients):
        if len(names) == 0:
            raise ValueError(f"patients: number {number} must have a name, got none")
    return [frozenset(_keyed_hash(name, key) for name in names) for names in patients]


def _keyed_hash(name: bytes, key: bytes) -> str:
    return hmac.digest(key, name, "sha256").hex()[:32]
