"""What a run of `feddm-train` is going to do, and about how long, told before it starts."""

from collections.abc import Iterator

import numpy as np

from server_app.dataset import check_privacy, described_range
from server_app.launch.time_estimate import estimate_seconds
from task.config import OWN_IMAGES, Config
from task.data import Dataset
from task.data.partition import partition_dataset
from task.progress import duration
from task.reporting.warning_signs import UNTRAINED
from task.runs.commands import resuming_command
from task.runs.layout import last_complete_round, run_path
from task.runs.run import Run
from task.training.private import described_privacy, epsilon_after, spending_of


def describe_plan(config: Config, dataset: Dataset) -> Iterator[str]:
    """Say in plain words what a run will train on, how long, and about how much time it takes.

    Args:
        config: of the run, which is about to start or to go on.
        dataset: all images.
    """
    train, rounds = config.train, config.federation.rounds
    yield described_images(config, dataset)
    sizes, partition = np.array([len(dataset.train)]), None
    if train.mode == "federated":
        partition = partition_dataset(config, dataset, config.federation.num_supernodes)
        sizes = partition.counts.sum(1)
        yield (
            f"hospitals: {len(sizes)} simulated, with {described_range(sizes)} training images "
            f"{'each' if len(sizes) > 1 else ''}".rstrip()
        )
    check_privacy(config, dataset, partition)
    where = " at a hospital" * (train.mode == "federated")
    if config.privacy.is_on:
        spent = spending_of(config, rounds=rounds)
        yield (
            f"training: {rounds} rounds, {spent.steps} steps{where}, each on about "
            f"{spent.sampling_rate:.0%} of its patients"
        )
    else:
        images_per_step = train.trained_batch_size * train.accumulation
        steps = rounds * train.local_epochs * np.ceil(sizes / images_per_step).astype(int)
        yield (
            f"training: {rounds} rounds of {train.local_epochs} epochs in batches of "
            f"{images_per_step}, {described_range(steps)} steps{where}"
        )
    if config.privacy.unit:
        yield f"privacy: {described_privacy(config, epsilon_after(config, rounds))}"
    done = last_complete_round(run_path(config))
    if done < rounds:
        estimate = estimate_seconds(config, sizes.tolist(), rounds=range(done + 1, rounds + 1))
        yield (
            f"time: about {duration(estimate.total)} on this machine, as a few timed steps have "
            f"it ({duration(estimate.training)} to train, {duration(estimate.drawing)} to draw "
            "images; starting and measuring come on top)"
        )
        patience, per_round = config.federation.round_timeout, estimate.training / (rounds - done)
        if train.mode == "federated" and per_round > patience / 2:
            yield (
                f"warning: a round takes about {duration(per_round)}, and is over after "
                f"federation.round_timeout={patience:g} seconds; give more, or a smaller "
                "train.local_epochs"
            )


def how_to_train_on(config: Config) -> str:
    """Say of a finished run how to train longer, and whether its images need it."""
    longer = config.changed({"federation.rounds": 2 * config.federation.rounds})
    command = resuming_command(longer, run_path(config))
    found = Run(run_path(config)).records.value("noise_position")
    said = "if the images are not clear enough"
    if found is not None and found >= UNTRAINED:
        said = (
            f"the images look untrained, {found:.2f} of the way from real ones to noise: more "
            "training is needed"
        )
    return f"{said}: {command}"


def described_images(config: Config, dataset: Dataset) -> str:
    """Say how many images of each class there are, and how they are split."""
    data, classes = config.data, config.data.classes
    train, test = (
        images.labels.bincount(minlength=len(classes)).tolist()
        for images in (dataset.train, dataset.test)
    )
    per_class = ", ".join(
        f"{name} {kept + held_out:,}"
        for name, kept, held_out in zip(classes, train, test, strict=True)
    )
    color = "gray" if data.channels == 1 else "color"
    some = dataset.train.images[:1000]
    if data.name in OWN_IMAGES and data.channels == 3 and bool((some == some[:, :1]).all()):
        color = "color, although they are gray (data.channels=1 keeps them so)"
    return (
        f"images: {sum(train) + sum(test):,}, seen as {data.image_size}x{data.image_size} {color} "
        f"({per_class}); {sum(train):,} to train on, {sum(test):,} held out to test"
    )
