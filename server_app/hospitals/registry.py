"""The coordinator's file of hospitals: name, key and node ids of each."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

from task.checks import require
from task.privacy.append_only import AppendOnlyFile

HOSPITALS_VARIABLE = "FEDDM_HOSPITALS"
HOSPITALS_WAY_OUT = (
    "bring a copy of it back, or move it away and register every hospital again "
    "(feddm-hospitals register)"
)
LONGEST_NAME = 100


@dataclass(frozen=True)
class Hospital:
    """What the coordinator knows of a key.

    Attributes:
        name: of the hospital, the last that was given.
        fingerprint: of its key, as `ssh-keygen -l` writes it.
        public_key: in OpenSSH's format, in one line.
        nodes: every node id that Flower has given the key, oldest first.
        removed: whether the key was let go, and is not to be registered again.
    """

    name: str
    fingerprint: str
    public_key: str
    nodes: tuple[int, ...]
    removed: bool = False


class HospitalsFile:
    """The file that `FEDDM_HOSPITALS` names, to which each registration adds a line."""

    def __init__(self, path: Path) -> None:
        """Name the file; nothing is read or written yet."""
        self._file = AppendOnlyFile(path, "hospitals", HOSPITALS_WAY_OUT)

    @classmethod
    def of_environment(cls) -> "HospitalsFile | None":
        """Return the file that the environment names; None where it names none."""
        named = os.environ.get(HOSPITALS_VARIABLE, "")
        return cls(Path(named)) if named else None

    @contextmanager
    def held(self) -> Iterator[None]:
        """Keep other processes from adding hospitals; makes the folder where there is none.

        Raises:
            ValueError: another process does so for too long.
            OSError: the folder cannot be made or written to.
        """
        self._file.path.parent.mkdir(parents=True, exist_ok=True)
        with self._file.held():
            yield

    def hospitals(self) -> dict[str, Hospital]:
        """Return all hospitals by the fingerprint of their keys, the first registered first.

        Raises:
            ValueError: the file is damaged, or no file of this feddm.
            OSError: it cannot be read.
        """
        found: dict[str, Hospital] = {}
        for line, record in enumerate(self._file.read(), start=2):
            try:
                said = Hospital(**{**record, "nodes": tuple(record["nodes"])})
                before = found.get(said.fingerprint)
            except (KeyError, TypeError) as error:
                raise self._file.damaged(line, f"it is no hospital ({error})") from error
            earlier = before.nodes if before else ()
            new = tuple(node for node in said.nodes if node not in earlier)
            found[said.fingerprint] = replace(said, nodes=(*earlier, *new))
        return found

    def by_node(self) -> dict[int, Hospital]:
        """Return the hospital of each node id that a key has ever had."""
        return {node: each for each in self.hospitals().values() for node in each.nodes}

    def add(self, hospital: Hospital) -> None:
        """Write down what is new of a hospital, if anything is. To be called under `held`.

        Raises:
            ValueError: the file is damaged.
            OSError: it cannot be written.
        """
        known = self.hospitals().get(hospital.fingerprint)
        same = known is not None and {*hospital.nodes} <= {*known.nodes}
        if not same or replace(hospital, nodes=known.nodes) != known:  # type: ignore[union-attr]
            self._file.append({**vars(hospital), "nodes": [*hospital.nodes]})


def check_name(name: str) -> str:
    """Return the name of a hospital.

    Raises:
        ValueError: it is empty, too long, or has signs that cannot be printed.
    """
    good = 0 < len(name.strip()) <= LONGEST_NAME and name.isprintable()
    require(good, "NAME", f"1 to {LONGEST_NAME} printable signs", repr(name))
    return name.strip()
