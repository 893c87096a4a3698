"""Means of what steps of training measure, without waiting for a GPU."""

import torch
from torch import Tensor

from task.generators.base import Batch


class StepMeans:
    """Sums by name, on the device that computes them, until they are read."""

    def __init__(self) -> None:
        self._sums: dict[str, Tensor] = {}
        self._counts: dict[str, int] = {}

    @torch.no_grad()
    def add(self, batch: Batch, **values: Tensor) -> None:
        """Add values of the images of `batch.part`, tensors of any shape, by name.

        The mean over the processes that train together is that of the whole batch.
        """
        for name, value in values.items():
            added = batch.weight * value.detach().mean().double() * len(batch)
            self._sums[name] = self._sums[name] + added if name in self._sums else added
            self._counts[name] = self._counts.get(name, 0) + len(batch)

    def read(self) -> dict[str, Tensor]:
        """Return the mean over images of what was added by each name, scalars."""
        return {name: total / self._counts[name] for name, total in self._sums.items()}
