"""What an optimizer has gathered, as tensors that a checkpoint can hold."""

from collections.abc import Mapping

import torch
from torch.optim import Optimizer


def optimizer_tensors(optimizer: Optimizer) -> dict[str, torch.Tensor]:
    """Return what an optimizer has gathered, by number and name, such as "0.exp_avg"."""
    return {
        f"{number}.{name}": value.cpu()
        for number, gathered in optimizer.state_dict()["state"].items()
        for name, value in gathered.items()
        if isinstance(value, torch.Tensor)
    }


def load_optimizer_tensors(optimizer: Optimizer, tensors: Mapping[str, torch.Tensor]) -> None:
    """Give an optimizer what one of the same parameters has gathered; see `optimizer_tensors`."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    gathered: dict[int, dict[str, torch.Tensor]] = {}
    for key, tensor in tensors.items():
        number, name = key.split(".")
        if tensor.ndim > 0:
            # The fused Adam pairs values by their place in memory.
            tensor = torch.empty_like(parameters[int(number)]).copy_(tensor)
        gathered.setdefault(int(number), {})[name] = tensor
    optimizer.load_state_dict({**optimizer.state_dict(), "state": gathered})
