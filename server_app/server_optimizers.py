"""Optimizers that take the mean update of a round for a gradient, with its sign turned."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from task.config import StrategyConfig


class Yogi(Optimizer):
    """Adam whose second moment moves towards the square of a gradient by steps of that square.

    It forgets a large gradient more slowly than Adam's. All else is as in Adam, also the
    correction of both moments for their start at 0: of the second it is approximate, and steps are
    up to a fifth shorter for it about 1 / (1 - beta2) rounds after the start.

    Source: Zaheer et al. 2018, "Adaptive Methods for Nonconvex Optimization", Algorithm 2.
    """

    def __init__(
        self, params: list[Tensor], *, lr: float, betas: tuple[float, float], eps: float
    ) -> None:
        """Optimize parameters; arguments as of `torch.optim.Adam`."""
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Take a step."""
        for group in self.param_groups:
            for parameter in group["params"]:
                self._move(parameter, group)

    def _move(self, parameter: Tensor, group: dict[str, Any]) -> None:
        state, gradient = self.state[parameter], parameter.grad
        if gradient is None:
            return
        if not state:
            state["step"] = torch.zeros(())
            state["exp_avg"] = torch.zeros_like(parameter)
            state["exp_avg_sq"] = torch.zeros_like(parameter)
        state["step"] += 1
        first, second = state["exp_avg"], state["exp_avg_sq"]
        (beta1, beta2), square = group["betas"], gradient.square()
        first.lerp_(gradient, 1 - beta1)
        second.addcmul_(square, torch.sign(second - square), value=-(1 - beta2))
        # Adam's: each moment over the sum of the weights of what it would hold.
        scale1, scale2 = (1 - beta ** state["step"].item() for beta in (beta1, beta2))
        root = (second / scale2).sqrt_().add_(group["eps"])
        parameter.addcdiv_(first / scale1, root, value=-group["lr"])


def server_optimizer_of(strategy: StrategyConfig) -> Callable[[list[Tensor]], Optimizer] | None:
    """Return what makes the optimizer of a strategy; None of one that takes the mean as it is.

    Source: Hsu et al. 2019 (arXiv 1909.06335) for momentum; Reddi et al. 2021 (arXiv 2003.00295)
    for the others, there without Adam's correction of the moments for their start.
    """
    lr = float(strategy.server_lr or 0)
    if strategy.name == "fedavgm":
        momentum = float(strategy.momentum or 0)
        # The sum of an update's shares in all later steps is 1 / (1 - momentum).
        return partial(torch.optim.SGD, lr=lr * (1 - momentum), momentum=momentum)
    adaptive: dict[str, Callable[..., Optimizer]] = {"fedadam": torch.optim.Adam, "fedyogi": Yogi}
    if (made := adaptive.get(strategy.name)) is None:
        return None
    betas = (float(strategy.beta1 or 0), float(strategy.beta2 or 0))
    return partial(made, lr=lr, betas=betas, eps=float(strategy.tau or 0))
