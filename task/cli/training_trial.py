"""A timed training step, in a process of its own: where memory runs out, that one is killed."""

import resource
import signal
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar, cast

import torch

from task.config import Config
from task.generators.registry import initial_generator
from task.training.devices import (
    compile_where_wanted,
    configure_torch,
    is_out_of_memory,
    keep_freed_memory,
    select_device,
)
from task.training.distributed import (
    ProcessDiedError,
    call_in_processes,
    count_processes,
)
from task.training.loop import fit, timed_options
from task.training.precision import fastest_precision

Argument = TypeVar("Argument")
Result = TypeVar("Result")

TIMED_STEPS = 3
# A first step that takes so long says enough.
SLOW_SECONDS = 5.0
CRASHES = (signal.SIGSEGV, signal.SIGBUS, signal.SIGILL, signal.SIGABRT, signal.SIGFPE)


@dataclass(frozen=True)
class Trial:
    """What a training step took.

    Attributes:
        seconds: of one step.
        batch_size: images in it.
        precision: as `train.precision`, settled.
        num_processes: that train together.
        peak_memory: bytes of the process, or of the GPU, that trained; None where several did.
    """

    seconds: float
    batch_size: int
    precision: str
    num_processes: int
    peak_memory: int | None


def try_step(config: Config) -> Trial:
    """Train the run's model on a batch of noise, as a node would on its images, and time it.

    Raises:
        MemoryError: it does not fit.
        RuntimeError: its process died for another reason.
        ValueError: the configuration does not fit this machine.
    """
    try:
        return in_own_process(_try_step, config)
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        train = config.train
        share = f" of train.client_batch_fraction={train.client_batch_fraction:g}"
        raise MemoryError(
            f"train.batch_size={train.batch_size}{share * (train.client_batch_fraction < 1)}: a "
            "training step does not fit into the memory; end what else runs here, or ask the "
            "coordinator for a smaller one"
        ) from error


def in_own_process(function: Callable[[Argument], Result], argument: Argument) -> Result:
    """Call a function in a process that may die of it.

    Raises:
        MemoryError: the system killed the process because memory had run out.
        RuntimeError: it died otherwise.
        Exception: whatever the function raised.
    """
    kills = oom_kills()
    try:
        return cast("Result", call_in_processes(_call, function, argument, num_processes=1))
    except ProcessDiedError as died:
        (code,) = died.exit_codes
        if code == -signal.SIGKILL and oom_kills() > kills:
            raise MemoryError("the system has killed the process") from died
        raise RuntimeError(described_death(code)) from died


def _call(_: int, function: Callable[[Argument], Result], argument: Argument) -> Result:
    return function(argument)


def described_death(exitcode: int | None) -> str:
    """Say how the process of a trial died that has told nothing.

    Args:
        exitcode: below 0 that of the signal which ended it.
    """
    if exitcode is None or exitcode >= 0:
        return f"the process of a training step ended with status {exitcode}; see above"
    name = signal.Signals(-exitcode).name
    hint = "try again; a limit on time or memory may have ended it"
    if -exitcode in CRASHES:
        hint = "a library or a driver has crashed; `feddm doctor` names their versions"
    return f"the process of a training step was ended by {name}: {hint}"


def oom_kills() -> int:
    """Count the processes that Linux has killed for memory, in this container or at all."""
    found = 0
    for file in (Path("/sys/fs/cgroup/memory.events"), Path("/proc/vmstat")):
        if file.exists():
            lines = (line.split() for line in file.read_text(encoding="ascii").splitlines())
            found += sum(int(number) for name, number in lines if name == "oom_kill")
    return found


def _try_step(config: Config) -> Trial:
    if sys.platform == "linux":
        # If memory runs out, this process goes and no other.
        Path("/proc/self/oom_score_adj").write_text("1000")
    data, train = config.data, config.train
    keep_freed_memory()
    configure_torch(num_threads=train.num_threads, deterministic=train.deterministic)
    device = select_device(train.device)
    generator = initial_generator(config)
    generator.prepare(train.trained_batch_size)
    compile_where_wanted(generator, train.compile, device, deterministic=train.deterministic)
    num_processes = count_processes(train.num_processes, device, one_per_gpu=True)
    precision: str = train.precision
    if precision == "auto":
        precision = fastest_precision(config, generator, device)
    images = torch.randint(
        256, (train.trained_batch_size, *generator.image_shape), dtype=torch.uint8
    )
    labels = torch.randint(len(data.classes), (train.trained_batch_size,))

    def seconds(steps: int) -> float:
        return fit(
            generator,
            images,
            labels,
            options=timed_options(
                config, epochs=steps, precision=precision, num_processes=num_processes
            ),
            optimizers=generator.optimizers(train.trained_lr),
            rng=torch.Generator(device).manual_seed(config.seed),
        ).seconds

    step = seconds(1)
    if step < SLOW_SECONDS:
        step = seconds(TIMED_STEPS) / TIMED_STEPS
    peak: int | None
    if num_processes > 1:
        peak = None
    elif device.type == "cuda":
        peak = torch.cuda.max_memory_reserved(device)
    else:
        unit = 1 if sys.platform == "darwin" else 1024
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    return Trial(step, train.trained_batch_size, precision, num_processes, peak)
