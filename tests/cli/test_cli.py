import inspect
import json
import math
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import cast

import click
import pytest
import torch
from click.testing import Result
from PIL import Image
from typer.main import get_command
from typer.testing import CliRunner

from task.cli.main import app
from task.config import anchored, load_config, read_config, write_config
from task.generators.registry import build_generator
from task.runs.checkpoint import save_weights
from task.runs.evaluations import evaluation_of
from task.runs.records import TEST
from task.runs.resume import check_startable
from task.runs.run import Run, find_runs, load_run
from task.runs.writer import RunWriter

FILE = "evaluation-classifier-correct.json"


@pytest.fixture(scope="module", autouse=True)
def quick() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("task.evaluation.metrics.KID_SUBSETS", 5)
        patch.setattr("task.evaluation.classifier.MAX_STEPS", 20)
        yield


def finished_run(folder: Path, *overrides: str) -> Path:
    """Make a finished run of a network that learned nothing."""
    config = load_config(
        [
            *("data.image_size=8", "run_name=tiny", *overrides),
            *("model.width=8", "model.num_poolings=1", "diffusion.num_inference_steps=4"),
            *("train.precision=float32", "eval.extractor=classifier"),
            *("train.device=cpu", "federation.rounds=3", f"output_dir={folder}"),
            f"data.cache_dir={folder / 'cache'}",
        ]
    )
    path = folder / "tiny"
    path.mkdir()
    write_config(anchored(config, folder), path / "config.yaml")
    torch.manual_seed(0)
    save_weights(path / "model.safetensors", build_generator(config).state_dict(), {"round": "3"})
    return path


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs")
    return finished_run(folder, "data=digits", "data.test_fraction=0.1")


COMMANDS = cast(click.Group, get_command(app)).commands


def feddm(*words: object) -> Result:
    return CliRunner().invoke(app, [str(word) for word in words])


def assert_fails_in_one_line(result: Result, *expected: str) -> None:
    assert result.exit_code == 1
    assert isinstance(result.exception, SystemExit)
    assert result.stderr.startswith("feddm: ")
    assert result.stderr.count("\n") == 1
    for words in expected:
        assert words in result.stderr


def test_help_lists_the_commands() -> None:
    result = feddm("--help")
    assert result.exit_code == 0
    assert "evaluate" in result.stdout
    assert "--num-per-class" in feddm("evaluate", "--help").stdout


@pytest.mark.parametrize("name", sorted({*COMMANDS} - {"bench"}))  # its help is the benchmarks'
def test_every_command_teaches_by_examples_that_can_be_copied(name: str) -> None:
    text = str(COMMANDS[name].help)
    examples = inspect.cleandoc(text.replace("\\[", "[")).partition("Examples:\n")[2].splitlines()
    shown = [line.strip() for line in feddm(name, "--help").stdout.splitlines()]
    assert f"feddm {name} " in "\n".join(examples)
    # As a terminal of 80 columns shows them: no line is wrapped, no bracket taken for markup.
    assert [line for line in examples if line.strip() not in shown] == []


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("feddm --help", "check-node"),
        ("feddm generate nothing --num 1 --out x", "feddm: RUN: nothing holds no run"),
        ("feddm restore nothing a.png --class 3 --out x", "feddm: RUN: nothing holds no run"),
        ("feddm evaluate nothing", "feddm: RUN: nothing holds no run"),
        ("feddm export nothing --to onnx", "feddm: RUN: nothing holds no run"),
        ("feddm report nothing", "feddm: RUN: nothing holds no run"),
        ("feddm tables nothing", "feddm: SWEEP_DIR: there is no folder nothing"),
        ("feddm doctor --data-root nothing", "feddm: --data-root: there is no folder nothing"),
        ("feddm check-node nonsense=1", "feddm: configuration: no such value: nonsense"),
        ("feddm-train nonsense=1", "feddm-train: configuration: no such value: nonsense"),
        ("feddm-train data=chest_xray data.root=nothing", "nothing: there is no such folder"),
        ("feddm-train run_name=..", "feddm-train: run_name must be the name of one folder"),
        ("feddm-train resume=true run_name=no", "no holds no run; check output_dir and run_name"),
    ],
)
def test_wrong_calls_are_answered_without_torch(words: str, expected: str, tmp_path: Path) -> None:
    program, *arguments = words.split()
    module = {"feddm": "task.cli.main", "feddm-train": "server_app.launch.feddm_train"}[program]
    # An import of torch fails.
    code = f"import sys; sys.modules['torch'] = None; from {module} import main; main()"
    command = [sys.executable, "-c", code, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=tmp_path)
    assert expected in done.stdout + done.stderr
    assert done.returncode == (0 if "--help" in words else 1)
    assert "Traceback" not in done.stderr and [*tmp_path.iterdir()] == []


def test_sweep_ends_with_the_names_of_the_runs_that_failed(tmp_path: Path) -> None:
    words = ["-m", "seed=1,2", "data=chest_xray", "data.root=nothing"]
    code = "from server_app.launch.feddm_train import main; main()"
    command = [sys.executable, "-c", code, *words]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=tmp_path)
    *each, last = done.stderr.splitlines()
    assert last == "feddm-train: 2 failed: seed=1; seed=2" and done.returncode == 1
    assert ["nothing: there is no such folder" in line for line in each] == [True, True]


@pytest.mark.parametrize(
    ("typed", "offered"),
    [("feddm tab", "tables"), ("feddm evaluate --extractor i", "inception")],
)
def test_tab_completes_commands_and_values(typed: str, offered: str) -> None:
    environment = {
        **os.environ,
        "_FEDDM_COMPLETE": "complete_bash",
        "COMP_WORDS": typed,
        "COMP_CWORD": str(len(typed.split()) - 1),
    }
    command = [sys.executable, "-c", "from task.cli.main import main; main()"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.split() == [offered]


def test_evaluate_prints_a_table_and_writes_what_it_holds_for(run: Path) -> None:
    result = feddm("evaluate", run)
    assert result.exit_code == 0, result.output
    found = json.loads((run / FILE).read_text())
    # The test split holds a tenth of each class of 1,797 digits.
    assert found["n_generated"] == found["n_test"] == found["n_floor"]
    expected = {"round": 3, "data": "digits", "extractor": "classifier", "image_range": "correct"}
    assert {name: found[name] for name in expected} == expected
    records = evaluation_of(found).records
    fid, floor = (records.last("fid", reference=TEST, real=real) for real in (False, True))
    cas = records.value("cas")
    assert fid is not None and floor is not None and fid.value > floor.value
    for words in (
        "tiny, round 3 of 3",
        f"FD (test) ↓ {fid.value:.4f} {floor.value:.4f}",
        f"classification accuracy score ↑ {cas:.4f}",
        f"extractor classifier {found['extractor_sha256'][:12]}, image range correct",
        f"{found['n_floor']:,} real images in place of the generated ones",
        "FD is not FID: the scores of the literature",
        str(run / FILE),
    ):
        assert words in " ".join(result.stdout.split())


def test_evaluate_repeats_itself_for_a_seed(run: Path) -> None:
    texts = []
    for _ in range(2):
        assert feddm("evaluate", run, "--num-per-class", 2).exit_code == 0
        texts.append((run / FILE).read_bytes())
    assert texts[0] == texts[1]
    assert json.loads(texts[0])["n_generated"] == 20


def test_options_and_overrides_change_how_images_are_measured(run: Path, tmp_path: Path) -> None:
    options = ("--image-range", "paper", "--num-per-class", 20, "--batch-size", 50)
    result = feddm("evaluate", run, f"data.cache_dir={tmp_path}", *options)
    assert result.exit_code == 0, result.output
    found = json.loads((run / "evaluation-classifier-paper.json").read_text())
    assert (found["image_range"], found["n_generated"]) == ("paper", 200)
    assert "never beside correct figures" in result.stdout
    assert f"draws of {found['n_floor']} of the images, as many as real ones" in result.stdout
    assert [*tmp_path.glob("classifier-*.safetensors")] != []


def test_images_drawn_otherwise_are_kept_apart_from_those_of_the_run(
    run: Path, tmp_path: Path
) -> None:
    copy = Path(shutil.copytree(run, tmp_path / "copy"))
    for file in copy.glob("evaluation-*.json"):
        file.unlink()
    words = ("diffusion.sampler=dpmpp_2m", "diffusion.num_inference_steps=null", "--batch-size", 7)
    result = feddm("evaluate", copy, "--num-per-class", 2, *words)
    assert result.exit_code == 0, result.output
    assert "round 3 of 3, drawn with sampler=dpmpp_2m,num_inference_steps=None" in result.stdout
    [file] = copy.glob("evaluation-*.json")
    assert file.name.endswith("-correct-sampler=dpmpp_2m,num_inference_steps=None.json")
    found = json.loads(file.read_text())
    assert (found["sampler"], found["num_inference_steps"]) == ("dpmpp_2m", 300)
    assert (found["clip_x_start"], found["eval.precision"]) == (False, "float32")
    # Nothing that looks for measurements of the run takes this for one.
    assert find_runs(copy)[0].main_evaluations == []
    # Nor for one of another seed, which would take the place of the run's own.
    for seed in ("seed=7", "eval.seed=7"):
        seeded = feddm("evaluate", copy, "--num-per-class", 2, seed)
        assert seeded.exit_code == 0, seeded.output
        assert (copy / f"evaluation-classifier-correct-{seed}.json").exists()
    assert find_runs(copy)[0].main_evaluations == [] and not (copy / FILE).exists()
    # What the run says itself is no other way of drawing.
    same = feddm("evaluate", copy, "--num-per-class", 2, "diffusion.num_inference_steps=4")
    assert same.exit_code == 0, same.output
    assert [each.name for each in find_runs(copy)[0].main_evaluations] == [FILE]


def test_a_data_set_without_test_images_is_measured_against_its_training_images(
    tmp_path: Path,
) -> None:
    noise = torch.randint(256, (60, 8, 8), generator=torch.Generator().manual_seed(0))
    for number, pixels in enumerate(noise.byte().numpy()):
        file = tmp_path / "scans" / ("COVID", "non-COVID")[number % 2] / f"{number}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(file)
    run = finished_run(tmp_path, "data=sars_cov_2_ct", f"data.root={tmp_path / 'scans'}")
    result = feddm("evaluate", run)
    assert result.exit_code == 0, result.output
    found = json.loads((run / FILE).read_text())
    assert (found["n_generated"], found["n_train"], found["n_test"]) == (60, 60, 0)
    printed = " ".join(result.stdout.split())
    assert "real: 30 real images in place of the generated ones, training images drawn" in printed
    assert "against 30 others of them" in printed
    assert "no images are held out: all is measured against the training images" in printed
    assert "FD (train) ↓" in printed and "found in the class asked for" in printed
    for words in ("FD (test)", "classification accuracy score", "nearest training image"):
        assert words not in printed


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (
            ("--extractor", "vgg"),
            "eval.extractor must be one of auto, inception, classifier, efficientnet",
        ),
        (("--extractor", "exported"), "eval.exported_program must be the file of a program"),
        (("--device", "tpu"), "train.device must be auto, cpu, cuda or cuda:N"),
        (("partition.beta=1",), "an override must be NAME=VALUE with a name of data.cache_dir"),
        (("eval.extractor",), "an override must be NAME=VALUE"),
        (("eval.batch_size=many",), "many"),
        (("eval.precision=auto",), "precision must be float32 or bfloat16, got 'auto'"),
        (("diffusion.sampler=heun",), "diffusion.sampler must be one of ddpm, ddim, dpmpp_2m"),
        (("diffusion.num_timesteps=20",), "an override must be NAME=VALUE"),
        (("--num-per-class", "1", "eval.batch_size=0"), "eval.batch_size must be > 0"),
    ],
)
def test_wrong_words_are_errors_of_one_line(
    run: Path, words: tuple[str, ...], expected: str
) -> None:
    assert_fails_in_one_line(feddm("evaluate", run, *words), expected)


def test_a_folder_that_holds_no_run_is_an_error_of_one_line(tmp_path: Path) -> None:
    assert_fails_in_one_line(feddm("evaluate", tmp_path), f"{tmp_path} holds no run")
    assert_fails_in_one_line(feddm("evaluate", tmp_path / "no"), "holds no run")
    (tmp_path / "config.yaml").write_text("seed: 0\n")
    assert_fails_in_one_line(feddm("evaluate", tmp_path), "is not a configuration of this feddm")


def test_unusable_weights_are_errors_of_one_line(run: Path, tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_bytes((run / "config.yaml").read_bytes())
    assert_fails_in_one_line(
        feddm("evaluate", tmp_path),
        f"no final weights in {tmp_path}: finish it with feddm-train experiment=",
        f"output_dir={tmp_path.parent} run_name={tmp_path.name} resume=true",
    )
    (tmp_path / "nodes.json").touch()
    assert_fails_in_one_line(feddm("evaluate", tmp_path), f"`feddm report {tmp_path}` shows how")
    file = tmp_path / "model.safetensors"
    file.write_bytes(b"nothing of the kind")
    assert_fails_in_one_line(feddm("evaluate", tmp_path), "not a readable safetensors file")
    save_weights(file, {"weight": torch.ones(1)}, {"round": "3"})
    assert_fails_in_one_line(feddm("evaluate", tmp_path), "does not fit the network")
    config = read_config(tmp_path / "config.yaml")
    vast = config.changed({"model.width": 10**8})
    write_config(vast, tmp_path / "config.yaml")
    assert_fails_in_one_line(feddm("evaluate", tmp_path), "does not fit the network")
    save_weights(file, {"weight": torch.full((1,), math.nan)}, {"round": "3"})
    assert_fails_in_one_line(feddm("evaluate", tmp_path), "finite weights, got", "['weight']")


def test_inception_without_weights_fails_before_images_are_drawn(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    for name in ("no_proxy", "NO_PROXY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    result = feddm("evaluate", run, "--extractor", "inception")
    assert_fails_in_one_line(result, "eval.extractor=inception needs Inception's weights")
    assert "drawing" not in result.stdout


@pytest.fixture(params=["0.1.0", "0.1.0-federated"])
def earlier_run(tmp_path: Path, request: pytest.FixtureRequest) -> Path:
    """A run of the first schema, with a value that this version does not know.

    The first is one as version 0.1.0 first wrote it, the other as it last did.
    """
    run = tmp_path / "sweep" / "earlier"
    shutil.copytree(Path(__file__).parents[1] / "runs" / request.param, run)
    with (run / "config.yaml").open("a", encoding="utf-8") as file:
        file.write("privacy:\n  amount: 1.5\n")
    return run


def test_run_of_an_earlier_version_is_drawn_from_shown_and_compared(
    earlier_run: Path, tmp_path: Path
) -> None:
    for words in (
        ("generate", earlier_run, "--class", 3, "--num", 2, "--out", tmp_path / "images"),
        ("evaluate", earlier_run, "--num-per-class", 2, "diffusion.num_inference_steps=2"),
        ("report", earlier_run),
        ("export", earlier_run, "--to", "safetensors"),
    ):
        result = feddm(*words)
        assert result.exit_code == 0, result.output
    assert len([*(tmp_path / "images" / "3").glob("*.png")]) == 2
    assert "Warning" in (earlier_run / "export" / "safetensors" / "README.md").read_text()
    run = load_run(earlier_run)
    size = run.config.data.image_size
    assert run.sample(classes=[3], num_images=2).images.shape == (2, 1, size, size)
    other = Path(shutil.copytree(earlier_run, earlier_run.parent / "other"))
    text = (other / "config.yaml").read_text(encoding="utf-8")
    (other / "config.yaml").write_text(text.replace("beta: 0.5", "beta: 5.0"), encoding="utf-8")
    # One that cannot be read does not end the table of the others.
    newer = Path(shutil.copytree(earlier_run, earlier_run.parent / "newer"))
    (newer / "schema.json").write_text('{"version": 99}')
    result = feddm("tables", earlier_run.parent, "--no-figures")
    assert result.exit_code == 0 and "Table II" in result.stdout, result.output
    assert (
        f"{newer} is of schema 99, and this version of feddm reads schemas up to" in result.output
    )
    assert_fails_in_one_line(feddm("report", newer), "is of schema 99")


def test_run_of_an_earlier_version_is_resumed_where_all_its_values_are_known(
    earlier_run: Path,
) -> None:
    place = {"output_dir": str(earlier_run.parent), "run_name": "earlier"}
    stored = read_config(earlier_run / "config.yaml")
    config = stored.changed({"resume": True, **place})
    with pytest.raises(ValueError, match=r"was trained with privacy\.amount=1\.5, which"):
        check_startable(config)
    file = earlier_run / "config.yaml"
    file.write_text(file.read_text(encoding="utf-8").partition("privacy:")[0], encoding="utf-8")
    check_startable(config)
    before = Run(earlier_run).records.all
    with closing(RunWriter(config)) as writer:
        assert writer.last_round == len([*earlier_run.glob("checkpoints/*")]) * 2
    # Of the second schema now; a run without checkpoints begins anew.
    assert (earlier_run / "schema.json").exists()
    after = Run(earlier_run).records.all
    assert after == (before if writer.last_round else ())
