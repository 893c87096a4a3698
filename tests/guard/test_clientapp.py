"""What stands in for Flower's `flwr-clientapp`; with a real node in tests/end_to_end."""

import stat
import subprocess
from pathlib import Path

from flwr.app import Context, Message, RecordDict
from flwr.supercore.constant import TASK_TYPE_TO_COMMAND, TaskType
from flwr.supercore.task_identity import TaskIdentity

from node_guard.clientapp import Guard
from task.protocol.wire import FailureCode
from tests.processes import CHECKOUT

APP = """
from flwr.app import Message, RecordDict, ConfigRecord
from flwr.clientapp import ClientApp
app = ClientApp()
@app.query()
def query(message, context):
    context.state["seen"] = ConfigRecord()
    return Message(RecordDict({"said": ConfigRecord(context.node_config)}), reply_to=message)
"""
PROJECT = """
[project]
name = "app"
version = "1.0"
[tool.flwr.app]
publisher = "somebody"
[tool.flwr.app.components]
serverapp = "guarded_app:app"
clientapp = "guarded_app:app"
"""


def message_and_context() -> tuple[Message, Context]:
    TaskIdentity.task_id, TaskIdentity.run_id, TaskIdentity.node_id = 1, 1, 1
    message = Message(RecordDict(), dst_node_id=1, message_type="query")
    return message, Context(1, 1, {"min-images": 5, "score-images": True}, RecordDict(), {})


def test_nothing_runs_without_a_decision_and_a_refusal_is_a_class_and_a_code() -> None:
    guard = Guard()
    message, context = message_and_context()
    reply = guard.load("somebody/app", "1.0", "0" * 64)(message=message, context=context)
    assert (reply.error.code, reply.error.reason) == (FailureCode.OTHER, "GuardError")
    guard.decision = {"code": 108, "error": "NotApprovedError", "why": "/home/patient-4711"}
    reply = guard.load("somebody/app", "1.0", "0" * 64)(message=message, context=context)
    assert (reply.error.code, reply.error.reason) == (108, "NotApprovedError")


def test_policy_stands_above_the_node_config_and_state_is_kept(tmp_path: Path) -> None:
    (tmp_path / "guarded_app.py").write_text(APP)
    (tmp_path / "pyproject.toml").write_text(PROJECT)
    guard = Guard()
    guard.decision = {"code": 0, "folder": str(tmp_path), "node_config": {"score-images": False}}
    message, context = message_and_context()
    reply = guard.load("somebody/app", "1.0", "0" * 64)(message=message, context=context)
    assert dict(reply.content["said"]) == {"min-images": 5, "score-images": False}
    assert "seen" in context.state and context.node_config["score-images"] is True


def test_every_program_that_a_coordinator_can_have_a_node_start_is_replaced() -> None:
    folder = CHECKOUT / "docker" / "guard"
    kinds = (TaskType.CLIENT_APP, TaskType.AGENT_APP)
    assert {file.name for file in folder.iterdir()} == {TASK_TYPE_TO_COMMAND[k] for k in kinds}
    assert all(file.stat().st_mode & stat.S_IXOTH for file in folder.iterdir())
    agent = subprocess.run([folder / "flwr-agentapp"], capture_output=True, check=False)
    assert agent.returncode == 1 and b"client apps alone" in agent.stderr
