"""A fingerprint of the code, so that server and clients that run different code say so."""

import hashlib
from functools import cache
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


@cache
def code_fingerprint() -> str:
    """Hash every Python file of `task` and `client_app` and every file of `conf`.

    Returns:
        16 hexadecimal digits.
    """
    digest = hashlib.sha256()
    files = [*ROOT.glob("task/**/*.py"), *ROOT.glob("client_app/**/*.py"), *ROOT.glob("conf/**/*")]
    for file in sorted(file for file in files if file.is_file()):
        digest.update(f"{file.relative_to(ROOT).as_posix()}\0".encode())
        digest.update(file.read_bytes())
    return digest.hexdigest()[:16]
