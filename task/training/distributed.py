"""Several processes of one machine that train one model, usually one for each of its GPUs.

Every process draws for the whole batch, from random generators in the same state, and computes the
losses of its part; the gradients are averaged. So the weights are those of one process with the
same batch, but for rounding and for dropout, of which each has its own.
"""

import os
import pickle
import signal
import sys
import tempfile
import traceback
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import timedelta
from multiprocessing import connection
from pathlib import Path
from typing import Any

import torch
from torch import distributed, multiprocessing
from torch._C._distributed_c10d import FileStore

from task.checks import require
from task.processes import end_with_parent
from task.training.devices import configure_torch, keep_freed_memory

# How long one process waits for another, which may still be compiling.
PATIENCE = timedelta(minutes=10)
# Files in which processes tell the one that started them what they returned or raised.
RESULT, ERROR = "result.pt", "error"


def count_processes(wanted: int | None, device: torch.device, *, one_per_gpu: bool) -> int:
    """Turn `train.num_processes` into a number.

    Args:
        wanted: None: as `one_per_gpu` says.
        device: that trains; "cuda" without a number stands for all GPUs that this process sees.
        one_per_gpu: whether None asks for one per GPU, where they are all of one model, or for 1.

    Raises:
        ValueError: there are fewer GPUs, or GPUs of several models, which draw other numbers.
    """
    if device.type != "cuda":
        return wanted or 1
    num_gpus = torch.cuda.device_count() if device.index is None else 1
    models = {torch.cuda.get_device_name(number) for number in range(num_gpus)}
    if wanted is None:
        return num_gpus if one_per_gpu and len(models) == 1 else 1
    require(
        wanted <= num_gpus,
        "train.num_processes",
        f"at most {num_gpus}, the GPUs that this process may use (or null), with "
        f"train.device={device}",
        wanted,
    )
    require(
        wanted == 1 or len(models) == 1,
        "train.num_processes",
        f"1 (or CUDA_VISIBLE_DEVICES set to GPUs of one model) where they are {sorted(models)}",
        wanted,
    )
    return wanted


class ProcessDiedError(RuntimeError):
    """A process was killed, or ended without telling why.

    Attributes:
        exit_codes: of all processes, below 0 that of a signal; None of one that still ran.
    """

    def __init__(self, exit_codes: Sequence[int | None]) -> None:
        """Note the exit codes."""
        super().__init__(f"a process ended without an exception, exit codes {exit_codes}")
        self.exit_codes = exit_codes


def run_in_processes(
    function: Callable[..., Any], *arguments: Any, num_processes: int, device_type: str
) -> Any:
    """Call `function(rank, device, *arguments)` in processes that train together.

    They are a group of `torch.distributed`; each has as many threads, and is as deterministic, as
    this process. Otherwise as `call_in_processes`.

    Args:
        function: of a module.
        *arguments: what each is handed.
        num_processes: how many.
        device_type: "cuda", where the rank is the number of the GPU, or "cpu".

    Raises:
        RuntimeError: a process was killed.
    """
    # A GPU's memory that this process has kept, rank 0 may need.
    torch.cuda.empty_cache()
    deterministic = torch.are_deterministic_algorithms_enabled()
    with tempfile.TemporaryDirectory(prefix="feddm-") as folder:
        group = _Group(folder, num_processes, device_type, torch.get_num_threads(), deterministic)
        try:
            return call_in_processes(
                _call_in_group, group, function, *arguments, num_processes=num_processes
            )
        except ProcessDiedError as died:
            raise RuntimeError(
                f"a training process ended without an exception, exit codes {died.exit_codes}; -9 "
                "is what Linux gives where memory runs out: lower train.batch_size or "
                "train.num_processes; -7 where /dev/shm does, which must hold images and weights: "
                "docker run --shm-size"
            ) from died


@dataclass(frozen=True)
class _Group:
    folder: str
    num_processes: int
    device_type: str
    num_threads: int
    deterministic: bool


def _call_in_group(rank: int, group: _Group, function: Callable[..., Any], *arguments: Any) -> Any:
    if sys.platform == "linux":
        # All on one machine: nothing needs to listen beyond it.
        os.environ |= {"GLOO_SOCKET_IFNAME": "lo", "NCCL_SOCKET_IFNAME": "lo"}
    keep_freed_memory()
    configure_torch(num_threads=group.num_threads, deterministic=group.deterministic)
    device, backend = torch.device("cpu"), "gloo"
    if group.device_type == "cuda":
        device, backend = torch.device("cuda", rank), "nccl"
        torch.cuda.set_device(device)
    distributed.init_process_group(
        backend,
        store=FileStore(f"{group.folder}/store", group.num_processes),
        rank=rank,
        world_size=group.num_processes,
        timeout=PATIENCE,
    )
    done = function(rank, device, *arguments)
    distributed.destroy_process_group()
    return done


def call_in_processes(function: Callable[..., Any], *arguments: Any, num_processes: int) -> Any:
    """Call `function(rank, *arguments)` in new processes; returns what the first one returns.

    Tensors among the arguments lie in memory that all share. Whatever one of them raises ends all
    of them and is raised here, and all end with this process.

    Raises:
        ProcessDiedError: one was killed.
        Exception: what the first that failed has raised.
    """
    # Not forked: a process that has used CUDA cannot be.
    spawning = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory(prefix="feddm-") as folder:
        told = Path(folder)
        processes = [
            spawning.Process(target=_work, args=(rank, os.getpid(), told, function, arguments))
            for rank in range(num_processes)
        ]
        try:
            for process in processes:
                process.start()
            running = processes
            while running and not any(process.exitcode for process in processes):
                connection.wait([process.sentinel for process in running])
                running = [process for process in processes if process.exitcode is None]
            codes = [process.exitcode for process in processes]
        finally:
            for process in processes:
                if process.pid is not None:
                    process.kill()
                    process.join()
        # Where one was killed, what the others then raise is of no interest.
        if (told / ERROR).exists() and -signal.SIGKILL not in codes:
            raise pickle.loads((told / ERROR).read_bytes())
        if any(codes):
            raise ProcessDiedError(codes)
        # Written by this program a moment ago, so it may hold any object.
        return torch.load(told / RESULT, map_location="cpu", weights_only=False)


def _work(
    rank: int, parent: int, told: Path, function: Callable[..., Any], arguments: Sequence[Any]
) -> None:
    """Be one of the processes."""
    end_with_parent()
    if os.getppid() != parent:
        return  # it was gone before
    try:
        done = function(rank, *arguments)
        if rank == 0:
            torch.save(done, told / RESULT)
    except Exception as error:
        _leave_error(error, told / ERROR)
        sys.exit(1)


def _leave_error(error: Exception, file: Path) -> None:
    """Write an exception down for the parent, unless another process has failed before."""
    told: Exception = RuntimeError(f"{type(error).__name__}: {error}")
    with suppress(Exception):
        # Not every exception survives; its class is what most depends on.
        told = pickle.loads(pickle.dumps(error))
    told.add_note(f"in a process of its own:\n{traceback.format_exc()}")
    aside = file.with_name(f"{file.name}-{os.getpid()}")
    aside.write_bytes(pickle.dumps(told))
    # Whole, and the first one stays: the failures of the others follow from it.
    with suppress(FileExistsError):
        os.link(aside, file)


def average_gradients(optimizer: torch.optim.Optimizer) -> None:
    """Replace the gradients of an optimizer's parameters by their means over the processes."""
    parameters = (each for group in optimizer.param_groups for each in group["params"])
    gradients = [each.grad for each in parameters if each.grad is not None]
    # One message: many small ones would wait for each other.
    mean = torch.cat([each.reshape(-1) for each in gradients])
    mean /= distributed.get_world_size()
    distributed.all_reduce(mean)
    parts = torch.split(mean, [each.numel() for each in gradients])
    for each, part in zip(gradients, parts, strict=True):
        each.copy_(part.view(each.shape))


def average_results(
    numbers: Sequence[float], seconds: float, device: torch.device
) -> tuple[list[float], float]:
    """Return the means of numbers over the processes, and the seconds of the slowest one."""
    means = torch.tensor(numbers, dtype=torch.float64, device=device)
    distributed.all_reduce(means)
    slowest = torch.tensor(seconds, dtype=torch.float64, device=device)
    distributed.all_reduce(slowest, distributed.ReduceOp.MAX)
    return (means / distributed.get_world_size()).tolist(), slowest.item()
