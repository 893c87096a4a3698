"""How well a client's own images are told from those that it holds out: scalars, and no more."""

from flwr.app import MetricRecord

from client_app.log import logger
from client_app.workspace import Workspace
from task.audit.membership import attack_members
from task.data import Dataset
from task.training.devices import move


def attack_own(workspace: Workspace, own: Dataset, *, client: int, is_local: bool) -> MetricRecord:
    """Attack the weights that the workspace's model holds with the images of a client.

    Args:
        workspace: of the client; its model is left in eval mode.
        own: the client's training images, and those that it holds out.
        client: its number.
        is_local: whether the weights are its own, and not the global ones.

    Returns:
        `Separation.numbers` of each attack, by its name; none where too few images are held out.
    """
    config = workspace.config
    move(workspace.generator, workspace.device, channels_last=config.train.channels_last)
    attacks = attack_members(
        workspace.generator,
        own,
        num_images=config.audit.num_images,
        batch_size=config.train.batch_size,
        device=workspace.device,
        seed=config.eval.seed,
        local_of=client if is_local else None,
    )
    logger.info(
        "attacked %s weights with %d training images and %d held out, AUC: %s",
        "its own" if is_local else "the global",
        len(own.train),
        len(own.test),
        ", ".join(f"{each.name} {each.found.auc:.3f}" for each in attacks) or "too few images",
    )
    return MetricRecord({each.name: each.found.numbers() for each in attacks})


def tells_audit(workspace: Workspace) -> bool:
    """Whether a client says how well its images are told.

    With differential privacy and in masked sums it says nothing of its own, and nothing in a run
    that did not say that it audits.
    """
    config, node = workspace.config, workspace.node
    asked = config.audit.at_end or config.audit.every is not None
    return asked and config.tells_of_clients and (node is None or node.audit)
