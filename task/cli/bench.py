"""`feddm bench`: the benchmarks of a checkout, which take the place of the command."""

import os
import sys
from typing import NoReturn

from task.config import CONF_DIR

CHECKOUT = CONF_DIR.parent


def run_benchmarks(arguments: list[str]) -> NoReturn:
    """Become `python -m tests.benchmarks` of the checkout.

    Args:
        arguments: of its command line; paths count from the working directory.

    Raises:
        FileNotFoundError: feddm is installed without its checkout.
    """
    if not (CHECKOUT / "tests" / "benchmarks" / "__main__.py").is_file():
        raise FileNotFoundError(
            f"feddm bench runs from a checkout of feddm, and {CHECKOUT} is none; "
            "clone the repository and install it with `pip install -e .`"
        )
    # -P: no other package `tests`, that of the working directory, is taken for it.
    command = [sys.executable, "-P", "-m", "tests.benchmarks", *arguments]
    path = os.pathsep.join(filter(None, [str(CHECKOUT), os.environ.get("PYTHONPATH")]))
    os.execve(sys.executable, command, {**os.environ, "PYTHONPATH": path})
