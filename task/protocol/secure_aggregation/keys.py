"""Who a hospital is: a key that signs, and one that agrees on secrets with other hospitals."""

import hashlib
import os
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from task.files import atomic_path
from task.lock import hold

PUBLIC_KEY_BYTES, SIGNATURE_BYTES = 32, 64
# Hexadecimal digits of a SHA-256: 128 bits, which nobody finds a second key for.
FINGERPRINT_DIGITS = 32
IDENTITY_FILE = "identity.key"
KEY_LOCK_FILE = ".identity.lock"
KEY_PATIENCE_SECONDS = 10.0
SIGNED = b"feddm secure aggregation, key of version 1\0"


@dataclass(frozen=True)
class PublicKeys:
    """What a hospital tells the others of its keys.

    Attributes:
        identity: Ed25519, 32 bytes.
        exchange: X25519, 32 bytes.
        signature: of `exchange`, by `identity`, 64 bytes.
    """

    identity: bytes
    exchange: bytes
    signature: bytes

    @classmethod
    def read(cls, data: object) -> "PublicKeys":
        """Read the bytes of `to_bytes`.

        Raises:
            ValueError: they are of another length, or the signature is wrong.
        """
        if type(data) is not bytes or len(data) != 2 * PUBLIC_KEY_BYTES + SIGNATURE_BYTES:
            raise ValueError("the keys of a peer must be 128 bytes")
        keys = cls(
            data[:PUBLIC_KEY_BYTES],
            data[PUBLIC_KEY_BYTES : 2 * PUBLIC_KEY_BYTES],
            data[2 * PUBLIC_KEY_BYTES :],
        )
        try:
            public = Ed25519PublicKey.from_public_bytes(keys.identity)
            public.verify(keys.signature, SIGNED + keys.exchange)
        except InvalidSignature as error:
            raise ValueError(f"the signature of peer {keys.fingerprint} is wrong") from error
        return keys

    def to_bytes(self) -> bytes:
        """Return what travels, 128 bytes."""
        return self.identity + self.exchange + self.signature

    @property
    def fingerprint(self) -> str:
        """What people compare to know that a key is that of a hospital."""
        return hashlib.sha256(self.identity).hexdigest()[:FINGERPRINT_DIGITS]


class Identity:
    """The private keys of a hospital, which stay on its disk."""

    def __init__(self, secret: bytes) -> None:
        """Make the keys of 64 secret bytes.

        Raises:
            ValueError: they are of another length.
        """
        if len(secret) != 2 * PUBLIC_KEY_BYTES:
            raise ValueError(f"an identity must be {2 * PUBLIC_KEY_BYTES} bytes, got {len(secret)}")
        self._signing = Ed25519PrivateKey.from_private_bytes(secret[:PUBLIC_KEY_BYTES])
        self._exchange = X25519PrivateKey.from_private_bytes(secret[PUBLIC_KEY_BYTES:])

    @cached_property
    def public(self) -> PublicKeys:
        """What others may know."""
        exchange = self._exchange.public_key().public_bytes_raw()
        identity = self._signing.public_key().public_bytes_raw()
        return PublicKeys(identity, exchange, self._signing.sign(SIGNED + exchange))

    def agreed_key(self, peer: PublicKeys, info: bytes) -> bytes:
        """Return 32 bytes that this hospital and a peer alone know.

        Args:
            peer: it may be this hospital itself.
            info: what the key is for; the same at both.

        Raises:
            ValueError: the peer's key is none that a secret can be agreed on with.
        """
        secret = self._exchange.exchange(X25519PublicKey.from_public_bytes(peer.exchange))
        return HKDF(algorithm=SHA256(), length=PUBLIC_KEY_BYTES, salt=None, info=info).derive(
            secret
        )


def new_identity_secret() -> bytes:
    """Draw the secret bytes of a new identity."""
    return os.urandom(2 * PUBLIC_KEY_BYTES)


def load_identity(folder: Path) -> Identity:
    """Return the identity that is kept in a folder; the first time it is made.

    Args:
        folder: it exists.

    Raises:
        OSError: it cannot be read or written.
        ValueError: the file is damaged.
    """
    path = folder / IDENTITY_FILE
    with hold(folder / KEY_LOCK_FILE, "output-path", patience=KEY_PATIENCE_SECONDS):
        if not path.exists():
            with atomic_path(path, private=True) as aside:
                aside.write_bytes(new_identity_secret())
        try:
            return Identity(path.read_bytes())
        except ValueError as error:
            raise ValueError(
                f"{path} is damaged ({error}); restore it, or move it away, and this hospital "
                "gets a new fingerprint, which the others must be told"
            ) from error


def read_fingerprints(written: str) -> frozenset[str]:
    """Read the fingerprints of `trusted-peers`, which commas part.

    Raises:
        ValueError: one is none.
    """
    found = [each.strip().lower() for each in written.split(",") if each.strip()]
    for each in found:
        if len(each) != FINGERPRINT_DIGITS or not set(each) <= set("0123456789abcdef"):
            raise ValueError(
                f"trusted-peers must be fingerprints of {FINGERPRINT_DIGITS} hexadecimal digits, "
                f"as `feddm check-node` prints them, with commas between them, got {each!r}"
            )
    return frozenset(found)
