"""The whole system through its real commands: feddm-train, flwr run, SuperLink, SuperNodes."""

import fcntl
import json
import os
import re
import shutil
import signal
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from PIL import Image

from server_app.launch.superlink import CONNECTION, free_port, private_superlink
from task.runs.checkpoint import load_weights
from task.runs.records import TEST, TRAIN, read_records
from task.runs.run import Run
from tests.processes import (
    CHECKOUT,
    COMMANDS,
    SMALL,
    feddm_train,
    process,
    processes_below,
    wait_for,
)

pytestmark = pytest.mark.slow

Finished = tuple[Path, "subprocess.CompletedProcess[str]"]


def same_weights(one: Path, other: Path) -> bool:
    first, second = (load_weights(run / "model.safetensors")[0] for run in (one, other))
    return first.keys() == second.keys() and all(torch.equal(first[n], second[n]) for n in first)


# None of it may matter: all traffic is local, nothing is kept at home, and names are ASCII.
ADVERSE = {
    **dict.fromkeys(("all_proxy", "http_proxy", "HTTPS_PROXY"), "socks5://127.0.0.1:1"),
    **{"HOME": "/dev/null/home", "LC_ALL": "C", "PYTHONIOENCODING": "ascii"},
}


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Finished:
    folder = tmp_path_factory.mktemp("finished")
    # Flower takes the name of a connection for a path where an app lies in a folder of that name.
    (folder / CONNECTION).mkdir()
    (folder / CONNECTION / "pyproject.toml").touch()
    result = feddm_train(*SMALL, "run_name=whole", cwd=folder, env=ADVERSE)
    assert result.returncode == 0, result.stdout + result.stderr
    return folder / "runs" / "whole", result


@pytest.fixture(scope="module")
def strange_ray() -> Iterator[dict[str, str]]:
    """A Ray without a core of its own, and the variables with which Ray by itself finds it."""
    with tempfile.TemporaryDirectory(prefix="ray-", dir="/tmp") as folder:
        found = {"RAY_TMPDIR": folder}
        command = ["ray", "start", "--head", "--num-cpus=0", "--include-dashboard=false"]
        command += [f"--port={free_port()}", "--min-worker-port=0", "--max-worker-port=0"]
        with process(
            [COMMANDS / command[0], *command[1:], "--block"],
            log=Path(folder) / "log",
            cwd=Path(folder),
            env=found,
        ):
            address = Path(folder) / "ray" / "ray_current_cluster"
            wait_for(address.exists, seconds=600, what="a Ray of somebody else's")
            yield found


def test_feddm_train_leaves_a_whole_folder(finished: Finished) -> None:
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


def test_feddm_train_says_first_and_last_where_the_results_are(finished: Finished) -> None:
    run, result = finished
    # Matplotlib has a warning where nothing can be kept at home.
    lines = [line for line in result.stdout.splitlines() if "atplotlib" not in line]
    assert lines[0] == lines[-1] == f"results: {run}"
    for noise in ("INFO", "default simulated SuperNodes", "FutureWarning", "warnings.warn"):
        assert noise not in result.stdout and noise in (run / "log.txt").read_text()
    rounds = [line for line in lines if re.search(r" round \d/3: ", line)]
    assert len(rounds) == 3
    assert all(re.search(r", about \d:\d\d left, and 20 images to measure$", r) for r in rounds)
    assert all("train loss" in line for line in rounds)
    assert "test loss" not in rounds[0] and "test loss" in rounds[1]


def test_metrics_hold_every_client_of_every_round(finished: Finished) -> None:
    run, _ = finished
    records = read_records(run / "metrics.jsonl")
    counts = json.loads((run / "partition.json").read_text())["train_counts"]
    for server_round in (1, 2, 3):
        for client, row in enumerate(counts):
            loss = records.by_round("loss", reference=TRAIN, client=client)[server_round]
            assert loss.n == sum(row)
    assert records.series("loss", reference=TEST) and records.series("round_seconds")
    assert records.value("class_agreement") is not None


def test_same_seed_gives_the_same_bits_in_another_order_of_clients(
    finished: Finished, strange_ray: dict[str, str], tmp_path: Path
) -> None:
    # One actor after the other instead of two side by side, and none in the Ray of others.
    words = [*SMALL, "run_name=again", "federation.cpus_per_client=2"]
    result = feddm_train(*words, cwd=tmp_path, env=strange_ray)
    assert result.returncode == 0, result.stdout + result.stderr
    assert same_weights(finished[0], tmp_path / "runs" / "again")


def test_run_whose_server_is_killed_fails_and_resumes_to_the_same_weights(
    finished: Finished, tmp_path: Path
) -> None:
    run = tmp_path / "runs" / "killed"
    command = [COMMANDS / "feddm-train", *SMALL, "run_name=killed"]
    # Ray has left its address here, and is gone.
    dead = Path(tempfile.mkdtemp(prefix="ray-", dir="/tmp"))
    (dead / "ray").mkdir()
    (dead / "ray" / "ray_current_cluster").write_text(f"127.0.0.1:{free_port()}")
    with process(
        command, log=tmp_path / "log", cwd=tmp_path, env={"RAY_TMPDIR": str(dead)}
    ) as started:
        checkpoint = run / "checkpoints" / "round_0001.safetensors"
        wait_for(checkpoint.exists, seconds=600, what="round 1")
        os.kill(int((run / ".lock").read_text()), signal.SIGKILL)
        assert started.wait(60) == 1
    shutil.rmtree(dead)
    assert "the simulation was killed by signal 9" in (tmp_path / "log").read_text()
    *_, said, way_on = (tmp_path / "log").read_text().splitlines()
    assert said == f"all that was said: {run / 'log.txt'}"
    assert way_on.startswith("feddm-train: to go on: feddm-train ")
    assert way_on.endswith(" run_name=killed resume=true")
    assert not (run / "model.safetensors").exists()

    other = feddm_train(*SMALL, "run_name=killed", "resume=true", "train.lr=0.5", cwd=tmp_path)
    assert other.returncode == 1
    assert "train.lr=0.5 (there: 0.001)" in other.stderr

    result = feddm_train(*SMALL, "run_name=killed", "resume=true", cwd=tmp_path)
    assert result.returncode == 0, result.stdout + result.stderr
    assert "going on after round" in result.stdout
    assert same_weights(finished[0], run)
    records = read_records(run / "metrics.jsonl").all
    per_round = [r.round for r in records if (r.metric, r.reference) == ("loss", TRAIN)]
    assert sorted(per_round) == [r for r in (1, 2, 3) for _ in range(4)]  # 3 clients and global


@pytest.fixture
def heard_hangup() -> Iterator[None]:
    """Let SIGHUP end what is started: under nohup it is ignored, which feddm-train keeps so."""
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    yield
    signal.signal(signal.SIGHUP, before)


@pytest.mark.usefixtures("heard_hangup")
@pytest.mark.parametrize("end", [signal.SIGKILL, signal.SIGHUP])
def test_ended_feddm_train_takes_its_simulation_along(tmp_path: Path, end: signal.Signals) -> None:
    run = tmp_path / "runs" / "orphan"
    # A round that would take hours, so that nothing ends by itself.
    long = ["run_name=orphan", "train.local_epochs=100000"]
    command = [COMMANDS / "feddm-train", *SMALL, *long]
    with tempfile.TemporaryDirectory(dir="/tmp") as own:
        with process(command, log=tmp_path / "log", cwd=tmp_path, env={"TMPDIR": own}) as started:
            wait_for((run / "config.yaml").exists, seconds=600, what="the start")
            started.send_signal(end)
            started.wait(120)
        # Agents of Ray look for their raylet once a minute.
        wait_for(lambda: not processes_below(own), seconds=600, what="the end of the simulation")
        assert is_unlocked(run / ".lock")
        if end != signal.SIGKILL:
            assert started.returncode == 130
            assert not list(Path(own).glob("feddm-*"))
            said = (tmp_path / "log").read_text().splitlines()[-1]
            assert said.startswith("feddm-train: interrupted; to go on: feddm-train ")
            assert said.endswith(" run_name=orphan resume=true")


def test_closed_output_ends_a_run_with_a_line_and_leaves_nothing(tmp_path: Path) -> None:
    with subprocess.Popen(
        [COMMANDS / "feddm-train", *SMALL, "run_name=head"],
        cwd=tmp_path,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as started:
        assert started.stdout is not None and started.stderr is not None
        started.stdout.readline()
        started.stdout.close()
        said = started.stderr.read()
        assert started.wait(300) == 1
    assert said == "feddm-train: ended, because its output was closed; nothing of the run is left\n"
    assert not (tmp_path / "runs" / "head").exists()


def test_ray_that_is_asked_for_and_does_not_answer_is_named_at_once(tmp_path: Path) -> None:
    address = f"127.0.0.1:{free_port()}"
    result = feddm_train(*SMALL, cwd=tmp_path, env={"RAY_ADDRESS": address})
    assert result.returncode == 1 and not list((tmp_path / "runs").iterdir())
    assert f"RAY_ADDRESS must be the address of a running Ray, got '{address}'" in result.stderr


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
    assert "training has diverged in round 1 (clients 0 1 2: loss must be" in result.stderr
    assert "to go on" not in result.stderr
    run = Run(tmp_path / "runs" / "diverging")
    reason = "clients 0 1 2: loss must be a finite number, got nan"
    assert run.divergence is not None and run.divergence.context == {"reason": reason}
    report = (run.path / "report.html").read_text()
    assert f"Training has diverged in round 1 ({reason}); no checkpoint is good;" in report
    # Nothing of a round that failed is counted, so that a resume repeats it as a whole.
    assert run.rounds_done == 0 and not run.records.all


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
    assert "## Table I: centralized and federated" in page and "Table II:" not in page
    for figure in ("figure2-digits.png", "figure4-digits.png", "figure5-digits.png"):
        with Image.open(sweep / "figures" / figure) as picture:
            assert picture.width > 200
    assert "FID" in (federated / "evaluation-classifier-correct-client-0.json").read_text().upper()


def test_plain_flwr_run_takes_the_size_of_its_federation(tmp_path: Path) -> None:
    run_config = tmp_path / "run.toml"
    run_config.write_text(
        f'output_dir = "{tmp_path}"\nrun_name = "plain"\nfederation.rounds = 1\n'
        'train.local_epochs = 1\nmodel = "tiny"\noverrides = """\n'
        "    model.width=8 train.precision=float32\n"
        '    eval.num_images=0 diffusion.num_inference_steps=4"""\n'
    )
    with private_superlink() as superlink:
        subprocess.run(
            [
                *(COMMANDS / "flwr", "run", CHECKOUT, CONNECTION, "--stream"),
                *("--run-config", run_config),
            ],
            env=superlink.environment,
            cwd=tmp_path,
            timeout=600,
            check=True,
        )
    run = tmp_path / "plain"
    assert json.loads((run / "partition.json").read_text())["num_clients"] == 2
    assert (run / "model.safetensors").exists()
