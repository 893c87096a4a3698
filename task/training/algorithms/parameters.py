"""The parameters that a client trains and sends, which the algorithms act on."""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from task.generators.base import Generator
from task.training.loop import Optimizers


def trained_parameters(generator: Generator, optimizers: Optimizers) -> dict[str, nn.Parameter]:
    """Return what optimizers move and messages carry, by name and in the order of the `state_dict`.

    Buffers and moving averages of weights are not among it, nor what stays at a client.
    """
    # A family may name them otherwise there than its modules do.
    state = generator.state_dict(keep_vars=True)
    moved = {id(each) for optimizer in optimizers.values() for each in parameters_of(optimizer)}
    return {
        name: each
        for name, each in state.items()
        if id(each) in moved and not generator.stays(name)
    }


def parameters_of(optimizer: torch.optim.Optimizer) -> list[nn.Parameter]:
    """Return the parameters of an optimizer, of all of its groups."""
    return [each for group in optimizer.param_groups for each in group["params"]]


class SentParameters:
    """The parameters of `trained_parameters`, as they were at the start, and flat tensors of them.

    Attributes:
        by_name: the parameters.
        anchors: what each was at the start, by name.
    """

    def __init__(self, generator: Generator, optimizers: Optimizers) -> None:
        """Note where the parameters are; the generator has the weights that the server sent."""
        self.by_name = trained_parameters(generator, optimizers)
        self.anchors = {name: each.detach().clone() for name, each in self.by_name.items()}
        self._names = {
            name: [path for path, each in self.by_name.items() if id(each) in moved]
            for name, moved in (
                (name, {id(each) for each in parameters_of(optimizer)})
                for name, optimizer in optimizers.items()
            )
        }

    def gradients(self, optimizer: str) -> dict[str, Tensor]:
        """Return the gradients that the optimizer of a name is about to step by, by parameter."""
        found = {name: self.by_name[name].grad for name in self._names[optimizer]}
        return {name: gradient for name, gradient in found.items() if gradient is not None}

    @torch.no_grad()
    def moved(self, name: str) -> Tensor:
        """Return how far a parameter has moved since the start."""
        return self.by_name[name] - self.anchors[name]

    def split(self, flat: Tensor) -> dict[str, Tensor]:
        """Return the pieces of a flat tensor of all parameters, [P], on their devices, by name.

        Raises:
            RuntimeError: it is of another size.
        """
        sizes = [each.numel() for each in self.by_name.values()]
        pieces = torch.split(flat, sizes)
        return {
            name: piece.view(each.shape).to(each)
            for (name, each), piece in zip(self.by_name.items(), pieces, strict=True)
        }

    def zeros(self) -> dict[str, Tensor]:
        """Return a zero for each value of the parameters, by name."""
        return {name: torch.zeros_like(each) for name, each in self.anchors.items()}

    def joined(self, pieces: Mapping[str, Tensor]) -> Tensor:
        """Return the flat tensor of pieces, [P] float32 on the CPU; see `split`."""
        flat = [pieces[name].detach().reshape(-1) for name in self.by_name]
        return torch.cat(flat).cpu() if flat else torch.zeros(0)
