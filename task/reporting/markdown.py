"""Text and tables of Markdown from words of any kind: none of them is read as Markdown or HTML."""

import re
from collections.abc import Iterable, Sequence

# "_" means nothing within a word, so that names and paths stay readable.
MARKS = re.compile(r"[\\`*<>\[\]|~$&!#]|(?<!\w)_|_(?!\w)")
# They begin a list or a rule where they stand first.
FIRST = re.compile(r"\A(\d*)([-+=.)])(?=[-+=]*(?:\s|\Z))")


def plain(text: str) -> str:
    """Write text as a line of Markdown that shows it as it is.

    Source: CommonMark, where a backslash before a punctuation mark takes its meaning from it.
    """
    return FIRST.sub(r"\1\\\2", _within(text))


def _within(text: str) -> str:
    """Write text that stands behind something else in its line."""
    return MARKS.sub(r"\\\g<0>", " ".join(text.split()))


def bullets(lines: Iterable[str]) -> str:
    """Write a list, an item a line."""
    return "\n".join(f"- {plain(line)}" for line in lines)


def table(heads: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """Lay out a table whose first column names the rows."""
    lines = [
        [_within(head) for head in heads],
        ["---", *["---:"] * (len(heads) - 1)],
        *([_within(str(cell)) for cell in row] for row in rows),
    ]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)
