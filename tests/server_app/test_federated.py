import itertools
import json
import math
import os
import random
import re
import shutil
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from flwr.app import Array, Context, Error, Message, MetricRecord, RecordDict
from PIL import Image

from client_app import workspace
from server_app.app import app as server_app
from server_app.audits import AUDIT_TYPE
from server_app.evaluation import is_measured
from server_app.exchange import simulated_at_once
from server_app.federated import FederatedTraining
from server_app.hospital_scores import (
    SCORES_TYPE,
    combined_records,
    describe_scores,
    expected_scores,
    read_scores,
)
from server_app.replies import UnusableReply
from server_app.rounds import DivergedError
from server_app.weighting import Weighting
from task.code_version import code_fingerprint
from task.config import load_run_config, read_config
from task.export.folder import export_run
from task.generators.base import Generator
from task.generators.registry import initial_generator
from task.protocol.wire import Key, WeightLayout
from task.reporting.warning_signs import State, checks
from task.runs.checkpoint import load_weights
from task.runs.layout import weights_file
from task.runs.records import HELD_OUT, Record, Records, read_records
from task.runs.run import Run, final_model, kept_clients
from task.runs.writer import RunWriter
from tests.helpers import SMALL_RUN, ClientNodes, Network, Order, simulated, write_digits_as_mnist

RunConfig = dict[str, Any]
Weights = dict[str, torch.Tensor]
Alter = Callable[[Message, Message], Message | None]

THREE_ROUNDS = {"federation.rounds": 3, "federation.ema_decay": 0.75}
RECORDED_OF_TRAINING = {
    *("train loss", "seconds", "images_per_second", "seconds_beside", "update_norm"),
    *("left_out", "counted_images", "download_bytes", "upload_bytes"),
}


@pytest.fixture(autouse=True, scope="module")
def quick_looks() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("server_app.exchange.POLL_SIMULATION", 0.01)
        patch.setattr("server_app.exchange.POLL_NETWORK", 0.01)
        patch.setattr("server_app.nodes.LOOK_NETWORK", 0.02)
        yield


@pytest.fixture(autouse=True)
def new_process() -> None:
    """Let every test begin as a node's process does, without a workspace."""
    workspace._build_workspace.cache_clear()


def configured(folder: Path, changes: RunConfig | None = None) -> RunConfig:
    return {**SMALL_RUN, "output_dir": str(folder), "run_name": "run", **(changes or {})}


@contextmanager
def opened(
    run_config: RunConfig,
    *,
    nodes: ClientNodes | None = None,
    order: Order = list,
    alter: Alter = lambda asked, reply: reply,
) -> Iterator[FederatedTraining]:
    """Open a run over nodes with the real ClientApp, whose replies may be altered on their way.

    Args:
        run_config: of the run.
        nodes: a simulation of three where there are none.
        order: in which replies arrive.
        alter: takes the message and the reply; None loses it.
    """
    nodes = nodes or ClientNodes(Network(), run_config, *simulated(3))
    with (
        nodes.network.answering(lambda asked: alter(asked, nodes(asked)), order=order),
        closing(RunWriter(load_run_config(run_config))) as directory,
    ):
        yield FederatedTraining(nodes.grid, directory)


def play(run_config: RunConfig, **options: Any) -> Path:
    """Play a run to its end; returns its folder."""
    with opened(run_config, **options) as run:
        run.run()
    return Path(run_config["output_dir"]) / run_config["run_name"]


def final_weights(folder: Path) -> Weights:
    return load_weights(folder / "model.safetensors")[0]


def same_bits(one: Weights, other: Weights) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[n], other[n]) for n in one)


def records(folder: Path) -> list[Record]:
    return list(read_records(folder / "metrics.jsonl").all)


def named(record: Record) -> str:
    """Name a record, such as "train loss" or "held_out fid real"."""
    kind = ["real" * record.real, "local" * record.local_model]
    return " ".join(filter(None, [record.reference, record.metric, *kind]))


def recorded(folder: Path, name: str) -> dict[tuple[int, int | None], float]:
    """Values of one name, by round and client; None: of the whole run."""
    return {(r.round, r.client): r.value for r in records(folder) if named(r) == name}


def counted(folder: Path, name: str) -> dict[tuple[int, int | None], int | None]:
    """Numbers of images behind the values of `recorded`."""
    return {(r.round, r.client): r.n for r in records(folder) if named(r) == name}


def of_clients(found: dict[tuple[int, int | None], Any]) -> dict[tuple[int, int | None], Any]:
    return {key: value for key, value in found.items() if key[1] is not None}


def left_out(folder: Path, activity: str) -> dict[tuple[int, int | None], str]:
    """Reasons, by round and client."""
    return {
        (r.round, r.client): r.context["reason"]
        for r in read_records(folder / "metrics.jsonl").left_out
        if r.context["activity"] == activity
    }


def is_train(asked: Message, client: int) -> bool:
    """Whether this is the message by which a client is to train."""
    config = asked.content.config_records[Key.CONFIG]
    return asked.metadata.message_type == "train" and config[Key.CLIENT] == client


def is_of_round(asked: Message, server_round: int) -> bool:
    return asked.content.config_records[Key.CONFIG].get(Key.SERVER_ROUND) == server_round


def failure(asked: Message) -> Message:
    return Message(Error(code=102, reason="FileNotFoundError"), reply_to=asked)


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of three rounds that nothing disturbed."""
    changes = {**THREE_ROUNDS, "federation.keep_checkpoints": 3}
    return play(configured(tmp_path_factory.mktemp("reference"), changes))


def test_run_leaves_its_files(reference: Path) -> None:
    found = {str(file.relative_to(reference)) for file in reference.rglob("*") if file.is_file()}
    events = {name for name in found if name.startswith("tensorboard/events")}
    assert len(events) == 1
    assert found - events == {
        *("config.yaml", "metrics.jsonl", "partition.json", "partition.png", "model.safetensors"),
        *("machine.json", "data.json", "times.json", "report.html", "schema.json"),
        *("samples/round_0002.png", "samples/round_0003.png", ".lock"),
        *(f"checkpoints/round_000{server_round}.safetensors" for server_round in (1, 2, 3)),
    }
    with Image.open(reference / "samples" / "round_0003.png") as picture:
        assert picture.height > picture.width  # ten rows of one


def test_run_says_what_it_ran_with(reference: Path) -> None:
    history = Run(reference)
    assert (history.setting, history.code) == ("simulation", code_fingerprint())
    assert history.versions["torch"] == version("torch")
    assert history.data_source == "package scikit-learn" and len(history.data_hashes["all"]) == 64
    # The drawing and measuring at the end, and the start, belong to it.
    assert history.seconds > sum(history.records.series("round_seconds").values())


def test_configuration_is_stored_as_the_federation_turned_out(reference: Path) -> None:
    stored = read_config(reference / "config.yaml")
    assert stored.federation.num_supernodes == 3  # the preset says 10
    _, metadata = load_weights(reference / "model.safetensors")
    assert metadata["round"] == "3"
    assert json.loads(metadata["config"])["federation"]["num_supernodes"] == 3


def test_metrics_hold_every_client_of_every_round(reference: Path) -> None:
    dealt = json.loads((reference / "partition.json").read_text(encoding="utf-8"))
    counts = [sum(row) for row in dealt["train_counts"]]
    assert of_clients(counted(reference, "train loss")) == {
        (server_round, client): count
        for server_round in (1, 2, 3)
        for client, count in enumerate(counts)
    }
    of_all = {named(r) for r in records(reference) if r.client is None}
    assert {name for name in of_all if not name.startswith("member_auc")} == {
        *("train loss", "num_clients", "test loss", "round_seconds", "overhead_share"),
        *("seconds_sending", "seconds_waiting", "seconds_aggregating", "seconds_training"),
        *("seconds_checkpoint", "seconds_evaluating", "weight_bytes", "num_attacks"),
        "evaluation_bytes",
    }
    # All images are attacked after the last round, and each client's own model before it leaves.
    assert {r.round for r in records(reference) if r.metric == "member_auc SimA"} == {3}
    assert "member_auc SimA" in of_all
    local = recorded(reference, "member_auc SimA local")
    assert local.keys() <= {(3, client) for client in range(3)} and local
    assert recorded(reference, "num_clients") == {(r, None): 3 for r in (1, 2, 3)}
    # float32 to three clients and back.
    weights, _ = load_weights(reference / "model.safetensors")
    size = sum(tensor.nbytes for tensor in weights.values())
    assert recorded(reference, "weight_bytes")[1, None] == 6 * size
    # Every second round and the last.
    assert [r for r, who in recorded(reference, "test loss") if who is None] == [2, 3]


@pytest.mark.parametrize("kind", ["train", "test"])
def test_global_losses_are_means_weighted_by_images(reference: Path, kind: str) -> None:
    losses = recorded(reference, f"{kind} loss")
    counts = counted(reference, f"{kind} loss")
    rounds = [r for r, who in losses if who is None]
    assert len(rounds) == {"train": 3, "test": 2}[kind]
    for server_round in rounds:
        weighted = [
            (losses[server_round, client], counts[server_round, client]) for client in range(3)
        ]
        expected = np.average([loss for loss, _ in weighted], weights=[n for _, n in weighted])
        assert losses[server_round, None] == pytest.approx(expected, rel=1e-12)


def test_training_loss_goes_down(reference: Path) -> None:
    losses = recorded(reference, "train loss")
    assert losses[3, None] < losses[1, None]


def test_final_weights_are_the_moving_average_over_rounds(reference: Path) -> None:
    expected: Weights = {}
    for server_round in (1, 2, 3):
        file = reference / "checkpoints" / f"round_000{server_round}.safetensors"
        stored = load_weights(file)[0]
        weights = {name: t for name, t in stored.items() if not name.startswith("ema/")}
        expected = {
            name: 0.75 * expected.get(name, tensor) + 0.25 * tensor
            for name, tensor in weights.items()
        }
        for name, tensor in expected.items():
            torch.testing.assert_close(stored[f"ema/{name}"], tensor)
    assert len(expected) > 10
    for name, tensor in final_weights(reference).items():
        torch.testing.assert_close(tensor, expected[name])


def shuffled(messages: list[Message]) -> list[Message]:
    return random.Random(len(messages)).sample(messages, len(messages))


@pytest.mark.parametrize("order", [lambda messages: messages[::-1], shuffled])
def test_order_of_arrival_does_not_show_in_the_weights(
    reference: Path, tmp_path: Path, order: Order
) -> None:
    arrived: list[Any] = []

    def watch(asked: Message, reply: Message) -> Message:
        if asked.metadata.message_type == "train":
            arrived.append(asked.content.config_records[Key.CONFIG][Key.CLIENT])
        return reply

    folder = play(configured(tmp_path, THREE_ROUNDS), order=order, alter=watch)
    assert len(arrived) == 9 and arrived[:3] != [0, 1, 2]
    assert same_bits(final_weights(folder), final_weights(reference))
    assert recorded(folder, "train loss") == recorded(reference, "train loss")
    assert recorded(folder, "test loss") == recorded(reference, "test loss")


def test_clients_asked_one_after_the_other_give_the_same_bits(
    reference: Path, tmp_path: Path
) -> None:
    run_config = configured(tmp_path, {**THREE_ROUNDS, "federation.max_in_flight": 1})
    nodes = ClientNodes(Network(), run_config, *simulated(3))
    out: list[int] = []

    def count(asked: Message, reply: Message) -> Message:
        if asked.metadata.message_type != "query":
            out.append(nodes.network.state.num_message_ins())
        return reply

    folder = play(run_config, nodes=nodes, alter=count)
    assert len(out) == 9 + 6 and set(out) == {1}
    assert same_bits(final_weights(folder), final_weights(reference))


def test_phases_of_a_round_add_up_to_it_and_training_lies_within(reference: Path) -> None:
    for server_round in (1, 2, 3):
        told = {
            named(r): r.value
            for r in records(reference)
            if r.round == server_round and r.client is None
        }
        training = told.pop("seconds_training")
        assert ("seconds_evaluating" in told) == (server_round > 1)
        told.pop("seconds_evaluating", None)
        phases = sum(value for name, value in told.items() if name.startswith("seconds_"))
        assert phases == pytest.approx(told["round_seconds"])
        outside = told["round_seconds"] - training
        assert training > 0 and outside > 0
        assert 0 < told["overhead_share"] < 1


@pytest.mark.parametrize(
    ("cores", "message_bytes", "expected"),
    [(2, 1_000, 32), (2, 93_000_000, 4), (64, 93_000_000, 128), (2, 40_000_000, 6)],
)
def test_simulation_asks_twice_as_many_clients_as_cores_and_more_small_ones(
    cores: int, message_bytes: int, expected: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "cpu_count", lambda: cores)
    assert simulated_at_once(message_bytes) == expected


def test_too_few_replies_end_the_run_and_resume_goes_on_to_the_same_bits(
    reference: Path, tmp_path: Path
) -> None:
    run_config = configured(tmp_path, {**THREE_ROUNDS, "federation.min_replies": 3})

    def break_round_2(asked: Message, reply: Message) -> Message:
        return failure(asked) if is_train(asked, 1) and is_of_round(asked, 2) else reply

    message = (
        r"round 2: 2 of 3 clients sent usable weights, federation\.min_replies=3 "
        r"\(client 1: FileNotFoundError \(code 102\): .*\); everything up to round 1 is saved, "
        r"`feddm report \S+` shows how to go on with it"
    )
    with (
        opened(run_config, alter=break_round_2) as run,
        pytest.raises(RuntimeError, match=message),
    ):
        run.run()
    folder = tmp_path / "run"
    assert [file.name for file in (folder / "checkpoints").iterdir()] == ["round_0001.safetensors"]
    assert not (folder / "model.safetensors").exists()

    # Anew, as after a crash: other node ids, another process.
    workspace._build_workspace.cache_clear()
    play({**run_config, "resume": True})
    assert same_bits(final_weights(folder), final_weights(reference))
    for name in ("train loss", "test loss", "num_clients"):
        assert counted(folder, name) == counted(reference, name)
        assert recorded(folder, name) == recorded(reference, name)
    assert left_out(folder, "train") == {}
    names = [(r.round, r.client, named(r)) for r in records(folder)]
    assert len(names) == len(set(names))  # no round is told twice


@pytest.mark.parametrize(
    ("strategy", "state", "sent"),
    [
        ("fedprox", set(), 0),
        ("fedavgm", {"server_optimizer/0.momentum_buffer"}, 0),
        ("fedadam", {f"server_optimizer/0.{n}" for n in ("step", "exp_avg", "exp_avg_sq")}, 0),
        ("fedyogi", {f"server_optimizer/0.{n}" for n in ("step", "exp_avg", "exp_avg_sq")}, 0),
        ("scaffold", {"control/all"}, 1),
        ("feddyn", {"server_term/all"}, 0),
    ],
)
def test_strategy_goes_on_after_a_killed_round_to_the_same_bits(
    reference: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    strategy: str,
    state: set[str],
    sent: int,
) -> None:
    words = f"strategy={strategy}"
    # So strong that it shows within an epoch.
    words += " strategy.proximal_mu=10" * (strategy == "fedprox")
    changes = {"overrides": words, "eval.every": 9, "audit.at_end": False}
    whole = play(configured(tmp_path, {**changes, "run_name": "whole"}))
    run_config = configured(tmp_path, {**changes, "run_name": "resumed"})
    with opened(run_config) as run, pytest.raises(KeyboardInterrupt):
        # When all clients have trained the second round, and kept what they keep of it.
        endings = [run.strategy.finish, Mock(side_effect=KeyboardInterrupt)]
        monkeypatch.setattr(run.strategy, "finish", lambda draws: endings.pop(0)(draws))
        run.run()
    workspace._build_workspace.cache_clear()
    folder = play({**run_config, "resume": True})
    assert same_bits(final_weights(folder), final_weights(whole))
    _, last = (load_weights(f)[0] for f in sorted((folder / "checkpoints").iterdir()))
    assert {name for name in last if "/" in name} == state
    fedavg = load_weights(reference / "checkpoints" / "round_0002.safetensors")[0]
    name = next(iter(final_weights(folder)))
    assert not torch.allclose(last[name], fedavg[name], rtol=0, atol=1e-5)
    # As many bytes again each way for what goes beside the weights.
    size = sum(tensor.nbytes for tensor in final_weights(folder).values())
    assert recorded(folder, "weight_bytes")[2, None] == 6 * size * (1 + sent)
    if not (kept := sorted((folder / "clients").rglob("round_*"))):
        assert strategy not in ("scaffold", "feddyn")
        return
    # Lost, and the run goes on.
    assert len(kept) == 3 * 2
    shutil.rmtree(folder / "clients")
    play({**run_config, "resume": True, "federation.rounds": 3})
    assert all(t.isfinite().all() for t in final_weights(folder).values())


@pytest.mark.parametrize(
    ("wire_dtype", "feedback", "up", "down"), [("int8", False, 3.5, 3.5), ("int4", True, 6.2, 3.5)]
)
def test_quantized_run_ends_near_the_plain_one_and_resumes_to_the_same_bits(
    wire_dtype: str, feedback: bool, up: float, down: float, reference: Path, tmp_path: Path
) -> None:
    changes = {
        **{"federation.wire_dtype": wire_dtype, "federation.error_feedback": feedback},
        **{"eval.every": 9, "audit.at_end": False},
    }
    whole = play(configured(tmp_path, {**changes, "run_name": "whole"}))
    run_config = configured(tmp_path, {**changes, "run_name": "resumed", "federation.rounds": 1})
    play(run_config)
    workspace._build_workspace.cache_clear()
    folder = play({**run_config, "resume": True, "federation.rounds": 2})
    assert same_bits(final_weights(folder), final_weights(whole))
    plain = load_weights(reference / "checkpoints" / "round_0002.safetensors")[0]
    start = initial_generator(load_run_config(SMALL_RUN)).state_dict()
    moved, off = (
        sum(float((one[n] - other[n]).square().sum()) for n in start)
        for one, other in ((plain, start), (plain, final_weights(whole)))
    )
    assert 0 < off < (0.05 if wire_dtype == "int8" else 0.5) * moved
    size = sum(tensor.nbytes for tensor in plain.values() if tensor.is_floating_point())
    sent, received = (recorded(whole, f"{way}load_bytes") for way in ("up", "down"))
    assert {*sent} == {*received} == {(r, client) for r in (1, 2) for client in range(3)}
    assert all(size / each > up for each in sent.values())
    assert all(size / each > down for each in received.values())
    assert recorded(whole, "weight_bytes")[1, None] == sum(
        each[1, client] for each in (sent, received) for client in range(3)
    )
    assert bool([*whole.rglob("clients/*/round_*")]) == feedback


@pytest.mark.parametrize("state", ["kept", "averaged"])
def test_moments_of_clients_go_on_and_resume_to_the_same_bits(
    state: str, reference: Path, tmp_path: Path
) -> None:
    changes = {"train.optimizer_state": state, "eval.every": 9, "audit.at_end": False}
    whole = play(configured(tmp_path, {**changes, "run_name": "whole"}))
    run_config = configured(tmp_path, {**changes, "run_name": "resumed", "federation.rounds": 1})
    play(run_config)
    workspace._build_workspace.cache_clear()
    folder = play({**run_config, "resume": True, "federation.rounds": 2})
    assert same_bits(final_weights(folder), final_weights(whole))
    # The first round begins anew in any case.
    plain, own = (
        [load_weights(run / "checkpoints" / f"round_{n:04d}.safetensors")[0] for n in (1, 2)]
        for run in (reference, whole)
    )
    name = next(iter(final_weights(whole)))
    assert torch.equal(own[0][name], plain[0][name])
    assert not torch.allclose(own[1][name], plain[1][name], rtol=0, atol=1e-5)
    size = sum(tensor.nbytes for tensor in final_weights(whole).values())
    up, down = (recorded(whole, f"{way}load_bytes") for way in ("up", "down"))
    assert down[1, 0] == size
    for each in (up[1, 0], up[2, 0], down[2, 0]):
        assert each / size == pytest.approx(3 if state == "averaged" else 1, rel=0.02)


def test_parts_that_stay_are_collected_to_draw_and_resume_to_the_same_bits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    changes = {
        "overrides": "federation.local=[down,middle] federation.drawn_by=clients",
        "federation.keep_local_models": "[1]",
    }
    whole = play(configured(tmp_path, {**changes, "run_name": "whole"}))
    run_config = configured(tmp_path, {**changes, "run_name": "resumed"})
    with opened(run_config) as run, pytest.raises(KeyboardInterrupt):
        # After the checkpoint of the last round, of which nothing is drawn yet.
        monkeypatch.setattr(run, "evaluate", Mock(side_effect=KeyboardInterrupt))
        run.run()
    workspace._build_workspace.cache_clear()
    folder = play({**run_config, "resume": True})
    weights = final_weights(folder)
    assert same_bits(weights, final_weights(whole))
    assert [*folder.glob("samples/*")]
    counts = json.loads((folder / "partition.json").read_text())["train_counts"]
    assert weights["class_counts"].tolist() == counts
    down = [weights[f"members.{n}.down.0.0.main.0.weight"] for n in range(3)]
    assert not torch.allclose(down[0], down[1], rtol=0, atol=1e-5)
    # What each client has trained: what it sent of the rest is what is kept of it.
    own, _ = load_weights(weights_file(folder, 1))
    assert all(torch.equal(weights[f"members.1.{name}"], own[name]) for name in own)
    assert {f"members.1.{name}" for name in own} < weights.keys()
    # Larger claims than the mean of weights would take are cut down here as well.
    with opened({**run_config, "resume": True}) as again:
        again._weighting = Weighting(max_share=0.5)
        assert again.believed_counts([[1, 1], [900, 100], [2, 0]]) == [[1, 1], [4, 1], [2, 0]]
    # The last round alone is evaluated.
    sent, received = (recorded(folder, f"{way}load_bytes") for way in ("up", "down"))
    parts = ("log_", "class_", "down.", "bottom.")
    kept = sum(tensor.nbytes for name, tensor in own.items() if name.startswith(parts))
    rest = sum(tensor.nbytes for tensor in own.values()) - kept
    assert (received[1, 0], received[2, 0]) == (rest, rest)
    assert (sent[1, 0], sent[2, 0]) == (rest, rest + kept)
    # Attacks look through all models.
    assert {n for n, _ in recorded(folder, "attacked_clients")} <= {2}
    model, last = final_model(folder, read_config(folder / "config.yaml"))
    assert (model.title, last) == ("ensemble of 3 diffusion models", 2)
    with pytest.raises(ValueError, match=r"one model draws .* got 'an ensemble of 3"):
        export_run(Run(folder), "safetensors")
    page = (folder / "report.html").read_text(encoding="utf-8")
    assert "The parts down, middle stayed with each hospital and were sent after" in page
    # The round before was not to be evaluated, and is not measured by what was never trained.
    shutil.rmtree(folder / "samples")
    for file in (folder / "checkpoints" / "round_0002.safetensors", folder / "model.safetensors"):
        file.unlink()
    ended = {**run_config, "resume": True, "federation.rounds": 1}
    with pytest.raises(ValueError, match=r"^federation\.rounds, eval and audit must be as"):
        play(ended)


def test_parts_that_stay_uncollected_leave_nothing_to_draw(tmp_path: Path) -> None:
    changes: RunConfig = {"overrides": "federation.local=[up]", "federation.rounds": 1}
    folder = play(configured(tmp_path, changes))
    assert not [*folder.glob("samples/*")] and not Run(folder).draws
    page = (folder / "report.html").read_text(encoding="utf-8")
    assert "The parts up stayed with each hospital and were never sent" in page
    assert not [name for name in final_weights(folder) if name.startswith("up.")]
    assert recorded(folder, "test loss")
    with pytest.raises(ValueError, match=r"whole weights: .* got 'none of up'"):
        final_model(folder, read_config(folder / "config.yaml"))
    with pytest.raises(
        ValueError, match=r"^eval\.num_images must be 0 with federation\.local=\['up'\]"
    ):
        play(configured(tmp_path, {**changes, "eval.num_images": 20, "run_name": "measured"}))


def test_whole_models_of_clients_draw_without_any_traffic_more(tmp_path: Path) -> None:
    changes: RunConfig = {"overrides": "federation.drawn_by=clients", "audit.at_end": False}
    folder = play(configured(tmp_path, {**changes, "federation.keep_local_models": "[0,2]"}))
    weights = final_weights(folder)
    for client in (0, 2):
        own, _ = load_weights(weights_file(folder, client))
        assert all(torch.equal(weights[f"members.{client}.{name}"], own[name]) for name in own)
    page = (folder / "report.html").read_text(encoding="utf-8")
    assert "All weights travelled in every round" in page
    assert "Images are drawn by what each hospital made of the weights" in page
    sent = recorded(folder, "upload_bytes")
    assert sent[2, 0] == sent[1, 0] == sum(tensor.nbytes for tensor in own.values())
    vae = "model=vae_small federation.local=[encoder] federation.drawn_by=clients"
    other = configured(tmp_path, {"overrides": vae, "run_name": "vae"})
    del other["model.width"], other["model.num_poolings"]
    with pytest.raises(ValueError, match=r"^federation\.local must be of parts that images"):
        play({name: v for name, v in other.items() if not name.startswith("diffusion.")})


def test_hospitals_send_what_they_keep_only_where_they_tell_their_class_counts(
    tmp_path: Path,
) -> None:
    words = "federation.local=[down,middle,up] federation.drawn_by=clients"
    changes: RunConfig = {
        "overrides": f"data=mnist data.test_fraction=null {words}",
        **{"federation.node_wait": 1.0, "federation.rounds": 1, "audit.at_end": False},
    }
    run_config, nodes = real_nodes(tmp_path, changes)
    with opened(run_config, nodes=nodes) as run, pytest.raises(TimeoutError, match="ValueError"):
        run.run()
    workspace._build_workspace.cache_clear()
    run_config["run_name"] = "counted"
    own = {"data-path": str(tmp_path / "images"), "report-class-counts": True}
    places = [{**own, "output-path": str(tmp_path / f"node-{n}")} for n in range(2)]
    for place in places:
        Path(str(place["output-path"])).mkdir()
    folder = play(run_config, nodes=ClientNodes(Network(), run_config, *places))
    weights = final_weights(folder)
    assert weights["class_counts"].sum(1).tolist() == [180, 180]
    (picture,) = folder.glob("samples/*")
    # The server was killed before it drew, and one of the two has not come back since.
    workspace._build_workspace.cache_clear()
    picture.unlink()
    (folder / "model.safetensors").unlink()
    run_config |= {"resume": True, "federation.min_nodes": 1}
    play(run_config, nodes=ClientNodes(Network(), run_config, places[0]))
    assert picture.exists() and same_bits(final_weights(folder), weights)


def test_clients_in_pairs_send_a_part_each_and_resume_to_the_same_bits(tmp_path: Path) -> None:
    changes: RunConfig = {
        "overrides": "federation.sharing=usplit",
        **{"eval.every": 9, "audit.at_end": False},
    }
    whole = play(configured(tmp_path, {**changes, "run_name": "whole"}))
    run_config = configured(tmp_path, {**changes, "run_name": "resumed", "federation.rounds": 1})
    play(run_config)
    folder = play({**run_config, "resume": True, "federation.rounds": 2})
    weights = final_weights(folder)
    assert same_bits(weights, final_weights(whole))
    size = sum(tensor.nbytes for tensor in weights.values())
    sent = recorded(whole, "upload_bytes")
    for server_round in (1, 2):
        of_round = sorted(sent[server_round, client] for client in range(3))
        assert of_round[0] > 0 and of_round[-1] < size
        # Two of the three are a pair, which sends everything once, and what is in no part twice.
        pairs = [a + b for a, b in itertools.combinations(of_round, 2)]
        assert any(each == pytest.approx(size, rel=0.02) for each in pairs)


def test_reply_with_parts_that_were_not_asked_for_is_left_out(tmp_path: Path) -> None:
    def alter(asked: Message, reply: Message) -> Message:
        if is_train(asked, 1):
            packed = asked.content.array_records[Key.ARRAYS][Key.PACKED]
            reply.content.array_records[Key.ARRAYS][Key.PACKED] = packed
        return reply

    changes: RunConfig = {"overrides": "federation.sharing=usplit", "federation.rounds": 1}
    folder = play(configured(tmp_path, {**changes, "audit.at_end": False}), alter=alter)
    (reason,) = left_out(folder, "train").values()
    assert "weights must be float32 or float16 of shape" in reason


def test_reply_of_another_format_is_left_out(tmp_path: Path) -> None:
    def alter(asked: Message, reply: Message) -> Message:
        if is_train(asked, 1):
            arrays = reply.content.array_records[Key.ARRAYS]
            values = arrays[Key.PACKED].numpy()
            arrays[Key.PACKED] = Array(values[:-1] if is_of_round(asked, 1) else values.view("i1"))
        return reply

    changes = {"federation.wire_dtype": "int8", "eval.every": 9, "audit.at_end": False}
    folder = play(configured(tmp_path, changes), alter=alter)
    told = left_out(folder, "train")
    assert {*told} == {(1, 1), (2, 1)}
    assert all("encoded weights must be uint8 of shape" in reason for reason in told.values())


def test_clients_train_with_the_learning_rate_of_the_round(tmp_path: Path) -> None:
    changes: RunConfig = {"eval.every": 9, "audit.at_end": False, "federation.keep_checkpoints": 2}
    slow = {**changes, "run_name": "slow", "train.lr": 0.002, "train.warmup_rounds": 1}
    first = play(configured(tmp_path, slow)) / "checkpoints" / "round_0001.safetensors"
    workspace._build_workspace.cache_clear()
    usual = {**changes, "run_name": "usual", "train.lr": 0.001, "federation.rounds": 1}
    assert same_bits(load_weights(first)[0], final_weights(play(configured(tmp_path, usual))))


def test_real_node_without_a_place_takes_no_part_in_feddyn_and_corrects_nothing_in_scaffold(
    tmp_path: Path,
) -> None:
    def words(name: str) -> RunConfig:
        return {
            "overrides": f"data=mnist data.test_fraction=null strategy={name}",
            **{"federation.node_wait": 1.0, "eval.every": 9, "audit.at_end": False},
        }

    run_config, nodes = real_nodes(tmp_path, words("scaffold"))
    assert all(t.isfinite().all() for t in final_weights(play(run_config, nodes=nodes)).values())
    workspace._build_workspace.cache_clear()
    (other := tmp_path / "other").mkdir()
    run_config, nodes = real_nodes(other, words("feddyn"))
    with opened(run_config, nodes=nodes) as run, pytest.raises(TimeoutError, match="ValueError"):
        run.run()


def test_run_that_is_complete_sends_nothing_and_a_longer_one_goes_on(
    reference: Path, tmp_path: Path
) -> None:
    shutil.copytree(reference, tmp_path / "run")
    run_config = configured(tmp_path, {**THREE_ROUNDS, "resume": True})
    before = final_weights(reference)
    play(run_config, nodes=ClientNodes(Network(), run_config))  # there are no nodes to ask
    assert same_bits(final_weights(tmp_path / "run"), before)
    play({**run_config, "federation.rounds": 4})
    _, metadata = load_weights(tmp_path / "run" / "model.safetensors")
    assert metadata["round"] == "4"
    assert [r for r, who in recorded(tmp_path / "run", "train loss") if who is None] == [
        *(1, 2, 3, 4)
    ]


def test_weights_are_never_labeled_with_a_round_that_they_are_not_of(
    reference: Path, tmp_path: Path
) -> None:
    # Ended between its last round and its last file, and resumed with fewer rounds.
    shutil.copytree(reference, tmp_path / "run")
    (tmp_path / "run" / "model.safetensors").unlink()
    changes = {**THREE_ROUNDS, "resume": True, "federation.rounds": 2}
    with pytest.raises(ValueError, match=r"federation\.rounds must be at least 3.*got 2"):
        play(configured(tmp_path, changes))
    assert not (tmp_path / "run" / "model.safetensors").exists()


def changed(
    *, arrays: dict[str, Array] | None = None, metrics: dict[str, Any] | None = None
) -> Alter:
    """Make a change to the records of a reply; an empty mapping empties the record."""

    def change(asked: Message, reply: Message) -> Message:
        for key, entries in ((Key.ARRAYS, arrays), (Key.METRICS, metrics)):
            if entries is not None:
                record = reply.content[key]
                if not entries:
                    record.clear()
                record.update(entries)
        return reply

    return change


def without(key: str) -> Alter:
    def change(asked: Message, reply: Message) -> Message:
        del reply.content[key]
        return reply

    return change


SIZE = WeightLayout.of(initial_generator(load_run_config(SMALL_RUN))).size
GOOD = np.zeros(SIZE, np.float32)
OPEN_BRACKET = b"\x93NUMPY\x01\x00\x76\x00" + b"{'descr': '<f4', ".ljust(117) + b"\n"
BAD_REPLIES: list[tuple[str, Alter, str]] = [
    ("error", lambda asked, _: failure(asked), r"^FileNotFoundError \(code 102\): "),
    ("nan loss", changed(metrics={Key.LOSS: math.nan}), "^loss must be a finite number, got nan$"),
    ("no images", changed(metrics={Key.NUM_EXAMPLES: 0}), "^num-examples must be .* > 0, got 0$"),
    ("negative", changed(metrics={Key.NUM_EXAMPLES: -5}), "^num-examples must be .* got -5$"),
    ("float", changed(metrics={Key.NUM_EXAMPLES: 5.0}), "^num-examples must be .* got 5.0$"),
    ("list", changed(metrics={Key.NUM_EXAMPLES: [5]}), "^num-examples must be "),
    ("empty metrics", changed(metrics={}), "^num-examples must be "),
    ("no metrics", without(Key.METRICS), "^no record .*metrics"),
    ("no arrays", without(Key.ARRAYS), "^arrays must be "),
    (
        "other arrays",
        changed(arrays={"more": Array(GOOD)}),
        "^arrays must be ",
    ),
    ("nan", changed(arrays={Key.PACKED: Array(GOOD * math.nan)}), "^weights that are not finite"),
    ("shape", changed(arrays={Key.PACKED: Array(GOOD[1:])}), rf"^weights must .* \({SIZE - 1},\)$"),
    ("dtype", changed(arrays={Key.PACKED: Array(GOOD.astype(int))}), "^weights must .* int64 "),
    (
        "garbage",
        changed(arrays={Key.PACKED: Array("float32", (SIZE,), "numpy.ndarray", b"garbage")}),
        "^weights that cannot be read",
    ),
    (
        "damaged header",
        changed(arrays={Key.PACKED: Array("float32", (SIZE,), "numpy.ndarray", OPEN_BRACKET)}),
        "^weights that cannot be read",
    ),
    (
        "far",
        changed(arrays={Key.PACKED: Array(GOOD + np.float32(10))}),
        r"^weights at a distance of 6\d\d.* from .* federation\.max_update_norm=400$",
    ),
    # Finite, and still nothing that a model can be made of.
    (
        "absurd weights",
        changed(arrays={Key.PACKED: Array(GOOD + np.float32(1e38))}),
        "^weights of up to ",
    ),
    ("absurd number", changed(metrics={Key.NUM_EXAMPLES: 10**15}), "^weights of up to "),
]


class Spoiled:
    """Round 1 of a run, over and over from the same weights, with bad replies of client 1."""

    def __init__(self, run: FederatedTraining, folder: Path) -> None:
        self.spoil: Alter = lambda asked, _: failure(asked)
        self._run, self._folder = run, folder

    def start(self) -> None:
        self._run.prepare()
        self._first = self._run.weights
        self.train()
        self.without_client_1 = self._run.weights

    def train(self) -> tuple[str, list[Record]]:
        """Play the round; returns what is said of it, and what is written down."""
        self._run.weights = self._first
        before = len(records(self._folder))
        return self._run.train(1), records(self._folder)[before:]

    @property
    def weights(self) -> Weights:
        return self._run.weights


@pytest.fixture(scope="module")
def spoiled(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Spoiled]:
    changes = {"federation.max_update_norm": 400.0}
    run_config = configured(tmp_path_factory.mktemp("spoiled"), changes)
    rounds: list[Spoiled] = []

    def alter(asked: Message, reply: Message) -> Message | None:
        return rounds[0].spoil(asked, reply) if is_train(asked, 1) else reply

    with opened(run_config, alter=alter) as run:
        rounds.append(Spoiled(run, Path(run_config["output_dir"]) / "run"))
        rounds[0].start()
        yield rounds[0]


@pytest.mark.parametrize(
    ("spoil", "reason"),
    [pytest.param(spoil, reason, id=name) for name, spoil, reason in BAD_REPLIES],
)
def test_bad_reply_is_left_out_and_named_and_the_round_goes_on(
    spoiled: Spoiled, spoil: Alter, reason: str, capsys: pytest.CaptureFixture[str]
) -> None:
    spoiled.spoil = spoil
    summary, told = spoiled.train()
    assert "2 of 3 clients" in summary
    assert same_bits(spoiled.weights, spoiled.without_client_1)
    (missed,) = (each for each in told if each.metric == "left_out")
    assert missed.client == 1 and re.search(reason, missed.context["reason"])
    assert f"round 1: client 1 is left out: {missed.context['reason']}" in capsys.readouterr().out
    assert {each.client for each in told if named(each) == "train loss"} == {0, 2, None}


@pytest.mark.parametrize(
    "more", [{"list": [1.0, 2.0]}, {"x" * 5000: 1.0}, {Key.SECONDS: [1.0, 2.0]}]
)
def test_metrics_that_nobody_asked_for_do_not_end_the_run(
    spoiled: Spoiled, more: dict[str, Any]
) -> None:
    spoiled.spoil = changed(metrics=more)
    _, told = spoiled.train()
    assert {named(each) for each in told if each.client == 1} <= RECORDED_OF_TRAINING


@pytest.mark.parametrize("message_type", ["train", "evaluate"])
def test_divergence_of_every_client_ends_the_run_and_says_what_to_change(
    hospitals: tuple[RunConfig, ClientNodes], message_type: str
) -> None:
    run_config, nodes = hospitals
    asked: list[Message] = []
    spoil = changed(metrics={Key.LOSS: math.nan})

    def alter(message: Message, reply: Message) -> Message:
        if message.metadata.message_type == message_type and is_of_round(message, 2):
            asked.append(message)
            return spoil(message, reply)  # type: ignore[return-value]
        return reply

    good = r".*checkpoints/round_0001\.safetensors"
    message = (
        r"training has diverged in round 2 \(clients 0 1: loss must be a finite number, got nan\); "
        rf"the last good checkpoint is {good}; .* smaller learning rate than train\.lr=.*"
    )
    with (
        opened({**run_config, "train.precision": "float32"}, nodes=nodes, alter=alter) as run,
        pytest.raises(DivergedError, match=message),
    ):
        run.run()
    assert len(asked) == 2  # nobody is asked the same again
    found = Run(run.directory.path).divergence
    assert found is not None and found.round == 2
    records = read_records(run.directory.metrics_file).of_round(2)
    assert [(each.client, each.context["activity"]) for each in records.left_out] == [
        *((0, message_type), (1, message_type)),
    ]


def test_round_that_the_model_calls_diverged_is_recorded_and_changes_no_weights(
    hospitals: tuple[RunConfig, ClientNodes], monkeypatch: pytest.MonkeyPatch
) -> None:
    run_config, nodes = hospitals
    with opened(run_config, nodes=nodes) as run:
        run.prepare()
        run.play_round(1)
        # At one hospital alone it is said, and the others go on.
        failures = ["", "all is 0"] + 2 * ["the discriminator has won"]
        monkeypatch.setattr(run.model, "why_diverged", lambda _: failures.pop(0))
        run.play_round(2)
        (told,) = read_records(run.directory.metrics_file).of_client_divergence()[1]
        assert told.round == 2 and told.context == {"reason": "all is 0"}
        (sign,) = [each for each in checks(Run(run.directory.path)) if "diverge" in each.subject]
        assert sign.state is State.WARNING and "client 1 shows a failure in 1 round" in sign.says
        first = run.weights
        with pytest.raises(
            DivergedError, match=r"round 3 \(clients 0 1: the discriminator has won\)"
        ):
            run.play_round(3)
        assert run.weights is first
        found = Run(run.directory.path)
        assert found.divergence is not None and found.rounds_done == 2
        told = read_records(run.directory.metrics_file).of_round(3)
        assert told.clients == [0, 1] and named(told.all[-1]) == "divergence"
        assert {"train loss", "num_clients"} <= {named(each) for each in told.all}


def test_loss_that_a_family_does_not_have_is_asked_of_nobody(
    hospitals: tuple[RunConfig, ClientNodes], monkeypatch: pytest.MonkeyPatch
) -> None:
    run_config, nodes = hospitals
    with opened(run_config, nodes=nodes) as run:
        run.prepare()
        monkeypatch.setattr(type(run.model), "example_losses", Generator.example_losses)
        monkeypatch.setattr(run, "ask", None)
        assert run.evaluate(1) is None


def test_client_that_stays_silent_is_left_out_at_the_deadline(
    tmp_path: Path, spoiled: Spoiled
) -> None:
    run_config = configured(tmp_path, {"federation.round_timeout": 8.0})

    def alter(asked: Message, reply: Message) -> Message | None:
        return None if is_train(asked, 1) else reply

    with opened(run_config, alter=alter) as run:
        run.prepare()
        assert "2 of 3 clients" in run.train(1)
        assert same_bits(run.weights, spoiled.without_client_1)
    assert list(left_out(tmp_path / "run", "train")) == [(1, 1)]


def test_client_that_failed_in_one_round_takes_part_in_the_next(tmp_path: Path) -> None:
    def alter(asked: Message, reply: Message) -> Message:
        return failure(asked) if is_of_round(asked, 1) and is_train(asked, 1) else reply

    folder = play(configured(tmp_path), alter=alter)
    assert recorded(folder, "num_clients") == {(1, None): 2, (2, None): 3}


def test_loss_that_cannot_be_used_is_left_out_of_the_evaluation(tmp_path: Path) -> None:
    spoil = changed(metrics={Key.LOSS: math.nan})

    def alter(asked: Message, reply: Message) -> Message:
        evaluated = asked.metadata.message_type == "evaluate"
        told = asked.content.config_records[Key.CONFIG].get(Key.CLIENT) == 2
        return spoil(asked, reply) if evaluated and told else reply

    folder = play(configured(tmp_path), alter=alter)
    assert left_out(folder, "evaluate") == {(2, 2): "loss must be a finite number, got nan"}
    assert set(recorded(folder, "test loss")) == {*((2, 0), (2, 1), (2, None))}


def test_client_without_held_out_images_is_no_failure(tmp_path: Path) -> None:
    def alter(asked: Message, reply: Message) -> Message:
        evaluated = asked.metadata.message_type == "evaluate"
        if evaluated and asked.content.config_records[Key.CONFIG][Key.CLIENT] == 2:
            reply.content[Key.METRICS] = MetricRecord({Key.NUM_EXAMPLES: 0})
        return reply

    folder = play(configured(tmp_path), alter=alter)
    assert left_out(folder, "evaluate") == {}
    assert (2, 2) not in recorded(folder, "test loss")


def test_round_without_any_test_loss_is_complete_all_the_same(tmp_path: Path) -> None:
    def alter(asked: Message, reply: Message) -> Message:
        return failure(asked) if asked.metadata.message_type == "evaluate" else reply

    folder = play(configured(tmp_path), alter=alter)
    assert len(left_out(folder, "evaluate")) == 3
    assert recorded(folder, "test loss") == {}
    assert recorded(folder, "num_clients") == {(1, None): 3, (2, None): 3}


def test_only_the_clients_drawn_for_a_round_train_and_all_evaluate(tmp_path: Path) -> None:
    folder = play(configured(tmp_path, {"federation.clients_per_round": 1, "eval.every": 1}))
    trained = [key for key in recorded(folder, "train loss") if key[1] is not None]
    assert [server_round for server_round, _ in trained] == [1, 2]
    assert len(recorded(folder, "test loss")) == 6 + 2


def test_other_seed_gives_other_weights(reference: Path, tmp_path: Path) -> None:
    folder = play(configured(tmp_path, {**THREE_ROUNDS, "seed": 1}))
    assert not same_bits(final_weights(folder), final_weights(reference))


def test_float16_on_the_wire_changes_the_weights_by_rounding_only(tmp_path: Path) -> None:
    found = []
    for name, dtype in (("full", "float32"), ("half", "float16")):
        changes = {"run_name": name, "federation.wire_dtype": dtype, "federation.rounds": 1}
        weights = final_weights(play(configured(tmp_path, changes)))
        found.append(torch.cat([tensor.flatten() for tensor in weights.values()]))
    full, half = found
    assert 0 < (half - full).norm() < 2e-3 * full.norm()


def test_final_images_of_an_untrained_network_are_measured_and_look_like_noise(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    changes = {
        **{"federation.rounds": 1, "eval.num_images": 20},
        "data.cache_dir": str(tmp_path / "cache"),
    }
    folder = play(configured(tmp_path, changes))
    assert counted(folder, "class_agreement") == {(1, None): 20}
    assert 0 <= recorded(folder, "class_agreement")[1, None] <= 1
    assert recorded(folder, "class_agreement real")[1, None] > 0.8
    assert recorded(folder, "chance_agreement") == {(1, None): 0.1}
    assert recorded(folder, "noise_position")[1, None] > 0.6
    assert recorded(folder, "noise_position real")[1, None] < 0.2
    assert recorded(folder, "pixel_p_value")[1, None] > 0.01
    states = {check.subject: check.state for check in checks(Run(folder))}
    assert states["images that look like noise"] is State.WARNING
    assert states["fewer than 50 measured images of a class"] is State.WARNING
    assert "warning: The images look untrained" in capsys.readouterr().out


def test_kept_local_models_are_what_the_clients_sent_in_the_last_round(tmp_path: Path) -> None:
    sent: dict[int, Weights] = {}
    layout = WeightLayout.of(initial_generator(load_run_config(SMALL_RUN)))

    def alter(asked: Message, reply: Message) -> Message:
        for client in (0, 2):
            if is_of_round(asked, 2) and is_train(asked, client):
                packed = reply.content.array_records[Key.ARRAYS][Key.PACKED].numpy()
                sent[client] = layout.unpack(packed)
        return reply

    folder = play(configured(tmp_path, {"federation.keep_local_models": "[0,2]"}), alter=alter)
    assert kept_clients(folder) == [0, 2]
    for client, weights in sent.items():
        found, metadata = load_weights(weights_file(folder, client))
        assert same_bits(found, weights) and metadata["round"] == "2"
        assert not same_bits(found, final_weights(folder))


def test_chosen_client_that_does_not_train_in_the_last_round_is_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    changes = {"federation.keep_local_models": "[0,1,2]", "federation.clients_per_round": 2}
    (tmp_path / "run" / "local").mkdir(parents=True)
    (tmp_path / "run" / "local" / "client-9.safetensors").write_bytes(b"of an earlier last round")
    folder = play(configured(tmp_path, changes))
    (absent,) = {0, 1, 2} - set(kept_clients(folder))
    assert len(kept_clients(folder)) == 2
    assert f"client {absent} does not train, its weights are not kept" in capsys.readouterr().out


def test_real_nodes_keep_their_own_models(hospitals: tuple[RunConfig, ClientNodes]) -> None:
    run_config, nodes = hospitals
    with (
        opened({**run_config, "federation.keep_local_models": "[0]"}, nodes=nodes) as run,
        pytest.raises(ValueError, match=r"keep_local_models must be \[\] with real nodes"),
    ):
        run.run()


def test_precision_auto_is_settled_once_and_written_down(tmp_path: Path) -> None:
    run_config = configured(tmp_path, {"train.precision": "auto"})
    sent = set()

    def alter(asked: Message, reply: Message) -> Message:
        sent.add(asked.content.config_records[Key.CONFIG].get(Key.PRECISION))
        return reply

    with opened(run_config, alter=alter) as run:
        run.prepare()
        settled = run.config.train.precision
        run.train(1)
    assert settled in ("float32", "bfloat16") and sent == {None, settled}
    written = read_config(tmp_path / "run" / "config.yaml")
    assert (written.train.precision, written.eval.precision) == (settled, settled)


def test_federation_of_another_size_cannot_resume_a_simulation(
    reference: Path, tmp_path: Path
) -> None:
    shutil.copytree(reference, tmp_path / "run")
    changes = {**THREE_ROUNDS, "resume": True, "federation.rounds": 4}
    run_config = configured(tmp_path, changes)
    nodes = ClientNodes(Network(), run_config, *simulated(2))
    message = "dealt its images to 3 clients in another way than this federation of 2 does"
    with opened(run_config, nodes=nodes) as run, pytest.raises(ValueError, match=message):
        run.run()
    assert same_bits(final_weights(tmp_path / "run"), final_weights(reference))


def test_federation_smaller_than_a_round_is_refused_by_name(tmp_path: Path) -> None:
    run_config = configured(tmp_path, {"federation.clients_per_round": 4})
    message = r"federation\.clients_per_round must be at most federation\.num_supernodes=3 .* got 4"
    with opened(run_config) as run, pytest.raises(ValueError, match=message):
        run.run()


def test_start_that_was_interrupted_before_round_1_leaves_the_name_free(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*_: Any) -> str:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("server_app.rounds.fastest_precision", interrupted)
        run_config = configured(tmp_path, {"train.precision": "auto"})
        with opened(run_config) as run, pytest.raises(KeyboardInterrupt):
            run.run()
    # Not resumed, so whatever the first start was about is no matter.
    with opened(configured(tmp_path, {"partition.beta": 5.0})) as run:
        run.prepare()
    assert read_config(tmp_path / "run" / "config.yaml").partition.beta == 5.0


def real_nodes(folder: Path, changes: RunConfig, number: int = 2) -> tuple[RunConfig, ClientNodes]:
    """Make real nodes with images of their own, and the configuration of a run over them."""
    write_digits_as_mnist(folder / "images", train=200, test=50)
    changes = {"overrides": "data=mnist data.test_fraction=null", **changes}
    run_config = configured(folder, {**changes, "data.cache_dir": str(folder / "cache")})
    node = {"data-path": str(folder / "images")}
    return run_config, ClientNodes(Network(), run_config, *[node] * number)


@pytest.fixture
def hospitals(tmp_path: Path) -> tuple[RunConfig, ClientNodes]:
    """Two real nodes."""
    return real_nodes(tmp_path, {"train.precision": "auto"})


def test_hospitals_are_numbered_once_and_keep_their_images(
    hospitals: tuple[RunConfig, ClientNodes], tmp_path: Path
) -> None:
    run_config, nodes = hospitals
    folder = play({**run_config, "federation.rounds": 1}, nodes=nodes)
    numbers = json.loads((folder / "nodes.json").read_text(encoding="utf-8"))
    assert numbers == {str(node): number for number, node in enumerate(sorted(nodes.contexts))}
    assert not (folder / "partition.json").exists() and not (folder / "data.json").exists()
    assert recorded(folder, "class_agreement") == {}  # the server holds no images
    written = read_config(folder / "config.yaml")
    assert written.train.precision == "auto"  # each node's own
    assert written.eval.precision in ("float32", "bfloat16")  # the server draws

    play({**run_config, "resume": True}, nodes=nodes)
    assert json.loads((folder / "nodes.json").read_text(encoding="utf-8")) == numbers
    assert of_clients(counted(folder, "train loss")) == {
        (r, client): 180 for r in (1, 2) for client in (0, 1)
    }


def test_round_that_fails_is_tried_again_and_leaves_nothing_of_the_failure(
    hospitals: tuple[RunConfig, ClientNodes], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run_config, nodes = hospitals
    asked_again = []

    def fail_twice(asked: Message, reply: Message) -> Message:
        if is_train(asked, 1) and is_of_round(asked, 1):
            asked_again.append(asked)
            return failure(asked) if len(asked_again) < 3 else reply
        return reply

    folder = play({**run_config, "federation.min_replies": 2}, nodes=nodes, alter=fail_twice)
    assert len(asked_again) == 3
    said = capsys.readouterr().out
    for attempt in (1, 2):
        assert (
            "round 1: 1 of 2 clients sent usable weights, federation.min_replies=2 (client 1: "
            "FileNotFoundError (code 102): its data cannot be read; its own log names the file or "
            f"folder); attempt {attempt} of 3, nothing of it is kept"
        ) in said
    names = [(r.round, r.client, named(r)) for r in records(folder)]
    assert len(names) == len(set(names)) and left_out(folder, "train") == {}
    assert recorded(folder, "num_clients") == {(1, None): 2, (2, None): 2}


def test_round_that_is_tried_again_draws_hospitals_that_have_not_failed_in_it(
    hospitals: tuple[RunConfig, ClientNodes],
) -> None:
    run_config, nodes = hospitals
    drawn: list[int] = []

    def fail_first_drawn(asked: Message, reply: Message) -> Message:
        if asked.metadata.message_type != "train" or not is_of_round(asked, 1):
            return reply
        drawn.append(int(asked.content.config_records[Key.CONFIG][Key.CLIENT]))
        return failure(asked) if drawn[-1] == drawn[0] else reply

    play({**run_config, "federation.clients_per_round": 1}, nodes=nodes, alter=fail_first_drawn)
    assert sorted(drawn) == [0, 1]


def test_round_that_fails_every_time_ends_the_run_and_names_each_clients_reason(
    hospitals: tuple[RunConfig, ClientNodes],
) -> None:
    run_config, nodes = hospitals
    asked_again = []

    def fail(asked: Message, reply: Message) -> Message:
        for client, error in ((0, "MemoryError"), (1, "FileNotFoundError")):
            if is_train(asked, client):
                asked_again.append(client)
                return Message(Error(code=100, reason=error), reply_to=asked)
        return reply

    changes = {"federation.round_attempts": 2}
    message = (
        r"round 1: 0 of 2 clients .*\(client 0: MemoryError \(code 100\); "
        r"client 1: FileNotFoundError \(code 100\)\)$"
    )
    with (
        opened({**run_config, **changes}, nodes=nodes, alter=fail) as run,
        pytest.raises(RuntimeError, match=message),
    ):
        run.run()
    assert sorted(asked_again) == [0, 0, 1, 1]


def test_nodes_that_stay_away_end_the_run_and_are_named_with_the_way_on(
    hospitals: tuple[RunConfig, ClientNodes],
) -> None:
    run_config, nodes = hospitals
    gone = max(nodes.contexts)
    changes = {"federation.min_nodes": 2, "federation.node_wait": 30.0}
    message = (
        rf"1 of 2 nodes .*: client 1 \(node {gone}\) is missing since .*; everything up to round 1 "
        "is saved, `feddm report "
    )
    with opened({**run_config, **changes}, nodes=nodes) as run:
        run.prepare()
        run.play_round(1)
        nodes.network.state.deactivate_node(gone)
        run.config = run.config.changed({"federation.node_wait": 0.2})
        with pytest.raises(TimeoutError, match=message):
            run.play_round(2)


def test_class_counts_of_hospitals_are_written_down_and_outlive_a_resume(
    hospitals: tuple[RunConfig, ClientNodes], tmp_path: Path
) -> None:
    run_config, nodes = hospitals
    counts = [*range(10)]

    def say(asked: Message, reply: Message) -> Message:
        said = reply.content.config_records.get(Key.CONFIG)
        if asked.metadata.message_type == "query":
            said.pop(Key.CLASS_COUNTS, None)
            if asked.metadata.dst_node_id == min(nodes.contexts):
                said[Key.CLASS_COUNTS] = counts
        return reply

    with opened(run_config, nodes=nodes, alter=say) as run:
        run.prepare()
        classes = run.config.data.classes
    found = json.loads((tmp_path / "run" / "class_counts.json").read_text(encoding="utf-8"))
    assert found == {"classes": classes, "clients": {"0": counts, "1": None}}
    nodes.network.state.deactivate_node(min(nodes.contexts))
    with opened({**run_config, "resume": True}, nodes=nodes, alter=say) as run:
        run.prepare()
    again = json.loads((tmp_path / "run" / "class_counts.json").read_text(encoding="utf-8"))
    assert again == found


def test_kill_after_the_checkpoint_leaves_no_round_without_its_numbers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def killed(*_: Any) -> None:
        raise KeyboardInterrupt

    run_config = configured(tmp_path, {"eval.every": 1})
    with monkeypatch.context() as patch:
        patch.setattr(FederatedTraining, "evaluate", killed)
        with opened(run_config) as run, pytest.raises(KeyboardInterrupt):
            run.run()
    folder = play({**run_config, "resume": True})
    for name in ("round_seconds", "overhead_share", "seconds_checkpoint", "seconds_evaluating"):
        assert set(recorded(folder, name)) == {(1, None), (2, None)}


def test_update_norms_are_how_far_clients_moved(tmp_path: Path) -> None:
    moved: dict[int, float] = {}

    def watch(asked: Message, reply: Message) -> Message:
        for client in (0, 1, 2):
            if is_train(asked, client) and is_of_round(asked, 1):
                sent, trained = (
                    message.content.array_records[Key.ARRAYS][Key.PACKED].numpy()
                    for message in (asked, reply)
                )
                moved[client] = float(np.linalg.norm(trained.astype(np.float64) - sent))
                reply.content.metric_records[Key.METRICS]["update-norm"] = 1e9  # a false claim
        return reply

    folder = play(configured(tmp_path, {"federation.rounds": 1}), alter=watch)
    found = recorded(folder, "update_norm")
    assert found == {(1, c): pytest.approx(norm) for c, norm in moved.items()}
    assert len(moved) == 3 and all(norm > 0 for norm in moved.values())


def test_run_by_the_median_bears_a_hospital_that_sends_anything(tmp_path: Path) -> None:
    spoil = changed(arrays={Key.PACKED: Array(GOOD + np.float32(1e4))})
    changes = {"federation.rounds": 1, "federation.min_replies": 3}

    def alter(asked: Message, reply: Message) -> Message | None:
        return spoil(asked, reply) if is_train(asked, 1) else reply

    robust = {**changes, "federation.aggregation": "median"}
    folder = play(configured(tmp_path, robust), alter=alter)
    assert max(float(t.abs().max()) for t in final_weights(folder).values()) < 100
    believing = configured(tmp_path, {**changes, "run_name": "believing"})
    with pytest.raises(
        DivergedError, match=r"loss must be .* \(or with federation\.max_update_norm"
    ):
        play(believing, alter=alter)


def test_drawn_hospital_that_sends_nan_does_not_end_the_run(
    hospitals: tuple[RunConfig, ClientNodes],
) -> None:
    run_config, nodes = hospitals
    spoil = changed(metrics={Key.LOSS: math.nan})
    asked: list[int] = []

    def alter(message: Message, reply: Message) -> Message | None:
        if message.metadata.message_type != "train":
            return reply
        asked.append(message.metadata.dst_node_id)
        return spoil(message, reply) if len(asked) == 1 else reply

    changes = {"federation.rounds": 1, "federation.clients_per_round": 1}
    changes |= {"federation.min_replies": 1}
    with opened({**run_config, **changes}, nodes=nodes, alter=alter) as run:
        run.run()
    assert len(set(asked)) == len(asked) == 2


def lying(images: int, *, from_the_start: bool, loss: float = 1e14) -> Alter:
    """Let client 2 claim images, a loss and seconds, and perhaps introduce itself so."""

    def alter(asked: Message, reply: Message) -> Message:
        config = asked.content.config_records[Key.CONFIG]
        if asked.metadata.message_type == "query":
            said = reply.content.config_records[Key.CONFIG]
            # Of nodes that introduce themselves together the largest id is client 2.
            if from_the_start and asked.metadata.dst_node_id == alter.last:  # type: ignore[attr-defined]
                said[Key.NUM_IMAGES] = images
        elif config.get(Key.CLIENT) == 2:
            claims = {Key.NUM_EXAMPLES: images, Key.LOSS: loss, Key.SECONDS: 1e14}
            # An audit has none.
            reply.content.get(Key.METRICS, {}).update(claims)
        return reply

    return alter


def test_client_that_claims_a_hundred_million_images_decides_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    changes = {"train.precision": "float32", "federation.rounds": 1}
    run_config, nodes = real_nodes(tmp_path, changes, 3)
    alter = lying(10**7, from_the_start=True)
    alter.last = max(nodes.contexts)  # type: ignore[attr-defined]
    folder = play(run_config, nodes=nodes, alter=alter)
    counts = of_clients(counted(folder, "train loss"))
    assert counts == {(1, 0): 180, (1, 1): 180, (1, 2): 10**7}
    assert recorded(folder, "counted_images") == {(1, 2): 360}
    said = capsys.readouterr().out
    assert (
        "round 1: client 2 claims 10000000 images and counts as 360, at most "
        "federation.max_weight_share=0.5 of all"
    ) in said
    assert "(median of 3 clients, " in said and " to 1e+14)" in said
    for kind in ("train", "test"):
        losses = recorded(folder, f"{kind} loss")
        honest = (losses[1, 0], losses[1, 1])
        assert min(honest) <= losses[1, None] <= max(honest)
    assert recorded(folder, "seconds")[1, 2] < 600
    assert recorded(folder, "seconds_training")[1, None] < 600


def test_client_that_claims_more_images_than_it_introduced_itself_with_is_left_out(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    changes = {"train.precision": "float32", "federation.rounds": 1}
    run_config, nodes = real_nodes(tmp_path, changes, 3)
    folder = play(run_config, nodes=nodes, alter=lying(201, from_the_start=False, loss=0.5))
    reason = "num-examples must be at most 200, the images that it said it has, got 201"
    assert left_out(folder, "train") == {(1, 2): reason}
    assert recorded(folder, "num_clients") == {(1, None): 2}
    node = max(nodes.contexts)
    assert (
        f"client 2 (node {node}) claims more images than it said it has; it is asked to introduce "
        "itself again"
    ) in capsys.readouterr().out


def test_simulated_clients_count_by_their_images_whatever_the_share(
    reference: Path, tmp_path: Path
) -> None:
    folder = play(configured(tmp_path, {**THREE_ROUNDS, "federation.max_weight_share": 0.01}))
    assert same_bits(final_weights(folder), final_weights(reference))
    assert recorded(folder, "train loss") == recorded(reference, "train loss")


SCORED_HOSPITALS = {"eval.num_images": 100, "eval.metrics_every": 1}


def asks_for_scores(asked: Message, client: int | None = None) -> bool:
    """Whether this is the message by which a client is to score images."""
    told = asked.content.config_records[Key.CONFIG].get(Key.CLIENT)
    return asked.metadata.message_type == SCORES_TYPE and client in (None, told)


def spoiled_scores(client: int, change: Alter) -> Alter:
    return lambda asked, reply: change(asked, reply) if asks_for_scores(asked, client) else reply


def test_hospitals_attack_the_weights_and_false_attacks_are_left_out(tmp_path: Path) -> None:
    changes = {"train.precision": "float32", "federation.rounds": 1, "federation.min_replies": 2}
    run_config, nodes = real_nodes(tmp_path, changes, 3)

    def alter(asked: Message, reply: Message) -> Message:
        told = asked.content.config_records[Key.CONFIG].get(Key.CLIENT)
        if asked.metadata.message_type == AUDIT_TYPE and told == 1:
            reply.content[Key.AUDIT]["SimA"][0] = 1.5
        return reply

    last = max(nodes.contexts)
    nodes.contexts[last].node_config["audit"] = False
    folder = play(run_config, nodes=nodes, alter=alter)
    audited = [r for r in records(folder) if r.metric == "member_auc SimA"]
    assert {(r.client, r.local_model) for r in audited} == {(0, False), (0, True), (1, True)}
    assert {(r.n, r.context["numbers"][-3]) for r in audited} == {(40, 20)}
    assert recorded(folder, "num_attacks") == {(1, None): 7}
    reason = left_out(folder, "audit")[1, 1]
    assert reason == "SimA: numbers of an attack must be shares in [0, 1], got 1.5"
    told = (folder / "report.html").read_text(encoding="utf-8")
    assert "from held-out ones of client 0, by the global model." in told
    assert "from held-out ones of clients 0 1, by its own models." in told
    assert "Clients 1 2: not attacked." in told


def test_hospitals_score_the_same_images_and_their_means_are_weighted(
    hospitals: tuple[RunConfig, ClientNodes], capsys: pytest.CaptureFixture[str]
) -> None:
    run_config, nodes = hospitals
    asked_for: list[bytes] = []

    def alter(asked: Message, reply: Message) -> Message:
        if asks_for_scores(asked):
            assert asked.content.config_records[Key.CONFIG][Key.EXTRACTOR] == "classifier"
            arrays = asked.content.array_records[Key.ARRAYS]
            asked_for.append(arrays[Key.IMAGES].data + arrays[Key.LABELS].data)
            assert arrays[Key.IMAGES].numpy().shape == (100, 1, 8, 8)
            assert np.bincount(arrays[Key.LABELS].numpy()).tolist() == [10] * 10
        if asks_for_scores(asked, 1):
            reply.content[Key.METRICS].update({Key.NUM_EXAMPLES: 60, "fid": 1.0, "more": 1.0})
        return reply

    folder = play({**run_config, **SCORED_HOSPITALS}, nodes=nodes, alter=alter)
    first, second = {*asked_for[:2]}, {*asked_for[2:]}
    assert len(asked_for) == 4 and len(first) == len(second) == 1 and first != second
    fid = recorded(folder, "held_out fid")
    assert fid.keys() == {(r, who) for r in (1, 2) for who in (0, 1, None)}
    for server_round in (1, 2):
        expected = (20 * fid[server_round, 0] + 60 * 1.0) / 80
        assert fid[server_round, None] == pytest.approx(expected, rel=1e-12)
        assert recorded(folder, "num_held_out")[server_round, None] == 80
        assert recorded(folder, "num_scoring_clients")[server_round, None] == 2
    assert recorded(folder, "more") == {}
    assert read_config(folder / "config.yaml").eval.extractor == "classifier"
    said = capsys.readouterr().out
    mean, floor = fid[2, None], recorded(folder, "held_out fid real")[2, None]
    place, other = (
        recorded(folder, f"held_out noise_position{of}")[2, None] for of in ("", " real")
    )
    assert (
        f"images scored at 2 hospitals on 80 held-out images: between real (0) and noise (1) "
        f"{place:.4g} (real images {other:.4g}), FD {mean:.4g} (real images {floor:.4g}), KID "
    ) in said
    assert "(extractor: each hospital's own classifier, image range correct)" in said
    assert f"FD {fid[1, None]:.2f} at 2 hospitals" in said


@pytest.mark.parametrize(
    ("spoil", "reason"),
    [
        (changed(metrics={"fid": math.nan}), "^fid must be a finite number, got nan$"),
        (changed(metrics={"floor-fid": -1.0}), r"^floor-fid must be from 0 to 1e\+15, got -1.0$"),
        (changed(metrics={"pixel-copied": 1.5}), "^pixel-copied must be from 0 to 1, got 1.5$"),
        (changed(metrics={"kid": [1.0]}), "^kid must be a finite number"),
        (changed(metrics={Key.NUM_EXAMPLES: -4}), "^num-examples must be .* got -4$"),
        (changed(metrics={}), "^num-examples must be "),
        (without(Key.METRICS), "^no record 'metrics' in the reply$"),
        (lambda asked, _: failure(asked), r"^FileNotFoundError \(code 102\): its data"),
    ],
)
def test_scores_that_cannot_be_used_are_left_out_and_named(
    spoil: Alter, reason: str, scored: tuple[FederatedTraining, list[Alter], Path]
) -> None:
    run, alter, folder = scored
    alter[:] = [spoiled_scores(1, spoil)]
    before = len(records(folder))
    run.evaluation.measure(1, run.weights)
    told = {(r.client, named(r)): r for r in records(folder)[before:]}
    assert re.search(reason, told[1, "left_out"].context["reason"])
    assert (1, "held_out fid") not in told
    assert told[None, "held_out fid"].value == told[0, "held_out fid"].value
    assert told[None, "num_scoring_clients"].value == 1


def test_hospital_of_one_class_does_not_move_the_class_agreement() -> None:
    config = load_run_config(SMALL_RUN)
    told: dict[str, int | float] = dict.fromkeys(expected_scores(["class-agreement"]), 0.5)
    one_class = dict.fromkeys(expected_scores([]), 0.5)
    assert told.keys() - one_class.keys() == {
        *("class-agreement", "floor-class-agreement", "chance-agreement")
    }
    scores = [{Key.NUM_EXAMPLES: n, **told} for n in (20, 30)] + [
        {Key.NUM_EXAMPLES: 40, **one_class}
    ]
    scores[1]["class-agreement"] = 0.75
    for each in scores:
        content = RecordDict({Key.METRICS: MetricRecord(each)})
        assert read_scores(content) == each
    found = Records(tuple(combined_records(3, scores, config, n=100)))
    assert found.value("num_held_out") == 90
    agreement = found.last("class_agreement", reference=HELD_OUT)
    assert agreement is not None and agreement.context["num_clients"] == 2
    assert agreement.value == pytest.approx((20 * 0.5 + 30 * 0.75) / 50)
    fid = found.last("fid", reference=HELD_OUT)
    assert fid is not None and (fid.context["num_clients"], fid.n) == (3, 100)
    said = describe_scores(found, 3, config)
    assert "found in the class asked for 0.65 (real images 0.5)" in said
    alone = Records(tuple(combined_records(3, scores[2:], config, n=100)))
    assert alone.last("class_agreement", reference=HELD_OUT) is None
    # Half of them is no reply of a hospital.
    half = MetricRecord({k: v for k, v in scores[0].items() if k != "floor-class-agreement"})
    with pytest.raises(UnusableReply, match=r"^floor-class-agreement must be .*, got None"):
        read_scores(RecordDict({Key.METRICS: half}))


def test_scores_beside_a_count_of_0_are_not_taken_up() -> None:
    metrics = MetricRecord({Key.NUM_EXAMPLES: 0, "fid": math.nan})
    content = RecordDict({Key.METRICS: metrics})
    assert read_scores(content) == {Key.NUM_EXAMPLES: 0}


@pytest.fixture(scope="module")
def scored(
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[tuple[FederatedTraining, list[Alter], Path]]:
    """A run over two real nodes that has begun, and what is done to their replies."""
    folder = tmp_path_factory.mktemp("scored")
    run_config, nodes = real_nodes(folder, {"eval.num_images": 100, "train.precision": "float32"})
    alter: list[Alter] = [lambda asked, reply: reply]
    with opened(run_config, nodes=nodes, alter=lambda asked, reply: alter[0](asked, reply)) as run:
        run.prepare()
        run.directory.record([])
        yield run, alter, folder / "run"


def test_run_makes_up_for_a_scoring_that_nobody_answered(
    hospitals: tuple[RunConfig, ClientNodes], capsys: pytest.CaptureFixture[str]
) -> None:
    run_config, nodes = hospitals
    run_config = {**run_config, "eval.num_images": 100, "federation.rounds": 1}

    def unanswered(asked: Message, reply: Message) -> Message:
        return failure(asked) if asks_for_scores(asked) else reply

    folder = play(run_config, nodes=nodes, alter=unanswered)
    assert "no images are scored: no hospital said" in capsys.readouterr().out
    assert left_out(folder, "scores").keys() == {(1, 0), (1, 1)}
    assert recorded(folder, "held_out fid") == {} == recorded(folder, "num_scoring_clients")
    trained = recorded(folder, "train loss")
    resumed = {**run_config, "resume": True}
    play(resumed, nodes=nodes)
    assert (1, None) in recorded(folder, "held_out fid")
    assert recorded(folder, "train loss") == trained
    play(resumed, nodes=ClientNodes(Network(), run_config))  # there are no nodes to ask
    assert "all 1 rounds are complete already" in capsys.readouterr().out
    assert not is_measured(folder, load_run_config({**resumed, "eval.num_images": 50}))


def test_hospitals_with_too_few_images_are_no_failure(
    hospitals: tuple[RunConfig, ClientNodes], capsys: pytest.CaptureFixture[str]
) -> None:
    run_config, nodes = hospitals

    def alter(asked: Message, reply: Message) -> Message:
        if asks_for_scores(asked):
            reply.content[Key.METRICS] = MetricRecord({Key.NUM_EXAMPLES: 0})
        return reply

    changes = {"eval.num_images": 10, "federation.rounds": 1}
    folder = play({**run_config, **changes}, nodes=nodes, alter=alter)
    assert "2 hospitals decline to score or have too few images" in capsys.readouterr().out
    assert left_out(folder, "scores") == {} == recorded(folder, "held_out fid")
    assert is_measured(folder, read_config(folder / "config.yaml"))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"eval.extractor": "exported", "eval.exported_program": "/x", "eval.num_images": 10},
            r"eval\.extractor must be classifier, efficientnet or inception with.*got 'exported'",
        ),
        ({"eval.final_metrics": True}, r"eval\.num_images must be at least 10.*got 0"),
    ],
)
def test_scoring_that_hospitals_cannot_do_is_refused_before_any_training(
    hospitals: tuple[RunConfig, ClientNodes], changes: RunConfig, message: str
) -> None:
    run_config, nodes = hospitals
    with (
        opened({**run_config, **changes}, nodes=nodes) as run,
        pytest.raises(ValueError, match=message),
    ):
        run.run()


def server_context(run_config: RunConfig) -> Context:
    return Context(4711, 1, {}, RecordDict(), run_config)


def test_server_app_plays_a_run_and_lets_go_of_its_folder(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run_config = configured(tmp_path, {"federation.rounds": 1})
    nodes = ClientNodes(Network(), run_config, *simulated(3))
    with nodes.network.answering(nodes):
        server_app(nodes.grid, server_context(run_config))
    assert final_weights(tmp_path / "run")
    said = capsys.readouterr().out.splitlines()
    assert said[0].endswith(f"results: {tmp_path / 'run'}") and said[-1][9:] == said[0][9:]
    resumed = {**run_config, "resume": True}
    server_app(nodes.grid, server_context(resumed))  # would wait for a held folder


def test_server_app_that_fails_raises_and_lets_go_of_its_folder(tmp_path: Path) -> None:
    run_config = configured(tmp_path, {"federation.node_wait": 0.2})
    for _ in range(2):
        with pytest.raises(TimeoutError, match="0 of 1 nodes"):
            server_app(Network().grid, server_context(run_config))


def test_first_weights_come_from_the_seed_alone() -> None:
    config = load_run_config(SMALL_RUN)
    drawn = []
    for global_seed in (1, 2):
        torch.manual_seed(global_seed)
        state = torch.get_rng_state()
        drawn.append(initial_generator(config).state_dict())
        assert torch.equal(torch.get_rng_state(), state)
    assert same_bits(*drawn)
    other = initial_generator(load_run_config({**SMALL_RUN, "seed": 1})).state_dict()
    assert not same_bits(drawn[0], other)
