import sqlite3
import subprocess
from contextlib import closing
from pathlib import Path

import pytest

from server_app.supervisor.superlink import check_database
from tests.processes import COMMANDS


def write_database(file: Path) -> None:
    with closing(sqlite3.connect(file)) as database:
        database.execute("CREATE TABLE numbers (n INTEGER, text TEXT)")
        database.executemany(
            "INSERT INTO numbers VALUES (?, ?)", [(n, "x" * 100) for n in range(999)]
        )
        database.execute("CREATE INDEX by_text ON numbers (text, n)")
        database.commit()


def test_whole_or_new_database_is_let_pass(tmp_path: Path) -> None:
    check_database(tmp_path / "new.db")
    assert not (tmp_path / "new.db").exists()
    write_database(tmp_path / "whole.db")
    check_database(tmp_path / "whole.db")


@pytest.mark.parametrize("place", [0, 5000, 60_000])
def test_damaged_database_ends_the_superlink_in_a_line(tmp_path: Path, place: int) -> None:
    file = tmp_path / "superlink.db"
    write_database(file)
    with file.open("r+b") as opened:
        opened.seek(place)
        opened.write(b"\xff" * 4096)
    before = file.read_bytes()
    ended = subprocess.run(
        [COMMANDS / "feddm-superlink", "--insecure", "--database", file],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert ended.returncode == 1 and "Traceback" not in ended.stderr
    (line,) = ended.stdout.splitlines()
    assert f"--database must be a SQLite database that is whole, got {file} (" in line
    assert "put a back-up in its place, or move it away" in line
    assert file.read_bytes() == before


def test_database_that_cannot_be_read_now_is_not_called_damaged(tmp_path: Path) -> None:
    file = tmp_path / "superlink.db"
    write_database(file)
    with closing(sqlite3.connect(file)) as other:
        other.execute("BEGIN EXCLUSIVE")
        with pytest.raises(OSError, match=r"cannot be read now \(database is locked\): end the"):
            check_database(file)
    (tmp_path / "folder.db").mkdir()
    with pytest.raises(OSError, match="cannot be read now"):
        check_database(tmp_path / "folder.db")
