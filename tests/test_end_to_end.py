"""The whole system through its real commands: feddm-train, flwr run, SuperLink, SuperNodes."""

import fcntl
import json
import os
import signal
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from server_app.superlink import CONNECTION, private_superlink
from task.checkpoint import load_weights
from tests.processes import CHECKOUT, COMMANDS, SMALL, feddm_train, process, wait_for

pytestmark = pytest.mark.slow

Run = tuple[Path, "subprocess.CompletedProcess[str]"]


def metrics(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def same_weights(one: Path, other: Path) -> bool:
    first, second = (load_weights(run / "model.safetensors")[0] for run in (one, other))
    return first.keys() == second.keys() and all(torch.equal(first[n], second[n]) for n in first)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Run:
    folder = tmp_path_factory.mktemp("finished")
    result = feddm_train(*SMALL, "run_name=whole", cwd=folder)
    assert result.returncode == 0, result.stdout + result.stderr
    return folder / "runs" / "whole", result


def test_feddm_train_leaves_a_whole_run_directory(finished: Run) -> None:
    run, _ = finished
    found = {str(file.relative_to(run)) for file in run.rglob("*") if file.is_file()}
    assert {
        *("config.yaml", "metrics.jsonl", "partition.json", "partition.png"),
        *("samples/round_0002.png", "samples/round_0003.png", "model.safetensors"),
        *("checkpoints/round_0002.safetensors", "checkpoints/round_0003.safetensors"),
    } <= found
    assert "checkpoints/round_0001.safetensors" not in found
    assert any(name.startswith("tensorboard/events") for name in found)
    assert not [name for name in found if Path(name).name.startswith(".round")]
    with Image.open(run / "samples" / "round_0003.png") as picture:
        assert picture.height > picture.width > 100  # ten rows of two
    _, metadata = load_weights(run / "model.safetensors")
    assert metadata["round"] == "3"
    assert json.loads(metadata["config"])["federation"]["num_supernodes"] == 3


def test_feddm_train_says_first_and_last_where_the_results_are(finished: Run) -> None:
    run, result = finished
    lines = [line for line in result.stdout.splitlines() if line.strip()]
    assert lines[0] == lines[-1] == f"results: {run}"
    rounds = [line for line in lines if " round " in line]
    assert len(rounds) == 3
    assert all("train loss" in line and "left" in line for line in rounds)
    assert "test loss" not in rounds[0] and "test loss" in rounds[1]


def test_metrics_hold_every_client_of_every_round(finished: Run) -> None:
    run, _ = finished
    lines = metrics(run)
    counts = json.loads((run / "partition.json").read_text())["train_counts"]
    for server_round in (1, 2, 3):
        told = {
            line["who"]: line["value"]
            for line in lines
            if line["round"] == server_round and line["name"] == "train_num_examples"
        }
        assert told == {f"client-{i}": sum(row) for i, row in enumerate(counts)}
    names = {line["name"] for line in lines if line["who"] == "global"}
    assert {"train_loss", "test_loss", "round_seconds", "class_agreement"} <= names


def test_same_seed_gives_the_same_bits_in_another_order_of_clients(
    finished: Run, tmp_path: Path
) -> None:
    # One actor after the other instead of two side by side.
    result = feddm_train(*SMALL, "run_name=again", "federation.cpus_per_client=2", cwd=tmp_path)
    assert result.returncode == 0, result.stdout + result.stderr
    assert same_weights(finished[0], tmp_path / "runs" / "again")


def test_run_whose_server_is_killed_fails_and_resumes_to_the_same_weights(
    finished: Run, tmp_path: Path
) -> None:
    run = tmp_path / "runs" / "killed"
    command = [COMMANDS / "feddm-train", *SMALL, "run_name=killed"]
    with process(command, log=tmp_path / "log", cwd=tmp_path) as started:
        checkpoint = run / "checkpoints" / "round_0001.safetensors"
        wait_for(checkpoint.exists, seconds=180, what="round 1")
        os.kill(int((run / ".lock").read_text()), signal.SIGKILL)
        assert started.wait(180) == 1
    assert "the run ended as finished:failed" in (tmp_path / "log").read_text()
    assert not (run / "model.safetensors").exists()

    other = feddm_train(*SMALL, "run_name=killed", "resume=true", "train.lr=0.5", cwd=tmp_path)
    assert other.returncode == 1
    assert "train.lr=0.5 (there: 0.001)" in other.stderr

    result = feddm_train(*SMALL, "run_name=killed", "resume=true", cwd=tmp_path)
    assert result.returncode == 0, result.stdout + result.stderr
    assert "going on after round" in result.stdout
    assert same_weights(finished[0], run)
    per_round = [line["round"] for line in metrics(run) if line["name"] == "train_loss"]
    assert sorted(per_round) == [r for r in (1, 2, 3) for _ in range(4)]  # 3 clients and global


@pytest.mark.parametrize("end", [signal.SIGKILL, signal.SIGTERM])
def test_ended_feddm_train_takes_its_simulation_along(tmp_path: Path, end: signal.Signals) -> None:
    run = tmp_path / "runs" / "orphan"
    # A round that would take hours, so that nothing ends by itself.
    long = ["run_name=orphan", "train.local_epochs=100000"]
    with process([COMMANDS / "feddm-train", *SMALL, *long], log=tmp_path / "log", cwd=tmp_path) as (
        started
    ):
        wait_for((run / "config.yaml").exists, seconds=180, what="the start")
        started.send_signal(end)
        started.wait(30)
    wait_for(lambda: is_unlocked(run / ".lock"), seconds=60, what="the end of the simulation")


def is_unlocked(lock: Path) -> bool:
    with lock.open() as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        return True


def test_diverging_run_ends_with_status_1_and_names_the_clients(tmp_path: Path) -> None:
    result = feddm_train(*SMALL, "run_name=diverging", "train.lr=1e30", cwd=tmp_path)
    assert result.returncode == 1
    assert "client 2 is left out: loss must be a finite number, got nan" in result.stdout
    assert "0 of 3 clients sent usable weights, federation.min_replies=1" in result.stderr
    assert "clients 0 1 2: loss must be a finite number, got nan" in result.stderr
    # Nothing of a round that failed is kept, so that a resume repeats it as a whole.
    assert not (tmp_path / "runs" / "diverging" / "metrics.jsonl").exists()


def test_table_is_one_line_and_the_tables_of_a_folder_share_their_cells(tmp_path: Path) -> None:
    words = [*SMALL, "data=digits", "data.image_size=8", "model=tiny", "model.width=8"]
    words += ["diffusion=fast", "diffusion.num_inference_steps=4", "federation.rounds=1"]
    words += ["federation.clients_per_round=3", "federation.keep_local_models=[0]"]
    words += ["eval.num_per_class=3", "run_name=sweep", f"data.cache_dir={tmp_path / 'cache'}"]
    result = feddm_train("experiment=table1", *words, cwd=tmp_path)
    assert result.returncode == 0, result.stdout + result.stderr
    sweep = tmp_path / "runs" / "sweep"
    baseline, federated = (sweep / f"train.mode={m}" for m in ("centralized", "federated"))
    for run in (baseline, federated):
        found = json.loads((run / "evaluation-classifier-correct.json").read_text())
        assert (found["round"], found["n_generated"]) == (1, 30)
    written = (federated / "model.safetensors").stat().st_mtime_ns

    # The cell of beta=0.5 is there; the other one cannot be trained and ends no sweep.
    betas = "partition.beta=0.5,-1"
    result = feddm_train("experiment=table2", *words, betas, cwd=tmp_path)
    assert result.returncode == 1
    assert f"finished already: {federated}" in result.stdout
    assert "partition.beta must be > 0" in result.stderr
    assert (federated / "model.safetensors").stat().st_mtime_ns == written

    for command in (["tables", sweep], ["evaluate", federated, "--client", "0"]):
        result = subprocess.run(
            [COMMANDS / "feddm", *command], capture_output=True, text=True, check=False
        )
        assert result.returncode == 0, result.stderr
    page = (sweep / "tables.md").read_text()
    assert "## Table I: centralised and federated" in page and "Table II:" not in page
    for figure in ("figure2-digits.png", "figure4-digits.png", "figure5-digits.png"):
        with Image.open(sweep / "figures" / figure) as picture:
            assert picture.width > 200
    assert "FID" in (federated / "evaluation-classifier-correct-client-0.json").read_text().upper()


def test_plain_flwr_run_takes_the_size_of_its_federation(tmp_path: Path) -> None:
    run_config = tmp_path / "run.toml"
    run_config.write_text(
        f'output_dir = "{tmp_path}"\nrun_name = "plain"\nfederation.rounds = 1\n'
        'train.local_epochs = 1\nmodel.width = 8\ntrain.precision = "float32"\n'
        'eval.num_images = 0\noverrides = "diffusion.num_inference_steps=4"\n'
    )
    with private_superlink() as superlink:
        subprocess.run(
            [
                *(COMMANDS / "flwr", "run", CHECKOUT, CONNECTION, "--stream"),
                *("--run-config", run_config),
            ],
            env=superlink.environment,
            cwd=tmp_path,
            timeout=300,
            check=True,
        )
    run = tmp_path / "plain"
    assert json.loads((run / "partition.json").read_text())["num_clients"] == 2
    assert (run / "model.safetensors").exists()
