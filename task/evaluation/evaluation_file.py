"""The files of a run that keep what was measured of its images."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from task.config import DRAWING_VALUES, Config, flat_values, read_config
from task.evaluation.evaluate import MetricReport
from task.files import write_json

# Of the noise that images are drawn from, and of what measures them.
SEEDS = ("seed", "eval.seed")


def evaluation_file(run: Path, config: Config, *subjects: str) -> Path:
    """Return the file of a run that keeps what an extractor said in an image range.

    Args:
        run: its folder.
        config: says which extractor and range.
        *subjects: what was measured where it is not the global model, such as "client-3", or not
            as the run draws, see `drawn_otherwise`; empty ones are left out.
    """
    parts = ["evaluation", config.eval.extractor, config.eval.image_range, *subjects]
    return run / ("-".join(filter(None, parts)) + ".json")


def drawn_otherwise(run: Path, config: Config) -> str:
    """Name the values by which images are drawn and measured otherwise than a run does; or "".

    Those that are not named, such as the number of images, stand in the file itself.

    Args:
        run: its folder.
        config: of the drawing.
    """
    own, asked = flat_values(read_config(run / "config.yaml")), flat_values(config)
    changed = [name for name in (*DRAWING_VALUES, *SEEDS) if own[name] != asked[name]]
    return ",".join(f"{name.removeprefix('diffusion.')}={asked[name]}" for name in changed)


def write_report(file: Path, report: MetricReport, config: Config, server_round: int) -> None:
    """Write a report as JSON, atomically, with the round and how its images were drawn."""
    write_measurements(file, report.describe(), config, server_round)


def write_measurements(
    file: Path, found: Mapping[str, Any], config: Config, server_round: int
) -> None:
    """Write what was found as JSON, atomically, with the round and how the images were drawn."""
    values, diffusion = flat_values(config), config.diffusion
    drawn = {
        "round": server_round,
        **{name.removeprefix("diffusion."): values[name] for name in DRAWING_VALUES},
        "num_inference_steps": diffusion.num_inference_steps or diffusion.num_timesteps,
        "eval.precision": config.eval.precision,
    }
    if config.eval.num_per_class is not None:
        drawn["num_per_class"] = config.eval.num_per_class
    write_json(file, {**found, **drawn})
