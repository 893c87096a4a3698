from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy
import torch
from torch import Tensor

from task.runs.checkpoint import load_weights, save_weights


def weights() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    kernel = torch.randn(2, 3, 4, 4, generator=generator)
    flat = torch.randn(10, generator=generator)
    first, second = torch.split(flat, [4, 6])
    return {
        "kernel": kernel.to(memory_format=torch.channels_last),
        "scalar": torch.tensor(-0.0),
        "odd": torch.tensor([float("inf"), float("nan"), 1e-45]),
        "first": first,
        "second": second.reshape(2, 3),
        "trained": torch.nn.Parameter(torch.ones(3)),
    }


def same_bits(one: Tensor, other: Tensor) -> bool:
    return one.shape == other.shape and torch.equal(
        one.detach().reshape(-1).view(torch.int32), other.detach().reshape(-1).view(torch.int32)
    )


def test_weights_come_back_to_the_bit_with_their_metadata(tmp_path: Path) -> None:
    file = tmp_path / "round_0001.safetensors"
    save_weights(file, weights(), {"round": "1", "config": '{"a": "ü"}'})
    loaded, metadata = load_weights(file)
    assert metadata == {"round": "1", "config": '{"a": "ü"}'}
    assert set(loaded) == set(weights())
    assert all(same_bits(loaded[name], tensor) for name, tensor in weights().items())
    assert not any(tensor.requires_grad for tensor in loaded.values())


def test_file_is_read_alike_by_the_librarys_own_reader(tmp_path: Path) -> None:
    file = tmp_path / "model.safetensors"
    save_weights(file, weights(), {})
    found = safetensors.numpy.load_file(file)
    for name, tensor in weights().items():
        assert np.array_equal(found[name], tensor.detach().numpy(), equal_nan=True)


def test_weights_without_metadata_load(tmp_path: Path) -> None:
    file = tmp_path / "foreign.safetensors"
    safetensors.numpy.save_file({"a": np.arange(3.0)}, file)
    loaded, metadata = load_weights(file)
    assert metadata == {} and loaded["a"].tolist() == [0, 1, 2]


def test_saving_replaces_the_whole_file(tmp_path: Path) -> None:
    file = tmp_path / "model.safetensors"
    save_weights(file, weights(), {"round": "1"})
    save_weights(file, {"other": torch.zeros(1)}, {"round": "2"})
    loaded, metadata = load_weights(file)
    assert set(loaded) == {"other"} and metadata == {"round": "2"}
    assert [*tmp_path.iterdir()] == [file]


def test_saving_that_fails_leaves_the_file_before(tmp_path: Path) -> None:
    file = tmp_path / "model.safetensors"
    save_weights(file, weights(), {"round": "1"})
    with pytest.raises(TypeError):
        save_weights(file, weights(), {"round": 2})  # type: ignore[dict-item]
    assert load_weights(file)[1] == {"round": "1"}
    assert [*tmp_path.iterdir()] == [file]


@pytest.mark.parametrize("keep", [0, 4, 8, 100, -1])
def test_truncated_file_is_named(tmp_path: Path, keep: int) -> None:
    file = tmp_path / "round_0001.safetensors"
    save_weights(file, weights(), {"round": "1"})
    content = file.read_bytes()
    file.write_bytes(content[:keep])
    with pytest.raises(ValueError, match=r"round_0001\.safetensors is not a readable safetensors"):
        load_weights(file)


def test_every_flipped_bit_is_found(tmp_path: Path) -> None:
    file = tmp_path / "round_0001.safetensors"
    save_weights(file, weights(), {"round": "1", "config": '{"a": 2}'})
    content = file.read_bytes()
    places = {content.index(b'"1"') + 1, content.index(b"kernel") + 2, len(content) - 1}
    places |= {*range(len(content) - 400, len(content), 37)}
    for place in places:
        changed = bytearray(content)
        changed[place] ^= 4
        file.write_bytes(changed)
        with pytest.raises(ValueError, match=r"0001\.safetensors is (damaged|not a readable)"):
            load_weights(file)
    file.write_bytes(content)
    assert load_weights(file)[1] == {"round": "1", "config": '{"a": 2}'}


def test_pickled_file_is_refused(tmp_path: Path) -> None:
    torch.save(weights(), tmp_path / "model.pt")
    with pytest.raises(ValueError, match=r"model\.pt is not a readable safetensors"):
        load_weights(tmp_path / "model.pt")


def test_missing_file_is_said_to_be_missing(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"model\.safetensors"):
        load_weights(tmp_path / "model.safetensors")
