"""One model trained by several processes of one machine, usually one for each of its GPUs.

Every process draws for the whole batch, from generators in the same state, and takes its slice of
images and draws; DistributedDataParallel averages the gradients. So the weights are those of one
process with the same batch, but for rounding and for dropout, of which each has its own.
"""

import copy
import os
import pickle
import signal
import sys
import tempfile
import traceback
from contextlib import suppress
from dataclasses import dataclass
from datetime import timedelta
from multiprocessing import connection
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, distributed, multiprocessing, nn
from torch._C._distributed_c10d import FileStore
from torch.nn.parallel import DistributedDataParallel

from task.checks import require
from task.generators.diffusion.objective import DiffusionObjective, Model
from task.processes import end_with_parent
from task.training.devices import compile_where_wanted, configure_torch, keep_freed_memory, move
from task.training.loop import TrainResult, new_optimizer, train_epochs

# How long one process waits for another, which may still be compiling.
PATIENCE = timedelta(minutes=10)


@dataclass(frozen=True)
class SharedObjective:
    """The part that one of several processes has in the loss of a batch.

    The mean over the processes of what it returns is the loss of the whole batch, and so for
    the gradients.

    Attributes:
        objective: the loss of a batch.
        rank: of this process, 0-based.
        num_processes: how many there are.
    """

    objective: DiffusionObjective
    rank: int
    num_processes: int

    def __call__(
        self, model: Model, x_start: Tensor, labels: Tensor, generator: torch.Generator
    ) -> Tensor:
        """Draw for the whole batch and return the loss of this process's slice of it, weighted."""
        drawn = (x_start, *self.objective.draw(x_start, labels, generator))
        start, end = (len(x_start) * i // self.num_processes for i in (self.rank, self.rank + 1))
        # Even with nothing to do a process must take part in the step: it does so with weight 0.
        part = slice(start, end) if start < end else slice(0, 1)
        weight = (end - start) * self.num_processes / len(x_start)
        return weight * self.objective.loss(model, *(each[part] for each in drawn))


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


def train_in_processes(
    model: nn.Module,
    images: Tensor,
    labels: Tensor,
    *,
    num_processes: int,
    compiled: bool | None,
    optimizer: torch.optim.Optimizer,
    generator: torch.Generator,
    **options: Any,
) -> TrainResult:
    """Run epochs as `task.training.loop.train_epochs` does, in so many processes; 1: in this one.

    Each has as many threads, and is as deterministic, as this process. Whatever one of them
    raises ends all of them and is raised here.

    Args:
        model: takes the trained weights; stays where it is if others train it.
        images: [N, C, H, W] uint8.
        labels: [N] int64.
        num_processes: see `count_processes`.
        compiled: see `is_compiled`; for the other processes, this one has done it.
        optimizer: from `new_optimizer`; takes up what it has gathered.
        generator: of every draw; its device, or its kind of device, is trained on.
        **options: further arguments of `train_epochs`.

    Raises:
        RuntimeError: a process was killed.
    """
    if num_processes == 1:
        return train_epochs(
            model, images, labels, optimizer=optimizer, generator=generator, **options
        )
    with tempfile.TemporaryDirectory(prefix="feddm-") as folder:
        job = _Job(
            folder=Path(folder),
            num_processes=num_processes,
            num_threads=torch.get_num_threads(),
            deterministic=torch.are_deterministic_algorithms_enabled(),
            device_type=generator.device.type,
            # A copy, because what is handed over moves to shared memory.
            model=copy.deepcopy(model).cpu(),
            compiled=compiled,
            optimizer_state=_on_cpu(optimizer),
            images=images.cpu(),
            labels=labels.cpu(),
            generator_state=generator.get_state(),
            options=options,
        )
        # A GPU's memory that this process has kept, rank 0 may need.
        torch.cuda.empty_cache()
        _run(job)
        done = torch.load(job.done_file, map_location="cpu", weights_only=True)
    model.load_state_dict(done["model"])
    model.train()
    optimizer.load_state_dict(done["optimizer"])
    generator.set_state(done["generator"])
    # Of the training alone: starting the processes is none of it.
    seconds = done["seconds"]
    return TrainResult(done["loss"], seconds, options["epochs"] * len(images) / seconds)


@dataclass(frozen=True)
class _Job:
    """What every process is handed; tensors lie in memory that they share."""

    folder: Path
    num_processes: int
    num_threads: int
    deterministic: bool
    device_type: str
    model: nn.Module
    compiled: bool | None
    optimizer_state: dict[str, Any]
    images: Tensor
    labels: Tensor
    generator_state: Tensor
    options: dict[str, Any]

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
        _train(rank, job)
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


def _train(rank: int, job: _Job) -> None:
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
    # Copies, because a CPU would change what the others share.
    model = copy.deepcopy(job.model)
    move(model, device, channels_last=job.options["channels_last"])
    compile_where_wanted(model, job.compiled, device, deterministic=job.deterministic)
    optimizer = new_optimizer(model, lr=0.0)
    optimizer.load_state_dict(copy.deepcopy(job.optimizer_state))  # with its learning rate
    generator = torch.Generator(device)
    generator.set_state(job.generator_state)
    options = dict(job.options)
    objective = SharedObjective(options.pop("objective"), rank, job.num_processes)
    result = train_epochs(
        DistributedDataParallel(model),
        job.images,
        job.labels,
        objective=objective,
        optimizer=optimizer,
        generator=generator,
        rank=rank,
        **options,
    )
    loss = torch.tensor(result.loss, dtype=torch.float64, device=device)
    distributed.all_reduce(loss)
    slowest = torch.tensor(result.seconds, dtype=torch.float64, device=device)
    distributed.all_reduce(slowest, distributed.ReduceOp.MAX)
    if rank == 0:
        done = {
            "model": model.state_dict(),
            "optimizer": optimizer.state_dict(),
            "generator": generator.get_state(),
            "loss": loss.item() / job.num_processes,
            "seconds": slowest.item(),
        }
        torch.save(done, job.done_file)
    distributed.destroy_process_group()


def _on_cpu(optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """Return the state of an optimizer with all of its tensors on the CPU."""
    state = optimizer.state_dict()
    gathered = {
        number: {name: tensor.cpu() for name, tensor in moments.items()}
        for number, moments in state["state"].items()
    }
    return {**state, "state": gathered}
