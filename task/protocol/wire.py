"""What both ends of the wire must agree on: the names of records and the packed weights.

A model crosses the network as one flat array, several times faster in deployment than one array
per parameter. Both ends derive its layout from the model that they build, so none is sent.
"""

import io
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from enum import IntEnum, StrEnum
from typing import Any

import numpy as np
import torch
from numpy.lib import format as npy
from numpy.typing import NDArray
from torch import nn

from task.checks import require
from task.training.algorithms import names

# A `state_dict`, or a part of one.
Weights = Mapping[str, torch.Tensor]


class Key(StrEnum):
    """Names of the records in a message and of the entries in them."""

    ARRAYS = "arrays"
    PACKED = "packed"
    CONFIG = "config"
    SERVER_ROUND = "server-round"
    CLIENT = "client"
    RUN_NAME = "run-name"
    RUN_ID = "run-id"
    PRECISION = "precision"
    FINGERPRINT = "fingerprint"
    EXTRACTOR = "extractor"
    NUM_IMAGES = "num-images"
    METRICS = "metrics"
    NUM_EXAMPLES = "num-examples"
    LOSS = "loss"
    SECONDS = "seconds"
    SECONDS_BESIDE = "seconds-beside"
    IMAGES_PER_SECOND = "images-per-second"
    PARTITION_ID = "partition-id"
    NUM_PARTITIONS = "num-partitions"
    CLASS_COUNTS = "class-counts"
    # Whether a node answers a training that it is asked for twice without training twice.
    KEEPS_REPLIES = "keeps-replies"
    IMAGES = "images"
    LABELS = "labels"
    SECURE_AGGREGATION = "secure-aggregation"
    PEER_KEYS = "peer-keys"
    PEERS = "peers"
    SUM = "sum"
    MEASURES = "measures"
    SHARES = "shares"
    COMMITMENTS = "commitments"
    SURVIVORS = "survivors"
    AUDIT = "audit"
    CONTROL = names.CONTROL
    OWN_CONTROL = names.OWN_CONTROL
    MOMENTS = names.MOMENTS
    # Which parts of the weights a client is to send; all where it is not said.
    PARTS = "parts"
    # The parts that stay at a client, and whether it is to send them.
    LOCAL = "local"


# Of the evaluate messages that ask how images compare with a hospital's own.
SCORES = "scores"
# Of the evaluate messages that have a hospital attack the weights with its own images.
AUDIT = "audit"
# Of the train messages that ask for help to take the masks off a sum.
UNMASK = "unmask"


class FailureCode(IntEnum):
    """All that a client says of a failure beside the class of its exception."""

    OTHER = 100
    BAD_INPUT = 101
    DATA_UNREADABLE = 102
    OUT_OF_MEMORY = 103
    UNKNOWN_CLASS = 104
    TOO_FEW_IMAGES = 105
    MISSING_WEIGHTS = 106
    BUDGET_EXHAUSTED = 107
    NOT_APPROVED = 108
    AGAINST_POLICY = 109
    PEERS_REFUSED = 110
    NOT_FINITE = 111


@dataclass(frozen=True)
class WeightLayout:
    """Where each tensor of a model lies in the flat array.

    Attributes:
        shapes: the shape of each tensor by name, in the order of the `state_dict`.
        own: the tensors that do not travel, as a new model has them: those that are not float,
            such as counters, which have no average, those that stay at a client, and frozen ones.
    """

    shapes: Mapping[str, torch.Size]
    own: Mapping[str, torch.Tensor] = field(default_factory=dict, compare=False)

    @classmethod
    def of(cls, model: nn.Module, staying: Collection[str] = ()) -> "WeightLayout":
        """Derive the layout from a model.

        Args:
            model: as it is built.
            staying: beginnings of the names of tensors that no message carries; they may be made
                later, see `Generator.prepare`.

        Raises:
            TypeError: the model holds floats that are not float32.
            ValueError: no name begins so, and what is meant would travel by another name.
        """
        shapes, own, state = {}, {}, model.state_dict()
        registered = [
            f"{path}.{name}".lstrip(".")
            for path, module in model.named_modules()
            for name in (*module._parameters, *module._buffers)  # those that are None as well
        ]
        for beginning in staying:
            known = any(name.startswith(beginning) for name in (*state, *registered))
            require(known, "staying", "beginnings of names in the state_dict", beginning)
        for name, tensor in state.items():
            if name.startswith(tuple(staying)) or not tensor.is_floating_point():
                own[name] = tensor.detach().clone()
            elif tensor.dtype != torch.float32:
                raise TypeError(f"{name} must be float32 to be averaged, got {tensor.dtype}")
            else:
                shapes[name] = tensor.shape
        return cls(shapes, own)

    @classmethod
    def only(cls, model: nn.Module, beginnings: Collection[str]) -> "WeightLayout":
        """Derive the layout of a part of a model; what else it holds is in no array.

        Args:
            model: as it is built.
            beginnings: of the names of the tensors of the part; none: of an empty one.
        """
        state = model.state_dict().items()
        floats = {name: each.shape for name, each in state if each.is_floating_point()}
        return cls({n: shape for n, shape in floats.items() if n.startswith(tuple(beginnings))})

    @property
    def size(self) -> int:
        """Number of values in the flat array."""
        return sum(shape.numel() for shape in self.shapes.values())

    def where(self, chosen: Callable[[str], bool]) -> NDArray[np.bool_]:
        """Return which values of the flat array are of the tensors whose names are chosen: [P]."""
        whether = [np.full(shape.numel(), chosen(name)) for name, shape in self.shapes.items()]
        return np.concatenate([np.zeros(0, bool), *whether])

    def pack(self, state: Weights, dtype: str = "float32") -> NDArray[np.floating]:
        """Flatten a `state_dict` into one array.

        Args:
            state: tensors with the names and shapes of the layout, and perhaps others, on any
                device.
            dtype: of the result, "float32" or "float16".
        """
        # Joined where they are, so that a GPU sends one block and not one per tensor.
        pieces = [state[name].detach().reshape(-1) for name in self.shapes]
        flat = torch.cat(pieces) if pieces else torch.zeros(0)
        return flat.to(getattr(torch, dtype)).cpu().numpy()

    def unpack(
        self, packed: NDArray[np.floating], device: torch.device | str = "cpu"
    ) -> dict[str, torch.Tensor]:
        """Make a `state_dict` of a flat array, with memory of its own; see `pack`.

        What does not travel is as in a new model, so that nothing depends on what a process did
        before.

        Args:
            packed: [P], float32 or float16.
            device: of the tensors; the array goes there in one block.

        Raises:
            ValueError: the array is not flat or not of the layout's size.
        """
        if packed.shape != (self.size,):
            raise ValueError(f"packed weights must have shape ({self.size},), got {packed.shape}")
        flat = torch.from_numpy(packed.astype(np.float32)).to(device)
        pieces = torch.split(flat, [shape.numel() for shape in self.shapes.values()])
        shaped = {
            name: piece.reshape(shape)
            for (name, shape), piece in zip(self.shapes.items(), pieces, strict=True)
        }
        return {**shaped, **{name: tensor.clone() for name, tensor in self.own.items()}}


def to_npy(array: NDArray[Any]) -> bytes:
    """Write an array as the bytes of an .npy file, in one copy.

    They are what Flower's `Array(ndarray)` makes, which copies three times on the way.

    Args:
        array: contiguous.
    """
    header = io.BytesIO()
    npy.write_array_header_1_0(header, npy.header_data_from_array_1_0(array))
    return b"".join((header.getvalue(), array.data))


def from_npy(data: bytes) -> NDArray[Any]:
    """Read the bytes of an .npy file as an array that cannot be written, without a copy.

    Args:
        data: of `to_npy` or `np.save`; bytes of a stranger are safe here, objects are refused.

    Raises:
        ValueError: they are no such file, or are cut. On bytes that were made to break it
            NumPy's reader of headers raises nearly anything.
    """
    file = io.BytesIO(data)
    if npy.read_magic(file) != (1, 0):
        raise ValueError("an array must be a file of version 1.0 of NumPy's format")
    shape, _, dtype = npy.read_array_header_1_0(file)
    if dtype.hasobject:
        # Their bytes would be taken for addresses in memory.
        raise ValueError(f"an array must hold numbers, got {dtype}")
    return np.ndarray(shape, dtype, buffer=data, offset=file.tell())
