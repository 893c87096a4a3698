import numpy as np
import pytest
from sklearn.metrics import roc_auc_score

from task.audit.roc import (
    BOOTSTRAP_DRAWS,
    Sample,
    Separation,
    _times_drawn,
    _weighted_auc,
    separation,
    true_positive_rate,
)


def sample(scores: np.ndarray, patients: np.ndarray | None = None) -> Sample:
    return Sample(scores, np.arange(len(scores)) if patients is None else patients)


def drawn(number: int, shift: float = 0.0, seed: int = 0) -> Sample:
    return sample(np.random.default_rng(seed).normal(shift, 1, number).round(1))


def found(members: Sample, others: Sample) -> Separation:
    separated = separation(members, others, seed=0)
    assert separated is not None
    return separated


def test_auc_is_that_of_scikit_learn_and_swapped_its_complement() -> None:
    members, others = drawn(120, 0.5), drawn(80, seed=1)
    labels = np.repeat([1, 0], [120, 80])
    expected = roc_auc_score(labels, np.concatenate([members.scores, others.scores]))
    one, other = found(members, others), found(others, members)
    assert one.auc == pytest.approx(expected)
    assert other.auc == pytest.approx(1 - expected)
    assert one.low < one.auc < one.high and one.p_value < 1e-3 < 0.99 < other.p_value


def test_scores_that_tell_all_or_nothing() -> None:
    everything = found(sample(np.arange(50.0) + 100), sample(np.arange(40.0)))
    assert everything.auc == everything.high == 1 and everything.p_value < 1e-9
    few = found(sample(np.arange(12.0) + 100), sample(np.arange(12.0)))
    assert 0.7 < few.low < everything.low < 1
    assert everything.true_positives == {}  # of 40 others none at 1 %
    nothing = found(sample(np.zeros(200)), sample(np.zeros(150)))
    assert nothing.auc == 0.5
    # As wide as that of scores at random: that all are equal is no certainty.
    assert nothing.high - nothing.low == pytest.approx(2 * 1.96 * 0.0312, rel=0.02)
    assert nothing.p_value == 1
    assert nothing.true_positives == {0.01: 0.0}


def test_images_of_one_patient_count_as_one_draw() -> None:
    rng = np.random.default_rng(0)
    patients = np.arange(60).repeat(10)
    own = rng.normal(0, 1, 60).repeat(10)
    clustered = found(sample(own, patients), sample(rng.normal(0, 1, 60).repeat(10), patients))
    single = found(sample(own), sample(rng.normal(0, 1, 600)))
    assert clustered.patients == (60, 60) and clustered.members == 600
    assert clustered.high - clustered.low > 2 * (single.high - single.low)


def test_weighted_auc_is_that_of_images_which_are_there_so_often() -> None:
    members, others = drawn(30), drawn(20, seed=1)
    rng = np.random.default_rng(3)
    times = _times_drawn(members, rng), _times_drawn(others, rng)
    assert times[0].sum() == 30
    again = [
        np.repeat(s.scores, t.astype(int)) for s, t in zip((members, others), times, strict=True)
    ]
    expected = roc_auc_score(np.repeat([1, 0], [30, 20]), np.concatenate(again))
    assert _weighted_auc(members, others, *times) == pytest.approx(expected)


def test_interval_holds_the_true_auc_as_often_as_it_says() -> None:
    # Of two normal distributions a standard deviation apart: Phi(1 / sqrt 2).
    held = [
        (each := found(drawn(60, 1.0, 2 * seed), drawn(60, 0.0, 2 * seed + 1))).low
        <= 0.7602
        <= each.high
        for seed in range(150)
    ]
    assert 0.88 <= np.mean(held) <= 0.99
    assert BOOTSTRAP_DRAWS >= 200


@pytest.mark.parametrize("others", [12, 60, 179])
def test_honest_scores_are_rarely_called_detected(others: int) -> None:
    p_values = [
        found(drawn(60, 0.0, 2 * seed), drawn(others, 0.0, 2 * seed + 1)).p_value
        for seed in range(300)
    ]
    for level in (0.05, 0.01):
        assert np.mean(np.array(p_values) < level) <= level + 3 * np.sqrt(level / 300)


def test_patients_with_many_images_do_not_raise_false_alarms() -> None:
    p_values = []
    for seed in range(400):
        rng = np.random.default_rng(seed)
        sets = []
        for number in (40, 20):
            sizes = np.ceil(rng.lognormal(1, 1.2, number)).astype(int)
            patients = np.repeat(np.arange(number), sizes)
            # Images of a patient are nearly alike.
            scores = rng.normal(size=number)[patients] + 0.1 * rng.normal(size=len(patients))
            sets.append(sample(scores, patients))
        separated = separation(*sets, seed=0, num_draws=2)
        assert separated is not None
        p_values.append(separated.p_value)
    for level in (0.05, 0.01):
        assert np.mean(np.array(p_values) < level) <= level + 3 * np.sqrt(level / 400)


def test_few_patients_say_nothing_and_wrong_scores_are_named() -> None:
    assert separation(drawn(9), drawn(50), seed=0) is None
    assert separation(sample(np.arange(50.0), np.arange(50) // 10), drawn(50), seed=0) is None
    with pytest.raises(ValueError, match="scores must be finite"):
        sample(np.array([1.0, np.nan]))
    with pytest.raises(ValueError, match="patients must be one of each score"):
        sample(np.zeros(3), np.zeros(2, np.int64))


def test_true_positives_at_a_rate_of_false_ones() -> None:
    others = np.arange(100.0)
    # One false alarm is allowed: the threshold is the second largest of the others.
    assert true_positive_rate(np.array([98.0, 98.5, 99.5, 0.0]), others, 0.01) == 0.5
    assert true_positive_rate(others, others, 0.01) == 0.01
