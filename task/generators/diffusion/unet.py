"""Make the network of a configuration, and give it weights of the released code."""

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor, nn

from task.config import Config
from task.generators.diffusion.network import UNet

__all__ = ["UNet", "build_unet", "load_weights_by_position", "unet_arguments"]


def build_unet(config: Config) -> UNet:
    """Make the network of a configuration, with weights from torch's global generator."""
    return UNet(**unet_arguments(config))


def unet_arguments(config: Config) -> dict[str, Any]:
    """Return what `UNet` is made with for a configuration."""
    return {
        "channels": config.data.channels,
        "num_classes": len(config.data.classes),
        "null_class": config.diffusion.label_dropout > 0,
        **asdict(config.model),
    }


def load_weights_by_position(model: nn.Module, state_dict: Mapping[str, Tensor]) -> None:
    """Copy weights of the released code into a model: the names differ, the order does not.

    Args:
        model: takes the weights.
        state_dict: of the released network, read with `torch.load(..., weights_only=True)`.

    Raises:
        ValueError: number or shapes of the tensors differ; the model is left as it was.
    """
    targets = list(model.state_dict().values())
    sources = list(state_dict.values())
    for position, (target, source) in enumerate(zip(targets, sources, strict=False)):
        if target.shape != source.shape:
            raise ValueError(
                f"state_dict, tensor {position}: shape must be {list(target.shape)}, "
                f"got {list(source.shape)}"
            )
    if len(targets) != len(sources):
        raise ValueError(f"state_dict must hold {len(targets)} tensors, got {len(sources)}")
    with torch.no_grad():
        for target, source in zip(targets, sources, strict=True):
            target.copy_(source)
