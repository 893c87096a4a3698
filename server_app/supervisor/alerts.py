"""Telling whoever is on duty: the command that FEDDM_ALERT names."""

import os
import shlex
import subprocess

from server_app.log import log

ALERT_VARIABLE = "FEDDM_ALERT"
ALERT_SECONDS = 60.0


def alert(text: str) -> None:
    """Give a text to the command of FEDDM_ALERT, where there is one, on its standard input.

    A command that fails is logged and hinders nothing.
    """
    command = os.environ.get(ALERT_VARIABLE, "")
    if not command:
        return
    try:
        subprocess.run(
            shlex.split(command),
            input=text + "\n",
            text=True,
            timeout=ALERT_SECONDS,
            check=True,
            stdout=subprocess.DEVNULL,
        )
    except (OSError, ValueError, subprocess.SubprocessError) as error:
        log(f"{ALERT_VARIABLE} did not take the message: {error}")
