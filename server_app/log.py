"""Lines for the person who follows the run."""

import sys
import time


def log(text: str) -> None:
    """Print a line with the time of day; Flower carries stdout to whoever follows the run."""
    # One write per line: Flower forwards each write on its own.
    sys.stdout.write(f"{time.strftime('%H:%M:%S')} {text}\n")
    sys.stdout.flush()


def duration(seconds: float) -> str:
    """Write seconds as 1:02:03, or 2:03 where there are no hours."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"
