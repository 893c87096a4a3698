"""What the code is: its fingerprint, so that different code is told apart, and versions."""

import hashlib
from contextlib import suppress
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


@cache
def code_fingerprint(package: str = "") -> str:
    """Return `fingerprint_of` the code that runs, as it was at the first call.

    Args:
        package: name and version of the one that brings the family of the run's model, which is
            code that both ends must have as well; empty: feddm does.
    """
    if package:
        return hashlib.sha256(f"{code_fingerprint()} {package}".encode()).hexdigest()[:16]
    return fingerprint_of(ROOT)


def installed_versions(*packages: str) -> dict[str, str]:
    """Return the versions of those packages that are installed.

    The code itself may not be: Flower can unpack it into a folder of its own.
    """
    found = {}
    for package in packages:
        with suppress(PackageNotFoundError):
            found[package] = version(package)
    return found


def fingerprint_of(root: Path) -> str:
    """Hash the Python files of `task`, `client_app` and `server_app` and the YAML files of `conf`.

    Both ends have all of them, because Flower's bundle holds them all.

    Args:
        root: the folder that these four lie in.

    Returns:
        16 hexadecimal digits.

    Raises:
        OSError: a file cannot be read.
    """
    digest = hashlib.sha256()
    packages = ("task", "client_app", "server_app")
    patterns = (*(f"{package}/**/*.py" for package in packages), "conf/**/*.yaml")
    for file in sorted(file for pattern in patterns for file in root.glob(pattern)):
        digest.update(f"{file.relative_to(root).as_posix()}\0".encode())
        digest.update(file.read_bytes())
    return digest.hexdigest()[:16]
