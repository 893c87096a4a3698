"""The table of ODIR-5K: which photograph is of which patient and which class."""

import ast
import csv
import io
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from task.checks import require

ODIR_TABLE = "full_df.csv"
ODIR_COLUMNS = ("ID", "filename", "labels")


@dataclass(frozen=True)
class OdirRow:
    """A row of the table.

    Attributes:
        line: of the table, 1-based.
        patient: the column `ID`; a number is the same with and without a decimal point.
        filename: of the photograph, from the folder of all of them.
        label: the one name that the column `labels` holds.
    """

    line: int
    patient: str
    filename: str
    label: str


def read_odir_table(table: Path) -> list[OdirRow]:
    """Read and check the table.

    Raises:
        ValueError: it is not UTF-8, lacks a column, or a row cannot be used: it is cut off, names
            no class or several, a file outside of the folder, or one that another row names too.
    """
    rows: dict[str, OdirRow] = {}
    for row in _table_rows(table):
        other = rows.setdefault(row.filename, row)
        if other is not row:
            raise ValueError(
                f"{table}, line {row.line}: filename must be another in each row, got "
                f"{row.filename!r} ({row.label}), as in line {other.line} ({other.label})"
            )
    return [*rows.values()]


def _table_rows(table: Path) -> Iterator[OdirRow]:
    reader = csv.DictReader(io.StringIO(_table_text(table), newline=""), strict=True)
    try:
        columns = list(reader.fieldnames or [])
        require(
            set(ODIR_COLUMNS) <= set(columns),
            str(table),
            f"a table with the columns {', '.join(ODIR_COLUMNS)}",
            columns,
        )
        for row in reader:
            yield _checked_row(row, reader.line_num, f"{table}, line {reader.line_num}")
    except csv.Error as error:
        raise ValueError(
            f"{table}, line {reader.line_num}: it must be a table of values between commas, with "
            f"quotes that are closed, got {error}"
        ) from error


def _table_text(table: Path) -> str:
    content = table.read_bytes()
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise ValueError(
            f"{table}, line {line}: the table must be UTF-8, got the byte "
            f"0x{content[error.start]:02x}; save it as 'CSV UTF-8'"
        ) from error


def _checked_row(row: dict[Any, Any], line: int, place: str) -> OdirRow:
    require(
        None not in row.values() and not any(row.get(None, ())),
        place,
        "a row with a value for each column, and no more",
        [*row.values()],
    )
    patient, filename, labels = (row[column].strip() for column in ODIR_COLUMNS)
    require(patient != "", f"{place}: ID", "the patient", patient)
    path = PurePosixPath(filename)
    require(
        bool(path.name) and filename.isprintable() and not _leaves(path),
        f"{place}: filename",
        "that of a photograph, in the folder of all of them or below it",
        filename,
    )
    label = _class_name(labels, f"{place}: labels of {filename}")
    return OdirRow(line, _without_zeros(patient), str(path), label)


def _leaves(path: PurePosixPath) -> bool:
    return path.is_absolute() or ".." in path.parts


def _without_zeros(patient: str) -> str:
    number = re.fullmatch(r"0*(\d+)(\.0*)?", patient)
    return patient if number is None else number[1]


def _class_name(labels: str, name: str) -> str:
    try:
        (label,) = ast.literal_eval(labels)
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError) as error:
        raise ValueError(f"{name} must be one class, as \"['N']\", got {labels!r}") from error
    return str(label)
