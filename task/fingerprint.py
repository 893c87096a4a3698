"""A fingerprint of the code, so that server and clients that run different code say so."""

import hashlib
from functools import cache
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


@cache
def code_fingerprint() -> str:
    """Hash the Python files of `task` and `client_app` and the YAML files of `conf`.

    Returns:
        16 hexadecimal digits.
    """
    digest = hashlib.sha256()
    patterns = ("task/**/*.py", "client_app/**/*.py", "conf/**/*.yaml")
    for file in sorted(file for pattern in patterns for file in ROOT.glob(pattern)):
        digest.update(f"{file.relative_to(ROOT).as_posix()}\0".encode())
        digest.update(file.read_bytes())
    return digest.hexdigest()[:16]
