"""`feddm bench`: the benchmarks of a checkout, which take the place of the command."""

import os
import sys
from typing import NoReturn

from task.code_version import ROOT


def run_benchmarks(arguments: list[str]) -> NoReturn:
    """Become `python -m tests.benchmarks` of the checkout.

    Args:
        arguments: of its command line; paths count from the working directory.

    Raises:
        FileNotFoundError: feddm is installed without its checkout.
    """
    if not (ROOT / "tests" / "benchmarks" / "__main__.py").is_file():
        raise FileNotFoundError(
            f"feddm bench runs from a checkout of feddm, and {ROOT} is none; "
            "clone the repository and install it with `pip install -e .`"
        )
    # -P: no other package `tests`, that of the working directory, is taken for it.
    command = [sys.executable, "-P", "-m", "tests.benchmarks", *arguments]
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    os.execve(sys.executable, command, {**os.environ, "PYTHONPATH": path})
