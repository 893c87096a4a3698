"""Runs with differential privacy: what clients say, what is recorded, what is refused."""

import math
from collections.abc import Iterator
from pathlib import Path

import pytest
from flwr.app import ConfigRecord, Error, Message, MetricRecord, RecordDict

from task.config import load_run_config
from task.privacy.accounting import epsilon_of
from task.protocol.node import NodeConfig, ledger_of
from task.protocol.wire import Key
from task.runs.records import SPENT_EPSILON, TRAIN, read_records
from task.runs.run import Run
from task.training.private import epsilon_after, spending_of
from tests.helpers import ClientNodes, Network, played, write_digits_as_mnist
from tests.server_app.test_federated import (
    RunConfig,
    configured,
    final_weights,
    new_process,
    play,
    quick_looks,
)

__all__ = ["new_process", "quick_looks"]  # fixtures
PRIVATE: RunConfig = {
    "overrides": "privacy=dp_sgd privacy.noise_draws=1 privacy.epsilon=8",
    "data.test_fraction": 0.9,
}


def said_beside_weights(reply: Message) -> set[str]:
    """Name everything that a reply says beside its weights."""
    found = set()
    for name, record in reply.content.items():
        if isinstance(record, MetricRecord | ConfigRecord):
            found |= {f"{name}.{key}" for key in record}
        elif name != Key.ARRAYS or [*record] != [Key.PACKED]:
            found.add(name)
    return found


def test_simulated_clients_say_nothing_beside_weights_and_resume_to_the_bit(
    tmp_path: Path,
) -> None:
    said: dict[str, set[str]] = {}

    def listen(asked: Message, reply: Message) -> Message:
        said.setdefault(asked.metadata.message_type, set()).update(said_beside_weights(reply))
        return reply

    run = configured(tmp_path, PRIVATE)
    whole = play({**run, "run_name": "whole"}, alter=listen)
    assert said == {
        "query": {f"config.{key}" for key in (Key.FINGERPRINT, "partition-id", "num-partitions")},
        "train": set(),
    }
    records = read_records(whole / "metrics.jsonl")
    config = load_run_config(run)
    spent = records.series(SPENT_EPSILON)
    assert spent == {rounds: epsilon_after(config, rounds) for rounds in (1, 2)}
    assert 0 < spent[1] < spent[2] <= 8
    assert records.value("num_clients") == 3
    assert not records.series("loss", reference=TRAIN)
    assert {each.metric for each in records.all if each.client is not None} == {
        *("update_norm", "download_bytes", "upload_bytes")
    }
    told = (whole / "report.html").read_text(encoding="utf-8")
    assert f"epsilon {spent[2]:.3g} at delta 0.0001 for each patient (DP-SGD, patients" in told
    assert "was not there" not in told

    # Without an epsilon the noise does not depend on the rounds, and a run may go on.
    given = str(run["overrides"]).replace("privacy.epsilon=8", "privacy.epsilon=null")
    run["overrides"] = f"{given} privacy.noise_multiplier=2"
    runs = [
        play({**run, "run_name": name, "federation.rounds": rounds, "resume": resume})
        for name, rounds, resume in (("all", 2, False), ("two", 1, False), ("two", 2, True))
    ]
    first, second = final_weights(runs[0]), final_weights(runs[2])
    assert all(bool((first[name] == second[name]).all()) for name in first)


def test_hospital_with_too_many_patients_is_named_before_training(tmp_path: Path) -> None:
    many = f"{PRIVATE['overrides']} privacy.delta=0.1"
    with pytest.raises(ValueError, match=r"privacy\.delta must be below 1 / "):
        play(configured(tmp_path, {**PRIVATE, "overrides": many}))


def test_real_nodes_tell_no_numbers_and_draw_noise_that_nobody_knows(tmp_path: Path) -> None:
    hospital = tmp_path / "hospital"
    write_digits_as_mnist(hospital, train=60, test=10)
    overrides = f"data=mnist {PRIVATE['overrides']}"
    run = configured(tmp_path, {"overrides": overrides, "data.test_fraction": "null"})
    run |= {"federation.rounds": 1, "federation.min_replies": 2}
    node = {"data-path": str(hospital), "report-class-counts": True, "score-images": True}
    own = [{**node, "output-path": str(tmp_path / name)} for name in ("a", "b")]
    for each in own:
        Path(str(each["output-path"])).mkdir()
    with pytest.raises(ValueError, match=r"eval.num_images must be 0, .*mechanism=dp_sgd: scores"):
        play({**run, "eval.num_images": 10}, nodes=ClientNodes(Network(), run, node))
    said: set[str] = set()

    def listen(asked: Message, reply: Message) -> Message:
        said.update(said_beside_weights(reply))
        return reply

    weights = []
    for name in ("one", "other"):
        named = {**run, "run_name": name}
        nodes = ClientNodes(Network(), named, *own)
        spoiled = iter([name == "other"])  # the first reply, whose round is tried again

        def spoil(asked: Message, reply: Message, which: Iterator[bool] = spoiled) -> Message:
            if asked.metadata.message_type == "train" and next(which, False):
                return Message(Error(code=100), reply_to=asked)
            return listen(asked, reply)

        weights.append(final_weights(play(named, nodes=nodes, alter=spoil)))
    assert said == {f"config.{Key.FINGERPRINT}", f"config.{Key.KEEPS_REPLIES}"}
    assert any(bool((weights[0][name] != weights[1][name]).any()) for name in weights[0])
    # Both runs, each of which the nodes' ledgers hold.
    config = load_run_config(run)
    ledger = ledger_of(NodeConfig(data_path=str(hospital), output_path=str(tmp_path / "a")))
    assert [each.run_name for each in ledger.runs()] == ["one", "other"]
    # A reply that did not get through is sent again as it was, which tells nothing more.
    steps = [spending_of(config, rounds=1)] * 2
    assert ledger.spent() == (epsilon_of(steps, 1e-5), 50)

    # A hospital that allows no more takes no part, and of one that limits nothing is known.
    for limit, overrides in ((1.0, run["overrides"]), (100.0, "data=mnist")):
        limited = [{**each, "max-epsilon": limit} for each in own]
        third = {**run, "run_name": f"third-{limit:g}", "overrides": overrides}
        nodes = ClientNodes(Network(), third, *limited)
        with pytest.raises((RuntimeError, TimeoutError), match=r"BudgetExhaustedError \(code 107"):
            play({**third, "federation.node_wait": 1.0}, nodes=nodes)
    assert ledger.spent() == (epsilon_of(steps, 1e-5), 50)
    found = Run(tmp_path / "one").records
    assert found.value(SPENT_EPSILON) == epsilon_after(config, 1)
    repeated = read_records(tmp_path / "other" / "metrics.jsonl")
    assert repeated.value(SPENT_EPSILON) == epsilon_after(config, 2)
    assert not [each for each in found.all if each.n is not None]


@pytest.mark.parametrize("lost", ["question", "reply"])
def test_what_gets_lost_is_asked_again_and_costs_patients_nothing_more(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], lost: str
) -> None:
    monkeypatch.setattr("server_app.exchange.AGAIN_AFTER_SECONDS", 0.5)
    hospital = tmp_path / "hospital"
    write_digits_as_mnist(hospital, train=60, test=10)
    run = configured(tmp_path, {"overrides": f"data=mnist {PRIVATE['overrides']}"})
    run |= {"data.test_fraction": "null", "federation.min_replies": 2}
    own = [{"data-path": str(hospital), "output-path": str(tmp_path / name)} for name in "ab"]
    for each in own:
        Path(each["output-path"]).mkdir()
    nodes = ClientNodes(Network(), run, *own)
    first = min(nodes.contexts)
    trainings: list[int] = []

    def answer(message: Message) -> Message | None:
        trains = message.metadata.message_type == "train" and message.metadata.dst_node_id == first
        trainings.extend([1] * trains)
        # In the second round, for of the first nobody knows how long it takes.
        if trains and len(trainings) == 2:
            if lost == "reply":
                nodes(message)
            return None
        return nodes(message)

    played(run, nodes, answer)
    assert len(trainings) == 3
    assert "round 2: train: client 0 is silent, and is asked again" in capsys.readouterr().out
    config = load_run_config(run)
    ledger = ledger_of(NodeConfig(data_path=str(hospital), output_path=own[0]["output-path"]))
    assert ledger.spent() == (epsilon_of([spending_of(config, rounds=1)] * 2, 1e-5), 50)


def test_no_noise_is_said_to_be_no_privacy(tmp_path: Path) -> None:
    given = str(PRIVATE["overrides"]).replace("privacy.epsilon=8", "privacy.epsilon=null")
    overrides = f"{given} privacy.noise_multiplier=0"
    run = configured(tmp_path, {**PRIVATE, "overrides": overrides, "federation.rounds": 1})
    folder = play(run)
    assert math.isinf(epsilon_after(load_run_config(run), 1))
    assert not read_records(folder / "metrics.jsonl").series(SPENT_EPSILON)
    assert "there is no noise" in (folder / "report.html").read_text(encoding="utf-8")


def test_what_clients_say_is_not_read_and_more_rounds_than_planned_are_refused(
    tmp_path: Path,
) -> None:
    def add(asked: Message, reply: Message) -> Message:
        if asked.metadata.message_type == "train":
            content = RecordDict(dict(reply.content.items()))
            content[Key.METRICS] = MetricRecord({Key.LOSS: math.nan, Key.NUM_EXAMPLES: 10**9})
            return Message(content, reply_to=asked)
        return reply

    run = configured(tmp_path, {**PRIVATE, "federation.rounds": 1})
    folder = play(run, alter=add)
    assert read_records(folder / "metrics.jsonl").value("num_clients") == 3
    assert all(bool(tensor.isfinite().all()) for tensor in final_weights(folder).values())
    with pytest.raises(ValueError, match=r"federation.rounds=2 \(there: 1\)"):
        play({**run, "federation.rounds": 2, "resume": True})
