"""What was audited in a run, as its records, and read back from them."""

from collections.abc import Iterable
from statistics import fmean

from task.audit.membership import Attack
from task.audit.roc import Separation
from task.runs.records import Record, Records, Series

# Before the name of an attack: its AUC.
AUC = "member_auc "
# How many attacks were made on the global weights, 0 where none could be; of every audit.
NUM_ATTACKS = "num_attacks"


def attack_records(server_round: int, attacks: Iterable[Attack]) -> list[Record]:
    """Make the records of attacks on the weights of a round."""
    return [
        Record(
            server_round,
            f"{AUC}{each.name}",
            each.found.auc,
            client=each.client,
            local_model=each.is_local,
            n=each.found.members,
            context={"numbers": each.found.numbers()},
        )
        for each in attacks
    ]


def audited_rounds(records: Records) -> list[int]:
    """List the rounds whose weights were audited, ascending."""
    return sorted(records.by_round(NUM_ATTACKS))


def recorded_attacks(records: Records, server_round: int) -> list[Attack]:
    """Return the attacks on the weights of a round, as `attack_records` wrote them.

    Raises:
        ValueError: a record is not one of these.
    """
    # One that was made again, as after a restart, counts once.
    found = {
        (each.metric, each.client, each.local_model): each
        for each in records.of_round(server_round).all
        if each.metric.startswith(AUC)
    }
    return [
        Attack(
            each.metric.removeprefix(AUC),
            each.client,
            each.local_model,
            Separation.of_numbers(each.context["numbers"]),
        )
        for each in found.values()
    ]


def auc_by_round(records: Records) -> dict[str, Series]:
    """Return the AUC of each attack on the global weights by round.

    Of runs whose clients attack by themselves alone it is the mean over those.
    """
    found: dict[str, Series] = {}
    for number in audited_rounds(records):
        attacks = [each for each in recorded_attacks(records, number) if not each.is_local]
        whole = [each for each in attacks if each.client is None] or attacks
        for name in dict.fromkeys(each.name for each in whole):
            values = [each.found.auc for each in whole if each.name == name]
            found.setdefault(name, {})[number] = fmean(values)
    return found
