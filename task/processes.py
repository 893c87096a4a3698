"""What this process owes the one that started it, and what libraries expect of it."""

import ctypes
import io
import os
import signal
import sys
import tempfile
from pathlib import Path


def end_with_parent() -> None:
    """Ask Linux to kill this process when its parent is killed; elsewhere it would stay behind."""
    if sys.platform == "linux":
        pr_set_pdeathsig = 1
        ctypes.CDLL(None).prctl(pr_set_pdeathsig, signal.SIGKILL)


def have_home() -> None:
    """Give this process a home directory where its user has none: libraries ask when imported."""
    try:
        Path.home()
    except RuntimeError:
        os.environ["HOME"] = tempfile.gettempdir()


def let_threads_sleep() -> None:
    """Let threads of this process that wait leave the cores to others.

    To be called before torch is imported, whose OpenMP reads it once. It lets them wait in busy
    loops otherwise, at the cost of what else the machine does.
    """
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")


def write_any_letter() -> None:
    """Let this process write whatever it has to say, in whatever locale."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
