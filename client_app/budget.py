"""What a hospital's node spends of its patients' privacy, and that it spends no more."""

from flwr.app import ConfigRecord

from client_app.log import logger
from client_app.workspace import Workspace
from task.data import ImageSet
from task.privacy.ledger import Charge
from task.privacy.patients import names_of_patients
from task.protocol.node import ledger_of
from task.protocol.wire import Key
from task.training.private import check_patients, spending_of


def charge_round(workspace: Workspace, asked: ConfigRecord, images: ImageSet) -> None:
    """Write down what a round is about to spend on the patients of these images.

    Args:
        workspace: of the run. A simulation has no ledger: its images are nobody's.
        asked: what the server's message says of the run and the round.
        images: that are trained on.

    Raises:
        BudgetExhaustedError: it would be more than the node allows.
        ValueError: the run does not suit so many patients, or see `Ledger.charge`.
    """
    config, node = workspace.config, workspace.node
    if not config.privacy.is_on:
        return
    check_patients(images.num_patients, config)
    if node is None:
        return
    charge = Charge(
        run_id=str(asked[Key.RUN_ID]),
        run_name=config.run_name,
        server_round=int(asked[Key.SERVER_ROUND]),  # type: ignore[arg-type]
        spending=spending_of(config, rounds=1),
    )
    spent = ledger_of(node).charge(charge, names_of_patients(images))
    logger.info(
        "round %d: charged to the ledger; at most epsilon %.4g is spent on a patient, at "
        "privacy-delta=%g",
        charge.server_round,
        spent,
        node.privacy_delta,
    )
