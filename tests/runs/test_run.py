from pathlib import Path
from typing import Any

import pytest

from task.reporting.warning_signs import (
    warning_signs,
)
from task.runs.records import TRAIN
from task.runs.run import Run
from tests.helpers import left_out, losses, written_run


def test_run_holds_what_was_recorded_of_complete_rounds(tmp_path: Path) -> None:
    recorded = [
        *losses(1, {0: 0.5, 1: 0.7}),
        *losses(2, {0: 0.3}),
        left_out(2, 1, "node unavailable"),
        *losses(3, {0: 9.0, 1: 9.0}),
    ]
    files: dict[str, Any] = {"partition.json": {"train_counts": [[1] * 10, [2] * 10, [0] * 10]}}
    run = written_run(tmp_path / "run", recorded, rounds_done=2, files=files, federation__rounds=4)
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"round": 3, "metr')
    history = Run(run)
    assert (history.rounds_done, history.finished, history.running) == (2, False, False)
    records = history.records
    assert records.series("loss", reference=TRAIN) == {1: pytest.approx(0.6), 2: 0.3}
    assert records.of_clients("loss", reference=TRAIN) == {0: {1: 0.5, 2: 0.3}, 1: {1: 0.7}}
    assert records.left_out == [left_out(2, 1, "node unavailable")]
    assert (history.clients, history.num_images) == ([0, 1, 2], 30)
    states = history.participation()
    assert (states[1, 1], states[2, 1], states[2, 2]) == ("trained", "left out", "not there")
    signs = "\n".join(warning_signs(history))
    for words in (
        "2 of 4 rounds are done",
        "Client 1 was left out once in 1 round",
        "Client 2 was",
    ):
        assert words in signs


def test_real_nodes_and_pooled_data_are_told_apart(tmp_path: Path) -> None:
    told = {"classes": ["0"], "clients": {"0": None, "1": [5] * 10}}
    files = {"nodes.json": {"123": 0, "456": 1}, "class_counts.json": told}
    nodes = Run(written_run(tmp_path / "nodes", [], rounds_done=0, files=files))
    assert (nodes.setting, nodes.clients, nodes.num_images) == ("real nodes", [0, 1], 50)
    pooled = {"pooled.json": {"train_counts": [7] * 10, "test_counts": [1] * 10}}
    run = written_run(
        tmp_path / "pooled", [], rounds_done=2, files=pooled, train__mode="centralized"
    )
    history = Run(run)
    assert (history.setting, history.clients, history.num_images) == ("centralized", [], 70)
    assert history.finished and warning_signs(history) == []


def test_folder_without_a_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=f"RUN: {tmp_path} holds no run"):
        Run(tmp_path)
