"""Which files are images of a data set, what becomes of the others, which images are the same."""

import csv
import json
import logging
import os
import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from server_app.dataset import load_images, record_data
from task.config import load_config
from task.data import Dataset, ImageSet, Inventory, build_dataset, list_dataset, take_inventory
from task.data.duplicates import Duplicates, count_across_clients, find_duplicates
from task.data.file_kinds import DICOM, PICTURES
from task.data.listing import (
    Listing,
    class_label,
    list_class_folders,
    list_odir,
    list_one_split,
)
from task.data.partition import partition_dataset
from task.protocol.node import NodeConfig, check_node, count_images, own_config, own_images
from task.runs.writer import RunWriter
from tests.helpers import bound_by_modes
from tests.image_files import picture, write_dicom

from .test_data_files import load, write_tree

CLASSES = ["a", "b"]


def counts(listing: Listing) -> list[int]:
    return np.bincount(listing.labels, minlength=len(CLASSES)).tolist()


def listed(root: Path) -> Listing:
    listing, test = list_class_folders(root, CLASSES, PICTURES)
    assert test is None
    return listing


def kinds(listing: Listing, of: str) -> dict[str, int]:
    return {kind: n for (name, kind), n in listing.left_out.items() if name == of}


def test_folder_of_one_split_has_classes_or_none(tmp_path: Path) -> None:
    write_tree(
        tmp_path, {"in-folders/x": 2, "in-folders/y/deeper": 3, "flat": 4, "flat/.hidden": 1}
    )
    Image.fromarray(picture(0)).save(tmp_path / "in-folders" / "grid.png")
    (tmp_path / "flat" / "notes.txt").touch()
    found, classes = list_one_split(tmp_path / "in-folders", PICTURES)
    assert classes == ["x", "y"] and found.labels.tolist() == [0, 0, 1, 1, 1]
    assert kinds(found, "") == {"outside of the class folders": 1}
    (tmp_path / "flat" / "nothing").mkdir()
    found, classes = list_one_split(tmp_path / "flat", PICTURES)
    assert classes == [] and found.labels.tolist() == [0] * 4
    assert sum(kinds(found, "").values()) == 2


def test_every_file_is_used_or_left_out_by_kind(tmp_path: Path) -> None:
    tree = {"a": 6, "b/deeper": 3, "b/__MACOSX": 2, "a/.ipynb_checkpoints": 4, ".git/objects": 5}
    write_tree(tmp_path, {**tree, "a/@eaDir/x": 2})
    (tmp_path / "a" / "._000.png").touch()
    (tmp_path / "a" / ".DS_Store").touch()
    (tmp_path / "b" / "notes.TXT").touch()
    (tmp_path / "b" / "scan.1234567").touch()
    (tmp_path / "a" / "mri.dcm").touch()
    (tmp_path / "read.me").touch()
    os.mkfifo(tmp_path / "a" / "pipe.png")
    found = listed(tmp_path)
    assert counts(found) == [6, 3]
    assert kinds(found, "a") == {
        "in hidden folders and those of the system": 6,
        "macOS resource files (._*)": 1,
        "hidden files": 1,
        ".dcm files": 1,
        "neither files nor folders": 1,
    }
    assert kinds(found, "b") == {
        "in hidden folders and those of the system": 2,
        ".txt files": 1,
        "other files": 1,
    }
    hidden = "in hidden folders and those of the system"
    assert kinds(found, "") == {hidden: 5, "outside of the class folders": 1}
    everything = sum(len(files) for _, _, files in os.walk(tmp_path))
    assert len(found) + found.left_out.total() == everything


def test_files_are_recognized_by_their_content_where_the_name_does_not_say(tmp_path: Path) -> None:
    write_tree(tmp_path, {"a": 1, "b": 1})
    forms = {"x": "PNG", "y.jfif": "JPEG", "z.1.2": "BMP", "w.dat": "TIFF"}
    for name, form in (forms | {"u.gif": "GIF", "v.webp": "WEBP"}).items():
        Image.fromarray(picture(len(name))).save(tmp_path / "a" / name, format=form)
    (tmp_path / "a" / "BM").write_text("BM: no picture")
    assert [path.name for path in listed(tmp_path).paths] == [
        *("000.png", "u.gif", "v.webp", "w.dat", "x", "y.jfif", "z.1.2"),
        "000.png",
    ]
    read = load(tmp_path)
    assert counts_of(read.train) == [7, 1]
    for name in ("IM000001", "x.IMA", "1.2.840.10008.1", "y.dcm"):
        write_dicom(tmp_path / "b" / name, np.zeros((4, 4), np.uint8))
    scans, _ = list_class_folders(tmp_path, CLASSES, DICOM)
    assert counts(scans) == [0, 4]
    assert kinds(scans, "a") == {"pictures": 7, "other files": 1}
    assert kinds(listed(tmp_path), "b") == {"DICOM files": 4}


def test_what_begins_as_an_image_and_is_none_is_left_out(tmp_path: Path) -> None:
    write_tree(tmp_path, {"a": 1})
    Image.fromarray(picture(1)).save(tmp_path / "a" / "raw.NEF", format="TIFF")
    write_dicom(tmp_path / "b" / "IM000001", np.zeros((4, 4), np.uint8))
    write_dicom(tmp_path / "b" / "DICOMDIR", np.zeros((4, 4), np.uint8))
    assert counts(listed(tmp_path)) == [1, 0]
    assert kinds(listed(tmp_path), "a") == {".nef files": 1}
    scans, _ = list_class_folders(tmp_path, CLASSES, DICOM)
    assert [path.name for path in scans.paths] == ["IM000001"]
    assert kinds(scans, "b") == {"DICOMDIR files": 1}


def counts_of(images: ImageSet) -> list[int]:
    return images.labels.bincount(minlength=len(CLASSES)).tolist()


def test_linked_folders_are_followed_once_and_never_in_circles(tmp_path: Path) -> None:
    write_tree(tmp_path / "set", {"a": 6, "a/inner": 1, "b": 6})
    write_tree(tmp_path / "site", {".": 9, "below": 2})
    (tmp_path / "set" / "a" / "site1").symlink_to(tmp_path / "site")
    assert counts(listed(tmp_path / "set")) == [18, 6]
    (tmp_path / "set" / "a" / "site2").symlink_to(tmp_path / "site")
    (tmp_path / "site" / "back").symlink_to(tmp_path / "set" / "a")
    (tmp_path / "site" / "up").symlink_to(tmp_path)
    (tmp_path / "set" / "a" / "self").symlink_to("self")
    found = listed(tmp_path / "set")
    assert counts(found) == [18, 6]
    assert kinds(found, "a") == {
        "links to folders that are read already": 3,
        "files that cannot be opened": 1,
    }


@pytest.mark.parametrize("shut", ["a/more", "b", "."])
def test_folder_that_may_not_be_read_is_an_error_with_its_name(tmp_path: Path, shut: str) -> None:
    write_tree(tmp_path, {"a": 1, "a/more": 2, "b": 1})
    folder = tmp_path / shut
    folder.chmod(0o600 if shut == "b" else 0)
    try:
        with pytest.raises(PermissionError, match=f"{folder}: this folder may not be read"):
            bound_by_modes(lambda: load(tmp_path))
    finally:
        folder.chmod(0o700)


def test_file_of_no_known_ending_that_may_not_be_read_is_counted(tmp_path: Path) -> None:
    write_tree(tmp_path, {"a": 1})
    Image.fromarray(picture(1)).save(tmp_path / "a" / "x", format="PNG")
    (tmp_path / "a" / "x").chmod(0)
    found = bound_by_modes(lambda: listed(tmp_path))
    assert counts(found) == [1, 0] and kinds(found, "a") == {"files that cannot be opened": 1}


def test_letters_with_accents_match_however_the_system_writes_them() -> None:
    assert (
        class_label("e\N{COMBINING ACUTE ACCENT}tat", ["\N{LATIN SMALL LETTER E WITH ACUTE}tat"])
        == 0
    )


# ODIR-5K's table.

HEAD = "ID,filename,labels\n"
ROWS = "1,1_left.jpg,\"['N']\"\n1,1_right.jpg,\"['N']\"\n"


def odir(root: Path, table: str | bytes) -> Listing:
    (root / "full_df.csv").write_bytes(table.encode() if isinstance(table, str) else table)
    return list_odir(root, list("NDG"))


@pytest.mark.parametrize(
    ("table", "message"),
    [
        (HEAD + ROWS + "2\n", r"line 4 must be a row with a value for each column.*1 values for 3"),
        (HEAD + "1,x.jpg,['N', 'G']\n", r"line 2 must be a row with .* and no more"),
        (HEAD + "1,\"x.jpg,['N']\n" + ROWS, r"line \d: .* quotes that are closed"),
        ((HEAD + "1,\xe4.jpg,N\n").encode("cp1252"), r"line 2: the table must be UTF-8.*0xe4"),
        ((HEAD + ROWS).encode("utf-16"), r"line 1: the table must be UTF-8"),
        (
            HEAD + ROWS + "1,1_left.jpg,\"['G']\"\n",
            r"line 4: filename .*line 2 .*here G; there N\)",
        ),
        (HEAD + ROWS + "7,./1_left.jpg,\"['N']\"\n", r"line 4: filename must be another in each"),
        (HEAD + "1,../1_left.jpg,\"['N']\"\n", r"line 2: filename must be that of a photograph"),
        (HEAD + "1,/etc/x.jpg,\"['N']\"\n", r"line 2: filename must be that of a photograph"),
        (HEAD + "1,a\0b.jpg,\"['N']\"\n", r"line 2: filename must be .*got one with characters"),
        (HEAD + "1,,\"['N']\"\n", r"line 2: filename must be that of a photograph"),
        (HEAD + ",x.jpg,\"['N']\"\n", r"line 2: ID must be the patient"),
        (HEAD + "1,x.jpg,\0\n", r"line 2: labels must be a list of classes"),
        (HEAD + "1,x.jpg,[]\n", r"line 2: labels must be a list of classes"),
        (HEAD + "1,x.jpg,\"['N',1]\"\n", r"line 2: labels must be a list of classes"),
        (HEAD + "1,x.jpg,\"['N','X']\"\n", r"line 2: labels must be .*table: X 1\)"),
        (HEAD + "1,x.jpg,\"['../N']\"\n", r"line 2: labels must be one of"),
    ],
)
def test_rows_that_cannot_be_used_are_refused_with_file_and_line(
    tmp_path: Path, table: str | bytes, message: str
) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        odir(tmp_path, table)
    assert str(tmp_path / "full_df.csv") in str(caught.value)
    # Names of files hold those of patients.
    assert not re.search(r"jpg|left|etc/x", str(caught.value))


def test_classes_that_are_not_known_are_all_named(tmp_path: Path) -> None:
    rows = "".join(f"{i},{i}.jpg,\"['{name}']\"\n" for i, name in enumerate("NXGYXD"))
    with pytest.raises(ValueError, match=r"line 3: .*got \['X'\] \(in the .* table: X 2, Y 1\)"):
        odir(tmp_path, HEAD + rows)


def test_eye_with_several_diagnoses_counts_as_one_and_that_is_said(tmp_path: Path) -> None:
    several = ["D','G", "N','D", "O','N", "D','D", "G"]
    rows = "".join(f"{i},{i}.jpg,\"['{names}']\"\n" for i, names in enumerate(several))
    (tmp_path / "full_df.csv").write_text(HEAD + rows)
    config = load_config(["data=odir", f"data.root={tmp_path}", "data.test_fraction=null"])
    train, _ = list_dataset(config)
    assert [config.data.classes[label] for label in train.labels] == [*"GDODG"]
    assert take_inventory(config).describe()[-1] == (
        "3 eyes have several diagnoses and count as the first of them in the order "
        "H, M, A, G, C, D, O, N"
    )


# As the table on Kaggle has them: diagnoses of a patient stand in N to O, of an eye in labels.
FULL_COLUMNS = (
    *("ID", "Patient Age", "Patient Sex", "Left-Fundus", "Right-Fundus"),
    *("Left-Diagnostic Keywords", "Right-Diagnostic Keywords", *"NDGCAHMO"),
    *("filepath", "labels", "target", "filename"),
)


def test_whole_layout_of_the_published_table_is_read(tmp_path: Path) -> None:
    letters = "NDGCAHMO"
    write_tree(tmp_path / "preprocessed_images", {".": 32})
    pictures = sorted((tmp_path / "preprocessed_images").glob("*.png"))
    with (tmp_path / "full_df.csv").open("w", newline="", encoding="utf-8") as file:
        table = csv.writer(file)
        table.writerow(FULL_COLUMNS)
        for place, picture_file in enumerate(pictures):
            patient, eye = divmod(place, 2)
            names = [f"{patient}_{side}.jpg" for side in ("left", "right")]
            picture_file.rename(picture_file.with_name(names[eye]))
            letter = letters[(patient + 3 * eye) % 8]
            of_patient = {letters[patient % 8], letters[(patient + 3) % 8]}
            keywords = ["drusen\N{FULLWIDTH COMMA}lens dust", "normal fundus, mild"]
            hot = [int(each in of_patient) for each in letters]
            target = [int(each == letter) for each in letters]
            row = [patient, 60, "Female", *names, *keywords, *hot, "../input/x", [letter]]
            table.writerow([*row, target, names[eye]])
    words = [f"data.root={tmp_path}", "data.image_size=8", "data.test_fraction=0.25"]
    config = load_config(["data=odir", *words, f"data.cache_dir={tmp_path}/cache"])
    train, test = list_dataset(config)
    everything = np.bincount(np.concatenate([train.labels, test.labels]), minlength=8)
    assert everything.tolist() == [4] * 8
    found = take_inventory(config)
    assert found.patients is not None and sum(found.patients[:2]) == 16
    assert found.patients.in_both == 0 and not found.left_out
    partition = partition_dataset(config, build_dataset(config, download=False), 4)
    held = [
        {train.paths[i].name.split("_")[0] for i in indices} for indices in partition.train_indices
    ]
    assert sum(map(len, held)) == len(set.union(*held)) == found.patients.train


def test_numbers_of_patients_are_the_same_however_they_are_written(tmp_path: Path) -> None:
    ids = ["1", "1.0", " 1 ", "01", "1.00", "10", "x1", "1.5"]
    rows = "".join(f"{number},{i}.jpg,\"['N']\"\n" for i, number in enumerate(ids))
    groups = odir(tmp_path, HEAD + rows).groups
    assert groups is not None
    assert len(set(groups[:5])) == 1 and len(set(groups)) == 4
    words = [f"data.root={tmp_path}", "data.classes=[N]", "data.test_fraction=0.3"]
    everything = list_dataset(load_config(["data=odir", *words]))
    ours, theirs = (set(part.groups.tolist()) for part in everything)  # type: ignore[union-attr]
    assert not ours & theirs


def test_photographs_that_the_table_lacks_are_counted(tmp_path: Path) -> None:
    write_tree(tmp_path, {"preprocessed_images": 3, "elsewhere": 2})
    found = odir(tmp_path, HEAD + "1,001.png,\"['G']\"\n")
    assert found.paths == [tmp_path / "preprocessed_images" / "001.png"]
    assert kinds(found, "") == {
        "pictures that full_df.csv does not list": 2,
        "outside of preprocessed_images/": 2,
    }


# Images that are the same, and what is said of everything.


def images(values: Sequence[int], labels: Sequence[int]) -> ImageSet:
    pixels = torch.tensor(values, dtype=torch.uint8)[:, None, None, None].repeat(1, 1, 4, 4)
    return ImageSet(pixels, torch.tensor(labels, dtype=torch.int64))


def test_same_images_are_counted_within_splits_in_both_and_across_classes() -> None:
    dataset = Dataset(
        images([1, 1, 1, 2, 3, 4], [0, 0, 0, 1, 1, 1]), images([1, 1, 2, 9, 4], [0, 0, 1, 1, 0])
    )
    assert find_duplicates(dataset, 3) == Duplicates(
        within_train=2, within_test=1, in_both=(3, 1, 0), under_two_classes=2
    )


@pytest.mark.parametrize("seed", range(3))
def test_counts_of_same_images_are_those_of_comparing_each_with_each(seed: int) -> None:
    random = np.random.default_rng(seed)
    values, labels = random.integers(0, 30, 50).tolist(), random.integers(0, 3, 50).tolist()
    dataset = Dataset(images(values[:30], labels[:30]), images(values[30:], labels[30:]))
    found = find_duplicates(dataset, 3)
    train, test = values[:30], values[30:]
    assert found.within_train == sum(train[i] in train[:i] for i in range(30))
    assert sum(found.in_both) == sum(value in train for value in test)
    pairs = [*zip(values, labels, strict=True)]
    assert found.under_two_classes == sum(
        any(value == other and label != its for other, its in pairs) for value, label in pairs
    )
    shares = np.array_split(random.permutation(30), 4)
    owner = {i: client for client, share in enumerate(shares) for i in share.tolist()}
    assert count_across_clients(dataset.train, shares) == sum(
        any(train[i] == train[j] and owner[i] != owner[j] for j in range(30)) for i in range(30)
    )


def test_copies_across_splits_are_found_in_files_whatever_their_format(tmp_path: Path) -> None:
    write_tree(tmp_path / "set", {"train/a": 4, "train/b": 3, "test/a": 1, "test/b": 2})
    for i in range(2):
        again = Image.open(tmp_path / "set" / "train" / "a" / f"00{i}.png")
        again.save(tmp_path / "set" / "test" / "a" / f"copy-{i}.bmp")
    again.save(tmp_path / "set" / "train" / "b" / "other.tif")
    (tmp_path / "set" / "train" / "b" / "table.csv").touch()
    words = ["data=image_folder", f"data.root={tmp_path}/set", f"data.cache_dir={tmp_path}/cache"]
    config = load_config([*words, "data.classes=[a,b]"])
    for _ in range(2):  # from the files, and from the cache
        found = take_inventory(config, build_dataset(config, download=False))
        assert found.duplicates == Duplicates(1, 0, (2, 0), 3)
        assert found.describe() == [
            "14 in all: 13 images are used (8 to train on, 5 to test with), "
            "1 left out (1 .csv files)",
            "test/ is the test split, data.test_fraction=0.1 is not used",
            "1 training and 0 test images repeat another of their split, pixel by pixel",
            "WARNING: 2 of 5 test images are training images too, pixel by pixel (a 2): what is "
            "measured with them is too good; take them out of one of the splits",
            "WARNING: 3 images stand under two classes or more, pixel by pixel: one of their "
            "labels is wrong",
        ]
    assert found.as_json() == {
        "classes": ["a", "b"],
        "train_counts": [4, 4],
        "test_counts": [3, 2],
        "left_out": {".csv files": 1},
        "note": "test/ is the test split, data.test_fraction=0.1 is not used",
        "duplicates": {
            "within_train": 1,
            "within_test": 0,
            "in_both": (2, 0),
            "under_two_classes": 3,
        },
        "across_clients": None,
        "patients": None,
    }


def test_class_whose_files_are_all_left_out_is_named_with_them(tmp_path: Path) -> None:
    write_tree(tmp_path / "set", {"a": 3, "b/.thumbnails": 2})
    (tmp_path / "set" / "b" / "x.heic").touch()
    words = [f"data.root={tmp_path}/set", "data.classes=[a,b,c]", "data.test_fraction=null"]
    config = load_config(["data=image_folder", *words])
    found = take_inventory(config)
    train, test = list_dataset(config)
    assert len(train) == 3 and len(test) == 0
    held = "3 left out (2 in hidden folders and those of the system, 1 .heic files)"
    assert found.describe()[1:] == [f"WARNING: b has no images: {held}"]
    assert found.describe_missing(["b", "c"]) == f"b: {held}; c: no file at all"


def test_run_says_and_writes_down_what_became_of_its_files(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_tree(tmp_path / "set", {"train/a": 6, "train/b": 6, "test/a": 2, "test/b": 2})
    for file in sorted((tmp_path / "set" / "train" / "a").iterdir()):
        Image.open(file).save(file.with_suffix(".bmp"))
    words = ["data=image_folder", f"data.root={tmp_path}/set", f"data.cache_dir={tmp_path}/cache"]
    words += ["data.classes=[a,b]", f"output_dir={tmp_path}", "run_name=run", "partition.beta=inf"]
    config = load_config(words)
    dataset = load_images(config)
    partition = partition_dataset(config, dataset, 2)
    directory = RunWriter(config)
    record_data(config, dataset, directory, partition)
    directory.close()
    written = json.loads((tmp_path / "run" / "data.json").read_text())
    held = [dataset.train.subset(indices).hashes.tolist() for indices in partition.train_indices]  # type: ignore[union-attr]
    shared = 2 * len(set(held[0]) & set(held[1]))
    assert shared > 0 and written["across_clients"] == shared
    assert written["duplicates"]["within_train"] == 6
    lines = [line.split(" ", 1)[1] for line in capsys.readouterr().out.splitlines()]
    assert lines == [
        "data: 22 images are used (18 to train on, 4 to test with)",
        "data: test/ is the test split, data.test_fraction=0.1 is not used",
        "data: 6 training and 0 test images repeat another of their split, pixel by pixel",
        f"data: {shared} training images are at more than one client",
    ]


def test_class_without_training_images_is_refused_with_what_its_folder_holds(
    tmp_path: Path,
) -> None:
    write_tree(tmp_path / "set", {"train/a": 2, "train/b/.git": 3, "test/b": 2})
    words = ["data=image_folder", f"data.root={tmp_path}/set", f"data.cache_dir={tmp_path}/cache"]
    hidden = r"3 left out \(3 in hidden folders and those of the system\)"
    held = rf"got also \['b', 'c'\]; b: 2 images to test with, {hidden}; c: no file at all"
    with pytest.raises(ValueError, match=held):
        load_images(load_config([*words, "data.classes=[a,b,c]"]))


def test_many_kinds_are_summed_up() -> None:
    left_out = Counter({("", f".{i} files"): 20 - i for i in range(12)})
    (line,) = Inventory(("a",), (1,), (0,), left_out).describe()
    assert line.endswith("13 .7 files, 42 others)") and "174 left out" in line


def test_unreadable_files_are_left_out_of_their_class(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    write_tree(tmp_path / "set", {"a": 3, "b": 2})
    (tmp_path / "set" / "b" / "001.png").write_text("no picture")
    with caplog.at_level(logging.ERROR):
        found = load(tmp_path / "set", on_corrupt="skip")
    assert found.left_out == {("b", "unreadable files (data.on_corrupt=skip)"): 1}


def test_node_counts_copies_of_training_images_among_its_held_out_ones(tmp_path: Path) -> None:
    write_tree(tmp_path / "set", {"train/a": 20, "train/b": 2, "test/a": 3})
    for file in sorted((tmp_path / "set" / "train" / "a").iterdir()):
        Image.open(file).save(file.with_suffix(".bmp"))
    words = ["data=image_folder", "data.classes=[a,b]", f"data.cache_dir={tmp_path}/cache"]
    node = NodeConfig(str(tmp_path / "set"))
    config = own_config(load_config(words), node)
    own = own_images(config, build_dataset(config, download=False))
    found = take_inventory(config, own)
    assert found.duplicates is not None
    values = [bytes(image.numpy()) for image in own.train.images]
    shared = sum(bytes(image.numpy()) in values for image in own.test.images)
    assert found.duplicates.in_both == (shared, 0) and shared > 0
    everything = count_images(config).files
    assert (everything.train, everything.test) == (found.train, found.test)
    assert everything.left_out == {
        ("", "in the test split of the data set, which a node does not use"): 3
    }
    with pytest.raises(ValueError, match=r"at least 99 .*\(45 in all: 42 images are used"):
        check_node(config, NodeConfig(str(tmp_path / "set"), min_images=99))


def test_digits_hold_no_image_twice() -> None:
    config = load_config(["data=digits"])
    found = take_inventory(config, build_dataset(config, download=False))
    assert found.duplicates == Duplicates(0, 0, (0,) * 10, 0)
    assert found.describe() == ["1,797 images are used (1,618 to train on, 179 to test with)"]
