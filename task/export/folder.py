"""The folder of an export: written whole, compared with the run's own network, or not there."""

import dataclasses
import json
from importlib.metadata import version
from pathlib import Path

from task.checks import require
from task.config import Config
from task.export.drawing import Settings
from task.export.formats import FORMATS, formats_of
from task.files import atomic_folder, file_sha256
from task.generation.folder import NOTICE, folder_names
from task.generators.base import Generator
from task.generators.ensemble import Ensemble
from task.reporting.model_card import write_model_card
from task.runs.layout import weights_file
from task.runs.run import Run, final_model

# Of predictions of up to 1: other libraries add up in another order.
TOLERANCE = 1e-4

# Whoever exports again must not lose what others added to the folder.
SUMS_FILE = "SHA256SUMS"


@dataclasses.dataclass(frozen=True)
class Export:
    """What was written.

    Attributes:
        folder: where it lies.
        difference: the largest one between what it predicts and what the run's model does.
        largest: the largest absolute prediction.
    """

    folder: Path
    difference: float
    largest: float


def export_run(run: Run, to: str, *, out: Path | None = None, client: int | None = None) -> Export:
    """Write the final weights of a run in a format, and check that they load and predict the same.

    Args:
        run: the run.
        to: a key of `FORMATS`.
        out: the folder to write, which may be an earlier export; None: RUN/export/<format>, with
            "-client-N" for a client.
        client: whose own weights to take; None: the global ones.

    Raises:
        OSError: it cannot be written.
        ValueError: the format is unknown, a library is missing, there are no such weights, the
            folder holds something else, or what was written predicts something else.
    """
    require(to in FORMATS, "--to", f"one of {', '.join(FORMATS)}", to)
    FORMATS[to].check_installed()
    name = to if client is None else f"{to}-client-{client}"
    folder = out or run.path / "export" / name
    check_replaceable(folder)
    generator, server_round = final_model(run.path, run.config, client)
    require(
        not isinstance(generator, Ensemble),
        str(run.path),
        "a run whose images one model draws (feddm generate draws from several)",
        f"an {generator.title}",
    )
    formats = formats_of(generator)
    require(to in formats, "--to", f"{' or '.join(formats)} for this family of models", to)
    form = formats[to]
    generator.eval()
    settings = describe(run.config, generator) | {
        "exported": {
            "by": f"feddm {version('feddm')}",
            "format": to,
            "round": server_round,
            "client": client,
            "weights_sha256": file_sha256(weights_file(run.path, client)),
        }
    }
    with atomic_folder(folder) as aside:
        form.fill(aside, generator, settings)
        write_model_card(
            run,
            aside,
            usage=form.usage(settings),
            library=form.library,
            exported=settings["exported"],
        )
        write_sums(aside)
        difference, largest = form.compare(generator, aside, settings)
        require(
            difference <= TOLERANCE * max(1.0, largest),
            f"the difference between the export and {run.path}",
            f"at most {TOLERANCE:g} of predictions of up to {largest:.3g}, so nothing was written",
            difference,
        )
    return Export(folder, difference, largest)


def check_replaceable(folder: Path) -> None:
    """Check that a folder is not there, or empty, or holds an earlier export and nothing else.

    Raises:
        ValueError: it holds something that no export wrote, or is the working directory.
    """
    inside = Path.cwd().is_relative_to(folder.resolve())
    elsewhere = "another folder than the working directory and those above it, such as ./model"
    require(not inside, "--out", elsewhere, str(folder))
    if not folder.exists():
        return
    require(folder.is_dir(), "--out", "a folder", str(folder))
    # Others write such sums too, so they alone make no export.
    written = read_sums(folder) if is_export(folder) else {}
    others = [
        name
        for name, file in files_in(folder)
        if file.is_symlink() or written.get(name) != file_sha256(file)
    ]
    if others:
        raise ValueError(
            f"--out: {folder} holds what no export wrote, or what was edited since: "
            f"{', '.join(others[:3])}{', ...' if others[3:] else ''}; it would be lost. Move it "
            "away, or pass another --out"
        )


def is_export(folder: Path) -> bool:
    """Whether the config.json of a folder is that of an export."""
    try:
        found = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return isinstance(found, dict) and "exported" in found


def write_sums(folder: Path) -> None:
    """Write the SHA-256 of every file of a folder, as `sha256sum --check` reads them."""
    sums = [f"{file_sha256(file)}  {name}\n" for name, file in files_in(folder)]
    (folder / SUMS_FILE).write_text("".join(sums), encoding="utf-8")


def read_sums(folder: Path) -> dict[str, str]:
    """Read the SHA-256 of the files that an export wrote; none where there are none.

    Raises:
        ValueError: the file that holds them is broken.
    """
    file = folder / SUMS_FILE
    if not file.exists():
        return {}
    lines = file.read_text(encoding="utf-8").splitlines()
    broken = [line for line in lines if "  " not in line]
    require(not broken, str(file), "lines of a SHA-256, two blanks and a file", broken[:1])
    return {name: digest for digest, name in (line.split("  ", 1) for line in lines)}


def files_in(folder: Path) -> list[tuple[str, Path]]:
    """List the files of a folder with their names in it, but the sums and what Python caches."""
    files = [path for path in sorted(folder.rglob("*")) if path.is_symlink() or not path.is_dir()]
    names = [(path.relative_to(folder), path) for path in files]
    return [
        (name.as_posix(), path)
        for name, path in names
        if name != Path(SUMS_FILE) and "__pycache__" not in name.parts
    ]


def describe(config: Config, generator: Generator) -> Settings:
    """Say in plain values all that drawing with a generator needs; config.json holds them."""
    return {
        "classes": list(config.data.classes),
        "folders": folder_names(config.data.classes),
        "notice": NOTICE,
        "seed": config.seed,
        "channels": config.data.channels,
        "image_size": config.data.image_size,
        **generator.drawing_settings(),
    }
