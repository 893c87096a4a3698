"""What clients are asked to attack with their own images, and what they say of it."""

import re

from flwr.app import MessageType, MetricRecord, RecordDict

from server_app.messages import record_of
from server_app.replies import UnusableReply
from task.audit.membership import Attack
from task.audit.roc import Separation
from task.config import Config
from task.protocol.wire import AUDIT, Key

AUDIT_TYPE = f"{MessageType.EVALUATE}.{AUDIT}"

# Of the names of attacks, which families choose, and how many there can be.
ATTACK_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9 -]{0,39}")
MOST_ATTACKS = 20


def asks_clients(config: Config) -> bool:
    """Whether clients say how well their images are told; not what is to show sums alone."""
    return not (config.privacy.is_on or config.federation.secure_aggregation)


def read_attacks(content: RecordDict) -> dict[str, Separation]:
    """Return what the attacks of a reply came to, by name; none where it tells of none.

    Raises:
        UnusableReply: there are too many, or one cannot have come to what it says.
    """
    told = record_of(content, Key.AUDIT, MetricRecord)
    if len(told) > MOST_ATTACKS:
        raise UnusableReply(f"at most {MOST_ATTACKS} attacks, got {len(told)}")
    found = {}
    for name, numbers in told.items():
        if not ATTACK_NAME.fullmatch(name):
            raise UnusableReply(f"an attack must have a name, got {name!r:.60}")
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
