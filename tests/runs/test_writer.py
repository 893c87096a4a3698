import dataclasses
import json
import platform
import re
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import Tensor

from task.config import Config, anchored, load_config, read_config, value_paths, write_config
from task.runs import writer
from task.runs.checkpoint import load_weights
from task.runs.layout import NODES_FILE, client_numbers, final_round, run_path
from task.runs.records import HELD_OUT, TRAIN, Record, read_records
from task.runs.resume import FREE_TO_CHANGE, check_startable
from task.runs.run import Run
from task.runs.writer import RunWriter

# Holds a lock file until its input ends; a line names a file to make before.
HOLD_LOCK = """
import fcntl, os, sys
with open(sys.argv[1], "w") as file:
    fcntl.flock(file, fcntl.LOCK_EX)
    file.write(str(os.getpid()))
    file.flush()
    print("held", flush=True)
    for line in sys.stdin:
        open(line.strip(), "w").close()
"""


# Saves a checkpoint that fits its disk and one that does not, then records until the disk is full.
FILL_DISK = """
import sys, torch
from pathlib import Path
from task.runs.records import Record
from task.runs.writer import RunWriter
from tests.runs.test_writer import configured, weights

directory = RunWriter(configured(Path(sys.argv[1])))
directory.write_config(directory.config)
directory.record([Record(1, "loss", 1.0)])
directory.save_checkpoint(1, weights(1.0), {})
try:
    directory.save_checkpoint(2, {"large": torch.zeros(2**20)}, {})
except OSError as error:
    print(f"checkpoint: {error}")
print(sorted(file.name for file in (directory.path / "checkpoints").iterdir()))
try:
    for i in range(2**20):
        directory.record([Record(2, "loss", 1.0, client=i, context={"reason": "x" * 1000})])
except OSError as error:
    print(f"metrics: {error}")
directory.metrics_file.read_bytes().endswith(b"\\n") or print("half a line")
try:
    directory.close()
except OSError as error:
    print(f"close: {error}")
# A person makes room.
(Path(sys.argv[1]) / "ballast").unlink()
resumed = RunWriter(configured(Path(sys.argv[1]), "resume=true"))
stored = resumed.load_checkpoint()
print(resumed.last_round, stored[0]["layer.weight"][0, 0].item(), len(
    resumed.metrics_file.read_text().splitlines()))
"""

IN_A_SMALL_DISK = """
mount -t tmpfs -o size=1m none "$1"
head -c 300000 /dev/zero > "$1/ballast"
exec "$2" -c "$3" "$1"
"""


def configured(tmp_path: Path, *overrides: str) -> Config:
    settings = [f"output_dir={tmp_path}", "run_name=run", "train.precision=float32", *overrides]
    return anchored(load_config(settings), tmp_path)


def weights(value: float) -> dict[str, Tensor]:
    return {"layer.weight": torch.full((2, 3), value), "layer.bias": torch.full((2,), -value)}


def opened(tmp_path: Path, *overrides: str) -> "closing[RunWriter]":
    return closing(RunWriter(configured(tmp_path, *overrides)))


def recorded(directory: RunWriter) -> list[Record]:
    return list(read_records(directory.metrics_file).all)


@pytest.fixture
def started(tmp_path: Path) -> Path:
    """A run of two complete rounds."""
    with opened(tmp_path) as directory:
        directory.write_config(directory.config)
        for server_round in (1, 2):
            directory.record([Record(server_round, "loss", 1 / server_round)])
            directory.save_checkpoint(server_round, weights(server_round), {})
    return tmp_path / "run"


@contextmanager
def lock_held(path: Path) -> Iterator["subprocess.Popen[str]"]:
    """Let another process hold a lock file until the end of the block."""
    with subprocess.Popen(
        [sys.executable, "-c", HOLD_LOCK, path],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdout is not None and process.stdin is not None
        assert process.stdout.readline() == "held\n"
        yield process
        process.stdin.close()


def test_folder_has_the_documented_layout(tmp_path: Path) -> None:
    with opened(tmp_path) as directory:
        directory.write_config(directory.config)
        directory.record([Record(1, "loss", 0.5)])
        directory.write_json("partition.json", {"num_clients": 2})
        directory.save_checkpoint(5, weights(1), {})
        directory.save_model(5, weights(1))
        assert directory.path == tmp_path / "run" == run_path(directory.config)
        assert directory.samples_file(5) == tmp_path / "run" / "samples" / "round_0005.png"
    found = {str(file.relative_to(directory.path)) for file in directory.path.rglob("*")}
    events = {name for name in found if name.startswith("tensorboard/events")}
    assert len(events) == 1
    assert found - events == {
        *(
            "config.yaml",
            "schema.json",
            "metrics.jsonl",
            "partition.json",
            "samples",
            "checkpoints",
        ),
        *("checkpoints/round_0005.safetensors", "model.safetensors", "tensorboard", ".lock"),
    }
    assert read_config(directory.path / "config.yaml") == directory.config


def test_new_run_has_no_rounds_no_metrics_and_no_weights(tmp_path: Path) -> None:
    with opened(tmp_path) as directory:
        assert directory.last_round == 0
        assert recorded(directory) == []
        assert directory.load_checkpoint() is None
        assert final_round(directory.path) is None
        assert directory.read_json("partition.json") is None


def test_fresh_start_over_a_run_is_refused(started: Path) -> None:
    with pytest.raises(ValueError, match=r"run already holds a run; pass resume=true .* run_name"):
        RunWriter(configured(started.parent))
    assert (started / "checkpoints" / "round_0002.safetensors").exists()


def test_folder_of_a_run_that_never_began_may_be_started(tmp_path: Path) -> None:
    # One that ended while it waited for its nodes: there is no config.yaml yet.
    with opened(tmp_path):
        pass
    with opened(tmp_path) as directory:
        assert directory.last_round == 0


def test_resume_of_nothing_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"resume: .*run holds no run; check output_dir and run_n"):
        RunWriter(configured(tmp_path, "resume=true"))
    assert not (tmp_path / "run").exists()


def test_resume_of_another_configuration_names_exactly_what_differs(started: Path) -> None:
    other = ["partition.beta=0.1", "model.width=16", "seed=3", "federation.rounds=99"]
    with pytest.raises(ValueError) as caught:
        check_startable(configured(started.parent, "resume=true", *other))
    assert str(caught.value) == (
        f"resume: {started} is a run of another configuration; asked for seed=3 (there: 0), "
        "partition.beta=0.1 (there: 0.5), model.width=16 (there: 32); pass the words that it was "
        "started with"
    )


@pytest.mark.parametrize(
    "override",
    [
        *("federation.rounds=99", "federation.min_replies=2", "federation.round_timeout=5"),
        *("federation.keep_checkpoints=7", "eval.every=1", "eval.num_images=0"),
        *("federation.num_supernodes=12", "federation.gpus_per_client=0.5", "data.root=/else"),
    ],
)
def test_what_does_not_touch_the_weights_may_change(started: Path, override: str) -> None:
    assert override.split("=")[0] in FREE_TO_CHANGE
    check_startable(configured(started.parent, "resume=true", override))


def test_free_keys_are_paths_of_the_configuration_and_not_of_the_training() -> None:
    assert set(value_paths()) >= FREE_TO_CHANGE
    # This one chose the epochs before the run began, and has no say in it any more.
    sections = {path.split(".")[0] for path in FREE_TO_CHANGE - {"train.steps_per_round"}}
    assert sections.isdisjoint({"model", "diffusion", "train", "partition", "seed"})
    assert FREE_TO_CHANGE.isdisjoint(
        {
            *("federation.clients_per_round", "federation.wire_dtype", "federation.ema_decay"),
            *("federation.aggregation", "federation.trim_fraction", "federation.num_malicious"),
            *("federation.num_selected", "federation.max_update_norm"),
        }
    )


def test_time_of_every_start_is_kept(tmp_path: Path, started: Path) -> None:
    for _ in range(2):
        with opened(tmp_path, "resume=true") as directory:
            directory.record_time()
            directory.record_time()
    history = Run(started)
    assert len(history.work_times) == 2
    assert history.seconds == sum(each.seconds for each in history.work_times)
    assert {each.host for each in history.work_times} == {platform.node()}
    first, second = history.work_times
    assert first.ended <= second.ended and first.begun.tzinfo is not None


def test_run_may_be_moved_and_resumed(started: Path, tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    started.rename(tmp_path / "elsewhere" / "renamed")
    moved = (f"output_dir={tmp_path / 'elsewhere'}", "run_name=renamed", "resume=true")
    with opened(tmp_path, *moved) as directory:
        assert directory.last_round == 2


def test_precision_auto_takes_the_stored_one(started: Path) -> None:
    with opened(started.parent, "resume=true", "train.precision=auto") as directory:
        assert directory.config.train.precision == directory.config.eval.precision == "float32"


@pytest.mark.parametrize(
    ("stored", "asked", "expected"),
    [
        ("classifier", "auto", "classifier"),
        ("efficientnet", "auto", "efficientnet"),
        ("efficientnet", "classifier", "classifier"),
    ],
)
def test_extractor_auto_takes_the_stored_one(
    stored: str, asked: str, expected: str, started: Path
) -> None:
    file = started / "config.yaml"
    write_config(read_config(file).changed({"eval.extractor": stored}), file)
    with opened(started.parent, "resume=true", f"eval.extractor={asked}") as directory:
        assert directory.config.eval.extractor == expected


def test_other_precision_than_the_stored_one_is_refused(started: Path) -> None:
    with pytest.raises(ValueError, match=r"train\.precision=bfloat16 \(there: float32\)"):
        RunWriter(configured(started.parent, "resume=true", "train.precision=bfloat16"))


def test_damaged_configuration_is_refused(started: Path) -> None:
    (started / "config.yaml").write_text("seed: 0\n")
    with pytest.raises(ValueError, match=r"config\.yaml is not a configuration"):
        RunWriter(configured(started.parent, "resume=true"))


def test_run_of_another_version_goes_on_where_its_values_are_known(started: Path) -> None:
    file = started / "config.yaml"
    written = file.read_text(encoding="utf-8")
    assert "  trim_fraction: 0.2\n" in written
    file.write_text(written.replace("  trim_fraction: 0.2\n", ""), encoding="utf-8")
    with opened(started.parent, "resume=true") as directory:
        assert directory.config.federation.trim_fraction == 0.2
    with pytest.raises(ValueError, match=r"trim_fraction=0.1 \(there: 0.2\)"):
        RunWriter(configured(started.parent, "resume=true", "federation.trim_fraction=0.1"))
    file.write_text(written + "privacy: {other: 1.5}\n", encoding="utf-8")
    with pytest.raises(ValueError, match=r"resume: .* was trained with privacy\.other=1\.5, which"):
        RunWriter(configured(started.parent, "resume=true"))


def test_records_of_the_first_schema_are_rewritten_where_a_run_is_resumed(started: Path) -> None:
    old = [{"round": r, "who": "global", "name": "train_loss", "value": 0.5} for r in (1, 2, 3)]
    (started / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in old))
    expected = [Record(number, "loss", 0.5, reference=TRAIN) for number in (1, 2, 3)]
    with opened(started.parent, "resume=true") as directory:
        directory.record(expected[2:])
        assert recorded(directory) == expected
        assert '"who"' not in directory.metrics_file.read_text(encoding="utf-8")


def test_metrics_of_incomplete_rounds_are_dropped(started: Path) -> None:
    kept = (started / "metrics.jsonl").read_text(encoding="utf-8")
    with opened(started.parent, "resume=true") as directory:
        directory.record([Record(0, "before", 1.0), Record(3, "loss", 9.0, client=0)])
    with opened(started.parent, "resume=true") as directory:
        assert {each.round for each in recorded(directory)} == {0, 1, 2}
        assert directory.metrics_file.read_text(encoding="utf-8").startswith(kept)


@pytest.mark.parametrize("cut", [1, 5, 40])
def test_half_written_last_line_is_dropped(started: Path, cut: int) -> None:
    file = started / "metrics.jsonl"
    whole = file.read_text(encoding="utf-8")
    file.write_text(whole + whole.splitlines()[-1][:cut], encoding="utf-8")
    with opened(started.parent, "resume=true") as directory:
        assert file.read_text(encoding="utf-8") == whole
        directory.record([Record(3, "loss", 0.1)])
        assert [each.round for each in recorded(directory)] == [1, 2, 3]


def scalars(path: Path, tag: str) -> list[tuple[int, float]]:
    events = EventAccumulator(str(path / "tensorboard"), purge_orphaned_data=True)
    events.Reload()
    return [(event.step, event.value) for event in events.Scalars(tag)]


def test_tensorboard_shows_numbers_once_where_a_round_was_repeated(started: Path) -> None:
    with opened(started.parent, "resume=true") as directory:
        directory.record([Record(3, "loss", 9.0)])
    time.sleep(1.1)  # files of events are sorted by the second in their name
    with opened(started.parent, "resume=true") as directory:
        fid = Record(3, "fid", 0.5, client=3, reference=HELD_OUT, real=True)
        true = dataclasses.replace(fid, value=0.25, context={"extractor": "inception"})
        directory.record([Record(3, "loss", 0.25), fid, true])
    assert scalars(started, "loss/global") == [(1, 1.0), (2, 0.5), (3, 0.25)]
    # An FID looks through Inception.
    assert scalars(started, "fd (held_out, real images)/client 3") == [(3, 0.5)]
    assert scalars(started, "fid (held_out, real images)/client 3") == [(3, 0.25)]


def test_last_checkpoints_are_kept(tmp_path: Path) -> None:
    with opened(tmp_path, "federation.keep_checkpoints=3") as directory:
        for server_round in range(1, 6):
            directory.save_checkpoint(server_round, weights(server_round), {})
            directory.forget_checkpoints()
            assert directory.last_round == server_round
        found = sorted(file.name for file in (directory.path / "checkpoints").iterdir())
    assert found == [f"round_000{server_round}.safetensors" for server_round in (3, 4, 5)]


def test_rounds_are_ordered_as_numbers(tmp_path: Path) -> None:
    with opened(tmp_path, "federation.keep_checkpoints=2") as directory:
        for server_round in (9998, 9999, 10000):
            directory.save_checkpoint(server_round, weights(server_round), {})
        assert directory.last_round == 10000
        stored = directory.load_checkpoint()
        assert stored is not None and stored[0]["layer.weight"][0, 0] == 10000


def test_left_over_temporary_file_is_no_checkpoint(started: Path) -> None:
    (started / "checkpoints" / ".round_0003-x1y2z3.safetensors").write_bytes(b"half")
    with opened(started.parent, "resume=true") as directory:
        assert directory.last_round == 2


def test_what_killed_writers_left_is_removed_and_nothing_else(started: Path) -> None:
    left = [
        *("checkpoints/.round_0003-x1y2z3.safetensors", "samples/.round_0002-a.png"),
        *("local/.client-3-abc.safetensors", ".model-abc.safetensors", ".metrics-abc.jsonl"),
    ]
    kept = ["checkpoints/round_0002.safetensors", ".supervision-abc.json", ".lock", "notes.txt"]
    (started / "local").mkdir()
    for name in (*left, *kept[1:]):
        (started / name).touch()
    with opened(started.parent, "resume=true"):
        assert not [name for name in left if (started / name).exists()]
        assert all((started / name).exists() for name in kept)


def test_full_disk_is_named_and_what_was_saved_before_goes_on(tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    unshare = shutil.which("unshare")
    if unshare is None or subprocess.run([unshare, "-rm", "true"], check=False).returncode != 0:
        pytest.skip("no small disk can be mounted here: unshare -rm is refused")
    result = subprocess.run(
        [unshare, "-rm", "sh", "-ec", IN_A_SMALL_DISK, "-", disk, sys.executable, FILL_DISK],
        cwd=Path(__file__).resolve().parents[2],
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    way_out = "make some there and start this again; what was whole before is whole still"
    checkpoint, found, metrics, *rest, resumed = result.stdout.splitlines()
    folder = f"no room left on the disk of {disk}/run"
    assert checkpoint == f"checkpoint: [Errno 28] {folder}/checkpoints: {way_out}"
    assert found == "['round_0001.safetensors']"
    assert metrics == f"metrics: [Errno 28] {folder}: {way_out}"
    # Where the last bytes went decides whether a line was cut and TensorBoard's are lost.
    assert set(rest) <= {"half a line", metrics.replace("metrics", "close")}
    assert resumed == "1 1.0 1"


def test_checkpoint_without_further_state_loads(started: Path) -> None:
    with opened(started.parent, "resume=true") as directory:
        stored = directory.load_checkpoint()
    assert stored is not None
    loaded, state = stored
    assert state == {}
    assert set(loaded) == set(weights(2))
    assert all(torch.equal(loaded[name], tensor) for name, tensor in weights(2).items())


def test_checkpoint_loads_weights_and_groups_of_state_apart(tmp_path: Path) -> None:
    state = {"ema": weights(0.5), "adam": {"0.step": torch.tensor(3.0)}}
    with opened(tmp_path) as directory:
        directory.save_checkpoint(1, weights(1), state)
        stored = directory.load_checkpoint()
    assert stored is not None and set(stored[1]) == set(state)
    for loaded, expected in (
        (stored[0], weights(1)),
        (stored[1]["ema"], state["ema"]),
        (stored[1]["adam"], state["adam"]),
    ):
        assert set(loaded) == set(expected)
        assert all(torch.equal(loaded[name], expected[name]) for name in expected)


def truncated(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:50])


def flipped(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[-3] ^= 1  # of a weight, which stays a number
    file.write_bytes(content)


@pytest.mark.parametrize("damage", [truncated, flipped, lambda file: file.write_bytes(b"")])
def test_run_goes_on_after_the_checkpoint_before_a_damaged_one_and_says_so(
    started: Path, damage: Callable[[Path], object]
) -> None:
    file = started / "checkpoints" / "round_0002.safetensors"
    for number in (1, 2):
        (started / "samples" / f"round_000{number}.png").touch()
    damage(file)
    damaged = file.read_bytes()
    with opened(started.parent, "resume=true") as directory:
        (said,) = directory.damaged
        assert said.startswith(f"{file} is ") and said.endswith(
            "; it is kept as damaged-round_0002.safetensors, and the run goes on after round 1"
        )
        assert directory.last_round == 1
        stored = directory.load_checkpoint()
        assert stored is not None and stored[0]["layer.weight"][0, 0] == 1
        assert {each.round for each in recorded(directory)} == {1}
    assert [picture.name for picture in (started / "samples").iterdir()] == ["round_0001.png"]
    assert (started / "checkpoints" / "damaged-round_0002.safetensors").read_bytes() == damaged
    with opened(started.parent, "resume=true") as directory:
        assert directory.damaged == [] and directory.last_round == 1


def test_run_without_any_whole_checkpoint_is_refused_and_left_as_it_is(started: Path) -> None:
    before = (started / "metrics.jsonl").read_bytes()
    for number in (1, 2):
        flipped(started / "checkpoints" / f"round_000{number}.safetensors")
    message = r"resume: no checkpoint of .*run can be read \(.*round_0002\.safetensors is damaged: "
    with pytest.raises(ValueError, match=message):
        RunWriter(configured(started.parent, "resume=true"))
    assert len([*(started / "checkpoints").glob("round_*")]) == 2
    assert (started / "metrics.jsonl").read_bytes() == before


def test_damaged_final_weights_are_set_aside(started: Path) -> None:
    with opened(started.parent, "resume=true") as directory:
        directory.save_model(2, weights(2))
    flipped(started / "model.safetensors")
    with opened(started.parent, "resume=true") as directory:
        assert final_round(directory.path) is None and directory.last_round == 2
        assert "kept as damaged-model.safetensors" in directory.damaged[0]


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_not_finite_reaches_no_json_file(tmp_path: Path, value: float) -> None:
    with opened(tmp_path) as directory:
        with pytest.raises(ValueError, match=r"a\.json: b\[1\]\.c must be finite, got (nan|inf)"):
            directory.write_json("a.json", {"b": [0.5, {"c": value}]})
        assert not (directory.path / "a.json").exists()


def test_final_weights_say_their_round_and_configuration(tmp_path: Path) -> None:
    with opened(tmp_path, "seed=5", "partition.beta=inf") as directory:
        directory.save_model(7, weights(7))
        assert final_round(directory.path) == 7
        loaded, metadata = load_weights(directory.model_file)
    assert torch.equal(loaded["layer.bias"], weights(7)["layer.bias"])
    stored: dict[str, Any] = json.loads(metadata["config"])
    assert (stored["seed"], stored["partition"]["beta"]) == (5, float("inf"))
    assert stored["data"]["classes"] == [str(digit) for digit in range(10)]


def test_json_files_read_back(tmp_path: Path) -> None:
    with opened(tmp_path) as directory:
        directory.write_json("nodes.json", {"12345678901234567890": 0})
        assert directory.read_json("nodes.json") == {"12345678901234567890": 0}


def test_run_in_use_by_another_process_is_refused_by_its_id(
    started: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(writer, "LOCK_PATIENCE_SECONDS", 0.2)
    with (
        lock_held(started / ".lock") as process,
        pytest.raises(ValueError, match=f"run_name: .*run is in use by process {process.pid}; end"),
    ):
        RunWriter(configured(started.parent, "resume=true"))
    # Its end frees the folder.
    with opened(started.parent, "resume=true") as directory:
        assert directory.last_round == 2


def test_run_is_held_until_it_is_closed(started: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(writer, "LOCK_PATIENCE_SECONDS", 0.2)
    with (
        opened(started.parent, "resume=true"),
        pytest.raises(ValueError, match="in use"),
    ):
        RunWriter(configured(started.parent, "resume=true"))
    with opened(started.parent, "resume=true"):
        pass


def test_process_that_ends_in_time_is_waited_for(started: Path) -> None:
    with lock_held(started / ".lock") as process:
        threading.Timer(0.5, process.stdin.close).start()  # type: ignore[union-attr]
        with opened(started.parent, "resume=true") as directory:
            assert directory.last_round == 2


def test_run_that_began_while_a_fresh_start_waited_is_not_overwritten(tmp_path: Path) -> None:
    config = configured(tmp_path)
    (tmp_path / "run").mkdir()
    with lock_held(tmp_path / "run" / ".lock") as process:
        assert process.stdin is not None
        process.stdin.write(f"{tmp_path / 'run' / 'config.yaml'}\n")
        other = threading.Timer(0.5, process.stdin.close)  # which also sends the line
        other.start()
        with pytest.raises(ValueError, match="already holds a run"):
            RunWriter(config)
        other.join()


def test_folder_that_cannot_be_made_is_named_with_a_way_out(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    config = configured(tmp_path, f"output_dir={tmp_path / 'file'}")
    with pytest.raises(ValueError, match=r"output_dir: cannot write to .*file/run \(.*\); choose"):
        check_startable(config)


def test_name_that_the_disk_refuses_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"(run_name|output_dir): .*x{300}"):
        check_startable(configured(tmp_path, f"run_name={'x' * 300}"))


@pytest.mark.parametrize(
    "text", ["", "[1", "3", "[1, 2]", '{"x": 1}', '{"7": "\\u001b[31m"}', "[" * 10**5]
)
def test_damaged_numbers_of_clients_are_refused_by_their_file(tmp_path: Path, text: str) -> None:
    file = tmp_path / NODES_FILE
    file.write_text('{"18446744073709551615": 2}')
    assert client_numbers(tmp_path) == {2**64 - 1: 2}
    file.write_text(text)
    with pytest.raises(ValueError, match=re.escape(f"{file} is not what a run writes")):
        client_numbers(tmp_path)
