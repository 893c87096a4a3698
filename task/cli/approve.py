"""`feddm approve`: what a bundle of code changes, and the hospital's yes to it."""

from collections.abc import Callable
from pathlib import Path

from task.guard.approvals import Approvals, describe_changes
from task.guard.bundle import Bundle, fab_of


def approve_bundle(
    path: Path, folder: Path, *, agree: Callable[[], bool], say: Callable[[str], object]
) -> None:
    """Show what is new in a bundle, and add it to the list of a guard after a yes.

    Args:
        path: a .fab file, or the folder of an app.
        folder: of the guard.
        agree: asks the reader; called once the changes were shown.
        say: takes the text for the reader.

    Raises:
        OSError: it cannot be read, or the list cannot be written.
        ValueError: it is no bundle, the list is damaged, or the reader does not agree.
    """
    fab = fab_of(path)
    bundle = Bundle.of_fab(fab)
    approvals = Approvals(folder)
    name, version = bundle.app
    if bundle.sha256 in approvals.hashes():
        say(f"{name} {version} with SHA-256 {bundle.sha256} was approved before")
        return
    last = approvals.last()
    if last is None:
        say("no bundle was approved before: all of it is new")
    else:
        say(f"against the one approved last, {last.sha256}:")
    for line in describe_changes(last, bundle):
        say(line)
    say(f"\n{name} {version}, SHA-256 {bundle.sha256}")
    if not agree():
        raise ValueError("BUNDLE: not approved, and the node goes on refusing it")
    approvals.add(bundle, fab)
    say("approved")
