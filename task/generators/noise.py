"""Noise that depends on the place of an image and not on the batch that it is drawn in.

It imports nothing of feddm, because `feddm export` ships this file beside the weights.
"""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

# Of torch or of NumPy, [N, C, H, W] float32.
Array = Any

# Images that share a generator: with one each, a GPU would wait for the calls.
NOISE_BLOCK = 50

# What tells the noise of generated images from all else that is drawn with a seed.
GENERATED_IMAGES = 12


def join_blocks(
    places: range,
    block_source: Callable[[int], Callable[[], Array]],
    concatenate: Callable[[list[Array]], Array],
) -> Callable[[], Array]:
    """Make the noise source of the images at some places.

    Blocks of `NOISE_BLOCK` images have a source each, and are always drawn whole.

    Args:
        places: of the images, 0-based, without gaps.
        block_source: makes what draws the block of a number, from 0, new at every call.
        concatenate: joins blocks.
    """
    first = places.start // NOISE_BLOCK
    sources = [block_source(n) for n in range(first, (places.stop - 1) // NOISE_BLOCK + 1)]
    skipped = places.start - first * NOISE_BLOCK

    def draw_noise() -> Array:
        blocks = [draw_block() for draw_block in sources]
        return concatenate(blocks)[skipped : skipped + len(places)]

    return draw_noise


def generation_noise(
    places: range, noise_shape: Sequence[int], *, seed: int, label: int
) -> Callable[[], np.ndarray]:
    """Make the noise source of generated images, the same on every device and in every export.

    Args:
        places: of the images in their class, 0-based, without gaps.
        noise_shape: of an image, (C, H, W) for a diffusion model.
        seed: >= 0.
        label: of the class.

    Returns:
        What draws standard normal noise, [N, *noise_shape] float32, new at every call.
    """

    def block_source(number: int) -> Callable[[], np.ndarray]:
        key = (GENERATED_IMAGES, label, number)
        rng = np.random.default_rng(np.random.SeedSequence(seed, spawn_key=key))
        return lambda: rng.standard_normal((NOISE_BLOCK, *noise_shape), np.float32)

    return join_blocks(places, block_source, np.concatenate)
