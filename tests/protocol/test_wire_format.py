import numpy as np
import pytest
import torch

from task.protocol.wire import WeightLayout
from task.protocol.wire_format import float_dtype, sent_weights, wire_format


@pytest.fixture
def layout() -> WeightLayout:
    return WeightLayout.of(torch.nn.Linear(30, 40))


@pytest.mark.parametrize(
    ("dtype", "down", "up"),
    [("float32", 0, 0), ("float16", 1e-3, 1e-3), ("int8", 0.01, 1e-4), ("int4", 0.01, 2e-3)],
)
def test_weights_go_there_and_updates_come_back(
    dtype: str, down: float, up: float, layout: WeightLayout
) -> None:
    rng = np.random.default_rng(0)
    weights = rng.normal(0, 1, layout.size).astype("f4")
    wire = wire_format(layout, dtype)
    travelling = wire.encode_weights(weights, rng)
    received = wire.decode_weights(travelling)
    assert np.array_equal(sent_weights(layout, travelling), received)
    assert np.abs(received - weights).max() <= down * np.abs(weights).max()
    # An update is a hundred times smaller than weights, and so is what rounding takes off it.
    local = received.astype("f4") + rng.normal(0, 0.01, layout.size).astype("f4")
    back = wire.decode_local(wire.encode_local(local, received, rng), received)
    assert np.abs(back - local).max() <= up * np.abs(weights).max() + 1e-7
    assert wire.is_lossy == dtype.startswith("int")
    assert float_dtype(dtype) == ("float16" if wire.is_lossy else dtype)


def test_what_does_not_fit_is_refused(layout: WeightLayout) -> None:
    with pytest.raises(ValueError, match=r"federation\.wire_dtype must be one of float32"):
        wire_format(layout, "int2")
    for dtype in ("float32", "int8"):
        with pytest.raises(ValueError, match=r"must be .* of shape"):
            wire_format(layout, dtype).decode_weights(np.zeros(3, "f4"))
    with pytest.raises(ValueError, match="weights must be float32 or float16"):
        sent_weights(layout, np.zeros(layout.size, "i8"))
