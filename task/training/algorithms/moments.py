"""Moments of local optimizers that outlast a round: `train.optimizer_state`."""

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from task.config import Config
from task.generators.base import Generator
from task.training.algorithms.names import MOMENTS
from task.training.algorithms.parameters import parameters_of, trained_parameters
from task.training.loop import Callback, Optimizers

# What optimizers end the names of means of squares with.
SQUARED = "_sq"


class CarriedMoments(Callback):
    """Begins with the moments that a round before has left, and leaves those after this one.

    They are those of the parameters that travel, flat. Of a mean of squares it is the root, which
    is of the size of a gradient: a mean over clients in fixed point keeps its digits. Without any
    moments the optimizers begin anew.
    """

    def start(
        self, generator: Generator, optimizers: Optimizers, received: Mapping[str, Tensor]
    ) -> None:
        """Give the optimizers the moments.

        Raises:
            RuntimeError: they are of another model.
        """
        self._parameters, self._optimizers = trained_parameters(generator, optimizers), optimizers
        if MOMENTS in received:
            self._load(received[MOMENTS])

    @torch.no_grad()
    def finish(self) -> Mapping[str, Tensor]:
        """Return the moments."""
        pieces = [torch.zeros(0)]
        for optimizer, parameter, names in self._moved():
            for name in names:
                value = optimizer.state[parameter].get(name)
                if value is None:  # it has taken no step
                    value = torch.zeros(() if name == "step" else parameter.shape)
                value = value.sqrt() if name.endswith(SQUARED) else value
                pieces.append(value.detach().float().reshape(-1).cpu())
        return {MOMENTS: torch.cat(pieces)}

    def _moved(self) -> Iterator[tuple[Optimizer, nn.Parameter, list[str]]]:
        """Yield what each optimizer moves of what travels, and what it gathers of it."""
        travels = {id(each) for each in self._parameters.values()}
        for optimizer in self._optimizers.values():
            gathered = optimizer.state.values()
            tensors = {n for each in gathered for n, v in each.items() if isinstance(v, Tensor)}
            for parameter in parameters_of(optimizer):
                if id(parameter) in travels:
                    yield optimizer, parameter, sorted(tensors)

    @torch.no_grad()
    def _load(self, flat: Tensor) -> None:
        _take_empty_steps(self._optimizers)
        for optimizer, parameter, names in self._moved():
            state = optimizer.state[parameter]
            for name in names:
                piece, flat = flat.tensor_split([state[name].numel()])
                piece = piece.square() if name.endswith(SQUARED) else piece
                state[name].copy_(piece.view(state[name].shape))
        if flat.numel() > 0:
            raise RuntimeError(f"{flat.numel()} moments more than the optimizers have")


def _take_empty_steps(optimizers: Optimizers) -> None:
    """Let new optimizers make room for what they gather, without moving anything."""
    for optimizer in optimizers.values():
        kept = [(each, each.detach().clone(), each.grad) for each in parameters_of(optimizer)]
        for parameter, _, _ in kept:
            parameter.grad = torch.zeros_like(parameter)
        optimizer.step()
        for parameter, value, gradient in kept:
            parameter.data.copy_(value)  # which weight decay has moved
            parameter.grad = gradient


def averaged_beside(config: Config, generator: Generator, optimizers: Optimizers) -> dict[str, int]:
    """Return how many values the server averages beside the weights, by name.

    Args:
        config: of the run.
        generator: of the run; its weights stay as they are.
        optimizers: of it, new ones, which are of no use afterwards.
    """
    if config.train.optimizer_state != "averaged":
        return {}
    moments = CarriedMoments()
    moments.start(generator, optimizers, {})
    _take_empty_steps(optimizers)
    return {name: tensor.numel() for name, tensor in moments.finish().items()}
