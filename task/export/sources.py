"""The code that an export ships: files of feddm as they are, but for the imports among them."""

import re
from importlib import resources
from pathlib import Path

IMPORT = re.compile(
    r"^(\s*)from task\.(?:export|generators(?:\.diffusion)?)\.(\w+) import ", re.MULTILINE
)


def ship(source: str, target: Path, *, in_package: bool = False) -> None:
    """Write a file of feddm beside others that it imports, so that it runs without feddm.

    Args:
        source: its path in `task`, such as "export/drawing.py".
        target: the file to write.
        in_package: whether it is going to be a module of a package, as Diffusers makes of the
            files of a pipeline, and no script.

    Raises:
        ValueError: the file needs more of feddm than what can be shipped.
    """
    text = resources.files("task").joinpath(source).read_text(encoding="utf-8")
    shipped = IMPORT.sub(r"\1from .\2 import " if in_package else r"\1from \2 import ", text)
    if re.search(r"^\s*(from|import) task\b", shipped, re.MULTILINE):
        raise ValueError(f"task/{source} must import nothing of feddm but modules beside it")
    target.write_text(shipped, encoding="utf-8")
