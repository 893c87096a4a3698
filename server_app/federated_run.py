"""The rounds of one run, from the first node to the final weights."""

import dataclasses
import math
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from flwr.app import (
    Array,
    ArrayRecord,
    ConfigRecord,
    Message,
    MessageType,
    MetricRecord,
    RecordDict,
)
from flwr.serverapp import Grid

from server_app.aggregation import StreamingFedAvg
from server_app.evaluation import class_agreement, sample_grid
from server_app.exchange import (
    UnusableReply,
    addressed,
    check_metrics,
    check_weights,
    checked_content,
    exchange,
)
from server_app.log import duration, log
from server_app.roster import Roster, sample_clients
from server_app.simulation import deal_images, fastest_precision, record_partition
from task.config import Config
from task.data import Dataset
from task.figures import mosaic, save_sample_grid
from task.randomness import Stream, torch_generator
from task.run_directory import HOW_TO_RESUME, PARTITION_FILE, RunDirectory
from task.train import seeded_global_generator, select_device
from task.unet import UNet, build_unet
from task.wire import Key, WeightLayout

Weights = dict[str, torch.Tensor]

# What is written down of a client's training, whatever else it sends.
TRAIN_METRICS = (Key.NUM_EXAMPLES, Key.LOSS, Key.SECONDS, Key.IMAGES_PER_SECOND)

# Seconds between two looks for replies: a simulation's network is in memory.
POLL_SIMULATION, POLL_NETWORK = 0.1, 2.0


class FederatedRun:
    """Algorithm 1 of the paper, on the server's side.

    Attributes:
        config: of the run, resolved once the nodes are known.
        weights: the global weights after the last complete round.
        ema: their moving average over rounds; None where the run keeps none.
        dataset: in a simulation, all images; None with real nodes, whose images stay there.
    """

    def __init__(self, grid: Grid, directory: RunDirectory) -> None:
        """Prepare a run; nothing is sent yet.

        Args:
            grid: Flower's view of the network.
            directory: of the run, open.
        """
        self.config = directory.config
        self.dataset: Dataset | None = None
        self._grid = grid
        self._directory = directory
        self._roster = Roster(grid, known=directory.read_json("nodes.json"))
        self._strategy = StreamingFedAvg()
        self._device = select_device(self.config.train.device)
        self._model = initial_model(self.config)
        self._layout = WeightLayout.of(self._model)
        self.weights: Weights = {n: t.clone() for n, t in self._model.state_dict().items()}
        self.ema: Weights | None = None
        self._left_out: set[str] = set()

    def run(self) -> None:
        """Run every round that is not complete yet, then evaluate and save the final weights.

        Raises:
            ValueError: the configuration does not fit the federation or the data.
            TimeoutError: the nodes did not come.
            RuntimeError: a round had fewer than `federation.min_replies` usable replies.
        """
        rounds, done = self.config.federation.rounds, self._directory.last_round
        if done > rounds:
            raise ValueError(
                f"federation.rounds must be at least {done}, the last complete round of "
                f"{self._directory.path}, got {rounds}"
            )
        if self._directory.final_round() == rounds and self.is_measured(rounds):
            log(f"all {rounds} rounds are complete already; a larger federation.rounds goes on")
            return
        self.prepare()
        if self.is_evaluation_due(done):
            log(f"round {done}, once more: {self.evaluate_and_draw(done)}")
        first = done + 1
        start = time.monotonic()
        for server_round in range(first, rounds + 1):
            summary = self.play_round(server_round)
            spent = time.monotonic() - start
            left = spent / (server_round - first + 1) * (rounds - server_round)
            log(f"round {server_round}/{rounds}: {summary}, {duration(left)} left")
        self.finish()

    def prepare(self) -> None:
        """Wait for the nodes, settle what depends on them, and load the last complete round."""
        num_nodes = len(self.gather_nodes())
        if self.simulated:
            federation = dataclasses.replace(self.config.federation, num_supernodes=num_nodes)
            self.config = dataclasses.replace(self.config, federation=federation)
            self.dataset, partition = deal_images(self.config)
            record_partition(self.config, partition, self._directory)
            if self.config.train.precision == "auto":
                precision = fastest_precision(self.config, self._model, self._device)
                train = dataclasses.replace(self.config.train, precision=precision)
                self.config = dataclasses.replace(self.config, train=train)
        self._directory.write_config(self.config)
        log(
            f"{self.config.experiment}: {num_nodes} hospitals, data {self.config.data.name}, "
            f"{self._layout.size:,} parameters, {self.config.train.precision} on {self._device}"
        )
        stored = self._directory.load_checkpoint()
        if stored is not None:
            self.weights, self.ema = stored
            log(f"going on after round {self._directory.last_round}")
        asked, resumed = self.config.federation.clients_per_round, self.config.resume
        if asked is not None and asked > num_nodes and not resumed:
            raise ValueError(
                f"federation.clients_per_round must be at most {num_nodes}, the nodes that are "
                f"there, got {asked}; federation.min_nodes={asked} waits for as many"
            )

    def gather_nodes(self) -> list[int]:
        """Wait for `federation.min_nodes` nodes and return the numbers of all that are there."""
        federation = self.config.federation
        self._roster.wait_for(federation.min_nodes, seconds=federation.node_wait)
        if not self.simulated:
            self._directory.write_json("nodes.json", self._roster.numbers)
        return list(self._roster.node_ids)

    @property
    def simulated(self) -> bool:
        """Whether the nodes are shares of one data set on this machine."""
        return self._roster.num_partitions is not None

    def play_round(self, server_round: int) -> str:
        """Train, average, evaluate where it is time to, and save: a complete round.

        Returns:
            What happened, in one line.
        """
        start = time.monotonic()
        summary = self.train(server_round)
        # Before the evaluation, so that no training is lost with it.
        self._directory.save_checkpoint(server_round, self.weights, self.ema)
        if self.is_evaluation_due(server_round):
            summary += f", {self.evaluate_and_draw(server_round)}"
        seconds = time.monotonic() - start
        self._directory.record(server_round, "global", {"round_seconds": seconds})
        return f"{summary}, {duration(seconds)}"

    def is_evaluation_due(self, server_round: int) -> bool:
        """Whether a round is to be evaluated and has not been yet: its picture comes last."""
        chosen = server_round % self.config.eval.every == 0
        last = server_round == self.config.federation.rounds
        drawn = self._directory.samples_file(server_round).exists()
        return server_round > 0 and (chosen or last) and not drawn

    def evaluate_and_draw(self, server_round: int) -> str:
        """Measure the test loss of a round and draw its picture; say the loss in few words."""
        loss = self.evaluate(server_round)
        self.draw_grid(server_round)
        return "no test loss" if loss is None else f"test loss {loss:.4f}"

    def train(self, server_round: int) -> str:
        """Let the clients of a round train and average their weights.

        Raises:
            RuntimeError: fewer than `federation.min_replies` usable replies came.
        """
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

        def usable_replies() -> Iterator[Message]:
            replies = self.ask(MessageType.TRAIN, server_round, clients, self.weights, check_train)
            for client, reply in replies:
                used.append(client)
                metrics = reply.content.metric_records[Key.METRICS]
                told = {name: metrics[name] for name in TRAIN_METRICS if name in metrics}
                self.record(server_round, client, "train", told)
                yield reply

        def check_train(content: RecordDict) -> None:
            check_metrics(content)
            check_weights(content, size=self._layout.size, num_clients=len(clients))

        arrays, metrics = self._strategy.aggregate_train(server_round, usable_replies())
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
        self._directory.record(
            server_round, "global", {"train_loss": loss, "num_clients": len(used)}
        )
        return f"train loss {loss:.4f}, {len(used)} of {len(clients)} clients"

    def evaluate(self, server_round: int) -> float | None:
        """Return the loss of the global weights on what all clients hold out.

        None where no client could say; that is no reason to give the round's training up.
        """
        losses: list[float] = []
        num_examples = 0

        def check_loss(content: RecordDict) -> None:
            metrics = content.metric_records.get(Key.METRICS, MetricRecord())
            # A client without held-out images has no loss, and that is no failure.
            if metrics.get(Key.NUM_EXAMPLES) != 0:
                check_metrics(content)

        clients = list(self._roster.node_ids)
        weights = self.ema or self.weights
        for client, reply in self.ask(
            MessageType.EVALUATE, server_round, clients, weights, check_loss
        ):
            metrics = reply.content.metric_records[Key.METRICS]
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
        self._directory.record(server_round, "global", {"test_loss": mean})
        return mean

    def ask(
        self,
        message_type: str,
        server_round: int,
        clients: list[int],
        weights: Mapping[str, torch.Tensor],
        check: Callable[[RecordDict], None],
    ) -> Iterator[tuple[int, Message]]:
        """Send weights to clients and yield the replies that can be used, as they arrive.

        Args:
            message_type: "train" or "evaluate".
            server_round: 1-based.
            clients: their numbers.
            weights: the ones to start from.
            check: raises UnusableReply; such a client is named in log and metrics, and left out.
        """
        federation = self.config.federation
        node_ids = self._roster.node_ids
        packed = self._layout.pack(weights, federation.wire_dtype)
        config = ConfigRecord({Key.SERVER_ROUND: server_round})
        config[Key.PRECISION] = self.config.train.precision
        arrays = ArrayRecord({Key.PACKED: Array(packed)})
        content = RecordDict({Key.ARRAYS: arrays, Key.CONFIG: config})
        messages = {
            client: addressed(
                content,
                node_id=node_ids[client],
                message_type=message_type,
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
        ):
            try:
                check(checked_content(reply, timeout=federation.round_timeout))
            except UnusableReply as reason:
                self._left_out.add(str(reason))
                log(f"round {server_round}: client {reply.client} is left out: {reason}")
                self.record(server_round, reply.client, message_type, {"left_out": str(reason)})
                continue
            if reply.message is not None:
                yield reply.client, reply.message

    def record(
        self, server_round: int, client: int, activity: str, values: Mapping[Any, Any]
    ) -> None:
        """Write down what is known of a client's activity in a round."""
        named = {f"{activity}_{name.replace('-', '_')}": value for name, value in values.items()}
        self._directory.record(server_round, f"client-{client}", named)

    def draw_grid(self, server_round: int) -> None:
        """Draw and save the picture of a round, a row per class."""
        self._model.load_state_dict(self.ema or self.weights)
        images = sample_grid(self.config, self._model, self._device)
        columns = self.config.eval.images_per_class
        save_sample_grid(
            images,
            self._directory.samples_file(server_round),
            classes=self.config.data.classes,
            images_per_class=columns,
            title=f"{self.config.experiment}, round {server_round}",
        )
        pixels = torch.from_numpy(mosaic(images, columns)).permute(2, 0, 1)
        self._directory.record_picture(server_round, "samples", pixels)

    def is_measured(self, server_round: int) -> bool:
        """Whether the final images were measured, or are not to be."""
        wanted = (
            self.config.eval.num_images > 0 and (self._directory.path / PARTITION_FILE).exists()
        )
        return not wanted or any(
            metric["round"] == server_round and metric["name"] == "class_agreement"
            for metric in self._directory.metrics()
        )

    def finish(self) -> None:
        """Save the final weights, and measure their images where the server has real ones."""
        last = self._directory.last_round
        final = self.ema or self.weights
        self._directory.save_model(last, final)
        if self.dataset is not None and self.config.eval.num_images > 0:
            self._model.load_state_dict(final)
            found = class_agreement(self.config, self._model, self.dataset, self._device)
            measured = {
                "class_agreement": found.generated,
                "num_generated_images": found.num_images,
            }
            beside = "there are no real test images"
            if found.real is not None:
                measured["classifier_test_accuracy"] = found.real
                beside = f"{found.real:.1%} of the real test images"
            self._directory.record(last, "global", measured)
            log(
                f"a classifier trained on the real images finds the asked class in "
                f"{found.generated:.1%} of {found.num_images} generated images ({beside})"
            )
        log(f"samples: {self._directory.samples_file(last)}")
        log(f"weights: {self._directory.model_file}")


def initial_model(config: Config) -> UNet:
    """Build the model with the weights that round 1 starts from, from the seed alone."""
    with seeded_global_generator(torch_generator(config.seed, Stream.MODEL_INIT)):
        return build_unet(config)


def moving_average(
    average: Weights | None, weights: Weights, decay: float | None
) -> Weights | None:
    """Move an average towards new weights; it starts as the first ones. None where decay is."""
    if decay is None:
        return None
    if average is None:
        return {name: tensor.clone() for name, tensor in weights.items()}
    return {name: torch.lerp(tensor, average[name], decay) for name, tensor in weights.items()}
