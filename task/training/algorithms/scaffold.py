"""SCAFFOLD: each step of a client is corrected by how its gradients differ from those of all."""

from collections.abc import Mapping

import torch
from torch import Tensor

from task.generators.base import Generator
from task.training.algorithms.names import CONTROL, OWN_CONTROL
from task.training.algorithms.parameters import SentParameters
from task.training.loop import Callback, Optimizers


class ControlVariate(Callback):
    """Adds c - c_i to each gradient; c_i becomes the mean gradient of the round, uncorrected.

    With steps of SGD at one learning rate that mean is option II of the paper,
    c_i - c + (w_received - w) / (steps * lr), but for rounding. It is a mean of gradients with Adam
    as well, whose steps are none of gradients times a learning rate.

    A client without c_i, because it is new or has lost it, corrects nothing: it takes c for it.
    In the first round this is the 0 of the paper.

    Source: Karimireddy et al. 2020 (arXiv 1910.06378), Algorithm 1.
    """

    def start(
        self, generator: Generator, optimizers: Optimizers, received: Mapping[str, Tensor]
    ) -> None:
        """Take up c, and c_i of the client's last round where there is one."""
        self._sent = SentParameters(generator, optimizers)
        control = received[CONTROL]
        self._corrections = self._sent.split(control - received.get(OWN_CONTROL, control))
        self._sums = self._sent.zeros()
        self._steps = dict.fromkeys(self._sums, 0)

    @torch.no_grad()
    def before_step(self, name: str) -> None:
        """Correct the gradients of this optimizer, and add them up as they were."""
        for path, gradient in self._sent.gradients(name).items():
            self._sums[path] += gradient
            self._steps[path] += 1
            gradient += self._corrections[path]

    def finish(self) -> Mapping[str, Tensor]:
        """Return c_i."""
        means = {path: each / max(1, self._steps[path]) for path, each in self._sums.items()}
        return {OWN_CONTROL: self._sent.joined(means)}
