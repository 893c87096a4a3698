"""What a client says of its failures: a class and a code. The text stays on its node."""

import functools
from collections.abc import Callable

from flwr.app import Context, Error, Message

from client_app.log import logger, show_log
from task.data import UnknownClassError
from task.efficientnet import MissingWeightsError
from task.privacy.ledger import BudgetExhaustedError
from task.protocol.node import TooFewImagesError
from task.protocol.secure_aggregation.fixed_point import NotFiniteError
from task.protocol.secure_aggregation.memory import PeersRefusedError
from task.protocol.wire import FailureCode, Key
from task.training.devices import is_out_of_memory

Handler = Callable[[Message, Context], Message]


def failures_stay_local(handler: Handler) -> Handler:
    """Wrap a handler so that whatever it raises becomes an error reply without any text.

    Exceptions carry paths and file names, which must not leave a hospital; left alone, Flower
    would send them to the server. The node's own log has them whole.
    """

    @functools.wraps(handler)
    def guarded(message: Message, context: Context) -> Message:
        if Key.PARTITION_ID not in context.node_config:
            show_log()
        try:
            return handler(message, context)
        except Exception as error:
            code = failure_code(error)
            reason = type(error).__name__
            logger.exception(
                "%s failed: %s; the server is told %s, code %d, and no more",
                message.metadata.message_type,
                " ".join(str(error).split()),
                reason,
                code,
            )
            return Message(Error(code=code, reason=reason), reply_to=message)

    return guarded


def failure_code(error: Exception) -> FailureCode:
    """Sort an exception into the few kinds that a server needs to tell apart."""
    if is_out_of_memory(error):
        return FailureCode.OUT_OF_MEMORY
    if isinstance(error, UnknownClassError):
        return FailureCode.UNKNOWN_CLASS
    if isinstance(error, TooFewImagesError):
        return FailureCode.TOO_FEW_IMAGES
    if isinstance(error, MissingWeightsError):
        return FailureCode.MISSING_WEIGHTS
    if isinstance(error, BudgetExhaustedError):
        return FailureCode.BUDGET_EXHAUSTED
    if isinstance(error, PeersRefusedError):
        return FailureCode.PEERS_REFUSED
    if isinstance(error, NotFiniteError):
        return FailureCode.NOT_FINITE
    if isinstance(error, OSError):
        return FailureCode.DATA_UNREADABLE
    if isinstance(error, ValueError | TypeError):
        return FailureCode.BAD_INPUT
    return FailureCode.OTHER
