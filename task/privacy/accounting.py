"""How much privacy steps of DP-SGD cost, from dp-accounting.

Two data sets are neighbors where one patient's images are left out of every gradient of the one.
A step draws each patient with probability q (Poisson sampling), and adds Gaussian noise to the sum
of the drawn patients' clipped gradients.

Source: Abadi et al. 2016 (arXiv 1607.00133); Mironov 2017 (arXiv 1702.07476) for RDP; Koskela et
al. 2020 (arXiv 1906.03049) and Doroshenko et al. 2022 (arXiv 2207.04380) for PLD.
"""

import math
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache

from task.checks import require

# Of Renyi divergences: whole numbers, for which Poisson sampling has a closed form.
ORDERS = range(2, 257)
# One step with less costs more than LARGEST_EPSILON of any patient who is drawn for it.
LEAST_NOISE = 0.02
# Beyond it a guarantee says nothing, and counts as none: composing it exactly takes any memory.
LARGEST_EPSILON = 500.0


@dataclass(frozen=True)
class Spending:
    """Steps of DP-SGD of one kind.

    Attributes:
        noise_multiplier: standard deviation of the noise over the clipping norm; 0: no noise.
        sampling_rate: the probability with which each patient is drawn for a step, in (0, 1].
        steps: how many, >= 0.

    Raises:
        ValueError: one is out of range.
    """

    noise_multiplier: float
    sampling_rate: float
    steps: int

    def __post_init__(self) -> None:
        require(
            0 <= self.noise_multiplier < math.inf,
            "noise_multiplier",
            "a number >= 0",
            self.noise_multiplier,
        )
        require(0 < self.sampling_rate <= 1, "sampling_rate", "in (0, 1]", self.sampling_rate)
        require(self.steps >= 0, "steps", ">= 0", self.steps)


def epsilon_of(spendings: Iterable[Spending], delta: float) -> float:
    """Return the epsilon of steps one after another, at a delta; infinity beyond `LARGEST_EPSILON`.

    By privacy loss distributions, rounded up: the bound is a few percent tighter than that of RDP.

    Args:
        spendings: all steps that saw the patient; none cost 0.
        delta: in (0, 1).

    Raises:
        ValueError: `delta` is out of range.
    """
    require(0 < delta < 1, "delta", "between 0 and 1, exclusive", delta)
    return _epsilon_of(tuple(_merged(spendings)), delta)


def noise_multiplier_for(epsilon: float, delta: float, sampling_rate: float, steps: int) -> float:
    """Return the least noise multiplier with which steps cost at most an epsilon.

    By RDP, which is fast at any number of steps; `epsilon_of` then finds slightly less.

    Args:
        epsilon: > 0.
        delta: in (0, 1).
        sampling_rate: in (0, 1].
        steps: > 0.

    Raises:
        ValueError: one is out of range, or no noise is enough.
    """
    name, expected = "privacy.epsilon", f"in (0, {LARGEST_EPSILON:g}]"
    require(0 < epsilon <= LARGEST_EPSILON, name, expected, epsilon)
    require(0 < delta < 1, "delta", "between 0 and 1, exclusive", delta)
    require(steps > 0, "steps", "> 0", steps)
    found = _noise_multiplier_for(epsilon, delta, sampling_rate, steps)
    require(found is not None, name, f"larger for {steps:,} steps, or no noise is enough", epsilon)
    return float(found or 0)


def _merged(spendings: Iterable[Spending]) -> list[Spending]:
    """Join steps of one kind, in an order that does not depend on theirs."""
    steps: Counter[tuple[float, float]] = Counter()
    for each in spendings:
        steps[each.noise_multiplier, each.sampling_rate] += each.steps
    return [Spending(*kind, number) for kind, number in sorted(steps.items()) if number > 0]


@lru_cache(maxsize=256)
def _epsilon_of(spendings: tuple[Spending, ...], delta: float) -> float:
    # Imported here because it takes seconds, which only runs with privacy need.
    import dp_accounting  # type: ignore[import-untyped]
    from dp_accounting import pld, rdp

    if not spendings:
        return 0.0
    if any(each.noise_multiplier < LEAST_NOISE for each in spendings):
        return math.inf
    events = []
    for each in spendings:
        if each.sampling_rate == 1:
            # Together they are one step with less noise, which is exact and takes no composition.
            noise = each.noise_multiplier / math.sqrt(each.steps)
            events.append(dp_accounting.GaussianDpEvent(noise))
        else:
            gaussian = dp_accounting.GaussianDpEvent(each.noise_multiplier)
            sampled = dp_accounting.PoissonSampledDpEvent(each.sampling_rate, gaussian)
            events.append(dp_accounting.SelfComposedDpEvent(sampled, each.steps))
    composed = dp_accounting.ComposedDpEvent(events)
    bound = rdp.RdpAccountant(ORDERS).compose(composed).get_epsilon(delta)
    if not bound <= LARGEST_EPSILON:
        return math.inf
    accountant = pld.PLDAccountant()
    accountant.compose(composed)
    return float(accountant.get_epsilon(delta))


@lru_cache(maxsize=64)
def _noise_multiplier_for(
    epsilon: float, delta: float, sampling_rate: float, steps: int
) -> float | None:
    import dp_accounting
    from dp_accounting import mechanism_calibration, rdp

    def event(noise_multiplier: float) -> dp_accounting.DpEvent:
        gaussian = dp_accounting.GaussianDpEvent(noise_multiplier)
        sampled = dp_accounting.PoissonSampledDpEvent(sampling_rate, gaussian)
        return dp_accounting.SelfComposedDpEvent(sampled, steps)

    try:
        found = dp_accounting.calibrate_dp_mechanism(
            lambda: rdp.RdpAccountant(ORDERS), event, epsilon, delta
        )
    except mechanism_calibration.NoBracketIntervalFoundError:
        return None
    return float(found)
