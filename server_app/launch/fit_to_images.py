"""What `feddm-train` chooses for a user's own images: hospitals, and epochs of a round."""

import math
from collections.abc import Collection

from task.config import FITTED_VALUES, OWN_IMAGES, Config, flat_values
from task.runs.layout import is_begun, run_config, run_path

# Hospitals that share the steps of a round; where there are more, each would take too few.
SHARED_BY = 4


def as_begun(config: Config, given: Collection[str]) -> Config:
    """Let a run that is resumed keep what was chosen when it began.

    Args:
        config: of the run, with absolute folders.
        given: dotted paths of the values that were asked for, which stay as they are.

    Raises:
        ValueError: what it began with cannot be read.
    """
    path = run_path(config)
    if config.data.name not in OWN_IMAGES or not config.resume or not is_begun(path):
        return config
    begun = flat_values(run_config(path))
    return config.changed({name: begun[name] for name in FITTED_VALUES if name not in given})


def fit_to_images(config: Config, given: Collection[str]) -> Config:
    """Choose how many hospitals share a user's own images, and how many epochs a round has.

    There are as many hospitals as have `federation.images_per_client` training images each, one
    at least, `federation.num_supernodes` at most, and no more than known patients. Up to
    `SHARED_BY` of them share the `train.steps_per_round` of a round, so that a run takes about the
    same time for few images. Other data sets, and a run that is resumed, stay as they are.

    Args:
        config: of the run, with absolute folders.
        given: dotted paths of the values that were asked for, which stay as they are.

    Raises:
        FileNotFoundError: there are no images.
        ValueError: they do not fit the configuration.
    """
    if config.data.name not in OWN_IMAGES or config.resume:
        return config
    # Imported here because it takes torch, without which wrong words are answered at once.
    from task.data import list_dataset

    train, _ = list_dataset(config)
    num_images = len(train)
    if "federation.num_supernodes" not in given:
        num_clients = fitting_clients(config, num_images)
        if train.groups is not None:  # whole patients are dealt out
            num_clients = min(num_clients, len(set(train.groups.tolist())))
        config = config.changed({"federation.num_supernodes": num_clients})
    if "train.local_epochs" not in given:
        shares = config.federation.num_supernodes if config.train.mode == "federated" else 1
        num_epochs = fitting_epochs(config, num_images, shares)
        config = config.changed({"train.local_epochs": num_epochs})
    return config


def fitting_clients(config: Config, num_images: int) -> int:
    """Return how many hospitals so many training images are enough for."""
    federation = config.federation
    if config.partition.counts is not None:
        return len(config.partition.counts)
    if federation.images_per_client is None:
        return federation.num_supernodes
    # What else was asked for needs so many.
    least = max(
        federation.clients_per_round or 1,
        federation.min_nodes,
        federation.min_replies,
        *(client + 1 for client in federation.keep_local_models),
    )
    most = federation.num_supernodes
    return min(max(num_images // federation.images_per_client, least), most)


def fitting_epochs(config: Config, num_images: int, shares: int) -> int:
    """Return how many epochs make a share of so many images take its part of a round's steps."""
    train = config.train
    if train.steps_per_round is None:
        return train.local_epochs
    steps = train.steps_per_round / min(shares, SHARED_BY)
    images_per_step = train.batch_size * train.accumulation
    return max(1, round(steps / math.ceil(num_images / shares / images_per_step)))
