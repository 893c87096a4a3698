"""Moments of local optimizers that outlast a round: `train.optimizer_state`."""

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor
from torch.optim import Optimizer

from task.checks import require
from task.config import Config
from task.generators.base import Generator
from task.training.algorithms.names import MOMENTS, OWN_MOMENTS
from task.training.algorithms.parameters import parameters_of, trained_parameters
from task.training.loop import Callback, Optimizers
from task.training.optimizer_state import load_optimizer_tensors, optimizer_tensors

# Of steps, so that those of a long run are no larger than weights may be.
STEP_UNIT = 2.0**16


class CarriedMoments(Callback):
    """Begins with the moments that a round before has left, and leaves those after this one.

    There are those of the parameters that travel, and those of the parameters that stay, each flat:
    of every parameter its steps in `STEP_UNIT`, the mean gradient, and the root of the mean square.
    The root is of the size of a gradient, so that a mean over clients in fixed point keeps its
    digits. A parameter that has taken no step begins anew.
    """

    def start(
        self, generator: Generator, optimizers: Optimizers, received: Mapping[str, Tensor]
    ) -> None:
        """Give the optimizers the moments.

        Raises:
            RuntimeError: they are of another model.
            ValueError: an optimizer is no Adam.
        """
        self._places = {
            MOMENTS: [*_places(generator, optimizers, staying=False)],
            OWN_MOMENTS: [*_places(generator, optimizers, staying=True)],
        }
        for name in self._places.keys() & received.keys():
            self._load(self._places[name], received[name])

    @torch.no_grad()
    def finish(self) -> Mapping[str, Tensor]:
        """Return the moments."""
        return {name: self._joined(places) for name, places in self._places.items()}

    def _joined(self, places: list[tuple[Optimizer, int]]) -> Tensor:
        pieces = [torch.zeros(0)]
        for optimizer, number in places:
            parameter = parameters_of(optimizer)[number]
            gathered = optimizer.state.get(parameter) or {
                "step": torch.zeros(1),
                **dict.fromkeys(("exp_avg", "exp_avg_sq"), torch.zeros_like(parameter)),
            }
            steps, squares = gathered["step"] / STEP_UNIT, gathered["exp_avg_sq"]
            for each in (steps, gathered["exp_avg"], squares.sqrt()):
                pieces.append(each.detach().reshape(-1).cpu())
        return torch.cat(pieces)

    @torch.no_grad()
    def _load(self, places: list[tuple[Optimizer, int]], flat: Tensor) -> None:
        sizes = [_size(*place) for place in places] or [0]
        tensors = {optimizer: optimizer_tensors(optimizer) for optimizer, _ in places}
        for (optimizer, number), piece in zip(places, torch.split(flat, sizes), strict=False):
            shape = parameters_of(optimizer)[number].shape
            steps = piece[0] * STEP_UNIT
            if steps > 0:
                mean, root = piece[1:].view(2, *shape)
                found = {"step": steps, "exp_avg": mean, "exp_avg_sq": root.square()}
                tensors[optimizer] |= {f"{number}.{name}": each for name, each in found.items()}
        for optimizer, each in tensors.items():
            load_optimizer_tensors(optimizer, each)


def _size(optimizer: Optimizer, number: int) -> int:
    return 1 + 2 * parameters_of(optimizer)[number].numel()


def _places(
    generator: Generator, optimizers: Optimizers, *, staying: bool
) -> Iterator[tuple[Optimizer, int]]:
    """Yield what optimizers move of what travels, or of what stays, by its number in each.

    Not those whose whole state stays anyway, see `Generator.local_optimizers`.
    """
    travelling = {id(each) for each in trained_parameters(generator, optimizers).values()}
    for name, optimizer in optimizers.items():
        require(
            isinstance(optimizer, torch.optim.Adam | torch.optim.AdamW),
            "train.optimizer_state",
            f"new with a {generator.title}, whose optimizer {name} is no Adam",
            type(optimizer).__name__,
        )
        for number, parameter in enumerate(parameters_of(optimizer)):
            travels = id(parameter) in travelling
            if travels != staying and (travels or name not in generator.local_optimizers):
                yield optimizer, number


def averaged_beside(config: Config, generator: Generator, optimizers: Optimizers) -> dict[str, int]:
    """Return how many values the server averages beside the weights, by name.

    Args:
        config: of the run.
        generator: of the run.
        optimizers: of it.
    """
    if config.train.optimizer_state != "averaged":
        return {}
    return {MOMENTS: sum(_size(*at) for at in _places(generator, optimizers, staying=False))}
