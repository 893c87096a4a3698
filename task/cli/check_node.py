"""`feddm check-node`: whether a hospital's machine can take part in a run, told on the spot."""

import platform
import shutil
import statistics
from collections.abc import Callable, Iterable, Iterator
from importlib.metadata import version
from pathlib import Path

import torch

from task.cli.check_superlink import check_superlink
from task.cli.trial_step import Trial, try_step
from task.config import Config, load_config
from task.data import Listing, build_dataset, list_dataset, original_size
from task.metric_table import Row, lay_out
from task.node import (
    ImageCounts,
    NodeConfig,
    check_number,
    check_output_path,
    count_images,
    output_folder,
    own_config,
)
from task.train import device_name, select_device

Finding = tuple[str, str]
GIB = 2**30


class Check:
    """A check of one node; what is wrong is gathered, so that one call tells all of it.

    Attributes:
        problems: that keep the node from taking part.
    """

    def __init__(self, config: Config, node: NodeConfig, say: Callable[[str], object]) -> None:
        """Start without findings.

        Args:
            config: of `own_config`.
            node: what the node is going to be started with.
            say: takes the text for the reader.
        """
        self.problems: list[str] = []
        self._config, self._node, self._say = config, node, say
        self._counts: ImageCounts | None = None

    def section(self, title: str, findings: Iterable[Finding]) -> None:
        """Say what a part of the check finds, up to what is wrong."""
        self._say(f"\n{title}")
        try:
            for name, found in findings:
                self._say("  " + f"{name:<18} {found}".replace("\n", "\n  ").strip())
        # torch says with a RuntimeError what a device or a compiler lacks.
        except (ValueError, OSError, MemoryError, RuntimeError) as error:
            self.problems.append(str(error))
            self._say("  PROBLEM            " + str(error).replace("\n", "\n  "))

    def versions(self) -> Iterator[Finding]:
        """Name the versions of what runs."""
        yield "feddm", version("feddm")
        yield "flwr", version("flwr")
        yield "torch", torch.__version__ + (f", CUDA {torch.version.cuda}" if _has_gpu() else "")
        yield "python", platform.python_version()

    def data(self) -> Iterator[Finding]:
        """Count the images of each class, read their sizes, and decode all of them."""
        config = self._config
        yield "data", f"{config.data.name} in {config.data.root}"
        self._counts = counts = count_images(config)
        yield "", format_counts(config.data.classes, counts)
        train, test = list_dataset(config)
        if train.paths:
            yield "original sizes", describe_sizes(config, train)
        check_number(counts, self._node)
        listed = len(train) + len(test)
        yield "decoding", f"{listed} images into {config.data.cache_dir}, once"
        dataset = build_dataset(config, download=False)
        unreadable = listed - len(dataset.train) - len(dataset.test)
        yield "unreadable files", f"{unreadable}" + (" (named above)" if unreadable else "")

    def places(self) -> Iterator[Finding]:
        """Look at the disks."""
        yield "free, cache", free_disk(Path(self._config.data.cache_dir))
        if self._node.output_path is None:
            yield "output-path", "none: the node keeps no local model"
            return
        check_output_path(self._node)
        yield "free, output-path", free_disk(output_folder(self._node.output_path))

    def training(self) -> Iterator[Finding]:
        """Look at device and memory, and train a step."""
        device = select_device(self._config.train.device)
        yield "device", device_name(device)
        free = free_memory()
        yield "free memory", "unknown on this system" if free is None else f"{free / GIB:.1f} GiB"
        if device.type == "cuda":
            free, total = torch.cuda.mem_get_info(device)
            yield "free GPU memory", f"{free / GIB:.1f} of {total / GIB:.1f} GiB"
        trial = try_step(self._config)
        yield "a training step", describe_trial(trial)
        if self._counts is not None:
            yield from expected_round(self._config, trial, sum(self._counts.train))


def check_node(
    overrides: Iterable[str],
    node: NodeConfig,
    *,
    superlink: str | None,
    root_certificates: Path | None,
    private_key: Path | None,
    say: Callable[[str], object],
) -> None:
    """Check a hospital's machine before it takes part in a run, and say what was found.

    Args:
        overrides: of the run's configuration, as the coordinator passes them.
        node: what the node is going to be started with.
        superlink: "host:port" to connect to; None: not tried.
        root_certificates: of the SuperLink's authority; None: those that the system trusts.
        private_key: file of the node's key; None: not checked.
        say: takes the text for the reader.

    Raises:
        ValueError: the configuration is wrong, or the node cannot take part; the text names the
            first reason and the way out.
    """
    check = Check(own_config(load_config(overrides), node), node, say)
    check.section("versions", check.versions())
    check.section("images", check.data())
    check.section("disks", check.places())
    check.section("training", check.training())
    if superlink is not None:
        check.section("connection", check_superlink(superlink, root_certificates))
    if private_key is not None:
        # Imported here because it takes a library that nothing else needs.
        from task.cli.check_key import check_private_key

        check.section("key", check_private_key(private_key))
    if check.problems:
        first, *others = check.problems
        more = f" (and {len(others)} more, see above)" if others else ""
        raise ValueError(f"this node cannot take part yet: {in_one_line(first)}{more}")
    say("\nthis node can take part")


def format_counts(classes: Iterable[str], counts: ImageCounts) -> str:
    """Lay the numbers of images out, a class of the run per line."""
    rows: list[Row] = [("class", "training", "held out", "test")]
    numbers = zip(counts.train, counts.held_out, counts.test, strict=True)
    for name, each in zip(classes, numbers, strict=True):
        rows.append((name if any(each) else f"{name} (none here)", *map(str, each)))
    sums = (sum(counts.train), sum(counts.held_out), sum(counts.test))
    return lay_out([*rows, ("all", *map(str, sums))])


def describe_sizes(config: Config, listing: Listing) -> str:
    """Say how large the original images are, from their headers."""
    sizes = [size for path in listing.paths if (size := original_size(config.data.name, path))]
    if not sizes:
        return "unknown, no header can be read"
    said = [
        f"{name} {look(w for w, _ in sizes):.0f}x{look(h for _, h in sizes):.0f}"
        for name, look in (("min", min), ("median", statistics.median), ("max", max))
    ]
    seen = config.data.image_size
    return f"{', '.join(said)} (width x height); the model sees {seen}x{seen}"


def describe_trial(trial: Trial) -> str:
    """Say what a training step took."""
    peak = "" if trial.peak_memory is None else f", {trial.peak_memory / GIB:.1f} GiB at its peak"
    return (
        f"{trial.seconds:.3g} s for {trial.batch_size} images in {trial.precision}, processes: "
        f"{trial.num_processes}; it fits{peak}"
    )


def expected_round(config: Config, trial: Trial, num_images: int) -> Iterator[Finding]:
    """Say how long a round takes on so many training images.

    Raises:
        ValueError: longer than the server waits.
    """
    epochs, patience = config.train.local_epochs, config.federation.round_timeout
    seconds = epochs * num_images / trial.batch_size * trial.seconds
    yield "a round, about", f"{seconds:.0f} s: {epochs} epochs of {num_images} images"
    if seconds > patience:
        raise ValueError(
            f"federation.round_timeout={patience:g} s is over before this node has trained, which "
            f"takes about {seconds:.0f} s; ask the coordinator for more time, fewer "
            "train.local_epochs or a smaller model"
        )


def free_disk(folder: Path) -> str:
    """Say how much room there is where a folder is, or would be made."""
    existing = next(place for place in (folder, *folder.parents) if place.exists())
    return f"{shutil.disk_usage(existing).free / GIB:.1f} GiB at {folder}"


def free_memory(
    machine: Path = Path("/proc/meminfo"), container: Path = Path("/sys/fs/cgroup")
) -> int | None:
    """Return the bytes that programs can still get, of this machine or its container.

    Args:
        machine: Linux's file; None is returned where there is none.
        container: folder of its limits, of version 2.
    """
    if not machine.is_file():
        return None
    lines = dict(line.split(":", 1) for line in machine.read_text().splitlines())
    free = int(lines["MemAvailable"].split()[0]) * 1024
    limit = container / "memory.max"
    said = limit.read_text().strip() if limit.is_file() else "max"
    if said == "max":
        return free
    return min(free, int(said) - int((container / "memory.current").read_text()))


def in_one_line(problem: str) -> str:
    """Shorten a problem that lists files to what it is and the way out."""
    lines = problem.splitlines()
    return problem if len(lines) == 1 else f"{lines[0]} see above. {lines[-1]}"


def _has_gpu() -> bool:
    return torch.cuda.is_available()
