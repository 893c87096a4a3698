"""Which images are of one patient: numbered, so that no split parts a patient.

What names a patient stays here: no number tells it, and no error quotes it.
"""

import re
import unicodedata
from collections.abc import Iterable, Sequence
from pathlib import Path, PurePosixPath

import numpy as np

from task.checks import require
from task.config import DataConfig
from task.data.csv_table import read_rows

PATIENT_COLUMNS = ("file", "patient")


def number_patients(names: Sequence[str]) -> np.ndarray:
    """Number patients by their names, in the order of these.

    A number is the same patient with and without zeros before it or after its decimal point, as
    spreadsheets write it, and a name is the same however a system composes its letters.

    Args:
        names: N of them.

    Returns:
        [N] int64 in [0, number of patients).
    """
    known = [_without_zeros(_normal_form(name).strip()) for name in names]
    _, numbers = np.unique(known, return_inverse=True)
    return numbers.astype(np.int64)


def _without_zeros(name: str) -> str:
    number = re.fullmatch(r"0*(\d+)(\.0*)?", name)
    return name if number is None else number[1]


def patients_of(paths: Sequence[Path], data: DataConfig) -> np.ndarray | None:
    """Number the patients of images in class folders, as a configuration says who they are.

    Args:
        paths: of the N images of all splits, below `data.root`.
        data: says it by `data.patient_pattern` or `data.patients`.

    Returns:
        [N] int64, equal for the images of one patient; None where neither is given.

    Raises:
        FileNotFoundError: the table is not there.
        ValueError: an image has no patient, or the table cannot be used.
    """
    if data.patient_pattern:
        return number_patients(_found_in_names(paths, Path(data.root), data.patient_pattern))
    if data.patients:
        return number_patients(_found_in_table(paths, Path(data.root), Path(data.patients)))
    return None


def _found_in_names(paths: Sequence[Path], root: Path, pattern: str) -> list[str]:
    above = 2 if (root / "train").is_dir() else 1
    names = ["/".join(path.relative_to(root).parts[above:]) for path in paths]
    matches = [re.search(pattern, name) for name in names]
    found = [match[1] or "" if match else "" for match in matches]
    without = [name for name, patient in zip(names, found, strict=True) if not patient.strip()]
    require(
        not without,
        "data.patient_pattern",
        "a pattern whose group finds the patient in the path of every image below its class folder",
        f"{pattern}, which finds none in {len(without):,} of {len(paths):,} paths"
        + (f", such as one of the form {_form(without[0])}" if without else ""),
    )
    return found


def _form(name: str) -> str:
    """Show where a path has letters and digits, and not which."""
    return re.sub(r"[^\W\d_]", "a", re.sub(r"\d", "0", name))


def _found_in_table(paths: Sequence[Path], root: Path, table: Path) -> list[str]:
    if not table.is_file():
        problem = "it is a folder" if table.is_dir() else "there is no such file"
        raise FileNotFoundError(
            f"data.patients={table}: {problem}; set it to a table with the columns "
            f"{', '.join(PATIENT_COLUMNS)}"
        )
    patients = _read_patients(table)
    names = [_normal_form(path.relative_to(root).as_posix()) for path in paths]
    listed = sum(name in patients for name in names)
    require(
        listed == len(names),
        f"data.patients={table}",
        "a table whose column file has the path of every image from data.root on, as "
        "train/normal/1.png",
        f"{len(patients):,} rows, which name {listed:,} of {len(names):,} images",
    )
    return [patients[name] for name in names]


def _read_patients(table: Path) -> dict[str, str]:
    patients: dict[str, str] = {}
    lines: dict[str, int] = {}
    for line, (file, patient) in read_rows(table, PATIENT_COLUMNS):
        _require_given(f"{table}, line {line}", {"file": file, "patient": patient}.items())
        name = _normal_form(str(PurePosixPath(file)))
        if name in lines:
            raise ValueError(
                f"{table}, line {line}: file must be another in each row, got that of line "
                f"{lines[name]}"
            )
        lines[name], patients[name] = line, patient
    return patients


def _require_given(place: str, values: Iterable[tuple[str, str]]) -> None:
    for column, value in values:
        require(value != "", f"{place}: {column}", "given", value)


def _normal_form(name: str) -> str:
    # macOS writes letters with accents as two characters.
    return unicodedata.normalize("NFC", name)
