"""The rounds of a federated run: who trains, what is asked of them, what comes back."""

import dataclasses
import time
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from flwr.app import (
    ArrayRecord,
    ConfigRecord,
    Message,
    MessageType,
    MetricRecord,
    RecordDict,
)
from flwr.serverapp import Grid
from numpy.typing import NDArray

from server_app.aggregation import Weighing, counted_loss
from server_app.dataset import (
    is_simulation,
    load_images,
    record_data,
    record_partition,
    simulated_at_once,
)
from server_app.evaluation import GlobalEvaluation, HospitalEvaluation
from server_app.exchange import (
    Diverged,
    FalseClaim,
    UnusableReply,
    addressed,
    check_claim,
    check_metrics,
    check_update,
    check_weights,
    checked_content,
    exchange,
    is_silent,
)
from server_app.hospital_scores import (
    QUALITY_TYPE,
    Scores,
    check_scores,
    score_records,
    scores_of,
)
from server_app.log import log
from server_app.messages import (
    images_record,
    packed_record,
    packed_weights,
    record_of,
)
from server_app.nodes import GRACE_SECONDS, QUERY_TIMEOUT_SECONDS, Nodes, sample_clients
from server_app.robust import build_aggregation
from server_app.rounds import RoundLoop, Weights
from server_app.timing import PhaseTimer
from task.data import ImageSet
from task.data.partition import partition_dataset
from task.memory import total_memory
from task.progress import tracked
from task.protocol.wire import QUALITY, Key, WeightLayout
from task.runs.records import LEFT_OUT, TEST, TRAIN, Record, records_of
from task.runs.repeat import describe_report_of
from task.runs.run_directory import CLASS_COUNTS_FILE, NODES_FILE, RunDirectory, client_numbers

# How far the weights of a client lie from those that it was sent; the server's own measurement.
UPDATE_NORM = "update-norm"
# What is recorded of a client's training beside its loss, whatever else it sends.
TRAIN_METRICS = {
    Key.SECONDS: "seconds",
    Key.SECONDS_BESIDE: "seconds_beside",
    Key.IMAGES_PER_SECOND: "images_per_second",
    UPDATE_NORM: "update_norm",
}

# Seconds between two looks for replies: a simulation's network is in memory, and Flower hands
# messages out there every 0.1 s, which a client's turn cannot be quicker than.
POLL_SIMULATION, POLL_NETWORK = 0.02, 2.0

# Of this machine's memory, for replies that arrive at once.
MEMORY_SHARE = 0.25


class TooFewRepliesError(RuntimeError):
    """An attempt at a round that had fewer than `federation.min_replies` usable replies."""


@dataclass(frozen=True)
class Question:
    """What clients are asked in an exchange.

    Attributes:
        message_type: Flower's, such as "train" or "evaluate.quality".
        content: the records that all messages share.
        check: raises UnusableReply; such a client is named in log and metrics, and left out.
        activity: what it is called there.
    """

    message_type: str
    content: RecordDict
    check: Callable[[RecordDict], None]
    activity: str


class FederatedTraining(RoundLoop):
    """Algorithm 1 of the paper, on the server's side.

    Attributes:
        simulated: whether the nodes are shares of one data set on this machine.
        ema: the moving average of the weights over rounds; None where the run keeps none.
    """

    def __init__(self, grid: Grid, directory: RunDirectory) -> None:
        """Prepare a run; nothing is sent yet.

        Args:
            grid: Flower's view of the network.
            directory: of the run, open.
        """
        super().__init__(directory)
        self.ema: Weights | None = None
        self._grid = grid
        self.simulated = is_simulation(grid)
        self._nodes = Nodes(
            grid,
            simulated=self.simulated,
            num_classes=len(self.config.data.classes),
            known=client_numbers(directory.path),
        )
        self._weighing = Weighing.of(self.config.federation, simulated=self.simulated)
        self._aggregate = build_aggregation(self.config.federation, self._weighing)
        self._layout = WeightLayout.of(self.model)
        self._left_out: dict[int, UnusableReply] = {}

    def gather(self) -> None:
        """Wait for the nodes, and deal the images out where they are simulated."""
        num_nodes = len(self.gather_nodes(patience=QUERY_TIMEOUT_SECONDS))
        if self.simulated:
            federation = dataclasses.replace(self.config.federation, num_supernodes=num_nodes)
            self.config = dataclasses.replace(self.config, federation=federation)
            self.dataset = load_images(self.config)
            partition = partition_dataset(self.config, self.dataset, num_nodes)
            record_partition(self.config, partition, self.directory)
            record_data(self.config, self.dataset, self.directory, partition)
        federation = self.config.federation
        if federation.keep_local_models and not self.simulated:
            raise ValueError(
                "federation.keep_local_models must be [] with real nodes, whose own weights stay "
                f"with them, got {federation.keep_local_models}"
            )
        asked = federation.clients_per_round
        if asked is not None and asked > num_nodes and not self.config.resume:
            raise ValueError(
                f"federation.clients_per_round must be at most {num_nodes}, the nodes that are "
                f"there, got {asked}; federation.min_nodes={asked} waits for as many"
            )

    def describe(self) -> str:
        """Say how many hospitals train."""
        return f"{len(self._nodes.node_ids)} hospitals"

    def state(self) -> dict[str, Weights]:
        """Return the moving average, where the run keeps one."""
        return {} if self.ema is None else {"ema": self.ema}

    def restore(self, state: Mapping[str, Weights]) -> None:
        """Take the moving average up."""
        self.ema = state.get("ema")

    def final_weights(self) -> Weights:
        """Return the moving average, where the run keeps one, or the weights."""
        return self.weights if self.ema is None else self.ema

    def gather_nodes(self, *, patience: float) -> list[int]:
        """Wait for enough nodes and return the numbers of all that are there.

        Args:
            patience: see `Nodes.wait_for`.

        Raises:
            TimeoutError: fewer than `federation.min_nodes` nodes came, or, of real ones, fewer
                than could send `federation.min_replies`.
        """
        federation = self.config.federation
        minimum = federation.min_nodes
        if not self.simulated:
            minimum = max(minimum, federation.min_replies)
        try:
            self._nodes.wait_for(minimum, seconds=federation.node_wait, patience=patience)
        except TimeoutError as error:
            raise TimeoutError(f"{error}{self.what_is_saved()}") from error
        if not self.simulated:
            self.directory.write_json(NODES_FILE, self._nodes.numbers)
            self.record_class_counts()
        return list(self._nodes.node_ids)

    def record_class_counts(self) -> None:
        """Write down the images of each class of every client that this run has seen."""
        classes = self.config.data.classes
        stored = self.directory.read_json(CLASS_COUNTS_FILE) or {"classes": classes, "clients": {}}
        told = {str(client): said.class_counts for client, said in self._nodes.introduced.items()}
        clients = {**(stored["clients"] if stored["classes"] == classes else {}), **told}
        ordered = {client: clients[client] for client in sorted(clients, key=int)}
        found = {"classes": classes, "clients": ordered}
        self.directory.write_json(CLASS_COUNTS_FILE, found)

    def what_is_saved(self) -> str:
        """Say after a failure what the run can go on from, if a round is complete."""
        last = self.directory.last_round
        if last == 0:
            return ""
        how = describe_report_of(self.directory.path)
        return f"; everything up to round {last} is saved, {how}"

    def train(self, server_round: int) -> str:
        """Let the clients of a round train and average their weights.

        With real nodes a round that fails is tried again, with those that are there then. Clients
        of a simulation would send the same again.

        Raises:
            TimeoutError: the nodes for it did not come.
            RuntimeError: `federation.round_attempts` times fewer than `federation.min_replies`
                usable replies came.
        """
        attempts = 1 if self.simulated else self.config.federation.round_attempts
        failed: set[int] = set()
        for attempt in range(1, attempts):
            try:
                return self.train_once(server_round, failed)
            except TooFewRepliesError as error:
                failed |= self._left_out.keys()
                log(f"{error}; attempt {attempt} of {attempts}, nothing of it is kept")
        try:
            return self.train_once(server_round, failed)
        except TooFewRepliesError as error:
            raise RuntimeError(f"{error}{self.what_is_saved()}") from error

    def train_once(self, server_round: int, failed: Collection[int]) -> str:
        """Try a round; nothing is recorded, and no weights change, unless it succeeds.

        Args:
            server_round: 1-based.
            failed: clients that were left out of earlier attempts; others are drawn where there
                are as many as are wanted.

        Raises:
            TimeoutError: the nodes for it did not come.
            TooFewRepliesError: there were fewer than `federation.min_replies` usable replies.
            DivergedError: there was none, because training has diverged at every client.
        """
        self.phases.enter("sending")
        federation = self.config.federation
        available = self.gather_nodes(patience=GRACE_SECONDS)
        others = [client for client in available if client not in failed]
        wanted = federation.clients_per_round
        clients = sample_clients(
            others if wanted is not None and len(others) >= wanted else available,
            wanted,
            seed=self.config.seed,
            server_round=server_round,
        )
        if wanted is not None:
            log(f"round {server_round}: clients {' '.join(map(str, clients))}")
        losses: dict[int, tuple[int, float]] = {}
        told: list[Record] = []
        kept = self.clients_to_keep(server_round, clients)
        packed = self._layout.pack(self.weights, federation.wire_dtype)
        check_train = self.training_check(packed, len(clients))

        def usable_replies() -> Iterator[tuple[int, Message]]:
            question = self.about_weights(MessageType.TRAIN, server_round, packed, check_train)
            for client, reply, sent in self.ask(question, server_round, clients, self.phases):
                losses[client] = counted_loss(reply.content)
                now = time.monotonic()
                metrics = possible_times(reply.content, now - sent)
                self.phases.trained(metrics.get(Key.SECONDS, 0.0), since=sent, until=now)
                told.append(loss_record(server_round, losses[client], TRAIN, client))
                spent = {
                    name: metrics[key] for key, name in TRAIN_METRICS.items() if key in metrics
                }
                told.extend(records_of(server_round, spent, client=client))
                if client in kept:
                    own = self._layout.unpack(packed_weights(reply.content))
                    self.directory.save_local_model(server_round, client, own)
                yield client, reply

        arrays, metrics = self._aggregate(usable_replies(), packed)
        self.phases.enter("aggregating")
        if not losses and (self.simulated or len({*failed, *clients}) > 1 or len(available) == 1):
            # One hospital of several does not end the run with what it sends: others are drawn.
            self.check_not_diverged(server_round)
        if len(losses) < federation.min_replies or arrays is None or metrics is None:
            raise TooFewRepliesError(
                f"round {server_round}: {len(losses)} of {len(clients)} clients sent usable "
                f"weights, federation.min_replies={federation.min_replies} "
                f"({described(self._left_out)})"
            )
        told += self.held_to_their_share(server_round, losses)
        told += [
            left_out_record(server_round, client, MessageType.TRAIN, why)
            for client, why in self._left_out.items()
        ]
        self.directory.record(told)
        self.weights = self._layout.unpack(arrays[Key.PACKED].numpy())
        self.ema = moving_average(self.ema, self.weights, federation.ema_decay)
        loss = float(metrics[Key.LOSS])  # type: ignore[arg-type]
        num_images = sum(count for count, _ in losses.values())
        self.directory.record(
            [
                loss_record(server_round, (num_images, loss), TRAIN),
                Record(server_round, "num_clients", len(losses)),
            ]
        )
        found = self._weighing.describe([*losses.values()])
        return f"train loss {found}, {len(losses)} of {len(clients)} clients"

    def held_to_their_share(
        self, server_round: int, losses: Mapping[int, tuple[int, float]]
    ) -> list[Record]:
        """Log which clients count for fewer images than they claim; return what to record of it.

        Args:
            server_round: 1-based.
            losses: images and loss of each client that was used, by its number.
        """
        counts = {client: count for client, (count, _) in losses.items()}
        if not self._weighing.by_images:
            return []
        weights = dict(zip(counts, self._weighing.weights([*counts.values()]), strict=True))
        held = [client for client in sorted(counts) if weights[client] < counts[client]]
        for client in held:
            log(
                f"round {server_round}: client {client} claims {counts[client]} images and counts "
                f"as {weights[client]}, at most "
                f"federation.max_weight_share={self.config.federation.max_weight_share} of all"
            )
        return [
            Record(server_round, "counted_images", weights[client], client=client)
            for client in held
        ]

    def check_not_diverged(self, server_round: int) -> None:
        """Check, where no reply was usable, that it is not because training has diverged.

        Raises:
            DivergedError: every client was left out for that.
        """
        if self._left_out and all(isinstance(why, Diverged) for why in self._left_out.values()):
            raise self.diverged(server_round, described(self._left_out))

    def training_check(
        self, packed: NDArray[np.floating], num_clients: int
    ) -> Callable[[RecordDict], None]:
        """Make the check of a training's replies, which also measures their updates.

        Args:
            packed: [P], the weights that the clients are sent.
            num_clients: how many are asked.
        """

        def check(content: RecordDict) -> None:
            check_metrics(content)
            check_weights(content, size=self._layout.size, num_clients=num_clients)
            norm = check_update(content, packed, limit=self.config.federation.max_update_norm)
            # Whatever a client says under this name, it is measured here.
            record_of(content, Key.METRICS, MetricRecord)[UPDATE_NORM] = norm

        return check

    def clients_to_keep(self, server_round: int, clients: list[int]) -> set[int]:
        """Choose the clients of the last round whose own weights are kept."""
        if server_round != self.config.federation.rounds:
            return set()
        self.directory.forget_local_models()
        wanted = set(self.config.federation.keep_local_models)
        for client in sorted(wanted - set(clients)):
            log(f"round {server_round}: client {client} does not train, its weights are not kept")
        return wanted & set(clients)

    def evaluate(self, server_round: int) -> str | None:
        """Measure the loss of the global weights on what all clients hold out, and say it.

        None where no client could say; that is no reason to give the round's training up.
        """
        losses: list[tuple[int, float]] = []

        def check_loss(content: RecordDict) -> None:
            metrics = record_of(content, Key.METRICS, MetricRecord)
            # A client without held-out images has no loss, and that is no failure.
            if metrics.get(Key.NUM_EXAMPLES) != 0:
                check_metrics(content)

        clients = list(self._nodes.node_ids)
        packed = self._layout.pack(self.final_weights(), self.config.federation.wire_dtype)
        question = self.about_weights(MessageType.EVALUATE, server_round, packed, check_loss)
        for client, reply, _ in self.ask(question, server_round, clients, PhaseTimer()):
            metrics = record_of(reply.content, Key.METRICS, MetricRecord)
            if metrics[Key.NUM_EXAMPLES] != 0:
                losses.append(counted_loss(reply.content))
                self.directory.record([loss_record(server_round, losses[-1], TEST, client)])
        if not losses:
            # One client of several does not end the run with what it sends.
            if len(self._left_out) == len(clients):
                self.check_not_diverged(server_round)
            return None
        num_images = sum(count for count, _ in losses)
        combined = num_images, self._weighing.combine(losses)
        self.directory.record([loss_record(server_round, combined, TEST)])
        return f"test loss {self._weighing.describe(losses)}"

    def open_evaluation(self) -> GlobalEvaluation:
        """Let the hospitals score images where they alone have real ones."""
        if self.simulated:
            return super().open_evaluation()
        return HospitalEvaluation(
            self.directory, self.model, device=self.device, ask=self.ask_for_scores
        )

    def ask_for_scores(self, server_round: int, generated: ImageSet) -> list[Scores]:
        """Let every hospital that is there score images; returns what they could say."""
        config = ConfigRecord({Key.SERVER_ROUND: server_round})
        content = RecordDict({Key.ARRAYS: images_record(generated), Key.CONFIG: config})
        question = Question(QUALITY_TYPE, content, check_scores, QUALITY)
        answers = []
        clients = list(self._nodes.node_ids)
        for client, reply, _ in self.ask(question, server_round, clients, PhaseTimer()):
            scores = scores_of(reply.content)
            n = len(generated)
            self.directory.record(
                score_records(server_round, scores, self.config, n=n, client=client)
            )
            answers.append(scores)
        return answers

    def about_weights(
        self,
        message_type: str,
        server_round: int,
        packed: NDArray[np.floating],
        check: Callable[[RecordDict], None],
    ) -> Question:
        """Make the question about packed weights, which all messages share.

        Args:
            message_type: "train" or "evaluate".
            server_round: 1-based.
            packed: [P], the weights to start from.
            check: of the replies.
        """
        config = ConfigRecord({Key.SERVER_ROUND: server_round})
        config[Key.PRECISION] = self.config.train.precision
        content = RecordDict({Key.ARRAYS: packed_record(packed), Key.CONFIG: config})
        return Question(message_type, content, check, message_type)

    def ask(
        self, question: Question, server_round: int, clients: list[int], phases: PhaseTimer
    ) -> Iterator[tuple[int, Message, float]]:
        """Ask clients and yield the replies that can be used, as they arrive.

        The messages share their arrays. A simulation's network is the memory of this process, and
        keeps them shared; Ray then writes each message into its store for the process that
        trains, and each reply on its way back.

        Args:
            question: to each of them.
            server_round: 1-based.
            clients: their numbers.
            phases: of the exchange.

        Yields:
            Client, reply, and `time.monotonic()` when the client was asked.
        """
        federation = self.config.federation
        node_ids = self._nodes.node_ids
        self._left_out.clear()
        arrays = record_of(question.content, Key.ARRAYS, ArrayRecord)
        messages = {
            client: addressed(
                question.content,
                node_id=node_ids[client],
                message_type=question.message_type,
                timeout=federation.round_timeout,
                entries={Key.CLIENT: client},
            )
            for client in clients
        }
        replies = exchange(
            self._grid,
            messages,
            timeout=federation.round_timeout,
            poll_seconds=POLL_SIMULATION if self.simulated else POLL_NETWORK,
            at_once=self.at_once(sum(len(array.data) for array in arrays.values())),
            phases=phases,
        )
        stage = f"round {server_round}: {question.activity}, replies of {len(clients)} clients"
        for reply in tracked(replies, len(clients), stage):
            phases.enter("aggregating")
            try:
                content = checked_content(reply, timeout=federation.round_timeout)
                check_claim(content, self._nodes.num_images(reply.client))
                question.check(content)
            except UnusableReply as reason:
                self._left_out[reply.client] = reason
                log(f"round {server_round}: client {reply.client} is left out: {reason}")
                if is_silent(reply) and not self.simulated:
                    self._nodes.doubt(reply.client, "is silent")
                if isinstance(reason, FalseClaim):
                    self._nodes.doubt(reply.client, "claims more images than it said it has")
                # Those of a training are recorded once it has succeeded.
                if question.message_type != MessageType.TRAIN:
                    what = left_out_record(server_round, reply.client, question.activity, reason)
                    self.directory.record([what])
                continue
            if reply.message is not None and reply.sent is not None:
                yield reply.client, reply.message, reply.sent

    def at_once(self, message_bytes: int) -> int:
        """Return how many clients may be at work at a time, `federation.max_in_flight`.

        Where it is null, a simulation has as many as keep its processes busy; of real nodes all,
        or as many as could reply at once into `MEMORY_SHARE` of this machine's memory.

        Args:
            message_bytes: of the arrays of a message, as many as a reply may hold.
        """
        if self.config.federation.max_in_flight is not None:
            return self.config.federation.max_in_flight
        if self.simulated:
            return simulated_at_once(message_bytes)
        return max(1, int(total_memory() * MEMORY_SHARE) // message_bytes)


def loss_record(
    server_round: int, counted: tuple[int, float], reference: str, client: int | None = None
) -> Record:
    """Make the record of a loss over so many images, of a client or of all of them."""
    n, loss = counted
    return Record(server_round, "loss", loss, client=client, reference=reference, n=n)


def left_out_record(server_round: int, client: int, activity: str, reason: UnusableReply) -> Record:
    """Make the record of a reply that is not used."""
    context = {"activity": activity, "reason": str(reason)}
    return Record(server_round, LEFT_OUT, 1, client=client, context=context)


def possible_times(content: RecordDict, elapsed: float) -> dict[str, Any]:
    """Return the metrics of a reply, with no time that is longer than the server has waited.

    Args:
        content: a reply that was checked.
        elapsed: seconds between the message and its reply, by the server's clock.
    """
    metrics: dict[str, Any] = dict(record_of(content, Key.METRICS, MetricRecord))
    times = [name for name in (Key.SECONDS, Key.SECONDS_BESIDE) if name in metrics]
    return {**metrics, **{name: min(float(metrics[name]), elapsed) for name in times}}


def described(left_out: Mapping[int, UnusableReply]) -> str:
    """Say which clients were left out for which reason, each reason once."""
    by_reason: dict[str, list[int]] = {}
    for client, reason in sorted(left_out.items()):
        by_reason.setdefault(str(reason), []).append(client)
    return "; ".join(
        f"{'client' if len(clients) == 1 else 'clients'} {' '.join(map(str, clients))}: {reason}"
        for reason, clients in by_reason.items()
    )


def moving_average(
    average: Weights | None, weights: Weights, decay: float | None
) -> Weights | None:
    """Move an average towards new weights; it starts as the first ones. None where decay is."""
    if decay is None:
        return None
    if average is None:
        return {name: tensor.clone() for name, tensor in weights.items()}
    return {name: torch.lerp(tensor, average[name], decay) for name, tensor in weights.items()}
