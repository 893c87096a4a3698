"""Where every random draw of a run comes from: the seed, what it is for, the round, the client.

No part of feddm reads a global generator, so that the draws of one client do not depend on
which others trained before it, nor on the process that it trains in.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from enum import IntEnum

import numpy as np
import torch

from task.generators import noise


class Stream(IntEnum):
    """What a generator is for; each purpose has draws of its own."""

    PARTITION = 0
    MODEL_INIT = 1
    CLIENT_SAMPLING = 2
    TRAIN = 3
    EVALUATE = 4
    SAMPLE_GRID = 5
    FINAL_IMAGES = 6
    CLASSIFIER = 7
    TEST_SPLIT = 8
    HOLD_OUT = 9
    METRICS = 10
    EVALUATED_IMAGES = 11
    GENERATED_IMAGES = noise.GENERATED_IMAGES
    RESTORED_IMAGES = 13
    STUDY = 14
    CLIENT_NOISE = 15
    AUDIT = 16
    WIRE = 17
    SHARING = 18


def numpy_generator(seed: int, stream: Stream, *key: int) -> np.random.Generator:
    """Make the NumPy generator of (seed, stream, key).

    Args:
        seed: the run's seed, >= 0.
        stream: what the draws are for.
        *key: further numbers >= 0, such as server round and client number.
    """
    return np.random.default_rng(_sequence(seed, stream, *key))


def torch_generator(
    seed: int, stream: Stream, *key: int, device: str | torch.device = "cpu"
) -> torch.Generator:
    """Make the torch generator of (seed, stream, key) on a device; see `numpy_generator`."""
    state = _sequence(seed, stream, *key).generate_state(1, np.uint64)
    # torch takes seeds up to 2^64 - 1, but only int64 on some devices.
    return torch.Generator(device).manual_seed(int(state[0]) >> 1)


def _sequence(seed: int, stream: Stream, *key: int) -> np.random.SeedSequence:
    # A spawn key keeps (1,) and (1, 0) apart, which a list of entropy does not.
    return np.random.SeedSequence(seed, spawn_key=(int(stream), *key))


@contextmanager
def seeded_global_generator(generator: torch.Generator, rank: int = 0) -> Iterator[None]:
    """Fork torch's global generators and seed them with a draw from `generator`.

    For what takes no generator: the initialization of layers and channel dropout.

    Args:
        generator: one and the same draw is taken from it, whatever the rank.
        rank: processes of other ranks get other seeds.
    """
    device = generator.device
    seed = int(torch.randint(2**62, (), generator=generator, device=device))
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.manual_seed(seed + rank)
        yield
