"""Secrets in shares, of which so many are needed to know anything of the secret.

Source: Shamir 1979, "How to share a secret", over the integers modulo a prime.
"""

import secrets
from collections.abc import Mapping

# The smallest prime above 2^256: every secret of 32 bytes is below it.
PRIME = 2**256 + 297
SECRET_BYTES, SHARE_BYTES = 32, 33


def split_secret(secret: bytes, *, threshold: int, shares: int) -> list[bytes]:
    """Split a secret into shares of 33 bytes.

    Args:
        secret: 32 bytes.
        threshold: how many shares are needed, from 1 to `shares`.
        shares: how many there are.
    """
    if len(secret) != SECRET_BYTES:
        raise ValueError(f"a secret must be {SECRET_BYTES} bytes, got {len(secret)}")
    if not 1 <= threshold <= shares:
        raise ValueError(f"threshold must be from 1 to {shares}, got {threshold}")
    coefficients = [secrets.randbelow(PRIME) for _ in range(threshold - 1)]
    coefficients.append(int.from_bytes(secret))
    found = []
    for place in range(1, shares + 1):
        value = 0
        for coefficient in coefficients:
            value = (value * place + coefficient) % PRIME
        found.append(value.to_bytes(SHARE_BYTES))
    return found


def coefficients_at_zero(places: list[int]) -> list[int]:
    """Return what to multiply the shares of these places by, to get the secret as their sum."""
    found = []
    for place in places:
        above, below = 1, 1
        for other in places:
            if other != place:
                above = above * (other + 1) % PRIME
                below = below * (other - place) % PRIME
        found.append(above * pow(below, -1, PRIME) % PRIME)
    return found


def join_shares(shares: Mapping[int, bytes]) -> bytes | None:
    """Join shares to the secret.

    Args:
        shares: by their place, 0-based.

    Returns:
        32 bytes, others than the secret where shares are wrong or too few; None where such shares
        come to no 32 bytes.
    """
    multipliers = coefficients_at_zero([*shares])
    products = (
        int.from_bytes(share) * multiplier
        for share, multiplier in zip(shares.values(), multipliers, strict=True)
    )
    value = sum(products) % PRIME
    return value.to_bytes(SECRET_BYTES) if value < 2 ** (8 * SECRET_BYTES) else None
