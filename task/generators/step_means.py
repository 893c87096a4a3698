"""Means of what steps of training measure, without waiting for a GPU."""

import torch
from torch import Tensor


class StepMeans:
    """Sums by name, on the device that computes them, until they are read."""

    def __init__(self) -> None:
        self._sums: dict[str, Tensor] = {}
        self._counts: dict[str, int] = {}

    @torch.no_grad()
    def add(self, **values: Tensor) -> None:
        """Add the mean of each tensor, of any shape, as one of its name."""
        for name, value in values.items():
            mean = value.detach().mean()
            self._sums[name] = self._sums[name] + mean if name in self._sums else mean
            self._counts[name] = self._counts.get(name, 0) + 1

    def read(self) -> dict[str, Tensor]:
        """Return the mean of what was added by each name, scalars."""
        return {name: total / self._counts[name] for name, total in self._sums.items()}
