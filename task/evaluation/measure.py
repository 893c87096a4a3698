"""Draw images from a model and measure them as a run's configuration says."""

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from task.config import DRAWING_VALUES, Config, flat_values, read_config
from task.data import Dataset, ImageSet
from task.evaluation.classifier import accuracy, balanced_accuracy
from task.evaluation.evaluate import (
    MetricReport,
    RealFeatures,
    chance_agreement,
    evaluate_images,
    pixel_copying,
)
from task.evaluation.features import FeatureExtractor, cached_classifier
from task.evaluation.realism import noise_position
from task.files import write_json
from task.generation.images import image_shape
from task.generators.diffusion.sampler import (
    build_sampler,
    evaluations_per_image,
    sample_batches,
    to_uint8,
)
from task.generators.diffusion.unet import UNet
from task.progress import progress
from task.randomness import Stream, torch_generator
from task.training.devices import autocast, move

# Held-out images that every run searches for copies beside the generated ones.
MOST_SEARCHED = 1000
# Of the noise that images are drawn from, and of what measures them.
SEEDS = ("seed", "eval.seed")


def draw_images(
    config: Config, model: UNet, labels: Tensor, *, device: torch.device, stream: Stream
) -> ImageSet:
    """Draw an image of each label; the same seed, stream and place in the list draw the same.

    Args:
        config: of the run: its sampler and its seed, `train.channels_last`, `eval.batch_size` and
            `eval.precision`, which is settled.
        model: moved to `device`.
        labels: [N] int64.
        device: that draws.
        stream: what the images are for.

    Returns:
        The images, uint8 on the CPU, with their labels; truncated where they are evaluated in
        the paper's range, else rounded.

    Raises:
        ValueError: `eval.precision` is "auto".
    """
    move(model, device, channels_last=config.train.channels_last)
    steps = len(labels) * evaluations_per_image(config)
    with (
        autocast(device, config.eval.precision),
        progress(steps, f"drawing {len(labels):,} images") as advance,
    ):
        images = sample_batches(
            build_sampler(config),
            model,
            labels.to(device),
            image_shape=image_shape(config),
            batch_size=config.eval.batch_size,
            block_generator=partial(torch_generator, config.seed, stream, device=device),
            advance=advance,
        )
    # The published figures are of images that were truncated.
    truncated = stream is Stream.EVALUATED_IMAGES and config.eval.image_range == "paper"
    drawn = to_uint8(images, truncated=truncated).cpu()
    # Clients in other processes may train on the same GPU.
    torch.cuda.empty_cache()
    return ImageSet(drawn, labels)


def balanced_labels(num_images: int, num_classes: int) -> Tensor:
    """List classes in turn, [num_images] int64."""
    return torch.arange(num_images) % num_classes


def full_labels(config: Config, dataset: Dataset) -> Tensor:
    """List the classes of the images that full metrics draw, [N] int64.

    Of each class `eval.num_per_class`, or as many as the test split has, or, without a test
    split, the training images.

    Source: section IV of the paper.
    """
    num_classes = len(config.data.classes)
    if config.eval.num_per_class is None:
        real = dataset.test if len(dataset.test) > 0 else dataset.train
        counts = real.labels.bincount(minlength=num_classes)
    else:
        counts = torch.full((num_classes,), config.eval.num_per_class)
    return torch.arange(num_classes).repeat_interleave(counts)


def measure_images(
    config: Config,
    generated: ImageSet,
    dataset: Dataset,
    *,
    extractor: FeatureExtractor,
    real: RealFeatures | None = None,
    full: bool = True,
) -> MetricReport:
    """Measure generated images as a configuration says; see `evaluate_images`.

    Args:
        config: of the run, with absolute folders.
        generated: the images.
        dataset: the real ones.
        extractor: of `build_extractor`.
        real: of `extract_real`, where it is known.
        full: whether to train classifiers and to search for copies as well.
    """
    return evaluate_images(
        generated,
        dataset,
        extractor=extractor,
        data_name=config.data.name,
        num_classes=len(config.data.classes),
        horizontal_flip=config.data.horizontal_flip,
        seed=config.eval.seed,
        batch_size=config.eval.batch_size,
        cache_dir=Path(config.data.cache_dir),
        real=real,
        with_classification=full,
        with_copying=full,
    )


def quick_measures(
    config: Config, generated: ImageSet, dataset: Dataset, *, device: torch.device
) -> dict[str, float]:
    """Measure what every run ends with: classes, the place between real and noise, and copies.

    Args:
        config: of the run, with absolute folders.
        generated: images with the classes that were asked for.
        dataset: the real ones.
        device: that computes.

    Returns:
        "num_generated_images", "class_agreement", "chance_agreement" and, of what there are real
        images for, "classifier_test_accuracy", "noise_position" and "pixel_..." of `Copying`, each
        with its floor and numbers of images.
    """
    flip, seed = config.data.horizontal_flip, config.eval.seed
    train, test = dataset.train, dataset.test
    classifier = cached_classifier(
        train,
        num_classes=len(config.data.classes),
        horizontal_flip=flip,
        seed=seed,
        device=device,
        cache_dir=Path(config.data.cache_dir),
    )
    found: dict[str, float] = {
        "num_generated_images": len(generated),
        "class_agreement": accuracy(classifier, generated.images, generated.labels),
        "chance_agreement": chance_agreement(generated.labels),
    }
    if torch.isin(test.labels, generated.labels).any():
        found["classifier_test_accuracy"] = balanced_accuracy(
            classifier, test.images, test.labels, like=generated.labels
        )
    if len(generated) >= 2 and len(train) >= 4:
        place = noise_position(
            generated.images, train.images, test.images, seed=seed, device=device
        )
        found |= {
            "noise_position": place.generated,
            "floor_noise_position": place.real,
            "num_noise_position_real": place.n_real,
        }
    if len(test) > 0:
        order = torch.randperm(len(test), generator=torch_generator(seed, Stream.METRICS, 8))
        held_out = test.subset(order[:MOST_SEARCHED])
        searched = Dataset(train, held_out)
        copies = pixel_copying(generated, searched, horizontal_flip=flip, device=device)
        found |= {f"pixel_{name}": value for name, value in copies._asdict().items()}
        found["num_held_out_searched"] = len(held_out)
    return found


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
