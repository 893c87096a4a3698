import shlex
import tomllib
from pathlib import Path
from typing import Literal

import pytest

from task.config import MODELS, OWN_IMAGES, ModelConfig, anchored, flat_values, load_config
from task.runs.commands import (
    PLACES,
    resubmitting_command,
    resuming_command,
    submitting_command,
    training_command,
    training_words,
)
from task.runs.layout import run_path
from task.runs.resume import check_same_run, different_values
from task.runs.run import Run
from tests.helpers import losses, written_run


@pytest.mark.parametrize(
    "words",
    [
        ["experiment=table1", "data=mnist", "model=tiny", "federation.keep_local_models=[0,1]"],
        [
            "data=image_folder",
            "data.classes=['it\\'s \"a\"','007','null','<x>']",
            "data.root='/a b'",
        ],
        [
            "partition.beta=inf",
            "seed=3",
            "train.lr=1e-5",
            "diffusion=paper",
        ],
        ["experiment=table5", "data.root=/x", "train.precision=bfloat16"],
    ],
)
def test_words_of_a_run_compose_its_configuration(words: list[str]) -> None:
    config = load_config([*words, "run_name=given"])
    repeated = training_words(config)
    wanted, found = flat_values(config), flat_values(load_config(repeated))
    assert {key for key in wanted if wanted[key] != found[key]} <= PLACES
    # Of own images it says as well what feddm-train would otherwise fit to them.
    fitted = 2 * (config.data.name in OWN_IMAGES)
    assert len(repeated) <= len(words) + 2 + fitted


def test_words_of_another_family_replace_the_section_of_its_model(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    class Mixture(ModelConfig):
        family: Literal["mixture"]
        num_components: int

    monkeypatch.setitem(MODELS, "mixture", Mixture)
    words = ["~model", "+model.family=mixture", "+model.num_components=3", "seed=3"]
    # With those of tiny, whose file is not there to say them.
    words += ["train.lr=0.001", "train.batch_size=32"]
    words += ["train.accumulation=1", "train.clip_norm=null"]
    assert training_words(load_config(words)) == ["experiment=demo", *words]


def test_words_of_a_run_name_one_model(tmp_path: Path) -> None:
    words = training_words(load_config(["model=feddm", "model.dropout=0.2", "train.lr=0.001"]))
    assert words == ["experiment=demo", "model=feddm", "model.dropout=0.2", "train.lr=0.001"]


def test_command_of_a_run_of_a_sweep_trains_this_run_alone() -> None:
    command = training_command(load_config(["experiment=table1", "train.mode=centralized"]))
    words = "experiment=table1 train.mode=centralized hydra.mode=RUN"
    assert command == f"feddm-train {words}"
    assert "hydra" not in training_command(load_config(["experiment=demo"]))


def test_words_that_resume_a_run_name_its_folder_of_now(tmp_path: Path) -> None:
    run = written_run(tmp_path / "old", losses(1, {0: 0.5}), rounds_done=1)
    moved = run.rename(tmp_path / "it's new")
    history = Run(moved)
    command = shlex.split(resuming_command(history.config, moved))
    assert command[0] == "feddm-train"
    resumed = anchored(load_config(command[1:]), tmp_path)
    assert resumed.resume and run_path(resumed) == moved
    check_same_run(resumed, moved)
    words = {"output_dir": "/gone", "run_name": "old", "train.lr": 0.1}
    command = resubmitting_command(words, moved, connection="it's")
    toml = command.partition("<<'END'\n")[2].partition("\nEND\n")[0]
    assert tomllib.loads(toml) == {
        "overrides": "train.lr=0.1",
        "output_dir": str(tmp_path),
        "run_name": "it's new",
        "resume": True,
    }
    assert command.endswith("""\nflwr run . 'it'"'"'s' --run-config words.toml""")
    # A key of a file that was tampered with ends no line of what a reader may paste into a shell.
    hostile = {"a\nEND\ntouch owned\nb": "c\nEND\n"}
    lines = submitting_command(hostile).splitlines()
    assert lines[0].endswith("<<'END'") and lines[2] == "END" and len(lines) == 4
    assert tomllib.loads(lines[1]) == {"overrides": "'a\nEND\ntouch owned\nb=c\nEND\n'"}


def test_number_of_rounds_is_fixed_where_learning_rates_follow_it(tmp_path: Path) -> None:
    changes = {"train.lr_schedule": "cosine"}
    run = written_run(tmp_path / "run", losses(1, {0: 0.5}), rounds_done=1, **changes)
    stored = Run(run).config
    check_same_run(stored, run)
    with pytest.raises(ValueError, match=r"federation\.rounds=30 .*by train\.lr_schedule=cosine"):
        check_same_run(stored.changed({"federation.rounds": 30}), run)
    with pytest.raises(ValueError, match=r"strategy\.name=scaffold \(there: fedavg\)"):
        check_same_run(stored.changed({"strategy.name": "scaffold"}), run)
    # Strategies are of clients, which a centralized run has not.
    pooled, other = (
        load_config(["train.mode=centralized", f"strategy={name}"])
        for name in ("fedavg", "fedadam")
    )
    assert different_values(pooled, other) == {}


def test_runs_of_two_families_differ_in_their_family() -> None:
    tiny, gan = (load_config([f"model={name}"]) for name in ("tiny", "resnet_gan"))
    for these, others in ((tiny, gan), (gan, tiny)):
        families = (these.model.family, others.model.family)
        assert different_values(these, others)["model.family"] == families
