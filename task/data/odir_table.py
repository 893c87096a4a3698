"""The table of ODIR-5K: which photograph is of which patient and which class."""

import ast
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from task.checks import require
from task.data.csv_table import read_rows

ODIR_TABLE = "full_df.csv"
ODIR_COLUMNS = ("ID", "filename", "labels")


@dataclass(frozen=True)
class OdirRow:
    """A row of the table.

    Attributes:
        line: of the table, 1-based.
        patient: the column `ID`.
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
    for line, values in read_rows(table, ODIR_COLUMNS):
        row = _checked_row(table, line, values)
        other = rows.setdefault(row.filename, row)
        if other is not row:
            raise ValueError(
                f"{table}, line {row.line}: filename must be another in each row, got "
                f"{row.filename!r} ({row.label}), as in line {other.line} ({other.label})"
            )
    return [*rows.values()]


def _checked_row(table: Path, line: int, values: Sequence[str]) -> OdirRow:
    place = f"{table}, line {line}"
    patient, filename, labels = values
    require(patient != "", f"{place}: ID", "the patient", patient)
    path = PurePosixPath(filename)
    require(
        bool(path.name) and filename.isprintable() and not _leaves(path),
        f"{place}: filename",
        "that of a photograph, in the folder of all of them or below it",
        filename,
    )
    label = _class_name(labels, f"{place}: labels of {filename}")
    return OdirRow(line, patient, str(path), label)


def _leaves(path: PurePosixPath) -> bool:
    return path.is_absolute() or ".." in path.parts


def _class_name(labels: str, name: str) -> str:
    try:
        (label,) = ast.literal_eval(labels)
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError) as error:
        raise ValueError(f"{name} must be one class, as \"['N']\", got {labels!r}") from error
    return str(label)
