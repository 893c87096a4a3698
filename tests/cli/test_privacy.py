"""`feddm privacy` on a hospital's machine."""

from pathlib import Path

from typer.testing import CliRunner

from task.cli.main import app
from task.privacy.accounting import Spending, epsilon_of
from task.privacy.ledger import Charge
from task.protocol.node import NodeConfig, ledger_of

STEPS = Spending(10.0, 1.0, 3)


def test_ledger_is_printed_with_what_is_left(tmp_path: Path) -> None:
    command = ["privacy", "--output-path", str(tmp_path)]
    none = CliRunner().invoke(app, command)
    assert none.exit_code == 1 and none.stderr.startswith("feddm: --output-path: no private run")
    ledger = ledger_of(NodeConfig(output_path=str(tmp_path)))
    for server_round in (1, 2):
        ledger.charge(Charge("4711", "lungs", server_round, STEPS), [[b"ann"], [b"bob"]])
    ledger.charge(Charge("4712", "eyes", 1, STEPS), [[b"ann"]])
    shown = CliRunner().invoke(app, [*command, "--max-epsilon", "5"])
    assert shown.exit_code == 0, shown.output
    lines = [line.split() for line in shown.stdout.splitlines()]
    of_a_run = epsilon_of([Spending(10.0, 1.0, 6)], 1e-5)
    of_ann = epsilon_of([Spending(10.0, 1.0, 9)], 1e-5)
    assert lines[2] == ["4711", "lungs", "2", "6", "2", f"{of_a_run:.4g}"]
    assert f"patients: 2; at delta=1e-05 the most spent on one: {of_ann:.4g}" in shown.stdout
    assert f"of max-epsilon=5 that patient has {5 - of_ann:.4g} left" in shown.stdout
    file = ledger.folder / "ledger.jsonl"
    file.write_bytes(file.read_bytes().replace(b"4711", b"4710", 1))
    damaged = CliRunner().invoke(app, command)
    assert damaged.exit_code == 1
    assert f"{file}, line 2: its checksum is another; bring the whole" in damaged.stderr
