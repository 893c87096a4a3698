import itertools
import json
import subprocess
import sys

import numpy as np
import pytest
import torch

from task.randomness import Stream, numpy_generator, torch_generator

# Keys of one length: server round and client number.
KEYS = [(1, 0), (1, 1), (1, 2), (2, 1), (2, 0), (10, 1), (1, 10), (300, 49)]

DRAW = """
import json, torch
from task.randomness import Stream, numpy_generator, torch_generator
drawn = [
    numpy_generator(7, Stream.TRAIN, 3, 1).integers(2**62, size=3).tolist(),
    torch.randint(2**62, (3,), generator=torch_generator(7, Stream.TRAIN, 3, 1)).tolist(),
]
print(json.dumps(drawn))
"""


def first_draws() -> tuple[list[int], list[int]]:
    """Draw once from every combination of seed, stream and key, with NumPy and with torch."""
    seeds = (0, 1, 2, 2**62)
    combinations = [*itertools.product(seeds, Stream, KEYS)]
    return (
        [int(numpy_generator(s, stream, *key).integers(2**62)) for s, stream, key in combinations],
        [
            int(torch.randint(2**62, (), generator=torch_generator(s, stream, *key)))
            for s, stream, key in combinations
        ],
    )


def test_every_seed_stream_and_key_has_draws_of_its_own() -> None:
    for drawn in first_draws():
        assert len(drawn) == len(set(drawn)) == 4 * len(Stream) * len(KEYS)


def test_neighboring_streams_are_uncorrelated() -> None:
    drawn = [numpy_generator(0, stream, 1, 0).standard_normal(10_000) for stream in Stream]
    drawn += [numpy_generator(0, Stream.TRAIN, 1, i).standard_normal(10_000) for i in range(1, 10)]
    correlation = np.corrcoef(drawn)
    assert np.abs(correlation - np.eye(len(drawn))).max() < 0.05  # five standard deviations


def test_same_key_gives_the_same_draws_in_another_process() -> None:
    found = subprocess.run([sys.executable, "-c", DRAW], capture_output=True, check=True).stdout
    here = [
        numpy_generator(7, Stream.TRAIN, 3, 1).integers(2**62, size=3).tolist(),
        torch.randint(2**62, (3,), generator=torch_generator(7, Stream.TRAIN, 3, 1)).tolist(),
    ]
    assert json.loads(found) == here


def test_keys_of_another_length_have_draws_of_their_own() -> None:
    # NumPy's SeedSequence reads [0, 4] and [0, 4, 0] alike, and 3 * 2^32 as the words 0, 3.
    keys = [(0, 4), (0, 4, 0), (0, 4, 0, 0), (0, 3, 4, 1), (3 * 2**32, 4, 1)]
    drawn = [
        int(numpy_generator(seed, Stream(stream), *key).integers(2**62))
        for seed, stream, *key in keys
    ]
    assert len(set(drawn)) == len(keys)


def test_streams_keep_their_numbers() -> None:
    # A resumed run draws on from where an older version stopped: numbers are never given anew.
    assert [stream.value for stream in Stream] == [*range(len(Stream))]
    assert (Stream.PARTITION, Stream.MODEL_INIT, Stream.CLIENT_SAMPLING, Stream.TRAIN) == (
        0,
        1,
        2,
        3,
    )


def test_generators_leave_the_global_ones_alone() -> None:
    before, numpy_before = torch.get_rng_state(), np.random.get_state()[1]
    first_draws()
    assert torch.equal(torch.get_rng_state(), before)
    assert np.array_equal(np.random.get_state()[1], numpy_before)


def test_torch_generator_is_on_its_device() -> None:
    assert torch_generator(0, Stream.TRAIN).device == torch.device("cpu")
    if torch.cuda.is_available():
        assert torch_generator(0, Stream.TRAIN, device="cuda").device.type == "cuda"


@pytest.mark.parametrize("numbers", [(-1, 0), (0, -1)])
def test_negative_numbers_are_refused(numbers: tuple[int, int]) -> None:
    seed, key = numbers
    for make in (numpy_generator, torch_generator):
        with pytest.raises(ValueError, match="non-negative"):
            make(seed, Stream.TRAIN, key)
