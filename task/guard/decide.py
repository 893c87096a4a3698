"""Decides on a run before any of its code is loaded: `python -m task.guard.decide`.

A process of its own, so that the one that runs a bundle has loaded none of this feddm's modules in
place of the bundle's. It reads a `RunRequest` from its standard input and writes a `Decision`.
"""

import hashlib
import json
import os
import sys
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from task.files import atomic_folder
from task.guard.approvals import Approvals, guard_folder
from task.guard.bundle import Bundle
from task.guard.policy import Policy, PolicyError
from task.privacy.append_only import AppendOnlyFile
from task.processes import have_home

GUARD_LOG_FOLDER = "log"
GUARD_LOG = "runs.jsonl"
GUARD_LOG_WAY_OUT = (
    "move the file away, and the guard begins another; what it said before is in doubt"
)
# Below FLWR_HOME: approved bundles, each in a folder of its whole hash. Flower's own `apps/` has 8
# digits of it alone, and whatever ran before there was a guard.
GUARDED_APPS = "guarded"


class NotApprovedError(ValueError):
    """The hospital has not approved the code of a run."""


@dataclass(frozen=True)
class RunRequest:
    """What the node was asked to run.

    Attributes:
        run_id: Flower's number of the run.
        app: publisher and name of the bundle, as the coordinator says them.
        version: of the bundle, as the coordinator says it.
        fab_hash: SHA-256 of the file of the bundle, as the coordinator says it.
        run_config: of the run, flat.
    """

    run_id: int
    app: str
    version: str
    fab_hash: str
    run_config: Mapping[str, Any]


@dataclass(frozen=True)
class Decision:
    """Whether it runs.

    Attributes:
        sha256: of the bundle, see `Bundle.sha256`; empty where it is none.
        folder: of the bundle's files; empty where it does not run.
        error: class of the reason why not, all that the server learns beside `code`; empty: it
            runs.
        code: a `FailureCode`; 0: it runs.
        why: for the hospital's own log.
        node_config: values that take the place of those of `--node-config`.
    """

    sha256: str
    folder: str
    error: str = ""
    code: int = 0
    why: str = "the bundle is approved and fits the policy"
    node_config: Mapping[str, Any] = field(default_factory=dict)


def decide(request: RunRequest, fab: bytes, folder: Path, home: Path) -> Decision:
    """Decide, install the bundle if it runs, and write the decision into the log.

    Args:
        request: what is to run.
        fab: the file of the bundle.
        folder: of the guard.
        home: where approved bundles are unpacked.

    Raises:
        DamagedFileError: the log is not as it was written.
        OSError: the log cannot be written.
    """
    sha256 = ""
    try:
        bundle = Bundle.of_fab(fab)
        sha256 = bundle.sha256
        policy = _check_run(request, fab, bundle, folder)
        apps = _install(bundle, home)
        decision = Decision(sha256, str(apps), node_config=policy.node_config)
    except (ValueError, OSError) as error:
        name, why = type(error).__name__, str(error)
        decision = Decision(sha256, "", error=name, code=_code_of(error), why=why)
    _log(request, decision, folder)
    return decision


def _check_run(request: RunRequest, fab: bytes, bundle: Bundle, folder: Path) -> Policy:
    if bundle.sha256 not in Approvals(folder).hashes():
        raise NotApprovedError(
            f"the bundle {bundle.sha256} is not on the list in {folder}; look at its code, which "
            "the coordinator can send you, and add it: feddm approve BUNDLE"
        )
    said = (request.app, request.version, request.fab_hash)
    if said != (*bundle.app, hashlib.sha256(fab).hexdigest()):
        raise NotApprovedError(
            f"the coordinator calls the bundle {said}, which it is not; Flower would load another"
        )
    policy = Policy.read(folder)
    policy.check(bundle, request.run_config)
    return policy


def _install(bundle: Bundle, home: Path) -> Path:
    """Unpack a bundle, unless it is; its folder has nothing but what was approved."""
    folder = home / bundle.sha256
    if not folder.exists():
        with atomic_folder(folder) as aside:
            for path, content in bundle.files.items():
                (aside / path).parent.mkdir(parents=True, exist_ok=True)
                (aside / path).write_bytes(content)
    # Links and folders as well: Python imports a folder without code, and what a link leads to.
    below = [*folder.rglob("*")]
    found = {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in below
        if path.is_file() and not path.is_symlink()
    }
    folders = {parent for path in bundle.files for parent in (folder / path).parents}
    if found != bundle.files or not {p for p in below if p.is_symlink() or p.is_dir()} <= folders:
        raise NotApprovedError(f"{folder} holds other files than the bundle; remove that folder")
    return folder


def _code_of(error: Exception) -> int:
    # Imported here because torch comes with it, which only refusals have the time for.
    from task.protocol.wire import FailureCode

    if isinstance(error, NotApprovedError):
        return FailureCode.NOT_APPROVED
    if isinstance(error, PolicyError):
        return FailureCode.AGAINST_POLICY
    return FailureCode.DATA_UNREADABLE if isinstance(error, OSError) else FailureCode.BAD_INPUT


def _log(request: RunRequest, decision: Decision, folder: Path) -> None:
    """Add a line about a run, unless the last one about it says the same."""
    log = folder / GUARD_LOG_FOLDER
    log.mkdir(mode=0o700, exist_ok=True)
    file = AppendOnlyFile(log / GUARD_LOG, "runs of a node", GUARD_LOG_WAY_OUT)
    said = {
        "run": str(request.run_id),
        "bundle": decision.sha256,
        "runs": decision.code == 0,
        "code": decision.code,
        "why": decision.why,
    }
    with file.held():
        earlier = [entry for entry in file.read() if entry["run"] == said["run"]]
        if not earlier or {**earlier[-1], "time": None} != {"time": None, **said}:
            time = datetime.now(UTC).isoformat(timespec="seconds")
            file.append({"time": time, **said})


def main() -> None:
    """Answer one request; without an answer nothing runs."""
    have_home()
    asked = json.loads(sys.stdin.buffer.readline())
    fab = sys.stdin.buffer.read()
    answer, sys.stdout = sys.stdout, sys.stderr
    home = Path(os.environ.get("FLWR_HOME") or Path.home() / ".flwr").absolute()
    decision = decide(RunRequest(**asked), fab, guard_folder(), home / GUARDED_APPS)
    json.dump(asdict(decision), answer)


if __name__ == "__main__":
    main()
