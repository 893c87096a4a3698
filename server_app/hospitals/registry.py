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
    "bring a copy of it back, or move it away and register every hospital again (feddm-hospitals "
    "register): which keys were removed, and earlier node ids, are then forgotten"
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
        removed: whether the key is refused from now on.
    """

    name: str
    fingerprint: str
    public_key: str
    nodes: tuple[int, ...]
    removed: bool = False

    def after(self, before: "Hospital | None") -> "Hospital":
        """Return what is known once this is said, with the node ids of before."""
        earlier = before.nodes if before else ()
        new = tuple(node for node in self.nodes if node not in earlier)
        return replace(self, nodes=(*earlier, *new))


class HospitalsFile:
    """The file that `FEDDM_HOSPITALS` names, to which each registration adds a line."""

    def __init__(self, path: Path) -> None:
        """Name the file; nothing is read or written yet."""
        self._file = AppendOnlyFile(path, "hospitals", HOSPITALS_WAY_OUT)

    @classmethod
    def of_environment(cls) -> "HospitalsFile | None":
        """Return the file that the environment names; None where it names none.

        Raises:
            ValueError: it is no absolute path.
        """
        named = os.environ.get(HOSPITALS_VARIABLE, "")
        if not named:
            return None
        absolute = Path(named).is_absolute()
        require(absolute, HOSPITALS_VARIABLE, "an absolute path, for every process", named)
        return cls(Path(named))

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
                found[said.fingerprint] = said.after(found.get(said.fingerprint))
            except (KeyError, TypeError) as error:
                raise self._file.damaged(line, f"it is no hospital ({error})") from error
        return found

    def by_node(self) -> dict[int, Hospital]:
        """Return the hospital of each node id that a key has ever had."""
        return {node: each for each in self.hospitals().values() for node in each.nodes}

    def exists(self) -> bool:
        """Whether there is such a file."""
        return self._file.path.exists()

    def add(self, hospital: Hospital) -> None:
        """Write down what is new of a hospital, if anything is. To be called under `held`.

        Raises:
            ValueError: the file is damaged.
            OSError: it cannot be written.
        """
        known = self.hospitals().get(hospital.fingerprint)
        if hospital.after(known) != known:
            self._file.append({**vars(hospital), "nodes": [*hospital.nodes]})


def check_name(name: str) -> str:
    """Return the name of a hospital.

    Raises:
        ValueError: it is empty, too long, or has signs that cannot be printed.
    """
    good = 0 < len(name.strip()) <= LONGEST_NAME and name.isprintable()
    require(good, "NAME", f"1 to {LONGEST_NAME} printable characters", repr(name))
    return name.strip()
