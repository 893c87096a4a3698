"""Checks of input: each raises an error that names the field, what it must be and what it is."""

import math


def require(condition: bool, name: str, expected: str, value: object) -> None:
    """Raise a ValueError that names the field, what it must be and what it is.

    Raises:
        ValueError: `condition` is false.
    """
    if not condition:
        raise ValueError(f"{name} must be {expected}, got {value!r}")


def require_one_of(name: str, value: str, choices: tuple[str, ...]) -> None:
    """Raise a ValueError unless `value` is one of `choices`.

    Raises:
        ValueError: `value` is none of them.
    """
    require(value in choices, name, f"one of {', '.join(choices)}", value)


def require_positive(section: str, config: object, *fields: str) -> None:
    """Raise a ValueError unless each of the named fields that is set is > 0 and finite.

    Raises:
        ValueError: a field is 0, negative, infinite or not a number.
    """
    for field in fields:
        value = getattr(config, field)
        if value is not None:
            require(0 < value < math.inf, f"{section}.{field}", "> 0 and finite", value)


def require_seed(name: str, value: int) -> None:
    """Raise a ValueError unless a seed is in [0, 2^63).

    Raises:
        ValueError: it is not.
    """
    require(0 <= value < 2**63, name, "in [0, 2^63)", value)
