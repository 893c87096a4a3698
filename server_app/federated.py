"""The rounds of a federated run: who trains, what is asked of them, what comes back."""

import math
import time
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property, partial
from typing import Any

import numpy as np
import torch
from flwr.app import ConfigRecord, MessageType, RecordDict
from flwr.serverapp import Grid
from numpy.typing import NDArray

from server_app.audits import AUDIT_TYPE, attacks_of, read_attacks
from server_app.build_strategy import build_strategy
from server_app.dataset import check_privacy, load_images, record_data, record_partition
from server_app.evaluation import GlobalEvaluation, HospitalEvaluation
from server_app.exchange import Answer, ClientExchange, Question, is_simulation
from server_app.hospital_scores import SCORES_TYPE, check_scoring, read_scores, score_records
from server_app.hospitals.registry import HOSPITALS_VARIABLE, HospitalsFile
from server_app.log import log
from server_app.messages import (
    DEFAULT_MAX_LIST,
    Entries,
    images_record,
    list_bytes,
    packed_record,
)
from server_app.nodes import GRACE_SECONDS, QUERY_TIMEOUT_SECONDS, Nodes, sample_clients
from server_app.replies import (
    Diverged,
    LocalTraining,
    UnusableReply,
    read_losses,
    read_training,
)
from server_app.rounds import RoundLoop, TooFewRepliesError
from server_app.timing import PhaseTimer
from server_app.weighting import Weighting
from task.audit.membership import Attack, attack_names
from task.audit.records import attack_records
from task.audit.roc import Separation
from task.config import package_of
from task.data import ImageSet
from task.data.partition import partition_dataset
from task.evaluation.hospital_scores import HospitalScores
from task.generators.ensemble import CLASS_COUNTS, join_members
from task.protocol.partial import PartLayout, deal_parts, senders
from task.protocol.wire import Key, WeightLayout, Weights
from task.protocol.wire_format import BYTES_BACK, WireFormat, float_dtype
from task.randomness import Stream, numpy_generator, torch_generator
from task.runs.layout import CLASS_COUNTS_FILE, HOSPITALS_FILE, NODES_FILE, client_numbers
from task.runs.records import CLIENT_DIVERGENCE, LEFT_OUT, TEST, TRAIN, Record, records_of
from task.runs.writer import RunWriter
from task.training.algorithms.moments import averaged_beside
from task.training.algorithms.parameters import trained_parameters
from task.training.client_privacy import check_clients
from task.training.devices import move
from task.training.private import (
    PrivateDraws,
    SecretDraws,
    SeededDraws,
    packed_optimizer,
    sums_gradients,
)

# What a client says of its training, and how well its attacks have told its images.
Trained = tuple[LocalTraining, dict[str, Separation]]
ReadTrained = Callable[[RecordDict], Trained]
# Of the groups of a checkpoint that hold what a client keeps, before its number.
COLLECTED = "collected-"


class FederatedTraining(RoundLoop):
    """Algorithm 1 of the paper, on the server's side.

    Attributes:
        simulated: whether the nodes are shares of one data set on this machine.
        strategy: what is made of the clients' weights.
    """

    def __init__(self, grid: Grid, directory: RunWriter) -> None:
        """Prepare a run; nothing is sent yet.

        Args:
            grid: Flower's view of the network.
            directory: of the run, open.
        """
        super().__init__(directory)
        federation = self.config.federation
        self.simulated = is_simulation(grid)
        # Clients of a simulation would send the same again.
        self.attempts = 1 if self.simulated else federation.round_attempts
        self._hospitals = None if self.simulated else HospitalsFile.of_environment()
        self._nodes = Nodes(
            grid,
            simulated=self.simulated,
            num_classes=len(self.config.data.classes),
            extractor=self.config.eval.extractor,
            package=package_of(self.config.model.family),
            counted=self.config.tells_of_clients,
            secure=federation.secure_aggregation,
            known=client_numbers(directory.path),
            hospitals=self._hospitals,
        )
        self._exchange = ClientExchange(grid, self._nodes, federation)
        self._layout = WeightLayout.of(self.model, self.model.local | self.model.frozen)
        self._weighting = Weighting.of(self.config, simulated=self.simulated)
        optimizers = self.model.optimizers(self.config.train.trained_lr)
        self.strategy = build_strategy(
            self.config,
            self._layout,
            self._weighting,
            trained=trained_parameters(self.model, optimizers),
            server_optimizer=packed_optimizer(optimizers) if sums_gradients(self.config) else None,
            averaged=averaged_beside(self.config, self.model, optimizers),
        )
        splits = federation.sharing == "usplit"
        self._parts = PartLayout(self._layout, self.model) if splits else None
        # What stays at clients, and their whole weights of the last round where these draw.
        self._personal = WeightLayout.only(self.model, self.model.beginnings(self.model.kept_parts))
        self._collected: dict[int, Weights] = {}
        # Clients that were left out of earlier attempts at the round.
        self._failed: set[int] = set()

    def gather(self) -> None:
        """Wait for the nodes, and deal the images out where they are simulated.

        Raises:
            ValueError: the nodes cannot do what the configuration asks.
            TimeoutError: see `gather_nodes`.
        """
        if not self.simulated:
            # Before they are asked, who would all refuse.
            check_scoring(self.config)
            self.say_what_nodes_need()
        num_nodes = len(self.gather_nodes(patience=QUERY_TIMEOUT_SECONDS))
        if self.simulated:
            self.config = self.config.changed({"federation.num_supernodes": num_nodes})
            self.dataset = load_images(self.config)
            partition = partition_dataset(self.config, self.dataset, num_nodes)
            self.shares = partition.shares
            check_privacy(self.config, self.dataset, partition)
            record_partition(self.config, partition, self.directory)
            record_data(self.config, self.dataset, self.directory, partition)
        else:
            check_clients(num_nodes, self.config)
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

    def say_what_nodes_need(self) -> None:
        """Say what is not as a deployment needs it, before anybody has trained for hours."""
        if self._hospitals is None or not self._hospitals.exists():
            log(
                f"{HOSPITALS_VARIABLE} names no file of the SuperLink's: hospitals have no names, "
                "and their numbers are of node ids, which change where its database is lost"
            )
        beside = sum(self.strategy.expected.values())
        if self.config.federation.drawn_by == "clients":
            beside += self._personal.size
        federation = self.config.federation
        # A masked value has 4 bytes.
        each = 4.0 if federation.secure_aggregation else BYTES_BACK[federation.wire_dtype]
        back = self._layout.size * each + 4 * beside
        if list_bytes(back) > DEFAULT_MAX_LIST:
            log(
                f"replies have {back / 1e6:,.0f} MB: the gateway's MAX_LIST must be "
                f"{list_bytes(back)} bytes or more, or it refuses them"
            )

    def describe(self) -> str:
        """Say how many hospitals train."""
        return f"{len(self._nodes.node_ids)} hospitals"

    def state(self) -> dict[str, Weights]:
        """Return what the strategy has gathered, and the clients' weights where these draw."""
        collected = {f"{COLLECTED}{client}": each for client, each in self._collected.items()}
        return {**self.strategy.state_dict(), **collected}

    def restore(self, state: Mapping[str, Weights]) -> None:
        """Give the strategy what it had gathered, and take up what was collected."""
        self.strategy.load_state_dict(state)
        self._collected = {
            int(name.removeprefix(COLLECTED)): each
            for name, each in state.items()
            if name.startswith(COLLECTED)
        }

    def shared_weights(self) -> Weights:
        """Return the moving average, where the run keeps one, or the weights."""
        return self.weights if self.strategy.average is None else self.strategy.average

    def final_weights(self) -> Weights:
        """Return those that are shared, or those of all clients where these draw.

        Raises:
            ValueError: the clients' were not kept, as the round was not to be evaluated.
        """
        if self.config.federation.drawn_by == "global":
            return self.shared_weights()
        if not self._collected:
            raise ValueError(
                f"federation.rounds, eval and audit must be as they were before round "
                f"{self.directory.last_round}, or federation.rounds larger: the clients' weights, "
                "which draw with federation.drawn_by=clients, were not kept in it"
            )
        members = [self._collected[client] for client in sorted(self._collected)]
        counts = self.believed_counts([each[CLASS_COUNTS].tolist() for each in members])
        weights = [{n: t for n, t in each.items() if n != CLASS_COUNTS} for each in members]
        return join_members(weights, counts)

    def class_counts(self, client: int) -> list[int]:
        """Return how many training images of each class a client has, as far as is known."""
        num_classes = len(self.config.data.classes)
        if self.dataset is not None:
            own = self.dataset.train.labels[self.shares[client][0]]
            return [int(count) for count in own.bincount(minlength=num_classes)]
        return self._nodes.introduced[client].class_counts or [0] * num_classes

    def believed_counts(self, counts: list[list[int]]) -> list[list[int]]:
        """Hold clients that claim too many images to their share, as in the mean of weights."""
        totals = [sum(each) for each in counts]
        weights = self._weighting.weights(totals) if self._weighting.by_images else totals
        return [
            [math.ceil(count * weight / max(1, total)) for count in each]
            for each, weight, total in zip(counts, weights, totals, strict=True)
        ]

    def gather_nodes(self, *, patience: float) -> list[int]:
        """Wait for enough nodes and return the numbers of all that are there.

        Args:
            patience: see `Nodes.wait_for`.

        Raises:
            TimeoutError: fewer than `federation.min_nodes` nodes came, or, of real ones, fewer
                than could send `federation.min_replies`.
        """
        federation = self.config.federation
        minimum = self.minimum_nodes()
        try:
            self._nodes.wait_for(minimum, seconds=federation.node_wait, patience=patience)
        except TimeoutError as error:
            raise TimeoutError(f"{error}{self.what_is_saved()}") from error
        if not self.simulated:
            self.directory.write_json(NODES_FILE, self._nodes.numbers)
            if self._nodes.names:
                self.directory.write_json(HOSPITALS_FILE, self._nodes.names)
            self.record_class_counts()
        return list(self._nodes.node_ids)

    def minimum_nodes(self) -> int:
        """Return how many nodes there must be."""
        federation = self.config.federation
        return max(federation.min_nodes, 0 if self.simulated else federation.min_replies)

    def record_class_counts(self) -> None:
        """Write down the images of each class of every client that this run has seen."""
        classes = self.config.data.classes
        stored = self.directory.read_json(CLASS_COUNTS_FILE) or {"classes": classes, "clients": {}}
        told = {str(client): said.class_counts for client, said in self._nodes.introduced.items()}
        clients = {**(stored["clients"] if stored["classes"] == classes else {}), **told}
        ordered = {client: clients[client] for client in sorted(clients, key=int)}
        found = {"classes": classes, "clients": ordered}
        self.directory.write_json(CLASS_COUNTS_FILE, found)

    def train(self, server_round: int) -> str:
        """Let the clients of a round train, and make new weights of theirs; a single attempt.

        No weights change unless it succeeds, and nothing is recorded unless it does or has
        diverged.

        Raises:
            TimeoutError: the nodes for it did not come.
            TooFewRepliesError: there were fewer than `federation.min_replies` usable replies.
            DivergedError: training has diverged at every client, or as a whole.
        """
        self.phases.enter("sending")
        clients = self.draw_clients(server_round)
        replies = self.train_clients(server_round, clients)
        left_out = self._exchange.left_out
        each_why = (
            (client, self.model.why_diverged(each)) for client, each in replies.measured.items()
        )
        wrong = {client: why for client, why in each_why if why}
        if len(replies.counts) < self.config.federation.min_replies:
            self._failed |= left_out.keys()
            raise TooFewRepliesError(
                f"round {server_round}: {len(replies.counts)} of {len(clients)} clients sent "
                f"usable weights, federation.min_replies={self.config.federation.min_replies} "
                f"({described(left_out)})"
            )
        self._failed.clear()
        losses = replies.weighted(replies.losses)
        told = [
            *replies.records,
            *self.held_to_their_share(server_round, replies.counts),
            *left_out_records(server_round, MessageType.TRAIN, left_out),
            *records_of(server_round, self.combined_measures(replies), reference=TRAIN),
            Record(server_round, "num_clients", len(replies.counts)),
            *(
                Record(server_round, CLIENT_DIVERGENCE, 1, client=client, context={"reason": why})
                for client, why in wrong.items()
            ),
        ]
        if losses:
            told.append(loss_record(server_round, self._weighting.combined(losses), TRAIN))
        if len(wrong) == len(replies.counts) and self.may_end_run(replies.counts):
            raise self.diverged(server_round, described(wrong), told)
        if wrong:
            log(f"round {server_round}: {described(wrong)}; the weights are used")
        self.phases.enter("aggregating")
        self.weights = self.strategy.finish(self.private_draws(server_round))
        self.directory.record(told)
        if self._collected and left_out:
            log(
                f"round {server_round}: images are drawn without the models of clients "
                f"{' '.join(map(str, sorted(left_out)))}, which were left out"
            )
        found = f"train loss {self._weighting.describe(losses)}" if losses else "no loss told"
        return f"{found}, {len(replies.counts)} of {len(clients)} clients"

    def private_draws(self, server_round: int) -> PrivateDraws:
        """Return where the noise of a round comes from; with real nodes from no known seed."""
        if not self.simulated:
            return SecretDraws()
        return SeededDraws(torch_generator(self.config.seed, Stream.CLIENT_NOISE, server_round))

    def train_clients(self, server_round: int, clients: list[int]) -> "TrainingReplies":
        """Let clients train, and add their weights up as they come."""
        to_keep, collects = self.clients_to_keep(server_round, clients), self.collects(server_round)
        rng = numpy_generator(self.config.seed, Stream.WIRE, server_round)
        travelling = self.strategy.broadcast(
            self.weights, len(clients), self._nodes.number_known, rng=rng
        )
        dealt = self.deal_parts(server_round, clients)
        question, reads = self.about_training(server_round, travelling, dealt, len(clients))
        replies = TrainingReplies()
        download = sum(each.nbytes for each in (travelling, *self.strategy.beside().values()))
        # To the clients of the round, and back in the replies that can be used.
        traffic = download * len(clients)
        self._collected = {}
        for client, (trained, attacked), asked in self.ask(
            question,
            server_round,
            clients,
            self.phases,
            entries={client: {Key.PARTS: parts} for client, parts in dealt.items()},
            reads=reads,
        ):
            now = time.monotonic()
            spent = possible_times(trained.spent, now - asked)
            # A client that protects its patients does not say how long it trained.
            unsaid = now - asked if self.config.privacy.is_on else 0.0
            self.phases.trained(spent.get(Key.SECONDS, unsaid), since=asked, until=now)
            replies.counts[client] = trained.num_images
            if trained.loss is not None:
                counted = trained.num_images, trained.loss
                replies.losses[client] = trained.loss
                replies.measured[client] = trained.measures
                replies.records.append(loss_record(server_round, counted, TRAIN, client))
            numbers = {
                **spent,
                "update_norm": trained.update_norm,
                "download_bytes": download,
                "upload_bytes": trained.num_bytes,
            }
            replies.records += records_of(server_round, numbers, client=client)
            replies.records += records_of(
                server_round, trained.measures, client=client, reference=TRAIN
            )
            replies.records += attack_records(
                server_round, attacks_of(attacked, client, is_local=True)
            )
            if client in to_keep or collects:
                own = self._layout.unpack(trained.weights)
                if Key.LOCAL in trained.beside:
                    own |= self._personal.unpack(trained.beside.pop(Key.LOCAL))
                if client in to_keep:
                    kept = own if collects else self.model.shared(own)
                    self.directory.save_local_model(server_round, client, kept)
                if collects:
                    counts = torch.tensor(self.class_counts(client))
                    self._collected[client] = own | {CLASS_COUNTS: counts}
            self.strategy.add(client, trained.weights, trained.num_images, trained.beside)
            traffic += trained.num_bytes
        replies.records.append(Record(server_round, "weight_bytes", traffic))
        return replies

    def about_training(
        self,
        server_round: int,
        travelling: NDArray[Any],
        dealt: Mapping[int, Collection[str]],
        num_clients: int,
    ) -> tuple[Question[Trained], dict[int, ReadTrained]]:
        """Make the question that lets clients train.

        Args:
            server_round: 1-based.
            travelling: the weights, as `Strategy.broadcast` returns them.
            dealt: see `deal_parts`.
            num_clients: that are asked.

        Returns:
            The question, and what reads the replies of clients that send some parts alone.
        """
        expected, wire = self.strategy.expected, self.strategy.wire
        collects = self.collects(server_round)
        if collects and self._personal.size > 0:
            expected[Key.LOCAL] = self._personal.size
        audited = self.evaluation.is_audit_due(server_round) and self.config.tells_of_clients
        names = self.attack_names if audited else []

        def read(content: RecordDict, wire: WireFormat | None) -> Trained:
            trained = read_training(
                content,
                self.strategy.sent,
                num_clients=num_clients,
                max_norm=self.config.federation.max_update_norm,
                measures=self.model.measures,
                counted_as=1 if self.config.privacy.is_on else None,
                beside=expected,
                wire=wire,
            )
            return trained, read_attacks(content, names) if audited else {}

        question = self.about_weights(
            MessageType.TRAIN,
            travelling,
            partial(read, wire=wire if wire.is_lossy else None),
            entries={Key.AUDIT: audited, Key.LOCAL: Key.LOCAL in expected},
            beside=self.strategy.beside(),
        )
        if self._parts is None:
            return question, {}
        dtype = self.config.federation.wire_dtype
        wires = {client: self._parts.wire(parts, dtype) for client, parts in dealt.items()}
        return question, {client: partial(read, wire=each) for client, each in wires.items()}

    def collects(self, server_round: int) -> bool:
        """Whether images are to be drawn by what each client has trained."""
        by_clients = self.config.federation.drawn_by == "clients"
        return by_clients and self.evaluation.is_due(server_round)

    def deal_parts(self, server_round: int, clients: list[int]) -> dict[int, list[str]]:
        """Choose which parts each client sends, and have each reduced over those that send it.

        Nothing where all send all of them.
        """
        if self._parts is None:
            return {}
        rng = numpy_generator(self.config.seed, Stream.SHARING, server_round)
        dealt = deal_parts(self._parts.parts, clients, rng)
        masks = self._parts.masks.items()
        self.strategy.reduce_parts([(mask, senders(dealt, part)) for part, mask in masks])
        return dealt

    def combined_measures(self, replies: "TrainingReplies") -> dict[str, float]:
        """Make one number of each measure of the clients; see `Weighting.combine`."""
        return {
            name: self._weighting.combine(
                replies.weighted({client: each[name] for client, each in replies.measured.items()})
            )
            for name in self.model.measures * bool(replies.measured)
        }

    def draw_clients(self, server_round: int) -> list[int]:
        """Draw the clients of a round of those that are there.

        Clients that were left out of an earlier attempt at it are drawn where there are not as
        many others as are wanted.

        Raises:
            TimeoutError: the nodes for it did not come.
        """
        available = self.gather_nodes(patience=GRACE_SECONDS)
        others = [client for client in available if client not in self._failed]
        wanted = self.config.federation.clients_per_round
        clients = sample_clients(
            others if wanted is not None and len(others) >= wanted else available,
            wanted,
            seed=self.config.seed,
            server_round=server_round,
        )
        if wanted is not None:
            log(f"round {server_round}: clients {' '.join(map(str, clients))}")
        return clients

    def held_to_their_share(self, server_round: int, counts: Mapping[int, int]) -> list[Record]:
        """Log which clients count for fewer images than they claim; return what to record of it.

        Args:
            server_round: 1-based.
            counts: images of each client that was used, by its number.
        """
        if not self._weighting.by_images:
            return []
        weights = dict(zip(counts, self._weighting.weights([*counts.values()]), strict=True))
        held = [client for client in sorted(counts) if weights[client] < counts[client]]
        for client in held:
            log(
                f"round {server_round}: {self._nodes.described(client)} claims {counts[client]} "
                "images and counts "
                f"as {weights[client]}, at most "
                f"federation.max_weight_share={self.config.federation.max_weight_share} of all"
            )
        return [
            Record(server_round, "counted_images", weights[client], client=client)
            for client in held
        ]

    def clients_to_keep(self, server_round: int, clients: list[int]) -> set[int]:
        """Choose the clients of the last round whose own weights are kept."""
        if server_round != self.config.federation.rounds:
            return set()
        self.directory.forget_local_models()
        wanted = set(self.config.federation.keep_local_models)
        for client in sorted(wanted - set(clients)):
            who = self._nodes.described(client)
            log(f"round {server_round}: {who} does not train, its weights are not kept")
        return wanted & set(clients)

    def evaluate(self, server_round: int) -> str | None:
        """Measure the loss of the global weights on what all clients hold out, and say it.

        None where the family has none, or no client could say, or may; that is no reason to give
        the round's training up.
        """
        if not self.model.has_test_loss or self.config.privacy.is_on:
            return None
        losses: list[tuple[int, dict[str, float]]] = []
        clients = list(self._nodes.node_ids)
        dtype = float_dtype(self.config.federation.wire_dtype)
        packed = self._layout.pack(self.shared_weights(), dtype)
        self.directory.record(
            [Record(server_round, "evaluation_bytes", packed.nbytes * len(clients))]
        )
        read = partial(read_losses, parts=self.model.loss_parts)
        question = self.about_weights(MessageType.EVALUATE, packed, read)
        for client, found, _ in self.ask(question, server_round, clients, PhaseTimer()):
            if found is not None:
                losses.append(found)
                n, own = found
                self.directory.record(
                    records_of(server_round, own, client=client, reference=TEST, n=n)
                )
        if not losses:
            return None
        by_name = {name: [(n, each[name]) for n, each in losses] for name in losses[0][1]}
        combined = {name: self._weighting.combine(told) for name, told in by_name.items()}
        n = sum(n for n, _ in losses)
        self.directory.record(records_of(server_round, combined, reference=TEST, n=n))
        return f"test loss {self._weighting.describe(by_name[Key.LOSS])}"

    def open_evaluation(self) -> GlobalEvaluation:
        """Let the hospitals score images where they alone have real ones."""
        if self.simulated:
            return super().open_evaluation()
        return HospitalEvaluation(
            self.directory,
            self.model,
            device=self.device,
            audits=self.audits,
            ask=self.ask_for_scores,
        )

    @cached_property
    def attack_names(self) -> list[str]:
        """The attacks that clients can make."""
        move(self.model, self.device, channels_last=self.config.train.channels_last)
        return attack_names(self.model, self.device)

    def attacked_clients(self) -> list[int]:
        """List the clients that are attacked, of real nodes each by itself; see `attack`."""
        if self.model.kept_parts and not self._collected:
            return []
        return super().attacked_clients() if self.simulated else [*self._nodes.node_ids]

    def attack(self, server_round: int) -> list[Attack]:
        """Attack the final weights of a round, or let every hospital do so with its own images.

        Not where parts that attacks look through stay at the clients: what the server has of these
        was never trained.
        """
        if self.model.kept_parts and not self._collected:
            return []
        if self.simulated:
            return super().attack(server_round)
        dtype = float_dtype(self.config.federation.wire_dtype)
        packed = self._layout.pack(self.shared_weights(), dtype)
        read = partial(read_attacks, names=self.attack_names)
        question = self.about_weights(AUDIT_TYPE, packed, read)
        attacks: list[Attack] = []
        clients = list(self._nodes.node_ids)
        self.directory.record([Record(server_round, "audit_bytes", packed.nbytes * len(clients))])
        for client, found, _ in self.ask(question, server_round, clients, PhaseTimer()):
            attacks += attacks_of(found, client, is_local=False)
        return attacks

    def ask_for_scores(self, server_round: int, generated: ImageSet) -> list[HospitalScores]:
        """Let every hospital that is there score images; returns what they could say."""
        config = ConfigRecord({Key.EXTRACTOR: self.config.eval.extractor})
        content = RecordDict({Key.ARRAYS: images_record(generated), Key.CONFIG: config})
        clients = list(self._nodes.node_ids)
        answers = []
        question = Question(SCORES_TYPE, content, read_scores)
        for client, scores, _ in self.ask(question, server_round, clients, PhaseTimer()):
            n = len(generated)
            self.directory.record(
                score_records(server_round, scores, self.config, n=n, client=client)
            )
            answers.append(scores)
        return answers

    def about_weights(
        self,
        message_type: str,
        packed: NDArray[Any],
        read: Callable[[RecordDict], Answer],
        *,
        entries: Entries | None = None,
        beside: Mapping[str, NDArray[np.floating]] | None = None,
    ) -> Question[Answer]:
        """Make the question about packed weights, which all messages share.

        Args:
            message_type: "train", "evaluate" or "evaluate.audit".
            packed: [P], the weights to start from.
            read: of the replies; see `Question`.
            entries: further ones of the config record.
            beside: what the strategy sends beside the weights, by name.
        """
        # The name that a client composes itself may be another, with the time of day.
        config = ConfigRecord(
            {
                Key.PRECISION: self.config.train.precision,
                Key.RUN_NAME: self.directory.path.name,
                Key.RUN_ID: self.directory.run_id,
                **(entries or {}),
            }
        )
        content = RecordDict({Key.ARRAYS: packed_record(packed, beside), Key.CONFIG: config})
        return Question(message_type, content, read)

    def ask(
        self,
        question: Question[Answer],
        server_round: int,
        clients: list[int],
        phases: PhaseTimer,
        *,
        entries: Mapping[int, Entries] | None = None,
        reads: Mapping[int, Callable[[RecordDict], Answer]] | None = None,
    ) -> Iterator[tuple[int, Answer, float]]:
        """Ask clients; see `ClientExchange.ask`.

        Raises:
            DivergedError: every client was left out because training has diverged there. One
                hospital of several does not end the run with what it sends: others are drawn.
        """
        yield from self._exchange.ask(
            question, server_round, clients, phases, entries=entries, reads=reads
        )
        left_out = self._exchange.left_out
        unused = left_out_records(server_round, question.activity, left_out)
        # Those of a training are recorded once it has succeeded, or has diverged.
        if question.message_type != MessageType.TRAIN:
            self.directory.record(unused)
            unused = []
        all_diverged = len(left_out) == len(clients) > 0 and all(
            isinstance(why, Diverged) for why in left_out.values()
        )
        if all_diverged and self.may_end_run(clients):
            raise self.diverged(server_round, described(left_out), unused)

    def may_end_run(self, clients: Collection[int]) -> bool:
        """Whether the run ends where all of these clients diverge; not by one hospital of many."""
        alone = len({*self._failed, *clients}) == 1 < len(self._nodes.node_ids)
        return self.simulated or not alone


@dataclass
class TrainingReplies:
    """What clients that can be used have told of a round's training, by their numbers.

    Attributes:
        counts: images that each counts for.
        losses: of those that say one.
        measured: what its family measured, of those that say it.
        records: what is to be recorded.
    """

    counts: dict[int, int] = field(default_factory=dict)
    losses: dict[int, float] = field(default_factory=dict)
    measured: dict[int, dict[str, float]] = field(default_factory=dict)
    records: list[Record] = field(default_factory=list)

    def weighted(self, values: Mapping[int, float]) -> list[tuple[int, float]]:
        """Return the images of clients with a value of each."""
        return [(self.counts[client], value) for client, value in values.items()]


def loss_record(
    server_round: int, counted: tuple[int, float], reference: str, client: int | None = None
) -> Record:
    """Make the record of a loss over so many images, of a client or of all of them."""
    n, loss = counted
    return Record(server_round, "loss", loss, client=client, reference=reference, n=n)


def left_out_records(
    server_round: int, activity: str, left_out: Mapping[int, UnusableReply]
) -> list[Record]:
    """Make the records of the replies of clients that are not used."""
    return [
        Record(
            server_round,
            LEFT_OUT,
            1,
            client=client,
            context={"activity": activity, "reason": str(why)},
        )
        for client, why in left_out.items()
    ]


def possible_times(spent: Mapping[str, float], elapsed: float) -> dict[str, float]:
    """Return what a client says that it spent, with no time longer than the server has waited.

    Args:
        spent: see `LocalTraining`.
        elapsed: seconds between the message and its reply, by the server's clock.

    Returns:
        What is recorded, by name.
    """
    times = (Key.SECONDS, Key.SECONDS_BESIDE)
    return {
        name.replace("-", "_"): min(value, elapsed) if name in times else value
        for name, value in spent.items()
    }


def described(reasons: Mapping[int, object]) -> str:
    """Say of which clients there is which reason, by their numbers, each reason once."""
    by_reason: dict[str, list[int]] = {}
    for client, reason in sorted(reasons.items()):
        by_reason.setdefault(str(reason), []).append(client)
    return "; ".join(
        f"{'client' if len(clients) == 1 else 'clients'} {' '.join(map(str, clients))}: {reason}"
        for reason, clients in by_reason.items()
    )
