"""Flower's own network in memory, and small settings for whole runs on it."""

import ctypes
import multiprocessing
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any, TypeVar
from uuid import uuid4

import numpy as np
from flwr.app import Context, Error, Message, RecordDict
from flwr.app.message import remove_content_from_message
from flwr.common.serde import message_to_proto
from flwr.proto.node_pb2 import NodeInfo
from flwr.proto.task_pb2 import Task
from flwr.server.superlink.fleet.vce.vce_api import _register_nodes
from flwr.server.superlink.linkstate import LinkStateFactory
from flwr.server.superlink.linkstate.in_memory_linkstate import RunRecord
from flwr.serverapp import Grid
from flwr.supercore.constant import FLWR_IN_MEMORY_DB_NAME, NOOP_FEDERATION_ID
from flwr.supercore.inflatable.inflatable_object import get_all_nested_objects
from flwr.supercore.object_store import ObjectStoreFactory
from flwr.supercore.run import Run
from flwr.supercore.task_identity import TaskIdentity
from flwr.superlink.federation import NoOpFederationManager
from flwr.superlink.grid.inmemory_grid import InMemoryGrid
from sklearn.datasets import load_digits

from client_app.app import app
from server_app.federated import FederatedTraining
from task.config import load_config, load_run_config
from task.data import Dataset, build_dataset
from task.generators.registry import initial_generator
from task.protocol.wire import Key
from task.reporting.metric_table import Quantity
from task.runs.evaluations import Evaluation, Label
from task.runs.records import TEST, TRAIN, Record, Records
from task.runs.writer import RunWriter

T = TypeVar("T")

SUPERLINK = 1
RUN_ID = 4711

# Digits of 8x8, half of them held out, and a network of 2,000 parameters: rounds of a second.
SMALL_RUN: dict[str, str | int | float | bool] = {
    "experiment": "demo",
    "data.image_size": 8,
    "data.test_fraction": 0.5,
    "model.width": 4,
    "model.num_poolings": 1,
    "diffusion.num_timesteps": 20,
    "diffusion.num_inference_steps": 2,
    "train.local_epochs": 1,
    "train.batch_size": 128,
    "train.device": "cpu",
    "train.precision": "float32",
    "federation.rounds": 2,
    "federation.round_timeout": 60.0,
    "eval.every": 2,
    "eval.images_per_class": 1,
    "eval.num_images": 0,
}
# What a client of any family says of its training beside the weights.
TRAINED_KEYS = {Key.NUM_EXAMPLES, Key.LOSS, Key.SECONDS, Key.SECONDS_BESIDE, Key.IMAGES_PER_SECOND}

Handler = Callable[[Message], Message | None]
Order = Callable[[list[Message]], list[Message]]


class DeploymentGrid(Grid):
    """What a ServerApp sees of real nodes: says "" for a message refused, as `HttpGrid` does."""

    def __init__(self, inner: InMemoryGrid) -> None:
        self._inner = inner

    def set_run(self, run: Run) -> None:
        self._inner.set_run(run)

    @property
    def run(self) -> Run:
        return self._inner.run

    def create_message(self, *args: Any, **kwargs: Any) -> Message:
        return self._inner.create_message(*args, **kwargs)

    def get_node_ids(self) -> Iterable[int]:
        return self._inner.get_node_ids()

    def get_nodes(self) -> Iterable[NodeInfo]:
        return self._inner.get_nodes()

    def push_messages(self, messages: Iterable[Message]) -> list[str]:
        return ["".join(self._inner.push_messages([message])) for message in messages]

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        return self._inner.pull_messages(message_ids)

    def send_and_receive(
        self, messages: Iterable[Message], *, timeout: float | None = None
    ) -> Iterable[Message]:
        return self._inner.send_and_receive(messages, timeout=timeout)


class Network:
    """A SuperLink without a network, made as `flwr.simulation` makes it, and its nodes.

    Attributes:
        grid: what a ServerApp sees of it where the nodes are real.
        simulation: the same where they are simulated.
        state: what the SuperLink knows.
    """

    def __init__(self) -> None:
        factory = LinkStateFactory(
            FLWR_IN_MEMORY_DB_NAME, NoOpFederationManager(), ObjectStoreFactory()
        )
        self.state = factory.state()
        run = Run.create_empty(run_id=RUN_ID)
        run.primary_task_id, run.federation_id = 1, NOOP_FEDERATION_ID
        self.state.run_ids[RUN_ID] = RunRecord(run=run)
        self.state.task_store[1] = Task(task_id=1, run_id=RUN_ID)
        # What Flower sets in the process of a ServerApp; messages are made with it.
        TaskIdentity.task_id, TaskIdentity.run_id, TaskIdentity.node_id = 1, RUN_ID, SUPERLINK
        self.simulation = InMemoryGrid(factory)
        self.simulation.set_run(run)
        self.grid = DeploymentGrid(self.simulation)
        self._factory = factory

    def add_nodes(self, number: int) -> list[int]:
        """Let nodes connect; returns their ids, sorted."""
        return sorted(_register_nodes(number, self._factory))

    def remove_node(self, node: int) -> None:
        """Unregister a node, which then is unknown to the SuperLink."""
        self.state.delete_node(self.state.nodes[node].owner_aid, node)

    def store_reply(self, reply: Message) -> str:
        """Hand a node's reply to the SuperLink; returns its id."""
        reply.metadata.__dict__["_message_id"] = str(uuid4())
        stored = self.state.store_message_res(reply)
        assert stored is not None, "the SuperLink refused the reply"
        return stored

    def waiting(self) -> list[Message]:
        """Take the messages that no node has fetched yet, in the order of their sending."""
        nodes = list(self.state.nodes)
        found = [m for node in nodes for m in self.state.get_message_ins(node, limit=None)]
        return sorted(found, key=lambda message: message.metadata.created_at)

    @contextmanager
    def answering(self, handler: Handler, *, order: Order = list) -> Iterator[None]:
        """Answer, in a thread, whatever is sent within the block.

        Each reply is handed over once the one before was pulled, so that `order`, which sorts
        messages that were sent together, is the order in which replies arrive.

        Args:
            handler: returns the reply to a message, or None to stay silent.
            order: of the answers.
        """
        stop = threading.Event()
        failures: list[BaseException] = []

        def work() -> None:
            while not stop.is_set():
                found = self.waiting()
                if found:
                    time.sleep(0.02)  # what is sent together may come in two looks
                    found += self.waiting()
                for message in order(found):
                    try:
                        reply = handler(message)
                    except Exception as error:
                        failures.append(error)
                        reply = Message(Error(code=2, reason="see the test"), reply_to=message)
                    if reply is not None:
                        self._hand_over(reply, stop)
                stop.wait(0.005)

        thread = threading.Thread(target=work)
        thread.start()
        try:
            yield
        finally:
            stop.set()
            thread.join()
        for failure in failures:
            raise failure

    def _hand_over(self, reply: Message, stop: threading.Event) -> None:
        stored = self.store_reply(reply)
        # A server that has failed will never pull it.
        deadline = time.monotonic() + 5
        while stored in self.state.message_res_store and time.monotonic() < deadline:
            if stop.wait(0.002):
                return


class ClientNodes:
    """Nodes that run the real ClientApp; an instance is a handler for `Network.answering`."""

    def __init__(self, network: Network, run_config: dict, *node_configs: dict) -> None:
        self.network = network
        nodes = network.add_nodes(len(node_configs))
        self.contexts = {
            node: node_context(run_config, node_config, node_id=node)
            for node, node_config in zip(nodes, node_configs, strict=True)
        }
        simulated = any(Key.PARTITION_ID in node_config for node_config in node_configs)
        self.grid: Grid = network.simulation if simulated else network.grid

    def __call__(self, message: Message) -> Message:
        return app(message, self.contexts[message.metadata.dst_node_id])


def node_context(run_config: dict, node_config: dict, *, node_id: int = 7) -> Context:
    """Make the context that a node keeps for a run."""
    return Context(RUN_ID, node_id, dict(node_config), RecordDict(), dict(run_config))


def simulated(number: int) -> list[dict[str, int]]:
    """Node configs of a simulation."""
    return [{Key.PARTITION_ID: i, Key.NUM_PARTITIONS: number} for i in range(number)]


def sent(reply: Message) -> bytes:
    """Return all bytes of a reply that Flower sends to the server."""
    objects = [found.deflate() for found in get_all_nested_objects(reply).values()]
    envelope = message_to_proto(remove_content_from_message(reply)).SerializeToString()
    return b"".join([*objects, envelope])


def digits_dataset(*, image_size: int, test_fraction: float) -> Dataset:
    """Load the digits, with a share of them held out."""
    words = [f"data.image_size={image_size}", f"data.test_fraction={test_fraction}"]
    return build_dataset(load_config(["data=digits", *words]), download=False)


def write_digits_as_mnist(folder: Path, *, train: int, test: int, classes: int = 10) -> None:
    """Write real digits of 8x8, of the first classes, as a hospital's own data: as MNIST is."""
    raw = folder / "MNIST" / "raw"
    raw.mkdir(parents=True)
    digits = load_digits(n_class=classes)
    for split, chosen in (("train", slice(0, train)), ("t10k", slice(train, train + test))):
        for part, array in (
            ("images-idx3", digits.images[chosen] * (255 / 16)),
            ("labels-idx1", digits.target[chosen]),
        ):
            header = bytes([0, 0, 8, array.ndim]) + np.array(array.shape, ">i4").tobytes()
            (raw / f"{split}-{part}-ubyte").write_bytes(header + array.astype(np.uint8).tobytes())


def played(run_config: dict, nodes: ClientNodes, answer: Handler) -> Path:
    """Play a federated run to its end, with nodes that answer so; returns its folder."""
    with (
        nodes.network.answering(answer),
        closing(RunWriter(load_run_config(run_config))) as directory,
    ):
        FederatedTraining(nodes.grid, directory).run()
    return directory.path


def written_run(
    folder: Path,
    recorded: Iterable[Record],
    *,
    rounds_done: int,
    files: dict[str, object] | None = None,
    **changes: Any,
) -> Path:
    """Write the folder of a run as a run does, without training.

    Args:
        folder: of the run.
        recorded: its metrics, the complete rounds' and, perhaps, those of one that was cut off.
        rounds_done: checkpoints are written of so many; final weights where they are all.
        files: further JSON files, by name.
        **changes: of `SMALL_RUN`, dots written as two underscores; None leaves a value out.
    """
    dotted = {key.replace("__", "."): value for key, value in changes.items()}
    values = {**SMALL_RUN, "output_dir": str(folder.parent), "run_name": folder.name, **dotted}
    config = load_run_config({name: each for name, each in values.items() if each is not None})
    with closing(RunWriter(config)) as directory:
        directory.write_config(config)
        for name, content in (files or {}).items():
            directory.write_json(name, content)
        directory.record(recorded)
        weights = initial_generator(config).state_dict()
        for number in range(1, rounds_done + 1):
            directory.save_checkpoint(number, weights, {})
            directory.forget_checkpoints()
        if rounds_done == config.federation.rounds:
            directory.save_model(rounds_done, weights)
    return folder


def losses(number: int, by_client: dict[int, float], *, norm: float = 1.0) -> list[Record]:
    """What a round records of training losses, and of their mean."""
    clients = [
        each
        for client, loss in by_client.items()
        for each in (
            Record(number, "loss", loss, client=client, reference=TRAIN),
            Record(number, "update_norm", norm, client=client),
        )
    ]
    mean = sum(by_client.values()) / len(by_client)
    return [
        *clients,
        Record(number, "loss", mean, reference=TRAIN),
        Record(number, "num_clients", len(by_client)),
    ]


def left_out(number: int, client: int, reason: str) -> Record:
    """What a round records of a client whose training was not used."""
    context = {"activity": "train", "reason": reason}
    return Record(number, "left_out", 1, client=client, context=context)


LABEL = {
    **{"data": "digits", "extractor": "classifier", "extractor_sha256": "ab" * 32, "seed": 0},
    **{"image_range": "correct", "real_flipped": False, "n_generated": 2000, "n_train": 900},
    **{"n_test": 897, "n_floor": 897, "n_scored": 897, "n_rarest": 200},
}
# Of generated images and of real ones.
Scores = dict[Quantity, tuple[float | None, float | None]]
SCORES: Scores = {
    Quantity("fid", TRAIN): (2.5, 2.5),
    Quantity("fid", TEST): (3.5, 3.5),
    Quantity("precision"): (0.8, 0.8),
    Quantity("cas"): (0.8, 0.9),
    Quantity("cas_real"): (None, 0.95),
    Quantity("class_agreement"): (0.7, None),
    Quantity("pixel_distance"): (0.3, 0.4),
    Quantity("pixel_copied"): (0.01, None),
    Quantity("pixel_p_value"): (0.5, None),
}


def evaluated(
    server_round: int = 2, scores: Scores | None = None, **changes: Any
) -> dict[str, Any]:
    """Return the file of an evaluation of made-up images.

    Args:
        server_round: whose weights drew them.
        scores: beside `SCORES`, or in place of them.
        **changes: of `LABEL`, and how images were drawn.
    """
    context = {"extractor": "classifier", "image_range": "correct", "seed": 0}
    label = Label(**{name: changes.pop(name, value) for name, value in LABEL.items()})
    records = [
        Record(
            *(server_round, quantity.name, value),
            reference=quantity.reference,
            real=real,
            n=label.n_scored,
            context=context,
        )
        for quantity, values in (SCORES | (scores or {})).items()
        for real, value in zip((False, True), values, strict=True)
        if value is not None
    ]
    drawn = {"round": server_round, **changes}
    return Evaluation(label, Records(tuple(records)), Records(()), drawn).content()


def bound_by_modes(function: Callable[[], T]) -> T:
    """Call a function in a process that the modes of files bind, as they do not bind root."""
    context = multiprocessing.get_context("fork")
    ours, theirs = context.Pipe()

    def call() -> None:
        version_3, none = (ctypes.c_uint32 * 2)(0x20080522, 0), (ctypes.c_uint32 * 6)()
        assert ctypes.CDLL(None).capset(version_3, none) == 0
        try:
            theirs.send(function())
        except Exception as error:
            theirs.send(error)

    process = context.Process(target=call)
    process.start()
    result: Any = ours.recv() if ours.poll(60) else TimeoutError("no answer")
    process.kill()
    process.join()
    if isinstance(result, Exception):
        raise result
    return result
