"""FedDyn's server: it goes on by what the clients' linear terms add up to."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from server_app.strategies import Strategy
from task.protocol.wire import Weights

SERVER_TERM = "server_term"


class FedDyn(Strategy):
    """Keeps h, the mean of the clients' terms, which it works out from the mean of their updates.

    The mean is that of the reducer, by images, where the paper's clients count alike.

    Source: Acar et al. 2021 (arXiv 2111.04263), Algorithm 1, the lines of the server.
    """

    def __init__(self, *args: Any, alpha: float, **options: Any) -> None:
        """Start with h = 0; further arguments as of `Strategy`.

        Args:
            *args: see `Strategy`.
            alpha: that of the clients, > 0.
            **options: see `Strategy`.
        """
        super().__init__(*args, **options)
        self._alpha = np.float32(alpha)
        self._term = np.zeros(self.num_trained, np.float32)

    def _advanced(self, reduced: NDArray[np.float32]) -> NDArray[np.float32]:
        share = np.float32(self._num_clients / self._num_nodes)
        update = (reduced - self.sent.astype(np.float32))[self._trained]
        self._term = self._term - self._alpha * share * update
        moved = reduced.copy()
        moved[self._trained] -= self._term / self._alpha
        return moved

    def state_dict(self) -> dict[str, Weights]:
        """See `Strategy.state_dict`."""
        return {**super().state_dict(), SERVER_TERM: {"all": torch.from_numpy(self._term)}}

    def load_state_dict(self, state: Mapping[str, Weights]) -> None:
        """See `Strategy.load_state_dict`."""
        super().load_state_dict(state)
        self._term = state[SERVER_TERM]["all"].numpy().copy()
