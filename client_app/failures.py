"""What a client says of its failures: a class and a code. The text stays on its node."""

import functools
import logging
from collections.abc import Callable

import torch
from flwr.app import Context, Error, Message

from task.wire import FailureCode

Handler = Callable[[Message, Context], Message]

logger = logging.getLogger("feddm.client")


def failures_stay_local(handler: Handler) -> Handler:
    """Wrap a handler so that whatever it raises becomes an error reply without any text.

    Exceptions carry paths and file names, which must not leave a hospital; left alone, Flower
    would send them to the server.
    """

    @functools.wraps(handler)
    def guarded(message: Message, context: Context) -> Message:
        try:
            return handler(message, context)
        except Exception as error:
            code = failure_code(error)
            logger.exception("the client failed and replies with code %d", code)
            return Message(Error(code=code, reason=type(error).__name__), reply_to=message)

    return guarded


def failure_code(error: Exception) -> FailureCode:
    """Sort an exception into the few kinds that a server needs to tell apart."""
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return FailureCode.OUT_OF_MEMORY
    if isinstance(error, OSError):
        return FailureCode.DATA_UNREADABLE
    if isinstance(error, ValueError | TypeError):
        return FailureCode.BAD_INPUT
    return FailureCode.OTHER
