"""What both ends of the wire must agree on: the names of records and the packed weights.

A model crosses the network as one flat array, several times faster in deployment than one array
per parameter. Both ends derive its layout from the model that they build, so none is sent.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from enum import IntEnum, StrEnum

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn


class Key(StrEnum):
    """Names of the records in a message and of the entries in them."""

    ARRAYS = "arrays"
    PACKED = "packed"
    CONFIG = "config"
    SERVER_ROUND = "server-round"
    CLIENT = "client"
    PRECISION = "precision"
    FINGERPRINT = "fingerprint"
    METRICS = "metrics"
    NUM_EXAMPLES = "num-examples"
    LOSS = "loss"
    SECONDS = "seconds"
    IMAGES_PER_SECOND = "images-per-second"
    PARTITION_ID = "partition-id"
    NUM_PARTITIONS = "num-partitions"


class FailureCode(IntEnum):
    """All that a client says of a failure beside the class of its exception."""

    OTHER = 100
    BAD_INPUT = 101
    DATA_UNREADABLE = 102
    OUT_OF_MEMORY = 103


@dataclass(frozen=True)
class WeightLayout:
    """Where each tensor of a model lies in the flat array.

    Attributes:
        shapes: the shape of each tensor by name, in the order of the `state_dict`.
    """

    shapes: Mapping[str, torch.Size]

    @classmethod
    def of(cls, model: nn.Module) -> "WeightLayout":
        """Derive the layout from a model.

        Raises:
            TypeError: the model holds a tensor that is not float32, which has no average.
        """
        state = model.state_dict()
        for name, tensor in state.items():
            if tensor.dtype != torch.float32:
                raise TypeError(f"{name} must be float32 to be averaged, got {tensor.dtype}")
        return cls({name: tensor.shape for name, tensor in state.items()})

    @property
    def size(self) -> int:
        """Number of values in the flat array."""
        return sum(shape.numel() for shape in self.shapes.values())

    def pack(
        self, state: Mapping[str, torch.Tensor], dtype: str = "float32"
    ) -> NDArray[np.floating]:
        """Flatten a `state_dict` into one array.

        Args:
            state: tensors with the names and shapes of the layout, on any device.
            dtype: of the result, "float32" or "float16".
        """
        flat = torch.cat([state[name].detach().cpu().reshape(-1) for name in self.shapes])
        return flat.numpy().astype(dtype, copy=False)

    def unpack(self, packed: NDArray[np.floating]) -> dict[str, torch.Tensor]:
        """Cut a flat array into float32 tensors; see `pack`.

        Raises:
            ValueError: the array is not flat or not of the layout's size.
        """
        if packed.shape != (self.size,):
            raise ValueError(f"packed weights must have shape ({self.size},), got {packed.shape}")
        flat = torch.from_numpy(packed.astype(np.float32))
        pieces = torch.split(flat, [shape.numel() for shape in self.shapes.values()])
        return {
            name: piece.reshape(shape)
            for (name, shape), piece in zip(self.shapes.items(), pieces, strict=True)
        }
