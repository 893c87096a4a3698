import pytest

from task.audit.findings import Outcome, findings
from task.audit.membership import Attack
from task.audit.records import (
    NUM_ATTACKS,
    attack_records,
    auc_by_round,
    audited_rounds,
    recorded_attacks,
)
from task.audit.roc import Separation
from task.runs.records import Record, Records


def attack(
    auc: float, p_value: float = 0.5, name: str = "SimA", client: int | None = None
) -> Attack:
    auc = round(auc, 4)
    low, high = round(auc - 0.1, 4), round(auc + 0.1, 4)
    found = Separation(auc, low, high, 0.05, p_value, {0.01: 0.1}, 200, 150, (200, 150))
    return Attack(name, client, False, found)


def recorded(rounds: dict[int, list[Attack]]) -> list[Record]:
    return [
        record
        for number, attacks in rounds.items()
        for record in (
            *attack_records(number, attacks),
            Record(number, NUM_ATTACKS, len(attacks)),
        )
    ]


def test_attacks_are_read_as_they_were_recorded() -> None:
    attacks = [attack(0.6), attack(0.7, name="PIA"), attack(0.55, client=3)]
    records = Records(tuple(recorded({2: attacks, 4: []})))
    assert audited_rounds(records) == [2, 4]
    assert recorded_attacks(records, 2) == attacks and recorded_attacks(records, 4) == []
    # After a restart a round may be audited again; it counts once.
    twice = Records((*records.all, *recorded({2: attacks})))
    assert recorded_attacks(twice, 2) == attacks


def test_course_is_of_all_images_or_of_the_mean_client() -> None:
    whole = [attack(0.6), attack(0.9, client=0)]
    clients = [attack(0.5, client=0), attack(0.7, client=1)]
    assert auc_by_round(Records(tuple(recorded({1: whole, 2: clients})))) == {
        "SimA": {1: 0.6, 2: pytest.approx(0.6)}
    }


def test_kinds_of_attacks_share_the_false_alarms() -> None:
    whole = attack(0.6, p_value=0.006)
    assert [each.outcome for each in findings([whole])] == [Outcome.DETECTED]
    # Of ten clients that are attacked as well, none takes more than half.
    clients = [attack(0.6, p_value=0.3, client=number) for number in range(10)]
    assert {each.outcome for each in findings([whole, *clients])} == {Outcome.NOT_DETECTED}
    # Each client is one look of ten.
    shown = [attack(0.9, p_value=0.0004, client=number) for number in range(10)]
    found = findings([whole, *shown])
    assert [each.client for each in found if each.outcome is Outcome.DETECTED] == [*range(10)]
    assert [each.outcome for each in findings([whole], times=2)] == [Outcome.NOT_DETECTED]
    # A client that tells of many attacks takes nothing from the others.
    many = [attack(0.5, name=f"a{number}", client=0) for number in range(50)]
    found = findings([*many, attack(0.9, p_value=0.004, client=1)])
    assert [each.client for each in found if each.outcome is Outcome.DETECTED] == [1]
