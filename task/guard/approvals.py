"""The bundles that a hospital has approved, in a folder of the hospital's."""

import difflib
import os
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path

from task.files import atomic_path, open_by_umask, with_escapes
from task.guard.bundle import Bundle
from task.privacy.append_only import AppendOnlyFile

# Says which folder is the guard's, to the node and to `feddm approve`.
FOLDER_VARIABLE = "FEDDM_GUARD"
APPROVED_FILE = "approved.jsonl"
BUNDLES = "bundles"
APPROVED_WAY_OUT = "move the file away, and approve again what may run here"


def guard_folder() -> Path:
    """Return the guard's folder.

    Raises:
        ValueError: the environment does not name it.
        FileNotFoundError: it is not there.
    """
    named = os.environ.get(FOLDER_VARIABLE, "")
    if not named:
        raise ValueError(
            f"{FOLDER_VARIABLE} must name the guard's folder, got none in the environment"
        )
    if not Path(named).is_dir():
        raise FileNotFoundError(f"{FOLDER_VARIABLE}={named}: there is no such folder; make it")
    return Path(named).absolute()


class Approvals:
    """The list of approved bundles, and a copy of each."""

    def __init__(self, folder: Path) -> None:
        """Name the guard's folder; nothing is read or written yet."""
        self._folder = folder / BUNDLES
        self._file = AppendOnlyFile(folder / APPROVED_FILE, "approved bundles", APPROVED_WAY_OUT)

    def hashes(self) -> list[str]:
        """Return the hashes of all approved bundles, in the order of their approval.

        Raises:
            DamagedFileError: the list is not as it was written.
        """
        return [entry["sha256"] for entry in self._file.read()]

    def last(self) -> Bundle | None:
        """Return the bundle that was approved last; None: none was, or its copy is gone.

        Raises:
            DamagedFileError: see `hashes`.
            ValueError: the copy is damaged.
        """
        known = self.hashes()
        file = self._folder / f"{known[-1]}.fab" if known else None
        return None if file is None or not file.is_file() else Bundle.of_fab(file.read_bytes())

    def add(self, bundle: Bundle, fab: bytes) -> None:
        """Approve a bundle.

        Args:
            bundle: which.
            fab: a file of it, which is kept to be compared with the next.

        Raises:
            DamagedFileError: see `hashes`.
            OSError: the folder cannot be written.
            ValueError: another process holds the list, or the bundle does not say what it is.
        """
        name, version = bundle.app
        with self._file.held():
            self._folder.mkdir(exist_ok=True)
            with atomic_path(self._folder / f"{bundle.sha256}.fab") as aside:
                aside.write_bytes(fab)
            self._file.append(
                {
                    "time": datetime.now(UTC).isoformat(timespec="seconds"),
                    "sha256": bundle.sha256,
                    "app": name,
                    "version": version,
                }
            )
        # The node may be another user, who reads it alone.
        open_by_umask(self._file.path)


def describe_changes(before: Bundle | None, after: Bundle) -> Iterator[str]:
    """Say what is new in a bundle, line by line: files added, removed and changed, with diffs.

    New files are shown whole, but for those of a first bundle, all of which is new. Control
    characters are escaped, which could show another text than there is.

    Args:
        before: the one that was approved last; None: there is none.
        after: the new one.
    """
    old, new = {} if before is None else before.files, after.files
    changed = [path for path in sorted(old.keys() & new.keys()) if old[path] != new[path]]
    for sign, paths in (("-", old.keys() - new.keys()), ("+", new.keys() - old.keys())):
        for path in sorted(paths):
            size = len((new if sign == "+" else old)[path])
            yield f"{sign} {with_escapes(path)} ({size} bytes)"
            if before is not None and sign == "+":
                yield from (f"    +{with_escapes(line)}" for line in _text_lines(new[path]))
    for path in changed:
        yield f"~ {with_escapes(path)}"
        lines = _text_lines(old[path]), _text_lines(new[path])
        diff = [*difflib.unified_diff(*lines, "", "", "", "", 0, "")][2:]
        yield from (f"    {with_escapes(line)}" for line in diff)
    yield (
        f"{len(new.keys() - old.keys())} files added, {len(old.keys() - new.keys())} removed, "
        f"{len(changed)} changed, {len(old.keys() & new.keys()) - len(changed)} as before"
    )


def _text_lines(content: bytes) -> list[str]:
    return content.decode(errors="backslashreplace").splitlines()
