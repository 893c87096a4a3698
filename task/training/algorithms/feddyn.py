"""FedDyn: each client's loss gets a linear and a quadratic term that change from round to round."""

from collections.abc import Mapping

import torch
from torch import Tensor

from task.generators.base import Generator
from task.training.algorithms.names import LINEAR_TERM
from task.training.algorithms.parameters import SentParameters
from task.training.loop import Callback, Optimizers


class DynamicRegularizer(Callback):
    """Adds alpha * (w - w_received) - h_i to each gradient.

    At the end of the round it takes alpha * (w - w_received) away from h_i.

    Where the local loss was minimized, h_i is its gradient at w.

    Source: Acar et al. 2021 (arXiv 2111.04263), Algorithm 1, the lines of the device.
    """

    def __init__(self, alpha: float) -> None:
        """Regularize with a strength of alpha > 0."""
        self._alpha = alpha

    def start(
        self, generator: Generator, optimizers: Optimizers, received: Mapping[str, Tensor]
    ) -> None:
        """Take up h_i of the client's last round; 0 where there is none."""
        self._sent = SentParameters(generator, optimizers)
        kept = received.get(LINEAR_TERM)
        self._linear = self._sent.zeros() if kept is None else self._sent.split(kept)

    @torch.no_grad()
    def before_step(self, name: str) -> None:
        """Regularize what this optimizer moves."""
        for path, gradient in self._sent.gradients(name).items():
            gradient.add_(self._sent.moved(path), alpha=self._alpha).sub_(self._linear[path])

    def finish(self) -> Mapping[str, Tensor]:
        """Return h_i."""
        after = {n: h - self._alpha * self._sent.moved(n) for n, h in self._linear.items()}
        return {LINEAR_TERM: self._sent.joined(after)}
