"""Exports in processes that know nothing of feddm, against the run's own network and sampler."""

import dataclasses
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from task.config import anchored, load_config, write_config
from task.export.drawing import draw, main, read_settings
from task.export.folder import describe, export_run, write_sums
from task.export.formats import FORMATS, network_of
from task.export.sources import ship
from task.generation.folder import NOTICE, folder_names
from task.generators.diffusion.network import UNet
from task.generators.registry import build_generator
from task.runs.checkpoint import save_weights
from task.runs.run import Run, final_model, load_run
from tests.cli.test_cli import assert_fails_in_one_line, feddm

ROOT = Path(__file__).resolve().parents[2]
CLASSES, SIZE, STEPS = ["normal", "pneumonia", "other"], 8, 5

# What somebody without feddm does in the folder of an export: reads the card, runs its Python,
# runs sample.py, and draws with noise of his own.
STRANGER = """
import json, os, re, runpy, sys
from pathlib import Path
import numpy as np
sys.modules["task"] = None  # importing feddm fails
sys.path.insert(0, ".")
card = {}
exec(re.search("```python\\n(.*?)```", Path("README.md").read_text(), re.DOTALL)[1], card)
sys.argv = ["sample.py", "--num", "2", "--out", "drawn"]
sample = runpy.run_path("sample.py", run_name="__main__")
from drawing import draw, read_settings
noise, labels = iter(np.load("noise.npy")), np.array([0, 2])
model, settings = sample["load_model"](Path(".")), read_settings(".")
images = draw(model, labels, settings=settings, draw_noise=lambda: next(noise))
np.save("images.npy", images)
if "pipe" in card:
    import torch
    generator = torch.Generator().manual_seed(7)
    labels = torch.from_numpy(labels)
    draw_noise = card["pipe"].noise_source(labels, None, generator)
    np.save("piped.npy", card["pipe"].draw(labels, draw_noise).numpy())
    card["pipe"](num_images=2).images[-1].save("piped.png")
told = {"modules": sorted(sys.modules), "waits": os.environ.get("OMP_WAIT_POLICY")}
print(json.dumps({**told, "shape": list(np.shape(card.get("prediction")))}))
"""


UNET = ("model=tiny", "model.width=8", "model.num_poolings=1")
ATTENTION_UNET = (
    *("model=attention_unet", "model.width=8", "model.width_multipliers=[1,2]"),
    "diffusion.ema_decay=0.9",
)


def finished_run(folder: Path, *overrides: str, network: tuple[str, ...] = UNET) -> Run:
    """Make a run of a network that learned nothing, with weights of one client beside it."""
    config = anchored(
        load_config(
            [
                *("data=image_folder", f"data.classes=[{','.join(CLASSES)}]", "data.channels=1"),
                *(f"data.image_size={SIZE}", f"data.root={folder}", f"output_dir={folder}"),
                *("run_name=tiny", *network),
                *("diffusion.label_dropout=0.1", "diffusion.guidance_scale=2"),
                *("diffusion.num_timesteps=12", f"diffusion.num_inference_steps={STEPS}"),
                *("train.precision=float32", "federation.rounds=3", *overrides),
            ]
        ),
        folder,
    )
    path = folder / "tiny"
    (path / "local").mkdir(parents=True)
    write_config(config, path / "config.yaml")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        weights = [build_generator(config).state_dict() for _ in range(2)]
    metadata = {"round": "3", "config": str(folder)}
    save_weights(path / "model.safetensors", weights[0], metadata)
    save_weights(path / "local" / "client-1.safetensors", weights[1], metadata)
    return load_run(path)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    return finished_run(tmp_path_factory.mktemp("hospital-of-somewhere"))


@pytest.fixture(scope="module")
def unguided(tmp_path_factory: pytest.TempPathFactory) -> Path:
    words = ("diffusion.label_dropout=0", "diffusion.guidance_scale=1")
    run = finished_run(tmp_path_factory.mktemp("unguided"), *words)
    return export_run(run, "safetensors").folder


@pytest.fixture(scope="module", params=FORMATS)
def exported(run: Run, request: pytest.FixtureRequest) -> Iterator[Path]:
    missing = [name for name in FORMATS[request.param].needs if not importlib.util.find_spec(name)]
    if missing:
        pytest.skip(f"{', '.join(missing)} missing: uv sync --extra export")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_HUB_OFFLINE", "1")
        written = export_run(run, request.param)
    assert written.folder == run.path / "export" / request.param
    yield written.folder


def python(folder: Path, program: str) -> str:
    """Run a program in a folder; the caches of libraries lie beside it."""
    kept = {name: value for name, value in os.environ.items() if name != "OMP_WAIT_POLICY"}
    done = subprocess.run(
        [sys.executable, "-c", program],
        cwd=folder,
        env={**kept, "HF_HOME": str(folder.parent / "cache"), "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def drawn_by_feddm(run: Run, draw_noise: Any) -> np.ndarray:
    model, _ = final_model(run.path, run.config)
    return model.eval().sample(torch.tensor([0, 2]), draw_noise).numpy()


def assert_same_picture(file: Path, expected: Image.Image) -> None:
    with Image.open(file) as picture:
        difference = np.array(picture, np.int16) - np.array(expected, np.int16)
    assert np.abs(difference).max() <= 1  # of 255, for rounding


def test_an_export_draws_the_images_of_feddm_without_feddm(run: Run, exported: Path) -> None:
    # No file may lead back to the machine that wrote it.
    content = b"".join(file.read_bytes() for file in exported.rglob("*") if file.is_file())
    for path in (run.path.parent.name, str(ROOT), str(Path.home())):
        assert path.encode() not in content
    noise = np.random.default_rng(0).standard_normal((STEPS, 2, 1, SIZE, SIZE), np.float32)
    np.save(exported / "noise.npy", noise)
    told = json.loads(python(exported, STRANGER).splitlines()[-1])
    assert not set(told["modules"]) & {"flwr", "hydra", "omegaconf"}
    assert ("torch" in told["modules"]) == (exported.name != "onnx")
    assert told["waits"] == "PASSIVE"
    prepared = iter(torch.from_numpy(noise))
    expected = drawn_by_feddm(run, lambda: next(prepared))
    assert np.abs(expected[0] - expected[1]).max() > 0.01  # or any model would do
    np.testing.assert_allclose(np.load(exported / "images.npy"), expected, atol=1e-4)
    of_feddm = run.sample(num_images=2).to_pil()
    places = [(name, place) for name in CLASSES for place in range(2)]
    for (name, place), image in zip(places, of_feddm, strict=True):
        assert_same_picture(exported / "drawn" / name / f"{place:06d}.png", image)
    if exported.name == "torch-export":
        with zipfile.ZipFile(exported / "model.pt2") as archive:
            assert archive.read("model/data/sample_inputs/model.pt") == b""  # else a pickle
    if exported.name == "diffusers":
        generator = torch.Generator().manual_seed(7)
        expected = drawn_by_feddm(run, lambda: torch.randn(2, 1, SIZE, SIZE, generator=generator))
        np.testing.assert_allclose(np.load(exported / "piped.npy"), expected, atol=1e-4)
        assert_same_picture(exported / "piped.png", of_feddm[-1])
    else:
        assert told["shape"] == [2, 1, SIZE, SIZE]


@pytest.mark.parametrize(
    "overrides",
    [
        ("diffusion.sampler=ddpm", "diffusion.num_inference_steps=null", "diffusion.variance=beta"),
        ("diffusion.sampler=dpmpp_2m", "diffusion.prediction_type=epsilon"),
        ("diffusion.schedule=cosine", "diffusion.prediction_type=sample", "diffusion.eta=0.5"),
        ("data.channels=3", "diffusion.clip_x_start=true", "diffusion.guidance_scale=1"),
    ],
)
def test_drawing_with_numpy_equals_feddm(tmp_path: Path, overrides: tuple[str, ...]) -> None:
    run = finished_run(tmp_path, *overrides)
    folder = export_run(run, "safetensors").folder
    shape = (12, 2, run.config.data.channels, SIZE, SIZE)
    noise = np.random.default_rng(0).standard_normal(shape, np.float32)
    ours, theirs = iter(torch.from_numpy(noise)), iter(noise)
    model = FORMATS["safetensors"].load_model(folder)
    found = draw(
        model,
        np.array([0, 2]),
        settings=read_settings(folder),
        draw_noise=lambda: next(theirs),
    )
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, drawn_by_feddm(run, lambda: next(ours)), atol=1e-3)


@pytest.mark.parametrize("to", ["safetensors", "torch-export", "onnx"])
def test_a_network_without_shipped_code_is_exported_as_weights_or_as_a_graph_of_its_average(
    tmp_path: Path, to: str
) -> None:
    if FORMATS[to].missing:
        pytest.skip(f"{', '.join(FORMATS[to].missing)} not installed")
    run = finished_run(tmp_path, network=ATTENTION_UNET)
    file = run.path / "model.safetensors"
    # Of the network itself nothing is left: whatever is drawn comes from the average.
    weights = {
        name: value if name.startswith("average") else torch.zeros_like(value)
        for name, value in load_file(file).items()
    }
    save_weights(file, weights, {"round": "3", "config": str(tmp_path)})
    written = export_run(run, to)
    assert written.largest > 0.01
    if to == "safetensors":
        found = load_file(written.folder / "model.safetensors")
        assert found.keys() == weights.keys()
        assert all(torch.equal(found[name], weights[name]) for name in weights)
    else:
        inputs = (np.ones((3, 1, SIZE, SIZE), np.float32), np.zeros(3, np.float32), np.arange(3))
        one, other, _ = FORMATS[to].load_model(written.folder)(*inputs)
        assert np.abs(one - other).max() > 1e-4  # the labels matter


def test_a_format_that_ships_the_code_of_another_network_is_refused(tmp_path: Path) -> None:
    if FORMATS["diffusers"].missing:
        pytest.skip("diffusers is not installed")
    run = finished_run(tmp_path, network=ATTENTION_UNET)
    with pytest.raises(ValueError, match="--to must be safetensors or torch-export or onnx for"):
        export_run(run, "diffusers")


def test_weights_of_a_client_are_its_own(run: Run) -> None:
    written = export_run(run, "safetensors", client=1)
    assert written.folder == run.path / "export" / "safetensors-client-1"
    assert read_settings(written.folder)["exported"]["client"] == 1
    expected, _ = final_model(run.path, run.config, 1)
    found = FORMATS["safetensors"].load_model(written.folder)
    x_t = np.ones((1, 1, SIZE, SIZE), np.float32)
    inputs = (x_t, np.zeros(1, np.float32), np.zeros(1, np.int64))
    with torch.inference_mode():
        own = network_of(expected.eval())(*map(torch.from_numpy, inputs)).numpy()
    np.testing.assert_allclose(found(*inputs), own, atol=1e-6)


def test_an_export_replaces_an_export_and_nothing_else(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "models" / "tiny"
    words = ("export", run.path, "--to", "safetensors", "--out", folder)
    first = feddm(*words)
    assert first.exit_code == 0, first.output
    assert re.search(
        rf"written to {folder}: loaded again, .* differ .* by at most 0\n", first.output
    )
    (folder / "__pycache__").mkdir()
    (folder / "__pycache__" / "steps.cpython-311.pyc").touch()
    assert feddm(*words).exit_code == 0
    card = folder / "README.md"
    written = card.read_text()
    (folder / ".git").mkdir()
    (folder / ".git" / "HEAD").touch()
    assert_fails_in_one_line(feddm(*words), f"{folder} holds what no export wrote")
    assert_fails_in_one_line(feddm(*words), ": .git/HEAD; it would be lost. Move it away")
    assert (folder / ".git" / "HEAD").exists()
    shutil.rmtree(folder / ".git")
    card.write_text(written.replace("license: unknown", "license: mit"))
    assert_fails_in_one_line(feddm(*words), "edited since: README.md; it would be lost")
    assert "license: mit" in card.read_text()
    card.write_text(written)
    assert feddm(*words).exit_code == 0
    assert [path.name for path in folder.parent.iterdir()] == ["tiny"]
    monkeypatch.chdir(folder)
    for here in (".", ".."):
        expected = "--out must be another folder than the working directory and those above it"
        assert_fails_in_one_line(feddm(*words[:-1], here), expected)


def test_a_folder_with_sums_of_its_own_is_no_export(run: Run, tmp_path: Path) -> None:
    (tmp_path / "images.zip").touch()
    (tmp_path / "config.json").write_text("{}")
    write_sums(tmp_path)
    with pytest.raises(ValueError, match=r"no export wrote, .*: config\.json, images\.zip; it "):
        export_run(run, "safetensors", out=tmp_path)
    assert (tmp_path / "images.zip").exists()


def test_an_export_that_predicts_otherwise_is_not_written(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    form = FORMATS["safetensors"]

    def write_others(_: UNet, settings: dict[str, Any], folder: Path) -> None:
        form.write(UNet(**settings["network"]), settings, folder)

    monkeypatch.setitem(FORMATS, "safetensors", dataclasses.replace(form, write=write_others))
    with pytest.raises(ValueError, match=r"the difference between the export and .* must be"):
        export_run(run, "safetensors", out=tmp_path / "out")
    assert not any(tmp_path.iterdir())


def test_wrong_words_are_errors_of_one_line(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def export(path: Path, *words: object) -> Any:
        return feddm("export", path, "--to", *words)

    expected = "--to must be one of safetensors, torch-export, onnx, diffusers, got 'gguf'"
    assert_fails_in_one_line(export(run.path, "gguf"), expected)
    assert_fails_in_one_line(export(tmp_path, "onnx"), "holds no run")
    expected = "client must be one whose weights are in"
    assert_fails_in_one_line(export(run.path, "safetensors", "--client", 5), expected)
    (tmp_path / "config.yaml").write_bytes((run.path / "config.yaml").read_bytes())
    assert_fails_in_one_line(export(tmp_path, "safetensors"), f"no final weights in {tmp_path}")
    missing = dataclasses.replace(FORMATS["onnx"], needs=("not_there",))
    monkeypatch.setitem(FORMATS, "onnx", missing)
    expected = "(not_there: pip install 'feddm[export]'"
    assert_fails_in_one_line(export(run.path, "onnx"), expected)


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["--guidance-scale", "2"], "--guidance-scale must be 1 for a model without a null label"),
        (["--num", "-3"], "--num must be at least 1, got -3"),
        (["--seed", "-1"], "--seed must be at least 0, got -1"),
        (["--steps", "0"], "--steps must be between 1 and 12, got 0"),
        (["--steps", "13"], "--steps must be between 1 and 12, got 13"),
    ],
)
def test_sample_refuses_what_it_cannot_draw(
    unguided: Path, words: list[str], expected: str, capsys: pytest.CaptureFixture[str]
) -> None:
    out = unguided.parent / "drawn"
    with pytest.raises(SystemExit):
        main(FORMATS["safetensors"].load_model, unguided, [*words, "--out", str(out)])
    assert expected in capsys.readouterr().err
    assert not out.exists()


def test_sample_writes_within_its_folder_images_that_say_what_they_are(tmp_path: Path) -> None:
    run = finished_run(tmp_path, "data.classes=['../../escaped','/etc/x','train']")
    folder, out = export_run(run, "safetensors").folder, tmp_path / "a" / "b" / "drawn"
    before = set(tmp_path.rglob("*"))
    main(FORMATS["safetensors"].load_model, folder, ["--num", "1", "--out", str(out)])
    new = {path for path in tmp_path.rglob("*") if path.is_file()} - before
    assert {path.relative_to(out).as_posix() for path in new} == {
        f"{name}/000000.png" for name in folder_names(["../../escaped", "/etc/x", "train"])
    }
    with Image.open(new.pop()) as image:
        assert image.info == {"Software": "feddm", "Comment": NOTICE}


def test_draw_refuses_guidance_without_a_null_label(unguided: Path) -> None:
    settings, model = read_settings(unguided), FORMATS["safetensors"].load_model(unguided)
    nothing = {"draw_noise": lambda: np.zeros((1, 1, SIZE, SIZE), np.float32)}
    with pytest.raises(ValueError, match="guidance_scale must be 1 for a model without a null"):
        draw(model, np.array([0]), settings=settings, guidance_scale=2, **nothing)


def test_pipeline_takes_classes_by_name_and_number(run: Run) -> None:
    pytest.importorskip("diffusers")
    from task.export.diffusers_pipeline import ClassConditionalPipeline
    from task.export.diffusers_unet import ClassConditionalUNet

    settings = {**describe(run.config, build_generator(run.config)), "classes": ["1", "12", "2"]}
    pipe = ClassConditionalPipeline(ClassConditionalUNet(**settings["network"]), settings)
    assert pipe.labels("12", 2).tolist() == [1, 1]
    assert pipe.labels(["2", 1], 1).tolist() == [2, 1]
    assert pipe.labels(2, 1).tolist() == [2]
    assert pipe.labels(None, 1).tolist() == [0, 1, 2]
    for classes, num_images in (([], 1), ("3", 1), (["1", 3], 1), (-1, 1), ("1", 0)):
        with pytest.raises(ValueError, match=r"^(classes must be of 1, 12, 2|num_images must be)"):
            pipe.labels(classes, num_images)


def test_ship_refuses_what_needs_more_of_feddm(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"task/data/files\.py must import nothing of feddm"):
        ship("data/files.py", tmp_path / "files.py")
    assert not any(tmp_path.iterdir())


def test_usage_says_whether_there_is_a_null_label() -> None:
    settings = {"classes": ["0"], "channels": 1, "image_size": 16, "prediction_type": "epsilon"}
    usage = FORMATS["safetensors"].usage
    assert '3 (`null_label`) stands for "no class", which' in usage({**settings, "null_label": 3})
    without = usage({**settings, "null_label": None})
    assert "so this model knows no guidance." in without and "null_label" not in without
    assert not re.search(r"`None`|\(None\)", without)


def test_the_documentation_shows_the_snippets_that_exports_carry() -> None:
    shown = (ROOT / "docs" / "export.md").read_text(encoding="utf-8")
    settings = {
        **dict(classes=["0"], channels=1, image_size=16, null_label=None),
        "prediction_type": "v_prediction",
    }
    for form in FORMATS.values():
        [snippet] = re.findall(r"```python\n.*?```", form.usage(settings), re.DOTALL)
        assert snippet in shown
