"""The rounds of a federated run: who trains, what is asked of them, what comes back."""

import dataclasses
import math
import os
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

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

from server_app.aggregation import StreamingFedAvg
from server_app.evaluation import GlobalEvaluation, HospitalEvaluation
from server_app.exchange import (
    UnusableReply,
    addressed,
    check_metrics,
    check_weights,
    checked_content,
    exchange,
)
from server_app.log import log
from server_app.phases import Phases
from server_app.quality import QUALITY_TYPE, Scores, check_scores, scores_of
from server_app.records import (
    images_record,
    packed_record,
    packed_weights,
    record_of,
    recorded_name,
)
from server_app.roster import Roster, sample_clients
from server_app.simulation import load_images, record_partition, simulated_at_once
from server_app.training_run import TrainingRun, Weights
from task.data import ImageSet
from task.partition import partition_dataset
from task.run_directory import HOW_TO_RESUME, NODES_FILE, RunDirectory
from task.wire import QUALITY, Key, WeightLayout

# What is written down of a client's training, whatever else it sends.
TRAIN_METRICS = (
    Key.NUM_EXAMPLES,
    Key.LOSS,
    Key.SECONDS,
    Key.SECONDS_BESIDE,
    Key.IMAGES_PER_SECOND,
)

# Seconds between two looks for replies: a simulation's network is in memory, and Flower hands
# messages out there every 0.1 s, which a client's turn cannot be quicker than.
POLL_SIMULATION, POLL_NETWORK = 0.02, 2.0

# Of this machine's memory, for replies that arrive at once.
MEMORY_SHARE = 0.25


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


class FederatedRun(TrainingRun):
    """Algorithm 1 of the paper, on the server's side.

    Attributes:
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
        self._roster = Roster(grid, known=directory.read_json(NODES_FILE))
        self._strategy = StreamingFedAvg()
        self._layout = WeightLayout.of(self.model)
        self._left_out: set[str] = set()

    def gather(self) -> None:
        """Wait for the nodes, and deal the images out where they are simulated."""
        num_nodes = len(self.gather_nodes())
        if self.simulated:
            federation = dataclasses.replace(self.config.federation, num_supernodes=num_nodes)
            self.config = dataclasses.replace(self.config, federation=federation)
            self.dataset = load_images(self.config)
            partition = partition_dataset(self.config, self.dataset, num_nodes)
            record_partition(self.config, partition, self.directory)
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
        return f"{len(self._roster.node_ids)} hospitals"

    def state(self) -> dict[str, Weights]:
        """Return the moving average, where the run keeps one."""
        return {} if self.ema is None else {"ema": self.ema}

    def restore(self, state: Mapping[str, Weights]) -> None:
        """Take the moving average up."""
        self.ema = state.get("ema")

    def final_weights(self) -> Weights:
        """Return the moving average, where the run keeps one, or the weights."""
        return self.weights if self.ema is None else self.ema

    def gather_nodes(self) -> list[int]:
        """Wait for `federation.min_nodes` nodes and return the numbers of all that are there."""
        federation = self.config.federation
        self._roster.wait_for(federation.min_nodes, seconds=federation.node_wait)
        if not self.simulated:
            self.directory.write_json(NODES_FILE, self._roster.numbers)
        return list(self._roster.node_ids)

    @property
    def simulated(self) -> bool:
        """Whether the nodes are shares of one data set on this machine."""
        return self._roster.num_partitions is not None

    def train(self, server_round: int) -> str:
        """Let the clients of a round train and average their weights.

        Raises:
            RuntimeError: fewer than `federation.min_replies` usable replies came.
        """
        self.phases.enter("sending")
        federation = self.config.federation
        clients = sample_clients(
            self.gather_nodes(),
            federation.clients_per_round,
            seed=self.config.seed,
            server_round=server_round,
        )
        if federation.clients_per_round is not None:
            log(f"round {server_round}: clients {' '.join(map(str, clients))}")
        used: list[int] = []
        self._left_out.clear()
        kept = self.clients_to_keep(server_round, clients)

        def usable_replies() -> Iterator[Message]:
            question = self.about_weights(
                MessageType.TRAIN, server_round, self.weights, check_train
            )
            for client, reply, sent in self.ask(question, server_round, clients, self.phases):
                used.append(client)
                metrics = record_of(reply.content, Key.METRICS, MetricRecord)
                seconds = float(metrics.get(Key.SECONDS, 0.0))  # type: ignore[arg-type]
                self.phases.trained(seconds, since=sent, until=time.monotonic())
                told = {name: metrics[name] for name in TRAIN_METRICS if name in metrics}
                self.record(server_round, client, "train", told)
                if client in kept:
                    own = self._layout.unpack(packed_weights(reply.content))
                    self.directory.save_local_model(server_round, client, own)
                yield reply

        def check_train(content: RecordDict) -> None:
            check_metrics(content)
            check_weights(content, size=self._layout.size, num_clients=len(clients))

        arrays, metrics = self._strategy.aggregate_train(server_round, usable_replies())
        self.phases.enter("aggregating")
        if len(used) < federation.min_replies or arrays is None or metrics is None:
            saved = f"; everything up to round {server_round - 1} is saved: to go on, "
            raise RuntimeError(
                f"round {server_round}: {len(used)} of {len(clients)} clients sent usable weights, "
                f"federation.min_replies={federation.min_replies} "
                f"({'; '.join(sorted(self._left_out))})"
                + (saved + HOW_TO_RESUME if server_round > 1 else "")
            )
        self.weights = self._layout.unpack(arrays[Key.PACKED].numpy())
        self.ema = moving_average(self.ema, self.weights, federation.ema_decay)
        loss = float(metrics[Key.LOSS])  # type: ignore[arg-type]
        self.directory.record(
            server_round, "global", {"train_loss": loss, "num_clients": len(used)}
        )
        return f"train loss {loss:.4f}, {len(used)} of {len(clients)} clients"

    def clients_to_keep(self, server_round: int, clients: list[int]) -> set[int]:
        """Choose the clients of the last round whose own weights are kept."""
        if server_round != self.config.federation.rounds:
            return set()
        self.directory.forget_local_models()
        wanted = set(self.config.federation.keep_local_models)
        for client in sorted(wanted - set(clients)):
            log(f"round {server_round}: client {client} does not train, its weights are not kept")
        return wanted & set(clients)

    def evaluate(self, server_round: int) -> float | None:
        """Return the loss of the global weights on what all clients hold out.

        None where no client could say; that is no reason to give the round's training up.
        """
        losses: list[float] = []
        num_examples = 0

        def check_loss(content: RecordDict) -> None:
            metrics = record_of(content, Key.METRICS, MetricRecord)
            # A client without held-out images has no loss, and that is no failure.
            if metrics.get(Key.NUM_EXAMPLES) != 0:
                check_metrics(content)

        clients = list(self._roster.node_ids)
        question = self.about_weights(
            MessageType.EVALUATE, server_round, self.final_weights(), check_loss
        )
        for client, reply, _ in self.ask(question, server_round, clients, Phases()):
            metrics = record_of(reply.content, Key.METRICS, MetricRecord)
            count = int(metrics[Key.NUM_EXAMPLES])  # type: ignore[arg-type]
            if count > 0:
                loss = float(metrics[Key.LOSS])  # type: ignore[arg-type]
                losses.append(loss * count)
                num_examples += count
                told = {Key.NUM_EXAMPLES: count, Key.LOSS: loss}
                self.record(server_round, client, "test", told)
        if not losses:
            return None
        mean = math.fsum(losses) / num_examples
        self.directory.record(server_round, "global", {"test_loss": mean})
        return mean

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
        clients = list(self._roster.node_ids)
        for client, reply, _ in self.ask(question, server_round, clients, Phases()):
            scores = scores_of(reply.content)
            self.record(server_round, client, QUALITY, scores)
            answers.append(scores)
        return answers

    def about_weights(
        self,
        message_type: str,
        server_round: int,
        weights: Weights,
        check: Callable[[RecordDict], None],
    ) -> Question:
        """Make the question about weights, packed and serialised once for all messages.

        Args:
            message_type: "train" or "evaluate".
            server_round: 1-based.
            weights: the ones to start from.
            check: of the replies.
        """
        packed = self._layout.pack(weights, self.config.federation.wire_dtype)
        config = ConfigRecord({Key.SERVER_ROUND: server_round})
        config[Key.PRECISION] = self.config.train.precision
        content = RecordDict({Key.ARRAYS: packed_record(packed), Key.CONFIG: config})
        return Question(message_type, content, check, message_type)

    def ask(
        self, question: Question, server_round: int, clients: list[int], phases: Phases
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
        node_ids = self._roster.node_ids
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
        for reply in exchange(
            self._grid,
            messages,
            timeout=federation.round_timeout,
            poll_seconds=POLL_SIMULATION if self.simulated else POLL_NETWORK,
            at_once=self.at_once(sum(len(array.data) for array in arrays.values())),
            phases=phases,
        ):
            phases.enter("aggregating")
            try:
                question.check(checked_content(reply, timeout=federation.round_timeout))
            except UnusableReply as reason:
                self._left_out.add(str(reason))
                log(f"round {server_round}: client {reply.client} is left out: {reason}")
                told = {"left_out": str(reason)}
                self.record(server_round, reply.client, question.activity, told)
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
        return max(1, int(available_memory() * MEMORY_SHARE) // message_bytes)

    def record(
        self, server_round: int, client: int, activity: str, values: Mapping[Any, Any]
    ) -> None:
        """Write down what is known of a client's activity in a round."""
        named = {recorded_name(activity, name): value for name, value in values.items()}
        self.directory.record(server_round, f"client-{client}", named)


def available_memory(limit: Path = Path("/sys/fs/cgroup/memory.max")) -> int:
    """Return the bytes of this machine's memory, or of its container's, whose limit is a file."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    said = limit.read_text().strip() if limit.is_file() else "max"
    return memory if said == "max" else min(memory, int(said))


def moving_average(
    average: Weights | None, weights: Weights, decay: float | None
) -> Weights | None:
    """Move an average towards new weights; it starts as the first ones. None where decay is."""
    if decay is None:
        return None
    if average is None:
        return {name: tensor.clone() for name, tensor in weights.items()}
    return {name: torch.lerp(tensor, average[name], decay) for name, tensor in weights.items()}
