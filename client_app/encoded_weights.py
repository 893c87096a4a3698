"""What travels back of a client's weights, and what rounding took off it."""

from collections.abc import Mapping
from typing import Any, NamedTuple, Self, cast

import numpy as np
import torch
from flwr.app import ConfigRecord
from numpy.typing import NDArray

from client_app.workspace import Workspace
from task.protocol.partial import PartLayout
from task.protocol.wire import Key
from task.protocol.wire_format import wire_format
from task.randomness import Stream, numpy_generator
from task.training.private import sums_gradients

# What rounding took off the last update, among what a client keeps between rounds.
ROUNDED_OFF = "rounded_off"


class EncodedWeights(NamedTuple):
    """The weights of a client on their way back.

    Attributes:
        packed: what travels.
        kept: what the next round begins with, by name; nothing without error feedback.
    """

    packed: NDArray[Any]
    kept: dict[str, torch.Tensor]

    @classmethod
    def of(
        cls,
        workspace: Workspace,
        received: NDArray[np.floating],
        asked: ConfigRecord,
        kept: Mapping[str, torch.Tensor],
    ) -> Self:
        """Write the weights of the workspace's model as `federation.wire_dtype` says.

        Args:
            workspace: of the client, which has trained.
            received: [P], the weights that it started from.
            asked: what the server's message says of the round and the client.
            kept: what its last round has left.

        Source: error feedback: Seide et al. 2014; Karimireddy et al. 2019 (arXiv 1901.09847).
        """
        config, layout = workspace.config, workspace.layout
        # Gradients in units of the clipping norm are too large for float16.
        dtype = "float32" if sums_gradients(config) else config.federation.wire_dtype
        weights: NDArray[np.float32] = layout.pack(workspace.generator.state_dict())
        last = kept.get(ROUNDED_OFF)
        if config.federation.error_feedback and last is not None and last.numel() == layout.size:
            weights = weights + last.numpy()
        wire = wire_format(layout, dtype)
        if Key.PARTS in asked:
            parts = [str(part) for part in cast(list[str], asked[Key.PARTS])]
            wire = PartLayout(layout, workspace.generator).wire(parts, dtype)
        rng = numpy_generator(
            config.seed,
            Stream.WIRE,
            int(asked[Key.SERVER_ROUND]),  # type: ignore[arg-type]
            int(asked[Key.CLIENT]),  # type: ignore[arg-type]
        )
        packed = wire.encode_local(weights, received, rng)
        if not config.federation.error_feedback:
            return cls(packed, {})
        off = weights - wire.decode_local(packed, received)
        return cls(packed, {ROUNDED_OFF: torch.from_numpy(off.astype(np.float32))})
