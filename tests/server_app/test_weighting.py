from fractions import Fraction

import numpy as np
import pytest

from server_app.weighting import Weighting, capped, weighted_median


def test_no_count_is_more_than_its_share_and_small_ones_stay() -> None:
    generator = np.random.default_rng(5)
    for _ in range(300):
        counts = [int(count) for count in 10 ** generator.uniform(0, 8, generator.integers(3, 9))]
        share = float(generator.uniform(0.05, 1))
        found = capped(counts, Fraction(share))
        most = max(share, 1 / len(counts))
        assert max(found) <= most * sum(found) * (1 + 1e-9) or max(found) == 1
        limit = max(found)
        assert found == [min(count, limit) for count in counts]
        if limit < max(counts):  # and no lower than it must be
            rest = [min(count, limit + 1) for count in counts]
            assert max(rest) > Fraction(most) * sum(rest) * Fraction(1 - 1e-9)


@pytest.mark.parametrize(
    ("counts", "share", "expected"),
    [
        ([100, 200, 10**8], 0.5, [100, 200, 300]),
        ([10**8, 10**8, 100, 300], 0.4, [800, 800, 100, 300]),
        ([100, 200, 10**8], 0.1, [100, 100, 100]),  # equal shares are the least that there is
        ([1, 1, 9], 1 / 3, [1, 1, 1]),
        ([5, 10**8], 0.5, [5, 10**8]),  # of two, one has half or more in any case
        ([5, 6, 7], 0.5, [5, 6, 7]),
        ([1, 2, 10**8], 1.0, [1, 2, 10**8]),
    ],
)
def test_shares_are_capped(counts: list[int], share: float, expected: list[int]) -> None:
    assert Weighting(max_share=share).weights(counts) == expected
    assert Weighting(max_share=share).weights(counts[::-1]) == expected[::-1]
    assert Weighting().weights(counts) == counts


def test_share_of_any_size_is_taken_as_it_was_written() -> None:
    for share, kept in ((0.1, 9), (0.3, 3), (0.5, 1), (1.0, 0)):
        assert Weighting(max_share=share).most_capped == kept
    assert Weighting(max_share=1e-9).weights([5, 6, 7]) == [5, 5, 5]


def test_weighted_median_is_that_of_as_many_equal_values() -> None:
    generator = np.random.default_rng(6)
    for _ in range(200):
        weights = generator.integers(1, 6, generator.integers(1, 7)).tolist()
        values = generator.standard_normal(len(weights)).tolist()
        weighted = [*zip(weights, values, strict=True)]
        assert weighted_median(weighted) == np.median(np.repeat(values, weights))
        assert weighted_median(weighted[::-1]) == weighted_median(weighted)


@pytest.mark.parametrize("weighting", [Weighting(max_share=0.5), Weighting(by_images=False)])
@pytest.mark.parametrize("claim", [1, 10**8])
@pytest.mark.parametrize("loss", [0.0, 1e14])
def test_no_client_alone_moves_a_loss_out_of_the_range_of_the_others(
    weighting: Weighting, claim: int, loss: float
) -> None:
    honest = [(100, 0.08), (150, 0.09), (300, 0.1)]
    found = weighting.combine([*honest, (claim, loss)])
    assert 0.08 <= found <= 0.1
    assert weighting.describe([*honest, (claim, loss)]).startswith(f"{found:.4f} (median of 4 ")
    # The one whose counts are known believes them.
    assert Weighting().combine(honest) == pytest.approx((8 + 13.5 + 30) / 550, rel=1e-12)
    assert weighting.combine(honest[:1]) == 0.08
