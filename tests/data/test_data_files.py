"""Data sets that lie in files: trees of pictures and DICOM, ODIR-5K's table, the cache."""

import csv
import errno
import json
import logging
import multiprocessing
import os
import shutil
import stat
import warnings
import zipfile
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw

from client_app.workspace import Workspace
from task.config import hydra_override, load_config
from task.data import Dataset, build_dataset, cache, take_inventory
from task.data.cache import cache_key, cached_images, read_state, report_unreadable
from task.data.listing import class_label
from task.data.pictures import decode_picture
from task.data.shape import resize_decoded
from tests.helpers import bound_by_modes, node_context
from tests.image_files import HOUNSFIELD, RESCALED, picture, write_dicom

SHARED = Path(__file__).resolve().parents[3] / "shared" / "data"


def shared_zip(name: str) -> object:
    return pytest.mark.skipif(not (SHARED / name).is_file(), reason=f"no {name} in {SHARED}")


def unpack(name: str, folder: Path, *, every: int) -> list[str]:
    with zipfile.ZipFile(SHARED / name) as archive:
        chosen = archive.namelist()[::every]
        archive.extractall(folder, chosen)
    return chosen


def load(root: Path, name: str = "image_folder", **options: object) -> Dataset:
    values: dict[str, object] = {
        "root": str(root),
        "classes": ["a", "b"],
        "image_size": 8,
        "channels": 3,
        "fit": "stretch",
        "test_fraction": None,
        "cache_dir": str(root.parent / "cache"),
        **options,
    }
    words = [hydra_override(f"data.{key}", value) for key, value in values.items()]
    return build_dataset(load_config([f"data={name}", *words]), download=False)


def write_tree(root: Path, sizes: dict[str, int]) -> None:
    """Write so many PNG files of 8x8 into each of the folders, each picture another."""
    seed = 0
    for folder, number in sizes.items():
        (root / folder).mkdir(parents=True, exist_ok=True)
        for i in range(number):
            Image.fromarray(picture(seed)).save(root / folder / f"{i:03}.png")
            seed += 1


# Trees of class folders.


def test_tree_with_both_splits_keeps_every_pixel_and_label(tmp_path: Path) -> None:
    write_tree(tmp_path / "set", {"train/b": 2, "train/a": 1, "test/a": 1, "test/b": 1})
    found = load(tmp_path / "set")
    assert found.train.labels.tolist() == [0, 1, 1] and found.test.labels.tolist() == [0, 1]
    expected = [picture(seed).transpose(2, 0, 1) for seed in (2, 0, 1)]
    assert np.array_equal(found.train.images, expected)
    assert np.array_equal(found.test.images[1], picture(4).transpose(2, 0, 1))
    assert found.train.groups is None


@pytest.mark.parametrize("layout", ["", "train/"])
def test_tree_without_test_folder_is_split_by_class_and_seed(tmp_path: Path, layout: str) -> None:
    write_tree(tmp_path / "set", {f"{layout}a": 10, f"{layout}b": 30})
    splits = [load(tmp_path / "set", test_fraction=0.1, split_seed=seed) for seed in (0, 0, 1)]
    first, again, other = splits
    assert first.test.labels.bincount().tolist() == [1, 3]
    everything = torch.cat([first.train.images, first.test.images]).flatten(1)
    written = sorted(picture(seed).transpose(2, 0, 1).tobytes() for seed in range(40))
    assert sorted(map(bytes, everything.numpy())) == written
    assert torch.equal(first.test.images, again.test.images)
    assert not torch.equal(first.test.images, other.test.images)


def test_tree_without_test_folder_and_fraction_has_no_test_images(tmp_path: Path) -> None:
    write_tree(tmp_path / "set", {"a": 2, "b": 3})
    found = load(tmp_path / "set", channels=1)
    assert len(found.train) == 5 and found.test.images.shape == (0, 1, 8, 8)


def test_hospital_may_lack_a_class_and_nest_folders(tmp_path: Path) -> None:
    write_tree(tmp_path / "set", {"b/patient/series": 2, ".git": 1, "__MACOSX": 1})
    (tmp_path / "set" / "b" / "notes.txt").write_text("no image")
    (tmp_path / "set" / "b" / "._000.png").write_text("what macOS leaves behind")
    assert load(tmp_path / "set").train.labels.tolist() == [1, 1]


def test_folder_of_no_class_is_refused_with_both_names(tmp_path: Path) -> None:
    write_tree(tmp_path / "set", {"a": 1, "c": 1})
    with pytest.raises(ValueError, match=r"data\.classes must .*'c', got \['a', 'b'\]"):
        load(tmp_path / "set")


def test_test_folder_wins_over_test_fraction_and_that_is_said(tmp_path: Path) -> None:
    write_tree(tmp_path / "set", {"train/a": 20, "test/a": 1})
    found = load(tmp_path / "set", test_fraction=0.1)
    assert (len(found.train), len(found.test)) == (20, 1)
    assert found.note == "test/ is the test split, data.test_fraction=0.1 is not used"
    assert load(tmp_path / "set").note == ""
    (tmp_path / "set" / "test" / "a" / "000.png").unlink()
    (tmp_path / "set" / "test" / "a" / "x.txt").write_text("no image")
    emptied = load(tmp_path / "set", test_fraction=0.1)
    assert (len(emptied.train), len(emptied.test), emptied.note) == (18, 2, "")


def test_published_layout_of_chest_x_rays_is_read_by_its_preset(tmp_path: Path) -> None:
    folders = {"train/NORMAL": 2, "train/PNEUMONIA": 3, "test/NORMAL": 1, "val/NORMAL": 2}
    write_tree(tmp_path / "set", folders)
    config = load_config(
        ["data=chest_xray", f"data.root={tmp_path}/set", f"data.cache_dir={tmp_path}/cache"]
    )
    found = take_inventory(config, build_dataset(config, download=False))
    assert (found.train, found.test) == ((2, 3), (1, 0))
    assert found.left_out == {("", "outside of the class folders"): 2}
    assert found.note.endswith("data.test_fraction=0.1 is not used")


def test_missing_files_are_said_with_the_place_and_the_layout(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"data\.root=.*nowhere: there is no such folder"):
        load(tmp_path / "nowhere")
    (tmp_path / "set" / "a").mkdir(parents=True)
    (tmp_path / "set" / "a" / "x.csv").touch()
    with pytest.raises(FileNotFoundError, match=r"train/<class>/\*\.png.* named a, b; .*1 \.csv"):
        load(tmp_path / "set")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"window": [40, 400]}, r"data\.window must be null for data=image_folder"),
        ({"on_corrupt": "ignore"}, r"data\.on_corrupt must be one of refuse, skip"),
    ],
)
def test_options_that_do_not_fit_are_refused(
    options: dict[str, str], message: str, tmp_path: Path
) -> None:
    write_tree(tmp_path / "set", {"a": 1})
    with pytest.raises(ValueError, match=message):
        load(tmp_path / "set", **options)


@pytest.mark.parametrize(
    ("folder", "expected"),
    [("covid", 0), ("COVID", 0), ("non-COVID", 1), ("Non COVID", 1), ("noncovid", None)],
)
def test_folders_match_classes_whatever_their_case(folder: str, expected: int | None) -> None:
    assert class_label(folder, ["covid", "non_covid"]) == expected


def test_folder_like_two_classes_is_of_neither() -> None:
    assert class_label("A", ["a", "b"]) == 0
    assert class_label("A-b", ["a_b", "a-b"]) is None
    assert class_label("a-b", ["a_b", "a-b"]) == 1


# Pictures and DICOM files in folders; what they hold is tested in test_decode.


@pytest.mark.parametrize("wide", [False, True])
def test_pictures_become_square_by_crop_pad_or_stretch(tmp_path: Path, wide: bool) -> None:
    pixels = torch.from_numpy(picture(0, size=16)[:, :8].copy()).permute(2, 0, 1)
    pixels = pixels.mT if wide else pixels
    (tmp_path / "set" / "a").mkdir(parents=True)
    Image.fromarray(pixels.permute(1, 2, 0).numpy()).save(tmp_path / "set" / "a" / "x.png")
    middle = torch.zeros(3, 16, 16, dtype=torch.uint8)
    (middle[:, 4:12] if wide else middle[..., 4:12]).copy_(pixels)
    cropped = pixels[..., 4:12] if wide else pixels[:, 4:12]
    for fit, size, expected in (
        ("pad", 16, middle),
        ("crop", 8, cropped),
        ("crop", 16, resize_decoded(cropped.float(), 16, 3)),
        ("stretch", 16, resize_decoded(pixels.float(), 16, 3)),
    ):
        found = load(tmp_path / "set", image_size=size, fit=fit).train.images
        assert torch.equal(found[0], expected)


@shared_zip("chestxray.zip")
def test_chest_xrays_are_read_by_their_preset(tmp_path: Path) -> None:
    names = unpack("chestxray.zip", tmp_path / "set", every=20)
    config = load_config(
        ["data=chest_xray", f"data.root={tmp_path}/set", f"data.cache_dir={tmp_path}/cache"]
    )
    found = build_dataset(config, download=False)
    assert found.train.images.shape[1:] == (1, 32, 32)
    assert len(found.train) + len(found.test) == len(names)
    normal = sum("/normal/" in name for name in names)
    counts = found.train.labels.bincount() + found.test.labels.bincount()
    assert counts.tolist() == [normal, len(names) - normal]
    assert abs(len(found.test) - len(names) / 10) <= 1


@shared_zip("cifar10-25k.zip")
def test_cifar10_files_keep_what_pillow_reads(tmp_path: Path) -> None:
    names = unpack("cifar10-25k.zip", tmp_path / "set", every=60)
    classes = sorted({name.split("/")[1] for name in names})
    found = load(tmp_path / "set", classes=classes, image_size=32)
    train = sorted(name for name in names if name.startswith("train/"))
    assert len(found.train) == len(train) and len(found.test) == len(names) - len(train)
    for i in (0, len(train) - 1):
        expected = np.asarray(Image.open(tmp_path / "set" / train[i])).transpose(2, 0, 1)
        assert np.array_equal(found.train.images[i], expected)
        assert classes[int(found.train.labels[i])] == train[i].split("/")[1]


def test_dicom_folder_is_read_with_its_window(tmp_path: Path) -> None:
    for i in range(4):
        write_dicom(tmp_path / "set" / "ab"[i % 2] / f"{i}.dcm", HOUNSFIELD + i, **RESCALED)
    whole = load(tmp_path / "set", "dicom_folder", channels=1)
    lungs = load(tmp_path / "set", "dicom_folder", channels=1, window=[-600, 1500])
    assert whole.train.labels.tolist() == [0, 0, 1, 1]
    assert whole.train.images[0, 0, ::7, ::7].flatten().tolist() == [0, 51, 66, 255]
    # -1024 HU: ((-1024 + 600.5) / 1499 + 0.5) * 255 = 55.46
    assert lungs.train.images[0, 0, ::7, ::7].flatten().tolist() == [55, 196, 236, 255]


def test_multi_frame_and_strange_dicom_files_are_refused_by_name(tmp_path: Path) -> None:
    frames = np.zeros((3, 4, 4), np.uint8)
    write_dicom(tmp_path / "set" / "a" / "cine.dcm", frames, NumberOfFrames=3)
    write_dicom(tmp_path / "set" / "a" / "hsv.dcm", frames[0], PhotometricInterpretation="HSV")
    (tmp_path / "set" / "a" / "text.dcm").write_text("not DICOM")
    with pytest.raises(ValueError) as caught:
        load(tmp_path / "set", "dicom_folder")
    lines = str(caught.value).splitlines()
    assert lines[0].startswith("3 image files cannot be read")
    assert "cine.dcm: ValueError: it has 3 frames" in lines[1]
    assert "hsv.dcm" in lines[2] and "PhotometricInterpretation" in lines[2]
    assert "text.dcm: ValueError: InvalidDicomError" in lines[3]


@pytest.mark.parametrize("name", ["image_folder", "dicom_folder"])
@pytest.mark.parametrize(
    ("fit", "expected"),
    [
        # Columns of 0, 10, ..., 150 in 8 rows, seen as 8x8: the middle 8 of them,
        ("crop", [[40, 50, 60, 70, 80, 90, 100, 110]] * 8),
        # every two of them between two rows of 0,
        ("pad", [[0] * 8] * 2 + [[5, 25, 45, 65, 85, 105, 125, 145]] * 4 + [[0] * 8] * 2),
        # every two of them.
        ("stretch", [[5, 25, 45, 65, 85, 105, 125, 145]] * 8),
    ],
)
def test_what_is_not_square_becomes_so_as_asked(
    tmp_path: Path, name: str, fit: str, expected: list[list[int]]
) -> None:
    columns = np.tile(np.arange(0, 160, 10, dtype=np.uint8), (8, 1))
    (tmp_path / "set" / "a").mkdir(parents=True)
    if name == "image_folder":
        Image.fromarray(columns).save(tmp_path / "set" / "a" / "x.png")
    else:
        elements = {"RescaleSlope": 1, "RescaleIntercept": 0}
        window = {"WindowCenter": 128, "WindowWidth": 256}
        write_dicom(tmp_path / "set" / "a" / "x.dcm", columns, **elements, **window)
    found = load(tmp_path / "set", name, fit=fit, channels=1).train.images[0, 0]
    assert (found.int() - torch.tensor(expected)).abs().max() <= 1


# ODIR-5K.


def write_odir(root: Path, rows: list[tuple[int, str, str]]) -> None:
    root.mkdir(parents=True)
    with (root / "full_df.csv").open("w", newline="") as file:
        table = csv.writer(file)
        table.writerow(["ID", "Patient Age", "filename", "labels"])
        table.writerows([patient, 60, name, labels] for patient, name, labels in rows)
    for patient, name, _ in rows:
        drawn = Image.new("RGB", (60, 40))
        ImageDraw.Draw(drawn).ellipse((10, 2, 45, 37), fill=(50 + 5 * patient, 80, 30))
        drawn.save(root / name, quality=95)


def eyes(patients: int) -> list[tuple[int, str, str]]:
    return [
        (patient, f"{patient}_{side}.jpg", "['N']" if (patient + i) % 3 else "['D']")
        for patient in range(patients)
        for i, side in enumerate(("left", "right"))
    ]


def test_odir_is_split_by_patient_and_cropped_to_the_field(tmp_path: Path) -> None:
    write_odir(tmp_path / "set", eyes(20))
    found = load(tmp_path / "set", "odir", classes=["N", "D"], test_fraction=0.2)
    train, test = found.train, found.test
    assert train.groups is not None and test.groups is not None
    assert len(train) + len(test) == 40 and len(test) == 2 * len(test.groups.unique())
    assert not set(train.groups.tolist()) & set(test.groups.tolist())
    # The field fills the image: its middle reaches every edge, and each red is its patient's.
    assert train.images[:, 0, 4, [0, -1]].min() > 30 and train.images[:, 0, [0, -1], 4].min() > 30
    patients = sorted(range(20), key=str)
    expected = [50 + 5 * patients[group] for group in train.groups.tolist()]
    assert np.abs(train.images[:, 0, 4, 4].numpy().astype(int) - expected).max() <= 4


def test_hospital_holds_patients_out_and_not_eyes(tmp_path: Path) -> None:
    write_odir(tmp_path / "set", eyes(20))
    config = load_config(["data=odir", "data.classes=[N,D]", "data.val_fraction=0.3"])
    dataset = load(tmp_path / "set", "odir", classes=["N", "D"])
    workspace = Workspace(config, config, *[None] * 5, dataset, None, None)  # type: ignore[arg-type]
    train, held_out = workspace.images(node_context({}, {}))
    assert len(train) + len(held_out) == 40
    assert not set(train.groups.tolist()) & set(held_out.groups.tolist())  # type: ignore[union-attr]


def test_odir_photographs_are_found_where_the_archive_has_them(tmp_path: Path) -> None:
    rows = eyes(2)
    write_odir(tmp_path / "set", rows)
    (tmp_path / "set" / "preprocessed_images").mkdir()
    for _, name, _ in rows:
        (tmp_path / "set" / name).rename(tmp_path / "set" / "preprocessed_images" / name)
    assert len(load(tmp_path / "set", "odir", classes=["N", "D"]).train) == 4


def test_odir_tables_that_cannot_be_used_are_refused(tmp_path: Path) -> None:
    (tmp_path / "none").mkdir()
    with pytest.raises(FileNotFoundError, match=r"data=odir needs .*full_df\.csv"):
        load(tmp_path / "none", "odir")
    write_odir(tmp_path / "set", [(1, "1_left.jpg", "['X']")])
    with pytest.raises(ValueError, match=r"line 2: labels must be one of \['N', 'D'\].*\['X'\]"):
        load(tmp_path / "set", "odir", classes=["N", "D"])
    (tmp_path / "set" / "full_df.csv").write_text("ID,labels\n1,\"['N']\"\n")
    with pytest.raises(ValueError, match=r"columns ID, filename, labels once, .* of filename'$"):
        load(tmp_path / "set", "odir")


# The cache and files that cannot be read.


def damage(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:60])


def test_images_are_decoded_once_and_shared(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_tree(tmp_path / "set", {"a": 3, "b": 2})
    first = load(tmp_path / "set")
    monkeypatch.setattr(cache, "_write_entry", lambda *_, **__: pytest.fail("decoded again"))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        again = load(tmp_path / "set")
    assert torch.equal(first.train.images, again.train.images)
    again.train.images[0] = 0  # stays with this process
    assert torch.equal(first.train.images, load(tmp_path / "set").train.images)


def test_cache_is_for_its_owner_alone_and_holds_nothing_unfinished(tmp_path: Path) -> None:
    write_tree(tmp_path / "set", {"a": 3})
    load(tmp_path / "set")
    (entry,) = (tmp_path / "cache").glob("[!.]*")
    assert [stat.S_IMODE(folder.stat().st_mode) for folder in (entry, entry.parent)] == [0o700] * 2
    assert np.load(entry / "images.npy").shape == (3, 3, 8, 8)
    assert not list((tmp_path / "cache").glob("*.building"))


def test_cache_key_follows_files_and_settings(tmp_path: Path) -> None:
    write_tree(tmp_path / "set", {"a": 2})
    paths = sorted((tmp_path / "set" / "a").iterdir())

    def key(settings: str = "x", root: Path = tmp_path, number: int = 2) -> str:
        return cache_key(paths[:number], root=root, settings=settings)

    first = key()
    assert first == key() and len({first, key("y"), key(root=tmp_path / "set"), key(number=1)}) == 4
    os.utime(paths[0], ns=(0, 5))
    touched = key()
    paths[1].unlink()
    assert len({first, touched, key()}) == 3


def test_changed_files_and_settings_are_decoded_anew(tmp_path: Path) -> None:
    write_tree(tmp_path / "set", {"a": 1})
    load(tmp_path / "set")
    Image.fromarray(picture(99)).save(tmp_path / "set" / "a" / "000.png")
    os.utime(tmp_path / "set" / "a" / "000.png", ns=(1, 1))
    assert np.array_equal(load(tmp_path / "set").train.images[0], picture(99).transpose(2, 0, 1))
    assert load(tmp_path / "set", image_size=16).train.images.shape == (1, 3, 16, 16)


@pytest.mark.parametrize("name", ["images.npy", "hashes.npy", "unreadable.json"])
def test_a_damaged_entry_of_the_cache_is_made_anew(
    tmp_path: Path, name: str, caplog: pytest.LogCaptureFixture
) -> None:
    write_tree(tmp_path / "set", {"a": 3})
    expected = load(tmp_path / "set").train.images.clone()
    (file,) = tmp_path.glob(f"**/{name}")
    content = file.read_bytes()
    for length in (0, len(content) - 1):
        file.write_bytes(content[:length])
        assert torch.equal(load(tmp_path / "set").train.images, expected)
        assert file.read_bytes() == content
        assert "is damaged and is made anew" in caplog.text
        caplog.clear()
    file.unlink()
    assert torch.equal(load(tmp_path / "set").train.images, expected)


def count_decoding(root: Path, folder: Path, barrier: object) -> None:
    def decode(path: Path) -> torch.Tensor:
        (folder / f"{path.stem}-{os.getpid()}").touch()
        return resize_decoded(decode_picture(path), 8, 3)

    barrier.wait()  # type: ignore[attr-defined]
    paths = sorted((root / "a").iterdir())
    images, kept, hashes = cached_images(
        paths,
        decode,
        root=root,
        shape=(3, 8, 8),
        settings="",
        cache_dir=root.parent / "cache",
        on_corrupt="refuse",
    )
    assert len(images) == len(kept) == len(hashes) == len(paths)


def test_processes_that_start_together_decode_once(tmp_path: Path) -> None:
    write_tree(tmp_path / "set", {"a": 20})
    (tmp_path / "decoded").mkdir()
    context = multiprocessing.get_context("fork")
    barrier = context.Barrier(3)
    arguments = (tmp_path / "set", tmp_path / "decoded", barrier)
    processes = [context.Process(target=count_decoding, args=arguments) for _ in range(3)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
    assert [process.exitcode for process in processes] == [0, 0, 0]
    assert len(list((tmp_path / "decoded").iterdir())) == 20


def test_what_a_killed_process_left_behind_is_no_hindrance(tmp_path: Path) -> None:
    write_tree(tmp_path / "set", {"a": 2})
    expected = load(tmp_path / "set").train.images.clone()
    (entry,) = (tmp_path / "cache").glob("[!.]*")
    entry.rename(entry.with_name(f".{entry.name}.building"))
    (entry.with_name(f".{entry.name}.building") / "images.npy").write_bytes(b"half")
    assert torch.equal(load(tmp_path / "set").train.images, expected)


def test_corrupt_files_are_refused_by_name_and_nothing_is_cached(tmp_path: Path) -> None:
    write_tree(tmp_path / "set", {"a": 4})
    for i in (1, 3):
        damage(tmp_path / "set" / "a" / f"{i:03}.png")
    for _ in range(2):
        with pytest.raises(ValueError) as caught:
            load(tmp_path / "set")
        message = str(caught.value)
        assert "2 image files" in message and "data.on_corrupt=skip" in message
        assert [name for name in ("000", "001", "002", "003") if f"{name}.png" in message] == [
            "001",
            "003",
        ]
    assert not list((tmp_path / "cache").glob("[!.]*"))


def test_skipped_files_are_listed_every_time_and_labels_stay_with_images(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    write_tree(tmp_path / "set", {"a": 2, "b": 2})
    damage(tmp_path / "set" / "a" / "001.png")
    for _ in range(2):
        caplog.clear()
        with caplog.at_level(logging.WARNING, logger="task.data.cache"):
            found = load(tmp_path / "set", on_corrupt="skip").train
        (record,) = caplog.records
        assert "a/001.png" in record.getMessage() and "1 image files" in record.getMessage()
        assert found.labels.tolist() == [0, 1, 1]
        expected = [picture(seed).transpose(2, 0, 1) for seed in (0, 2, 3)]
        assert np.array_equal(found.images, expected)
    with pytest.raises(ValueError, match=r"a/001\.png"):
        load(tmp_path / "set", on_corrupt="refuse")


def test_set_of_unreadable_files_alone_is_refused(tmp_path: Path) -> None:
    write_tree(tmp_path / "set", {"a": 2})
    for file in (tmp_path / "set" / "a").iterdir():
        damage(file)
    with pytest.raises(ValueError, match=r"none of its images can be read; .*\(2 unreadable files"):
        load(tmp_path / "set", on_corrupt="skip")


def test_long_lists_of_corrupt_files_end_in_a_count() -> None:
    reasons = {Path(f"{i}.png"): "why" for i in range(23)}
    with pytest.raises(ValueError, match="23 image files") as caught:
        report_unreadable(reasons, "refuse")
    assert "19.png" in str(caught.value) and "20.png" not in str(caught.value)
    assert "and 3 more" in str(caught.value)


def test_folder_that_cannot_hold_the_cache_is_named(tmp_path: Path) -> None:
    write_tree(tmp_path / "set", {"a": 1})
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match=r"data\.cache_dir must be a folder .*file/cache"):
        load(tmp_path / "set", cache_dir=str(tmp_path / "file" / "cache"))


def test_cached_reasons_are_plain_json(tmp_path: Path) -> None:
    write_tree(tmp_path / "set", {"a": 2})
    damage(tmp_path / "set" / "a" / "000.png")
    load(tmp_path / "set", on_corrupt="skip")
    (entry,) = (tmp_path / "cache").glob("[!.]*")
    ((position, reason, state),) = json.loads((entry / "unreadable.json").read_text())
    assert position == 0 and "Error" in reason
    assert state == read_state(tmp_path / "set" / "a" / "000.png")


def test_failure_is_tried_again_after_a_decoder_came(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_tree(tmp_path / "set", {"a": 3})
    lacking, reason = "000.png", Exception("no decoder")

    def decode(path: Path) -> torch.Tensor:
        if path.name == lacking:
            raise reason
        return resize_decoded(decode_picture(path), 8, 3)

    def kept() -> list[int]:
        return cached_images(
            sorted((tmp_path / "set" / "a").iterdir()),
            decode,
            root=tmp_path / "set",
            shape=(3, 8, 8),
            settings="",
            cache_dir=tmp_path / "cache",
            on_corrupt="skip",
        ).kept.tolist()

    assert kept() == [1, 2]
    lacking = ""
    assert kept() == [1, 2]  # remembered: nothing has changed
    monkeypatch.setattr(cache, "decoder_versions", lambda: "pylibjpeg 2.0")
    assert kept() == [0, 1, 2]
    assert len(list((tmp_path / "cache").glob("[!.]*"))) == 1
    shutil.rmtree(tmp_path / "cache")
    lacking, reason = "002.png", OSError(errno.EMFILE, "Too many open files")
    assert kept() == [0, 1]
    lacking = ""
    assert kept() == [0, 1, 2]  # no fault of the file


def test_failure_is_tried_again_after_the_file_or_its_rights_changed(tmp_path: Path) -> None:
    write_tree(tmp_path / "set", {"a": 3})
    file = tmp_path / "set" / "a" / "001.png"
    file.chmod(0)

    def kept() -> list[int]:
        read = partial(load, tmp_path / "set", on_corrupt="skip")
        return bound_by_modes(lambda: read().train.images[:, 0, 0, 0].tolist())

    first = [int(picture(seed)[0, 0, 0]) for seed in range(3)]
    assert kept() == [first[0], first[2]]
    file.chmod(0o600)
    assert kept() == first
    status = file.stat()
    file.write_bytes(b"x" * status.st_size)
    os.utime(file, ns=(status.st_atime_ns, status.st_mtime_ns + 1))
    assert kept() == [first[0], first[2]]
    mended = tmp_path / "mended.png"
    Image.fromarray(picture(1)).save(mended)
    os.utime(mended, ns=(status.st_atime_ns, status.st_mtime_ns + 1))
    mended.rename(file)  # of the same size and time, as rsync --times leaves it
    assert kept() == first


def test_names_that_are_no_text_are_told_as_text(tmp_path: Path) -> None:
    write_tree(tmp_path / "set", {"a": 1})
    name = os.fsdecode(b"a\xff\x1b[2J\n.png")
    (tmp_path / "set" / "a" / name).write_text("no picture")
    with pytest.raises(
        ValueError, match=r"a\\udcff\\x1b\[2J\\n\.png: UnidentifiedImageError"
    ) as caught:
        load(tmp_path / "set")
    assert str(caught.value).encode("utf-8") and len(str(caught.value).splitlines()) == 3
