"""A timed training step, in a process of its own: where memory runs out, that one is killed."""

import resource
import sys
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path

import torch

from task.config import Config
from task.diffusion import build_objective
from task.parallel import count_processes, train_in_processes
from task.train import (
    compile_where_wanted,
    configure_torch,
    fastest_precision,
    is_out_of_memory,
    keep_freed_memory,
    new_optimizer,
    select_device,
)
from task.unet import build_unet

TIMED_STEPS = 3
# A first step that takes so long says enough.
SLOW_SECONDS = 20.0


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
        ValueError: the configuration does not fit this machine.
    """
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        try:
            return pool.submit(_try_step, config).result()
        except Exception as error:
            if not (isinstance(error, BrokenProcessPool) or is_out_of_memory(error)):
                raise
            raise MemoryError(
                f"train.batch_size={config.train.batch_size}: a training step does not fit into "
                "the memory; end what else runs here, or ask the coordinator for a smaller one"
            ) from error


def _try_step(config: Config) -> Trial:
    if sys.platform == "linux":
        # If memory runs out, this process goes and no other.
        Path("/proc/self/oom_score_adj").write_text("1000")
    data, train = config.data, config.train
    keep_freed_memory()
    configure_torch(num_threads=train.num_threads, deterministic=train.deterministic)
    device = select_device(train.device)
    model = build_unet(config)
    compile_where_wanted(model, train.compile, device, deterministic=train.deterministic)
    num_processes = count_processes(train.num_processes, device, one_per_gpu=True)
    precision = train.precision
    if precision == "auto":
        precision = fastest_precision(config, model, device)
    shape = (train.batch_size, data.channels, data.image_size, data.image_size)
    images = torch.randint(256, shape, dtype=torch.uint8)
    labels = torch.randint(len(data.classes), (train.batch_size,))

    def seconds(steps: int) -> float:
        return train_in_processes(
            model,
            images,
            labels,
            num_processes=num_processes,
            compiled=train.compile,
            objective=build_objective(config),
            optimizer=new_optimizer(model, train.lr),
            epochs=steps,
            batch_size=train.batch_size,
            horizontal_flip=data.horizontal_flip,
            precision=precision,
            channels_last=train.channels_last,
            generator=torch.Generator(device).manual_seed(config.seed),
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
    return Trial(step, train.batch_size, precision, num_processes, peak)
