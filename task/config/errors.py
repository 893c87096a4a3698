"""What is wrong with a configuration, said as elsewhere: the value's path, what it must be, it."""

from collections.abc import Mapping
from types import NoneType
from typing import Any, get_args

from pydantic import ValidationError
from pydantic.fields import FieldInfo

# By pydantic's name of an error.
EXPECTED_TYPES = {
    "int_type": "an integer",
    "float_type": "a number",
    "bool_type": "true or false",
    "string_type": "text",
    "list_type": "a list",
    "model_type": "a section of values",
    "finite_number": "finite",
}
EXPECTED_BOUNDS = {
    "greater_than": "> {gt:g}",
    "greater_than_equal": ">= {ge:g}",
    "less_than": "< {lt:g}",
    "less_than_equal": "<= {le:g}",
    "multiple_of": "a multiple of {multiple_of}",
    "string_pattern_mismatch": "text that matches {pattern}",
}


def explanation(
    error: ValidationError, values: Mapping[str, Any], fields: Mapping[str, FieldInfo]
) -> str:
    """Say what each value must be that was refused.

    Args:
        error: of the schema.
        values: all that were given, by dotted path.
        fields: of the schema, by dotted path.
    """
    return "; ".join(_explained(dict(line), values, fields) for line in error.errors())


def _explained(
    line: dict[str, Any], values: Mapping[str, Any], fields: Mapping[str, FieldInfo]
) -> str:
    path = ".".join(name for name in line["loc"] if isinstance(name, str))
    kind, context = line["type"], line.get("ctx", {})
    if kind == "value_error":  # of a check of our own
        return str(context["error"])
    if kind == "missing":
        return f"{path} must be given"
    if kind == "extra_forbidden":
        return f"configuration: no such value: {path}"
    if kind == "literal_error":
        expected = "one of " + context["expected"].replace(" or ", ", ").replace("'", "")
    elif kind in EXPECTED_BOUNDS:
        expected = fields[path].description or EXPECTED_BOUNDS[kind].format(**context)
    else:
        expected = EXPECTED_TYPES.get(kind, line["msg"])
    # Of a list the whole is shown, whatever its element is that was refused.
    expected = (
        "a list, each element " * sum(isinstance(each, int) for each in line["loc"]) + expected
    )
    if path in fields and NoneType in get_args(fields[path].annotation) and "null" not in expected:
        expected += ", or null"
    return f"{path} must be {expected}, got {values.get(path, line['input'])!r}"
