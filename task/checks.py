"""Checks of input: each raises an error that names the field, what it must be and what it is."""


def require(condition: bool, name: str, expected: str, value: object) -> None:
    """Raise a ValueError that names the field, what it must be and what it is.

    Raises:
        ValueError: `condition` is false.
    """
    if not condition:
        raise ValueError(f"{name} must be {expected}, got {value!r}")


def require_one_of(name: str, value: object, choices: tuple[str, ...]) -> None:
    """Raise a ValueError unless `value` is one of `choices`.

    Raises:
        ValueError: `value` is none of them.
    """
    require(value in choices, name, f"one of {', '.join(choices)}", value)
