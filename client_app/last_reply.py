"""The last reply of a node to a training, so that hours of work do not hang on one connection."""

import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import cast

import numpy as np
import torch
from flwr.app import ArrayRecord, ConfigRecord, Context, Message, MetricRecord, RecordDict

from client_app.local_state import images_digest
from client_app.log import logger
from client_app.secure_sums import npy_array
from client_app.workspace import Workspace, named_run
from task.code_version import code_fingerprint
from task.config import Config, compose_run_config, package_of
from task.data import ImageSet
from task.files import remove_left_overs
from task.lock import hold
from task.protocol.node import NodeConfig, output_folder, read_node_config
from task.protocol.wire import Key, from_npy
from task.runs.checkpoint import join_groups, load_weights, save_weights, split_groups


def keeps_replies(config: Config, node: NodeConfig) -> bool:
    """Whether a real node keeps its last reply to a training.

    That takes an `output-path`. Masked replies are not kept, as each sum has masks of its own.
    """
    return node.output_path is not None and not config.federation.secure_aggregation


@contextmanager
def one_training_at_a_time(message: Message, context: Context) -> Iterator[None]:
    """Wait until no other process trains for the same client of the run, where replies are kept.

    A server that hears nothing asks again, and Flower starts a process for each message. The second
    then finds the reply of the first. It waits before it loads anything.

    Raises:
        RuntimeError: the other has not ended when nobody waits for an answer any more.
        OSError: with differential privacy, where patients would be charged twice: the lock cannot
            be made.
    """
    node = read_node_config(context.node_config)
    config = compose_run_config(named_run(context))
    if not isinstance(node, NodeConfig) or not keeps_replies(config, node):
        yield
        return
    try:
        folder = _reply_folder(node, config)
        # What one hospital alone has trained tells of its images: for the node's own user.
        folder.mkdir(mode=0o700, exist_ok=True)
        lock = folder / f".training-{_client_of(message)}.lock"
        held = hold(lock, "output-path", patience=message.metadata.ttl)
    except ValueError as error:
        raise RuntimeError(f"another training of this client goes on: {error}") from error
    except OSError as error:
        if config.privacy.is_on:
            raise
        # Whatever the disk does, the round goes on.
        logger.warning("a question that comes twice will be trained twice: %s", error)
        yield
        return
    with held:
        yield


def _reply_folder(node: NodeConfig, config: Config) -> Path:
    return output_folder(str(node.output_path)) / config.run_name


def _client_of(message: Message) -> int:
    return int(cast(ConfigRecord, message.content[Key.CONFIG])[Key.CLIENT])  # type: ignore[arg-type]


class LastReply:
    """The file `<output-path>/<run_name>/last-reply-<client>.safetensors` of a real node.

    Flower drops a reply that does not get through. The server then asks for the same round again,
    from the same weights, and the node sends what it has trained, with the same code from the same
    images. It does so once: a reply that the server has refused is trained anew. See
    `keeps_replies` for which are kept.
    """

    def __init__(
        self, workspace: Workspace, message: Message, context: Context, images: ImageSet
    ) -> None:
        """Find the file, and what the message asks for.

        Args:
            workspace: of the node.
            message: that asks.
            context: of the node, with the words of the run.
            images: that are trained on.
        """
        node, config = workspace.node, workspace.config
        self._file = None
        if node is None or not keeps_replies(config, node):
            return
        name = f"last-reply-{_client_of(message)}.safetensors"
        self._file = _reply_folder(node, config) / name
        words = {name: str(value) for name, value in context.run_config.items() if name != "resume"}
        self._question = hashlib.sha256(
            json.dumps(
                [
                    code_fingerprint(package_of(config.model.family)),
                    images_digest(images),
                    words,
                    _asked(message.content),
                ],
                sort_keys=True,
            ).encode()
        ).hexdigest()

    def take(self) -> RecordDict | None:
        """Return what was replied to this very question, once; None where it is a new one."""
        if self._file is None:
            return None
        try:
            if not self._file.exists():
                return None
            tensors, metadata = load_weights(self._file)
            if metadata.get("question") != self._question:
                return None
            self._file.unlink()
            records = RecordDict()
            for name, arrays in split_groups(tensors)[1].items():
                read = {n: npy_array(from_npy(t.numpy().tobytes())) for n, t in arrays.items()}
                records[name] = ArrayRecord(read)
            for name, metrics in json.loads(metadata["metrics"]).items():
                records[name] = MetricRecord(metrics)
        except Exception:  # a file of whatever kind costs no round
            logger.exception("the last reply cannot be read; the round is trained again")
            return None
        logger.info("this was asked before: the reply is that of %s", self._file.name)
        return records

    def keep(self, records: RecordDict) -> None:
        """Keep a finite reply in place of the one before; the round does not depend on it."""
        if self._file is None:
            return
        # Flower's view of all arrays would keep them in memory, in a circle.
        arrays = cast(ArrayRecord, records[Key.ARRAYS])
        values = [from_npy(array.data) for array in arrays.values()]
        if not all(np.isfinite(each).all() for each in values if each.dtype.kind == "f"):
            return
        tensors = {name: _as_tensor(array.data) for name, array in arrays.items()}
        metrics = {
            str(name): dict(record)
            for name, record in records.items()
            if isinstance(record, MetricRecord)
        }
        told = {"question": self._question, "metrics": json.dumps(metrics)}
        try:
            # Weights of one hospital alone tell of its images: for the node's own user.
            self._file.parent.mkdir(mode=0o700, exist_ok=True)
            remove_left_overs(self._file)
            save_weights(self._file, join_groups({}, {str(Key.ARRAYS): tensors}), told)
        except Exception:  # whatever the disk does, the reply goes out
            logger.exception("the reply is NOT kept, %s cannot be written", self._file)


def _as_tensor(data: bytes) -> torch.Tensor:
    return torch.frombuffer(bytearray(data), dtype=torch.uint8)


def _asked(content: RecordDict) -> str:
    """Return the SHA-256 of the weights and words of a message."""
    asked = cast(ConfigRecord, content[Key.CONFIG])
    words = json.dumps({str(name): value for name, value in asked.items()}, sort_keys=True)
    digest = hashlib.sha256(words.encode())
    for name, array in sorted(cast(ArrayRecord, content[Key.ARRAYS]).items()):
        digest.update(f"{name}\0{len(array.data)}\0".encode())
        digest.update(array.data)
    return digest.hexdigest()
