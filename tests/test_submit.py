import dataclasses
from pathlib import Path

import pytest

from server_app.submit import equal_finished_run, go_on_with_sweep, train
from task.config import Config, load_run_config
from tests.helpers import SMALL_RUN

CENTRALIZED = {"train.mode": "centralized", "federation.rounds": 1, "eval.num_images": 10}


@pytest.fixture(scope="module")
def sweep(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("sweep")


def job(sweep: Path, name: str, **changes: str | int | bool) -> Config:
    config = load_run_config(
        {**SMALL_RUN, **CENTRALIZED, "output_dir": str(sweep), "run_name": name}
    )
    return dataclasses.replace(config, **changes)  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def finished(sweep: Path) -> Path:
    train(job(sweep, "first"), [])
    return sweep / "first"


def test_finished_job_is_found_under_another_name_and_preset(sweep: Path, finished: Path) -> None:
    assert equal_finished_run(job(sweep, "first")) == finished
    assert equal_finished_run(job(sweep, "second", experiment="table2")) == finished


def test_precision_left_open_takes_what_the_finished_job_settled(
    sweep: Path, finished: Path
) -> None:
    config = job(sweep, "second")
    config = dataclasses.replace(config, train=dataclasses.replace(config.train, precision="auto"))
    assert equal_finished_run(config) == finished


@pytest.mark.parametrize(
    "changes", [{"seed": 1}, {"train": {"lr": 0.5}}, {"federation": {"rounds": 2}}]
)
def test_other_job_is_not_taken_for_the_finished_one(
    sweep: Path, finished: Path, changes: dict
) -> None:
    config = job(sweep, "first")
    for name, value in changes.items():
        if isinstance(value, dict):
            value = dataclasses.replace(getattr(config, name), **value)
        config = dataclasses.replace(config, **{name: value})
    assert equal_finished_run(config) is None


def test_job_whose_measurement_is_missing_is_not_finished(sweep: Path, finished: Path) -> None:
    kept = (finished / "metrics.jsonl").read_text()
    lines = [line for line in kept.splitlines(True) if "class_agreement" not in line]
    (finished / "metrics.jsonl").write_text("".join(lines))
    assert equal_finished_run(job(sweep, "first")) is None
    (finished / "metrics.jsonl").write_text(kept)


def test_resume_of_a_sweep_is_for_the_runs_that_it_has_begun(sweep: Path, finished: Path) -> None:
    assert go_on_with_sweep(job(sweep, "first", resume=True)).resume
    assert not go_on_with_sweep(job(sweep, "never-begun", resume=True)).resume
    assert not go_on_with_sweep(job(sweep, "first")).resume


def test_moved_sweep_is_still_finished(sweep: Path, finished: Path, tmp_path: Path) -> None:
    moved = tmp_path / "moved"
    (sweep / "first").rename(moved.parent / "aside")
    moved.mkdir()
    (moved.parent / "aside").rename(moved / "first")
    assert equal_finished_run(job(moved, "second")) == moved / "first"
    (moved / "first").rename(sweep / "first")
