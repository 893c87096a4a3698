"""Regular expressions that another machine has chosen: how long they can search in one name."""

import math
from re import _parser  # type: ignore[attr-defined]
from typing import Any

# Of a path below a class folder; most are shorter.
USUAL_LENGTH = 100
# A search that tries each of them takes seconds a name at most.
MOST_WAYS = 10**7

REPEATS = frozenset({"MAX_REPEAT", "MIN_REPEAT", "POSSESSIVE_REPEAT"})


def ways_to_match(pattern: str) -> int:
    """Count in how many ways a pattern could take up a name of `USUAL_LENGTH` characters.

    Python's `re` may try each of them before it gives a name up, and cannot be interrupted. Where
    repeats stand within repeats, as in (a+)+, there are more than any machine can try.

    Args:
        pattern: that `re.compile` takes.

    Returns:
        An upper bound, cut off above `MOST_WAYS`.
    """
    return _of_sequence(_parser.parse(pattern))


def _of_sequence(parts: Any) -> int:
    ways = 1
    for operation, argument in parts:
        ways = min(ways * _of_part(str(operation), argument), MOST_WAYS + 1)
    return ways


def _of_part(operation: str, argument: Any) -> int:
    if operation == "BRANCH":
        return sum(_of_sequence(each) for each in argument[1])
    if operation in REPEATS:
        least, most, body = argument
        least, most = int(least), min(int(most), USUAL_LENGTH)
        inner = _of_sequence(body)
        if inner == 1:
            return max(most - least, 0) + 1
        # Each repetition may choose anew.
        times = range(min(least, most), most + 1)
        return sum(math.prod([inner] * number) for number in times)
    if operation == "GROUPREF_EXISTS":
        _, then, otherwise = argument
        return _of_sequence(then) + (_of_sequence(otherwise) if otherwise else 1)
    # Of a group, a lookaround or an atomic group its pattern; a character has none within.
    inside = argument if isinstance(argument, tuple | list) else (argument,)
    ways = 1
    for each in inside:
        if isinstance(each, _parser.SubPattern):
            ways *= _of_sequence(each)
    return ways
