import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from task.code_version import ROOT, code_fingerprint


def fingerprint_of(checkout: Path) -> str:
    """Ask a new process, as every node is one."""
    result = subprocess.run(
        [sys.executable, "-c", "from task.code_version import *; print(code_fingerprint())"],
        cwd=checkout,
        env={**os.environ, "PYTHONPATH": str(checkout), "PYTHONDONTWRITEBYTECODE": "1"},
        capture_output=True,
        text=True,
        check=True,
    )
    return result.stdout.strip()


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    for folder in ("task", "client_app", "server_app", "conf"):
        shutil.copytree(
            ROOT / folder, tmp_path / folder, ignore=shutil.ignore_patterns("__pycache__")
        )
    return tmp_path


def test_fingerprint_is_the_same_wherever_the_code_lies(checkout: Path) -> None:
    assert re.fullmatch(r"[0-9a-f]{16}", code_fingerprint())
    assert fingerprint_of(checkout) == code_fingerprint()


@pytest.mark.parametrize(
    "file",
    [
        *(
            "task/training/loop.py",
            "task/__init__.py",
            "client_app/app.py",
            "conf/data/digits.yaml",
        ),
        "server_app/strategies.py",
    ],
)
def test_one_byte_more_is_another_fingerprint(checkout: Path, file: str) -> None:
    with (checkout / file).open("ab") as source:
        source.write(b"\n")
    assert fingerprint_of(checkout) != code_fingerprint()


def test_moved_code_is_another_fingerprint(checkout: Path) -> None:
    (checkout / "task" / "files.py").rename(checkout / "task" / "file.py")
    assert fingerprint_of(checkout) != code_fingerprint()


def test_new_configuration_is_another_fingerprint(checkout: Path) -> None:
    shutil.copy(checkout / "conf" / "data" / "digits.yaml", checkout / "conf" / "data" / "x.yaml")
    assert fingerprint_of(checkout) != code_fingerprint()


@pytest.mark.parametrize(
    "file",
    [
        "task/__pycache__/train.cpython-311.pyc",
        # Flower's bundle holds none of these, so only one side would have them.
        "conf/data/digits.yaml.orig",
        "conf/.DS_Store",
    ],
)
def test_what_clients_do_not_run_leaves_the_fingerprint(checkout: Path, file: str) -> None:
    (checkout / file).parent.mkdir(exist_ok=True)
    with (checkout / file).open("ab") as other:
        other.write(b"\n")
    assert fingerprint_of(checkout) == code_fingerprint()
