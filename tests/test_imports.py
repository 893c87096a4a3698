"""Who may import whom, and that no name means two things."""

import ast
import subprocess
import sys
import tomllib
from collections import Counter
from graphlib import TopologicalSorter
from io import BytesIO
from pathlib import Path
from zipfile import ZipFile

import pytest
from flwr.cli.build import build_fab_from_disk

from feddm import load_run
from task.runs import run as runs

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("task", "server_app", "client_app", "node_guard")
FILES = [file for package in PACKAGES for file in sorted((ROOT / package).rglob("*.py"))]
HYDRA = {ROOT / "task/config/compose.py", ROOT / "server_app/launch/feddm_train.py"}
# Copied into the folder of an export, where they import nothing of feddm.
EXPORTED = {ROOT / "task/export/drawing.py", *(ROOT / "task/export").glob("sample_*.py")}
# A program's entry, its commands, the log of a module and what any array library has.
EACH_HAS_ONE = {"main", "app", "_log", "Array"}
FORBIDDEN = {
    "task": {"server_app", "client_app", "flwr"},
    "server_app": {"client_app"},
    "client_app": {"server_app"},
    "node_guard": {"server_app", "client_app", "task"},
}
# The packages of task, each of which imports earlier ones alone.
LAYERS = (
    "config",
    "data",
    "privacy",
    "generators",
    "training",
    "protocol",
    "guard",
    "generation",
    "runs",
    "evaluation",
    "audit",
    "reporting",
    "export",
    "cli",
)


def imported(source: str, package: str) -> set[str]:
    """Name every module that a source imports, wherever in it, with what it takes from it."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            module = node.module or ""
            if node.level > 0:
                module = f"{package}.{module}".rstrip(".")
            found |= {module} | {f"{module}.{alias.name}" for alias in node.names}
    return found


def top_levels(file: Path) -> set[str]:
    package = file.relative_to(ROOT).parts[0]
    return {name.split(".")[0] for name in imported(file.read_text(encoding="utf-8"), package)}


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(ROOT)))
def test_packages_import_only_what_they_may(file: Path) -> None:
    package = file.relative_to(ROOT).parts[0]
    assert top_levels(file).isdisjoint(FORBIDDEN[package])


def test_hydra_is_imported_where_configurations_are_made_and_nowhere_else() -> None:
    assert {file for file in FILES if "hydra" in top_levels(file)} == HYDRA


def test_packages_of_task_import_none_above_them() -> None:
    assert {file.parent.name for file in (ROOT / "task").glob("*/__init__.py")} == {*LAYERS}
    upwards = [
        (str(file.relative_to(ROOT)), name)
        for place, layer in enumerate(LAYERS)
        for file in (ROOT / "task" / layer).rglob("*.py")
        for name in imported(file.read_text(encoding="utf-8"), f"task.{layer}")
        if name.startswith("task.") and name.split(".")[1] in LAYERS[place + 1 :]
    ]
    assert upwards == []


def test_task_has_no_circles() -> None:
    modules = {
        ".".join(file.relative_to(ROOT).with_suffix("").parts): file
        for file in FILES
        if file.is_relative_to(ROOT / "task")
    }
    graph = {
        name: imported(file.read_text(encoding="utf-8"), "task") & modules.keys()
        for name, file in modules.items()
    }
    TopologicalSorter(graph).prepare()  # raises on a circle


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("import flwr.app as app", "flwr.app"),
        ("from flwr.app import Message", "flwr.app"),
        ("from flwr import app", "flwr.app"),
        ("def f():\n    import flwr", "flwr"),
        ("from . import wire", "task.wire"),
        ("from .wire import Key", "task.wire"),
    ],
)
def test_every_form_of_import_is_seen(source: str, expected: str) -> None:
    assert expected in imported(source, "task")


def defined(file: Path) -> set[str]:
    """Name what a module defines at its top, but for the modules' own `__all__` and the like."""
    names = set()
    for node in ast.parse(file.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            names.add(node.name)
        elif isinstance(node, ast.Assign | ast.AnnAssign):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            names |= {target.id for target in targets if isinstance(target, ast.Name)}
    return {name for name in names if not name.startswith("__")}


def test_one_name_means_one_thing() -> None:
    everywhere = Counter(
        name for file in FILES if file not in EXPORTED for name in defined(file) - EACH_HAS_ONE
    )
    assert [name for name, number in everywhere.items() if number > 1] == []


def test_python_interface_is_one_module() -> None:
    assert load_run is runs.load_run
    # As it lies in a wheel; conf/ stands beside the packages there as well.
    pyproject = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    wheel = pyproject["tool"]["hatch"]["build"]["targets"]["wheel"]["packages"]
    assert set(wheel) == {*PACKAGES, "conf", "feddm.py"}


def test_flower_takes_defaults_and_templates_along() -> None:
    with ZipFile(BytesIO(build_fab_from_disk(ROOT))) as bundle:
        held = bundle.namelist()
    for folder in ("conf", "task/reporting/templates"):
        files = [file.relative_to(ROOT).as_posix() for file in (ROOT / folder).rglob("*.*")]
        assert files and set(files) <= set(held)


@pytest.mark.parametrize("name", ["task.py", "task/__init__.py"])
def test_other_task_in_the_readers_folder_is_named(name: str, tmp_path: Path) -> None:
    other = tmp_path / name
    other.parent.mkdir(exist_ok=True)
    other.write_text("MINE = 1\n", encoding="utf-8")
    command = [sys.executable, "-c", "from feddm import load_run"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    said = done.stderr.splitlines()[-1]
    assert said == (
        f"ImportError: feddm needs its package `task` in {ROOT / 'task'}, and Python finds {other} "
        "first; rename that file or folder, or start Python elsewhere"
    )


def test_folder_of_pictures_named_task_is_no_hindrance(tmp_path: Path) -> None:
    (tmp_path / "task").mkdir()
    command = [sys.executable, "-c", "from feddm import load_run"]
    subprocess.run(command, cwd=tmp_path, check=True)
