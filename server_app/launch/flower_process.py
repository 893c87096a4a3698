"""Flower's `flower-superlink` and `flwr-simulation`, with patience for a machine that is busy.

Flower gives a run up that sends no sign of life for a minute, and Ray one whose node does not
start within 30 s; neither can be configured. It is run as a file and imports nothing of feddm: what
trains comes from the bundle.
"""

import sys
import time
from collections.abc import Callable
from typing import Any

HEARTBEAT_PATIENCE_SECONDS = 600.0
RAY_START_SECONDS = 300.0


def be_patient_with_heartbeats() -> None:
    """Let a SuperLink of this process wait longer for a run's sign of life."""
    from flwr.common import constant

    # Before the modules that copy it are imported.
    constant.HEARTBEAT_PATIENCE = round(
        HEARTBEAT_PATIENCE_SECONDS / constant.HEARTBEAT_DEFAULT_INTERVAL
    )


def be_patient_with_ray() -> None:
    """Let a Ray of this process wait longer for its own node; Ray asks for it until it is there."""
    from ray._private import services

    get_node: Callable[..., Any] = services.get_node

    def wait_for_node(*args: Any) -> Any:
        deadline = time.monotonic() + RAY_START_SECONDS
        while True:
            try:
                return get_node(*args)
            except RuntimeError:
                if time.monotonic() > deadline:
                    raise
                time.sleep(0.1)

    services.get_node = wait_for_node


def main() -> None:
    """Run the command that the first argument names."""
    sys.argv = sys.argv[1:]
    if sys.argv[0] == "flower-superlink":
        be_patient_with_heartbeats()
        from flwr.superlink.cli.flower_superlink import flower_superlink as command
    else:
        be_patient_with_ray()
        from flwr.simulation.app import flwr_simulation as command
    command()


if __name__ == "__main__":
    main()
