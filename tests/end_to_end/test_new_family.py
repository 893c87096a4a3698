"""A family of generators that feddm does not know, through the real commands."""

import os
import shutil
from pathlib import Path

import pytest
from PIL import Image
from safetensors.torch import load_file

from task.config import MODELS
from task.runs.records import read_records
from tests.processes import SMALL, feddm, feddm_train

pytestmark = pytest.mark.slow

FAMILY = Path(__file__).parent / "pixel_gaussians.py"


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """An environment in which a package brings a family of its own."""
    folder = tmp_path_factory.mktemp("site-packages")
    shutil.copy(FAMILY, folder)
    metadata = folder / "pixel_gaussians-1.0.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text(
        "Metadata-Version: 2.1\nName: pixel-gaussians\nVersion: 1.0\n"
    )
    (metadata / "entry_points.txt").write_text(
        "[feddm.generators]\npixel_gaussians = pixel_gaussians\n"
    )
    path = os.pathsep.join(filter(None, (str(folder), os.environ.get("PYTHONPATH"))))
    return {"PYTHONPATH": path}


@pytest.fixture(scope="module")
def run(installed: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs")
    family = ("~model", "+model.family=pixel_gaussians")
    words = [word for word in SMALL if not word.startswith(("model", "diffusion"))]
    done = feddm_train(*words, *family, "train.lr=0.05", "run_name=toy", cwd=folder, env=installed)
    assert done.returncode == 0, done.stdout + done.stderr
    return folder / "runs" / "toy"


def test_its_configuration_has_no_diffusion(
    run: Path, installed: dict[str, str], tmp_path: Path
) -> None:
    assert "\ndiffusion: null\n" in (run / "config.yaml").read_text()
    words = ("~model", "+model.family=pixel_gaussians", "train.lr=0.05", "diffusion.eta=0")
    refused = feddm_train(*words, cwd=tmp_path, env=installed)
    assert refused.returncode != 0 and not (tmp_path / "runs").exists()
    said = refused.stderr.splitlines()[-1]
    assert "diffusion.eta: model.family=pixel_gaussians has no diffusion" in said
    assert "model=tiny" in said
    drawn = feddm(
        *("generate", run, "--num", 1, "--out", tmp_path / "out", "diffusion.eta=0"), env=installed
    )
    assert drawn.returncode != 0
    said = drawn.stderr.splitlines()[-1]
    assert "diffusion.eta: model.family=pixel_gaussians has no diffusion; leave" in said


def test_it_learns_in_a_federation_and_is_measured(run: Path) -> None:
    records = read_records(run / "metrics.jsonl")
    train_loss = records.series("loss", reference="train")
    assert train_loss[3] < train_loss[1]
    assert records.last("class_agreement") is not None
    assert (run / "report.html").exists()


def test_it_draws_evaluates_reports_and_exports(
    run: Path, installed: dict[str, str], tmp_path: Path
) -> None:
    drawn, exported = tmp_path / "drawn", tmp_path / "exported"
    for words in (
        ("generate", run, "--num", 2, "--out", drawn),
        ("evaluate", run, "--num-per-class", 2, "--extractor", "classifier"),
        ("report", run),
        ("export", run, "--to", "safetensors", "--out", exported),
    ):
        done = feddm(*words, env=installed)
        assert done.returncode == 0, done.stdout + done.stderr
    # There is no table of a single run, but all of its figures.
    assert "SWEEP_DIR: no two runs in " in feddm("tables", run, env=installed).stderr
    assert "pixel_gaussians" in (run / "tables.csv").read_text()
    with Image.open(drawn / "3" / "000001.png") as image:
        assert image.size == (16, 16)
    weights = load_file(exported / "model.safetensors")
    assert set(weights) == {"mean", "log_std"}
    assert (weights["mean"] == load_file(run / "model.safetensors")["mean"]).all()
    card = (exported / "README.md").read_text()
    assert f"{2 * 10 * 16 * 16:,}" in card  # parameters


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (("export", "--to", "onnx"), "--to must be safetensors for this family of models"),
        (
            ("restore", "{image}", "--class", "3", "--upscale", "2", "--out", "{out}"),
            "a family that restores images, such as diffusion, got a mixture of Gaussians",
        ),
    ],
)
def test_what_it_cannot_do_is_said_in_one_line(
    run: Path,
    installed: dict[str, str],
    tmp_path: Path,
    words: tuple[str, ...],
    expected: str,
) -> None:
    image = tmp_path / "small.png"
    Image.new("L", (8, 8)).save(image)
    command, *rest = (word.format(image=image, out=tmp_path / "out") for word in words)
    done = feddm(command, run, *rest, env=installed)
    assert done.returncode != 0
    assert expected in done.stderr.splitlines()[-1]


def test_an_unknown_family_is_refused_by_name(run: Path) -> None:
    done = feddm("generate", run, "--num", 1, "--out", run / "drawn", env={})
    assert done.returncode != 0
    # Other tests make it known to this process.
    known = ", ".join(name for name in MODELS if name != "pixel_gaussians")
    assert f"model.family must be one of {known}, got 'pixel_gaussians'" in done.stderr
