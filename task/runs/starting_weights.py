"""Earlier weights that a training starts from: `train.start_from`."""

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from task.generators.base import Generator
from task.runs.checkpoint import load_weights, split_groups
from task.runs.layout import starting_file, weights_file

# Entries that do not fit and are named in an error.
NUM_NAMED = 5


def load_starting_weights(generator: Generator, start_from: str) -> dict[str, Any]:
    """Give a new generator the weights of an earlier run, but for what stays at a client.

    Optimizers and what clients keep begin as in any other run.

    Args:
        generator: of any family; on the meta device, where nothing of it may be frozen, it is only
            checked whether they fit.
        start_from: the folder of a finished run, or a safetensors file of weights, such as its
            model.safetensors or one of its checkpoints.

    Returns:
        What is to be told of them: "file", "sha256" and, where the file says so, "round".

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is damaged, or weights of another model, or on top of others that are frozen.
    """
    file = starting_file(start_from)
    if not file.is_file():
        raise FileNotFoundError(
            f"train.start_from must be the folder of a finished run or a file of its weights, got "
            f"{start_from}: there is no {file}"
        )
    tensors, metadata = load_weights(file)
    found, state = split_groups(tensors)[0], generator.state_dict()
    weights, expected = (_trained(generator, each) for each in (found, state))
    misfits = _misfits(weights, expected)
    if misfits:
        more = f", and {len(misfits) - NUM_NAMED} more" if len(misfits) > NUM_NAMED else ""
        raise ValueError(
            f"train.start_from: {file} holds weights of another model than this run's "
            f"({'; '.join(misfits[:NUM_NAMED])}{more}); give the same sections model and "
            "diffusion and the same data.classes, channels and image_size, "
            "or leave train.start_from out"
        )
    for name in found.keys() & state.keys() if generator.frozen else ():
        if name.startswith(tuple(generator.frozen)) and not torch.equal(found[name], state[name]):
            raise ValueError(
                f"train.start_from: {file} was trained on top of other weights than those that "
                f"this run freezes ({name}); give the file that the earlier run was given"
            )
    generator.load_state_dict(state | weights, assign=next(generator.parameters()).is_meta)
    told = {"file": _name(file), "sha256": hashlib.sha256(file.read_bytes()).hexdigest()}
    return told | ({"round": int(metadata["round"])} if "round" in metadata else {})


def _trained(generator: Generator, weights: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Leave out what clients do not take from the server: counters, and what is frozen."""
    return {
        name: tensor
        for name, tensor in generator.shared(weights).items()
        if tensor.is_floating_point() and not name.startswith(tuple(generator.frozen))
    }


def _misfits(
    weights: Mapping[str, torch.Tensor], expected: Mapping[str, torch.Tensor]
) -> list[str]:
    """Name the entries that are missing, unknown or of another shape or type."""
    found = []
    for name in [*expected, *(name for name in weights if name not in expected)]:
        there, here = (
            "none" if name not in state else f"{tuple(state[name].shape)}"
            for state in (weights, expected)
        )
        if there != here:
            found.append(f"{name}: {there} there, {here} here")
        elif weights[name].dtype != expected[name].dtype:
            found.append(f"{name}: {weights[name].dtype} there, {expected[name].dtype} here")
    return found


def _name(file: Path) -> str:
    """Name a file without the place where it lies: by the run, where it is its model."""
    return file.parent.name if file == weights_file(file.parent) else file.name


def describe_starting_weights(told: Mapping[str, Any]) -> str:
    """Say in a few words what a run has started from."""
    after = f" after round {told['round']}" if "round" in told else ""
    return f"the weights of {told['file']}{after} (SHA-256 {told['sha256'][:16]}...)"
