"""What a client remembers of the sums that it took part in, so that it gives nothing away twice."""

import dataclasses
import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Protocol

from task.files import atomic_path
from task.lock import hold
from task.privacy.append_only import sync_folder
from task.protocol.secure_aggregation.fixed_point import UpdateFormat
from task.protocol.secure_aggregation.keys import KEY_PATIENCE_SECONDS
from task.protocol.secure_aggregation.terms import Terms, read_peers

MEMORY_LOCK_FILE = ".sums.lock"


class PeersRefusedError(ValueError):
    """The server asks for a sum that this client does not take part in."""


class MemoryStore(Protocol):
    """Where the last sum of each run is kept."""

    def read(self, run: str) -> str | None:
        """Return what was written of a run; None where nothing was."""

    def write(self, run: str, text: str) -> None:
        """Write it, in place of what was there; it is there when this returns."""

    @contextmanager
    def held(self) -> Iterator[None]:
        """Keep other processes from reading and writing."""


class FolderStore:
    """A file of each run in a folder of a hospital's disk."""

    def __init__(self, folder: Path) -> None:
        """Keep it in a folder that exists."""
        self._folder = folder

    def read(self, run: str) -> str | None:
        """See `MemoryStore`."""
        try:
            return self._file(run).read_text(encoding="utf-8")
        except FileNotFoundError:
            return None

    def write(self, run: str, text: str) -> None:
        """See `MemoryStore`."""
        with atomic_path(self._file(run), private=True) as aside:
            aside.write_text(text, encoding="utf-8")
        # Its new name as well, or a power failure could bring the old one back.
        sync_folder(self._folder)

    @contextmanager
    def held(self) -> Iterator[None]:
        """See `MemoryStore`."""
        path = self._folder / MEMORY_LOCK_FILE
        with hold(path, "output-path", patience=KEY_PATIENCE_SECONDS):
            yield

    def _file(self, run: str) -> Path:
        # The server chose the run's id, which may be no name of a file.
        return self._folder / f"sum-{hashlib.sha256(run.encode()).hexdigest()[:32]}.json"


class Memory:
    """The last sum of each run, and whether its question about masks was answered."""

    def __init__(self, store: MemoryStore) -> None:
        """Keep it there."""
        self._store = store

    def begin(self, terms: Terms) -> None:
        """Note that a sum begins, before anything of it is sent.

        Raises:
            PeersRefusedError: there was one of this number or a later one.
        """
        with self._store.held():
            last = self._last(terms.run)
            if last is not None and terms.attempt <= last[0].attempt:
                raise PeersRefusedError(
                    f"sum {terms.attempt} of the run is asked for, and there was sum "
                    f"{last[0].attempt} already"
                )
            self._write(terms, answered=False)

    def answer(self, run: str, attempt: int) -> Terms:
        """Note that the one question about the masks of a sum is answered, before it is.

        Returns:
            What the sum's clients agreed on.

        Raises:
            PeersRefusedError: it was answered before, or this client's last sum is another one.
        """
        with self._store.held():
            last = self._last(run)
            if last is None or last[0].attempt != attempt:
                raise PeersRefusedError(f"sum {attempt} is not the last that this client began")
            terms, answered = last
            if answered:
                raise PeersRefusedError(f"the masks of sum {attempt} were asked about before")
            self._write(terms, answered=True)
        return terms

    def _last(self, run: str) -> tuple[Terms, bool] | None:
        text = self._store.read(run)
        if text is None:
            return None
        found = json.loads(text)
        terms = found["terms"]
        peers = read_peers([bytes.fromhex(peer) for peer in terms["peers"]])
        kept = {**terms, "peers": peers, "format": UpdateFormat(**terms["format"])}
        return Terms(**kept), found["answered"]

    def _write(self, terms: Terms, *, answered: bool) -> None:
        kept = {each.name: getattr(terms, each.name) for each in dataclasses.fields(terms)}
        kept["peers"] = [peer.to_bytes().hex() for peer in terms.peers]
        kept["format"] = dataclasses.asdict(terms.format)
        self._store.write(terms.run, json.dumps({"terms": kept, "answered": answered}))
