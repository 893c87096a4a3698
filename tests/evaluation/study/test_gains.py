import numpy as np
import pytest
import torch
from scipy.stats import ttest_1samp, ttest_ind
from torchmetrics.functional.classification import multiclass_auroc, multiclass_recall

from task.evaluation.study.gains import (
    Gain,
    gain_of,
    holm,
    macro_auc,
    patient_weights,
    resampled_accuracy,
    sensitivities,
)

RNG = np.random.default_rng(0)
LABELS = RNG.integers(0, 3, 60)
# Rounded, so that some are equal.
SAID = RNG.dirichlet(np.ones(3), 60).round(1)


def test_figures_are_those_of_torchmetrics_on_the_images_as_often_as_they_are_drawn() -> None:
    weights = RNG.integers(0, 4, (60, 5)).astype(np.float32)
    areas, accuracies = (each(SAID, LABELS, weights) for each in (macro_auc, resampled_accuracy))
    for row, area, accuracy in zip(weights.T.astype(int), areas, accuracies, strict=True):
        said = torch.from_numpy(SAID.repeat(row, 0))
        labels = torch.from_numpy(LABELS.repeat(row))
        assert area == pytest.approx(float(multiclass_auroc(said, labels, 3)), abs=1e-6)
        assert accuracy == pytest.approx(float(multiclass_recall(said, labels, 3)), abs=1e-6)


def test_class_of_which_nothing_is_drawn_counts_in_no_mean() -> None:
    weights = np.stack([LABELS != 2, np.zeros(60)], 1).astype(np.float32)
    found = sensitivities(SAID, LABELS, weights)
    assert np.isnan(found[2]).all() and np.isfinite(found[:2, 0]).all()
    assert resampled_accuracy(SAID, LABELS, weights)[0] == pytest.approx(found[:2, 0].mean())
    assert np.isnan(macro_auc(SAID, LABELS, weights)[1])


def test_patients_are_drawn_whole_and_the_first_draw_is_all_of_them() -> None:
    groups = np.array([4, 4, 9, 2, 9, 9])
    weights = patient_weights(groups, 2000, np.random.default_rng(1)).T
    assert (weights[0] == 1).all()
    assert (weights[:, 0] == weights[:, 1]).all() and (weights[:, 2] == weights[:, 5]).all()
    assert (weights[:, [0, 2, 3]].sum(1) == 3).all()
    np.testing.assert_allclose(weights.mean(0), 1, atol=0.06)


def told(ours: np.ndarray, theirs: np.ndarray) -> Gain:
    return gain_of(ours, theirs, np.random.default_rng(3))


def test_gain_has_the_interval_and_the_p_value_of_its_draws() -> None:
    draws = np.random.default_rng(2).normal(0.02, 0.01, 20001)
    gain = told(np.r_[0.52, 0.5 + draws][None], np.full((1, 20002), 0.5))
    assert gain.value == pytest.approx(0.02)
    assert (gain.low, gain.high) == pytest.approx((0.02 - 0.0196, 0.02 + 0.0196), abs=5e-4)
    assert gain.p_value == pytest.approx(0.0455, abs=0.01)
    assert told(np.full((2, 9), 0.5), np.full((2, 9), 0.5)).p_value == 1
    with pytest.raises(ValueError, match="the bootstrap must be a draw of patients with a figure"):
        told(np.full((1, 9), np.nan), np.full((1, 9), 0.5))


def test_spread_over_seeds_alone_is_that_of_students_t() -> None:
    by_seed = np.array([0.01, 0.03, 0.02])
    ours = np.repeat(0.5 + by_seed[:, None], 50001, axis=1)
    gain = told(ours, np.full((3, 50001), 0.5))
    # The 97.5% quantile of t with two degrees of freedom is 4.303.
    error = 4.303 * 0.01 / 3**0.5
    assert (gain.low, gain.high) == pytest.approx((0.02 - error, 0.02 + error), rel=0.05)
    assert gain.p_value == pytest.approx(ttest_1samp(by_seed, 0).pvalue, abs=0.005)


def test_figures_of_other_seeds_are_compared_by_welch() -> None:
    rng = np.random.default_rng(5)
    ours, theirs = rng.normal(0.55, 0.02, (4, 1)), rng.normal(0.5, 0.01, (3, 1))
    expected = ttest_ind(ours[:, 0], theirs[:, 0], equal_var=False)
    repeated = [np.repeat(each, 100001, axis=1) for each in (ours, theirs)]
    gain = gain_of(*repeated, np.random.default_rng(3), paired=False)
    interval = expected.confidence_interval()
    assert (gain.low, gain.high) == pytest.approx((interval.low, interval.high), rel=0.05)
    assert gain.p_value == pytest.approx(expected.pvalue, rel=0.1)
    # A single one spreads as the others, of whose distribution it is then a draw more.
    one = gain_of(repeated[0][:1], repeated[1], np.random.default_rng(3), paired=False)
    error = 4.303 * theirs.std(ddof=1) * (1 + 1 / 3) ** 0.5
    assert (one.high - one.low) / 2 == pytest.approx(error, rel=0.05)


def test_nothing_is_found_in_noise_more_often_than_promised() -> None:
    rng = np.random.default_rng(4)
    found = 0
    for _ in range(300):
        of_patients, of_seeds = rng.normal(0, 1), rng.normal(0, 3, (3, 1))
        draws = np.r_[0, rng.normal(0, 1, 500)]
        ours = of_patients + of_seeds + draws[None]
        found += told(ours, np.zeros((3, 501))).p_value < 0.05
    assert found <= 0.08 * 300


def test_holm_is_that_of_its_definition() -> None:
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.5, 0.9]) == [1.0, 1.0]
    assert holm([]) == []
