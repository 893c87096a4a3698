from pathlib import Path

from task.config import read_config
from task.progress import duration
from task.reporting.run_summary import (
    describe_run,
    key_figures,
    summary_lines,
)
from task.runs.evaluations import evaluation_of
from task.runs.records import TEST, Record, records_of
from task.runs.run import Run
from tests.helpers import evaluated, losses, written_run


def test_run_that_no_client_has_answered_says_where_it_runs(tmp_path: Path) -> None:
    machine = {"device": "cpu", "setting": "real nodes", "versions": {"torch": "9"}, "code": "ab"}
    run = written_run(tmp_path / "run", [], rounds_done=0, files={"machine.json": machine})
    history = Run(run)
    assert (history.setting, history.clients) == ("real nodes", [])
    assert (history.versions, history.code) == ({"torch": "9"}, "ab")
    assert describe_run(history)[0].startswith("No client has answered yet. 0 of 2 rounds")
    assert "clients" not in dict(key_figures(history))


def test_run_ends_with_few_lines_of_what_it_found(tmp_path: Path) -> None:
    report = evaluation_of(evaluated())
    recorded = [
        *losses(1, {0: 0.5, 1: 0.7}),
        *losses(2, {0: 0.25, 1: 0.35}),
        *records_of(2, {"round_seconds": 100.0, "seconds_training": 75.0}),
        Record(2, "loss", 0.4, reference=TEST),
        *report.records.all,
        Record(2, "seconds_evaluating", 25.0),
    ]
    run = written_run(tmp_path / "run", recorded, rounds_done=2)
    text = "\n".join(lines := summary_lines(Run(run)))
    assert len(lines) <= 15
    for words in (
        "2 of 2",
        "0.3 (round 2)",
        "2:05",
        "25%",
        "2.5 (real images 2.5; classifier, correct, n=897)",
    ):
        assert words in text
    assert duration(3723) == "1:02:03"
    assert read_config(run / "config.yaml").run_name == "run"
