"""The learning rate of a round."""

import math

from task.config import Config
from task.training.loop import Optimizers


def round_lr(config: Config, server_round: int) -> float:
    """Return the learning rate with which a round trains, by `train.lr_schedule`.

    After `train.warmup_rounds`, whose learning rates are equal steps up to `train.lr` (of clients
    `train.client_lr_factor` times that), it stays as it is or follows half a cosine, which would
    reach 0 in the round after the last.

    Args:
        config: of the run.
        server_round: 1-based, up to `federation.rounds`.
    """
    train, lr = config.train, config.train.trained_lr
    if server_round <= train.warmup_rounds:
        return lr * server_round / (train.warmup_rounds + 1)
    if train.lr_schedule == "constant":
        return lr
    done = server_round - train.warmup_rounds - 1
    decay = done / (config.federation.rounds - train.warmup_rounds)
    return lr * (1 + math.cos(math.pi * decay)) / 2


def adopt_learning_rates(optimizers: Optimizers, others: Optimizers) -> None:
    """Let optimizers, which keep what they have gathered, go on with the learning rates of others.

    Args:
        optimizers: of a generator.
        others: new ones of the same generator.
    """
    for name, optimizer in optimizers.items():
        groups = zip(optimizer.param_groups, others[name].param_groups, strict=True)
        for group, other in groups:
            group["lr"] = other["lr"]
