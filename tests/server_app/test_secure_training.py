"""Runs over the real ClientApp whose server sees masked sums."""

from collections.abc import Iterator
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from flwr.app import ConfigRecord, Context, Message, RecordDict

from client_app import workspace
from client_app.app import app
from client_app.secure_sums import own_keys
from server_app.dataset import load_images
from server_app.messages import addressed
from server_app.secure_training import UNMASK_TYPE, SecureTraining
from task.config import load_run_config
from task.data.partition import partition_dataset
from task.generators.registry import initial_generator
from task.protocol.node import NodeConfig, identity_of
from task.protocol.secure_aggregation.fixed_point import UpdateFormat
from task.protocol.wire import FailureCode, Key, from_npy
from task.randomness import Stream, torch_generator
from task.reporting.run_summary import describe_privacy
from task.runs.checkpoint import load_weights
from task.runs.records import IN_SUM, SPENT_EPSILON, TEST, TRAIN, read_records
from task.runs.run import Run
from task.runs.writer import RunWriter
from task.training.loop import fit, fit_options
from task.training.private import PrivateSteps
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
    # With a strategy whose server takes steps of its own.
    adam = {"overrides": "strategy=fedadam"}
    plain_config = configured(tmp_path, "plain", federation__aggregation="bounded_mean", **adam)
    plain_nodes = ClientNodes(Network(), plain_config, *simulated(4))
    plain = played(plain_config, plain_nodes, plain_nodes)
    workspace._build_workspace.cache_clear()
    config = {**configured(tmp_path, "secure", **adam), **SECURE}
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


def test_clients_unmask_no_sum_that_has_not_all_of_the_noise(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # A server that is content with three of five, where the noise is that of four.
    monkeypatch.setattr("server_app.secure_training.least_to_unmask", lambda *_: 3)
    five = {"federation__num_supernodes": 5, "federation__min_replies": 4, "federation__rounds": 1}
    config = configured(tmp_path, "run", **distributed(2.0, **five))
    config["federation.round_timeout"] = 8.0
    nodes = ClientNodes(Network(), config, *simulated(5))
    asked: list[int] = []

    def answer(message: Message) -> Message | None:
        told = message.content.config_records[Key.CONFIG]
        if message.metadata.message_type == "train" and told[Key.CLIENT] in (1, 4):
            return None
        reply = nodes(message)
        if message.metadata.message_type == UNMASK_TYPE:
            asked.append(reply.error.code)
        return reply

    with pytest.raises(RuntimeError, match=r"clients 0 2 3: .*PeersRefusedError"):
        secure_run(config, nodes, answer)
    assert asked == [FailureCode.PEERS_REFUSED] * 3


def test_protected_clients_clip_what_the_server_does_not_see(tmp_path: Path) -> None:
    clients = {"overrides": "privacy=dp_clients privacy.clipping_norm=0.05 privacy.delta=0.01"}
    ends = []
    for name, run in (("plain", {"federation__aggregation": "bounded_mean"}), ("secure", {})):
        workspace._build_workspace.cache_clear()
        config = configured(tmp_path, name, **clients, **run)
        if name == "secure":
            config |= SECURE
        nodes = ClientNodes(Network(), config, *simulated(4))
        folder = (secure_run if name == "secure" else played)(config, nodes, nodes)
        ends.append(final(folder))
    # Both clip in float32, once at the server and once at the clients.
    for one, other in zip(*(each.values() for each in ends), strict=True):
        assert torch.allclose(one, other, atol=1e-6)
    told = describe_privacy(Run(folder))
    assert "at delta 0.01 for each hospital (each update clipped" in told
    assert 0 < (read_records(folder / "metrics.jsonl").value(SPENT_EPSILON) or 0) <= 10


def test_identity_of_simulated_clients_is_kept() -> None:
    context = node_context(SMALL_RUN, simulated(3)[0])
    assert own_keys(context, None) == own_keys(context, None)


def distributed(noise_multiplier: float, **changes: Any) -> dict[str, Any]:
    """Three hospitals, of whom one may collude, that each add half of the noise's variance."""
    words = (
        "privacy=dp_sgd privacy.noise_draws=1 privacy.noise=distributed privacy.colluders=1 "
        f"privacy.epsilon=null privacy.noise_multiplier={noise_multiplier} "
        "privacy.sampling_rate=0.5"
    )
    return {
        "overrides": words,
        "data__test_fraction": 0.9,
        "federation__num_supernodes": 3,
        "federation__min_replies": 3,
        "federation__secure_aggregation": True,
        **changes,
    }


def test_server_steps_by_the_gradients_of_all_patients_and_resumes_to_the_bit(
    tmp_path: Path,
) -> None:
    ends = []
    for name, rounds, resume in (("whole", 2, False), ("two", 1, False), ("two", 2, True)):
        workspace._build_workspace.cache_clear()
        config = configured(
            tmp_path, name, **distributed(0.0, federation__rounds=rounds), resume=resume
        )
        nodes = ClientNodes(Network(), config, *simulated(3))
        folder = secure_run(config, nodes, nodes)
        ends.append(final(folder))
    assert same_bits(ends[0], ends[2])
    told = read_records(folder / "metrics.jsonl")
    assert {each.metric for each in told.all if each.client is not None} == {IN_SUM}

    # The oracle of the first round: what Adam makes of the sum of all hospitals' gradients.
    config = load_run_config(configured(tmp_path, "oracle", **distributed(0.0)))
    dataset = load_images(config)
    partition = partition_dataset(config, dataset, 3)
    total: Weights = {}
    for client, indices in enumerate(partition.train_indices):
        model = initial_generator(config)
        before = {name: each.detach().clone() for name, each in model.named_parameters()}
        own = dataset.train.subset(indices)
        options = replace(fit_options(config), private=replace(PrivateSteps.of(config), divisor=1))
        fit(
            model,
            own.images,
            own.labels,
            options=options,
            optimizers={"adam": torch.optim.SGD(model.parameters(), lr=1.0)},
            rng=torch_generator(config.seed, Stream.TRAIN, 1, client),
            patients=own.groups,
        )
        for name, each in model.named_parameters():
            total[name] = total.get(name, 0) + before[name] - each.detach()
    model = initial_generator(config)
    for name, each in model.named_parameters():
        each.grad = total[name]
    start = {name: each.clone() for name, each in model.state_dict().items()}
    model.optimizers(config.train.lr)["adam"].step()
    moved, expected = (
        torch.cat([(weights[name] - start[name]).flatten() for name in start])
        for weights in (ends[1], model.state_dict())
    )
    # Adam's first step is as long for a gradient that is nearly 0, whose sign rounding may change.
    assert (moved - expected).abs().mean() < 0.01 * expected.abs().mean()
    assert expected.abs().max() > 0


def test_shares_of_the_noise_add_up_to_all_of_it_without_the_colluders(tmp_path: Path) -> None:
    config = load_run_config(configured(tmp_path, "run", **distributed(3.0)))
    steps, form = PrivateSteps.of(config), UpdateFormat.of(config, 3)
    assert steps is not None and steps.noise_share == pytest.approx(1 / np.sqrt(2))
    rng = np.random.default_rng(0)
    # Values of clipped updates, such as those of all hospitals at one weight, do not matter.
    gradients = rng.normal(0, 300.0, (3, 40_000)).astype(np.float32)
    std = steps.spending.noise_multiplier * steps.noise_share
    noises = rng.normal(0, std, gradients.shape).astype(np.float32)
    total = sum(form.encode(each, 1)[0] for each in gradients + noises)
    found = 3 * form.add_mean(np.zeros(40_000, np.float32), np.asarray(total, np.uint32), 3)
    noise = found - gradients.sum(0)
    # Of three there is one share more than is needed, and without one colluder what is promised.
    assert noise.std() == pytest.approx(3.0 * np.sqrt(3 / 2), rel=0.02)
    assert (noise - noises[0]).std() == pytest.approx(3.0, rel=0.02)
    # A value beyond the range wraps around with the sum, and is not clipped.
    beyond = np.array([form.update_range * 4.5], np.float32)
    twice, back = form.encode(beyond, 1)[0], form.encode(-beyond, 1)[0]
    assert form.add_mean(np.zeros(1, np.float32), twice + back, 3) == pytest.approx([0.0])


def test_real_hospital_adds_a_share_of_the_noise_among_those_alone_that_it_names(
    tmp_path: Path,
) -> None:
    words = distributed(2.0, federation__rounds=1)
    words["overrides"] += " data=mnist"
    words["data__test_fraction"] = None
    config = {k: v for k, v in configured(tmp_path, "run", **words).items() if v is not None}
    config["overrides"] += " data.test_fraction=null"
    nodes = hospitals(tmp_path, config, 3)
    run = secure_run(config, nodes, nodes)
    told = describe_privacy(Run(run))
    assert (
        "of the sum over hospitals, each of which adds a share, and of which at most 1 tell" in told
    )
    # Without noise the draws of images differ all the same: the run's seed is known to the server.
    ends = []
    for name in ("one", "other"):
        workspace._build_workspace.cache_clear()
        silent = {**config, "run_name": name}
        silent["overrides"] = config["overrides"].replace("multiplier=2.0", "multiplier=0")
        quiet = ClientNodes(Network(), silent, *(c.node_config for c in nodes.contexts.values()))
        ends.append(final(secure_run(silent, quiet, quiet)))
    assert not same_bits(*ends)
    workspace._build_workspace.cache_clear()
    wary = [{**c.node_config, "minimum-colluders": 2} for c in nodes.contexts.values()]
    config |= {"run_name": "wary", "federation.node_wait": 2.0}
    careful = ClientNodes(Network(), config, *wary)
    with pytest.raises(TimeoutError, match="PeersRefusedError"):
        secure_run(config, careful, careful)
    for context in nodes.contexts.values():
        context.node_config.pop("trusted-peers")
    workspace._build_workspace.cache_clear()
    config["run_name"] = "strangers"
    with pytest.raises(TimeoutError, match="PeersRefusedError"):
        secure_run(config, nodes, nodes)


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
    # The server of a simulation has all images, and attacks them as a whole.
    numbered = {each.metric.partition(" ")[0] for each in told.all if each.n is not None}
    assert numbered == {"member_auc"}
