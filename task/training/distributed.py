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
from collections.abc import Callable
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


def run_in_processes(
    function: Callable[..., Any], *arguments: Any, num_processes: int, device_type: str
) -> Any:
    """Call `function(rank, device, *arguments)` in several processes of this machine.

    They are a group of `torch.distributed`; each has as many threads, and is as deterministic, as
    this process. Whatever one of them raises ends all of them and is raised here.

    Args:
        function: of a module.
        *arguments: what each is handed; tensors lie in memory that they share.
        num_processes: how many.
        device_type: "cuda", where the rank is the number of the GPU, or "cpu".

    Returns:
        What the first one returns: tensors, and plain values.

    Raises:
        RuntimeError: a process was killed.
    """
    with tempfile.TemporaryDirectory(prefix="feddm-") as folder:
        job = _Job(
            folder=Path(folder),
            num_processes=num_processes,
            num_threads=torch.get_num_threads(),
            deterministic=torch.are_deterministic_algorithms_enabled(),
            device_type=device_type,
            function=function,
            arguments=arguments,
        )
        # A GPU's memory that this process has kept, rank 0 may need.
        torch.cuda.empty_cache()
        _run(job)
        return torch.load(job.done_file, map_location="cpu", weights_only=True)


@dataclass(frozen=True)
class _Job:
    """What every process is handed."""

    folder: Path
    num_processes: int
    num_threads: int
    deterministic: bool
    device_type: str
    function: Callable[..., Any]
    arguments: tuple[Any, ...]

    @property
    def done_file(self) -> Path:
        return self.folder / "done.pt"

    @property
    def error_file(self) -> Path:
        return self.folder / "error"


def _run(job: _Job) -> None:
    """Start the processes of a job and wait for them; when one has failed, end the others.

    Raises:
        RuntimeError: one was killed.
        Exception: what the first that failed has raised.
    """
    # Not forked: a process that has used CUDA cannot be.
    spawning = multiprocessing.get_context("spawn")
    processes = [
        spawning.Process(target=_work, args=(rank, os.getpid(), job), daemon=True)
        for rank in range(job.num_processes)
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
    if job.error_file.exists() and -signal.SIGKILL not in codes:
        raise pickle.loads(job.error_file.read_bytes())
    if any(codes):
        raise RuntimeError(
            f"a training process ended without a word, exit codes {codes}; -9 is what Linux "
            "gives where memory runs out: lower train.batch_size or train.num_processes; -7 where "
            "/dev/shm does, which must hold images and weights: docker run --shm-size"
        )


def _work(rank: int, parent: int, job: _Job) -> None:
    """Be one of the processes of a job."""
    end_with_parent()
    if os.getppid() != parent:
        return  # it was gone before
    if sys.platform == "linux":
        # All on one machine: nothing needs to listen beyond it.
        os.environ |= {"GLOO_SOCKET_IFNAME": "lo", "NCCL_SOCKET_IFNAME": "lo"}
    try:
        _call(rank, job)
    except Exception as error:
        _leave_error(error, job.error_file)
        sys.exit(1)


def _leave_error(error: Exception, file: Path) -> None:
    """Write an exception down for the parent, unless another process has failed before."""
    told: Exception = RuntimeError(f"{type(error).__name__}: {error}")
    with suppress(Exception):
        # Not every exception survives; its class is what most depends on.
        told = pickle.loads(pickle.dumps(error))
    told.add_note(f"in a training process:\n{traceback.format_exc()}")
    aside = file.with_name(f"{file.name}-{os.getpid()}")
    aside.write_bytes(pickle.dumps(told))
    # Whole, and the first one stays: the failures of the others follow from it.
    with suppress(FileExistsError):
        os.link(aside, file)


def _call(rank: int, job: _Job) -> None:
    keep_freed_memory()
    configure_torch(num_threads=job.num_threads, deterministic=job.deterministic)
    device, backend = torch.device("cpu"), "gloo"
    if job.device_type == "cuda":
        device, backend = torch.device("cuda", rank), "nccl"
        torch.cuda.set_device(device)
    distributed.init_process_group(
        backend,
        store=FileStore(str(job.folder / "store"), job.num_processes),
        rank=rank,
        world_size=job.num_processes,
        timeout=PATIENCE,
    )
    done = job.function(rank, device, *job.arguments)
    if rank == 0:
        torch.save(done, job.done_file)
    distributed.destroy_process_group()


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


def average_results(loss: float, seconds: float, device: torch.device) -> tuple[float, float]:
    """Return the mean of a loss over the processes, and the seconds of the slowest one."""
    mean = torch.tensor(loss, dtype=torch.float64, device=device)
    distributed.all_reduce(mean)
    slowest = torch.tensor(seconds, dtype=torch.float64, device=device)
    distributed.all_reduce(slowest, distributed.ReduceOp.MAX)
    return mean.item() / distributed.get_world_size(), slowest.item()
