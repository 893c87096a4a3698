"""A file that a family trains on top of, known by its SHA-256 wherever a run computes."""

import hashlib
from dataclasses import dataclass
from pathlib import Path

from task.checks import require

MODEL_FILE = "model.safetensors"


@dataclass(frozen=True)
class FrozenFile:
    """A file of which nothing is trained, and which every machine of a run must have.

    Attributes:
        path_value: dotted path of the value that names it, or the folder of the run that it is of.
        sha256_value: dotted path of the value of its SHA-256; empty there: any file.
        expected: what it must be, for errors.
    """

    path_value: str
    sha256_value: str
    expected: str

    def read(self, path: str, sha256: str = "") -> tuple[bytes, str]:
        """Read the file.

        Args:
            path: what `path_value` says.
            sha256: what `sha256_value` says.

        Returns:
            Its content, and the SHA-256 of it.

        Raises:
            FileNotFoundError: there is no such file.
            ValueError: none is named, or it is another file than `sha256` tells.
        """
        require(path != "", self.path_value, self.expected, path)
        file = Path(path, MODEL_FILE) if Path(path).is_dir() else Path(path)
        if not file.is_file():
            raise FileNotFoundError(
                f"{self.path_value} must be {self.expected}, got {path}: there is no {file}"
            )
        content = file.read_bytes()
        found = hashlib.sha256(content).hexdigest()
        require(sha256 in ("", found), self.path_value, f"the file of SHA-256 {sha256}", found)
        return content, found
