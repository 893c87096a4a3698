"""The table of ODIR-5K: which photograph is of which patient and which class."""

import ast
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from task.checks import require
from task.data.csv_table import read_rows

ODIR_TABLE = "full_df.csv"
ODIR_COLUMNS = ("ID", "filename", "labels")
# An eye with several diagnoses counts as the first of these that it has: from the rarest named
# disease of ODIR-5K to the most frequent, then other diseases, then normal.
ODIR_PRECEDENCE = ("H", "M", "A", "G", "C", "D", "O", "N")


@dataclass(frozen=True)
class OdirRow:
    """A row of the table.

    Attributes:
        line: of the table, 1-based.
        patient: the column `ID`.
        filename: of the photograph, from the folder of all of them.
        labels: the names that the column `labels` holds, each once; one in the published table.
    """

    line: int
    patient: str
    filename: str
    labels: tuple[str, ...]


def read_odir_table(table: Path) -> list[OdirRow]:
    """Read and check the table.

    Errors tell lines and not the names of files, which hold those of patients.

    Raises:
        ValueError: it is not UTF-8, lacks a column, or a row cannot be used: it is cut off, names
            no class, a file outside of the folder, or one that another row names too.
    """
    rows: dict[str, OdirRow] = {}
    for line, values in read_rows(table, ODIR_COLUMNS):
        row = _checked_row(table, line, values)
        other = rows.setdefault(row.filename, row)
        if other is not row:
            raise ValueError(
                f"{table}, line {row.line}: filename must be another in each row, got that of "
                f"line {other.line} (labels: here {', '.join(row.labels)}; there "
                f"{', '.join(other.labels)})"
            )
    return [*rows.values()]


def _checked_row(table: Path, line: int, values: Sequence[str]) -> OdirRow:
    place = f"{table}, line {line}"
    patient, filename, labels = values
    require(patient != "", f"{place}: ID", "the patient", patient)
    path = PurePosixPath(filename)
    problems = {
        "none": not path.name,
        "one with characters that cannot be printed": not filename.isprintable(),
        "an absolute path": path.is_absolute(),
        "one with .. in it": ".." in path.parts,
    }
    for problem, found in problems.items():
        if found:
            raise ValueError(
                f"{place}: filename must be that of a photograph, in the folder of all of them or "
                f"below it, got {problem}"
            )
    return OdirRow(line, patient, str(path), _class_names(labels, f"{place}: labels"))


def _class_names(labels: str, name: str) -> tuple[str, ...]:
    try:
        found = ast.literal_eval(labels)
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
        found = None
    if not (isinstance(found, list) and found and all(isinstance(each, str) for each in found)):
        raise ValueError(f"{name} must be a list of classes, as \"['N']\", got another text")
    return tuple(dict.fromkeys(found))
