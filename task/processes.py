"""What a process that was started needs to know of the one that started it."""

import ctypes
import signal
import sys


def end_with_parent() -> None:
    """Ask Linux to kill this process when its parent is killed; elsewhere it would stay behind."""
    if sys.platform == "linux":
        pr_set_pdeathsig = 1
        ctypes.CDLL(None).prctl(pr_set_pdeathsig, signal.SIGKILL)
