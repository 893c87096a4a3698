"""Flower's bundle of an app (FAB): its files, and the hash by which a hospital approves them."""

import hashlib
import io
import stat
import subprocess
import sys
import tempfile
import tomllib
import zipfile
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path, PurePosixPath
from typing import Self

from task.checks import require

PROJECT_FILE = "pyproject.toml"
# Flower's list of the other files and their hashes, which it does not install.
CONTENT_FILE = ".info/CONTENT"
# Flower's limit is 10 MiB, compressed.
MAX_BYTES = 100 * 2**20
UNZIP_ERRORS = (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError, RuntimeError)


@dataclass(frozen=True)
class Bundle:
    """The files of an app.

    Attributes:
        files: the content of each by its path, which is relative and has no `..`.
    """

    files: Mapping[str, bytes]

    @classmethod
    def of_fab(cls, content: bytes) -> Self:
        """Read a bundle as Flower sends it.

        Raises:
            ValueError: it is no bundle, or one that two programs could unpack differently: with a
                path twice, one that leads out of it, a link, or a folder.
        """
        files: dict[str, bytes] = {}
        try:
            with zipfile.ZipFile(io.BytesIO(content)) as archive:
                entries = archive.infolist()
                size = sum(entry.file_size for entry in entries)
                require(size <= MAX_BYTES, "bundle", f"at most {MAX_BYTES} bytes unpacked", size)
                for entry in entries:
                    _check_entry(entry, files)
                    files[entry.filename] = archive.read(entry)
        except (
            zipfile.BadZipFile,
            zlib.error,
            EOFError,
            NotImplementedError,
            RuntimeError,
        ) as error:
            raise ValueError(f"bundle: it cannot be unpacked ({error})") from error
        files.pop(CONTENT_FILE, None)
        require(PROJECT_FILE in files, "bundle", f"one with {PROJECT_FILE}", sorted(files)[:3])
        return cls(files)

    @cached_property
    def sha256(self) -> str:
        """The hash of all paths and contents, however they were compressed and in what order."""
        digest = hashlib.sha256()
        for path, content in sorted(self.files.items()):
            name = path.encode()
            digest.update(len(name).to_bytes(8) + name + len(content).to_bytes(8) + content)
        return digest.hexdigest()

    @property
    def app(self) -> tuple[str, str]:
        """What the bundle calls itself: publisher and name, with a slash between, and version.

        Raises:
            ValueError: it says neither.
        """
        try:
            project = tomllib.loads(self.files[PROJECT_FILE].decode())
            publisher = project["tool"]["flwr"]["app"]["publisher"]
            return f"{publisher}/{project['project']['name']}", str(project["project"]["version"])
        except (LookupError, TypeError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
            raise ValueError(f"bundle: {PROJECT_FILE} does not say what it is of") from error


def fab_of(path: Path) -> bytes:
    """Return the file of a bundle; of the folder of an app it is made, as `flwr run` does.

    Raises:
        OSError: it cannot be read.
        ValueError: Flower cannot make it.
    """
    if not path.is_dir():
        return path.read_bytes()
    flwr = Path(sys.executable).parent / "flwr"
    with tempfile.TemporaryDirectory() as room:
        command = [str(flwr), "build", "--app", str(path.absolute())]
        done = subprocess.run(command, cwd=room, capture_output=True, text=True, check=False)
        made = [*Path(room).glob("*.fab")]
        if not made:
            said = done.stderr.strip().rpartition("\n")[2]
            raise ValueError(f"BUNDLE: Flower cannot bundle {path} ({said})")
        return made[0].read_bytes()


def _check_entry(entry: zipfile.ZipInfo, known: Mapping[str, bytes]) -> None:
    path = PurePosixPath(entry.filename)
    kind = stat.S_IFMT(entry.external_attr >> 16)
    plain = (
        not path.is_absolute()
        and ".." not in path.parts
        and str(path) == entry.filename
        and "\\" not in entry.filename
        and entry.filename.isprintable()
        # Flower leaves out what lies there; Python would run other code than its source there.
        and (path.parts[0] != ".info" or entry.filename == CONTENT_FILE)
        and "__pycache__" not in path.parts
        and path.suffix != ".pyc"
        and kind in (0, stat.S_IFREG)
        and not entry.is_dir()
        and entry.filename.casefold() not in {other.casefold() for other in known}
    )
    require(plain, "bundle", "one of plain files, each of a path of its own", entry.filename)
