"""`flwr` with its answer in JSON: what a SuperLink lists, and the runs that it takes."""

import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

# Flower's commands take seconds, and a minute on a machine that is short of memory.
COMMAND_TIMEOUT_SECONDS = 180.0


class NoAnswer(RuntimeError):
    """Flower's command did not do what it was asked to; the text says why."""


def flwr(*arguments: str, environment: Mapping[str, str]) -> dict[str, Any]:
    """Run a command of Flower and return its answer.

    Args:
        *arguments: of the command.
        environment: its variables, of `local_environment`.

    Raises:
        NoAnswer: it failed.
    """
    name = f"`flwr {arguments[0]}`"
    command = [shutil.which("flwr", path=environment["PATH"]) or "flwr", *arguments]
    try:
        # In a folder of its own, because Flower takes a connection for a path where an app lies.
        with tempfile.TemporaryDirectory(prefix="feddm-") as aside:
            done = subprocess.run(
                [*command, "--format", "json"],
                cwd=aside,
                env=environment,
                capture_output=True,
                encoding="utf-8",
                errors="replace",
                check=False,
                timeout=COMMAND_TIMEOUT_SECONDS,
            )
        answer = json.loads(done.stdout)
    except subprocess.TimeoutExpired as error:
        raise NoAnswer(f"{name} took over {COMMAND_TIMEOUT_SECONDS:g} s") from error
    except OSError as error:
        raise NoAnswer(f"{name} could not be run: {error}") from error
    except ValueError as error:
        said = " ".join(f"{done.stdout} {done.stderr}".split())
        raise NoAnswer(f"{name} said: {said[-500:]}") from error
    if not isinstance(answer, dict):
        raise NoAnswer(f"{name} said: {done.stdout[-500:]}")
    # Flower ends with status 0 and says here that it failed.
    if not answer.get("success"):
        raise NoAnswer(" ".join(str(answer.get("error-message", answer)).split()))
    return answer


def local_environment() -> dict[str, str]:
    """Return the variables for a command that talks to a SuperLink of this machine.

    The commands of this Python environment come first, whatever the shell has found, and there
    are no proxies, which are for what lies outside this machine.
    """
    found = {name: v for name, v in os.environ.items() if not name.lower().endswith("_proxy")}
    if "FLWR_HOME" in found:
        found["FLWR_HOME"] = str(Path(found["FLWR_HOME"]).absolute())
    path = [str(Path(sys.executable).parent), found.get("PATH", "")]
    return {**found, "PATH": os.pathsep.join(path)}
