"""What a client needs for every message: its images, the model, the objective."""

import dataclasses
import json
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import torch
from flwr.app import ConfigRecord, Context

from task.config import Config, anchored, load_run_config
from task.data import Dataset, ImageSet, build_dataset, split_validation
from task.diffusion import DiffusionObjective, build_objective
from task.parallel import count_processes
from task.partition import Partition, partition_dataset
from task.randomness import Stream, numpy_generator
from task.train import (
    compile_where_wanted,
    configure_torch,
    fastest_precision,
    keep_freed_memory,
    select_device,
)
from task.unet import UNet, build_unet
from task.wire import Key, WeightLayout

logger = logging.getLogger("feddm.client")


@dataclass(frozen=True)
class Workspace:
    """The parts of a run that a process builds once and uses for all of its messages.

    Attributes:
        config: of the run, with the node's own data folder.
        device: where it trains.
        num_processes: that train together.
        model: its weights are replaced with every message.
        layout: of the packed weights.
        objective: the loss of a batch.
        dataset: every image that this machine holds.
        partition: how a simulation deals them out; None on a real node, whose images are its own.
    """

    config: Config
    device: torch.device
    num_processes: int
    model: UNet
    layout: WeightLayout
    objective: DiffusionObjective
    dataset: Dataset
    partition: Partition | None

    def images(self, context: Context) -> tuple[ImageSet, ImageSet]:
        """Return the training and the held-out images of the client that the context is of."""
        if self.partition is None:
            train = self.dataset.train
            kept, held_out = split_validation(
                train.labels.numpy(),
                self.config.data.val_fraction,
                generator=numpy_generator(self.config.seed, Stream.HOLD_OUT),
                groups=None if train.groups is None else train.groups.numpy(),
            )
            return train.subset(kept), train.subset(held_out)
        share = int(context.node_config[Key.PARTITION_ID])
        return (
            self.dataset.train.subset(self.partition.train_indices[share]),
            self.dataset.test.subset(self.partition.test_indices[share]),
        )


def open_workspace(context: Context) -> Workspace:
    """Build the workspace of a run, or return the one that this process has built already."""
    num_partitions = context.node_config.get(Key.NUM_PARTITIONS)
    data_path = context.node_config.get("data-path")
    return _build_workspace(
        json.dumps(dict(context.run_config), sort_keys=True),
        None if num_partitions is None else int(num_partitions),
        None if data_path is None else str(data_path),
    )


@lru_cache(maxsize=1)
def _build_workspace(
    run_config: str, num_partitions: int | None, data_path: str | None
) -> Workspace:
    given: Mapping[str, str | int | float | bool] = json.loads(run_config)
    config = load_run_config(given)
    if num_partitions is None:
        config = with_own_data(config, data_path)
    keep_freed_memory()
    configure_torch(num_threads=config.train.num_threads, deterministic=config.train.deterministic)
    dataset = build_dataset(config, download=num_partitions is not None)
    device = select_device(config.train.device)
    model = build_unet(config)
    deterministic = config.train.deterministic
    compile_where_wanted(model, config.train.compile, device, deterministic=deterministic)
    num_processes = count_processes(
        config.train.num_processes, device, one_per_gpu=num_partitions is None
    )
    logger.info("trains on %s in %d processes", device, num_processes)
    return Workspace(
        config=config,
        device=device,
        num_processes=num_processes,
        model=model,
        layout=WeightLayout.of(model),
        objective=build_objective(config),
        dataset=dataset,
        partition=None
        if num_partitions is None
        else partition_dataset(config, dataset, num_partitions),
    )


def with_own_data(config: Config, data_path: str | None) -> Config:
    """Point the configuration of a real node to its own images.

    Raises:
        ValueError: the node was started without saying where they are.
    """
    if data_path is None:
        if config.data.name == "digits":
            return config
        raise ValueError(
            "a node needs its own images: start it with --node-config 'data-path=\"/folder\"'"
        )
    data = dataclasses.replace(config.data, root=data_path)
    return anchored(dataclasses.replace(config, data=data), Path.home())


def choose_precision(workspace: Workspace, context: Context, requested: str) -> str:
    """Return the precision to train in; "auto" is timed once and kept while the node runs."""
    if requested != "auto":
        return requested
    if Key.PRECISION not in context.state.config_records:
        timed = fastest_precision(workspace.config, workspace.model, workspace.device)
        context.state[Key.PRECISION] = ConfigRecord({Key.PRECISION: timed})
    return str(context.state.config_records[Key.PRECISION][Key.PRECISION])
