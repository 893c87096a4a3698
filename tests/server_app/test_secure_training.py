"""Runs over the real ClientApp whose server sees masked sums."""

from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from flwr.app import ConfigRecord, Context, Message, RecordDict

from client_app import workspace
from client_app.app import app
from client_app.secure_sums import own_keys
from server_app.messages import addressed
from server_app.secure_training import UNMASK_TYPE, SecureTraining
from task.config import load_run_config
from task.protocol.node import NodeConfig, identity_of
from task.protocol.wire import FailureCode, Key, from_npy
from task.runs.checkpoint import load_weights
from task.runs.records import IN_SUM, SPENT_EPSILON, TEST, TRAIN, read_records
from task.runs.run import Run
from task.runs.writer import RunWriter
from tests.helpers import (
    SMALL_RUN,
    ClientNodes,
    Handler,
    Network,
    node_context,
    played,
    sent,
    simulated,
    write_digits_as_mnist,
)

SECURE = {"federation.secure_aggregation": True, "federation.num_supernodes": 4}
Weights = dict[str, torch.Tensor]


@pytest.fixture(autouse=True)
def quick_looks(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr("server_app.exchange.POLL_SIMULATION", 0.01)
    monkeypatch.setattr("server_app.exchange.POLL_NETWORK", 0.01)
    monkeypatch.setattr("server_app.nodes.LOOK_NETWORK", 0.02)
    monkeypatch.setattr("server_app.secure_training.UNMASK_PATIENCE_SECONDS", 1.0)
    workspace._build_workspace.cache_clear()
    yield
    workspace._build_workspace.cache_clear()


def configured(folder: Path, name: str, **changes: Any) -> dict[str, Any]:
    dotted = {key.replace("__", "."): value for key, value in changes.items()}
    return {**SMALL_RUN, "output_dir": str(folder), "run_name": name, **dotted}


def secure_run(run_config: dict[str, Any], nodes: ClientNodes, answer: Handler) -> Path:
    with (
        nodes.network.answering(answer),
        closing(RunWriter(load_run_config(run_config))) as directory,
    ):
        SecureTraining(nodes.grid, directory).run()
    return directory.path


def final(folder: Path) -> Weights:
    return load_weights(folder / "model.safetensors")[0]


def same_bits(one: Weights, other: Weights) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[n], other[n]) for n in one)


def test_masked_run_ends_with_the_weights_of_a_plain_one_and_tells_of_no_client(
    tmp_path: Path,
) -> None:
    plain_config = configured(tmp_path, "plain", federation__aggregation="bounded_mean")
    plain_nodes = ClientNodes(Network(), plain_config, *simulated(4))
    plain = played(plain_config, plain_nodes, plain_nodes)
    workspace._build_workspace.cache_clear()
    config = {**configured(tmp_path, "secure"), **SECURE}
    nodes = ClientNodes(Network(), config, *simulated(4))
    uploads: list[np.ndarray] = []

    def watched(message: Message) -> Message:
        reply = nodes(message)
        if message.metadata.message_type == "train":
            arrays = reply.content.array_records[Key.ARRAYS]
            uploads.append(from_npy(arrays[Key.PACKED].data))
            assert {*reply.content} == {Key.ARRAYS, Key.CONFIG}
        return reply

    secure = secure_run(config, nodes, watched)
    assert same_bits(final(secure), final(plain))
    # Of numbers that are drawn at random, half of the bits are ones, whatever they hide.
    ones = [np.unpackbits(each.view(np.uint8)).mean() for each in uploads]
    assert len(uploads) == 8 and ones == pytest.approx([0.5] * 8, abs=0.01)
    told, expected = (read_records(run / "metrics.jsonl") for run in (secure, plain))
    assert {each.metric for each in told.all if each.client is not None} == {IN_SUM}
    assert {*Run(secure).participation().values()} == {"trained"}
    for reference in (TRAIN, TEST):
        found, wanted = (each.series("loss", reference=reference) for each in (told, expected))
        assert found == pytest.approx(wanted, rel=1e-5) and found
    assert [*told.series("num_clients").values()] == [4, 4]


@pytest.mark.parametrize("stage", ["train", UNMASK_TYPE])
def test_run_goes_on_where_one_of_four_drops_out(tmp_path: Path, stage: str) -> None:
    config = {**configured(tmp_path, "run"), **SECURE, "federation.round_timeout": 8.0}
    nodes = ClientNodes(Network(), config, *simulated(4))
    lost: list[str] = []

    def answer(message: Message) -> Message | None:
        asked = message.content.config_records[Key.CONFIG]
        kind = message.metadata.message_type
        if kind == stage and asked.get(Key.CLIENT) == 2 and asked.get(Key.SERVER_ROUND) == 1:
            lost.append(kind)
            return None
        return nodes(message)

    run = secure_run(config, nodes, answer)
    assert lost == [stage]
    counts = read_records(run / "metrics.jsonl").series("num_clients")
    assert counts == {1: 3 if stage == "train" else 4, 2: 4}


def hospitals(folder: Path, config: dict[str, Any], number: int, **own: Any) -> ClientNodes:
    """Real nodes with digits of their own, who trust each other."""
    outputs = [folder / f"output-{place}" for place in range(number)]
    for output in outputs:
        output.mkdir()
    prints = [identity_of(NodeConfig(output_path=str(o))).public.fingerprint for o in outputs]
    write_digits_as_mnist(folder / "data", train=100, test=20)
    places = [
        {
            "data-path": str(folder / "data"),
            "output-path": str(output),
            "trusted-peers": ",".join(prints),
            **own,
        }
        for output in outputs
    ]
    return ClientNodes(Network(), config, *places)


def test_real_nodes_try_a_round_again_and_give_nothing_away_twice(tmp_path: Path) -> None:
    config = {
        **configured(tmp_path, "run"),
        **SECURE,
        **{"overrides": "data=mnist data.test_fraction=null", "federation.rounds": 1},
        "federation.round_timeout": 10.0,
    }
    nodes = hospitals(tmp_path, config, 3)
    answered: dict[str, list[tuple[Message, Context]]] = {"train": [], UNMASK_TYPE: []}

    def answer(message: Message) -> Message | None:
        kind = message.metadata.message_type
        known = answered.get(kind)
        # At the first attempt two of three send nothing.
        if known is not None and kind == "train" and len(known) in (0, 1):
            known.append((message, nodes.contexts[message.metadata.dst_node_id]))
            return None
        # Each is a process of its own.
        workspace._build_workspace.cache_clear()
        context = nodes.contexts[message.metadata.dst_node_id]
        context.state.clear()
        if known is not None:
            known.append((message, context))
        return app(message, context)

    run = secure_run(config, nodes, answer)
    assert read_records(run / "metrics.jsonl").series("num_clients") == {1: 3}
    assert (run / "sums.json").exists()
    for kind in answered:
        message, context = answered[kind][-1]
        reply = app(message, context)  # once more, word for word
        assert reply.error.code == FailureCode.PEERS_REFUSED
    told = "".join(file.read_text() for file in run.glob("*.json*"))
    assert "num_images" not in told


def test_node_that_wants_secure_aggregation_shows_its_update_to_nobody(tmp_path: Path) -> None:
    config = {**configured(tmp_path, "run"), "overrides": "data=mnist data.test_fraction=null"}
    nodes = hospitals(tmp_path, config, 3)
    (context, *_) = nodes.contexts.values()
    asked = {Key.EXTRACTOR: "classifier", Key.SECURE_AGGREGATION: False}
    for kind in ("query", "train", "evaluate"):
        Network()
        entries: dict[str, Any] = {**asked, Key.SERVER_ROUND: 1, Key.CLIENT: 0, Key.RUN_ID: "1"}
        content = RecordDict({Key.CONFIG: ConfigRecord(entries)})
        message = addressed(content, node_id=7, message_type=kind, timeout=60)
        message.metadata.__dict__["_message_id"] = "asked"
        reply = app(message, context)
        assert reply.error.code == FailureCode.PEERS_REFUSED
        assert str(tmp_path).encode() not in sent(reply)


def test_identity_of_simulated_clients_is_kept() -> None:
    context = node_context(SMALL_RUN, simulated(3)[0])
    assert own_keys(context, None) == own_keys(context, None)


def test_private_hospitals_count_alike_in_full_and_say_nothing_to_the_sum(tmp_path: Path) -> None:
    private = {"overrides": "privacy=dp_sgd privacy.noise_draws=1", "federation__rounds": 1}
    private |= {"data__test_fraction": 0.9, "federation__num_supernodes": 3}
    weights = []
    for name, run in (("plain", {"federation__aggregation": "bounded_mean"}), ("secure", {})):
        workspace._build_workspace.cache_clear()
        config = configured(tmp_path, name, **private, **run)
        nodes = ClientNodes(Network(), config, *simulated(3))
        if name == "plain":
            weights.append(final(played(config, nodes, nodes)))
        else:
            config |= {**SECURE, "federation.num_supernodes": 3}
            nodes = ClientNodes(Network(), config, *simulated(3))
            weights.append(final(folder := secure_run(config, nodes, nodes)))
    assert same_bits(*weights)
    told = read_records(folder / "metrics.jsonl")
    assert told.value(SPENT_EPSILON) is not None
    assert {each.metric for each in told.all if each.client is not None} == {IN_SUM}
    assert not [each for each in told.all if each.n is not None]
