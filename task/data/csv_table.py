"""A table of values between commas, read by the names of its columns and checked row by row."""

import csv
import io
from collections.abc import Iterator, Sequence
from pathlib import Path

from task.checks import require


def read_rows(table: Path, columns: Sequence[str]) -> Iterator[tuple[int, list[str]]]:
    """Read some columns of a table.

    No error quotes a row, which may name a patient.

    Args:
        table: in UTF-8, with a line of names at its top.
        columns: names of those to read; others may stand beside them.

    Yields:
        The number of the line, 1-based, and the values of the columns without outer spaces.

    Raises:
        ValueError: the table is not UTF-8, lacks a column or has it twice, or a row is cut off, too
            long, or has a quote that is not closed.
    """
    reader = csv.DictReader(io.StringIO(_utf8_text(table), newline=""), strict=True)
    try:
        named = list(reader.fieldnames or [])
        expected = (
            f"a table with each of the columns {', '.join(columns)} once, named in its line 1"
        )
        # Without a line of names, line 1 is of a patient.
        wrong = [column for column in columns if named.count(column) != 1]
        found = f"{len(named)} columns, without or with several of {', '.join(wrong)}"
        require(not wrong, str(table), expected, found)
        for row in reader:
            beyond = row.pop(None, [])
            given = sum(value is not None for value in row.values()) + len(beyond)
            require(
                None not in row.values() and not any(beyond),
                f"{table}, line {reader.line_num}",
                "a row with a value for each column, and no more",
                f"{given} values for {len(named)} columns",
            )
            yield reader.line_num, [row[column].strip() for column in columns]
    except csv.Error as error:
        raise ValueError(
            f"{table}, line {reader.line_num}: it must be a table of values between commas, with "
            f"quotes that are closed, got {error}"
        ) from error


def _utf8_text(table: Path) -> str:
    content = table.read_bytes()
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise ValueError(
            f"{table}, line {line}: the table must be UTF-8, got the byte "
            f"0x{content[error.start]:02x}; save it as 'CSV UTF-8'"
        ) from error
