"""Updates of some parts of a model: which client sends which, and how they travel."""

from collections.abc import Collection, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from task.checks import require
from task.generators.base import Generator
from task.protocol.wire import WeightLayout
from task.protocol.wire_format import WireFormat, wire_format

# What is in no part, which every client sends.
REST = ""


class PartLayout:
    """Where the parts of a model lie in its packed weights.

    Attributes:
        masks: which of [P] are of each part that travels, in order, and of `REST`.
    """

    def __init__(self, layout: WeightLayout, generator: Generator) -> None:
        """Find the parts of a generator.

        Raises:
            ValueError: there are not two that travel.
        """
        self._layout = layout
        names = {part: generator.beginnings([part]) for part in generator.parts}
        self._names = {
            name: next((p for p, begin in names.items() if name.startswith(begin)), REST)
            for name in layout.shapes
        }
        travelling = {*self._names.values()}
        self.parts = [part for part in names if part in travelling]
        require(
            len(self.parts) > 1,
            "federation.sharing",
            f"whole with a {generator.title} of which fewer than two parts travel",
            ", ".join(self.parts) or "none",
        )
        self.masks = {
            part: self._mask([part]) for part in [*self.parts, *[REST] * (REST in travelling)]
        }

    def _mask(self, parts: Collection[str]) -> NDArray[np.bool_]:
        return self._layout.where(lambda name: self._names[name] in parts)

    def wire(self, parts: Collection[str], dtype: str) -> "PartialFormat":
        """Return how a client sends some parts, and what is in none.

        Raises:
            ValueError: there is no such part, or no such dtype.
        """
        unknown = [part for part in parts if part not in self.parts]
        require(not unknown, "parts", f"of {', '.join(self.parts)}", unknown)
        sent = {*parts, REST}
        shapes = {n: s for n, s in self._layout.shapes.items() if self._names[n] in sent}
        return PartialFormat(
            wire_format(self._layout, dtype),
            wire_format(WeightLayout(shapes), dtype),
            self._mask(sent),
        )


class PartialFormat(WireFormat):
    """All weights to a client, and some of them back; the others count as they were sent."""

    def __init__(self, whole: WireFormat, part: WireFormat, mask: NDArray[np.bool_]) -> None:
        """Join two formats.

        Args:
            whole: of all weights.
            part: of those that a client sends.
            mask: [P], which these are.
        """
        self._whole, self._part, self._mask = whole, part, mask
        self.is_lossy = whole.is_lossy

    def encode_weights(
        self, weights: NDArray[np.float32], rng: np.random.Generator
    ) -> NDArray[Any]:
        """Write all weights."""
        return self._whole.encode_weights(weights, rng)

    def decode_weights(self, encoded: NDArray[Any]) -> NDArray[np.floating]:
        """Read all weights."""
        return self._whole.decode_weights(encoded)

    def encode_local(
        self,
        weights: NDArray[np.float32],
        received: NDArray[np.floating],
        rng: np.random.Generator,
    ) -> NDArray[Any]:
        """Write those that a client sends."""
        return self._part.encode_local(weights[self._mask], received[self._mask], rng)

    def decode_local(
        self, encoded: NDArray[Any], sent: NDArray[np.floating]
    ) -> NDArray[np.floating]:
        """Read them into those that were sent."""
        weights = sent.astype(np.float32)
        weights[self._mask] = self._part.decode_local(encoded, sent[self._mask])
        return weights


def deal_parts(
    parts: Sequence[str], clients: Sequence[int], rng: np.random.Generator
) -> dict[int, list[str]]:
    """Choose which parts each client sends: in random pairs, each part by one of the two.

    The first part falls to one of a pair, the last to the other, and a coin decides on each between
    them. A client without another sends what one of a pair would.

    Args:
        parts: of the model, two or more.
        clients: of the round.
        rng: of all draws.

    Source: USplit of de Goede et al. 2024 (arXiv 2406.12575).
    """
    order = [int(client) for client in rng.permutation(np.asarray(clients))]
    dealt: dict[int, list[str]] = {}
    for place in range(0, len(order), 2):
        between = rng.integers(2, size=len(parts) - 2)
        owner = [0, *between.tolist(), 1]
        turned = int(rng.integers(2)) if place + 1 == len(order) else 0
        for number, client in enumerate(order[place : place + 2]):
            mine = number ^ turned
            dealt[client] = [p for p, who in zip(parts, owner, strict=True) if who == mine]
    return dealt


def senders(dealt: Mapping[int, Collection[str]], part: str) -> set[int]:
    """Return the clients that send a part."""
    return {client for client, parts in dealt.items() if part == REST or part in parts}
