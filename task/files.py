"""Files that are either whole or not there."""

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def atomic_path(path: Path, *, private: bool = False) -> Iterator[Path]:
    """Yield a path to write to, which takes the place of `path` when the block succeeds.

    A reader, a crash or a full disk never leaves half a file behind.

    Args:
        path: the file to write; its folder exists.
        private: whether its owner alone may read it.
    """
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.stem}-", suffix=path.suffix)
    os.close(handle)
    aside = Path(name)
    try:
        yield aside
        with aside.open("rb") as written:
            os.fsync(written.fileno())
        # mkstemp makes files private; results are as readable as any new file.
        if not private:
            umask = os.umask(0)
            os.umask(umask)
            aside.chmod(0o666 & ~umask)
        aside.replace(path)
    finally:
        aside.unlink(missing_ok=True)
