from pathlib import Path

from task.machine_memory import free_memory, total_memory


def test_total_memory_is_that_of_the_container_where_it_has_less(tmp_path: Path) -> None:
    whole = total_memory(tmp_path)
    (tmp_path / "memory.max").write_text("max\n")
    assert total_memory(tmp_path) == whole > 2**28
    (tmp_path / "memory.max").write_text(f"{2**28}\n")
    assert total_memory(tmp_path) == 2**28


def test_free_memory_is_that_of_the_container_where_it_has_less(tmp_path: Path) -> None:
    assert 2**20 < free_memory(tmp_path) < total_memory(tmp_path)
    (tmp_path / "memory.max").write_text("3000\n")
    (tmp_path / "memory.current").write_text("1000\n")
    assert free_memory(tmp_path) == 2000
