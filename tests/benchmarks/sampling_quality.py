"""How good the images of few steps are beside those of all steps, of one trained model."""

import tempfile
from collections.abc import Sequence
from pathlib import Path
from statistics import mean

from task.config import Config, read_config
from task.data import build_dataset
from task.evaluation.comparison import extract_real
from task.evaluation.distances import frechet_distance
from task.evaluation.features import build_extractor, extract
from task.generation.draw_images import balanced_labels, draw_images
from task.randomness import Stream
from task.runs.run import final_model
from task.training.devices import select_device
from tests.benchmarks.processes import RUN_NAME, feddm_train
from tests.benchmarks.report import Figures

# Each draws from the same noise: sampler, steps (None: all), eta and precision.
WAYS: dict[str, tuple[str, int | None, float, str]] = {
    "ancestral": ("ddim", None, 1.0, "float32"),
    "dpmpp_2m_20": ("dpmpp_2m", 20, 0.0, "float32"),
    "dpmpp_2m_20_bfloat16": ("dpmpp_2m", 20, 0.0, "bfloat16"),
    "ddim_20": ("ddim", 20, 0.0, "float32"),
}


def measure(
    *,
    full: bool,
    device: str,
    overrides: Sequence[str] = (),
    num_images: int = 1000,
    seeds: Sequence[int] = (0, 1, 2),
) -> Figures:
    """Train the demonstration's model on digits and compare the ways to draw from it.

    Args:
        full: not used.
        device: auto, cpu, cuda or cuda:N.
        overrides: further ones of the run.
        num_images: see `compare`.
        seeds: see `compare`.
    """
    with tempfile.TemporaryDirectory() as folder:
        feddm_train(folder, f"train.device={device}", "eval.num_images=0", *overrides)
        return compare(Path(folder) / RUN_NAME, num_images=num_images, seeds=seeds)


def compare(run: Path, *, num_images: int, seeds: Sequence[int]) -> Figures:
    """Measure what the final model of a run draws, in the features of the run's extractor.

    Args:
        run: folder of a finished run on a data set with test images.
        num_images: images of each way and seed, in equal numbers of each class.
        seeds: of the noise; more than one shows how much chance there is in a distance.

    Returns:
        Mean Frechet distances to the training images over the seeds, `sample.fd_<way>` with the
        number of steps behind "ancestral", the largest less the smallest of the seeds,
        `sample.fd_<way>_range`, and `sample.fd_floor_of_<number>`: of the real test images, which
        are fewer, so that it lies higher than that of `num_images` would.

    Raises:
        ValueError: there is no test split, or no final model.
    """
    config = read_config(run / "config.yaml")
    device = select_device(config.train.device)
    dataset = build_dataset(config, download=False)
    extractor = build_extractor(config, dataset.train, device)
    real = extract_real(config, dataset, extractor)
    if real.test is None:
        raise ValueError(f"run must be one on a data set with test images, got {run}")
    labels = balanced_labels(num_images, len(config.data.classes))
    floor = frechet_distance(real.train.features, real.test.features)
    found: Figures = {f"sample.fd_floor_of_{len(real.test)}": floor}
    for name, way in WAYS.items():
        steps = f"_{config.diffusion.num_timesteps}" if way[1] is None else ""
        distances = []
        for seed in seeds:
            drawing = _drawing(config, seed, *way)
            model, _ = final_model(run, drawing)
            stream = Stream.EVALUATED_IMAGES
            drawn = draw_images(drawing, model, labels, device=device, stream=stream)
            features = extract(extractor, drawn.images).features
            distances.append(frechet_distance(real.train.features, features))
        found[f"sample.fd_{name}{steps}"] = mean(distances)
        found[f"sample.fd_{name}{steps}_range"] = max(distances) - min(distances)
    ancestral = float(found[f"sample.fd_ancestral_{config.diffusion.num_timesteps}"])
    found["sample.fd_dpmpp_2m_20_ratio"] = float(found["sample.fd_dpmpp_2m_20"]) / ancestral
    return found


def _drawing(
    config: Config, seed: int, sampler: str, steps: int | None, eta: float, precision: str
) -> Config:
    return config.changed(
        {
            "seed": seed,
            "diffusion.sampler": sampler,
            "diffusion.num_inference_steps": steps,
            "diffusion.eta": eta,
            "eval.precision": precision,
        }
    )
