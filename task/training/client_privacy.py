"""Differential privacy for whole clients: their updates are clipped, and their mean gets noise.

Source: McMahan et al. 2018 (arXiv 1710.06963), without the gain of drawing clients at random.
"""

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from task.checks import require
from task.config import Config
from task.training.private import PrivateDraws, spending_of


@dataclass(frozen=True)
class ClientPrivacy:
    """How each client is protected from those who see what a round makes of all of them.

    Attributes:
        clipping_norm: the largest L2 norm of a client's update.
        noise_multiplier: standard deviation of the noise of the sum over the clipping norm.
    """

    clipping_norm: float
    noise_multiplier: float

    @classmethod
    def of(cls, config: Config) -> "ClientPrivacy | None":
        """Choose the noise of a run, or take what it says; None where it protects no clients."""
        if not config.privacy.protects_clients:
            return None
        norm = float(config.privacy.clipping_norm or 0)
        return cls(norm, spending_of(config, rounds=1).noise_multiplier)

    def clipped(
        self, weights: NDArray[np.floating], sent: NDArray[np.floating]
    ) -> NDArray[np.float32]:
        """Bring a client's weights, [P], as near to those it was sent as it may send them back."""
        start = sent.astype(np.float32)
        update = weights.astype(np.float32) - start
        length = float(np.linalg.norm(update.astype(np.float64)))
        # A little below 1, or rounding could leave it longer than the norm.
        factor = min(1.0, self.clipping_norm / length) * (1 - 1e-6) if length else 1.0
        return np.asarray(start + factor * update, np.float32)

    def noised(
        self, mean: NDArray[np.float32], num_clients: int, draws: PrivateDraws
    ) -> NDArray[np.float32]:
        """Add the noise of the sum of so many clients to their mean, [P]."""
        std = self.noise_multiplier * self.clipping_norm / num_clients
        noise = draws.normal(torch.zeros(mean.shape)).numpy()
        return np.asarray(mean + std * noise, np.float32)


def check_clients(num_clients: int, config: Config) -> None:
    """Check that the delta of a run that protects clients suits so many.

    Raises:
        ValueError: it leaves room for giving a whole client away.
    """
    delta = float(config.privacy.delta or 0)
    require(
        not config.privacy.protects_clients or delta * num_clients < 1,
        "privacy.delta",
        f"below 1 / {num_clients}, the clients: a mechanism that gives one of them away in every "
        "run would pass",
        delta,
    )
