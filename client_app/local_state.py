"""What a client keeps of its training from one round to the next, and never sends."""

import hashlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Self

import torch
from flwr.app import ConfigRecord

from client_app.log import logger
from client_app.workspace import Workspace
from task.data import ImageSet
from task.files import remove_left_overs
from task.lock import hold
from task.protocol.node import missing_output_path, output_folder, without_place
from task.protocol.wire import Key
from task.runs.checkpoint import join_groups, load_weights, save_weights, split_groups
from task.runs.layout import LOCK_FILE, round_of, run_path
from task.training.algorithms.registry import client_algorithm
from task.training.loop import Optimizers
from task.training.optimizer_state import load_optimizer_tensors, optimizer_tensors

# An earlier training of a client may still be about to end.
STATE_PATIENCE_SECONDS = 60.0
ROUND_FILES = "round_*.safetensors"
# The group of what the strategy of the run keeps, in a file of a client's state.
STRATEGY = "strategy"


class LocalState:
    """The files of one client's state, one for each of the last rounds that it has trained in.

    A round can be repeated, after a failure or by a server that goes on from an earlier checkpoint;
    it then begins with the state that it began with before.

    Attributes:
        kept: what the client's half of the strategy has left in its last round, by name.
    """

    def __init__(self, workspace: Workspace, asked: ConfigRecord, images: ImageSet) -> None:
        """Make the folder, where anything is kept.

        Args:
            workspace: whose generator says what is kept.
            asked: what the server's message says of the run and the client.
            images: that the client trains on.

        Raises:
            OSError: the folder cannot be made, such as on a disk that is not mounted.
            ValueError: a real node has no place for it, or the run's name is none.
        """
        self._generator = workspace.generator
        self._client = int(asked[Key.CLIENT])  # type: ignore[arg-type]
        self._round = int(asked[Key.SERVER_ROUND])  # type: ignore[arg-type]
        self._run_id = str(asked[Key.RUN_ID])
        self._keep = workspace.config.federation.keep_checkpoints
        self._images = images_digest(images) if self._generator.bound_to_images else ""
        self._folder = None
        self.kept: Mapping[str, torch.Tensor] = {}
        config = workspace.config
        keeps = bool(client_algorithm(config).kept) or config.federation.error_feedback
        if self._generator.keeps_state or keeps:
            self._folder = _make_folder(workspace, str(asked[Key.RUN_NAME]), self._client)

    @contextmanager
    def held(self) -> Iterator[Self]:
        """Keep another process from training the same client.

        Raises:
            ValueError: one is doing so.
        """
        if self._folder is None:
            yield self
            return
        lock = hold(self._folder / LOCK_FILE, Key.CLIENT, patience=STATE_PATIENCE_SECONDS)
        try:
            yield self
        finally:
            lock.close()

    def load(self, optimizers: Optimizers | None = None) -> None:
        """Take up the state that the round begins with; without any it stays as it is new.

        Args:
            optimizers: of the generator, which has been prepared and is where it is trained; None:
                the round's training is over, and the state after it is taken up, for evaluation.

        Raises:
            ValueError: the file is damaged, of another run, or of other images.
        """
        # What a strategy has kept is of no use to an evaluation.
        if self._folder is None or (optimizers is None and not self._generator.keeps_state):
            return
        before = self._round + (optimizers is None)
        earlier = [file for file in self._files() if round_of(file) < before]
        if not earlier:
            logger.info("round %d: what stays at this client begins anew", self._round)
            return
        tensors, metadata = load_weights(earlier[-1])
        if (metadata["run"], metadata["client"]) != (self._run_id, str(self._client)):
            raise ValueError(
                f"{earlier[-1]} is of another run, or another client, of the same name; move its "
                "folder away, and this client starts anew"
            )
        local, gathered = split_groups(tensors)
        self.kept = gathered.pop(STRATEGY, {})
        way_out = "move its folder away, and this client starts anew"
        if metadata["images"] != self._images:
            raise ValueError(
                f"{earlier[-1]} does not fit: this client has other images than after round "
                f"{metadata['round']}; {way_out}"
            )
        try:
            self._generator.load_state_dict({**self._generator.state_dict(), **local})
            for name in self._generator.local_optimizers & (optimizers or {}).keys():
                load_optimizer_tensors((optimizers or {})[name], gathered.get(name, {}))
        except RuntimeError as error:
            raise ValueError(
                f"{earlier[-1]} does not fit this run's model ({error}); {way_out}"
            ) from error
        logger.info("round %d: goes on from the state of %s", self._round, earlier[-1].name)

    def save(self, optimizers: Optimizers, kept: Mapping[str, torch.Tensor]) -> None:
        """Keep the state after the round, and forget that of rounds which no server goes back to.

        Args:
            optimizers: of the generator.
            kept: see the attribute; of this round.

        Raises:
            OSError: it cannot be written.
        """
        if self._folder is None:
            return
        state = self._generator.state_dict()
        local = {name: tensor for name, tensor in state.items() if self._generator.stays(name)}
        names = sorted(self._generator.local_optimizers & optimizers.keys())
        gathered = {name: optimizer_tensors(optimizers[name]) for name in names}
        remove_left_overs(self._folder / ROUND_FILES)
        for file in self._files():
            if round_of(file) > self._round:
                file.unlink()
        save_weights(
            self._folder / f"round_{self._round:04d}.safetensors",
            join_groups(local, {**gathered, STRATEGY: kept}),
            {
                "round": str(self._round),
                "run": self._run_id,
                "client": str(self._client),
                "images": self._images,
            },
        )
        # One more than the server's checkpoints, because its last may be of the round before.
        for old in self._files()[: -(self._keep + 1)]:
            old.unlink()

    def _files(self) -> list[Path]:
        return [] if self._folder is None else sorted(self._folder.glob(ROUND_FILES), key=round_of)


def images_digest(images: ImageSet) -> str:
    """Return what images in their order are known by, in hexadecimal digits."""
    return hashlib.sha256(images.images.contiguous().numpy().data).hexdigest()


def _make_folder(workspace: Workspace, run_name: str, client: int) -> Path | None:
    """Make the folder of a client; None on a node without one that can do without."""
    node = workspace.node
    # Checks the name, which comes from outside.
    config = workspace.config.changed({"run_name": run_name})
    if node is None:
        run, parts = run_path(config), ("clients",)
    elif node.output_path is not None:
        run, parts = output_folder(node.output_path) / run_name, ("state",)
        run.mkdir(mode=0o700, exist_ok=True)
    elif what := without_place(config, workspace.generator):
        raise missing_output_path(what)
    else:
        return None
    folder = run
    for part in (*parts, f"client-{client}"):
        folder /= part
        # What one hospital alone has trained tells of its images: for the node's own user.
        folder.mkdir(mode=0o700, exist_ok=True)
    return folder
