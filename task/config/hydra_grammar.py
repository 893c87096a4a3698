"""Values of a configuration as people type them, written so that Hydra reads what was meant.

Hydra gives `=`, `(`, `[`, `,`, `#`, `~` and more a meaning, reads `1e5` as a number, and has no
letters beyond ASCII. In a field of text all of them are text.
"""

import re
from collections.abc import Callable
from typing import Any

from task.checks import require

# One token of Hydra's grammar, as its lexer has it.
_QUOTED = r"""(?:"(?:[^"\\]|\\.)*"|'(?:[^'\\]|\\.)*')"""
_ELEMENT = re.compile(rf"\s*({_QUOTED}|[^,]*?)\s*(?:,|\Z)", re.DOTALL)
_SWEEP_FUNCTION = r"(?:choice|glob|interval|range|shuffle|sort|tag)\(.*\)"


def require_text(path: str, value: object) -> None:
    """Raise a ValueError unless a value is a text that a configuration can hold.

    Raises:
        ValueError: it is a number with a fraction or an exponent, which a reader of TOML has
            already rounded, or it is "???", which is no value in OmegaConf, or no Unicode.
    """
    require(not isinstance(value, float), path, f'text in quotes, such as {path}="1e5"', value)
    text = str(value)
    require(text != "???", path, "another text than OmegaConf's sign for no value", text)
    surrogates = re.search("[\ud800-\udfff]", text)  # of the name of a file in another encoding
    require(surrogates is None, path, "text in UTF-8", text)


def escaped(text: str) -> str:
    """Write a text so that OmegaConf sees no interpolation in it."""
    return re.sub(r"(\\*)\$\{", lambda match: match[1] * 2 + r"\${", text)


def quoted(text: str) -> str:
    """Write a text in Hydra's grammar, in quotes unless it is plain."""
    plain = re.fullmatch(r"[A-Za-z_/][\w./-]*", text, re.ASCII) is not None
    if plain and text.lower() not in {"null", "true", "false", "inf", "nan"}:
        return text
    # In Hydra's quotes a backslash means itself, except before a quote.
    doubled = re.sub(r'(\\*)("|\Z)', lambda match: match[1] * 2 + match[2], escaped(text))
    return '"' + doubled.replace('"', '\\"') + '"'


def hydra_value(value: Any) -> str:
    """Write a value of a configuration in Hydra's grammar; a list may hold lists.

    Raises:
        TypeError: a configuration holds no such value.
    """
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, int | float):
        return str(value)
    if isinstance(value, str):
        return quoted(value)
    if isinstance(value, list | tuple):
        return f"[{','.join(map(hydra_value, value))}]"
    raise TypeError(f"a value must be a number, a text, null or a list of them, got {value!r}")


def typed_text(typed: str, *, sweep: bool = False) -> str:
    """Write in Hydra's grammar what somebody typed as the value of a text field.

    Args:
        typed: text, or a text in Hydra's quotes, in which Hydra's own rules hold.
        sweep: whether several may be given: with commas between them, or by a function of Hydra's.
    """
    if re.fullmatch(_QUOTED, typed, re.DOTALL) or (sweep and re.fullmatch(_SWEEP_FUNCTION, typed)):
        return typed
    return _each_of(typed, typed_text) if sweep and "," in typed else quoted(typed)


def typed_texts(typed: str, *, sweep: bool = False) -> str:
    """Write in Hydra's grammar what somebody typed as a list of texts: `[normal,it's]`.

    Args:
        typed: the list; anything else is left to Hydra.
        sweep: whether several may be given, with commas between them.
    """
    lists = re.split(r"(?<=\])\s*,\s*(?=\[)", typed.strip()) if sweep else [typed.strip()]
    if not all(text.startswith("[") and text.endswith("]") for text in lists):
        return typed
    return ",".join(f"[{_each_of(text[1:-1], typed_text)}]" for text in lists)


def _each_of(typed: str, write: Callable[[str], str]) -> str:
    """Write each of the texts between commas that are not in quotes."""
    if typed.strip() == "":
        return ""
    written, place, more = [], 0, True
    while more and (match := _ELEMENT.match(typed, place)):
        written.append(write(match[1]))
        place, more = match.end(), match[0].endswith(",")
    return ",".join(written)
