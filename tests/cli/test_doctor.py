import os
import re
from contextlib import closing
from pathlib import Path

import pytest
from typer.testing import CliRunner

from task.cli.doctor import data_sets, describe_runs, disks
from task.cli.findings import free_disk
from task.cli.main import app
from task.data.packaged import TORCHVISION_SETS
from task.lock import hold
from task.runs.layout import LOCK_FILE
from tests.cli.test_cli import finished_run
from tests.data.test_data_files import write_tree


def test_doctor_names_versions_devices_and_what_is_missing(tmp_path: Path) -> None:
    finished_run(tmp_path)
    (tmp_path / "none").mkdir()
    arguments = ["doctor", "--data-root", str(tmp_path / "none"), "--runs", str(tmp_path)]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output
    said = {name: found for name, found in re.findall(r"^  (\S+) +(\S.*)$", result.stdout, re.M)}
    assert said["torch"].startswith("2.") and re.match(r"\d+ cores", said["cpu"])
    assert said["digits"] == "there" and said["mnist"].startswith("missing in")
    assert said["tiny"] == "finished, 0 rounds"
    assert result.stdout.endswith("feddm can train here: feddm-train\n")


def test_data_sets_are_found_where_they_lie(tmp_path: Path) -> None:
    _, folder, files = TORCHVISION_SETS["svhn"]
    for file in files:
        (tmp_path / folder / file).touch()
    write_tree(tmp_path / "chestxray", {"normal": 2, "pneumonia": 3})
    found = dict(data_sets(tmp_path))
    assert found["svhn"] == "there"
    assert found["chest_xray"] == f"there: 5 images in {tmp_path / 'chestxray'}"
    assert found["odir"].startswith("missing: ")


def test_folder_of_data_sets_that_is_not_there_is_an_error(tmp_path: Path) -> None:
    result = CliRunner().invoke(app, ["doctor", "--data-root", str(tmp_path / "none")])
    assert (result.exit_code, result.stdout) == (1, "")
    assert result.stderr == f"feddm: --data-root: there is no folder {tmp_path / 'none'}\n"


def test_room_is_said_of_the_folder_that_is_there(tmp_path: Path) -> None:
    assert free_disk(tmp_path).endswith(f" GiB at {tmp_path}")
    assert free_disk(tmp_path / "a" / "b").endswith(
        f" GiB at {tmp_path}, where {tmp_path / 'a' / 'b'} would be made"
    )


def test_run_that_a_process_holds_is_running(tmp_path: Path) -> None:
    run = finished_run(tmp_path)
    (run / "model.safetensors").unlink()
    assert list(describe_runs(tmp_path)) == [("tiny", "not finished, 0 rounds")]
    with closing(hold(run / LOCK_FILE, "run_name", patience=0)):
        expected = f"running (process {os.getpid()}), 0 rounds"
        assert list(describe_runs(tmp_path)) == [("tiny", expected)]


def test_folder_of_runs_may_be_empty(tmp_path: Path) -> None:
    assert list(describe_runs(tmp_path / "none")) == [("", "none")]


def test_place_that_cannot_be_written_is_a_problem(tmp_path: Path) -> None:
    # Not even root can make a file there.
    with pytest.raises(OSError):
        list(disks(Path("/proc/self")))
