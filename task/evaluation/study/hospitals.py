"""Whose the images of a study are: the clients that simulations dealt them out to."""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from task.data import Dataset
from task.data.partition import partition_dataset
from task.evaluation.study.study import Hospitals
from task.runs.run import Run


def hospital_of_each(
    generators: Iterable[Path],
    classifiers: Iterable[Path],
    dataset: Dataset,
    parts: tuple[Tensor, Tensor],
    warnings: list[str],
) -> Hospitals | None:
    """Say at which client of a simulation each image is; None where that is not told.

    It is that of the runs as they were trained, whatever is drawn otherwise, and of all that draw;
    runs on the pooled data have no clients.
    """
    drawing, reading = (
        [run for run in map(Run, paths) if run.config.train.mode == "federated"]
        for paths in (generators, classifiers)
    )
    found = [_dealt(run, dataset) for run in [*drawing, *reading]]
    decisive = found[: len(drawing) or None]
    if not decisive:
        return None
    first = decisive[0]
    if first is None or None in decisive:
        warnings.append("Whose images are whose is not told, so no hospitals are compared.")
        return None
    if not all(_are_equal(each, first) for each in decisive):
        warnings.append("The runs dealt the images out otherwise, so no hospitals are compared.")
        return None
    if not all(_are_equal(each, first) for each in found):
        warnings.append(
            "Classifiers of runs were trained with the images dealt out otherwise: they are not of "
            "the same hospitals, but of the same images."
        )
    (train, test), (chosen, measured) = first, parts
    return Hospitals(train, test[chosen], test[measured])


def _dealt(run: Run, dataset: Dataset) -> tuple[Tensor, Tensor] | None:
    """Say which client of a run had each training and test image, [N] int64.

    None where these are others, or not told.
    """
    if run.partition is None:
        return None
    partition = partition_dataset(run.config, dataset, int(run.partition["num_clients"]))
    if partition.describe() != run.partition:
        return None
    return (
        _client_of_each(len(dataset.train), partition.train_indices),
        _client_of_each(len(dataset.test), partition.test_indices),
    )


def _client_of_each(number: int, indices: Sequence[Any]) -> Tensor:
    # Each image is at exactly one client.
    found = torch.zeros(number, dtype=torch.int64)
    for client, own in enumerate(indices):
        found[torch.as_tensor(own)] = client
    return found


def _are_equal(one: tuple[Tensor, Tensor] | None, other: tuple[Tensor, Tensor]) -> bool:
    return one is not None and all(map(torch.equal, one, other))
