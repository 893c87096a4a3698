"""What a SuperLink said last of the runs of a folder, for when its database has forgotten them."""

from collections.abc import Collection, Iterable, Mapping
from dataclasses import asdict, replace
from pathlib import Path

from pydantic import TypeAdapter, ValidationError

from server_app.supervisor.decisions import ListedRun, RunFolder
from task.files import write_json

LAST_LISTED_FILE = ".listed-runs.json"
FORGOTTEN = "the SuperLink does not list it any more: its database was lost or replaced"


class LastListed:
    """The file in the supervisor's folder, `LAST_LISTED_FILE`.

    A run that was never seen is another SuperLink's, as far as anybody can tell.
    """

    def __init__(self, runs: Path) -> None:
        """Nothing is read yet.

        Args:
            runs: the folder of a supervisor.
        """
        self._file = runs / LAST_LISTED_FILE
        self._kept: dict[int, ListedRun] | None = None

    def forgotten(
        self, listed: Mapping[int, ListedRun], folders: Iterable[RunFolder], *, now: float
    ) -> dict[int, ListedRun]:
        """Return the runs of folders that were listed once and are no more, as what they are now.

        One that was going has failed, for nobody goes on with it.

        Args:
            listed: what Flower lists.
            folders: all of them.
            now: seconds since the epoch.

        Raises:
            ValueError: the file is damaged.
            OSError: it cannot be read.
        """
        kept = self._read()
        ids = {folder.run_id for folder in folders} - listed.keys()
        found = {run_id: kept[run_id] for run_id in ids & kept.keys()}
        for run_id, run in found.items():
            if not run.is_over:
                found[run_id] = replace(
                    run, status="finished:failed", details=FORGOTTEN, changed_at=now
                )
        return found

    def over_before(self, listed: Mapping[int, ListedRun]) -> dict[int, ListedRun]:
        """Return the runs that are over, as far as is known, and that an older database revives.

        Args:
            listed: what Flower lists.

        Raises:
            ValueError: the file is damaged.
            OSError: it cannot be read.
        """
        return {
            run_id: run
            for run_id, run in self._read().items()
            if run_id in listed and run.is_over and listed[run_id].status != run.status
        }

    def keep(self, runs: Mapping[int, ListedRun], folders: Collection[RunFolder]) -> None:
        """Write down what is new of the runs that hold a folder.

        Args:
            runs: what Flower lists, and what is forgotten.
            folders: all of them.

        Raises:
            ValueError: the file is damaged.
            OSError: it cannot be read or written.
        """
        ids = {folder.run_id for folder in folders} & runs.keys()
        new = {**self._read(), **{run_id: runs[run_id] for run_id in ids}}
        if new != self._kept:
            write_json(self._file, [asdict(run) for run in new.values()])
            self._kept = new

    def _read(self) -> dict[int, ListedRun]:
        if self._kept is None:
            content = self._file.read_bytes() if self._file.exists() else b"[]"
            try:
                runs = TypeAdapter(list[ListedRun]).validate_json(content, strict=True)
            except ValidationError as error:
                raise ValueError(
                    f"{self._file} is not what feddm-supervise writes ({error.errors()[0]['msg']});"
                    " remove it: runs of a database that was lost are then not known any more"
                ) from error
            self._kept = {run.run_id: run for run in runs}
        return self._kept
