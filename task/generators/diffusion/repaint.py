"""Inverse problems without training: images that agree with what is known, filled in by a model.

What is known of an image is its orthogonal projection P onto some subspace: the pixels outside a
mask, the means of blocks, the brightness of colors. Sampling takes the known part from the image,
noised, and the rest, I - P, from the model: x_{t-1} = P(q_sample(known)) + (I - P)(model's step).

Sources: RePaint (Lugmayr et al. 2022, arXiv 2201.09865, Algorithm 1 and its jumps, section 4.2)
for masks; that P may be any linear projection: ILVR (Choi et al. 2021, arXiv 2108.02938) with a
low-pass filter in the place of P, and DDNM (Wang, Yu & Zhang 2023, arXiv 2212.00490), which
projects the predicted x_start in the place of x_{t-1}. What differs from RePaint: steps may skip
timesteps, with the posterior variance (its code learns the variance); the known part is noised to
the level of x_{t-1}, the images that it goes into (the paper prints alpha-bar_t for x_{t-1} in
equation 8a; here it is that of x_{t-1}, as its code effectively does); after a jump back the known
part is the re-noised one, where its code noises the known images anew; and the last image is
brought into [-1, 1] without touching its known part.
"""

import math
from collections.abc import Iterable, Iterator, Sequence

import torch
from torch import Tensor

from task.checks import require
from task.generators.base import NoiseSource, Projection
from task.generators.diffusion.samplers import Predict, ddim_steps, denoise, take_step

# RePaint's own, for its 250 steps.
JUMP_LENGTH = 10
NUM_RESAMPLES = 10


def repaint_sample(
    predict: Predict,
    moves: Iterable[tuple[int, int]],
    *,
    alphas_cumprod: Sequence[float],
    prediction_type: str,
    clip_x_start: bool,
    known: Tensor,
    projection: Projection,
    draw_noise: NoiseSource,
) -> Tensor:
    """Draw images that have a known projection.

    Args:
        predict: the model, for the labels of the images.
        moves: of `repaint_moves`.
        alphas_cumprod: of each timestep of the model, in (0, 1), falling.
        prediction_type: what the model returns.
        clip_x_start: whether to clamp each prediction of x_start to [-1, 1].
        known: [N, C, H, W] float32 in [-1, 1], any images that have the known projection.
        projection: onto what is known.
        draw_noise: source of all noise, beside the labels.

    Returns:
        [N, C, H, W] float32 in [-1, 1], with the projection of `known` but for rounding.

    Raises:
        ValueError: a number is out of range, or `prediction_type` unknown.

    Source: see the module.
    """
    require(bool((known.abs() <= 1).all()), "known", "in [-1, 1]", known.abs().max().item())
    moves = [*moves]
    # By how many are left to take, less one.
    steps = ddim_steps(alphas_cumprod, moves[0][0], eta=1.0)[::-1]
    # Likewise: clean images first.
    levels = [1.0, *(step.alpha_cumprod for step in steps)]
    x_t = draw_noise()
    for left, to in moves:
        here, after = levels[left], levels[to]
        if to > left:
            x_t = noised(x_t, after / here, draw_noise)
            continue
        step = steps[left - 1]
        x_start = denoise(
            step, x_t, predict, prediction_type=prediction_type, clip_x_start=clip_x_start
        )
        x_t = take_step(step, x_t, x_start, x_start, draw_noise)
        target = noised(known, after, draw_noise) if to > 0 else known
        x_t = x_t + projection(target - x_t)
    return into_range(x_t, known, projection)


def noised(images: Tensor, share: float, draw_noise: NoiseSource) -> Tensor:
    """Noise images so that `share` of their variance is left; see `q_sample`."""
    return math.sqrt(share) * images + math.sqrt(1 - share) * draw_noise()


def repaint_moves(
    num_inference_steps: int, jump_length: int, num_resamples: int
) -> Iterator[tuple[int, int]]:
    """List the moves from noise to images with jumps back: steps left, before and after each move.

    A move down is a step of the model; a move up adds the noise of `jump_length` steps at once.

    Args:
        num_inference_steps: n, >= 1.
        jump_length: in [1, n) where there are jumps.
        num_resamples: >= 1, how often the model takes the steps from each landing to the next.

    Raises:
        ValueError: a number is out of range.

    Source: RePaint, section 4.2 and `get_schedule_jump` of its code.
    """
    require(num_resamples >= 1, "num_resamples", ">= 1 (1: no jumps back)", num_resamples)
    require(
        num_resamples == 1 or 1 <= jump_length < num_inference_steps,
        "jump_length",
        f">= 1 and below the {num_inference_steps} steps (pass a smaller --jump-length, or "
        "--num-resamples 1 for no jumps)",
        jump_length,
    )
    jumps = dict.fromkeys(
        range(1, num_inference_steps - jump_length + 1, jump_length), num_resamples - 1
    )
    left = num_inference_steps
    while left > 0:
        yield left, left - 1
        left -= 1
        if jumps.get(left, 0) > 0:
            jumps[left] -= 1
            yield left, left + jump_length
            left += jump_length


def into_range(images: Tensor, known: Tensor, projection: Projection) -> Tensor:
    """Bring images into [-1, 1] without a change of their projection.

    They move towards `known`, which is in range and has that projection; pixels that the
    projection ties to each other move by the same share.
    """
    deviation = images - known
    room = (deviation.sign() - known) / torch.where(deviation == 0, 1, deviation)
    share = torch.where(deviation == 0, 1, room).clamp(max=1)
    return (known + projection.least(share) * deviation).clamp(-1, 1)
