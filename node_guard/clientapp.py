"""`feddm-guard`: Flower's `flwr-clientapp`, which asks before it loads a bundle of code.

flower-supernode starts a program called `flwr-clientapp`, the first in PATH, for each message, and
tells it by its arguments where to fetch the message and the bundle. docker/guard has one of that
name, which calls this. All of Flower's own work is left to Flower; three of the functions that it
calls are wrapped: the one that fetches, the one that unpacks and the one that loads.
"""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from importlib import import_module
from typing import Any

from flwr.app import Context, Error, Message
from flwr.clientapp import ClientApp
from flwr.supernode.cli.flwr_clientapp import flwr_clientapp

# As FailureCode.OTHER of feddm.
NO_DECISION = 100
INSTALL_OPTION = "--allow-runtime-dependency-installation"

AppCall = Callable[[Message, Context], Message]


@dataclass
class Guard:
    """What is decided on the one message of this process.

    Attributes:
        decision: a `Decision` of task.guard.decide; until there is one nothing runs.
    """

    decision: dict[str, Any] = field(
        default_factory=lambda: {"code": NO_DECISION, "error": "GuardError", "why": "not asked"}
    )

    def fetch(self, client: Any) -> tuple[Message, Context, Any, Any]:
        """Fetch the message and the bundle, and have it decided whether it runs."""
        message, context, run, fab = flowers_fetch(client)
        request = {
            "run_id": run.run_id,
            "app": run.fab_id,
            "version": run.fab_version,
            "fab_hash": fab.hash_str,
            "run_config": dict(context.run_config),
        }
        asked = json.dumps(request).encode() + b"\n" + fab.content
        # -P: a folder `task` in the working directory is none of feddm's.
        command = [sys.executable, "-P", "-m", "task.guard.decide"]
        done = subprocess.run(command, input=asked, stdout=subprocess.PIPE, check=False)
        if done.returncode == 0:
            self.decision = json.loads(done.stdout)
        else:
            self.decision["why"] = "the guard could not decide, see above"
        if self.decision["code"]:
            print(f"feddm-guard: run {run.run_id} is refused: {self.decision['why']}", flush=True)
        return message, context, run, fab

    def unpack(self, *_: Any, **__: Any) -> None:
        """Do nothing: what may run was unpacked by whoever decided."""

    def loader(self, *_: Any, **__: Any) -> Callable[[str, str, str], AppCall]:
        """Return what loads the app."""
        return self.load

    def load(self, app: str, version: str, fab_hash: str) -> AppCall:
        """Load the app that was approved, or one that answers every message by its refusal."""
        if self.decision["code"]:
            return self.refuse
        load = flowers_loader(default_app_ref="", app_path=self.decision["folder"], multi_app=True)
        return self.with_own_node_config(load(app, version, fab_hash))

    def refuse(self, message: Message, context: Context) -> Message:
        """Reply a class and a code, and no text."""
        error = Error(code=self.decision["code"], reason=self.decision["error"])
        return Message(error, reply_to=message)

    def with_own_node_config(self, app: ClientApp) -> AppCall:
        """Let the policy's values take the place of those that the node was started with."""

        def handle(message: Message, context: Context) -> Message:
            own = {**context.node_config, **self.decision["node_config"]}
            return app(message=message, context=replace(context, node_config=own))

        return handle


runtime: Any = import_module("flwr.supernode.runtime.run_clientapp")
# Taken before they are replaced; a Flower without them is one that this does not know.
flowers_fetch, flowers_loader = runtime.pull_task_input, runtime.get_load_client_app_fn


def main() -> None:
    """Run Flower's `flwr-clientapp` under guard."""
    # Compiled files in the folder of a bundle would be code that nobody has approved; its processes
    # are not to leave any either.
    sys.dont_write_bytecode, os.environ["PYTHONDONTWRITEBYTECODE"] = True, "1"
    guard = Guard()
    runtime.pull_task_input = guard.fetch
    runtime.install_from_fab = guard.unpack
    runtime.get_load_client_app_fn = guard.loader
    # The needs of approved code are installed by the hospital.
    words = [word for word in sys.argv[1:] if word != INSTALL_OPTION]
    sys.argv = ["flwr-clientapp", *words]
    flwr_clientapp()
