"""What a benchmark says: of the machine, as text, and as one flat JSON object."""

import json
import os
import platform
import re
import subprocess
from collections.abc import Mapping
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path

import torch

from task.checks import require
from task.files import atomic_path

CHECKOUT = Path(__file__).resolve().parent.parent.parent

Figures = dict[str, float | str]

# By name of a module of this package: what it measures, and how long on 2 cores.
SECTIONS = {
    "training": "local training against the plain recipe and bf16 matrix products (2 minutes; "
    "--full on a CPU: the paper's batch as well)",
    "sampling": "drawing images against the network alone (1 minute; --full on a GPU: 10,000 "
    "images)",
    "families": "training of every family of generators against bf16 matrix products (5 minutes)",
    "peers": "training beside denoising-diffusion-pytorch and diffusers, where the dependency "
    "group `peers` is installed (3 minutes)",
    "rounds": "what a round costs outside local training, phase by phase (1 minute)",
    "server_memory": "memory of the server by the number of clients (2 minutes; --full: of "
    "Flower's FedAvg as well)",
    "scale": "seconds per round and memory for 10 and 100 clients (2 minutes; --full: 1,000 as "
    "well, 4 minutes)",
    "copying": "false alarms of the search for copies, and copies found (1 minute; --full: ten "
    "times as many trials)",
    "realism": "places of faulty images between real ones and noise (seconds)",
    "extractors": "which extractor orders known faults of real images by how bad they are (only "
    "with --full or by name, 20 minutes; needs ../shared/data)",
    "loss_curves": "loss curves of bfloat16 and float32 (only with --full or by name)",
    "sampling_quality": "Frechet distance of 20 steps against 300 on a model that is trained for "
    "it (only with --full or by name)",
}
LONGER = ("extractors", "loss_curves", "sampling_quality")

# By the words of a name.
UNITS = {
    "images_per_second": "images/s",
    "share": "%",
    "gflop_per_image": "GFLOP",
    "tflops": "TFLOP/s",
    "mib": "MiB",
    "seconds": "s",
    "hours": "h",
    "ratio": "x",
}

# Name, on a CPU, on a GPU; a share of time and a distance are to be small, the rest large.
GOALS = {
    "train.ratio": {"cpu": 2.2, "cuda": 4.0},
    "train.share_of_matmul_peak": {"cpu": 0.65, "cuda": 0.30},
    "sample.share_of_forward_rate": {"cpu": 0.80, "cuda": 0.80},
    "sample.fd_dpmpp_2m_20_ratio": {"cpu": 1.1, "cuda": 1.1},
    "round.overhead_share": {"cuda": 0.15},
}
AT_MOST = {"round.overhead_share", "sample.fd_dpmpp_2m_20_ratio"}


def available_cores() -> int:
    """Count the cores that this process may use."""
    return len(os.sched_getaffinity(0))


def describe_machine(device: torch.device) -> Figures:
    """Name what was measured on, with which versions, when and of which state of the code."""
    on_gpu = device.type == "cuda"
    revision = subprocess.run(
        ["git", "describe", "--always", "--dirty", "--abbrev=12"],
        cwd=CHECKOUT,
        capture_output=True,
        text=True,
        check=False,
    )
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "revision": revision.stdout.strip() or "unknown: not a git checkout",
        "machine.cpu": _cpu_model(),
        "machine.cores": available_cores(),
        "machine.memory_mib": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2**20,
        "machine.gpu": torch.cuda.get_device_name(device) if on_gpu else "none used",
        "versions.python": platform.python_version(),
        "versions.torch": torch.__version__,
        "versions.flwr": version("flwr"),
    }


def _cpu_model() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    text = cpuinfo.read_text(encoding="utf-8") if cpuinfo.is_file() else ""
    found = re.search(r"^model name\s*:\s*(.+)$", text, re.MULTILINE)
    return found[1] if found else platform.processor() or platform.machine()


def check_writable(file: Path) -> None:
    """Refuse a file that could not be written in the end.

    Raises:
        ValueError: it is a folder, or its folder is not there or not writable.
    """
    require(not file.is_dir(), "--json", "a file", str(file))
    folder = file.absolute().parent
    require(
        folder.is_dir() and os.access(folder, os.W_OK),
        "--json",
        "a file in a folder that can be written to",
        str(file),
    )


def write_json(file: Path, figures: Mapping[str, float | str]) -> None:
    """Write figures as one flat JSON object, atomically."""
    with atomic_path(file) as aside:
        aside.write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")


def text_of(title: str, figures: Figures, *, device_type: str) -> str:
    """Lay figures out: a line for each, and a table of those whose names have more than two parts.

    Args:
        title: of the section.
        figures: by name.
        device_type: "cpu" or "cuda", which has goals of its own.
    """
    listed = {name: value for name, value in figures.items() if name.count(".") <= 1}
    rows = [
        [name, written(name, value), goal(name, value, device_type)]
        for name, value in listed.items()
    ]
    parts = [title, "-" * len(title), aligned(rows)]
    cells = {name: value for name, value in figures.items() if name not in listed}
    if cells:
        parts += ["", aligned(_table(cells))]
    return "\n".join(parts) + "\n"


def _table(cells: Figures) -> list[list[str]]:
    columns = list(dict.fromkeys(name.rpartition(".")[2] for name in cells))
    lines = list(dict.fromkeys(name.rpartition(".")[0] for name in cells))

    def cell(line: str, column: str) -> str:
        name = f"{line}.{column}"
        return written(name, cells[name]) if name in cells else ""

    return [
        ["", *columns],
        *([line, *(cell(line, column) for column in columns)] for line in lines),
    ]


def written(name: str, value: float | str) -> str:
    """Write a value with the unit that its name says."""
    if isinstance(value, str):
        return value
    unit = next(
        (unit for words, unit in UNITS.items() if re.search(rf"(?<![a-z]){words}(?![a-z])", name)),
        "",
    )
    if unit == "%":
        value *= 100
    digits = f"{value:,.0f}" if abs(value) >= 1000 or value == int(value) else f"{value:.4g}"
    return f"{digits} {unit}".strip()


def goal(name: str, value: float | str, device_type: str) -> str:
    """Say what a figure is to be and whether it is; empty where there is no goal."""
    limit = GOALS.get(name, {}).get(device_type)
    if limit is None or isinstance(value, str):
        return ""
    at_most = name in AT_MOST
    reached = value <= limit if at_most else value >= limit
    words = f"goal: {'<=' if at_most else '>='} {written(name, limit)}"
    return f"{words}, {'reached' if reached else 'missed'}"


def aligned(rows: list[list[str]]) -> str:
    """Lay rows of equal length out in columns; text on the left, numbers on the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in rows
    )
