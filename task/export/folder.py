"""The folder of an export: written whole, compared with the run's own network, or not there."""

import dataclasses
import hashlib
import json
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch

from task.config import DRAWING_VALUES, Config, require
from task.export.drawing import Model, Settings, image_shape
from task.export.formats import FORMATS, Format
from task.export.sources import ship
from task.files import atomic_folder
from task.model_card import write_model_card
from task.network import UNet
from task.run_directory import weights_file
from task.runs import FinishedRun, final_model
from task.schedule import build_schedule
from task.steps import half_log_snr
from task.unet import unet_arguments

# Other libraries add up in another order: 2e-7 was seen where the largest prediction is 1.
TOLERANCE = 1e-4
COMPARED = 8


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
    content = weights_file(run.path, client).read_bytes()
    settings = describe(run.config) | {
        "exported": {
            "by": f"feddm {version('feddm')}",
            "format": to,
            "round": server_round,
            "client": client,
            "weights_sha256": hashlib.sha256(content).hexdigest(),
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
        difference, largest = compare(unet, form.load_model(aside), settings)
        require(
            difference <= TOLERANCE * max(1.0, largest),
            f"the difference between the export and {run.path}",
            f"at most {TOLERANCE:g} of predictions of up to {largest:.3g}, so nothing was written",
            difference,
        )
    return Export(folder, difference, largest)


def check_replaceable(folder: Path) -> None:
    """Check that a folder is not there, or empty, or an earlier export.

    Raises:
        ValueError: it holds something else.
    """
    if not folder.exists():
        return
    try:
        found = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        found = None
    known = isinstance(found, dict) and "exported" in found
    empty = folder.is_dir() and not any(folder.iterdir())
    require(known or empty, "--out", "a new folder, or an earlier export to replace", str(folder))


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
    ship("steps.py", folder / "steps.py")
    ship("export/drawing.py", folder / "drawing.py")
    ship(f"export/{form.loader}.py", folder / "sample.py")


@torch.inference_mode()
def compare(unet: UNet, model: Model, settings: Settings) -> tuple[float, float]:
    """Compare predictions of an export with the network's own, from pure noise to the clean image.

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
