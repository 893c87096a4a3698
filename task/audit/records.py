"""What an audit came to, in the records of a run and in `audit.json`, and read back."""

from collections.abc import Iterable, Sequence
from dataclasses import asdict
from statistics import fmean
from typing import Any, NamedTuple

from task.audit.findings import AuditFinding, Search
from task.audit.membership import Attack
from task.audit.roc import Separation
from task.evaluation.near_copies import Copying
from task.runs.layout import AUDIT_FILE, read_json, understood
from task.runs.records import Record, Records, Series
from task.runs.run import Run

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


def audit_record(server_round: int, attacks: Sequence[Attack], clients: Iterable[int]) -> Record:
    """Make the record that says that weights were audited, and of which clients nothing is known.

    Args:
        server_round: after which they were the weights.
        attacks: on the global weights.
        clients: whose images were to be attacked.
    """
    attacked = {each.client for each in attacks}
    skipped = sorted(set(clients) - attacked)
    context = {"skipped": skipped} if skipped else {}
    return Record(server_round, NUM_ATTACKS, len(attacks), context=context)


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


class Audit(NamedTuple):
    """An audit of weights.

    Attributes:
        round: after which they were the weights.
        by: "in the run" or "by feddm audit".
        attacks: that were made; none where none could be.
        skipped: clients of whom too few patients were there to be attacked.
        searches: of `feddm audit`, for copies; those of a run stand among its other measures.
    """

    round: int
    by: str
    attacks: Sequence[Attack]
    skipped: Sequence[int] = ()
    searches: Sequence[Search] = ()


def audit_content(
    attacks: Sequence[Attack], searches: Sequence[Search], found: Sequence[AuditFinding]
) -> dict[str, Any]:
    """Return what `audit.json` tells of attacks, searches and findings."""
    return {
        "attacks": [asdict(each) for each in attacks],
        "searches": [{**asdict(each), "found": each.found._asdict()} for each in searches],
        "findings": [asdict(each) for each in found],
    }


def newest_audit(run: Run) -> Audit | None:
    """Return the newest audit of a run's weights; None without any.

    That of `feddm audit`, which attacks more images, goes before one of the same weights that the
    run made itself.

    Raises:
        ValueError: `audit.json` is none of an audit.
    """
    told = read_json(run.path / AUDIT_FILE)
    if told is not None:
        with understood(run.path / AUDIT_FILE):
            if told["round"] == run.rounds_done:
                return _as_audit(told)
    rounds = audited_rounds(run.records)
    return recorded_audit(run.records, rounds[-1]) if rounds else None


def recorded_audit(records: Records, server_round: int) -> Audit:
    """Return the audit of a round that a run made itself."""
    number = records.by_round(NUM_ATTACKS)[server_round]
    skipped = [int(client) for client in number.context.get("skipped", [])]
    attacks = recorded_attacks(records, server_round)
    return Audit(server_round, "in the run", attacks, skipped)


def _as_audit(told: dict[str, Any]) -> Audit:
    """Read what `feddm audit` wrote; what it found is said anew of its figures."""
    attacks = []
    for each in told["attacks"]:
        found = dict(each["found"])
        rates = {float(rate): share for rate, share in found.pop("true_positives").items()}
        patients = tuple(found.pop("patients"))
        separated = Separation(**found, true_positives=rates, patients=patients)
        attacks.append(Attack(each["name"], each["client"], each["is_local"], separated))
    searches = [
        Search(each["space"], Copying(**each["found"]), each["generated"], each["held_out"])
        for each in told["searches"]
    ]
    skipped = told["clients_not_looked_at"]
    return Audit(told["round"], "by feddm audit", attacks, skipped, searches)
