import numpy as np
import pytest
import torch
from torch import nn

from task.protocol.wire import FailureCode, Key, WeightLayout, from_npy, to_npy


class Model(nn.Module):
    """Parameters of every number of dimensions, from 0 to 4."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        for i, shape in enumerate([(), (5,), (3, 4), (2, 3, 3, 3)]):
            self.register_parameter(f"w{i}", nn.Parameter(torch.randn(shape, generator=generator)))


def test_pack_is_torchs_own_vector_of_parameters() -> None:
    model = Model()
    layout = WeightLayout.of(model)
    packed = layout.pack(model.state_dict())
    expected = nn.utils.parameters_to_vector(model.parameters()).detach().numpy()
    assert packed.dtype == np.float32 and packed.shape == (layout.size,) == (72,)
    assert np.array_equal(packed, expected)


def test_unpack_gives_back_what_was_packed_to_the_bit() -> None:
    state = Model().state_dict()
    layout = WeightLayout.of(Model())
    unpacked = layout.unpack(layout.pack(state))
    assert list(unpacked) == list(state)
    assert all(unpacked[name].dtype == torch.float32 for name in state)
    assert all(unpacked[name].shape == state[name].shape for name in state)
    assert all(torch.equal(unpacked[name], state[name]) for name in state)


def test_layout_is_derived_from_names_and_shapes_alone() -> None:
    one, other = Model(), Model()
    nn.init.zeros_(other.w1)
    assert WeightLayout.of(one) == WeightLayout.of(other)
    assert WeightLayout.of(one) != WeightLayout.of(nn.Linear(5, 3))


def test_pack_goes_by_name_and_not_by_the_order_of_the_mapping() -> None:
    state = Model().state_dict()
    layout = WeightLayout.of(Model())
    reordered = dict(reversed(state.items()))
    assert np.array_equal(layout.pack(reordered), layout.pack(state))


def test_pack_does_not_depend_on_the_memory_format() -> None:
    model = Model()
    layout = WeightLayout.of(model)
    expected = layout.pack(model.state_dict())
    model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    assert not model.w3.is_contiguous()
    assert np.array_equal(layout.pack(model.state_dict()), expected)


def test_float16_halves_the_bytes_and_rounds_to_the_nearest() -> None:
    state = Model().state_dict()
    layout = WeightLayout.of(Model())
    packed = layout.pack(state, "float16")
    assert packed.dtype == np.float16
    assert 2 * packed.nbytes == layout.pack(state).nbytes
    unpacked = layout.unpack(packed)
    for name, tensor in state.items():
        torch.testing.assert_close(unpacked[name], tensor, rtol=2**-11, atol=0)
        assert unpacked[name].dtype == torch.float32


def test_packed_and_unpacked_weights_share_no_memory_with_their_source() -> None:
    # One tensor is the case in which nothing has to be joined or cut.
    model = nn.Linear(3, 2, bias=False)
    layout = WeightLayout.of(model)
    packed = layout.pack(model.state_dict())
    unpacked = layout.unpack(packed)
    before = packed.copy()
    nn.init.zeros_(model.weight)
    assert np.array_equal(packed, before)
    packed[:] = 7
    assert torch.equal(unpacked["weight"].flatten(), torch.from_numpy(before))


def test_unpack_reads_an_array_that_must_not_be_written() -> None:
    layout = WeightLayout.of(nn.Linear(3, 2, bias=False))
    packed = np.frombuffer(np.arange(6, dtype=np.float32).tobytes(), np.float32)
    assert not packed.flags.writeable
    unpacked = layout.unpack(packed)["weight"]
    unpacked += 1
    assert unpacked.flatten().tolist() == [1, 2, 3, 4, 5, 6]


@pytest.mark.parametrize("shape", [(71,), (73,), (0,), (72, 1), (8, 9), ()])
def test_unpack_refuses_other_shapes(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"must have shape \(72,\), got \("):
        WeightLayout.of(Model()).unpack(np.zeros(shape, np.float32))


@pytest.mark.parametrize("dtype", [np.float32, np.float16])
@pytest.mark.parametrize("size", [0, 1, 1000])
def test_bytes_are_those_of_flowers_own_array(dtype: type, size: int) -> None:
    from flwr.app import Array

    array = np.random.default_rng(0).standard_normal(size).astype(dtype)
    flowers = Array(array)
    assert to_npy(array) == flowers.data
    found = from_npy(flowers.data)
    assert found.dtype == dtype and np.array_equal(found, array)
    assert not found.flags.writeable  # it is the bytes themselves


@pytest.mark.parametrize("dtype", ["|O", "[('a', '|O')]"])
def test_bytes_are_never_taken_for_objects(dtype: str) -> None:
    descr = dtype if dtype.startswith("[") else f"'{dtype}'"
    header = f"{{'descr': {descr}, 'fortran_order': False, 'shape': (4,), }}".ljust(117) + "\n"
    data = b"\x93NUMPY\x01\x00\x76\x00" + header.encode() + b"\1" * 80
    with pytest.raises(ValueError, match="must hold numbers"):
        from_npy(data)


def test_counters_and_local_tensors_stay_at_home_as_in_a_new_model() -> None:
    model = nn.BatchNorm2d(3)
    layout = WeightLayout.of(model, {"running_var"})
    assert list(layout.shapes) == ["weight", "bias", "running_mean"] and layout.size == 9
    model(torch.randn(2, 3, 4, 4))  # counts, and moves all three
    state = layout.unpack(layout.pack(model.state_dict()))
    assert state["running_mean"].tolist() == model.running_mean.tolist()
    assert state["num_batches_tracked"].item() == 0 and state["running_var"].tolist() == [1] * 3
    model.load_state_dict(state)
    model(torch.randn(2, 3, 4, 4))
    again = layout.unpack(layout.pack(model.state_dict()))
    assert again["num_batches_tracked"].item() == 0  # memory of its own


def test_local_names_without_a_tensor_are_refused() -> None:
    with pytest.raises(ValueError, match=r"staying must be beginnings of names .*, got 'latent'"):
        WeightLayout.of(nn.Linear(2, 2), {"latent"})


def test_half_precision_models_are_refused() -> None:
    with pytest.raises(TypeError, match=r"weight must be float32.*float16"):
        WeightLayout.of(nn.Linear(2, 2).half())


def test_names_on_the_wire_are_flowers_and_distinct() -> None:
    assert (Key.ARRAYS, Key.CONFIG, Key.METRICS) == ("arrays", "config", "metrics")
    assert (Key.NUM_EXAMPLES, Key.SERVER_ROUND) == ("num-examples", "server-round")
    assert (Key.PARTITION_ID, Key.NUM_PARTITIONS) == ("partition-id", "num-partitions")
    assert len({*Key}) == len(Key.__members__)


def test_failure_codes_are_none_of_flowers_own() -> None:
    from flwr.common.constant import ErrorCode

    flowers = {value for value in vars(ErrorCode).values() if isinstance(value, int)}
    assert len(flowers) > 5
    assert flowers.isdisjoint(FailureCode)
