"""`feddm privacy`: what runs have spent of the privacy of a hospital's patients."""

from collections.abc import Callable

from task.privacy.ledger import Ledger
from task.reporting.metric_table import Row, lay_out


def show_ledger(ledger: Ledger, *, say: Callable[[str], object]) -> None:
    """Print what each run has spent, and what is left.

    Args:
        ledger: of the node.
        say: takes the text for the reader.

    Raises:
        DamagedFileError: the ledger is not as it was written.
        FileNotFoundError: there is none.
    """
    if not ledger.folder.is_dir():
        raise FileNotFoundError(
            f"--output-path: no private run has been here, there is no {ledger.folder}; it is the "
            "node's output-path that holds the ledger"
        )
    rows: list[Row] = [("run", "name", "rounds", "steps", "patients", "epsilon")]
    for run in ledger.runs():
        numbers = (run.rounds, run.steps, run.patients)
        rows.append((run.run_id, run.run_name, *map(str, numbers), f"{run.epsilon:.4g}"))
    say(lay_out(rows))
    most, patients = ledger.spent()
    say(f"\npatients: {patients}; at delta={ledger.delta:g} the most spent on one: {most:.4g}")
    if ledger.max_epsilon is None:
        say("no limit was given (--max-epsilon)")
    else:
        left = max(ledger.max_epsilon - most, 0.0)
        say(f"of max-epsilon={ledger.max_epsilon:g} that patient has {left:.4g} left")
