"""What clients are asked to attack with their own images, and what they say of it."""

from collections.abc import Collection

from flwr.app import MessageType, MetricRecord, RecordDict

from server_app.messages import record_of
from server_app.replies import UnusableReply
from task.audit.membership import Attack
from task.audit.roc import Separation
from task.protocol.wire import AUDIT, Key

AUDIT_TYPE = f"{MessageType.EVALUATE}.{AUDIT}"


def read_attacks(content: RecordDict, names: Collection[str]) -> dict[str, Separation]:
    """Return what the attacks of a reply came to, by name; none where it tells of none.

    Args:
        content: the reply.
        names: of the attacks that the family knows.

    Raises:
        UnusableReply: one is unknown, or cannot have come to what it says.
    """
    found = {}
    for name, numbers in record_of(content, Key.AUDIT, MetricRecord).items():
        if name not in names:
            raise UnusableReply(f"attacks must be of {', '.join(names)}, got {name!r:.60}")
        try:
            if not isinstance(numbers, list):
                raise TypeError(f"numbers of an attack must be a list, got {numbers!r:.60}")
            found[name] = Separation.of_numbers(numbers)
        except (TypeError, ValueError) as error:
            raise UnusableReply(f"{name}: {error}") from error
    return found


def attacks_of(found: dict[str, Separation], client: int, *, is_local: bool) -> list[Attack]:
    """Say whose images and which weights were attacked."""
    return [Attack(name, client, is_local, each) for name, each in found.items()]
