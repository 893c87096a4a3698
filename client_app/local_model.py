"""The newest own weights of a hospital, which never leave it."""

from client_app.log import logger
from client_app.workspace import Workspace
from task.config import settle_precisions
from task.protocol.node import output_folder
from task.runs.checkpoint import save_weights, weights_metadata

LOCAL_MODEL = "local-model.safetensors"


def keep_local_model(workspace: Workspace, server_round: int, precision: str) -> None:
    """Write the node's own weights to `<output-path>/<run_name>/`, where it has an output-path.

    The round does not depend on it: where the file cannot be written, the node's log says so,
    with the cause, and the reply goes out all the same.

    Args:
        workspace: whose model was trained.
        server_round: that it was trained in.
        precision: that it was trained in.
    """
    node = workspace.node
    if node is None or node.output_path is None:
        return
    folder = output_folder(node.output_path) / workspace.config.run_name
    # As the run says it, without the places of this machine.
    config = settle_precisions(workspace.run_config, train=precision)
    try:
        # Weights of one hospital alone tell of its images: for the node's own user.
        folder.mkdir(mode=0o700, exist_ok=True)
        save_weights(
            folder / LOCAL_MODEL,
            workspace.generator.state_dict(),
            weights_metadata(config, server_round),
        )
    except OSError:
        logger.exception(
            "round %d: the local model is NOT kept, %s cannot be written; the round goes on",
            server_round,
            folder / LOCAL_MODEL,
        )
