"""The images of a run that has them all on its own machine: loaded, and described in its folder."""

import dataclasses

import numpy as np

from server_app.log import log
from task.config import Config
from task.data import Dataset, build_dataset, count_across_clients, take_inventory
from task.data.partition import Partition
from task.data.source import describe_source, hash_images
from task.reporting.heat_maps import save_partition_heatmaps
from task.runs.layout import DATA_FILE, PARTITION_FILE
from task.runs.same_images import describe_differences
from task.runs.writer import RunWriter
from task.training.client_privacy import check_clients
from task.training.private import check_patients


def load_images(config: Config) -> Dataset:
    """Load the data set of a run that has all images on this machine.

    Raises:
        FileNotFoundError: the data set is not there.
        ValueError: it does not fit the configuration.
    """
    dataset = build_dataset(config, download=True)
    present = set(dataset.train.labels.tolist())
    missing = [name for label, name in enumerate(config.data.classes) if label not in present]
    if missing:
        inventory = take_inventory(config, dataset)
        raise ValueError(
            f"data.classes must be only classes that have training images, got also {missing}; "
            f"{inventory.describe_missing(missing)}; name others, or move folders without images "
            "out of data.root"
        )
    return dataset


def record_data(
    config: Config, dataset: Dataset, directory: RunWriter, partition: Partition | None
) -> None:
    """Write down and say which files are used, which left out, and which images are the same.

    Beside it stand where the images are from, and their hashes, by which a resumed run knows them.

    Args:
        config: of the run.
        dataset: of `load_images`.
        directory: of the run.
        partition: of the clients; None: nothing is dealt out.

    Raises:
        ValueError: a resumed run was trained on others, or split them otherwise.
    """
    different = describe_differences(directory.path, dataset) if config.resume else ""
    if different:
        raise ValueError(f"resume: data.root={config.data.root} holds {different}")
    inventory = take_inventory(config, dataset)
    if partition is not None:
        shared = count_across_clients(dataset.train, partition.train_indices)
        inventory = dataclasses.replace(inventory, across_clients=shared)
    told = {"source": describe_source(config.data), "sha256": hash_images(dataset)}
    directory.write_json(DATA_FILE, {**inventory.as_json(), **told})
    for line in inventory.describe():
        log(f"data: {line}")


def record_partition(config: Config, partition: Partition, directory: RunWriter) -> None:
    """Write down how many images of each class each client holds, and draw it.

    Raises:
        ValueError: a resumed run was dealt otherwise.
    """
    described = partition.describe()
    stored = directory.read_json(PARTITION_FILE) if config.resume else None
    if stored is not None and stored != described:
        raise ValueError(
            f"resume: {directory.path} dealt its images to {stored['num_clients']} clients in "
            f"another way than this federation of {config.federation.num_supernodes} does; start "
            "it with as many hospitals and the same data"
        )
    directory.write_json(PARTITION_FILE, described)
    beta = config.partition.beta
    title = f"{config.data.name}, {'given counts' if beta is None else f'beta={beta:g}'}"
    save_partition_heatmaps(
        {title: partition.counts}, directory.path / "partition.png", classes=config.data.classes
    )
    sizes = partition.counts.sum(1)
    log(f"{sizes.sum():,} training images, {described_range(sizes)} at a hospital")


def check_privacy(config: Config, dataset: Dataset, partition: Partition | None) -> None:
    """Check that a private run suits every share of the images.

    Args:
        config: of the run.
        dataset: all images.
        partition: of the clients; None: nothing is dealt out.

    Raises:
        ValueError: it does not suit one; see `check_patients`.
    """
    if partition is not None:
        check_clients(len(partition.train_indices), config)
    if not config.privacy.is_on:
        return
    train = dataset.train
    shares = [train] if partition is None else map(train.subset, partition.train_indices)
    for share in shares:
        check_patients(share.num_patients, config)


def described_range(numbers: np.ndarray) -> str:
    """Write the smallest and the largest of some numbers."""
    least, most = int(numbers.min()), int(numbers.max())
    return f"{least:,}" if least == most else f"{least:,} to {most:,}"
