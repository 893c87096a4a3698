"""`feddm doctor`: what this machine has for training, drawing and measuring, and what it lacks."""

import os
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import torch

from task.cli.findings import (
    Finding,
    Findings,
    free_disk,
    gpu_memory,
    memory,
    nearest_folder,
    pretrained,
    versions,
)
from task.config import FILE_SETS, Config, choices, class_folders, hydra_override, load_config
from task.data import list_dataset
from task.data.packaged import missing_files
from task.evaluation.features import hub_inception_file
from task.export.formats import FORMATS
from task.lock import holder
from task.runs.layout import LOCK_FILE, is_begun, last_complete_round, weights_file
from task.training.devices import device_name, missing_for_compiling, select_device

# Any folder may be one of these, and its classes are not known.
ANY_FOLDER = ("image_folder", "dicom_folder")


def examine_machine(*, data_root: Path | None, runs: Path, say: Callable[[str], object]) -> None:
    """Look at this machine and say what was found.

    Args:
        data_root: folder of the data sets; None: where each preset looks.
        runs: folder of runs.
        say: takes the text for the reader.

    Raises:
        ValueError: nothing can be trained here; the text names the first reason.
    """
    findings = Findings(say)
    findings.section("versions", versions())
    findings.section("devices", devices())
    findings.section("disks", disks(runs))
    findings.section("data sets", data_sets(data_root))
    findings.section("metrics and export", further())
    findings.section(f"runs in {runs}", describe_runs(runs))
    if findings.problems:
        raise ValueError(f"feddm cannot train here: {findings.problems[0]}")
    say("\nfeddm can train here: feddm-train")


def devices() -> Iterator[Finding]:
    """Name what computes."""
    yield "cpu", f"{os.cpu_count()} cores, {torch.backends.cpu.get_cpu_capability()}"
    yield from memory()
    for number in range(torch.cuda.device_count()):
        gpu = torch.device("cuda", number)
        yield "gpu", device_name(gpu)
        yield from gpu_memory(gpu)
    device = select_device("auto")
    yield "trains on", f"{device_name(device)} (train.device=auto)"
    missing = missing_for_compiling(device)
    yield "torch.compile", f"missing: {missing}" if missing else "can be used"


def disks(runs: Path) -> Iterator[Finding]:
    """Look at the disks that a run writes to.

    Raises:
        OSError: one cannot be written.
    """
    cache = Path(load_config().data.cache_dir).expanduser()
    for name, folder in (("runs", runs), ("cache", cache)):
        tempfile.TemporaryFile(dir=nearest_folder(folder)).close()
        yield f"free, {name}", free_disk(folder)


def data_sets(root: Path | None) -> Iterator[Finding]:
    """Say which data sets are there, by the names that `data=` takes.

    Args:
        root: the folder of all of them, in place of the presets' own.
    """
    for name in choices("data.name"):
        if name in ANY_FOLDER:
            continue
        config = load_config([f"data={name}"])
        if root is not None:
            own = root / Path(config.data.root).name if name in FILE_SETS else root
            config = load_config([f"data={name}", hydra_override("data.root", str(own))])
        yield name, found_set(config)
    folder = root or Path(load_config().data.root)
    if classes := class_folders(folder / "train") or class_folders(folder):
        yield f"in {folder}", f"folders {', '.join(classes)}: data=image_folder data.root={folder}"


def found_set(config: Config) -> str:
    """Say whether a data set is where its configuration looks."""
    data = config.data
    if data.name in FILE_SETS:
        try:
            return f"there: {sum(map(len, list_dataset(config))):,} images in {data.root}"
        except (FileNotFoundError, ValueError) as error:
            return f"missing: {error}"
    missing = missing_files(data.name, Path(data.root))
    if not missing:
        return "there"
    return f"missing in {data.root} ({len(missing)} files), fetched on first use"


def further() -> Iterator[Finding]:
    """Look for what only some commands need."""
    inception = hub_inception_file()
    there = inception.is_file()
    yield "Inception", f"there: {inception}" if there else f"missing: {inception}, for a true FID"
    yield from pretrained()
    for to, form in FORMATS.items():
        missing = ", ".join(form.missing)
        said = f"missing {missing}: uv sync --extra export" if missing else "exports can be written"
        yield to, said


def describe_runs(folder: Path) -> Iterator[Finding]:
    """List the runs in a folder."""
    begun = sorted(path for path in folder.glob("*") if is_begun(path))
    if not begun:
        yield "", "none"
    for path in begun:
        state = "finished" if weights_file(path).is_file() else "not finished"
        if process := holder(path / LOCK_FILE):
            state = f"running (process {process})"
        yield path.name, f"{state}, {last_complete_round(path)} rounds"
