"""FedProx: a pull of each client's weights towards those that the server sent."""

from collections.abc import Mapping

import torch
from torch import Tensor

from task.generators.base import Generator
from task.training.algorithms.parameters import SentParameters
from task.training.loop import Callback, Optimizers


class ProximalPull(Callback):
    """Adds the gradient of mu/2 * |w - w_received|^2 to that of each loss.

    Source: Li et al. 2020 (arXiv 1812.06127), equation 2.
    """

    def __init__(self, mu: float) -> None:
        """Pull with a strength of mu >= 0."""
        self._mu = mu

    def start(
        self, generator: Generator, optimizers: Optimizers, received: Mapping[str, Tensor]
    ) -> None:
        """Note the weights that are pulled to."""
        self._sent = SentParameters(generator, optimizers)

    @torch.no_grad()
    def before_step(self, name: str) -> None:
        """Pull what this optimizer moves."""
        for path, gradient in self._sent.gradients(name).items():
            gradient.add_(self._sent.moved(path), alpha=self._mu)
