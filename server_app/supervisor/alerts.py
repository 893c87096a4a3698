"""Telling whoever is on duty: the command that FEDDM_ALERT names."""

import os
import shlex
import subprocess

from server_app.log import log

ALERT_VARIABLE = "FEDDM_ALERT"
ALERT_SECONDS = 60.0


def alert(text: str) -> bool:
    """Give a text to the command of FEDDM_ALERT, where there is one, on its standard input.

    A command that fails is logged, by its program's name alone: its words may hold a secret.

    Returns:
        Whether it was told, or there is nobody to tell.
    """
    command = os.environ.get(ALERT_VARIABLE, "")
    if not command:
        return True
    program = ""
    try:
        words = shlex.split(command)
        program = words[0]
        done = subprocess.run(
            words,
            input=text + "\n",
            text=True,
            timeout=ALERT_SECONDS,
            check=False,
            stdout=subprocess.DEVNULL,
        )
    except (OSError, ValueError, subprocess.SubprocessError) as error:
        log(f"{ALERT_VARIABLE}: {program!r} did not take the message: {type(error).__name__}")
        return False
    if done.returncode != 0:
        log(f"{ALERT_VARIABLE}: {program!r} did not take the message: status {done.returncode}")
    return done.returncode == 0
