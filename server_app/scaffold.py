"""SCAFFOLD's server: it sends the mean gradient of all clients beside the weights."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from server_app.strategies import Strategy
from task.protocol.wire import Key, Weights


class Scaffold(Strategy):
    """Keeps c, towards which each round moves it by the share of all clients that took part.

    Where all take part, c is the mean of their c_i, as in the paper. Where some do, the paper adds
    their changes, which need each client to know what it said last. Here what a client has lost,
    or has said wrongly, is forgotten as rounds go by.

    Source: Karimireddy et al. 2020 (arXiv 1910.06378), Algorithm 1, with a server's step of 1.
    """

    def __init__(self, *args: Any, **options: Any) -> None:
        """Start with c = 0; arguments as of `Strategy`."""
        super().__init__(*args, **options)
        self._control = np.zeros(self.num_trained, np.float32)

    def beside(self) -> dict[str, NDArray[np.float32]]:
        """Return c, and what else is sent."""
        return {**super().beside(), str(Key.CONTROL): self._control}

    @property
    def expected(self) -> dict[str, int]:
        """How many values c_i has, and what else is sent."""
        return {**super().expected, str(Key.OWN_CONTROL): self.num_trained}

    def broadcast(
        self,
        weights: Weights,
        num_clients: int,
        num_nodes: int | None = None,
        *,
        rng: np.random.Generator | None = None,
    ) -> NDArray[Any]:
        """Begin a round; see `Strategy.broadcast`."""
        self._own = self._new_reducer(self._control, num_clients)
        return super().broadcast(weights, num_clients, num_nodes, rng=rng)

    def add(
        self,
        client: int,
        weights: NDArray[np.floating],
        num_images: int,
        beside: Mapping[str, NDArray[np.floating]] | None = None,
    ) -> None:
        """Take the weights of a client, and its c_i."""
        super().add(client, weights, num_images, beside)
        self._own.add(client, (beside or {})[Key.OWN_CONTROL], num_images)

    def _advanced(self, reduced: NDArray[np.float32]) -> NDArray[np.float32]:
        share = np.float32(self._num_clients / self._num_nodes)
        self._control = self._control + share * (self._own.reduce() - self._control)
        del self._own
        return super()._advanced(reduced)

    def state_dict(self) -> dict[str, Weights]:
        """See `Strategy.state_dict`."""
        control = {"all": torch.from_numpy(self._control)}
        return {**super().state_dict(), str(Key.CONTROL): control}

    def load_state_dict(self, state: Mapping[str, Weights]) -> None:
        """See `Strategy.load_state_dict`."""
        super().load_state_dict(state)
        self._control = state[Key.CONTROL]["all"].numpy().copy()
