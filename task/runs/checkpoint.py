"""Weights on disk: safetensors with configuration, round and a checksum in their metadata."""

import hashlib
import json
import os
import re
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from task.config import Config
from task.files import atomic_path

# The entry of the metadata that holds `checksum`; files of others have none.
CHECKSUM = "checksum"


def save_weights(
    path: Path, weights: Mapping[str, torch.Tensor], metadata: Mapping[str, str]
) -> None:
    """Write tensors and metadata to a safetensors file, atomically.

    Raises:
        OSError: it cannot be written.
    """
    with atomic_path(path) as aside:
        write_weights(aside, weights, metadata)


def write_weights(
    path: Path, weights: Mapping[str, torch.Tensor], metadata: Mapping[str, str]
) -> None:
    """Write tensors and metadata to a safetensors file in place, as part of something larger.

    Raises:
        OSError: it cannot be written.
    """
    contiguous = {name: tensor.detach().cpu().contiguous() for name, tensor in weights.items()}
    try:
        save_file(contiguous, path, {**metadata, CHECKSUM: checksum(contiguous, metadata)})
    except SafetensorError as error:
        # It says what the system said in words alone.
        if (number := re.search(r"os error (\d+)", str(error))) is None:
            raise
        code = int(number[1])
        raise OSError(code, os.strerror(code), str(path)) from error


def join_groups(
    weights: Mapping[str, torch.Tensor], groups: Mapping[str, Mapping[str, torch.Tensor]]
) -> dict[str, torch.Tensor]:
    """Join weights and further groups of tensors to be one file."""
    # No name of a weight holds a slash.
    beside = {f"{group}/{n}": t for group, tensors in groups.items() for n, t in tensors.items()}
    return {**weights, **beside}


def split_groups(
    tensors: Mapping[str, torch.Tensor],
) -> tuple[dict[str, torch.Tensor], dict[str, dict[str, torch.Tensor]]]:
    """Split the tensors of a file into weights and groups; see `join_groups`."""
    groups: dict[str, dict[str, torch.Tensor]] = {"": {}}
    for name, tensor in tensors.items():
        group, _, own_name = name.rpartition("/")
        groups.setdefault(group, {})[own_name] = tensor
    weights = groups.pop("")
    return weights, groups


def checksum(weights: Mapping[str, torch.Tensor], metadata: Mapping[str, str]) -> str:
    """Return the SHA-256 of contiguous tensors on the CPU, with their names, and of metadata."""
    digest = hashlib.sha256(json.dumps(dict(metadata), sort_keys=True).encode())
    for name, tensor in sorted(weights.items()):
        digest.update(f"{name}\0{tensor.dtype}\0{tuple(tensor.shape)}\0".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def weights_metadata(config: Config, server_round: int) -> dict[str, str]:
    """Describe weights by the configuration and the round that they are of."""
    described = json.dumps(config.model_dump())
    return {"round": str(server_round), "config": described}


def load_weights(path: Path) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """Read the tensors and the metadata of a safetensors file.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is not a safetensors file, or a damaged one.
    """
    try:
        with safe_open(path, framework="pt") as file:
            weights = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            metadata = dict(file.metadata() or {})
    except SafetensorError as error:
        raise ValueError(f"{path} is not a readable safetensors file: {error}") from error
    told = metadata.pop(CHECKSUM, None)
    if told is not None and told != checksum(weights, metadata):
        raise ValueError(f"{path} is damaged: its checksum is not that of what it holds")
    return weights, metadata
