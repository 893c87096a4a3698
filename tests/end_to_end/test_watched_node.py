"""A node that comes back by itself: `feddm-node` through the gateway, with real processes."""

import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from tests.deployment import Deployment, answers, deployed, write_digit_folders
from tests.processes import wait_for

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def deployment(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Deployment]:
    with deployed(tmp_path_factory.mktemp("watched")) as found:
        yield found


def supernode_of(deployment: Deployment, name: str) -> int:
    """Return the pid of Flower's own process below a watched node."""
    return psutil.Process(deployment.pid(name)).children()[0].pid


def is_gone(pid: int) -> bool:
    return not psutil.pid_exists(pid) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE


def test_node_comes_back_after_a_stalled_gateway_and_a_killed_process(
    deployment: Deployment, tmp_path: Path
) -> None:
    data = write_digit_folders(tmp_path / "images", classes=range(10), share=0, shares=8)
    deployment.start_gateway()
    deployment.register("north")
    health = deployment.start_watched_node("north", data=data)
    wait_for(lambda: answers(health), seconds=300, what="the node's first sign of life", every=1)
    first = supernode_of(deployment, "north")

    deployment.send_signal("gateway", signal.SIGSTOP)
    wait_for(lambda: not answers(health), seconds=120, what="the health's answer 503", every=1)
    time.sleep(40)  # about 100 s in all, on which Flower's node gives up for good
    assert supernode_of(deployment, "north") == first  # nobody can be reached: nothing to be gained
    deployment.send_signal("gateway", signal.SIGCONT)
    wait_for(lambda: answers(health), seconds=300, what="the node's return", every=1)
    assert "the node is started again" in deployment.log("north")

    second = supernode_of(deployment, "north")
    os.kill(second, signal.SIGKILL)
    wait_for(lambda: not answers(health), seconds=120, what="the end of the process", every=1)
    wait_for(lambda: answers(health), seconds=300, what="the node's second return", every=1)
    assert "ended with status -9; it is started again" in deployment.log("north")

    # What starts its work dies, of which Flower's node takes no note.
    below = psutil.Process(supernode_of(deployment, "north")).children()
    (executor,) = [each for each in below if "flower-superexec" in str(each.cmdline()[:2])]
    executor.kill()
    said = "flower-superexec, which starts the node's work, is dead; the node is started again"
    wait_for(lambda: said in deployment.log("north"), seconds=60, what="the third start", every=1)
    wait_for(lambda: answers(health), seconds=300, what="the node's third return", every=1)

    third = supernode_of(deployment, "north")
    deployment.send_signal("north", signal.SIGTERM)
    wait_for(lambda: not deployment.is_running("north"), seconds=120, what="the node's end")
    wait_for(lambda: is_gone(third), seconds=10, what="the end of what it had started")


def test_options_that_flower_does_not_take_end_it_at_once(deployment: Deployment) -> None:
    command = ["feddm-node", "--superlink", "127.0.0.1:1", "--insecure", "--nonsense"]
    deployment.start("wrong", [*command, "--health", "127.0.0.1:0"])
    wait_for(lambda: not deployment.is_running("wrong"), seconds=120, what="the end")
    assert "does not take these options" in deployment.log("wrong")
