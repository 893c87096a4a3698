"""The Python interface of feddm: `from feddm import load_run`.

Everything else lives in the package `task`, whose name is a common one.
"""

import importlib.util
from pathlib import Path

_OWN = Path(__file__).resolve().parent / "task" / "__init__.py"


def _require_own_task() -> None:
    """Raise an ImportError where Python would find another `task` than the one of feddm.

    Raises:
        ImportError: another stands before it on Python's path, or was imported already.
    """
    found = importlib.util.find_spec("task")
    place = found.origin if found is not None else None
    if place is None or Path(place).resolve() != _OWN:
        raise ImportError(
            f"feddm needs its package `task` in {_OWN.parent}, and Python finds {place} first; "
            "rename that file or folder, or start Python elsewhere"
        )


_require_own_task()

from task.generation.images import GeneratedImages  # noqa: E402
from task.runs.run import Run, find_runs, load_run  # noqa: E402

__all__ = ["GeneratedImages", "Run", "find_runs", "load_run"]
