import numpy as np
import pytest

from task.protocol.quantization import BLOCK, STEPS, BlockQuantizer

SIZES = (1500, 7, 1)


def values(seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    # Layers of very different magnitude, and one value alone.
    return np.concatenate([rng.normal(0, 0.03, 1500), rng.normal(1, 0.1, 7), [-2.0]]).astype("f4")


@pytest.mark.parametrize("bits", [8, 4])
def test_mean_over_draws_is_the_value_and_no_draw_is_a_step_away(bits: int) -> None:
    quantizer, given = BlockQuantizer(SIZES, bits), values()
    ends = np.cumsum([BLOCK, BLOCK, 1500 - 2 * BLOCK, 7, 1])
    blocks = np.split(given, ends[:-1])
    step = np.concatenate([np.full(len(b), np.abs(b).max() / STEPS[bits]) for b in blocks])
    rng, total = np.random.default_rng(1), np.zeros(len(given))
    for _ in range(10_000):
        drawn = quantizer.decode(quantizer.encode(given, rng))
        assert (np.abs(drawn - given) <= step * (1 + 1e-5)).all()
        total += drawn
    # The variance of a draw is at most a quarter of a squared step: five standard errors.
    assert (np.abs(total / 10_000 - given) <= 5 * 0.5 * step / 100 + 1e-7).all()


@pytest.mark.parametrize(("bits", "times_smaller"), [(8, 3.9), (4, 7.7)])
def test_bytes_are_as_few_as_said_and_equal_for_equal_draws(
    bits: int, times_smaller: float
) -> None:
    sizes = (64 * 64 * 9, 64, 64 * 128 * 9)
    quantizer = BlockQuantizer(sizes, bits)
    given = np.random.default_rng(0).normal(size=sum(sizes)).astype("f4")
    encoded, again = (quantizer.encode(given, np.random.default_rng(5)) for _ in range(2))
    assert encoded.dtype == np.uint8 and len(encoded) == quantizer.num_bytes
    assert given.nbytes / encoded.nbytes > times_smaller
    assert np.array_equal(encoded, again)
    other = quantizer.encode(given, np.random.default_rng(6))
    assert not np.array_equal(encoded, other)


@pytest.mark.parametrize("bits", [8, 4])
def test_zeros_extremes_and_odd_numbers_of_values_come_back(bits: int) -> None:
    rng = np.random.default_rng(0)
    zeros = BlockQuantizer((3,), bits)
    assert zeros.decode(zeros.encode(np.zeros(3, "f4"), rng)).tolist() == [0, 0, 0]
    tiny = np.full(3, 1e-44, "f4")
    assert np.isfinite(zeros.decode(zeros.encode(tiny, rng))).all()
    steps = STEPS[bits]
    whole = np.arange(-steps, steps + 1, dtype="f4") * 0.25
    exact = BlockQuantizer((len(whole),), bits)
    assert exact.decode(exact.encode(whole, rng)).tolist() == whole.tolist()


def test_what_cannot_be_is_refused() -> None:
    with pytest.raises(ValueError, match="bits must be one of 8, 4, got 3"):
        BlockQuantizer((3,), 3)
    with pytest.raises(ValueError, match="sizes must be all > 0"):
        BlockQuantizer((3, 0), 8)
    quantizer = BlockQuantizer((3,), 8)
    good = quantizer.encode(np.ones(3, "f4"), np.random.default_rng(0))
    for wrong in (good[:-1], good.astype(np.int8), good[None]):
        with pytest.raises(ValueError, match=r"encoded values must be uint8 of shape \(7,\)"):
            quantizer.decode(wrong)
    for spoilt in (np.nan, np.inf, -np.inf):
        values = np.array([spoilt, 1, 2], "f4")
        back = quantizer.decode(quantizer.encode(values, np.random.default_rng(0)))
        assert not np.isfinite(back).any()
    # What is no number stays none, for those who check what clients send.
    for scale in (np.nan, np.inf):
        spoiled = np.concatenate([np.array([scale], "<f4").view(np.uint8), good[4:]])
        assert not np.isfinite(quantizer.decode(spoiled)).any()
