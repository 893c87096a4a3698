"""What a client keeps of its training from one round to the next, and never sends."""

import json
from pathlib import Path

from client_app.workspace import Workspace
from task.protocol.node import missing_output_path, output_folder
from task.runs.checkpoint import (
    join_groups,
    load_weights,
    save_weights,
    split_groups,
    weights_metadata,
)
from task.runs.layout import round_of, run_path
from task.training.loop import Optimizers
from task.training.optimizer_state import load_optimizer_tensors, optimizer_tensors


class LocalState:
    """The files of one client's state, one for each of the last rounds that it has trained in.

    A round can be repeated, after a failure or by a server that goes on from an earlier checkpoint;
    it then begins with the state that it began with before.
    """

    def __init__(self, workspace: Workspace, client: int) -> None:
        """Name the folder; nothing is read yet.

        Args:
            workspace: whose generator says what is kept.
            client: its number; in a simulation each has a folder of its own.
        """
        self._workspace, self._generator = workspace, workspace.generator
        self._folder = self._own_folder(client) if self._generator.keeps_state else None

    def load(self, optimizers: Optimizers, *, before: int) -> None:
        """Take up the state after the last round before one; without any it stays as it is new.

        Args:
            optimizers: of the generator, which has been prepared.
            before: 1-based round.

        Raises:
            ValueError: the file is damaged, of another run, or of other images.
        """
        earlier = [file for file in self._files() if round_of(file) < before]
        if not earlier:
            return
        tensors, metadata = load_weights(earlier[-1])
        local, gathered = split_groups(tensors)
        config = self._workspace.run_config
        stored = json.loads(metadata["config"])
        if (stored["seed"], stored["model"]) != (config.seed, config.model.model_dump()):
            raise ValueError(
                f"{earlier[-1]} is of another run of the name {config.run_name}; move its folder "
                "away, and this client starts anew"
            )
        try:
            self._generator.load_state_dict({**self._generator.state_dict(), **local})
            for name in self._generator.local_optimizers & optimizers.keys():
                load_optimizer_tensors(optimizers[name], gathered.get(name, {}))
        except RuntimeError as error:
            raise ValueError(
                f"{earlier[-1]} does not fit: this client has another number of images than after "
                f"round {metadata['round']}; move its folder away, and this client starts anew"
            ) from error

    def save(self, optimizers: Optimizers, *, server_round: int) -> None:
        """Keep the state after a round, and forget that of rounds which no server goes back to.

        Args:
            optimizers: of the generator.
            server_round: 1-based.

        Raises:
            OSError: it cannot be written.
        """
        if self._folder is None:
            return
        # What one hospital alone has trained tells of its images: for the node's own user.
        self._folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        state = self._generator.state_dict()
        local = {name: tensor for name, tensor in state.items() if self._generator.stays(name)}
        kept = sorted(self._generator.local_optimizers & optimizers.keys())
        gathered = {name: optimizer_tensors(optimizers[name]) for name in kept}
        for file in self._files():
            if round_of(file) > server_round:
                file.unlink()
        config = self._workspace.run_config
        save_weights(
            self._folder / f"round_{server_round:04d}.safetensors",
            join_groups(local, gathered),
            weights_metadata(config, server_round),
        )
        # One more than the server's checkpoints, because its last may be of the round before.
        for old in self._files()[: -(config.federation.keep_checkpoints + 1)]:
            old.unlink()

    def _own_folder(self, client: int) -> Path:
        config, node = self._workspace.config, self._workspace.node
        if node is None:
            return run_path(config) / "clients" / f"client-{client}"
        if node.output_path is None:
            raise missing_output_path(self._generator)
        return output_folder(node.output_path) / config.run_name / "state"

    def _files(self) -> list[Path]:
        if self._folder is None:
            return []
        return sorted(self._folder.glob("round_*.safetensors"), key=round_of)
