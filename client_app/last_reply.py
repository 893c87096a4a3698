"""The last reply of a node to a training, so that hours of work do not hang on one connection."""

import hashlib
import json
from typing import cast

import torch
from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict

from client_app.log import logger
from client_app.secure_sums import npy_array
from client_app.workspace import Workspace
from task.protocol.node import output_folder
from task.protocol.wire import Key, from_npy
from task.runs.checkpoint import join_groups, load_weights, save_weights, split_groups

LAST_REPLY = "last-reply.safetensors"


class LastReply:
    """The file `<output-path>/<run_name>/last-reply.safetensors` of a real node.

    Flower drops a reply that does not get through. The server then asks for the same round again,
    from the same weights, and the node sends what it has trained. Masked replies are not kept: each
    sum has masks of its own. A simulation keeps none either, whose server has the same fate.
    """

    def __init__(self, workspace: Workspace, message: Message) -> None:
        """Find the file, and what the message asks for."""
        node, config = workspace.node, workspace.config
        self._file = None
        if node is None or node.output_path is None or config.federation.secure_aggregation:
            return
        self._file = output_folder(node.output_path) / config.run_name / LAST_REPLY
        self._question = _question_of(message.content)

    def read(self) -> RecordDict | None:
        """Return what was replied to this very question; None where it is a new one."""
        if self._file is None or not self._file.is_file():
            return None
        try:
            tensors, metadata = load_weights(self._file)
        except (OSError, ValueError):
            logger.exception("the last reply cannot be read; the round is trained again")
            return None
        if metadata["question"] != self._question:
            return None
        records = RecordDict()
        for name, arrays in split_groups(tensors)[1].items():
            read = {n: npy_array(from_npy(each.numpy().tobytes())) for n, each in arrays.items()}
            records[name] = ArrayRecord(read)
        for name, metrics in json.loads(metadata["metrics"]).items():
            records[name] = MetricRecord(metrics)
        logger.info("this was asked before: the reply is that of %s", self._file.name)
        return records

    def write(self, records: RecordDict) -> None:
        """Keep a reply in place of the one before; the round does not depend on it."""
        if self._file is None:
            return
        arrays = {
            name: {key: _as_tensor(array.data) for key, array in record.items()}
            for name, record in records.array_records.items()
        }
        metrics = {str(name): dict(record) for name, record in records.metric_records.items()}
        told = {"question": self._question, "metrics": json.dumps(metrics)}
        try:
            # Weights of one hospital alone tell of its images: for the node's own user.
            self._file.parent.mkdir(mode=0o700, exist_ok=True)
            save_weights(self._file, join_groups({}, arrays), told)
        except OSError:
            logger.exception("the reply is NOT kept, %s cannot be written", self._file)


def _as_tensor(data: bytes) -> torch.Tensor:
    return torch.frombuffer(bytearray(data), dtype=torch.uint8)


def _question_of(content: RecordDict) -> str:
    """Return the SHA-256 of the weights and words of a message."""
    asked = cast(ConfigRecord, content[Key.CONFIG])
    words = json.dumps({str(name): value for name, value in asked.items()}, sort_keys=True)
    digest = hashlib.sha256(words.encode())
    for name, array in sorted(cast(ArrayRecord, content[Key.ARRAYS]).items()):
        digest.update(f"{name}\0{len(array.data)}\0".encode())
        digest.update(array.data)
    return digest.hexdigest()
