"""Telling whoever is on duty: the command, or the address, that FEDDM_ALERT names."""

import http.client
import os
import shlex
import subprocess
import urllib.request

from server_app.log import log

ALERT_VARIABLE = "FEDDM_ALERT"
ALERT_SECONDS = 60.0


def alert(text: str) -> bool:
    """Give a text to the command of FEDDM_ALERT, on its standard input, or post it to the address.

    What fails is logged, by the program's name alone: words and address may hold a secret.

    Returns:
        Whether it was told, or there is nobody to tell.
    """
    command = os.environ.get(ALERT_VARIABLE, "")
    if not command:
        return True
    program = ""
    if command.startswith(("https://", "http://")):
        return _post(command, text)
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


class _NoRedirects(urllib.request.HTTPRedirectHandler):
    """Takes a redirect for an error: a POST would become a GET, without the text."""

    def redirect_request(self, *_: object) -> None:
        """Follow none."""


def _post(address: str, text: str) -> bool:
    request = urllib.request.Request(
        address, data=f"{text}\n".encode(), headers={"Content-Type": "text/plain; charset=utf-8"}
    )
    try:
        with urllib.request.build_opener(_NoRedirects).open(request, timeout=ALERT_SECONDS):
            return True
    except (OSError, ValueError, http.client.HTTPException) as error:
        said = getattr(error, "code", type(error).__name__)
        log(f"{ALERT_VARIABLE}: the address did not take the message: {said}")
        return False
