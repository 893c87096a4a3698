from pathlib import Path

import pytest

from server_app.hospitals.registry import Hospital, HospitalsFile, check_name

FIRST = Hospital("north", "SHA256:a", "ecdsa-sha2-nistp384 AAAA", (11,))


def test_key_keeps_all_its_node_ids_and_the_last_name(tmp_path: Path) -> None:
    file = HospitalsFile(tmp_path / "state" / "hospitals")
    other = Hospital("south", "SHA256:b", "ecdsa-sha2-nistp384 BBBB", (12,))
    renamed = Hospital("northern", "SHA256:a", FIRST.public_key, (21,))
    for each in (FIRST, other, renamed):
        with file.held():
            file.add(each)
    known = file.hospitals()
    assert [*known] == ["SHA256:a", "SHA256:b"]
    assert known["SHA256:a"] == Hospital("northern", "SHA256:a", FIRST.public_key, (11, 21))
    assert {node: each.name for node, each in file.by_node().items()} == {
        11: "northern",
        21: "northern",
        12: "south",
    }


def test_what_is_known_is_not_written_again(tmp_path: Path) -> None:
    path = tmp_path / "hospitals"
    file = HospitalsFile(path)
    with file.held():
        file.add(FIRST)
        before = path.read_bytes()
        file.add(FIRST)
    assert path.read_bytes() == before


def test_damaged_file_is_named_with_the_way_out(tmp_path: Path) -> None:
    path = tmp_path / "hospitals"
    file = HospitalsFile(path)
    assert file.hospitals() == {}
    with file.held():
        file.add(FIRST)
    path.write_text(path.read_text().replace("north", "south"))
    with pytest.raises(ValueError, match=r"hospitals, line 2: .*; bring a copy of it back, or"):
        file.hospitals()


@pytest.mark.parametrize("name", ["", "  ", "a\nb", "x" * 101, "\x1b[2J"])
def test_name_that_no_log_could_show_is_refused(name: str) -> None:
    with pytest.raises(ValueError, match="NAME must be 1 to 100 printable characters, got"):
        check_name(name)
