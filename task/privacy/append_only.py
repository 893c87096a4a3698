"""A file of records that are only ever added, each with a checksum over all before it.

Each line is 16 hexadecimal digits, a space and a record in JSON. The digits hash the record and the
digits before it, so that a line that was changed, left out or put in is told.
"""

import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from task.files import naming_full_disk, with_escapes
from task.lock import hold

APPEND_ONLY_VERSION = 1
# Another process adds its record in milliseconds, or composes an epsilon first.
APPEND_PATIENCE_SECONDS = 60.0

Entry = dict[str, Any]


class DamagedFileError(ValueError):
    """A file that nobody but feddm writes is not as feddm wrote it."""


class AppendOnlyFile:
    """One such file, and the lock by which one process at a time adds to it.

    A process that is killed while it adds a record leaves a part of a line, without a line break,
    at the end. It had not been told that the record is kept, so that part counts as not written,
    and the next record takes its place.
    """

    def __init__(self, path: Path, kind: str, way_out: str) -> None:
        """Name the file; nothing is read or written yet.

        Args:
            path: the file; its folder exists where records are added.
            kind: of records, which the first line says.
            way_out: of a damaged file, for the error.
        """
        self.path = path
        self._kind, self._way_out = kind, way_out

    @contextmanager
    def held(self) -> Iterator[None]:
        """Keep other processes from adding records.

        Raises:
            ValueError: another process does so for too long.
        """
        lock = self.path.with_name(f".{self.path.name}.lock")
        held = hold(lock, self._kind, patience=APPEND_PATIENCE_SECONDS)
        try:
            yield
        finally:
            held.close()

    def read(self) -> list[Entry]:
        """Return all records, oldest first; none where there is no file.

        Raises:
            DamagedFileError: a line is not as it was written; names file, line and way out.
        """
        return self._read()[0]

    def has_begun(self) -> bool:
        """Whether the file is there, with or without records.

        Raises:
            DamagedFileError: see `read`.
        """
        return self._read()[1] > 0

    def begin(self) -> None:
        """Make the file, without records, unless it is there. To be called under `held`.

        Raises:
            DamagedFileError: see `read`.
            OSError: it cannot be written.
        """
        if not self.has_begun():
            self._write([{"file": self._kind, "version": APPEND_ONLY_VERSION}], 0, "")

    def append(self, record: Mapping[str, Any]) -> None:
        """Add a record, which is on the disk when this returns. To be called under `held`.

        Args:
            record: of finite numbers, texts and lists of them.

        Raises:
            DamagedFileError: see `read`.
            OSError: it cannot be written.
            ValueError: it is not JSON.
        """
        self.begin()
        _, end, checksum = self._read()
        self._write([dict(record)], end, checksum)

    def _write(self, records: list[Entry], end: int, checksum: str) -> None:
        """Write lines at an offset, behind which nothing stays."""
        lines = b""
        for record in records:
            text = json.dumps(record, allow_nan=False)
            checksum = _checksum(checksum, text)
            lines += f"{checksum} {text}\n".encode()
        with naming_full_disk(self.path.parent):
            file = os.open(self.path, os.O_WRONLY | os.O_CREAT, 0o600)
            try:
                os.ftruncate(file, end)
                os.lseek(file, end, os.SEEK_SET)
                while lines:
                    lines = lines[os.write(file, lines) :]
                os.fsync(file)
            finally:
                os.close(file)
            sync_folder(self.path.parent)

    def _read(self) -> tuple[list[Entry], int, str]:
        """Return the records, the length of all whole lines in bytes, and the last checksum."""
        content = self.path.read_bytes() if self.path.exists() else b""
        end = content.rfind(b"\n") + 1
        records, checksum = [], ""
        for number, line in enumerate(content[:end].splitlines(), start=1):
            digits, _, text = line.decode(errors="replace").partition(" ")
            checksum = _checksum(checksum, text)
            if digits != checksum:
                raise self.damaged(number, "its checksum is another")
            records.append(json.loads(text))
        if records and records[0] != {"file": self._kind, "version": APPEND_ONLY_VERSION}:
            raise self.damaged(1, f"it is no {self._kind} of version {APPEND_ONLY_VERSION}")
        return records[1:], end, checksum

    def damaged(self, line: int, problem: str) -> DamagedFileError:
        """Make the error of a line that is not as it was written."""
        path = with_escapes(str(self.path))
        return DamagedFileError(f"{path}, line {line}: {problem}; {self._way_out}")


def sync_folder(folder: Path) -> None:
    """Bring the names of a folder's files to the disk.

    Raises:
        OSError: the folder cannot be opened.
    """
    file = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(file)
    finally:
        os.close(file)


def _checksum(before: str, text: str) -> str:
    return hashlib.sha256(f"{before} {text}".encode()).hexdigest()[:16]
