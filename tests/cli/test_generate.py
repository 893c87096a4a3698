import json
import os
import shlex
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.datasets import ImageFolder

from task.config import load_config
from task.data import ImageSet, build_dataset
from task.generation.folder import folder_names, open_folder
from task.runs.run import load_run
from tests.cli.test_cli import assert_fails_in_one_line, feddm, finished_run
from tests.processes import COMMANDS, process


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return finished_run(tmp_path_factory.mktemp("runs"), "data=digits", "data.test_fraction=0.1")


def generate(run: Path, out: Path, num: int, *words: object) -> str:
    result = feddm("generate", run, "--num", num, "--out", out, *words)
    assert result.exit_code == 0, result.output
    return result.stdout


def contents(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file()
    }


def images_by_label(*parts: ImageSet) -> set[tuple[int, bytes]]:
    return {
        (int(label), image.numpy().tobytes())
        for part in parts
        for image, label in zip(part.images, part.labels, strict=True)
    }


def test_folder_holds_what_sample_draws_and_reads_back_as_a_data_set(
    run: Path, tmp_path: Path
) -> None:
    out = tmp_path / "images"
    printed = generate(run, out, 7, "--class", 8, "--class", "3", "--batch-size", 50)
    expected = load_run(run).sample(classes=[3, 8], num_images=7, batch_size=50)
    command, *words = shlex.split(printed.strip().splitlines()[-1])
    assert command == "feddm-train"
    config = load_config([*words, f"data.cache_dir={tmp_path / 'cache'}"])
    found = build_dataset(config, download=False)
    assert len(found.train) + len(found.test) == 14 and len(found.test) > 0
    # A simulation refuses to train on classes without images.
    assert config.data.classes == ["3", "8"]
    read = images_by_label(found.train, found.test)
    read = {(int(config.data.classes[label]), image) for label, image in read}
    assert read == images_by_label(expected)
    in_torchvision = ImageFolder(out)
    assert in_torchvision.classes == ["3", "8"] and len(in_torchvision) == 14
    file = Image.open(out / "3" / "000000.png")
    assert file.mode == "L" and np.array(file).shape == (8, 8)
    assert file.text == {  # type: ignore[attr-defined]
        "Software": "feddm",
        "Comment": "synthetic image, drawn by a generative model",
    }


def test_grid_and_scale_enlarge_and_labels_of_image_folder_are_told(tmp_path: Path) -> None:
    words = ("data=image_folder", "data.classes=['z:1','z/1',a]", "data.channels=3")
    run = finished_run(tmp_path, *words)
    out = tmp_path / "images"
    printed = generate(run, out, 2, "--grid", "--scale", 3)
    assert "z:1 1 (here 0), z/1 2 (here 1)" in printed and "a 0 (here 2)" in printed
    manifest = json.loads((out / "manifest.json").read_text(encoding="utf-8"))
    told = {each["folder"]: each["image_folder_label"] for each in manifest["classes"].values()}
    assert told == ImageFolder(out).class_to_idx == {"a": 0, "z_1": 1, "z_1_1": 2}
    expected = load_run(run).sample(classes=["z/1"], num_images=2).images
    for place, image in enumerate(expected):
        pixels = np.array(Image.open(out / "z_1_1" / f"{place:06d}.png"))
        assert np.array_equal(pixels, image.permute(1, 2, 0).numpy().repeat(3, 0).repeat(3, 1))
    with Image.open(out / "grid.png") as grid:
        assert grid.height > 3 * 48 and grid.width > 2 * 48
    assert_fails_in_one_line(feddm("generate", run, "--num", 2, "--out", out), "scale 1 (there: 3)")


def test_manifest_says_what_drew_the_images_and_no_paths(run: Path, tmp_path: Path) -> None:
    generate(run, tmp_path / "images", 2, "--class", 8, "--seed", 5, "diffusion.eta=0")
    text = (tmp_path / "images" / "manifest.json").read_text(encoding="utf-8")
    manifest = json.loads(text)
    assert manifest["complete"]
    expected = {"label": 8, "folder": "8", "images": 2, "image_folder_label": 0}
    assert manifest["classes"]["8"] == expected
    origin = manifest["origin"]
    assert (origin["seed"], origin["diffusion.eta"], origin["round"]) == (5, 0.0, 3)
    assert origin["data"]["name"] == "digits" and origin["data"]["image_size"] == 8
    assert origin["torch"] == torch.__version__
    assert '"/' not in text and "tiny" not in text


def test_more_images_leave_the_first_as_they_are_and_fewer_draw_none(
    run: Path, tmp_path: Path
) -> None:
    grown, whole = tmp_path / "grown", tmp_path / "whole"
    generate(run, grown, 30, "--class", 3)
    first = contents(grown)
    generate(run, grown, 130, "--class", 3)
    generate(run, grown, 5, "--class", 4)
    generate(run, whole, 5, "--class", 4)
    generate(run, whole, 130, "--class", 3)
    found, expected = contents(grown), contents(whole)
    assert found.keys() == expected.keys()
    for name, content in found.items():
        if name in first and name != "manifest.json":
            assert content == first[name]
        else:
            assert content == expected[name]
    printed = generate(run, grown, 20, "--class", 3)
    assert "3: 20 images; 110 more" in printed and "drawing" not in printed
    assert contents(grown) == found


def test_killed_call_and_another_give_the_folder_of_an_undisturbed_one(
    run: Path, tmp_path: Path
) -> None:
    killed, whole = tmp_path / "killed", tmp_path / "whole"
    words = ["generate", run, "--class", "3", "--class", "8", "--num", "200", "--batch-size", "20"]
    command = [COMMANDS / "feddm", *map(str, words), "--out", str(killed)]
    with process(command, log=tmp_path / "log", cwd=tmp_path) as started:
        deadline = time.monotonic() + 60
        while len(list(killed.glob("3/0*.png"))) < 15:
            assert started.poll() is None and time.monotonic() < deadline
            time.sleep(0.01)
        started.kill()
        started.wait()
    assert 15 <= len(list(killed.glob("*/0*.png"))) < 400
    assert not json.loads((killed / "manifest.json").read_text(encoding="utf-8"))["complete"]
    # As where it was killed in the middle of a file.
    (killed / "3" / ".000199-half.png").write_bytes(b"\x89PNG")
    # The batch size is that of the call before it.
    generate(run, killed, 200, "--class", 3, "--class", 8)
    generate(run, whole, 200, *words[2:6], "--batch-size", 20)
    assert contents(killed) == contents(whole)


def test_folder_of_another_origin_or_of_other_things_is_refused(run: Path, tmp_path: Path) -> None:
    out = tmp_path / "images"
    generate(run, out, 2, "--class", 3)
    before = contents(out)
    again = ["generate", run, "--class", 3, "--num", 3, "--out"]
    other = feddm(*again, out, "--seed", 1, "diffusion.num_inference_steps=2")
    assert_fails_in_one_line(
        other, "holds images of another origin", "seed 1 (there: 0)", "steps 2 (there: 4)"
    )
    assert_fails_in_one_line(
        feddm(*again, run), "--out must be a new or empty folder", "config.yaml"
    )
    assert_fails_in_one_line(feddm(*again, run / "config.yaml"), "--out must be a folder, got")
    assert not (run / ".lock").exists()
    names = [str(digit) for digit in range(10)]
    origin = json.loads(before["manifest.json"])["origin"]
    with open_folder(out, names, origin=origin, asked={}):
        assert_fails_in_one_line(feddm(*again, out), f"is in use by process {os.getpid()}")
    assert contents(out) == before
    assert_fails_in_one_line(feddm(*again, out, "data.root=x"), "an override must be NAME=VALUE")
    data = {"data": {"classes": names}}
    classes = {name: {"images": 1} for name in names}
    for damaged in (
        *({}, [], {"classes": {}, "origin": data}, {"classes": classes, "origin": []}),
        *({"classes": [], "origin": data}, {"classes": dict.fromkeys(names, 1), "origin": data}),
        {"classes": {name: {"images": "1"} for name in names}, "origin": data},
    ):
        (out / "manifest.json").write_text(json.dumps(damaged), encoding="utf-8")
        assert_fails_in_one_line(feddm(*again, out), "is no manifest of synthetic images")


@pytest.mark.parametrize(("size", "num"), [(10**9, 2), (8, 10**13)])
def test_disk_without_room_is_refused_before_drawing(tmp_path: Path, size: int, num: int) -> None:
    origin = {"data": {"image_size": size, "channels": 3}, "scale": 1}
    block = os.statvfs(tmp_path).f_frsize
    blocks = -(-(3 * size**2 + 300) // block)
    with (
        pytest.raises(ValueError, match=rf"--out must be on a disk with {num * blocks * block:,}"),
        open_folder(tmp_path / "images", ["a"], origin=origin, asked={0: num}),
    ):
        pass
    assert [file.name for file in (tmp_path / "images").iterdir()] == [".lock"]


def test_folder_names_are_those_of_the_classes_where_folders_can_be_called_so() -> None:
    assert folder_names(["0", "Pneumonia", "no finding"]) == ["0", "Pneumonia", "no finding"]
    assert folder_names(["a/b", "..", "train", ".x:y"]) == ["a_b", "_", "_train", "_.x_y"]
    assert folder_names(["a:b", "a\\b", "A_B", "a_b_1"]) == ["a_b", "a_b_1", "A_B_2", "a_b_1_3"]
    assert folder_names(["CON", "nul.x", "constant"]) == ["_CON", "_nul.x", "constant"]
