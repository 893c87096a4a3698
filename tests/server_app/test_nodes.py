import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import pytest
from flwr.app import ConfigRecord, Error, Message, RecordDict
from flwr.proto.message_pb2 import Message as ProtoMessage

from client_app.app import app
from server_app.hospitals.registry import Hospital, HospitalsFile
from server_app.nodes import Nodes, sample_clients
from server_app.replies import Introduction
from task.code_version import code_fingerprint
from task.protocol.wire import Key
from tests.helpers import ClientNodes, Network, node_context, simulated

Handler = Callable[[Message], Message | None]


@pytest.fixture(autouse=True)
def quick_looks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("server_app.nodes.LOOK_SIMULATION", 0.02)
    monkeypatch.setattr("server_app.nodes.LOOK_NETWORK", 0.02)


@pytest.fixture
def network() -> Network:
    return Network()


def real(
    network: Network,
    *,
    known: Mapping[int, int] | None = None,
    hospitals: HospitalsFile | None = None,
) -> Nodes:
    return Nodes(
        network.grid,
        simulated=False,
        num_classes=3,
        extractor="classifier",
        known=known,
        hospitals=hospitals,
    )


def simulation(network: Network) -> Nodes:
    return Nodes(network.simulation, simulated=True, num_classes=3, extractor="classifier")


def introduced(message: Message) -> Message:
    """Answer as a real node does, without its look through its data, which takes a while."""
    said = ConfigRecord({Key.FINGERPRINT: code_fingerprint(), Key.NUM_IMAGES: 20})
    return Message(RecordDict({Key.CONFIG: said}), reply_to=message)


def other_code(message: Message) -> Message:
    """Answer as a node does that runs other code."""
    reply = introduced(message)
    reply.content.config_records[Key.CONFIG][Key.FINGERPRINT] = "0" * 16
    return reply


def by_node(handlers: dict[int, Handler]) -> Handler:
    """Let some nodes answer in another way."""
    return lambda message: handlers.get(message.metadata.dst_node_id, introduced)(message)


def test_simulated_clients_are_numbered_by_their_partition(network: Network) -> None:
    nodes = ClientNodes(network, {}, *reversed(simulated(4)))
    known = simulation(network)
    with network.answering(nodes, order=lambda messages: messages[::-1]):
        known.wait_for(1, seconds=20)
    assert known.num_partitions == 4
    assert list(known.node_ids) == [0, 1, 2, 3]
    for number, node in known.node_ids.items():
        assert nodes.contexts[node].node_config[Key.PARTITION_ID] == number
    # Node ids of a simulation are new at every start, so none is kept.
    assert known.numbers == {}


def test_simulation_waits_for_all_of_its_nodes(network: Network) -> None:
    # Two of three have connected when the server looks for the first time.
    nodes = ClientNodes(network, {}, *simulated(3)[:2])
    known = simulation(network)
    with network.answering(nodes), pytest.raises(TimeoutError, match=r"^2 of 3 nodes are ready"):
        known.wait_for(1, seconds=2.5)
    (late,) = network.add_nodes(1)
    nodes.contexts[late] = node_context({}, simulated(3)[2], node_id=late)
    with network.answering(nodes):
        known.wait_for(1, seconds=20)
    assert known.node_ids[2] == late


def test_simulation_smaller_than_min_nodes_is_refused(network: Network) -> None:
    nodes = ClientNodes(network, {}, *simulated(2))
    message = r"federation\.min_nodes must be at most the number of simulated nodes, 2, got 3"
    with network.answering(nodes), pytest.raises(ValueError, match=message):
        simulation(network).wait_for(3, seconds=20)


def test_simulation_of_other_code_ends_the_run(network: Network) -> None:
    nodes = ClientNodes(network, {}, *simulated(2))

    def decoy(message: Message) -> Message:
        reply = nodes(message)
        reply.content.config_records[Key.CONFIG][Key.FINGERPRINT] = "0" * 16
        return reply

    with network.answering(decoy), pytest.raises(RuntimeError, match=r"other code .*feddm-train"):
        simulation(network).wait_for(1, seconds=20)


def test_real_nodes_are_numbered_by_their_first_appearance(network: Network) -> None:
    known = real(network)
    appeared = []
    with network.answering(introduced):
        for number in (1, 2, 3):
            appeared += network.add_nodes(1)
            known.wait_for(number, seconds=20)
    assert known.node_ids == dict(enumerate(appeared))
    assert known.numbers == {node: number for number, node in enumerate(appeared)}
    assert known.num_partitions is None


def test_numbers_of_nodes_that_appear_together_do_not_depend_on_who_answers_first(
    network: Network,
) -> None:
    nodes = network.add_nodes(5)
    found = []
    for step in (1, -1):
        known = real(network)
        with network.answering(introduced, order=lambda messages, step=step: messages[::step]):
            known.wait_for(5, seconds=20)
        found.append(known.node_ids)
    assert found == [dict(enumerate(nodes))] * 2


def test_numbers_are_kept_across_a_restart(network: Network) -> None:
    first, second, third = network.add_nodes(3)
    # The third is new; the number of one that has left is not given to another.
    known = real(network, known={first: 2, second: 0, 4711: 5})
    with network.answering(introduced):
        known.wait_for(3, seconds=20)
    assert known.node_ids == {0: second, 2: first, 6: third}
    again = real(network, known=known.numbers)
    with network.answering(introduced):
        again.wait_for(3, seconds=20)
    assert again.node_ids == known.node_ids and again.numbers == known.numbers


def test_number_and_name_belong_to_the_key_where_flower_gives_another_node_id(
    network: Network, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    file = HospitalsFile(tmp_path / "hospitals")
    first, second, stranger = network.add_nodes(3)
    # From a database that was lost; in the new one the keys have come in another order.
    lost = {1001: 0, 1002: 1}
    for key, before, node in (("b", 1002, first), ("a", 1001, second)):
        with file.held():
            file.add(Hospital(f"hospital-{key}", f"SHA256:{key}", "ecdsa", (before, node)))
    nodes = real(network, known=lost, hospitals=file)
    assert nodes.names == {0: "hospital-a", 1: "hospital-b"}
    with network.answering(introduced):
        nodes.wait_for(3, seconds=20)
    assert nodes.node_ids == {0: second, 1: first, 2: stranger}
    assert nodes.numbers == {**lost, first: 1, second: 0, stranger: 2}
    assert nodes.number_known == 3
    said = capfd.readouterr().out
    assert f"client 1 (hospital-b, node {first}) is back" in said
    assert f"client 2 (node {stranger}) has joined" in said
    network.state.deactivate_node(second)
    # Its key is removed, which an older database of Flower does not know.
    with file.held():
        file.add(Hospital("hospital-b", "SHA256:b", "ecdsa", (first,), removed=True))
    again = real(network, known=nodes.numbers, hospitals=file)
    with network.answering(introduced):
        again.wait_for(1, seconds=20)
    assert again.node_ids == {2: stranger}
    refused = f"node {first} (hospital-b) was refused: its key was removed; feddm-hospitals restore"
    assert refused in capfd.readouterr().out
    with network.answering(introduced), pytest.raises(TimeoutError) as caught:
        nodes.wait_for(3, seconds=0.5)
    assert f"client 0 (hospital-a, node {second}) is missing since" in str(caught.value)
    assert "client 1" not in str(caught.value)


def test_node_that_leaves_keeps_its_number_for_its_return(network: Network) -> None:
    first, second = network.add_nodes(2)
    known = real(network)
    with network.answering(introduced):
        known.wait_for(2, seconds=20)
        network.state.deactivate_node(first)
        known.wait_for(1, seconds=20)
        assert known.node_ids == {1: second}
        (third,) = network.add_nodes(1)
        network.state.activate_node(first, heartbeat_interval=60)
        known.wait_for(3, seconds=20)
    assert known.node_ids == {0: first, 1: second, 2: third}


def test_nodes_introduce_themselves_once(network: Network) -> None:
    network.add_nodes(2)
    asked = []

    def counting(message: Message) -> Message:
        asked.append(message.metadata.dst_node_id)
        return introduced(message)

    known = real(network)
    with network.answering(counting):
        for _ in range(3):
            known.wait_for(2, seconds=20)
    assert len(asked) == len(set(asked)) == 2


def test_node_with_other_code_is_refused_and_named(
    network: Network, capsys: pytest.CaptureFixture[str]
) -> None:
    good, bad = network.add_nodes(2)
    known = real(network)
    with network.answering(by_node({bad: other_code})):
        known.wait_for(1, seconds=20)
        assert known.node_ids == {0: good} and known.numbers == {good: 0}
        refused = f"node {bad} was refused: it runs other code than the server"
        assert refused in capsys.readouterr().out
        with pytest.raises(TimeoutError, match=rf"1 of 2 nodes .*federation\.node_wait.*{refused}"):
            known.wait_for(2, seconds=2.5)


def test_node_that_fails_is_refused_with_its_words(network: Network) -> None:
    (bad,) = network.add_nodes(1)

    def failing(message: Message) -> Message:
        return Message(Error(code=100, reason="ImportError"), reply_to=message)

    reason = rf"node {bad} was refused: ImportError \(code 100\)$"
    with network.answering(failing), pytest.raises(TimeoutError, match=reason):
        real(network).wait_for(1, seconds=2.5)


def test_node_whose_answer_flower_cannot_read_is_refused(
    network: Network, monkeypatch: pytest.MonkeyPatch
) -> None:
    def unreadable(message_ids: object) -> None:
        ProtoMessage.FromString(b"no message")

    (bad,) = network.add_nodes(1)
    monkeypatch.setattr(network.grid, "pull_messages", unreadable)
    with pytest.raises(TimeoutError, match=rf"node {bad} was refused: its reply cannot be read"):
        real(network).wait_for(1, seconds=0.2)


@pytest.mark.parametrize("missing", [Key.CONFIG, Key.FINGERPRINT])
def test_node_that_says_nothing_of_its_code_is_refused_in_words(
    network: Network, missing: Key
) -> None:
    (bad,) = network.add_nodes(1)

    def silent_about_its_code(message: Message) -> Message:
        reply = introduced(message)
        if missing in reply.content:
            del reply.content[missing]
        else:
            del reply.content.config_records[Key.CONFIG][missing]
        return reply

    with (
        network.answering(silent_about_its_code),
        pytest.raises(TimeoutError, match=rf"node {bad} was refused: .*{missing.value}") as caught,
    ):
        real(network).wait_for(1, seconds=2.5)
    assert "Key." not in str(caught.value)  # words for a person, not Python's


def test_refused_node_may_come_back(network: Network) -> None:
    # Its operator sees why it was refused, mends it and starts it again, under the same key.
    (node,) = network.add_nodes(1)
    known = real(network)
    with network.answering(other_code), pytest.raises(TimeoutError, match="other code"):
        known.wait_for(1, seconds=2.5)
    network.state.deactivate_node(node)
    with pytest.raises(TimeoutError, match="no other node connected"):
        known.wait_for(1, seconds=0.1)
    network.state.activate_node(node, heartbeat_interval=60)
    with network.answering(introduced):
        known.wait_for(1, seconds=20)
    assert known.node_ids == {0: node}


def test_slow_node_is_asked_again(network: Network, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("server_app.nodes.QUERY_TIMEOUT_SECONDS", 2.0)
    (node,) = network.add_nodes(1)
    known = real(network)
    with pytest.raises(TimeoutError, match=rf"node {node} has not introduced itself yet$"):
        known.wait_for(1, seconds=2.5)
    with network.answering(introduced):
        known.wait_for(1, seconds=20)
    assert known.node_ids == {0: node}


def test_client_in_doubt_is_absent_until_it_introduces_itself_again(network: Network) -> None:
    (node,) = network.add_nodes(1)
    known = real(network)
    with network.answering(introduced):
        known.wait_for(1, seconds=20)
        known.doubt(0, "is silent")
        assert known.node_ids == {} and known.numbers == {node: 0}
        known.wait_for(1, seconds=20)
    assert known.node_ids == {0: node}


def saying(counts: object) -> Handler:
    """Answer as a real node does that says how many images of each class it has."""

    def answer(message: Message) -> Message:
        reply = introduced(message)
        reply.content.config_records[Key.CONFIG][Key.CLASS_COUNTS] = counts
        return reply

    return answer


def test_silent_newcomer_holds_a_round_up_for_the_patience_once_and_joins_when_it_answers(
    network: Network, capsys: pytest.CaptureFixture[str]
) -> None:
    known = real(network)
    (first,) = network.add_nodes(1)
    with network.answering(introduced):
        known.wait_for(1, seconds=20)
    (late,) = network.add_nodes(1)
    waited = []
    for _ in range(2):
        start = time.monotonic()
        known.wait_for(1, seconds=20, patience=0.5)
        waited.append(time.monotonic() - start)
        assert known.node_ids == {0: first}
    assert 0.5 <= waited[0] < 5 and waited[1] < 0.5
    # What it was asked first is still out: the answer is taken whenever it comes.
    (asked,) = network.waiting()
    network.store_reply(introduced(asked))
    known.wait_for(2, seconds=20, patience=0.5)
    assert known.node_ids == {0: first, 1: late}
    assert f"client 1 (node {late}) has joined" in capsys.readouterr().out


def test_node_that_let_a_query_expire_is_asked_anew_and_not_waited_for(
    network: Network, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("server_app.nodes.QUERY_TIMEOUT_SECONDS", 0.4)
    first, silent = network.add_nodes(2)
    asked = []

    def answer(message: Message) -> Message | None:
        asked.append(message.metadata.dst_node_id)
        return None if asked[-1] == silent else introduced(message)

    known = real(network)
    with network.answering(answer):
        known.wait_for(1, seconds=20)  # as long as the first query is out
        start = time.monotonic()
        known.wait_for(1, seconds=20)
        assert time.monotonic() - start < 0.3
        deadline = time.monotonic() + 5
        while asked.count(silent) < 2 and time.monotonic() < deadline:
            time.sleep(0.01)
    assert known.node_ids == {0: first} and asked.count(silent) == 2


def test_refused_node_is_asked_again_after_a_while(
    network: Network, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("server_app.nodes.REFUSED_SECONDS", 4.0)
    (node,) = network.add_nodes(1)
    asked = []

    def mended(message: Message) -> Message:
        asked.append(message)
        return introduced(message) if len(asked) > 1 else other_code(message)

    known = real(network)
    with network.answering(mended):
        with pytest.raises(TimeoutError, match="other code"):
            known.wait_for(1, seconds=2.5)
        assert len(asked) == 1
        known.wait_for(1, seconds=20)
    assert known.node_ids == {0: node}


def test_leaving_and_returning_are_told_and_a_missing_client_is_named(
    network: Network, capsys: pytest.CaptureFixture[str]
) -> None:
    first, second = network.add_nodes(2)
    known = real(network, known={4711: 5})
    with network.answering(introduced):
        known.wait_for(2, seconds=20)
        network.state.deactivate_node(first)
        missing = (
            r"1 of 2 nodes .*client 5 \(node 4711\) is missing since this start; "
            rf"client 6 \(node {first}\) is missing since \d{{4}}-\d\d-\d\d \d\d:\d\d:\d\d$"
        )
        with pytest.raises(TimeoutError, match=missing):
            known.wait_for(2, seconds=1)
        assert f"client 6 (node {first}) has left" in capsys.readouterr().out
        network.state.activate_node(first, heartbeat_interval=60)
        known.wait_for(2, seconds=20)
    assert f"client 6 (node {first}) is back" in capsys.readouterr().out
    assert known.node_ids == {6: first, 7: second}


def test_class_counts_are_kept_by_client_where_a_node_says_them(network: Network) -> None:
    _, second = network.add_nodes(2)
    known = real(network)
    with network.answering(by_node({second: saying([3, 0, 12])})):
        known.wait_for(2, seconds=20)
    assert known.introduced == {
        0: Introduction(20, None),
        1: Introduction(20, [3, 0, 12]),
    }
    assert known.num_images(1) == 20


@pytest.mark.parametrize(
    "counts", [[1, 2], [1, -2, 3], [1.0, 2.0, 3.0], [10**15, 0, 0], [True, False, True], "123", 3]
)
def test_class_counts_that_cannot_be_are_refused(network: Network, counts: object) -> None:
    network.add_nodes(1)
    message = r"class-counts must be 3 whole numbers from 0 to 1e\+12, one for each .*, got "
    with network.answering(saying(counts)), pytest.raises(TimeoutError, match=message):
        real(network).wait_for(1, seconds=2.5)


@pytest.mark.parametrize("number", [None, -1, 14, 10**15, 20.0, True, "20"])
def test_number_of_images_that_cannot_be_is_refused(network: Network, number: object) -> None:
    network.add_nodes(1)

    def answer(message: Message) -> Message:
        reply = saying([3, 0, 12])(message)
        assert reply is not None
        said = reply.content.config_records[Key.CONFIG]
        said.pop(Key.NUM_IMAGES) if number is None else said.update({Key.NUM_IMAGES: number})
        return reply

    message = (
        r"num-images must be a whole number from 15, those of its class-counts, to 1e\+12, got"
    )
    with network.answering(answer), pytest.raises(TimeoutError, match=message):
        real(network).wait_for(1, seconds=2.5)


@pytest.mark.parametrize(
    "claim",
    [
        {Key.PARTITION_ID: 0},
        {Key.PARTITION_ID: 0, Key.NUM_PARTITIONS: 2},
        {Key.PARTITION_ID: 3, Key.NUM_PARTITIONS: 3},
        {Key.PARTITION_ID: "0"},
    ],
)
def test_false_claim_of_a_share_is_refused_and_the_others_go_on(
    network: Network, claim: dict[Key, int | str]
) -> None:
    liar, honest = network.add_nodes(2)  # the liar's answer is heard first

    def claiming(message: Message) -> Message:
        reply = introduced(message)
        reply.content.config_records[Key.CONFIG].update(claim)
        return reply

    known = real(network)
    with network.answering(by_node({honest: introduced, liar: claiming})):
        known.wait_for(1, seconds=20)
        with pytest.raises(TimeoutError, match="share of a simulation that there is not"):
            known.wait_for(2, seconds=2.5)
    assert list(known.node_ids.values()) == [honest] and known.num_partitions is None


def test_node_of_a_simulation_among_real_ones_does_not_turn_them_into_one(
    network: Network,
) -> None:
    (first,) = network.add_nodes(1)
    known = real(network)
    with network.answering(introduced):
        known.wait_for(1, seconds=20)
    (late,) = network.add_nodes(1)

    def simulated(message: Message) -> Message:
        return app(message, node_context({}, {"partition-id": 0, "num-partitions": 5}))

    with network.answering(simulated):
        known.wait_for(1, seconds=20)
    assert known.num_partitions is None
    assert known.node_ids == {0: first} and late not in known.node_ids.values()


def test_missing_nodes_end_the_wait(network: Network) -> None:
    start = time.monotonic()
    with pytest.raises(TimeoutError) as caught:
        real(network).wait_for(2, seconds=0.5)
    assert str(caught.value) == (
        "0 of 2 nodes are ready after federation.node_wait=0.5 s: no other node connected"
    )
    assert 0.5 <= time.monotonic() - start < 2


def test_silent_node_does_not_prolong_the_wait(
    network: Network, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("server_app.nodes.QUERY_TIMEOUT_SECONDS", 5.0)  # not to wait for 300 s here
    network.add_nodes(1)
    start = time.monotonic()
    with pytest.raises(TimeoutError, match=r"^0 of 1 nodes are ready"):
        real(network).wait_for(1, seconds=0.5)
    assert time.monotonic() - start < 3


def test_nodes_that_come_late_are_waited_for(network: Network) -> None:
    known = real(network)
    threading.Timer(0.5, network.add_nodes, [1]).start()
    with network.answering(introduced):
        known.wait_for(1, seconds=20)
    assert len(known.node_ids) == 1


def test_real_code_has_one_fingerprint_on_both_sides(network: Network) -> None:
    nodes = ClientNodes(network, {}, {"data-path": "/images"})
    heard = []

    def listening(message: Message) -> Message:
        reply = nodes(message)
        heard.append(dict(reply.content.config_records[Key.CONFIG]))
        return reply

    with network.answering(listening):
        real(network).wait_for(1, seconds=20)
    # And no path of the hospital.
    (said,) = heard
    assert said.keys() == {Key.FINGERPRINT, Key.NUM_IMAGES} and said[Key.NUM_IMAGES] > 100
    assert said[Key.FINGERPRINT] == code_fingerprint()


def test_clients_are_drawn_without_replacement_and_sorted() -> None:
    for server_round in range(1, 50):
        drawn = sample_clients([*range(10)], 4, seed=0, server_round=server_round)
        assert drawn == sorted(set(drawn)) and len(drawn) == 4
        assert set(drawn) <= {*range(10)}
        assert all(type(client) is int for client in drawn)


def test_draw_is_that_of_seed_and_round_alone() -> None:
    def drawn(seed: int) -> list[list[int]]:
        return [sample_clients([*range(10)], 3, seed=seed, server_round=r) for r in range(1, 9)]

    assert drawn(0) == drawn(0) != drawn(1)
    assert len({tuple(clients) for clients in drawn(0)}) > 4
    assert sample_clients([*range(10)], 3, seed=0, server_round=1) == sample_clients(
        [*range(9, -1, -1)], 3, seed=0, server_round=1
    )


def test_every_client_is_drawn_equally_often() -> None:
    drawn = [sample_clients([*range(10)], 3, seed=0, server_round=r) for r in range(1, 2001)]
    counts = np.bincount(np.concatenate(drawn), minlength=10)
    # 600 each; the standard deviation of a count is 20.5.
    assert np.abs(counts - 600).max() < 5 * 20.5


@pytest.mark.parametrize("clients_per_round", [None, 3, 4, 100])
def test_all_clients_take_part_where_no_fewer_are_asked_for(clients_per_round: int | None) -> None:
    found = sample_clients([7, 0, 3], clients_per_round, seed=0, server_round=1)
    assert found == [0, 3, 7]


def test_gaps_in_the_numbers_are_no_clients() -> None:
    for server_round in range(1, 20):
        assert {*sample_clients([0, 4, 9], 2, seed=0, server_round=server_round)} <= {0, 4, 9}
