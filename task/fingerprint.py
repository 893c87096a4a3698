"""A fingerprint of the code, so that server and clients that run different code say so."""

import hashlib
from functools import cache
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


@cache
def code_fingerprint() -> str:
    """Return `fingerprint_of` the code that runs, as it was at the first call."""
    return fingerprint_of(ROOT)


def fingerprint_of(root: Path) -> str:
    """Hash the Python files of `task` and `client_app` and the YAML files of `conf`.

    Args:
        root: the folder that these three lie in.

    Returns:
        16 hexadecimal digits.

    Raises:
        OSError: a file cannot be read.
    """
    digest = hashlib.sha256()
    patterns = ("task/**/*.py", "client_app/**/*.py", "conf/**/*.yaml")
    for file in sorted(file for pattern in patterns for file in root.glob(pattern)):
        digest.update(f"{file.relative_to(root).as_posix()}\0".encode())
        digest.update(file.read_bytes())
    return digest.hexdigest()[:16]
