"""The last reply of a node to a training, so that hours of work do not hang on one connection."""

import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from typing import cast

import numpy as np
import torch
from flwr.app import ArrayRecord, ConfigRecord, Context, Message, MetricRecord, RecordDict

from client_app.local_state import images_digest
from client_app.log import logger
from client_app.secure_sums import npy_array
from client_app.workspace import Workspace
from task.code_version import code_fingerprint
from task.config import Config, package_of
from task.data import ImageSet
from task.files import remove_left_overs
from task.lock import hold
from task.protocol.node import NodeConfig, output_folder
from task.protocol.wire import Key, from_npy
from task.runs.checkpoint import join_groups, load_weights, save_weights, split_groups

LAST_REPLY = "last-reply.safetensors"
TRAINING_LOCK = ".training.lock"


def keeps_replies(config: Config, node: NodeConfig | None) -> bool:
    """Whether a node keeps its last reply to a training: a real one with an `output-path`.

    Masked replies are not kept, as each sum has masks of its own.
    """
    has_place = node is not None and node.output_path is not None
    return has_place and not config.federation.secure_aggregation


@contextmanager
def one_training_at_a_time(workspace: Workspace) -> Iterator[None]:
    """Wait until no other process of a node trains for the same run, where replies are kept.

    A server that hears nothing asks again, and Flower starts a process for each message. The second
    then finds the reply of the first.

    Raises:
        ValueError: the other takes longer than a server waits.
    """
    node, config = workspace.node, workspace.config
    if node is None or node.output_path is None or not keeps_replies(config, node):
        yield
        return
    folder = output_folder(node.output_path) / config.run_name
    patience = config.federation.round_timeout
    try:
        # Weights of one hospital alone, which will lie there, tell of its images.
        folder.mkdir(mode=0o700, exist_ok=True)
        held = hold(folder / TRAINING_LOCK, "output-path", patience=patience)
    except OSError as error:  # whatever the disk does, the round goes on
        logger.warning("a question that comes twice will be trained twice: %s", error)
        yield
        return
    with held:
        yield


class LastReply:
    """The file `<output-path>/<run_name>/last-reply.safetensors` of a real node.

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
        if node is None or node.output_path is None or not keeps_replies(config, node):
            return
        self._file = output_folder(node.output_path) / config.run_name / LAST_REPLY
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
