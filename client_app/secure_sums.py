"""A client's part in sums of which the server sees no more than the sum."""

import hashlib
import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, cast

import numpy as np
from flwr.app import (
    Array,
    ArrayRecord,
    ConfigRecord,
    Context,
    Message,
    MessageType,
    RecordDict,
)
from flwr.common.constant import SType
from numpy.typing import NDArray

from client_app.log import logger
from client_app.workspace import Workspace
from task.config import flat_values
from task.protocol.node import NodeConfig, identity_of, participant_of
from task.protocol.secure_aggregation.fixed_point import UpdateFormat
from task.protocol.secure_aggregation.keys import Identity, PublicKeys, new_identity_secret
from task.protocol.secure_aggregation.memory import PeersRefusedError
from task.protocol.secure_aggregation.participant import Participant
from task.protocol.secure_aggregation.terms import Terms, read_peers
from task.protocol.wire import Key, from_npy, to_npy

# Of records in the state of a simulated client.
IDENTITY_RECORD, SUM_RECORD = "identity", "sum-of-"


class ContextStore:
    """What a simulated client remembers of sums, in the state that Flower keeps for it."""

    def __init__(self, context: Context) -> None:
        """Keep it there."""
        self._state = context.state

    def read(self, run: str) -> str | None:
        """See `MemoryStore`."""
        found = self._state.config_records.get(SUM_RECORD + run)
        return None if found is None else str(found[Key.CONFIG])

    def write(self, run: str, text: str) -> None:
        """See `MemoryStore`."""
        self._state[SUM_RECORD + run] = ConfigRecord({Key.CONFIG: text})

    @contextmanager
    def held(self) -> Iterator[None]:
        """See `MemoryStore`; Flower gives a simulated client one message at a time."""
        yield


def simulated_identity(context: Context) -> Identity:
    """Return the identity of a simulated client; the first time it is made."""
    if IDENTITY_RECORD not in context.state.config_records:
        context.state[IDENTITY_RECORD] = ConfigRecord({IDENTITY_RECORD: new_identity_secret()})
    secret = context.state.config_records[IDENTITY_RECORD][IDENTITY_RECORD]
    return Identity(cast(bytes, secret))


def own_keys(context: Context, node: NodeConfig | None) -> PublicKeys:
    """Return what a client tells of its keys; see `identity_of` for what it raises."""
    return (simulated_identity(context) if node is None else identity_of(node)).public


def own_participant(context: Context, node: NodeConfig | None) -> Participant:
    """Return what takes part in sums for a client; see `participant_of` for what it raises."""
    if node is not None:
        return participant_of(node)
    return Participant(simulated_identity(context), ContextStore(context))


class SumPart:
    """A client's part in one sum, from the server's message to its masked reply.

    Attributes:
        sent: [P], the weights that the server sent.
    """

    def __init__(self, workspace: Workspace, context: Context, message: Message) -> None:
        """Agree to the sum that a message asks for, before anything is done for it.

        Raises:
            PeersRefusedError: this client does not take part in it.
            ValueError: a peer's keys are wrong.
        """
        asked = cast(ConfigRecord, message.content[Key.CONFIG])
        if Key.PEERS not in asked:
            raise PeersRefusedError("no peers are named in a run with secure aggregation")
        peers = read_peers(cast(list[bytes], asked[Key.PEERS]))
        arrays = cast(ArrayRecord, message.content[Key.ARRAYS])
        sent = arrays[Key.PACKED].data
        self.sent = from_npy(sent)
        self._message = message
        self._participant = own_participant(context, workspace.node)
        # The noise of a private round is that of so many; test losses are of those that answer.
        trains = message.metadata.message_type == MessageType.TRAIN
        min_replies = workspace.config.federation.min_replies if trains else 1
        self._terms = Terms(
            run=str(asked[Key.RUN_ID]),
            server_round=int(asked[Key.SERVER_ROUND]),  # type: ignore[arg-type]
            attempt=int(asked[Key.SUM]),  # type: ignore[arg-type]
            purpose=message.metadata.message_type,
            peers=peers,
            format=UpdateFormat.of(workspace.config, len(peers)),
            model=model_digest(workspace, sent),
            min_replies=min_replies,
            colluders=int(workspace.config.privacy.colluders or 0) if trains else 0,
        )
        self._participant.begin(self._terms)

    @classmethod
    def of(cls, workspace: Workspace, context: Context, message: Message) -> "SumPart | None":
        """Agree to the sum that a message asks for; None in a run without secure aggregation.

        Raises:
            PeersRefusedError, ValueError: see the class.
        """
        if not workspace.config.federation.secure_aggregation:
            return None
        return cls(workspace, context, message)

    def reply(
        self,
        packed: NDArray[np.floating] | None,
        num_images: int,
        measured: Sequence[float],
    ) -> Message:
        """Make the masked reply; once.

        Args:
            packed: [P], the weights after training; None: nothing was trained.
            num_images: behind what was measured.
            measured: means over them.

        Raises:
            NotFiniteError: training has diverged.
        """
        form = self._terms.format
        values, clipped = np.zeros(0, np.uint32), 0
        if packed is not None:
            update = packed.astype(np.float32) - self.sent.astype(np.float32)
            values, clipped = form.encode(update, num_images)
        if clipped:
            logger.info(
                "%d of %d values of the update lie beyond %g, and %s",
                clipped,
                len(values),
                form.update_range,
                "may wrap around" if form.wraps else "were clipped to it (federation.update_range)",
            )
        if num_images > form.max_images:
            logger.info("%d images count as %d", num_images, form.max_images)
        measures = form.encode_measures(num_images, measured)
        upload = self._participant.upload(self._terms, values, measures)
        arrays = {
            str(Key.PACKED): npy_array(upload.values),
            str(Key.MEASURES): npy_array(upload.measures),
        }
        config = ConfigRecord({Key.SHARES: upload.shares, Key.COMMITMENTS: upload.commitments})
        content = RecordDict({Key.ARRAYS: ArrayRecord(arrays), Key.CONFIG: config})
        return Message(content, reply_to=self._message)


def help_unmask(message: Message, context: Context, node: NodeConfig | None) -> Message:
    """Reply the shares that it takes to take the masks off a sum, once for each sum.

    Raises:
        PeersRefusedError: see `Participant.answer`.
    """
    asked = cast(ConfigRecord, message.content[Key.CONFIG])
    answer = own_participant(context, node).answer(
        str(asked[Key.RUN_ID]),
        int(asked[Key.SUM]),  # type: ignore[arg-type]
        cast(list[int], asked[Key.SURVIVORS]),
        cast(list[bytes], asked[Key.SHARES]),
    )
    content = RecordDict({Key.CONFIG: ConfigRecord({Key.SHARES: answer})})
    return Message(content, reply_to=message)


def npy_array(array: NDArray[Any]) -> Array:
    """Make what travels of a contiguous array, as Flower's Array(array) does, with fewer copies."""
    return Array(str(array.dtype), array.shape, SType.NUMPY, to_npy(array))


def model_digest(workspace: Workspace, sent: bytes) -> str:
    """Return the SHA-256 of what all clients of a sum must have been asked alike.

    Without the configuration a server could let all but one train at a rate of nearly 0, whose sum
    is the update of that one.

    Args:
        workspace: for the configuration, as the server says it, and the model's layout.
        sent: the weights.
    """
    shapes = {name: [*shape] for name, shape in workspace.layout.shapes.items()}
    # A simulation's processes may each make a name of the time of day.
    said = {k: v for k, v in flat_values(workspace.run_config).items() if k != "run_name"}
    agreed = json.dumps([said, shapes], sort_keys=True)
    return hashlib.sha256(agreed.encode() + b"\0" + sent).hexdigest()
