"""What the clients of a run do besides training: the half of `strategy` that is theirs."""

from dataclasses import dataclass, replace

from task.config import Config, StrategyConfig
from task.training.algorithms.feddyn import DynamicRegularizer
from task.training.algorithms.fedprox import ProximalPull
from task.training.algorithms.moments import CarriedMoments
from task.training.algorithms.names import LINEAR_TERM, MOMENTS, OWN_CONTROL, OWN_MOMENTS
from task.training.algorithms.scaffold import ControlVariate
from task.training.loop import Callback


@dataclass(frozen=True)
class ClientAlgorithm:
    """A client's half of a federated algorithm, for one round.

    Attributes:
        callbacks: of `fit`.
        sent: names of the tensors that go to the server, of those that callbacks leave.
        kept: names of those that the client's next round begins with.
        needs_place: whether a client that can keep nothing may not take part.
    """

    callbacks: tuple[Callback, ...] = ()
    sent: tuple[str, ...] = ()
    kept: tuple[str, ...] = ()
    needs_place: bool = False


def client_algorithm(config: Config) -> ClientAlgorithm:
    """Make the clients' half of the strategy of a run, with what `train.optimizer_state` adds."""
    algorithm = _of_strategy(config.strategy)
    if config.train.optimizer_state == "new":
        return algorithm
    averages = config.train.optimizer_state == "averaged"
    kept = (MOMENTS,) * (not averages) + (OWN_MOMENTS,) * bool(config.federation.local)
    return replace(
        algorithm,
        callbacks=(*algorithm.callbacks, CarriedMoments()),
        sent=(*algorithm.sent, *(MOMENTS,) * averages),
        kept=(*algorithm.kept, *kept),
    )


def _of_strategy(strategy: StrategyConfig) -> ClientAlgorithm:
    match strategy.name:
        case "fedprox":
            return ClientAlgorithm((ProximalPull(float(strategy.proximal_mu or 0)),))
        case "scaffold":
            return ClientAlgorithm((ControlVariate(),), sent=(OWN_CONTROL,), kept=(OWN_CONTROL,))
        case "feddyn":
            regularizer = DynamicRegularizer(float(strategy.alpha or 0))
            return ClientAlgorithm((regularizer,), kept=(LINEAR_TERM,), needs_place=True)
        case _:
            return ClientAlgorithm()
