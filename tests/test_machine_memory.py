from pathlib import Path

import pytest

from task.machine_memory import free_memory, total_memory


@pytest.fixture(autouse=True)
def container(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr("task.machine_memory.CONTAINER", tmp_path)
    return tmp_path


def test_total_memory_is_that_of_the_container_where_it_has_less(container: Path) -> None:
    whole = total_memory()
    (container / "memory.max").write_text("max\n")
    assert total_memory() == whole > 2**28
    (container / "memory.max").write_text(f"{2**28}\n")
    assert total_memory() == 2**28


def test_free_memory_is_that_of_the_container_where_it_has_less(container: Path) -> None:
    assert 2**20 < free_memory() < total_memory()
    (container / "memory.max").write_text("3000\n")
    (container / "memory.current").write_text("1000\n")
    assert free_memory() == 2000
