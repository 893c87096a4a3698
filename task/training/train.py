"""The local training loop and the held-out loss, on whatever device and in whatever precision."""

import copy
import ctypes
import os
import platform
import shutil
import sysconfig
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import torch
from torch import Tensor, nn

from task.checks import require
from task.config import Config
from task.data import normalize, random_horizontal_flip
from task.generators.diffusion.diffusion import Objective, build_objective

# bfloat16 must win clearly: a close race would be decided by the noise of the machine.
BFLOAT16_ADVANTAGE = 1.2
# So many times slower in the very first turn, it is given no other.
HOPELESS = 5
# After which `precision=auto` settles for what it has measured.
PRECISION_SECONDS = 20.0


@dataclass(frozen=True)
class TrainResult:
    """What a client reports of its local epochs.

    Attributes:
        loss: mean over the images of all epochs.
        seconds: wall-clock time.
        images_per_second: images that went through the network, over `seconds`.
    """

    loss: float
    seconds: float
    images_per_second: float


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


@contextmanager
def seeded_global_generator(generator: torch.Generator, rank: int = 0) -> Iterator[None]:
    """Fork torch's global generators and seed them with a draw from `generator`.

    For what takes no generator: the initialisation of layers and channel dropout.

    Args:
        generator: one and the same draw is taken from it, whatever the rank.
        rank: processes of other ranks get other seeds.
    """
    device = generator.device
    seed = int(torch.randint(2**62, (), generator=generator, device=device))
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.manual_seed(seed + rank)
        yield


def move(model: nn.Module, device: torch.device, *, channels_last: bool) -> None:
    """Bring a model to a device and its weights into the memory format that it is trained in."""
    memory_format = torch.channels_last if channels_last else torch.contiguous_format
    model.to(device, memory_format=memory_format)  # type: ignore[call-overload]


def new_optimizer(model: nn.Module, lr: float) -> torch.optim.Adam:
    """Make the Adam of the paper over a model."""
    return torch.optim.Adam(model.parameters(), lr=lr, fused=True)


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


def train_epochs(
    model: nn.Module,
    images: Tensor,
    labels: Tensor,
    *,
    objective: Objective,
    optimizer: torch.optim.Optimizer,
    epochs: int,
    batch_size: int,
    horizontal_flip: bool,
    precision: str,
    channels_last: bool,
    generator: torch.Generator,
    rank: int = 0,
) -> TrainResult:
    """Run epochs over images, such as the local epochs of one client.

    Args:
        model: trained in place, on the device of `generator`, and left in training mode.
        images: [N, C, H, W] uint8.
        labels: [N] int64.
        objective: the loss of a batch.
        optimizer: of the model's parameters, see `new_optimizer`; every round of a client has a
            new one.
        epochs: passes over the images, each in a new order; the last partial batch counts.
        batch_size: images per step.
        horizontal_flip: mirror each image with probability 1/2.
        precision: "float32", or "bfloat16" for autocast over float32 weights.
        channels_last: memory format of images and weights.
        generator: of every draw; its device is the one that is trained on.
        rank: of this process among those that train the model together, see
            `task.training.parallel`; each drops channels of its own.

    Raises:
        ValueError: there are no images, or no such precision.

    Source: Algorithm 1 of the paper, the lines of the client.
    """
    if len(images) == 0:
        raise ValueError("a client needs at least 1 image to train, got 0")
    device = generator.device
    memory_format = torch.channels_last if channels_last else torch.contiguous_format
    move(model, device, channels_last=channels_last)
    model.train()
    images, labels = images.to(device), labels.to(device)
    loss_sum = torch.zeros((), device=device, dtype=torch.float64)
    start = time.perf_counter()
    with seeded_global_generator(generator, rank):
        for _ in range(epochs):
            order = torch.randperm(len(images), generator=generator, device=device)
            for batch in torch.split(order, batch_size):
                x_start = normalize(images[batch]).to(memory_format=memory_format)
                if horizontal_flip:
                    x_start = random_horizontal_flip(x_start, generator)
                with autocast(device, precision):
                    loss = objective(model, x_start, labels[batch], generator)
                optimizer.zero_grad(set_to_none=True)
                loss.backward()  # type: ignore[no-untyped-call]
                optimizer.step()
                # Read once at the end: reading a loss in the step would wait for the GPU.
                loss_sum += loss.detach().double() * len(batch)
    seen = epochs * len(images)
    mean_loss = float(loss_sum / seen)
    seconds = time.perf_counter() - start
    return TrainResult(mean_loss, seconds, seen / seconds)


@torch.no_grad()  # not inference_mode: the model may be moved here and trained afterwards
def held_out_loss(
    model: nn.Module,
    images: Tensor,
    labels: Tensor,
    *,
    objective: Objective,
    batch_size: int,
    precision: str,
    channels_last: bool,
    generator: torch.Generator,
) -> float:
    """Return the mean loss over images without training; arguments as in `train_epochs`.

    The same generator state gives the same times and noise, so that rounds can be compared.

    Raises:
        ValueError: there are no images, or no such precision.
    """
    if len(images) == 0:
        raise ValueError("a held-out loss needs at least 1 image, got 0")
    device = generator.device
    memory_format = torch.channels_last if channels_last else torch.contiguous_format
    move(model, device, channels_last=channels_last)
    model.eval()
    loss_sum = torch.zeros((), device=device, dtype=torch.float64)
    for batch, batch_labels in zip(
        torch.split(images, batch_size), torch.split(labels, batch_size), strict=True
    ):
        x_start = normalize(batch.to(device)).to(memory_format=memory_format)
        with autocast(device, precision):
            loss = objective(model, x_start, batch_labels.to(device), generator)
        loss_sum += loss.double() * len(batch)
    return float(loss_sum / len(images))


def autocast(device: torch.device, precision: str) -> torch.autocast:
    """Return the autocast context of a precision.

    Raises:
        ValueError: the precision is neither "float32" nor "bfloat16".
    """
    if precision not in ("float32", "bfloat16"):
        raise ValueError(f"precision must be float32 or bfloat16, got {precision!r}")
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=precision == "bfloat16")


def fastest_precision(config: Config, model: nn.Module, device: torch.device) -> str:
    """Name the faster precision for a run on this machine; see `faster_precision`."""
    data, train = config.data, config.train
    with torch_configured(num_threads=train.num_threads, deterministic=train.deterministic):
        return faster_precision(
            model,
            objective=build_objective(config),
            image_shape=(data.channels, data.image_size, data.image_size),
            channels_last=train.channels_last,
            device=device,
        )


def faster_precision(
    model: nn.Module,
    *,
    objective: Objective,
    image_shape: tuple[int, int, int],
    channels_last: bool,
    device: torch.device,
) -> str:
    """Name the faster of float32 and bfloat16.

    On a GPU it is bfloat16 where the GPU computes in it; a CPU is timed, because there it
    depends on the network as well.

    Args:
        model: copied, so left as it is.
        objective: the loss of a batch.
        image_shape: channels, height, width.
        channels_last: as it will be trained.
        device: where it will be trained.
    """
    if device.type == "cuda":
        native = torch.cuda.is_bf16_supported(including_emulation=False)
        return "bfloat16" if native else "float32"
    # 32 images say as much as a whole batch and take seconds.
    images = torch.zeros((32, *image_shape), dtype=torch.uint8)

    def seconds(precision: str, num_images: int, epochs: int) -> float:
        trial = copy.deepcopy(model)
        return train_epochs(
            trial,
            images[:num_images],
            torch.zeros(num_images, dtype=torch.int64),
            objective=objective,
            optimizer=new_optimizer(trial, lr=1e-4),
            epochs=epochs,
            batch_size=num_images,
            horizontal_flip=False,
            precision=precision,
            channels_last=channels_last,
            generator=torch.Generator(device).manual_seed(0),
        ).seconds

    precisions = ("float32", "bfloat16")
    # The first turn warms up, and spares a CPU that only emulates bfloat16 minutes of it.
    begin = time.monotonic()
    warm_up = {precision: seconds(precision, 8, epochs=1) for precision in precisions}
    if warm_up["bfloat16"] > HOPELESS * warm_up["float32"]:
        return "float32"
    # The best of three interleaved turns counts, on a busy machine of those that it had time for.
    turns: list[dict[str, float]] = []
    while len(turns) < 3 and time.monotonic() - begin < PRECISION_SECONDS:
        turns.append({each: seconds(each, len(images), epochs=2) for each in precisions})
    best = {each: min(turn[each] for turn in turns or [warm_up]) for each in precisions}
    wins = best["bfloat16"] * BFLOAT16_ADVANTAGE < best["float32"]
    return "bfloat16" if wins else "float32"
