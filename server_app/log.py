"""Lines for the person who follows the run."""

import sys
import time


def log(text: str) -> None:
    """Print a line with the time of day; Flower carries stdout to whoever follows the run."""
    # One write per line: Flower forwards each write on its own.
    sys.stdout.write(f"{time.strftime('%H:%M:%S')} {text}\n")
    sys.stdout.flush()
