import dataclasses
import hashlib
import tomllib
from contextlib import nullcontext
from pathlib import Path
from typing import Literal

import pytest
import torch
from safetensors.torch import save_file

from server_app.evaluation import check_numbers
from server_app.launch.feddm_train import (
    how_to_go_on,
    leaving_no_empty_run,
    name_by_what_is_swept,
    one_folder,
    read_arguments,
    settle_frozen_file,
    sweep_jobs,
    warn_of_wrong_jobs,
)
from server_app.launch.job import (
    check_images,
    check_machine,
    equal_finished_run,
    go_on_with_sweep,
    run_job,
    train_federated,
)
from task.config import (
    MODELS,
    Config,
    FrozenFile,
    ModelConfig,
    anchored,
    flat_values,
    hydra_override,
    load_config,
    load_run_config,
    write_config,
)
from task.data import Dataset, ImageSet
from task.protocol.node import NodeConfig, own_config
from task.runs.commands import resuming_command
from task.runs.layout import run_path
from task.runs.resume import check_same_run
from tests.helpers import SMALL_RUN

CENTRALIZED = {"train.mode": "centralized", "federation.rounds": 1, "eval.num_images": 10}


@pytest.fixture(scope="module")
def sweep(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("sweep")


def job(sweep: Path, name: str, **changes: str | int | bool) -> Config:
    config = load_run_config(
        {**SMALL_RUN, **CENTRALIZED, "output_dir": str(sweep), "run_name": name}
    )
    return config.changed(changes)


@pytest.fixture(scope="module")
def finished(sweep: Path) -> Path:
    run_job(job(sweep, "first"), [])
    return sweep / "first"


def test_finished_job_is_found_under_another_name_and_preset(sweep: Path, finished: Path) -> None:
    assert equal_finished_run(job(sweep, "first")) == finished
    assert equal_finished_run(job(sweep, "second", experiment="table2")) == finished


def test_precision_left_open_takes_what_the_finished_job_settled(
    sweep: Path, finished: Path
) -> None:
    config = job(sweep, "second")
    assert equal_finished_run(config.changed({"train.precision": "auto"})) == finished


@pytest.mark.parametrize(
    "changes",
    [
        {"seed": 1},
        {"train.lr": 0.5},
        {"federation.rounds": 2},
        {"data.root": "/other/images"},
        {"train.mode": "federated"},
    ],
)
def test_other_job_is_not_taken_for_the_finished_one(
    sweep: Path, finished: Path, changes: dict
) -> None:
    assert equal_finished_run(job(sweep, "first").changed(changes)) is None


def test_clients_make_no_difference_to_the_baseline(sweep: Path, finished: Path) -> None:
    config = job(sweep, "second")
    config = config.changed({"partition.beta": 5.0, "federation.num_supernodes": 30})
    assert equal_finished_run(config) == finished


def test_job_whose_measurement_is_missing_is_not_finished(sweep: Path, finished: Path) -> None:
    kept = (finished / "metrics.jsonl").read_text()
    lines = [line for line in kept.splitlines(True) if "class_agreement" not in line]
    (finished / "metrics.jsonl").write_text("".join(lines))
    assert equal_finished_run(job(sweep, "first")) is None
    (finished / "metrics.jsonl").write_text(kept)


def test_resume_of_a_sweep_is_for_the_runs_that_it_has_begun(sweep: Path, finished: Path) -> None:
    assert go_on_with_sweep(job(sweep, "first", resume=True)).resume
    assert not go_on_with_sweep(job(sweep, "never-begun", resume=True)).resume
    assert not go_on_with_sweep(job(sweep, "first")).resume


def test_moved_sweep_is_still_finished(sweep: Path, finished: Path, tmp_path: Path) -> None:
    moved = tmp_path / "moved"
    (sweep / "first").rename(moved.parent / "aside")
    moved.mkdir()
    (moved.parent / "aside").rename(moved / "first")
    assert equal_finished_run(job(moved, "second")) == moved / "first"
    (moved / "first").rename(sweep / "first")


OWN = "hydra.job.config.override_dirname.exclude_keys="


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("", f"{OWN}[]"),
        ("seed=1 -m", f"seed=1 {OWN}[seed] -m"),
        ("-m seed=1,2 train.lr=1", f"-m seed=1,2 train.lr=1 {OWN}[train.lr]"),
        ("-m seed=1 ~data", f"-m seed=1 ~data {OWN}[seed]"),
        ("experiment=demo partition.beta=1", None),
        ("experiment=table2 partition.beta=1", f"{{}} {OWN}[experiment]"),
        ("experiment=table2 seed=1", f"{{}} {OWN}[experiment,seed]"),
        ("experiment=nonsense seed=1", f"{{}} {OWN}[experiment,seed]"),
        # Of a word that is given twice Hydra takes the last.
        ("-m seed=0 seed=1,2 train.lr=1,2", f"{{}} {OWN}[]"),
        ("-m seed=1,2 seed=0 train.lr=1,2", f"{{}} {OWN}[seed]"),
        ("a=[", "a=["),
    ],
)
def test_jobs_are_named_by_what_differs_between_them(words: str, expected: str | None) -> None:
    expected = (expected or f"{{}} {OWN}[experiment,partition.beta]").format(words)
    assert name_by_what_is_swept(words.split()) == expected.split()


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["data.root=/a,b", "seed=1"], ['data.root="/a,b"', "seed=1"]),
        (["data.root=/a,b c", "-m"], ['data.root=/a,"b c"', "-m"]),
        (["--multirun", "run_name=1e5,x"], ["--multirun", 'run_name="1e5",x']),
        (["experiment=table2", "data.root=/a,/b"], ["experiment=table2", "data.root=/a,/b"]),
        (["experiment=demo", "data.root=/a,/b"], ["experiment=demo", 'data.root="/a,/b"']),
        (["--config-dir=/a b", "~data", "seed=1,2"], ["--config-dir=/a b", "~data", "seed=1,2"]),
    ],
)
def test_several_texts_are_given_in_a_sweep_alone(
    arguments: list[str], expected: list[str]
) -> None:
    assert read_arguments(arguments) == expected


def test_way_on_is_the_command_of_the_run_or_of_the_whole_sweep(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    typed = ["-m", "seed=0,1", "run_name=old", "output_dir=out"]
    monkeypatch.setattr("sys.argv", ["feddm-train", *name_by_what_is_swept(typed)])
    config = job(tmp_path / "it's", "seed=0")
    place = f"""output_dir={tmp_path} 'run_name="it'"'"'s"'"""
    expected = f"feddm-train -m seed=0,1 {place} resume=true"
    assert how_to_go_on(config, sweep=True) == f"to go on: {expected}"
    assert how_to_go_on(config, sweep=False) == "nothing of the run is left"
    assert how_to_go_on(None, sweep=True) == "nothing of the run is left"
    path = run_path(config)
    path.mkdir(parents=True)
    (path / "config.yaml").touch()
    assert how_to_go_on(config, sweep=False) == f"to go on: {resuming_command(config, path)}"


def test_tables_are_not_swept_themselves() -> None:
    with pytest.raises(ValueError, match=r"experiment must be one at a time .*'table1'"):
        name_by_what_is_swept(["-m", "experiment=table1,demo"])
    assert len(name_by_what_is_swept(["-m", "experiment=paper,demo"])) == 3


def test_jobs_of_a_sweep_that_cannot_be_trained_are_named_before_the_first_one(
    capfd: pytest.CaptureFixture[str],
) -> None:
    jobs = sweep_jobs(["experiment=survey", "data=digits", "model=vae,tiny", "seed=0,1"])
    assert len(jobs) == 8 and jobs[-1] == [
        *("experiment=survey", "data=digits", "model=tiny", "seed=1", "train.mode=centralized"),
    ]
    assert sweep_jobs(["experiment=table2", "partition.beta=1", "seed=3"]) == []
    assert sweep_jobs(["experiment=table2", "hydra.mode=RUN"]) == []

    def said_of(*arguments: str) -> list[str]:
        warn_of_wrong_jobs(sweep_jobs([*arguments]), [*arguments])
        return capfd.readouterr().err.splitlines()

    assert said_of("experiment=survey", "model=vae") == []
    said = said_of("experiment=survey")
    assert len(said) == 2 and all("the run model=small_gan train.mode=" in line for line in said)
    assert "model.pretrained must be a finished run of model=resnet_gan" in said[0]
    said = said_of("experiment=survey", "model=vae,small_gan", "++model.pretrained=/none")
    assert len(said) == 2 and all("there is no /none" in line for line in said)
    with pytest.raises(ValueError, match=r"none of the 2 runs can be trained: .* no /none$"):
        said_of("experiment=survey", "model=small_gan", "++model.pretrained=/none")
    said = said_of("experiment=survey", "model=vae,stylegan2_ada", "data.image_size=48")
    assert len(said) == 2 and all("the run model=stylegan2_ada" in line for line in said)
    (said_of_lr,) = said_of("-m", "train.lr=1,-1")
    assert "warning: the run train.lr=-1 cannot be trained: train.lr " in said_of_lr


def test_a_job_has_one_folder() -> None:
    assert one_folder("data.root=/a/b,seed=1", 3) == "data.root=_a_b,seed=1"
    assert one_folder('data.root="/a b",seed=1', 3) == "data.root=_a b,seed=1"
    assert one_folder("", 3) == "job-3"


def test_what_a_run_freezes_is_known_by_its_file(tmp_path: Path) -> None:
    file = tmp_path / "model.safetensors"
    save_file({"generator_ema.last.bias": torch.zeros(1)}, file)
    config = load_config(["model=small_gan", f"model.pretrained={tmp_path}"])
    known = settle_frozen_file(config)
    sha256 = hashlib.sha256(file.read_bytes()).hexdigest()
    assert flat_values(known) == flat_values(config) | {"model.pretrained_sha256": sha256}
    assert settle_frozen_file(known) == known
    with pytest.raises(ValueError, match=r"model\.pretrained must be the file of SHA-256 0000"):
        settle_frozen_file(config.changed({"model.pretrained_sha256": "0" * 64}))
    other = load_config()
    assert settle_frozen_file(other) == other
    run = tmp_path / "run"
    run.mkdir()
    write_config(known, run / "config.yaml")
    check_same_run(known.changed({"model.pretrained": "/moved"}), run)
    with pytest.raises(ValueError, match=r"asked for model\.pretrained_sha256=0000"):
        check_same_run(known.changed({"model.pretrained_sha256": "0" * 64}), run)
    file.unlink()
    for missing in (config, known):
        with pytest.raises(FileNotFoundError, match=r"model\.pretrained must be a finished run"):
            settle_frozen_file(missing)


class OnTopConfig(ModelConfig):
    """Of a family that trains on top of a file."""

    family: Literal["on_top"]
    frozen_file = FrozenFile("model.base", "model.base_sha256", expected="a file")
    base: str
    base_sha256: str


def test_file_of_any_family_is_known_and_each_nodes_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(MODELS, "on_top", OnTopConfig)
    (tmp_path / "base").write_bytes(b"weights")
    words = ["~model", "+model.family=on_top", "+model.base=base", "+model.base_sha256="]
    words += ["~diffusion", "data=digits", "train.lr=0.1", "train.batch_size=8"]
    values = flat_values(settle_frozen_file(anchored(load_config(words), tmp_path)))
    assert values["model.base"] == str(tmp_path / "base")
    assert values["model.base_sha256"] == hashlib.sha256(b"weights").hexdigest()
    with pytest.raises(ValueError, match=r"the generator that model\.family=on_top freezes"):
        own_config(load_config(words).changed(values), NodeConfig())
    own = own_config(load_config(words).changed(values), NodeConfig(pretrained_generator="own"))
    assert flat_values(own)["model.base"] == str(Path.home() / "own")


def test_generator_that_does_not_fit_is_refused_before_training(tmp_path: Path) -> None:
    save_file({"generator_ema.last.bias": torch.zeros(1)}, tmp_path / "model.safetensors")
    words = ["model=small_gan", "model.perceptual_weight=0", f"model.pretrained={tmp_path}"]
    with pytest.raises(ValueError, match=r"model\.pretrained must be of the same model\.width"):
        check_images(load_config(words))


def test_extractor_that_is_missing_is_refused_before_training(sweep: Path) -> None:
    words = {**SMALL_RUN, **CENTRALIZED, "eval.final_metrics": True, "output_dir": str(sweep)}
    words |= {"eval.extractor": "exported", "eval.exported_program": "/no.pt2"}
    with pytest.raises(FileNotFoundError, match="there is no such file"):
        check_images(load_run_config(words))


@pytest.fixture
def two_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda number: "GPU")


@pytest.mark.usefixtures("two_gpus")
@pytest.mark.parametrize(
    ("words", "message"),
    [
        ({"train.device": "cuda:2"}, r"train\.device must be .* 2 GPUs .* got 'cuda:2'"),
        ({"train.device": "cuda:1"}, r"train\.device must be .* cuda in a simulation.*'cuda:1'"),
        ({"train.num_processes": 3}, r"train\.num_processes must be at most 2, .* got 3"),
        ({"train.num_processes": 2}, r"must be at most 1, .*federation\.gpus_per_client.* got 2"),
        (
            {"train.num_processes": 2, "federation.gpus_per_client": 0.5},
            r"must be at most 1, .*federation\.gpus_per_client.* got 2",
        ),
        ({"federation.gpus_per_client": 0}, r"a fraction > 0 of a GPU .* train\.device=cpu, got 0"),
        ({"federation.gpus_per_client": 1.5}, r"gpus_per_client must be .* whole number .* 1\.5"),
        ({"federation.gpus_per_client": 3}, r"gpus_per_client must be at most 2, .* got 3"),
        ({"federation.gpus_per_client": 0, "train.device": "cpu"}, None),
        ({"train.num_processes": 2, "federation.gpus_per_client": 2}, None),
        ({"train.num_processes": 2, "train.mode": "centralized"}, None),
        ({"train.device": "cuda:1", "train.mode": "centralized"}, None),
        ({"train.device": "cuda:0", "federation.gpus_per_client": 0.25}, None),
        ({"train.device": "cpu", "train.num_processes": 3}, None),
    ],
)
def test_gpus_that_a_run_would_not_get_are_refused_before_it_starts(
    words: dict[str, str | int | float], message: str | None
) -> None:
    config = load_run_config({**SMALL_RUN, "train.device": "auto", "train.compile": False, **words})
    with pytest.raises(ValueError, match=message) if message else nullcontext():
        check_machine(config)


@pytest.mark.parametrize(
    ("num_train", "num_test", "num_per_class", "expected"),
    [
        (100, 100, 4, r"eval\.num_per_class must be a number that makes 10"),
        (100, 1, None, r"eval\.num_per_class must be .* and of every class, got None"),
        (100, 8, 5, "the test images must be at least 10"),
        (19, 0, 5, "the training images must be at least 20"),
        (20, 0, 5, None),
        (10, 10, None, None),
    ],
)
def test_too_few_images_for_metrics_are_refused(
    num_train: int, num_test: int, num_per_class: int | None, expected: str | None
) -> None:
    words: dict[str, str | int | bool] = {"eval.final_metrics": True}
    words["overrides"] = "data=image_folder data.classes=[a,b]"
    if num_per_class is not None:
        words["eval.num_per_class"] = num_per_class
    sets = [
        ImageSet(torch.zeros(number, 3, 32, 32, dtype=torch.uint8), torch.arange(number) % 2)
        for number in (num_train, num_test)
    ]
    with pytest.raises(ValueError, match=expected) if expected else nullcontext():
        check_numbers(load_run_config(words), Dataset(*sets))
    if num_test == 0 and expected is None:
        # Of two patients one has all but an image, and is one half.
        groups = (torch.arange(num_train) > 0).long()
        known = Dataset(dataclasses.replace(sets[0], groups=groups), sets[1])
        with pytest.raises(ValueError, match="of patients of whom each half has at least 10"):
            check_numbers(load_run_config(words), known)


@pytest.mark.parametrize("begun", [False, True])
@pytest.mark.parametrize("there", [False, True])
def test_folder_of_a_run_that_has_not_begun_goes_and_its_log_is_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, begun: bool, there: bool
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    run = tmp_path / "runs" / "name"
    if there:
        run.mkdir(parents=True)
    with (
        pytest.raises(RuntimeError, match="no\nall that was said: ") as raised,
        leaving_no_empty_run(run),
    ):
        run.mkdir(parents=True, exist_ok=True)
        (run / "log.txt").write_text("said")
        if begun:
            (run / "config.yaml").touch()
        raise RuntimeError("no")
    assert run.exists() == (begun or there)
    assert Path(str(raised.value).rsplit(": ")[-1]).read_text() == "said"


def test_interrupted_run_that_has_not_begun_leaves_no_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    run = tmp_path / "name"
    with pytest.raises(KeyboardInterrupt), leaving_no_empty_run(run):
        run.mkdir()
        (run / "log.txt").touch()
        raise KeyboardInterrupt
    assert not list(tmp_path.iterdir())
    with pytest.raises(ValueError, match="too long"), leaving_no_empty_run(tmp_path / ("x" * 300)):
        raise ValueError("too long")


def test_simulation_composes_the_configuration_of_its_job(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = "a=b (x) [é],~😀 'q\"${no}"
    words = [hydra_override("data.root", text), hydra_override("run_name", text)]
    words += [hydra_override("data.classes", [text, "1e5"]), "data=image_folder", "seed=3"]
    words += [f"eval.exported_program={text}.pt2", "eval.extractor=exported", "train.device=cpu"]
    words += ["model=small_gan", f"model.pretrained={text}"]
    known = {"model.pretrained_sha256": "0" * 64}
    config = anchored(load_config(words), tmp_path).changed(known)
    assert flat_values(config)["model.pretrained"] == str(tmp_path / text)
    submitted = []
    monkeypatch.setattr(
        "server_app.launch.job.simulate",
        lambda app, run_config, **_: submitted.append(run_config()),
    )
    train_federated(config, words)
    assert load_run_config(tomllib.loads(submitted[0])) == config
