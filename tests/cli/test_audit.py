import json
import shutil
import stat
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from click.testing import Result
from torch import Tensor
from torchvision.io import write_png

from task.config import load_config, read_config
from task.data import build_dataset
from task.data.partition import partition_dataset
from task.data.source import hash_images
from tests.cli.test_cli import assert_fails_in_one_line, feddm, finished_run


@pytest.fixture(scope="module", autouse=True)
def quick() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("task.evaluation.classifier.MAX_STEPS", 100)
        yield


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Make a finished run, not trained at all, of three clients that kept the model of client 0."""
    path = finished_run(
        tmp_path_factory.mktemp("runs"),
        *("data=digits", "data.test_fraction=0.1", "federation.num_supernodes=3"),
        *("federation.min_replies=1", "partition.counts=null", "partition.beta=0.5"),
    )
    config = read_config(path / "config.yaml")
    dataset = build_dataset(config, download=False)
    dealt = partition_dataset(config, dataset, 3).describe()
    (path / "data.json").write_text(json.dumps({"sha256": hash_images(dataset)}))
    (path / "partition.json").write_text(json.dumps(dealt))
    (path / "local").mkdir()
    shutil.copy(path / "model.safetensors", path / "local" / "client-0.safetensors")
    return path


def test_audit_of_a_model_that_remembers_nothing(run: Path) -> None:
    result = feddm("audit", run, "--num-images", 60, "--num-per-class", 2)
    assert result.exit_code == 0, result.output
    assert "DETECTED" not in result.stdout
    assert "not detected: Attacks do not tell training images by the global model" in result.stdout
    assert "client 0, own model" in result.stdout
    told = json.loads((run / "audit.json").read_text())
    assert {(each["client"], each["is_local"]) for each in told["attacks"]} >= {
        (None, False),
        (0, True),
    }
    whole = [each["found"] for each in told["attacks"] if each["client"] is None]
    assert len(whole) == 7 and all(each["members"] == each["others"] == 60 for each in whole)
    assert all(each["low"] < 0.5 < each["high"] for each in whole if each["p_value"] > 0.1)
    assert [each["space"] for each in told["searches"]] == ["pixels", "features (classifier)"]
    assert all(each["generated"] == 20 for each in told["searches"])
    assert all(each["measures"]["neighbors"] == 50 for each in told["searches"])
    assert "DETECTED" not in {each["outcome"] for each in told["findings"]}
    # Training images are in it.
    pairs = run / "audit-pairs.png"
    assert stat.S_IMODE(pairs.stat().st_mode) == 0o600 and pairs.stat().st_size > 1000


def test_audit_needs_held_out_images_and_those_of_the_run(run: Path, tmp_path: Path) -> None:
    rng = torch.Generator().manual_seed(0)
    for number in range(24):
        place = tmp_path / "images" / "ab"[number % 2]
        place.mkdir(parents=True, exist_ok=True)
        image = torch.randint(256, (1, 8, 8), generator=rng).byte()
        write_png(image, str(place / f"{number}.png"))
    unmeasured = finished_run(
        tmp_path,
        *("data=image_folder", f"data.root={tmp_path / 'images'}", "data.classes=[a,b]"),
        *("data.channels=1", "data.test_fraction=null", "federation.num_supernodes=1"),
        *("federation.min_replies=1", f"data.cache_dir={tmp_path / 'cache'}"),
    )
    assert_fails_in_one_line(feddm("audit", unmeasured), "data.json must be the run's, with hashes")
    dataset = build_dataset(read_config(unmeasured / "config.yaml"), download=False)
    told = {"sha256": hash_images(dataset)}
    (unmeasured / "data.json").write_text(json.dumps(told))
    assert_fails_in_one_line(feddm("audit", unmeasured), "data.test_fraction must be one of the")
    write_png(torch.zeros(1, 8, 8).byte(), str(tmp_path / "images" / "a" / "more.png"))
    assert_fails_in_one_line(feddm("audit", unmeasured), "holds other images, or labels, than")
    (unmeasured / "nodes.json").write_text(json.dumps({"7": 0}))
    assert_fails_in_one_line(feddm("audit", unmeasured), "images of real nodes are not here")
    assert_fails_in_one_line(feddm("audit", tmp_path / "none"), "holds no run")
    copy = shutil.copytree(run, tmp_path / "other")
    dealt = json.loads((copy / "partition.json").read_text())
    dealt["train_counts"][0][0] += 1
    (copy / "partition.json").write_text(json.dumps(dealt))
    assert_fails_in_one_line(feddm("audit", copy), "data.root must be where the images are")


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write real digits as pictures: to train on, held out, and drawn with one copy in twenty."""
    root = tmp_path_factory.mktemp("folders")
    dataset = build_dataset(load_config(["data=digits", "data.image_size=8"]), download=False)
    images, labels = dataset.train.images[:, :1], dataset.train.labels
    drawn = images[800:1000].clone()
    drawn[:10] = images[:10]
    write_pictures(root / "train", images[:600], labels[:600])
    write_pictures(root / "held-out", images[600:800], labels[600:800])
    write_pictures(root / "drawn", drawn)
    write_pictures(root / "alike", images[800:1000], labels[800:1000])
    return root


def write_pictures(folder: Path, images: Tensor, labels: Tensor | None = None) -> None:
    for number, image in enumerate(images):
        place = folder if labels is None else folder / str(int(labels[number]))
        place.mkdir(parents=True, exist_ok=True)
        write_png(image, str(place / f"{number:04d}.png"))


def audit_of(folders: Path, *words: object, **names: str) -> Result:
    chosen = {"images": "drawn", "train": "train", "held-out": "held-out"} | names
    options = [word for name, of in chosen.items() for word in (f"--{name}", folders / of)]
    return feddm("audit", *options, f"data.cache_dir={folders / 'cache'}", *words)


def test_copies_in_a_folder_of_any_generator_are_found(folders: Path, tmp_path: Path) -> None:
    result = audit_of(folders, "--out", tmp_path / "found")
    assert result.exit_code == 0, result.output
    assert "--images: 200 pictures in" in result.stdout
    assert "searching for copies at 8x8 pixels, 1 channel(s)" in result.stdout
    assert "DETECTED: Copies in pixels: " in result.stdout
    assert "Membership is not tested, which needs the model" in result.stdout
    told = json.loads((tmp_path / "found" / "audit.json").read_text())
    pixels, features = told["searches"]
    assert pixels["found"]["copied"] == pytest.approx(0.05, abs=0.03)
    assert (pixels["generated"], pixels["held_out"], told["num_train"]) == (200, 200, 600)
    assert features["space"] == "features (classifier)" and told["attacks"] == []
    for search in told["searches"]:
        measures = search["measures"]
        assert measures["neighbors"] == 50 and measures["cells"] > 0
        assert measures["ratios"]["0.01"]["generated"] == pytest.approx(0, abs=1e-3)
        assert 0 < measures["authenticity"]["generated"] < 1
    # Ten patients, by the last digit of a file's number.
    audit_of(folders, "--out", tmp_path, "data.patient_pattern='([0-9])[.]png$'")
    searches = json.loads((tmp_path / "audit.json").read_text())["searches"]
    assert [each["held_out"] for each in searches] == [10, 10]
    pairs = tmp_path / "found" / "audit-pairs.png"
    assert stat.S_IMODE(pairs.stat().st_mode) == 0o600


def test_folders_without_classes_are_compared_in_pixels(folders: Path, tmp_path: Path) -> None:
    options = {"images": "alike", "train": "flat"}
    flat = [path for path in (folders / "train").rglob("*.png")]
    (folders / "flat").mkdir()
    for number, path in enumerate(flat):
        shutil.copy(path, folders / "flat" / f"{number}.png")
    result = audit_of(folders, "--out", tmp_path, "data.image_size=16", **options)
    assert result.exit_code == 0, result.output
    assert "Pixels alone are compared" in result.stdout and "at 16x16 pixels" in result.stdout
    assert "not detected: Copies in pixels" in result.stdout
    assert len(json.loads((tmp_path / "audit.json").read_text())["searches"]) == 1
    # A colored picture among gray ones, of another size.
    few = folders / "few"
    write_pictures(few, torch.randint(256, (2, 3, 20, 12)).byte())
    words = ("--out", tmp_path, "eval.extractor=classifier")
    result = audit_of(folders, *words, **options | {"held-out": "few"})
    assert "at 8x8 pixels, 3 channel(s)" in result.stdout
    assert "too few images were held out to show any" in result.stdout
    assert "  too few\n" in result.stdout


def test_folders_that_cannot_be_audited_are_refused(
    folders: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (folders / "empty").mkdir()
    (folders / "split" / "train").mkdir(parents=True)
    out = ("--out", tmp_path)
    for named, said in (
        ({"images": "none"}, f"--images: there is no folder {folders / 'none'}"),
        ({"train": "empty"}, "empty holds no pictures; they lie in it or in a folder of each"),
        ({"train": "split"}, "--train must be the folder of one split, such as"),
        ({"held-out": "train"}, "--held-out must be of other pictures than --train"),
    ):
        assert_fails_in_one_line(audit_of(folders, *out, **named), said)
    outside = "--out must be a folder outside of --images: the pairs show training images"
    assert_fails_in_one_line(audit_of(folders, "--out", folders / "drawn" / "audit"), outside)
    monkeypatch.chdir(folders / "drawn")
    assert_fails_in_one_line(audit_of(folders), outside)
    assert_fails_in_one_line(
        audit_of(folders, *out, "train.lr=1"), "an override must be NAME=VALUE"
    )
    (folders / "doubled").mkdir()
    for path in [*(folders / "train" / "0").iterdir(), *(folders / "held-out" / "1").iterdir()]:
        shutil.copy(path, folders / "doubled" / f"{path.parent.name}-{path.name}")
    result = audit_of(folders, *out, **{"held-out": "doubled"})
    assert "held-out pictures are training pictures too, pixel by pixel" in result.stdout


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("RUN --images a --train b --held-out c", "without RUN, which is audited alone"),
        ("--images a --train b", "must be given together, and without RUN"),
        ("RUN --train b", "must be given together, and without RUN"),
        ("RUN --out here", "--out must be left out, or given with --images, --train and"),
        ("--images a --train b --held-out c --num-images 50", "--num-images must be left out, or"),
        ("", "RUN must be the folder of one finished run, or in its place --images"),
        ("RUN RUN", "RUN must be the folder of one finished run, or in its place --images"),
    ],
)
def test_options_of_runs_and_of_folders_are_not_mixed(run: Path, words: str, said: str) -> None:
    given = [run if word == "RUN" else word for word in words.split()]
    assert_fails_in_one_line(feddm("audit", *given), said)
