"""Which images are of one patient, and that no split and no partition parts one."""

import logging
import re
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from server_app.dataset import record_data
from server_app.launch.fit_to_images import fit_to_images
from task.cli.evaluate import check_same_images
from task.config import Config, hydra_override, load_config, read_config, write_config
from task.data import build_dataset, list_dataset, take_inventory
from task.data.partition import Partition, build_partition, partition_dataset
from task.data.patients import number_patients
from task.protocol.node import NodeConfig, count_images, own_config, own_images
from task.runs.resume import check_same_run
from task.runs.writer import RunWriter

from .test_data_files import SHARED, shared_zip, unpack, write_tree

SECRET = "jane"


def write_patients(root: Path, number: int, *, split: str = "") -> None:
    """Write three images of each patient: two of class a, one of class b."""
    write_tree(root, {f"{split}a": 2 * number, f"{split}b": number})
    for label, each in (("a", 2), ("b", 1)):
        folder = root / split / label
        for i, file in enumerate(sorted(folder.iterdir())):
            file.rename(folder / f"{SECRET}{i // each:02}_{label}{i % each}.png")


def table_of(root: Path, place: Path) -> Path:
    """Write the table that says what the names of `write_patients` say."""
    files = sorted(root.rglob("*.png"))
    rows = [f"{file.relative_to(root)},x,{file.name.split('_')[0]}" for file in files]
    place.write_text("\n".join(["file,seen,patient", *rows]) + "\n", encoding="utf-8")
    return place


def config_of(root: Path, **options: object) -> Config:
    values: dict[str, object] = {
        "root": str(root),
        "classes": ["a", "b"],
        "image_size": 8,
        "test_fraction": 0.2,
        "cache_dir": str(root.parent / "cache"),
        **options,
    }
    words = [hydra_override(f"data.{name}", value) for name, value in values.items()]
    return load_config(["data=image_folder", *words])


PATTERN = f"^({SECRET}[0-9]+)_"


def of_patients(paths: list[Path]) -> set[str]:
    return {path.name.split("_")[0] for path in paths}


@pytest.mark.parametrize("layout", ["", "train/"])
@pytest.mark.parametrize("said_by", ["pattern", "table"])
def test_no_split_parts_a_patient(tmp_path: Path, layout: str, said_by: str) -> None:
    write_patients(tmp_path / "set", 20, split=layout)
    table = table_of(tmp_path / "set", tmp_path / "patients.csv")
    said = {"patient_pattern": PATTERN} if said_by == "pattern" else {"patients": str(table)}
    config = config_of(tmp_path / "set", **said)
    train, test = list_dataset(config)
    assert len(train) == 48 and len(test) == 12
    assert not of_patients(train.paths) & of_patients(test.paths)
    found = build_dataset(config, download=False)
    assert found.train.groups is not None and found.test.groups is not None
    numbers = number_patients([path.name.split("_")[0] for path in [*train.paths, *test.paths]])
    assert [*found.train.groups.tolist(), *found.test.groups.tolist()] == numbers.tolist()


def test_pattern_and_table_that_say_the_same_split_alike(tmp_path: Path) -> None:
    write_patients(tmp_path / "set", 20)
    table = table_of(tmp_path / "set", tmp_path / "patients.csv")
    by_pattern = list_dataset(config_of(tmp_path / "set", patient_pattern=PATTERN))
    by_table = list_dataset(config_of(tmp_path / "set", patients=str(table)))
    assert [part.paths for part in by_pattern] == [part.paths for part in by_table]


def test_pattern_sees_the_path_below_the_class_folder(tmp_path: Path) -> None:
    write_tree(tmp_path / "set", {"a/p1/x": 2, "a/p2": 1, "b/p1": 1})
    train, _ = list_dataset(
        config_of(tmp_path / "set", patient_pattern="^([^/]+)/", test_fraction=None)
    )
    assert train.groups is not None and train.groups.tolist() == [0, 0, 1, 0]


def test_images_stay_where_they_were_while_nothing_names_a_patient(tmp_path: Path) -> None:
    write_patients(tmp_path / "set", 20)
    config = config_of(tmp_path / "set")
    train, test = list_dataset(config)
    assert train.groups is None and test.groups is None
    # Eight of 40 and four of 20, of each class alone.
    assert np.bincount(test.labels).tolist() == [8, 4]
    partition = partition_dataset(config, build_dataset(config, download=False), 3)
    labels = train.labels, test.labels
    again = build_partition(*labels, num_classes=2, num_clients=3, beta=0.5, seed=config.seed)
    assert all(map(np.array_equal, partition.train_indices, again.train_indices))


def groups_of(sizes: list[int]) -> np.ndarray:
    return np.repeat(np.arange(len(sizes)), sizes)


def owners(indices: list[np.ndarray], groups: np.ndarray) -> dict[int, set[int]]:
    found: dict[int, set[int]] = {}
    for client, held in enumerate(indices):
        for group in groups[held].tolist():
            found.setdefault(group, set()).add(client)
    return found


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("beta", [0.1, 0.5, np.inf])
def test_patients_stay_together_at_one_client(seed: int, beta: float) -> None:
    random = np.random.default_rng(seed)
    train = random.permutation(groups_of(random.integers(1, 6, 40).tolist()))
    test = random.permutation(groups_of(random.integers(1, 6, 60).tolist()))  # 40 of them the same
    labels = [random.integers(0, 3, len(groups)) for groups in (train, test)]

    def deal() -> Partition:
        return build_partition(
            *labels,
            num_classes=3,
            num_clients=6,
            beta=beta,
            seed=seed,
            train_groups=train,
            test_groups=test,
        )

    partition = deal()
    ours, theirs = owners(partition.train_indices, train), owners(partition.test_indices, test)
    assert all(len(clients) == 1 for clients in [*ours.values(), *theirs.values()])
    assert all(theirs[group] == clients for group, clients in ours.items() if group in theirs)
    for indices, counts, all_labels in (
        (partition.train_indices, partition.counts, labels[0]),
        (partition.test_indices, partition.test_counts, labels[1]),
    ):
        assert sorted(np.concatenate(indices)) == [*range(len(all_labels))]
        held = [np.bincount(all_labels[part], minlength=3) for part in indices]
        assert np.array_equal(held, counts)
    assert all(len(part) > 0 for part in partition.train_indices)
    assert deal().describe() == partition.describe()


def test_patients_of_one_image_are_dealt_as_images_are() -> None:
    labels = np.random.default_rng(0).integers(0, 4, 100)
    options = {"num_classes": 4, "num_clients": 5, "beta": 0.5, "seed": 3}
    alone = build_partition(labels[:80], labels[80:], **options)  # type: ignore[arg-type]
    grouped = build_partition(
        labels[:80],
        labels[80:],
        train_groups=np.arange(80),
        test_groups=np.arange(80, 100),
        **options,  # type: ignore[arg-type]
    )
    assert alone.describe() == grouped.describe()
    assert all(map(np.array_equal, alone.train_indices, grouped.train_indices))
    assert all(map(np.array_equal, alone.test_indices, grouped.test_indices))


def test_patients_who_cannot_be_dealt_are_refused() -> None:
    labels, groups = np.zeros(6, np.int64), groups_of([3, 3])
    none = np.empty(0, np.int64)
    with pytest.raises(ValueError, match=r"between 1 and 2, the number of training patients.*3"):
        build_partition(
            *(labels, none),
            **{"num_classes": 1, "num_clients": 3, "beta": 1.0, "seed": 0},  # type: ignore[arg-type]
            train_groups=groups,
            test_groups=none,
        )
    with pytest.raises(ValueError, match=r"test_groups must be given if and only if"):
        build_partition(
            *(labels, none),
            **{"num_classes": 1, "num_clients": 2, "beta": 1.0, "seed": 0},  # type: ignore[arg-type]
            train_groups=groups,
        )
    with pytest.raises(ValueError, match=r"partition\.counts must be null .* patients"):
        build_partition(
            *(labels, none),
            **{"num_classes": 1, "num_clients": 2, "beta": None, "seed": 0},  # type: ignore[arg-type]
            counts=[[3], [3]],
            train_groups=groups,
            test_groups=none,
        )


def test_hospitals_are_no_more_than_patients(tmp_path: Path) -> None:
    write_patients(tmp_path / "set", 4)
    words = {"patient_pattern": PATTERN, "test_fraction": None}
    config = config_of(tmp_path / "set", **words).changed({"federation.images_per_client": 1})
    assert fit_to_images(config, ()).federation.num_supernodes == 4


def test_numbers_are_one_patient_however_they_are_written() -> None:
    assert number_patients(["7", "07", " 7.0", "x7", "70"]).tolist() == [0, 0, 0, 2, 1]


def test_table_may_lie_elsewhere_when_a_run_goes_on_and_not_come_or_go(tmp_path: Path) -> None:
    def named(table: str) -> Config:
        return config_of(tmp_path / "set", patients=table)

    write_config(named("/here/p.csv"), tmp_path / "config.yaml")
    check_same_run(named("/there/q.csv"), tmp_path)
    with pytest.raises(ValueError, match=r"asked for data\.patients="):
        check_same_run(named(""), tmp_path)
    write_config(named(""), tmp_path / "config.yaml")
    with pytest.raises(ValueError, match=r"asked for data\.patients=/there/q\.csv"):
        check_same_run(named("/there/q.csv"), tmp_path)


def test_table_that_splits_otherwise_is_refused_in_resuming_and_evaluating(tmp_path: Path) -> None:
    write_patients(tmp_path / "set", 10)
    table = table_of(tmp_path / "set", tmp_path / "patients.csv")
    words = {"output_dir": str(tmp_path), "run_name": "run"}
    config = config_of(tmp_path / "set", patients=str(table)).changed(words)
    with closing(RunWriter(config)) as directory:
        directory.write_config(config)
        record_data(config, build_dataset(config, download=False), directory, None)
    resumed = config.changed({"resume": True})

    def resume_and_evaluate() -> list[str]:
        dataset, said = build_dataset(config, download=False), list[str]()
        with closing(RunWriter(resumed)) as directory:
            record_data(resumed, dataset, directory, None)
        check_same_images(tmp_path / "run", config, dataset, say=said.append)
        return said

    assert resume_and_evaluate() == []
    whole = table.read_text(encoding="utf-8")
    table.write_text(whole.replace(f",x,{SECRET}", ",x,someone"), encoding="utf-8")
    assert resume_and_evaluate() == []  # other names for the same patients
    table.write_text(re.sub(r",x,\w+0([0-6])", ",x,one", whole), encoding="utf-8")
    dataset = build_dataset(config, download=False)
    for check in (
        lambda: resume_and_evaluate(),
        lambda: check_same_images(tmp_path / "run", config, dataset, say=print),
    ):
        with pytest.raises(
            ValueError, match=r"data\.root=.*split otherwise .* give data\.patients"
        ):
            check()
    table.write_text(whole, encoding="utf-8")
    file = next((tmp_path / "set").rglob("*.png"))
    Image.new("L", (8, 8), 7).save(file)
    said = list[str]()
    dataset = build_dataset(config, download=False)
    check_same_images(tmp_path / "run", config, dataset, say=said.append)
    assert len(said) == 1 and re.match("WARNING: data.root=.*other images, or labels", said[0])
    with pytest.raises(ValueError, match=r"^resume: data\.root=.*other images, or labels"):
        resume_and_evaluate()


def test_run_of_before_patients_could_be_named_has_none(tmp_path: Path) -> None:
    write_config(load_config(["data=chest_xray"]), tmp_path / "config.yaml")
    written = (tmp_path / "config.yaml").read_text(encoding="utf-8").splitlines()
    kept = [line for line in written if "patient" not in line]
    assert len(kept) == len(written) - 2
    (tmp_path / "config.yaml").write_text("\n".join(kept), encoding="utf-8")
    data = read_config(tmp_path / "config.yaml").data
    assert (data.patients, data.patient_pattern) == ("", "")


# On a node, and what is said.


def test_node_names_its_own_table(tmp_path: Path) -> None:
    write_patients(tmp_path / "set", 20)
    table = table_of(tmp_path / "set", tmp_path / "patients.csv")
    node = NodeConfig(str(tmp_path / "set"), patients=str(table))
    for said in ({}, {"patients": "of/another/machine.csv"}, {"patient_pattern": "^(nobody)$"}):
        config = own_config(config_of(tmp_path / "set", val_fraction=0.2, **said), node)
        assert (config.data.patients, config.data.patient_pattern) == (str(table), "")
        kept = own_images(config, build_dataset(config, download=False))
        ours, theirs = (set(part.groups.tolist()) for part in (kept.train, kept.test))  # type: ignore[union-attr]
        assert (len(ours), len(theirs)) == (16, 4) and not ours & theirs
        (said_of,) = [line for line in count_images(config).files.describe() if "patients" in line]
        assert said_of == "the images are of 20 patients (16 to train on, 4 to test with)"


def test_node_without_a_table_is_refused_where_the_run_has_one(tmp_path: Path) -> None:
    config = config_of(tmp_path / "set", patients="patients.csv")
    with pytest.raises(ValueError, match=r"data\.patients: a node needs .*patients=\"/file\.csv\""):
        own_config(config, NodeConfig(str(tmp_path / "set")))


def test_patients_of_both_splits_are_counted_and_warned_of(tmp_path: Path) -> None:
    write_patients(tmp_path / "set", 6, split="train/")
    write_patients(tmp_path / "set", 8, split="test/")
    config = config_of(tmp_path / "set", patient_pattern=PATTERN, test_fraction=None)
    for dataset in (None, build_dataset(config, download=False)):
        found = take_inventory(config, dataset)
        assert found.as_json()["patients"] == {
            **{"train": 6, "test": 8, "in_both": 6},
            "most_images": 6,
        }
        lines = found.describe()
        assert "the images are of 8 patients (6 to train on, 8 to test with)" in lines
        assert any(line.startswith("WARNING: 6 patients have images to train on") for line in lines)


@pytest.mark.parametrize(("pattern", "warned"), [(f"^({SECRET})", True), (PATTERN, False)])
def test_one_patient_with_most_images_is_warned_of_in_one_line(
    tmp_path: Path, pattern: str, warned: bool
) -> None:
    write_patients(tmp_path / "set", 4)
    config = config_of(tmp_path / "set", patient_pattern=pattern, test_fraction=None)
    lines = [line for line in take_inventory(config).describe() if "one patient has" in line]
    expected = "WARNING: one patient has 12 of 12 images, which no split parts: check"
    assert [line[: len(expected)] for line in lines] == [expected] * warned


def test_node_key_of_patients_is_named_where_the_run_takes_none(tmp_path: Path) -> None:
    node = NodeConfig(str(tmp_path), patients="/p.csv")
    for name in ("odir", "digits"):
        with pytest.raises(ValueError, match=rf"^patients in --node-config .*out with data={name}"):
            own_config(load_config([f"data={name}"]), node)


def test_folder_in_place_of_a_table_is_said_to_be_one(tmp_path: Path) -> None:
    write_tree(tmp_path / "set", {"a": 1, "b": 1})
    with pytest.raises(FileNotFoundError, match=r"data\.patients=.*: it is a folder; set it to a"):
        list_dataset(config_of(tmp_path / "set", patients=str(tmp_path)))


@pytest.mark.parametrize(
    ("name", "option", "value", "message"),
    [
        ("digits", "patient_pattern", "(x)", r"data\.patient_pattern must be empty for .*digits"),
        ("odir", "patients", "p.csv", r"data\.patients must be empty for data=odir"),
        ("chest_xray", "patient_pattern", "x", r"one group.*with 0 groups"),
        ("chest_xray", "patient_pattern", "(x)(y)", r"one group.*with 2 groups"),
        (
            "chest_xray",
            "patient_pattern",
            "(x",
            r"pattern must be a regular .*\(x \(",
        ),
        ("blood_cells", "patients", "p.csv", r"data\.patients must be empty where"),
        ("chest_xray", "patient_pattern", "^(([a-z]+)*)$", r"one group.*with 2 groups"),
        *(
            ("chest_xray", "patient_pattern", pattern, r"without a repeat or a choice within a")
            for pattern in (
                *("^([a-z]+)+$", "^(?:[a-z]|[a-z][0-9])*(x)$", "(?:a?){50}(b)", "(?=(a+)+)b"),
                *("a?" * 30 + "(b)", ".*.*.*.*(x)", "(?>a+)*(b)", "(?:(?:a{1,9}){1,9}){9}(b)"),
            )
        ),
    ],
)
def test_words_that_do_not_fit_are_refused(
    name: str, option: str, value: str, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        load_config([f"data={name}", hydra_override(f"data.{option}", value)])


@pytest.mark.parametrize(
    "pattern",
    ["^([^_]+)_[0-9]+_.*", "(?:scan|image)-([a-z]{2}(?:[0-9]{4}-)+)", r"^(\w+?)(?:_left)?\.", ""],
)
def test_patterns_that_are_found_at_once_are_taken(pattern: str) -> None:
    word = hydra_override("data.patient_pattern", pattern)
    assert load_config(["data=chest_xray", word]).data.patient_pattern == pattern


def test_images_without_a_patient_are_counted_and_not_named(tmp_path: Path) -> None:
    write_patients(tmp_path / "set", 4)
    config = config_of(tmp_path / "set", patient_pattern=f"({SECRET}0[0-2])")
    with pytest.raises(ValueError, match=r"3 of 12 paths, .* the form aaaa00_a0\.aaa") as caught:
        list_dataset(config)
    assert f"{SECRET}0" not in str(caught.value).replace(config.data.patient_pattern, "")


HEAD = "file,patient\n"


@pytest.mark.parametrize(
    ("table", "message"),
    [
        (None, r"data\.patients=.*patients\.csv: there is no such file"),
        ("a,b\n", r"columns file, patient once, .*, got '2 columns, without or with several of"),
        ("file,patient,patient\n", r"got '3 columns, without or with several of patient'$"),
        (HEAD + "a/000.png,jane\n", r"1 rows, which name 1 of 2 images"),
        (HEAD + "a/000.png,jane\n000.png,jane\n", r"2 rows, which name 1 of 2 images"),
        (HEAD + "a/000.png,jane\nb/000.png\n", r"line 3 must be a row .*1 values for 2 columns"),
        (HEAD + "a/000.png,\n", r"line 2: patient must be given"),
        (HEAD + ",jane\n", r"line 2: file must be given"),
        (HEAD + "a/0.png,jane\n./a/0.png,jane\n", r"line 3: file .*got that of line 2"),
        (HEAD + "j\xe4ne,jane\n", r"line 2: the table must be UTF-8"),
    ],
)
def test_tables_that_cannot_be_used_are_refused_without_a_name(
    tmp_path: Path, table: str | None, message: str, caplog: pytest.LogCaptureFixture
) -> None:
    write_tree(tmp_path / "set", {"a": 1, "b": 1})
    if table is not None:
        (tmp_path / "patients.csv").write_bytes(table.encode("cp1252"))
    config = config_of(tmp_path / "set", patients=str(tmp_path / "patients.csv"))
    caplog.set_level(logging.DEBUG)
    with pytest.raises((ValueError, FileNotFoundError), match=message) as caught:
        list_dataset(config)
    assert SECRET not in str(caught.value) + caplog.text


# Real images.


@shared_zip("bccd.zip")
def test_cells_of_one_smear_stay_together(tmp_path: Path) -> None:
    unpack("bccd.zip", tmp_path / "set", every=1)
    words = [f"data.root={tmp_path}/set", f"data.cache_dir={tmp_path}/cache"]
    config = load_config(["data=blood_cells", *words])
    train, test = list_dataset(config)
    assert len(train) + len(test) == 1338, SHARED
    smears = [{path.name.split("-")[0] for path in part.paths} for part in (train, test)]
    assert len(smears[0]) + len(smears[1]) == 272 and not smears[0] & smears[1]
    assert 0.07 < len(test) / 1338 < 0.13 and np.bincount(test.labels, minlength=3).min() > 15
    parts = build_partition(
        *(train.labels, test.labels),
        **{"num_classes": 3, "num_clients": 4, "beta": 0.5, "seed": 0},  # type: ignore[arg-type]
        train_groups=train.groups,
        test_groups=test.groups,
    )
    held = [{train.paths[i].name.split("-")[0] for i in part} for part in parts.train_indices]
    assert sum(map(len, held)) == len(set.union(*held)) == len(smears[0])
