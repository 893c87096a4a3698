import math

import dp_accounting
import pytest
from dp_accounting import pld, rdp
from scipy.optimize import brentq
from scipy.stats import norm

from task.privacy.accounting import ORDERS, Spending, epsilon_of, noise_multiplier_for


def gaussian_epsilon(noise_multiplier: float, delta: float) -> float:
    """Invert the exact delta of one Gaussian step: Balle and Wang 2018 (arXiv 1805.06530)."""

    def excess(epsilon: float) -> float:
        half, shift = 1 / (2 * noise_multiplier), epsilon * noise_multiplier
        beyond = math.exp(epsilon) * norm.cdf(-half - shift)
        return float(norm.cdf(half - shift) - beyond) - delta

    return float(brentq(excess, 0, 60))


@pytest.mark.parametrize(("noise", "steps"), [(1.0, 1), (4.9, 100), (2.0, 9)])
def test_steps_on_all_patients_cost_what_the_closed_form_says(noise: float, steps: int) -> None:
    exact = gaussian_epsilon(noise / math.sqrt(steps), 1e-4)
    found = epsilon_of([Spending(noise, 1.0, steps)], 1e-4)
    assert exact <= found < exact * 1.001 + 1e-3


def test_sampled_steps_cost_what_dp_accounting_says() -> None:
    spendings = [Spending(2.1, 0.16, 300), Spending(1.5, 0.05, 40), Spending(2.1, 0.16, 25)]
    accountant = pld.PLDAccountant()
    for each in spendings:
        gaussian = dp_accounting.GaussianDpEvent(each.noise_multiplier)
        accountant.compose(
            dp_accounting.PoissonSampledDpEvent(each.sampling_rate, gaussian), each.steps
        )
    found = epsilon_of(spendings, 1e-4)
    assert found == pytest.approx(accountant.get_epsilon(1e-4), rel=1e-3)
    assert epsilon_of(reversed(spendings), 1e-4) == found
    assert epsilon_of(spendings[:2], 1e-4) < found < epsilon_of(spendings, 1e-5)


def test_calibrated_noise_costs_no_more_than_was_asked() -> None:
    # Of the table of facts in docs/privacy.md: 400 patients, 64 a step, 100 epochs.
    noise = noise_multiplier_for(10.0, 1e-4, 0.16, 625)
    assert noise == pytest.approx(2.1, abs=0.02)
    accountant = rdp.RdpAccountant(ORDERS)
    gaussian = dp_accounting.GaussianDpEvent(noise)
    accountant.compose(dp_accounting.PoissonSampledDpEvent(0.16, gaussian), 625)
    assert accountant.get_epsilon(1e-4) <= 10
    assert 8.5 < epsilon_of([Spending(noise, 0.16, 625)], 1e-4) <= 10


def test_no_steps_are_free_and_no_noise_is_no_privacy() -> None:
    assert epsilon_of([], 1e-5) == epsilon_of([Spending(1.0, 0.5, 0)], 1e-5) == 0
    assert epsilon_of([Spending(0.0, 0.5, 1)], 1e-5) == math.inf
    # Found without composing them exactly, which would take any memory.
    for little in (Spending(1e-300, 0.5, 1), Spending(0.05, 0.5, 100), Spending(1.0, 0.5, 10**7)):
        assert epsilon_of([little], 1e-5) == math.inf


@pytest.mark.parametrize(
    ("values", "name"),
    [((-1.0, 0.5, 1), "noise_multiplier"), ((1.0, 0.0, 1), "sampling_rate"), ((1, 1, -1), "steps")],
)
def test_impossible_steps_are_named(values: tuple[float, float, int], name: str) -> None:
    with pytest.raises(ValueError, match=f"{name} must be"):
        Spending(*values)


def test_impossible_budgets_are_named() -> None:
    with pytest.raises(ValueError, match="delta must be between 0 and 1"):
        epsilon_of([], 1.0)
    with pytest.raises(ValueError, match="epsilon must be"):
        noise_multiplier_for(0.0, 1e-5, 0.1, 10)
    with pytest.raises(ValueError, match="epsilon must be larger for 100,000 steps"):
        noise_multiplier_for(1e-3, 1e-9, 1.0, 100_000)
