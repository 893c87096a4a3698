"""How torch is set up for training and drawing: device, threads, memory, compiling, precision."""

import ctypes
import os
import platform
import shutil
import sysconfig
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path

import torch
from torch import nn

from task.checks import require
from task.config import Config
from task.generators.base import Generator


def select_device(name: str) -> torch.device:
    """Turn `train.device` into a device; "auto" is a GPU where there is one.

    Raises:
        ValueError: CUDA is asked for and not there, or a GPU that this process does not see.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if name.startswith("cuda") and not torch.cuda.is_available():
        raise ValueError(f"train.device must be auto or cpu where CUDA is missing, got {name!r}")
    device = torch.device(name)
    require(
        device.index is None or device.index < torch.cuda.device_count(),
        "train.device",
        f"auto, cuda or one of the {torch.cuda.device_count()} GPUs that this process sees, "
        "numbered from cuda:0 (a simulated client sees its own share of them only)",
        name,
    )
    return device


def check_deterministic(generator: Generator, config: Config) -> None:
    """Check that a family can be trained as `train.deterministic` wants it on this machine.

    Raises:
        ValueError: it cannot.
    """
    train = config.train
    if train.deterministic and not generator.deterministic_on_gpu:
        require(
            select_device(train.device).type != "cuda",
            "train.deterministic",
            f"false on a GPU, where torch has no deterministic gradients for a {generator.title}; "
            "train.device=cpu has",
            True,
        )


def device_name(device: torch.device) -> str:
    """Name a device for a reader, a GPU with its model."""
    if device.type != "cuda":
        return str(device)
    return f"{device} ({torch.cuda.get_device_name(device)})"


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an exception says that memory has run out, that of a CPU or of a GPU."""
    # For the memory of a CPU torch has no exception of its own.
    return isinstance(error, MemoryError | torch.OutOfMemoryError) or (
        isinstance(error, RuntimeError) and "DefaultCPUAllocator" in str(error)
    )


def configure_torch(*, num_threads: int, deterministic: bool) -> None:
    """Set the process up so that equal seeds give equal weights."""
    torch.set_num_threads(num_threads)
    torch.use_deterministic_algorithms(deterministic)
    torch.backends.cudnn.benchmark = not deterministic
    if deterministic:
        # cuBLAS reads it when its handle is made; without it torch refuses matrix products.
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")


@contextmanager
def torch_configured(*, num_threads: int, deterministic: bool) -> Iterator[None]:
    """Set the process up as `configure_torch` does, and as it was afterwards."""
    own_threads = torch.get_num_threads()
    own_choice = torch.are_deterministic_algorithms_enabled(), torch.backends.cudnn.benchmark
    configure_torch(num_threads=num_threads, deterministic=deterministic)
    try:
        yield
    finally:
        torch.set_num_threads(own_threads)
        torch.use_deterministic_algorithms(own_choice[0])
        torch.backends.cudnn.benchmark = own_choice[1]


def keep_freed_memory() -> None:
    """Let this process reuse freed memory from now on instead of returning it to the system.

    For a process that trains on a CPU: a step frees and asks for gigabytes, and fetching them
    page by page takes a quarter of its time at a batch of 512. Not for a server, whose peak would
    stay. Only glibc has the switch; elsewhere nothing changes.
    """
    if platform.libc_ver()[0] == "glibc":
        m_trim_threshold, m_mmap_max = -1, -4
        libc = ctypes.CDLL(None)
        libc.mallopt(m_mmap_max, 0)
        libc.mallopt(m_trim_threshold, -1)


def move(model: nn.Module, device: torch.device, *, channels_last: bool) -> None:
    """Bring a model to a device and its weights into the memory format that it is trained in."""
    memory_format = torch.channels_last if channels_last else torch.contiguous_format
    model.to(device, memory_format=memory_format)  # type: ignore[call-overload]


def is_compiled(wanted: bool | None, device: torch.device, *, deterministic: bool) -> bool:
    """Turn `train.compile` into whether a model is compiled.

    Args:
        wanted: None: on a GPU, if what it takes is there. A CPU is near its limit without.
        device: that trains.
        deterministic: whether bits are to be equal; then None is no, because the code depends on
            which size of batch comes first.

    Raises:
        ValueError: it is wanted and something is missing.
    """
    if wanted is None:
        possible = device.type == "cuda" and not deterministic
        return possible and not missing_for_compiling(device)
    if wanted and (missing := missing_for_compiling(device)):
        raise ValueError(f"train.compile must be null or false without {missing}, got true")
    return wanted


def missing_for_compiling(device: torch.device) -> str:
    """Name what torch.compile would not find at the first step; empty where all is there."""
    names = ("CC", "cc", "gcc", "clang") if device.type == "cuda" else ("CXX", "c++", "g++")
    if not any(map(shutil.which, (os.environ.get(names[0], ""), *names[1:]))):
        return "a C compiler" if device.type == "cuda" else "a C++ compiler"
    if device.type == "cuda":
        if find_spec("triton") is None or torch.cuda.get_device_capability(device) < (7, 0):
            return "Triton and a GPU of capability 7.0 or more"
        if not Path(sysconfig.get_path("include"), "Python.h").is_file():
            return f"Python's header files in {sysconfig.get_path('include')}"
    return ""


def compile_where_wanted(
    model: nn.Module, wanted: bool | None, device: torch.device, *, deterministic: bool
) -> None:
    """Compile a model in place, once for all clients and rounds of a process; see `is_compiled`.

    It happens at the model's first call. The last batch of every client has a size of its own:
    what is compiled for the second size that comes fits nearly all others.
    """
    if is_compiled(wanted, device, deterministic=deterministic):
        model.compile()


def autocast(device: torch.device, precision: str) -> torch.autocast:
    """Return the autocast context of a precision.

    Raises:
        ValueError: the precision is neither "float32" nor "bfloat16".
    """
    if precision not in ("float32", "bfloat16"):
        raise ValueError(f"precision must be float32 or bfloat16, got {precision!r}")
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=precision == "bfloat16")
