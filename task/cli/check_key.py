"""A node's private key: whether Flower takes it, who can read it, and its fingerprint."""

import base64
import hashlib
from collections.abc import Iterator
from pathlib import Path

from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    PublicFormat,
    load_ssh_private_key,
)

from task.checks import require

HOW_TO_MAKE = "make one: ssh-keygen -t ecdsa -b 384 -N '' -f FILE"
# The curves of OpenSSH, all of which Flower accepts.
CURVES = ("secp256r1", "secp384r1", "secp521r1")


def check_private_key(file: Path) -> Iterator[tuple[str, str]]:
    """Check the file of `flower-supernode --auth-supernode-private-key`.

    Yields:
        A name and a finding at a time; the fingerprint as `ssh-keygen -lf` writes it.

    Raises:
        OSError: it cannot be read.
        ValueError: it is no key that Flower takes, or others can read it.
    """
    key = _load(file)
    yield "private key", f"{key.curve.key_size} {fingerprint(key.public_key())} (ECDSA)"
    yield "", "read this fingerprint to the coordinator, whose file of the key must have the same"
    mode = file.stat().st_mode & 0o777
    require(
        mode & 0o077 == 0,
        "--private-key",
        f"readable for its owner alone: chmod 600 {file}",
        f"mode {mode:o}",
    )


def fingerprint(key: ec.EllipticCurvePublicKey) -> str:
    """Return a public key's fingerprint as `ssh-keygen -l` writes it."""
    blob = key.public_bytes(Encoding.OpenSSH, PublicFormat.OpenSSH).split()[1]
    digest = base64.b64encode(hashlib.sha256(base64.b64decode(blob)).digest()).decode()
    return f"SHA256:{digest.rstrip('=')}"


def _load(file: Path) -> ec.EllipticCurvePrivateKey:
    try:
        key = load_ssh_private_key(file.read_bytes(), password=None)
    except TypeError as error:
        raise ValueError(
            f"--private-key must have no passphrase, which a node cannot ask for, got {file}; "
            f"take it off: ssh-keygen -p -N '' -f {file}"
        ) from error
    except (ValueError, UnsupportedAlgorithm) as error:
        raise ValueError(
            f"--private-key must be a private key in the format of OpenSSH, got {file} ({error}); "
            f"{HOW_TO_MAKE}"
        ) from error
    if not isinstance(key, ec.EllipticCurvePrivateKey) or key.curve.name not in CURVES:
        raise ValueError(
            f"--private-key must be an EC key, such as P-384, got {type(key).__name__}; "
            f"{HOW_TO_MAKE}"
        )
    return key
