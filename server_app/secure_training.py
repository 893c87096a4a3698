"""The rounds of a federated run whose server sees sums of what clients send, and nothing else."""

import time
from dataclasses import dataclass
from functools import partial
from typing import cast

import numpy as np
from flwr.app import ArrayRecord, ConfigRecord, MessageType, RecordDict
from flwr.common.constant import SType
from numpy.typing import NDArray

from server_app.exchange import Question
from server_app.federated import FederatedTraining, described, left_out_records, loss_record
from server_app.log import log
from server_app.messages import Entries, record_of
from server_app.replies import UnusableReply
from server_app.rounds import TooFewRepliesError
from server_app.timing import PhaseTimer
from task.config import MIN_PEERS
from task.protocol.secure_aggregation.coordinator import MaskedSum
from task.protocol.secure_aggregation.fixed_point import decode_measures
from task.protocol.secure_aggregation.participant import Upload
from task.protocol.secure_aggregation.terms import least_to_unmask
from task.protocol.wire import UNMASK, Key, from_npy
from task.runs.layout import MASKED_SUMS_FILE
from task.runs.records import IN_SUM, TEST, TRAIN, Record, records_of

UNMASK_TYPE = f"{MessageType.TRAIN}.{UNMASK}"
# What is waited for further help with masks once there is enough of it: a node may just look.
UNMASK_PATIENCE_SECONDS = 10.0


@dataclass(frozen=True)
class Totals:
    """What the server learns of a sum.

    Attributes:
        clients: that are in it.
        values: [P], the sum of their encoded updates.
        num_images: that they count for.
        measures: means over these, by name.
        left_out: what is to be recorded of clients that are not in it, or did not help.
    """

    clients: list[int]
    values: NDArray[np.uint32]
    num_images: int
    measures: dict[str, float]
    left_out: list[Record]


class SecureTraining(FederatedTraining):
    """As `FederatedTraining`, with clients that mask what they send."""

    def minimum_nodes(self) -> int:
        """Return how many nodes there must be: a sum of fewer would hide nothing."""
        return max(MIN_PEERS, super().minimum_nodes())

    def train(self, server_round: int) -> str:
        """Train a round; see `FederatedTraining.train`.

        Raises:
            TimeoutError: the nodes for it did not come.
            TooFewRepliesError: too few clients sent something, or helped with the masks.
            DivergedError: training has diverged.
        """
        self.phases.enter("sending")
        clients = self.draw_clients(server_round)
        sent = self.strategy.broadcast(self.weights, len(clients))
        named = () if self.config.privacy.is_on else (Key.LOSS, *self.model.measures)
        try:
            totals = self.sum_up(MessageType.TRAIN, sent, server_round, clients, named, self.phases)
        except TooFewRepliesError:
            self._failed |= self._exchange.left_out.keys()
            raise
        self._failed.clear()
        measures = {name: totals.measures[name] for name in named if name != Key.LOSS}
        told = [
            *totals.left_out,
            *records_of(server_round, measures, reference=TRAIN),
            *(Record(server_round, IN_SUM, 1, client=client) for client in totals.clients),
            Record(server_round, "num_clients", len(totals.clients)),
            Record(
                server_round,
                "weight_bytes",
                sent.nbytes * len(clients) + totals.values.nbytes * len(totals.clients),
            ),
        ]
        found = "no loss told"
        if Key.LOSS in totals.measures:
            counted = totals.num_images, totals.measures[Key.LOSS]
            told.append(loss_record(server_round, counted, TRAIN))
            found = f"train loss {counted[1]:.4f}"
        if why := self.model.why_diverged(measures):
            raise self.diverged(server_round, why, told)
        self.phases.enter("aggregating")
        self.strategy.add_sum(totals.values, totals.num_images)
        self.weights = self.strategy.finish(self.private_draws(server_round))
        self.directory.record(told)
        return f"{found}, {len(totals.clients)} of {len(clients)} clients, in a masked sum"

    def evaluate(self, server_round: int) -> str | None:
        """Measure the loss on what all clients hold out; see `FederatedTraining.evaluate`."""
        if not self.model.has_test_loss or self.config.privacy.is_on:
            return None
        clients = list(self._nodes.node_ids)
        packed = self._layout.pack(self.final_weights(), self.config.federation.wire_dtype)
        named = (Key.LOSS, *self.model.loss_parts)
        try:
            totals = self.sum_up(
                MessageType.EVALUATE, packed, server_round, clients, named, PhaseTimer()
            )
        except TooFewRepliesError as error:
            log(f"{error}; no test loss")
            return None
        n = totals.num_images
        self.directory.record(records_of(server_round, totals.measures, reference=TEST, n=n))
        return f"test loss {totals.measures[Key.LOSS]:.4f}"

    def sum_up(
        self,
        message_type: str,
        packed: NDArray[np.floating],
        server_round: int,
        clients: list[int],
        named: tuple[str, ...],
        phases: PhaseTimer,
    ) -> Totals:
        """Let clients send masked uploads, and take the masks off their sum.

        Args:
            message_type: "train", or "evaluate", whose uploads have no values.
            packed: [P], the weights to start from.
            server_round: 1-based.
            clients: their numbers.
            named: the names of what they measure.
            phases: of the exchange.

        Raises:
            TooFewRepliesError: too few clients sent something, or helped with the masks.
            DivergedError: training has diverged at every client.
        """
        number = self.next_sum()
        keys = {client: self._nodes.introduced[client].keys for client in clients}
        peers = [each.to_bytes() for each in keys.values() if each is not None]
        size = len(packed) if message_type == MessageType.TRAIN else 0
        masked = MaskedSum(len(clients), size=size, num_measures=1 + len(named))
        question = self.about_weights(message_type, packed, partial(read_upload, masked=masked))
        terms: Entries = {Key.SUM: number, Key.PEERS: peers}
        entries = dict.fromkeys(clients, terms)
        for client, upload, asked in self.ask(
            question, server_round, clients, phases, entries=entries
        ):
            now = time.monotonic()
            if message_type == MessageType.TRAIN:
                # Nobody says how long it trained.
                phases.trained(now - asked, since=asked, until=now)
            masked.add(clients.index(client), upload)
        wanted = self.config.federation.min_replies if message_type == MessageType.TRAIN else 1
        enough = least_to_unmask(len(clients), wanted)
        least = max(MIN_PEERS, enough)
        survivors = [clients[place] for place in masked.survivors]
        if len(survivors) < least:
            raise TooFewRepliesError(
                f"round {server_round}: {len(survivors)} of {len(clients)} clients sent something "
                f"that can be summed, a masked sum needs {least} "
                f"({described(self._exchange.left_out)})"
            )
        left_out = left_out_records(server_round, message_type, self._exchange.left_out)
        # Others than those of a training are recorded already.
        left_out *= message_type == MessageType.TRAIN
        try:
            values, measures = self.unmask(masked, number, server_round, clients, enough, phases)
            num_images, means = decode_measures(measures)
        except ValueError as error:
            raise TooFewRepliesError(
                f"round {server_round}: no sum of {len(survivors)} clients: {error} "
                f"({described(self._exchange.left_out)})"
            ) from error
        left_out += left_out_records(server_round, UNMASK, self._exchange.left_out)
        found = dict(zip(named, means, strict=True))
        return Totals(survivors, values, num_images, found, left_out)

    def unmask(
        self,
        masked: MaskedSum,
        number: int,
        server_round: int,
        clients: list[int],
        enough: int,
        phases: PhaseTimer,
    ) -> tuple[NDArray[np.uint32], NDArray[np.uint64]]:
        """Ask the clients of a sum for help with its masks, once, and take them off.

        Raises:
            WrongSharesError: too few helped, or with wrong shares.
        """
        survivors = masked.survivors
        asked = ConfigRecord(
            {Key.RUN_ID: self.directory.run_id, Key.SUM: number, Key.SURVIVORS: survivors}
        )
        content = RecordDict({Key.CONFIG: asked})
        question = Question(UNMASK_TYPE, content, partial(read_shares, masked=masked))
        entries: dict[int, Entries] = {
            clients[place]: {Key.SHARES: masked.question(place)} for place in survivors
        }
        answers: dict[int, list[bytes]] = {}
        since = 0.0

        def is_over() -> bool:
            return len(answers) >= enough and time.monotonic() > since + UNMASK_PATIENCE_SECONDS

        for client, shares, _ in self._exchange.ask(
            question, server_round, list(entries), phases, entries=entries, is_over=is_over
        ):
            answers[clients.index(client)] = shares
            since = time.monotonic()
        return masked.total(answers)

    def next_sum(self) -> int:
        """Return the number of a new sum, which no start of the run has used or will use."""
        number = int((self.directory.read_json(MASKED_SUMS_FILE) or {"last": 0})["last"]) + 1
        self.directory.write_json(MASKED_SUMS_FILE, {"last": number})
        return number


def read_upload(content: RecordDict, masked: MaskedSum) -> Upload:
    """Return a masked upload.

    Raises:
        UnusableReply: it is none that fits the sum.
    """
    arrays = record_of(content, Key.ARRAYS, ArrayRecord)
    said = record_of(content, Key.CONFIG, ConfigRecord)
    if {*arrays} != {Key.PACKED, Key.MEASURES}:
        raise UnusableReply(
            f"arrays of a masked upload must be packed and measures, got {[*arrays]}"
        )
    try:
        if any(array.stype != SType.NUMPY for array in arrays.values()):
            raise TypeError("another serialization")
        values, measures = (from_npy(arrays[name].data) for name in (Key.PACKED, Key.MEASURES))
    except Exception as error:
        # NumPy's reader raises nearly anything on bytes that were made to break it.
        raise UnusableReply(f"a sum that cannot be read: {type(error).__name__}") from error
    upload = Upload(values, measures, list_of(said, Key.SHARES), list_of(said, Key.COMMITMENTS))
    try:
        masked.check(upload)
    except ValueError as error:
        raise UnusableReply(f"an upload that does not fit the sum: {error}") from error
    return upload


def read_shares(content: RecordDict, masked: MaskedSum) -> list[bytes]:
    """Return what a client says to take masks off.

    Raises:
        UnusableReply: it is no answer.
    """
    said = record_of(content, Key.CONFIG, ConfigRecord)
    shares = list_of(said, Key.SHARES)
    try:
        masked.check_answer(shares)
    except ValueError as error:
        raise UnusableReply(f"shares that do not fit the sum: {error}") from error
    return shares


def list_of(said: ConfigRecord, name: str) -> list[bytes]:
    """Return a list of a client, of which nothing is known yet; empty where there is none."""
    found = said.get(name)
    return cast(list[bytes], found) if isinstance(found, list) else []
