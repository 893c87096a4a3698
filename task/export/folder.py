"""The folder of an export: written whole, compared with the run's own network, or not there."""

import dataclasses
import hashlib
import json
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch

from task.checks import require
from task.config import DRAWING_VALUES, Config
from task.export.drawing import Model, Settings, image_shape
from task.export.formats import FORMATS, Format
from task.export.sources import ship
from task.files import atomic_folder
from task.generation.folder import NOTICE, folder_names
from task.generators.diffusion.network import UNet
from task.generators.diffusion.noise_schedule import build_schedule
from task.generators.diffusion.samplers import half_log_snr
from task.generators.diffusion.unet import unet_arguments
from task.reporting.model_card import write_model_card
from task.runs.run import FinishedRun, final_model
from task.runs.run_directory import weights_file

# Of predictions of up to 1: other libraries add up in another order.
TOLERANCE = 1e-4
COMPARED = 8

# Whoever exports again must not lose what others added to the folder.
SUMS_FILE = "SHA256SUMS"


@dataclasses.dataclass(frozen=True)
class Export:
    """What was written.

    Attributes:
        folder: where it lies.
        difference: the largest one between its predictions and those of the run's network.
        largest: the largest absolute prediction.
    """

    folder: Path
    difference: float
    largest: float


def export_run(
    run: FinishedRun, to: str, *, out: Path | None = None, client: int | None = None
) -> Export:
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
    form = FORMATS[to]
    form.check_installed()
    name = to if client is None else f"{to}-client-{client}"
    folder = out or run.path / "export" / name
    check_replaceable(folder)
    unet, server_round = final_model(run.path, run.config, client)
    unet.eval()
    settings = describe(run.config) | {
        "exported": {
            "by": f"feddm {version('feddm')}",
            "format": to,
            "round": server_round,
            "client": client,
            "weights_sha256": sha256_of(weights_file(run.path, client)),
        }
    }
    with atomic_folder(folder) as aside:
        fill(aside, form, unet, settings)
        write_model_card(
            run,
            aside,
            usage=form.usage(settings),
            library=form.library,
            exported=settings["exported"],
        )
        write_sums(aside)
        difference, largest = compare(unet, form.load_model(aside), settings)
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
        if file.is_symlink() or written.get(name) != sha256_of(file)
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
    sums = [f"{sha256_of(file)}  {name}\n" for name, file in files_in(folder)]
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


def sha256_of(file: Path) -> str:
    """Return the SHA-256 of a file."""
    with file.open("rb") as content:
        return hashlib.file_digest(content, "sha256").hexdigest()


def describe(config: Config) -> Settings:
    """Say in plain values all that drawing with a network needs; config.json holds them."""
    diffusion = dataclasses.asdict(config.diffusion)
    sampling: dict[str, Any] = {
        name: diffusion[name] for name in (path.split(".")[1] for path in DRAWING_VALUES)
    }
    sampling["num_inference_steps"] = sampling["num_inference_steps"] or diffusion["num_timesteps"]
    network = unet_arguments(config)
    return {
        "classes": list(config.data.classes),
        "folders": folder_names(config.data.classes),
        "notice": NOTICE,
        "seed": config.seed,
        "channels": config.data.channels,
        "image_size": config.data.image_size,
        "null_label": network["num_classes"] if network["null_class"] else None,
        "network": network,
        "prediction_type": config.diffusion.prediction_type,
        "sampling": sampling,
        "schedule": config.diffusion.schedule,
        "alphas_cumprod": build_schedule(config).alphas_cumprod.tolist(),
    }


def fill(folder: Path, form: Format, unet: UNet, settings: Settings) -> None:
    """Write the model in its format, what describes it, and the code that draws with it."""
    form.write(unet, settings, folder)
    (folder / "config.json").write_text(json.dumps(settings, indent=1) + "\n", encoding="utf-8")
    ship("generators/diffusion/samplers.py", folder / "samplers.py")
    ship("generators/noise.py", folder / "noise.py")
    ship("export/drawing.py", folder / "drawing.py")
    ship(f"export/{form.loader}.py", folder / "sample.py")


@torch.inference_mode()
def compare(unet: UNet, model: Model, settings: Settings) -> tuple[float, float]:
    """Compare predictions of an export with the network's own, for every log-SNR and label.

    All images are pure noise, whatever the network is told of them.

    Returns:
        The largest absolute difference, and the largest absolute prediction.
    """
    rng = np.random.default_rng(0)
    x_t = rng.standard_normal((COMPARED, *image_shape(settings)), np.float32)
    most, least = (2 * half_log_snr(settings["alphas_cumprod"][end]) for end in (0, -1))
    log_snr = np.linspace(least, most, COMPARED, dtype=np.float32)
    # With the null label, which comes last.
    last = unet.class_embedding.num_embeddings - 1
    inputs = (x_t, log_snr, np.linspace(0, last, COMPARED).round().astype(np.int64))
    expected = unet(*map(torch.from_numpy, inputs)).numpy()
    return float(np.abs(model(*inputs) - expected).max()), float(np.abs(expected).max())
