"""Which strategy a run has, and which reducer."""

from collections.abc import Callable, Collection, Mapping
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor
from torch.optim import Optimizer

from server_app.feddyn import FedDyn
from server_app.scaffold import Scaffold
from server_app.server_optimizers import server_optimizer_of
from server_app.strategies import (
    BoundedMean,
    OverUpdates,
    Reducer,
    Strategy,
    WeightedMean,
    plain_mean,
    select_by_krum,
)
from server_app.weighting import Weighting
from task.config import Config
from task.protocol.secure_aggregation.fixed_point import UpdateFormat
from task.protocol.wire import WeightLayout
from task.protocol.wire_format import wire_format
from task.training.client_privacy import ClientPrivacy

NewReducer = Callable[[NDArray[np.floating], int], Reducer]


def build_strategy(
    config: Config,
    layout: WeightLayout,
    weighting: Weighting,
    *,
    trained: Collection[str] | None = None,
    server_optimizer: Callable[[list[Tensor]], Optimizer] | None = None,
    averaged: Mapping[str, int] | None = None,
) -> Strategy:
    """Build the strategy of a run, with the reducer that `federation.aggregation` names.

    Args:
        config: of the run.
        layout: see `Strategy`.
        weighting: of clients.
        trained: see `Strategy`.
        server_optimizer: that takes the place of the strategy's own, and moves all that travels.
        averaged: see `Strategy`.

    Raises:
        ValueError: it names none.
    """
    options: dict[str, Any] = {
        "wire": wire_format(layout, config.federation.wire_dtype),
        "ema_decay": config.federation.ema_decay,
        "server_optimizer": server_optimizer,
        "privacy": ClientPrivacy.of(config),
        "averaged": averaged,
    }
    if server_optimizer is None:
        options |= {"trained": trained, "server_optimizer": server_optimizer_of(config.strategy)}
    new_reducer = choose_reducer(config, weighting)
    if config.strategy.name == "scaffold":
        return Scaffold(layout, new_reducer, **options)
    if config.strategy.name == "feddyn":
        return FedDyn(layout, new_reducer, alpha=float(config.strategy.alpha or 0), **options)
    return Strategy(layout, new_reducer, **options)


def choose_reducer(config: Config, weighting: Weighting) -> NewReducer:
    """Return what makes the reducer of each round; see `Strategy`.

    Raises:
        ValueError: `federation.aggregation` names none.
    """
    federation = config.federation
    from scipy.stats import trim_mean  # takes a second to import

    krum = partial(
        select_by_krum, num_malicious=federation.num_malicious, num_selected=federation.num_selected
    )
    # Median and trimmed mean: Yin et al. 2018 (arXiv 1803.01498).
    trimmed_mean = partial(trim_mean, proportiontocut=federation.trim_fraction)

    def bounded_mean(sent: NDArray[np.floating], num_clients: int) -> BoundedMean:
        return BoundedMean(sent, UpdateFormat.of(config, num_clients))

    def over_updates(**options: Any) -> NewReducer:
        return lambda sent, _: OverUpdates(sent, **options)

    new_reducer: dict[str, NewReducer] = {
        "fedavg": lambda _, __: WeightedMean(weighting),
        "bounded_mean": bounded_mean,
        "median": over_updates(statistic=partial(np.median, axis=0)),
        "trimmed_mean": over_updates(statistic=trimmed_mean),
        "krum": over_updates(statistic=plain_mean, select=krum),
    }
    if federation.secure_aggregation:
        new_reducer["fedavg"] = bounded_mean
    if federation.aggregation not in new_reducer:
        raise ValueError(f"federation.aggregation: no such aggregation: {federation.aggregation}")
    return new_reducer[federation.aggregation]
