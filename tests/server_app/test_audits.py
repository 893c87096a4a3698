import math

import pytest
from flwr.app import ConfigRecord, MetricRecord, RecordDict

from server_app.audits import attacks_of, read_attacks
from server_app.replies import UnusableReply
from task.protocol.wire import Key

NUMBERS = [0.7, 0.6, 0.8, 0.05, 0.01, 0.2, -1.0, 200.0, 120.0, 40.0, 30.0]


def told(attacks: dict[str, object]) -> RecordDict:
    return RecordDict({Key.AUDIT: MetricRecord(attacks)})  # type: ignore[arg-type]


def test_what_a_client_tells_of_its_attacks_is_read() -> None:
    names = ["SimA", "loss at log-SNR -2"]
    found = read_attacks(told(dict.fromkeys(names, NUMBERS)), names)
    assert [*found] == ["SimA", "loss at log-SNR -2"]
    assert found["SimA"].numbers() == NUMBERS
    assert found["SimA"].true_positives == {0.01: 0.2} and found["SimA"].patients == (40, 30)
    (attack, _) = attacks_of(found, 3, is_local=True)
    assert (attack.name, attack.client, attack.is_local) == ("SimA", 3, True)
    for nothing in (RecordDict(), RecordDict({Key.AUDIT: ConfigRecord({"a": "b"})})):
        assert read_attacks(nothing, names) == {}


@pytest.mark.parametrize(
    ("attacks", "reason"),
    [
        ({"certified private": NUMBERS}, "attacks must be of a, b, got 'certified private'"),
        ({"a": [*NUMBERS[:3], 0.0, *NUMBERS[4:]]}, "a standard error > 0, got 0.0"),
        ({"a": 0.5}, "a: numbers of an attack must be a list, got 0.5"),
        ({"a": NUMBERS[1:]}, "a: numbers of an attack must be 11 numbers, got 10"),
        ({"a": [1.1, *NUMBERS[1:]]}, "shares in .0, 1., got 1.1"),
        ({"a": [math.nan, *NUMBERS[1:]]}, "shares in .0, 1., got nan"),
        ({"a": [*NUMBERS[:5], -0.5, *NUMBERS[6:]]}, "rates in .0, 1., or -1, got -0.5"),
        ({"a": [*NUMBERS[:10], 9.0]}, "counts from 10 on, got 9.0"),
        ({"a": [*NUMBERS[:10], 10.5]}, "counts from 10 on, got 10.5"),
        ({"a": [*NUMBERS[:10], math.inf]}, "counts from 10 on, got inf"),
    ],
)
def test_attacks_that_cannot_be_are_refused(attacks: dict[str, object], reason: str) -> None:
    with pytest.raises(UnusableReply, match=reason):
        read_attacks(told(attacks), ["a", "b"])
