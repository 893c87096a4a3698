"""Which aggregation a run uses, and those that bear replies which are wrong or made to do harm.

FedAvg believes every client: one that sends anything finite moves the mean as far as it likes. The
median, the trimmed mean and Krum are Flower's own, and bear a minority of such replies; what each
asks for and costs stands in `conf/federation/default.yaml`.
"""

from collections.abc import Callable, Iterable, Mapping

import numpy as np
from flwr.app import Array, ArrayRecord, Message, MetricRecord, RecordDict
from flwr.common.constant import SType
from flwr.serverapp.strategy import FedAvg, FedMedian, FedTrimmedAvg, MultiKrum
from numpy.typing import NDArray

from server_app.aggregation import (
    StreamingFedAvg,
    Weighing,
    chunks,
    counted_loss,
    loss_record,
)
from server_app.messages import packed_record, packed_weights, record_of
from task.config import FederationConfig
from task.protocol.wire import Key, to_npy

# From the replies of a round, each with the number of its client, and the packed weights that
# were sent, to the packed weights and the loss; (None, None) where no reply came.
Aggregate = Callable[
    [Iterable[tuple[int, Message]], NDArray[np.floating]],
    tuple[ArrayRecord | None, MetricRecord | None],
]


def build_aggregation(config: FederationConfig, weighing: Weighing) -> Aggregate:
    """Build what `federation.aggregation` names.

    Args:
        config: of the run.
        weighing: how much each client counts.

    Raises:
        ValueError: it names none.
    """
    if config.aggregation == "fedavg":
        average = StreamingFedAvg(weighing)
        return lambda replies, _: average.aggregate_train(0, (r for _, r in replies))
    if config.aggregation == "median":
        return OverUpdates(FedMedian(), weighing)
    if config.aggregation == "trimmed_mean":
        return OverUpdates(FedTrimmedAvg(beta=config.trim_fraction), weighing)
    if config.aggregation == "krum":
        krum = MultiKrum(
            num_malicious_nodes=config.num_malicious, num_nodes_to_select=config.num_selected
        )
        return OverUpdates(krum, weighing)
    raise ValueError(f"federation.aggregation: no such aggregation: {config.aggregation}")


class OverUpdates:
    """One of Flower's strategies over the updates of clients: their weights less those sent.

    The result is that over the weights, for none of the strategies cares for a shift. Of updates
    Krum's distances are exact to float32; of weights, whose norms are a thousand times larger, they
    are mostly rounding, and in float16 infinite. Clients count alike, and in the order of their
    numbers, so that the order of arrival does not show.

    Source: Yin et al. 2018 (arXiv 1803.01498); Blanchard et al. 2017 (arXiv 1703.02757).
    """

    def __init__(self, strategy: FedAvg, weighing: Weighing) -> None:
        """Take over a strategy.

        Args:
            strategy: aggregates float32 arrays one by one, or looks at all of them.
            weighing: of the losses that clients report.
        """
        self._strategy = strategy
        self._weighing = weighing

    def __call__(
        self, replies: Iterable[tuple[int, Message]], sent: NDArray[np.floating]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """Aggregate packed weights and losses; (None, None) where no reply came.

        Args:
            replies: checked already, with the numbers of their clients, in any order.
            sent: [P], the packed weights that the clients started from.
        """
        updates: dict[int, Message] = {}
        losses = []
        for client, reply in replies:
            losses.append(counted_loss(reply.content))
            # Nothing else that a client sends reaches Flower, which ends the run over a surplus.
            reply.content = update_of(packed_weights(reply.content), sent)
            updates[client] = reply
        if not losses:
            return None, None
        ordered = [reply for _, reply in sorted(updates.items())]
        arrays, _ = self._strategy.aggregate_train(0, ordered)
        for reply in ordered:
            # Flower's views keep the content in memory until Python looks for circles.
            record_of(reply.content, Key.ARRAYS, ArrayRecord).clear()
        weights = packed_record(applied(arrays or {}, sent))
        return weights, loss_record(losses, self._weighing)


def update_of(weights: NDArray[np.floating], sent: NDArray[np.floating]) -> RecordDict:
    """Make the content of a reply that holds an update, in pieces, from a client of one image.

    Flower copies all replies of an array several times: of a piece that is little.
    """
    pieces = ArrayRecord()
    for number, chunk in enumerate(chunks(weights)):
        update = weights[chunk].astype(np.float32) - sent[chunk].astype(np.float32)
        pieces[str(number)] = Array("float32", update.shape, SType.NUMPY, to_npy(update))
    metrics = MetricRecord({Key.NUM_EXAMPLES: 1})
    return RecordDict({Key.ARRAYS: pieces, Key.METRICS: metrics})


def applied(pieces: Mapping[str, Array], sent: NDArray[np.floating]) -> NDArray[np.float32]:
    """Add an update, in pieces, to the weights that were sent: [P] float32."""
    weights = sent.astype(np.float32)
    for number, chunk in enumerate(chunks(weights)):
        weights[chunk] += pieces[str(number)].numpy()
    return weights
