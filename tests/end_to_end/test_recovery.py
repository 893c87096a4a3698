"""A deployment that comes back by itself: all faults, one after the other, while a run goes on.

The gateway stalls, processes are killed, a node sends what no round asks for, a checkpoint is
damaged, and the SuperLink's database is lost. Real processes, real digits.
"""

import json
import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from task.runs.layout import DAMAGED
from task.runs.records import TRAIN, read_records
from tests.deployment import (
    CONNECTION,
    RUN_CONFIG,
    Deployment,
    answers,
    app_with_faults,
    deployed,
    write_digit_folders,
)
from tests.processes import wait_for

pytestmark = pytest.mark.slow

ROUNDS = 20
HOSPITALS = ("north", "south", "hostile")
# 1 GB in its reply, in a run whose weights have 8 kB.
SURPLUS = {"FEDDM_FAULTS": "surplus", "FEDDM_SURPLUS_MIB": "1000"}
# All hospitals are needed, so that no round goes on without one that has not come back.
ALL = (
    f"{RUN_CONFIG['overrides']} federation.min_nodes=3 federation.min_replies=3 "
    "federation.sharing=usplit train.optimizer_state=kept federation.node_wait=900"
)
ANY = f"{RUN_CONFIG['overrides']} federation.min_nodes=2 federation.min_replies=2"
NO_LONGER_HEARD = "the SuperLink can be reached and does not hear this node; the node is started"


@pytest.fixture(scope="module")
def deployment(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Deployment]:
    with deployed(tmp_path_factory.mktemp("recovery")) as found:
        yield found


def supernode_of(deployment: Deployment, name: str) -> int:
    """Return the pid of Flower's own process below a watched node."""
    return psutil.Process(deployment.pid(name)).children()[0].pid


def executor_of_node(deployment: Deployment, name: str) -> psutil.Process:
    """Wait for what starts a watched node's work."""
    found: list[psutil.Process] = []

    def look() -> bool:
        below = psutil.Process(supernode_of(deployment, name)).children()
        found[:] = [each for each in below if "flower-superexec" in str(each.cmdline()[:2])]
        return bool(found)

    wait_for(look, seconds=60, what=f"the flower-superexec of {name}")
    return found[0]


def is_gone(pid: int) -> bool:
    return not psutil.pid_exists(pid) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE


class Night:
    """A run over hospitals with watched nodes, through the gateway."""

    def __init__(self, deployment: Deployment, images: Path) -> None:
        """Start the gateway and the nodes."""
        self.deployment = deployment
        self.run = deployment.results / "night"
        self.health: dict[str, str] = {}
        deployment.start_gateway()
        for share, name in enumerate(HOSPITALS):
            data = write_digit_folders(images / name, classes=range(10), share=share, shares=8)
            deployment.register(name)
            variables = SURPLUS if name == "hostile" else {}
            self.health[name] = deployment.start_watched_node(name, data=data, variables=variables)
        self.wait_until_online()

    def wait_until_online(self) -> None:
        """Wait until the SuperLink hears all nodes."""
        for name, health in self.health.items():
            what = f"the sign of life of {name}"
            wait_for(lambda health=health: answers(health), seconds=400, what=what, every=1)

    def wait_for_next_training(self) -> None:
        """Wait until the nodes begin to train once more."""
        before = {name: self.said(name, "Receiving: train message") for name in HOSPITALS}
        for name, number in before.items():
            wait_for(
                lambda name=name, number=number: self.said(name, "Receiving: train") > number,
                seconds=300,
                what=f"a training of {name}",
            )

    def rounds_done(self) -> int:
        """Return the number of the newest checkpoint."""
        found = (self.run / "checkpoints").glob("round_*.safetensors")
        return max((int(file.stem.removeprefix("round_")) for file in found), default=0)

    def wait_for_further_rounds(self, number: int) -> None:
        """Wait until so many more rounds are complete, which takes all hospitals."""
        goal = self.rounds_done() + number
        assert goal < ROUNDS, "the run ends before its faults do"
        wait_for(lambda: self.rounds_done() >= goal, seconds=600, what=f"round {goal}", every=0.5)

    def said(self, name: str, text: str) -> int:
        """How often a process has said something, over all of its starts."""
        return self.deployment.log(name).count(text)

    def stall(self, seconds: float) -> None:
        """Let the gateway answer nobody for a while."""
        self.deployment.send_signal("gateway", signal.SIGSTOP)
        time.sleep(seconds)
        self.deployment.send_signal("gateway", signal.SIGCONT)

    def server(self) -> int:
        """Return the pid of the run's server process."""
        pid = int((self.run / ".lock").read_text())
        assert "flwr-serverapp" in " ".join(psutil.Process(pid).cmdline())
        return pid

    def round_seconds(self) -> dict[int, float]:
        """What the complete rounds have taken, which no later start changes."""
        return dict(read_records(self.run / "metrics.jsonl").series("round_seconds"))

    def numbers(self) -> dict[str, int]:
        """Client numbers by node id."""
        numbers: dict[str, int] = json.loads((self.run / "nodes.json").read_text())
        return numbers


def test_everything_comes_back_and_nothing_is_lost(deployment: Deployment, tmp_path: Path) -> None:
    night = Night(deployment, tmp_path)
    values = {"federation.rounds": ROUNDS, "train.local_epochs": 40}
    deployment.submit("night", **{**values, "overrides": ALL})
    deployment.supervise()

    # The gateway stalls, and begins to while the nodes train.
    deployment.wait_for_round("night", 1)
    for seconds in (30, 60, 100):
        night.wait_for_next_training()
        night.stall(seconds)
        night.wait_until_online()
        night.wait_for_further_rounds(1)
    # Each reply came through or was sent again: nobody has trained a round twice.
    for name in HOSPITALS:
        for server_round in range(1, night.rounds_done() + 1):
            assert night.said(name, f"round {server_round}: trained on") == 1, (name, server_round)
    assert sum(night.said(name, "this was asked before") for name in HOSPITALS) > 0
    assert sum(night.said(name, NO_LONGER_HEARD) for name in HOSPITALS) > 0

    # What Flower has started dies: a node's process, and what begins its work, and the SuperLink's.
    os.kill(supernode_of(deployment, "north"), signal.SIGKILL)
    wait_for(lambda: not answers(night.health["north"]), seconds=60, what="503", every=0.2)
    executor_of_node(deployment, "south").kill()
    os.kill(deployment.executor(), signal.SIGKILL)
    for name, said in (
        ("north", "the node has ended with status -9; it is started again"),
        ("south", "flower-superexec, which starts the node's work, is dead; the node is started"),
        ("superlink", "which starts the SuperLink's runs, was dead; it is started again"),
    ):
        wait_for(lambda name=name, said=said: night.said(name, said) == 1, seconds=60, what=said)
    night.wait_until_online()
    night.wait_for_further_rounds(1)

    # A node sends a gigabyte that no round has asked for, in another run.
    few = {**values, "federation.rounds": 1, "federation.round_timeout": 60.0, "overrides": ANY}
    deployment.submit("hostile", app=app_with_faults(tmp_path), **few)
    refused = "413 Request Entity Too Large"
    wait_for(lambda: night.said("hostile", refused) > 0, seconds=600, what=refused, every=1)
    deployment.wait_for_round("hostile", 1)
    night.wait_for_further_rounds(1)
    assert sum(file.stat().st_size for file in deployment.folder.glob("state.db*")) < 100 << 20

    # The run's server dies, and its newest checkpoint is damaged.
    before = night.round_seconds()
    server = night.server()
    os.kill(server, signal.SIGKILL)
    wait_for(lambda: is_gone(server), seconds=10, what="the server's end")
    last = night.rounds_done()
    newest = night.run / "checkpoints" / f"round_{last:04d}.safetensors"
    os.truncate(newest, newest.stat().st_size // 2)
    damaged = newest.with_name(f"{DAMAGED}{newest.name}")
    wait_for(damaged.exists, seconds=300, what="the fallback", every=1)
    wait_for(lambda: night.rounds_done() > last, seconds=600, what="further rounds", every=1)
    assert deployment.run_log().count(f"it is kept as {damaged.name}") == 1

    # The SuperLink dies, and comes back; then once more, without its database.
    deployment.kill("superlink")
    deployment.start_superlink()
    night.wait_for_further_rounds(1)
    numbers = night.numbers()
    deployment.kill("superlink")
    for file in deployment.folder.glob("state.db*"):
        file.unlink()
    deployment.start_superlink()
    restored = deployment.hospitals("restore", CONNECTION)
    assert restored.count(" is registered: ") == len(HOSPITALS)

    assert deployment.wait_for_supervisor(seconds=900) == 0, deployment.log("supervisor")
    night.wait_until_online()
    assert deployment.hospitals("list", CONNECTION).count(" online ") == len(HOSPITALS)
    assert deployment.statuses()[-1] == "finished:completed"

    # Each round once; those that were complete are as they were.
    losses = read_records(night.run / "metrics.jsonl").series("loss", reference=TRAIN)
    assert sorted(losses) == [*range(1, ROUNDS + 1)]
    kept = {number: took for number, took in before.items() if number < last}
    assert kept.items() <= night.round_seconds().items()

    # The hospitals are who they were, under new ids.
    after = night.numbers()
    assert numbers.items() < after.items() and {*after.values()} == {*numbers.values()}
    names = json.loads((night.run / "hospitals.json").read_text())
    ids = deployment.node_ids()
    assert names == {str(after[ids[name]]): name for name in HOSPITALS}

    # The supervisor has said each event once, and has given nothing up.
    said = deployment.log("supervisor")
    assert said.count("its database was lost or replaced. The run is submitted again") == 1
    assert said.count("; submitting it again, attempt 1 of") == 3, said
    assert said.count("goes on as run") == 3 and "GIVING UP" not in said
    for name in HOSPITALS[:2]:
        ended = supernode_of(deployment, name)
        deployment.send_signal(name, signal.SIGTERM)
        wait_for(lambda name=name: not deployment.is_running(name), seconds=120, what="its end")
        wait_for(lambda ended=ended: is_gone(ended), seconds=10, what="the end of what it started")


def test_options_that_flower_does_not_take_end_it_at_once(deployment: Deployment) -> None:
    command = ["feddm-node", "--superlink", "127.0.0.1:1", "--insecure", "--nonsense"]
    deployment.start("wrong", [*command, "--health", "127.0.0.1:0"])
    wait_for(lambda: not deployment.is_running("wrong"), seconds=120, what="the end")
    assert "does not take these options" in deployment.log("wrong")
