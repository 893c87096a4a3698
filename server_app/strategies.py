"""From the replies of a round to the next global weights.

A `Reducer` makes one set of weights of those of many clients. FedAvg's mean believes every client:
one that sends anything finite moves it as far as it likes. The median, the trimmed mean and Krum
bear a minority of such replies; what each asks for and costs stands in
`conf/federation/default.yaml`. A `Strategy` goes from there to the next weights;
`server_app.build_strategy` says which one a run has.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.optim import Optimizer

from server_app.weighting import Weighting
from task.checks import require
from task.protocol.secure_aggregation.fixed_point import UpdateFormat, chunks
from task.protocol.wire import WeightLayout, Weights
from task.protocol.wire_format import FloatFormat, WireFormat
from task.training.client_privacy import ClientPrivacy
from task.training.optimizer_state import load_optimizer_tensors, optimizer_tensors
from task.training.private import PrivateDraws

# Steps of 2^-32 are finer than float32 needs for a mean of weights; int64 holds the sum.
FRACTION_BITS = 32
# What all weights times images of a round may add up to, half of what would overflow.
SUM_LIMIT = 2.0 ** (62 - FRACTION_BITS)


def largest_magnitude(weights: NDArray[np.floating]) -> float:
    """Return the largest absolute value of [P], 0 where P is; NaN where one is."""
    largest = [np.abs(weights[chunk]).max() for chunk in chunks(weights)]
    return float(np.max(largest, initial=0.0))


def distance(weights: NDArray[np.floating], other: NDArray[np.floating]) -> float:
    """Return the L2 norm of the difference of two [P], summed in float64."""
    squares = 0.0
    for chunk in chunks(weights):
        difference = weights[chunk].astype(np.float64) - other[chunk]
        squares += float(difference @ difference)
    return math.sqrt(squares)


class FixedPointSum:
    """The sum of weight x num_images, equal to the bit in whatever order it is added up.

    Floating-point addition depends on the order, integer addition does not: every product is
    rounded once to a multiple of 2^-32, on its own, and added as int64.
    """

    def __init__(self) -> None:
        self.num_images = 0
        self._sum: NDArray[np.int64] | None = None
        self._bound = 0.0

    def add(self, weights: NDArray[np.floating], num_images: int) -> None:
        """Add the weights of one client.

        Args:
            weights: [P] finite.
            num_images: > 0, that the client counts for.

        Raises:
            ValueError: the shape differs from that of the first client.
            OverflowError: the sum could overflow; `SUM_LIMIT` is shared out among the clients of
                a round, so that what passes the check of replies never comes here.
        """
        if self._sum is None:
            self._sum = np.zeros(weights.shape, np.int64)
        if weights.shape != self._sum.shape:
            raise ValueError(f"weights must have shape {self._sum.shape}, got {weights.shape}")
        self._bound += largest_magnitude(weights) * num_images
        if self._bound > SUM_LIMIT * (1 + 1e-9):
            raise OverflowError(
                f"weights times images must add up to at most {SUM_LIMIT:g}, got {self._bound:.3g}"
            )
        self.num_images += num_images
        scale = num_images * 2.0**FRACTION_BITS
        for chunk in chunks(weights):
            # float64 holds the product of a float32 and the scale to a relative 2^-53.
            steps = weights[chunk] * np.float64(scale)
            self._sum[chunk] += np.rint(steps, out=steps).astype(np.int64)

    def mean(self) -> NDArray[np.float32]:
        """Return the mean of all weights, weighted by the images of their clients: [P] float32.

        Raises:
            ValueError: nothing was added.
        """
        if self._sum is None:
            raise ValueError("the mean needs the weights of at least 1 client, got 0")
        mean = np.empty(self._sum.shape, np.float32)
        for chunk in chunks(mean):
            mean[chunk] = self._sum[chunk] / (self.num_images * 2.0**FRACTION_BITS)
        return mean


class Reducer(ABC):
    """Makes one set of weights of those that the clients of a round send."""

    @abstractmethod
    def add(self, client: int, weights: NDArray[np.floating], num_images: int) -> None:
        """Take the weights of a client, [P], and the number of images > 0 that it trained on."""

    @abstractmethod
    def reduce(self) -> NDArray[np.float32]:
        """Return [P], the same in whatever order the clients came; once, with one or more."""


class WeightedMean(Reducer):
    """The mean by the images of each client, added up as the clients come.

    Who claims more than its share is known when all replies are there. Those that claim most, as
    many as may have too much, are added last; they are the only ones that are held in memory.

    Source: Algorithm 1 of the paper, the lines of the server.
    """

    def __init__(self, weighting: Weighting) -> None:
        """Weight clients so."""
        self._weighting = weighting
        self._sum = FixedPointSum()
        self._counts: list[int] = []
        self._largest: list[tuple[int, NDArray[np.floating]]] = []

    def add(self, client: int, weights: NDArray[np.floating], num_images: int) -> None:
        """Add the weights of a client, or of one that claims fewer images."""
        num_images = num_images if self._weighting.by_images else 1
        self._counts.append(num_images)
        self._largest.append((num_images, weights))
        self._largest.sort(key=lambda claimed: claimed[0])
        if len(self._largest) > self._weighting.most_capped:
            self._sum.add(*reversed(self._largest.pop(0)))

    def reduce(self) -> NDArray[np.float32]:
        """Return the mean."""
        counted = dict(zip(self._counts, self._weighting.weights(self._counts), strict=True))
        for num_images, weights in self._largest:
            self._sum.add(weights, counted[num_images])
        return self._sum.mean()


class BoundedMean(Reducer):
    """The mean of updates of bounded values, by bounded numbers of images, as integers.

    Clients that mask their updates add up to the same, see `task.protocol.secure_aggregation`.
    """

    def __init__(self, sent: NDArray[np.floating], form: UpdateFormat) -> None:
        """Start without updates to the weights that were sent, [P]."""
        self.sent, self._form = sent, form
        self._total = np.zeros(sent.shape, np.uint32)
        self._num_images = 0

    def add(self, client: int, weights: NDArray[np.floating], num_images: int) -> None:
        """Add the update of a client."""
        update = weights.astype(np.float32) - self.sent.astype(np.float32)
        encoded, _ = self._form.encode(update, num_images)
        self.add_sum(encoded, self._form.counted(num_images))

    def add_sum(self, encoded: NDArray[np.uint32], num_images: int) -> None:
        """Add the sum of the encoded updates of clients, [P], that count for so many images."""
        self._total += encoded
        self._num_images += num_images

    def reduce(self) -> NDArray[np.float32]:
        """Return the weights that were sent, moved by the mean."""
        return self._form.add_mean(self.sent, self._total, self._num_images)


Updates = NDArray[np.float32]


class OverUpdates(Reducer):
    """A statistic of the updates of clients: their weights less those that were sent.

    The result is that over the weights, which are a shift away; but updates are a thousand times
    smaller, and so is the rounding. Clients count alike, and in the order of their numbers.
    """

    def __init__(
        self,
        sent: NDArray[np.floating],
        *,
        statistic: Callable[[Updates], Updates],
        select: Callable[[list[Updates]], list[Updates]] = lambda updates: updates,
    ) -> None:
        """Start without updates.

        Args:
            sent: [P], the weights that the clients were sent.
            statistic: makes [values] of [clients, values].
            select: chooses the updates that count, of [P] of each client.
        """
        self.sent = sent.astype(np.float32)
        self._statistic, self._select = statistic, select
        self._updates: dict[int, Updates] = {}

    def add(self, client: int, weights: NDArray[np.floating], num_images: int) -> None:
        """Keep the update of a client."""
        self._updates[client] = weights.astype(np.float32) - self.sent

    def reduce(self) -> NDArray[np.float32]:
        """Return the weights that were sent and the statistic, computed piece by piece."""
        updates = self._select([self._updates[client] for client in sorted(self._updates)])
        weights = self.sent.copy()
        for chunk in chunks(weights):
            weights[chunk] += self._statistic(np.stack([update[chunk] for update in updates]))
        return weights


class PartwiseReducer(Reducer):
    """Reduces each part of the weights over the clients that send it.

    A part that no client sent stays as it was sent.
    """

    def __init__(
        self,
        sent: NDArray[np.floating],
        parts: Sequence[tuple[NDArray[np.bool_], Collection[int]]],
        new_reducer: Callable[[NDArray[np.floating], int], Reducer],
    ) -> None:
        """Start without updates.

        Args:
            sent: [P], the weights that the clients were sent.
            parts: which of [P] each part is, and the clients that send it.
            new_reducer: see `Strategy`.
        """
        self._sent = sent
        self._parts = [
            (mask, senders, new_reducer(sent[mask], len(senders))) for mask, senders in parts
        ]
        self._have_come: set[int] = set()

    def add(self, client: int, weights: NDArray[np.floating], num_images: int) -> None:
        """Add the parts that a client sends, of its weights [P]."""
        self._have_come.add(client)
        for mask, senders, reducer in self._parts:
            if client in senders:
                reducer.add(client, weights[mask], num_images)

    def reduce(self) -> NDArray[np.float32]:
        """Return all parts together."""
        weights = self._sent.astype(np.float32)
        for mask, senders, reducer in self._parts:
            if not self._have_come.isdisjoint(senders):
                weights[mask] = reducer.reduce()
        return weights


def plain_mean(updates: Updates) -> Updates:
    """Return the mean over clients that count alike."""
    return np.asarray((updates * np.float32(1 / len(updates))).sum(axis=0), np.float32)


def select_by_krum(
    updates: list[Updates], *, num_malicious: int, num_selected: int
) -> list[Updates]:
    """Select the updates that lie nearest to their nearest others.

    Source: Blanchard et al. 2017 (arXiv 1703.02757).
    """
    products = np.zeros((len(updates), len(updates)))
    for chunk in chunks(updates[0]):
        rows = np.stack([update[chunk] for update in updates]).astype(np.float64)
        products += rows @ rows.T
    squares = np.diag(products)
    distances = squares[:, None] + squares[None] - 2 * products
    nearest = max(1, len(updates) - num_malicious - 2)
    # The first is the client itself.
    scores = np.sort(distances, axis=1)[:, 1 : nearest + 1].sum(axis=1)
    return [updates[place] for place in np.argsort(scores)[:num_selected]]


class Strategy:
    """Makes the next global weights of those that clients send.

    With a server optimizer, what the reducer makes of the clients' weights is taken as a step:
    the way from there back to the weights that were sent is the gradient. SGD with momentum is
    FedAvgM, Adam is FedAdam. Without one, which is FedAvg, what the reducer makes is taken as it
    is: a step of SGD with a learning rate of 1 up to rounding. What clients do not train is taken
    as it is in any case: statistics of batches, which no step may make negative, and averages.

    A round is `broadcast`, `add` for each client, `finish`; a `broadcast` drops what was added
    before it, so that a round can be tried again.

    Source: Reddi et al. 2021 (arXiv 2003.00295), Algorithm 2, for the server optimizer.

    Attributes:
        average: the moving average of the weights over rounds; None where the run keeps none.
        num_trained: how many of the values that travel clients train.
        wire: how the weights travel.
        sent: of a round, [P]: what clients start from, as they decode it.
    """

    sent: NDArray[np.floating]

    def __init__(
        self,
        layout: WeightLayout,
        new_reducer: Callable[[NDArray[np.floating], int], Reducer],
        *,
        wire: WireFormat | None = None,
        ema_decay: float | None = None,
        server_optimizer: Callable[[list[Tensor]], Optimizer] | None = None,
        trained: Collection[str] | None = None,
        privacy: ClientPrivacy | None = None,
        averaged: Mapping[str, int] | None = None,
    ) -> None:
        """Start before the first round.

        Args:
            layout: of the weights on the wire.
            new_reducer: makes the reducer of a round from the weights that are sent, [P], and the
                number of clients that they are sent to.
            wire: how the weights travel; None: as they are.
            ema_decay: of the moving average; None: the run keeps none.
            server_optimizer: makes the optimizer of the packed weights; None: none.
            trained: names of the tensors that clients train, which alone the optimizer moves;
                None: all.
            privacy: of clients; None: none.
            averaged: how many values each array has that clients send beside their weights, and
                are sent the means of in the next round, by name; None: there are none.

        Raises:
            ValueError: something of `trained` does not travel.
        """
        self.average: Weights | None = None
        self._layout, self._new_reducer = layout, new_reducer
        self.wire = wire or FloatFormat(layout, "float32")
        self._ema_decay = ema_decay
        self._privacy, self._num_clients, self._num_nodes = privacy, 0, 1
        self._averaged = dict(averaged or {})
        self._means: dict[str, NDArray[np.float32]] = {}
        # Which of the packed values clients train: [P], or all.
        self._trained: NDArray[np.bool_] | slice = slice(None)
        self.num_trained = layout.size
        if trained is not None:
            foreign = ", ".join(sorted(set(trained) - layout.shapes.keys())[:3])
            require(not foreign, "trained", "names of tensors that travel", foreign)
            self._trained = layout.where(lambda name: name in trained)
            self.num_trained = int(self._trained.sum())
        self._optimizer: Optimizer | None = None
        if server_optimizer is not None:
            self._parameter = torch.nn.Parameter(torch.zeros(self.num_trained))
            self._optimizer = server_optimizer([self._parameter])

    def beside(self) -> dict[str, NDArray[np.float32]]:
        """Return what clients are sent beside the weights, by name."""
        return {**self._means}

    @property
    def expected(self) -> dict[str, int]:
        """How many values each array has that clients send beside their weights."""
        return {**self._averaged}

    def broadcast(
        self,
        weights: Weights,
        num_clients: int,
        num_nodes: int | None = None,
        *,
        rng: np.random.Generator | None = None,
    ) -> NDArray[Any]:
        """Begin a round, or another attempt at it; return what travels to clients of the weights.

        Args:
            weights: the global ones.
            num_clients: that they are sent to.
            num_nodes: clients of the federation, of which these are drawn; None: these.
            rng: of the rounding, where `wire` rounds at random; None: always the same draws.
        """
        self._weights = weights
        rng = rng or np.random.default_rng(0)
        travelling = self.wire.encode_weights(self._layout.pack(weights), rng)
        self.sent = self.wire.decode_weights(travelling)
        self._reducer = self._new_reducer(self.sent, num_clients)
        self._beside = {
            name: self._new_reducer(self._means.get(name, np.zeros(size, np.float32)), num_clients)
            for name, size in self._averaged.items()
        }
        self._num_clients, self._num_nodes = 0, num_nodes or num_clients
        return travelling

    def reduce_parts(self, parts: Sequence[tuple[NDArray[np.bool_], Collection[int]]]) -> None:
        """Take each part from those that send it; after `broadcast`, see `PartwiseReducer`."""
        self._reducer = PartwiseReducer(self.sent, parts, self._new_reducer)

    def add(
        self,
        client: int,
        weights: NDArray[np.floating],
        num_images: int,
        beside: Mapping[str, NDArray[np.floating]] | None = None,
    ) -> None:
        """Take the weights that a client has sent, see `Reducer.add`, and what is `expected`."""
        if self._privacy is not None:
            weights = self._privacy.clipped(weights, self.sent)
        self._reducer.add(client, weights, num_images)
        for name, reducer in self._beside.items():
            reducer.add(client, (beside or {})[name], num_images)
        self._num_clients += 1

    def add_sum(self, encoded: NDArray[np.uint32], num_images: int) -> None:
        """Take the sum of what clients have sent; see `BoundedMean.add_sum`.

        Raises:
            TypeError: the reducer of this strategy takes single clients alone.
        """
        if not isinstance(self._reducer, BoundedMean):
            raise TypeError(f"a {type(self._reducer).__name__} takes no sum of updates")
        self._reducer.add_sum(encoded, num_images)
        # With differential privacy each client counts for one image.
        self._num_clients += num_images

    def finish(self, draws: PrivateDraws | None = None) -> Weights:
        """End a round, in which one client or more was added, and return the new global weights.

        What does not travel, such as a counter, stays as it was at the beginning of the run.

        Args:
            draws: of the noise, where clients are protected.
        """
        reduced = self._reducer.reduce()
        if self._privacy is not None:
            if draws is None:
                raise ValueError("draws: of the noise must be given, as clients are protected")
            reduced = self._privacy.noised(reduced, self._num_clients, draws)
        if self.wire.is_lossy:
            # What the way to the clients has changed is no part of their updates.
            before = self._layout.pack(self._weights)
            reduced, self.sent = before + (reduced - self.sent), before
        weights = self._layout.unpack(self._advanced(reduced))
        self.average = moving_average(self.average, weights, self._ema_decay)
        self._means = {name: reducer.reduce() for name, reducer in self._beside.items()}
        # Robust reducers hold the updates of all clients.
        del self._reducer, self._beside, self._weights
        return weights

    def _advanced(self, reduced: NDArray[np.float32]) -> NDArray[np.float32]:
        """Return the next weights, [P], after the reducer's."""
        if self._optimizer is None:
            return reduced
        before, trained = self._layout.pack(self._weights), self._trained
        self._parameter.data.copy_(torch.from_numpy(before[trained]))
        gradient = (self.sent.astype(np.float32) - reduced)[trained]
        self._parameter.grad = torch.from_numpy(gradient)
        self._optimizer.step()
        moved = reduced.copy()
        moved[trained] = self._parameter.detach().numpy()
        return moved

    def state_dict(self) -> dict[str, Weights]:
        """Return what a checkpoint must hold besides the weights, by name."""
        state: dict[str, Weights] = {}
        if self.average is not None:
            state["ema"] = self.average
        if self._optimizer is not None:
            state["server_optimizer"] = optimizer_tensors(self._optimizer)
        if self._means:
            state["means"] = {name: torch.from_numpy(m) for name, m in self._means.items()}
        return state

    def load_state_dict(self, state: Mapping[str, Weights]) -> None:
        """Take up what `state_dict` returned."""
        self.average = state.get("ema")
        if self._optimizer is not None:
            load_optimizer_tensors(self._optimizer, state.get("server_optimizer", {}))
        self._means = {name: m.numpy().copy() for name, m in state.get("means", {}).items()}


def moving_average(
    average: Weights | None, weights: Weights, decay: float | None
) -> Weights | None:
    """Move an average towards new weights; it starts as the first ones. None where decay is.

    A tensor that is not float is that of the new weights.
    """
    if decay is None:
        return None
    if average is None:
        return {name: tensor.clone() for name, tensor in weights.items()}
    return {
        name: torch.lerp(tensor, average[name], decay) if tensor.is_floating_point() else tensor
        for name, tensor in weights.items()
    }
