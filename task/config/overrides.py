"""Overrides `path=value`, written in Hydra's grammar by the type of the value that they set."""

import re

from task.config.hydra_grammar import hydra_value, require_text, typed_text, typed_texts
from task.config.schema import value_paths


def hydra_override(path: str, value: object) -> str:
    """Write `path=value` in Hydra's grammar, so that text is read back as it stands.

    A string for a field that is not text is left to Hydra to read (`"null"`, `"inf"`, `"[a,b]"`).

    Raises:
        ValueError: a text cannot be kept in a configuration.
    """
    if value_paths().get(path) is str:
        require_text(path, value)
    elif isinstance(value, str):
        return f"{path}={value}"
    return f"{path}={hydra_value(value)}"


def path_of(override: str) -> str:
    """Return the dotted path of the value that an override sets: `a.b` of `++a.b=1`."""
    return override.lstrip("+").partition("=")[0]


def read_override(word: str, *, sweep: bool = False) -> str:
    """Write an override in Hydra's grammar as somebody typed it: `data.root=/tmp/a=b (x)`.

    What follows the `=` of a text field is text, unless it stands in Hydra's quotes.

    Args:
        word: `path=value`; anything else is left as it is.
        sweep: whether a field may be given several values, with commas between them.

    Raises:
        ValueError: a text cannot be kept in a configuration.
    """
    given = re.fullmatch(r"(\+{0,2})([\w.]+)=(.*)", word, re.DOTALL)
    if given is None:
        return word
    plus, path, typed = given.groups()
    kind = value_paths().get(path)
    if kind is str:
        require_text(path, typed)
        typed = typed_text(typed, sweep=sweep)
    elif kind == list[str]:
        typed = typed_texts(typed, sweep=sweep)
    return f"{plus}{path}={typed}"
