"""`feddm evaluate`: images from a run's final weights, measured beside real ones."""

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

from task.config import Config, changed_config, settle_extractor, value_paths
from task.data import Dataset, build_dataset
from task.evaluation.evaluate import evaluate_images
from task.evaluation.features import automatic_extractor, build_extractor
from task.files import write_json
from task.generation.draw_images import draw_images, full_labels
from task.randomness import Stream
from task.reporting.metric_table import caption, format_table
from task.runs.evaluations import Evaluation, drawn_otherwise, evaluation_file
from task.runs.layout import run_config
from task.runs.run import final_model
from task.runs.same_images import SPLIT, describe_differences
from task.training.devices import select_device


def evaluation_config(
    run: Path, overrides: Iterable[str], options: Mapping[str, object | None]
) -> Config:
    """Read the configuration of a run, with what is to be measured otherwise.

    Args:
        run: its folder.
        overrides: `name=value`, of values that say how to draw and measure, not what was trained.
        options: by name as well; None leaves a value as it is. They win over `overrides`.

    Returns:
        The configuration with absolute paths; new relative ones count from the working directory.

    Raises:
        ValueError: there is no run, or a name or value is wrong.
    """
    config = run_config(run)
    names = _measuring_values(config)
    config = changed_config(config, overrides, options=options, names=names)
    return settle_extractor(config, automatic_extractor(config))


def _measuring_values(config: Config) -> set[str]:
    used = {"extractor", "image_range", "batch_size", "precision", "num_per_class", "seed"}
    used |= {"inception_weights", "exported_program"}
    return {path for path in value_paths() if path.removeprefix("eval.") in used} | {
        "data.root",
        "data.patients",
        "data.cache_dir",
        "train.device",
        *config.drawing_values,
    }


def evaluate_run(run: Path, config: Config, *, say: Callable[[str], object]) -> Evaluation:
    """Draw images from the final weights of a run, measure them, and keep what was found.

    Args:
        run: the folder of the run; `evaluation-<extractor>-<image_range>.json` is written there,
            with another ending where the images are drawn otherwise than the run draws, or the
            seed is another.
        config: see `evaluation_config`.
        say: takes the text for the reader.

    Raises:
        FileNotFoundError: files of the data set or of the extractor are missing.
        ValueError: there are no final weights, or they do not fit, or there are too few images, or
            the images are split otherwise than in training.
    """
    device = select_device(config.train.device)
    model, last = final_model(run, config)
    dataset = build_dataset(config, download=True)
    check_same_images(run, config, dataset, say=say)
    # Before the images, which may take hours: its files may be missing.
    extractor = build_extractor(config, dataset.train, device)
    labels = full_labels(config, dataset)
    say(f"drawing {len(labels):,} images on {device}")
    images = draw_images(config, model, labels, device=device, stream=Stream.EVALUATED_IMAGES)
    say("measuring them")
    found = evaluate_images(config, images, dataset, extractor=extractor, server_round=last)
    otherwise = drawn_otherwise(run, config)
    title = f"{run.resolve().name}, round {last} of {config.federation.rounds}"
    title += f", drawn with {otherwise}" if otherwise else ""
    say(f"\n{title}\n\n{format_table(found)}\n")
    counts = sorted(set(labels.bincount().tolist()))
    say("\n".join(f"- {line}" for line in caption(found, counts)))
    file = evaluation_file(run, config, otherwise)
    write_json(file, found.content())
    say(f"\nwritten to {file}")
    return found


def check_same_images(
    run: Path, config: Config, dataset: Dataset, *, say: Callable[[str], object]
) -> None:
    """Warn where a run is measured on other images than its own.

    Raises:
        ValueError: its own are split otherwise, so that it may be tested on what it was trained on.
    """
    different = describe_differences(run, dataset)
    if different == SPLIT:
        raise ValueError(f"data.root={config.data.root} holds {different}")
    if different:
        say(
            f"WARNING: data.root={config.data.root} holds {different}; test images may be among "
            "those that it was trained on"
        )
