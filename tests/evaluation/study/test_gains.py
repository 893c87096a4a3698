import numpy as np
import pytest
import torch
from torchmetrics.functional.classification import multiclass_auroc, multiclass_recall

from task.evaluation.study.gains import (
    gain_of,
    holm,
    macro_auc,
    patient_weights,
    resampled_accuracy,
    seed_weights,
    sensitivities,
)

RNG = np.random.default_rng(0)
LABELS = RNG.integers(0, 3, 60)
# Rounded, so that some are equal.
SAID = RNG.dirichlet(np.ones(3), 60).round(1)


def test_figures_are_those_of_torchmetrics_on_the_images_as_often_as_they_are_drawn() -> None:
    weights = RNG.integers(0, 4, (5, 60)).astype(float)
    areas, accuracies = (each(SAID, LABELS, weights) for each in (macro_auc, resampled_accuracy))
    for row, area, accuracy in zip(weights.astype(int), areas, accuracies, strict=True):
        said = torch.from_numpy(SAID.repeat(row, 0))
        labels = torch.from_numpy(LABELS.repeat(row))
        assert area == pytest.approx(float(multiclass_auroc(said, labels, 3)), abs=1e-6)
        assert accuracy == pytest.approx(float(multiclass_recall(said, labels, 3)), abs=1e-6)


def test_class_of_which_nothing_is_drawn_counts_in_no_mean() -> None:
    weights = np.stack([(LABELS != 2).astype(float), np.zeros(60)])
    found = sensitivities(SAID, LABELS, weights)
    assert np.isnan(found[2]).all() and np.isfinite(found[:2, 0]).all()
    assert resampled_accuracy(SAID, LABELS, weights)[0] == pytest.approx(found[:2, 0].mean())
    assert np.isnan(macro_auc(SAID, LABELS, weights)[1])


def test_patients_are_drawn_whole_and_the_first_row_is_all_of_them() -> None:
    groups = np.array([4, 4, 9, 2, 9, 9])
    weights = patient_weights(groups, 2000, np.random.default_rng(1))
    assert (weights[0] == 1).all()
    assert (weights[:, 0] == weights[:, 1]).all() and (weights[:, 2] == weights[:, 5]).all()
    assert (weights[:, [0, 2, 3]].sum(1) == 3).all()
    np.testing.assert_allclose(weights.mean(0), 1, atol=0.06)


def test_seeds_are_drawn_as_a_mean() -> None:
    weights = seed_weights(3, 100, np.random.default_rng(1))
    np.testing.assert_allclose(weights.sum(1), 1)
    assert (weights[0] == 1 / 3).all() and (weights[1:] == 1).any()


def test_gain_has_the_interval_and_the_p_value_of_its_draws() -> None:
    draws = np.random.default_rng(2).normal(0.02, 0.01, 20001)
    gain = gain_of(np.r_[0.52, 0.5 + draws], np.full(20002, 0.5))
    assert gain.value == pytest.approx(0.02)
    assert (gain.low, gain.high) == pytest.approx((0.02 - 0.0196, 0.02 + 0.0196), abs=5e-4)
    assert gain.p_value == pytest.approx(0.0455, abs=0.01)
    assert gain_of(np.full(9, 0.5), np.full(9, 0.5)).p_value == 1
    with pytest.raises(ValueError, match="the bootstrap must be a draw of patients with a figure"):
        gain_of(np.full(9, np.nan), np.full(9, 0.5))


def test_holm_is_that_of_its_definition() -> None:
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.5, 0.9]) == [1.0, 1.0]
    assert holm([]) == []
