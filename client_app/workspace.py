"""What a client needs for every message: its images and the generator."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache

import torch
from flwr.app import ConfigRecord, Context

from client_app.log import logger
from task.config import Config, compose_run_config, load_run_config
from task.data import Dataset, ImageSet, build_dataset, take_inventory
from task.data.partition import Partition, partition_dataset
from task.generators.base import Generator
from task.generators.registry import initial_generator
from task.protocol.node import (
    NodeConfig,
    check_budget,
    check_peers,
    own_config,
    own_images,
    read_node_config,
)
from task.protocol.wire import Key, WeightLayout
from task.training.devices import (
    compile_where_wanted,
    configure_torch,
    keep_freed_memory,
    select_device,
)
from task.training.distributed import count_processes
from task.training.precision import fastest_precision

# The name of an empty record of the node's own state.
INVENTORY_SAID = "inventory-said"

RunConfig = Mapping[str, str | int | float | bool]


@dataclass(frozen=True)
class Workspace:
    """The parts of a run that a process builds once and uses for all of its messages.

    Attributes:
        config: of the run, with the node's own data folder and the paths of its machine.
        run_config: of the run, as the server says it to a real node.
        device: where it trains.
        num_processes: that train together.
        generator: its weights are replaced with every message.
        layout: of the packed weights.
        personal: of the parts that `federation.local` keeps here.
        dataset: every image that this machine holds.
        node: what a real node was started with; None in a simulation.
        partition: how a simulation deals the images out; None on a real node, whose images are
            its own.
    """

    config: Config
    run_config: Config
    device: torch.device
    num_processes: int
    generator: Generator
    layout: WeightLayout
    personal: WeightLayout
    dataset: Dataset
    node: NodeConfig | None
    partition: Partition | None

    def images(self, context: Context) -> tuple[ImageSet, ImageSet]:
        """Return the training and the held-out images of the client that the context is of."""
        if self.partition is None:
            own = own_images(self.config, self.dataset)
            say_once(context, self.config, own)
            return own.train, own.test
        share = int(context.node_config[Key.PARTITION_ID])
        return (
            self.dataset.train.subset(self.partition.train_indices[share]),
            self.dataset.test.subset(self.partition.test_indices[share]),
        )


def say_once(context: Context, config: Config, own: Dataset) -> None:
    """Log what became of a node's files and which images are the same, unless that was done."""
    if INVENTORY_SAID not in context.state.config_records:
        context.state[INVENTORY_SAID] = ConfigRecord()
        for line in take_inventory(config, own).describe():
            logger.info("data: %s", line)


def open_workspace(context: Context) -> Workspace:
    """Build the workspace of a run, or return the one that this process has built already."""
    place = read_node_config(context.node_config)
    if isinstance(place, NodeConfig):
        return _build_workspace(_written(named_run(context)), place, None)
    return _build_workspace(_written(context.run_config), None, place.shares)


def named_run(context: Context) -> RunConfig:
    """Return the run config on a real node, with a name for a run that was given none.

    The name that `conf/` makes of the time of day would be another one in every process.
    """
    name = context.run_config.get("run_name") or f"run-{context.run_id}"
    return {**context.run_config, "run_name": name}


def _written(run_config: RunConfig) -> str:
    return json.dumps(dict(run_config), sort_keys=True)


@lru_cache(maxsize=1)
def _build_workspace(
    run_config: str, node: NodeConfig | None, num_partitions: int | None
) -> Workspace:
    given: RunConfig = json.loads(run_config)
    if node is None:
        said = config = load_run_config(given, has_images=True)
    else:
        said = compose_run_config(given)
        config = own_config(said, node)
        # Before any message is answered, whatever it asks.
        check_peers(config, node)
        check_budget(config, node)
    keep_freed_memory()
    configure_torch(num_threads=config.train.num_threads, deterministic=config.train.deterministic)
    dataset = build_dataset(config, download=node is None)
    device = select_device(config.train.device)
    generator = initial_generator(config)
    deterministic = config.train.deterministic
    compile_where_wanted(generator, config.train.compile, device, deterministic=deterministic)
    return Workspace(
        config=config,
        run_config=said,
        device=device,
        num_processes=count_processes(
            1 if config.privacy.is_on else config.train.num_processes,
            device,
            one_per_gpu=node is not None,
        ),
        generator=generator,
        layout=WeightLayout.of(generator, generator.local | generator.frozen),
        personal=WeightLayout.only(generator, generator.beginnings(generator.kept_parts)),
        dataset=dataset,
        node=node,
        partition=None
        if num_partitions is None
        else partition_dataset(config, dataset, num_partitions),
    )


def choose_precision(workspace: Workspace, context: Context, requested: str) -> str:
    """Return the precision to train in; "auto" is timed once and kept while the node runs."""
    if requested != "auto":
        return requested
    if Key.PRECISION not in context.state.config_records:
        timed = fastest_precision(workspace.config, workspace.generator, workspace.device)
        context.state[Key.PRECISION] = ConfigRecord({Key.PRECISION: timed})
    return str(context.state.config_records[Key.PRECISION][Key.PRECISION])
