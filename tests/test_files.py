import errno
import os
import stat
from collections.abc import Iterator
from pathlib import Path

import pytest

from task.files import atomic_folder, atomic_path, naming_full_disk, remove_left_overs


@pytest.fixture
def umask() -> Iterator[int]:
    before = os.umask(0o027)
    yield 0o027
    os.umask(before)


def test_block_that_succeeds_replaces_the_file(tmp_path: Path) -> None:
    file = tmp_path / "metrics.jsonl"
    file.write_text("old")
    with atomic_path(file) as aside:
        aside.write_text("new")
        assert file.read_text() == "old"
    assert file.read_text() == "new"
    assert [*tmp_path.iterdir()] == [file]


def test_block_that_succeeds_makes_a_new_file(tmp_path: Path) -> None:
    file = tmp_path / "new.json"
    with atomic_path(file) as aside:
        assert not file.exists()
        aside.write_bytes(b"\0" * 1000)
    assert file.read_bytes() == b"\0" * 1000


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, SystemExit])
def test_block_that_fails_leaves_the_old_file_and_nothing_else(
    tmp_path: Path, error: type[BaseException]
) -> None:
    file = tmp_path / "config.yaml"
    file.write_text("old")
    with pytest.raises(error, match="in the block"), atomic_path(file) as aside:
        aside.write_text("half")
        raise error("in the block")
    assert file.read_text() == "old"
    assert [*tmp_path.iterdir()] == [file]


def test_block_that_fails_leaves_no_new_file(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="stop"), atomic_path(tmp_path / "new") as aside:
        aside.write_text("half")
        raise ValueError("stop")
    assert [*tmp_path.iterdir()] == []


def test_block_may_replace_the_file_it_was_given(tmp_path: Path) -> None:
    # As libraries do that write atomically themselves.
    file = tmp_path / "picture.png"
    with atomic_path(file) as aside:
        other = tmp_path / "other"
        other.write_text("whole")
        other.replace(aside)
    assert file.read_text() == "whole"
    assert [*tmp_path.iterdir()] == [file]


def test_two_writers_of_one_file_do_not_meet(tmp_path: Path) -> None:
    file = tmp_path / "file.json"
    with atomic_path(file) as one, atomic_path(file) as other:
        assert one != other
        one.write_text("one")
        other.write_text("other")
    assert file.read_text() == "one"  # its block ended last
    assert [*tmp_path.iterdir()] == [file]


def test_path_keeps_folder_and_suffix_and_is_hidden(tmp_path: Path) -> None:
    # Writers choose a format by the suffix; readers of the folder pass hidden files over.
    with atomic_path(tmp_path / "round_0001.png") as aside:
        assert aside.parent == tmp_path
        assert aside.suffix == ".png" and aside.name.startswith(".")
        assert not [*tmp_path.glob("round_*")]


def test_permissions_are_those_of_any_new_file(tmp_path: Path, umask: int) -> None:
    with atomic_path(tmp_path / "file") as aside:
        assert stat.S_IMODE(aside.stat().st_mode) == 0o600
    assert stat.S_IMODE((tmp_path / "file").stat().st_mode) == 0o666 & ~umask
    assert os.umask(umask) == umask


def test_missing_folder_is_said_to_be_missing(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="nowhere"), atomic_path(tmp_path / "nowhere" / "x"):
        pytest.fail("the block must not run")


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT])
def test_full_disk_is_named_with_the_way_out(tmp_path: Path, number: int) -> None:
    with pytest.raises(OSError, match=f"disk of {tmp_path}: make some") as caught:  # noqa: SIM117
        with naming_full_disk(tmp_path):
            raise OSError(number, os.strerror(number))
    assert caught.value.errno == number


def test_other_errors_of_a_disk_stay_as_they_are(tmp_path: Path) -> None:
    refused = PermissionError(errno.EACCES, "no", "file")
    with pytest.raises(PermissionError) as caught, naming_full_disk(tmp_path):
        raise refused
    assert caught.value is refused


def test_left_overs_of_one_file_are_removed_and_others_stay(tmp_path: Path) -> None:
    file = tmp_path / "round_0001.png"
    with pytest.raises(KeyboardInterrupt), atomic_path(file) as aside:
        kept_by_a_kill = tmp_path / aside.name.replace("-", "-killed")
        kept_by_a_kill.write_text("half")
        raise KeyboardInterrupt
    others = [file, tmp_path / ".round_0002-x.png", tmp_path / ".round_0001-x.json"]
    for other in others:
        other.touch()
    remove_left_overs(file)
    assert sorted(tmp_path.iterdir()) == sorted(others)


def test_atomic_folder_replaces_a_folder_whole_or_not_at_all(tmp_path: Path) -> None:
    folder = tmp_path / "new" / "folder"
    with atomic_folder(folder) as aside:
        (aside / "first").touch()
        assert not folder.exists()
    with pytest.raises(ValueError, match="half"), atomic_folder(folder) as aside:
        (aside / "second").touch()
        raise ValueError("half")
    assert [path.name for path in folder.iterdir()] == ["first"]
    with atomic_folder(folder) as aside:
        (aside / "third").touch()
    assert [path.name for path in folder.iterdir()] == ["third"]
    assert [path.name for path in folder.parent.iterdir()] == ["folder"]


def test_atomic_folder_that_cannot_take_its_place_brings_the_old_one_back(tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "only copy").touch()
    with pytest.raises(FileNotFoundError), atomic_folder(folder) as aside:
        aside.rmdir()  # so that the last rename fails
    assert [path.name for path in folder.iterdir()] == ["only copy"]
    assert [*tmp_path.iterdir()] == [folder]


def test_atomic_folder_has_the_permissions_of_any_new_one(tmp_path: Path, umask: int) -> None:
    with atomic_folder(tmp_path / "folder") as aside:
        (aside / "within").mkdir()
        (aside / "within" / "file").touch(mode=0o600)
    for name, mode in (("folder", 0o777), ("folder/within", 0o777), ("folder/within/file", 0o666)):
        assert stat.S_IMODE((tmp_path / name).stat().st_mode) == mode & ~umask


def test_atomic_folder_removes_what_killed_ones_left_of_it_alone(tmp_path: Path) -> None:
    folder = tmp_path / "onnx"
    with atomic_folder(folder) as aside:
        left = aside.parent.with_name(aside.parent.name.replace(".onnx-", ".onnx-client-1-"))
        killed = tmp_path / ".onnx-k1ll_d00.partial"
        others = [left, tmp_path / ".onnx-of-mine", tmp_path / ".safetensors-k1ll_d00.partial"]
        for made in (killed, *others):
            made.mkdir()
            (made / "half").touch()
    assert sorted(tmp_path.iterdir()) == sorted([folder, *others])


def test_atomic_folder_follows_a_link_and_a_relative_path(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("disk").mkdir()
    Path("link").symlink_to("disk")
    with atomic_folder(Path("link")) as aside:
        (aside / "file").touch()
    assert Path("link").is_symlink() and Path("disk/file").exists()
