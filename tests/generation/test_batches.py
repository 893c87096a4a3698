import math

import pytest
import torch
from torch import Tensor

from task.generation.batches import block_noise, sample_batches, to_uint8
from task.generators.base import Advance, Generator, NoiseSource
from task.generators.noise import NOISE_BLOCK
from tests.generators.denoisers import diffusion, seeded
from tests.training.generators import Known


class Labeled(Known):
    """Its images are their labels; it takes no more than three at a time."""

    def sample(
        self, labels: Tensor, noise: NoiseSource, *, advance: Advance = lambda number: None
    ) -> Tensor:
        assert len(labels) <= 3 and not self.training
        assert noise().shape == (len(labels), *self.image_shape)
        return labels.view(-1, 1, 1, 1).float()


class Lost(Known):
    def sample(
        self, labels: Tensor, noise: NoiseSource, *, advance: Advance = lambda number: None
    ) -> Tensor:
        raise RuntimeError("lost")


def draw(generator: Generator, labels: Tensor, batch_size: int | None) -> Tensor:
    return sample_batches(generator, labels, batch_size=batch_size, block_generator=seeded)


@pytest.mark.parametrize("training", [True, False])
def test_sample_batches_covers_all_labels_and_restores_mode(training: bool) -> None:
    generator = Labeled()
    generator.train(training)
    assert draw(generator, torch.arange(7), 3).flatten().tolist() == list(range(7))
    assert generator.training is training


def test_sample_batches_restores_mode_after_failure_and_gives_trainable_tensors() -> None:
    denoiser = diffusion(lambda x_t, *_: x_t * 0.5, num_inference_steps=1)
    assert not draw(denoiser, torch.zeros(2).long(), 4).is_inference()
    generator = Lost().train()
    with pytest.raises(RuntimeError, match="lost"):
        draw(generator, torch.arange(2), 4)
    assert generator.training
    with pytest.raises(ValueError, match="batch_size must be >= 1, or None, got 0"):
        draw(generator, torch.arange(2), 0)


@pytest.mark.parametrize("sampler", ["ddpm", "ddim", "dpmpp_2m"])
def test_images_depend_on_their_place_and_not_on_the_batch_size(sampler: str) -> None:
    generator = diffusion(lambda x_t, *_: x_t * 0.5, sampler=sampler, num_inference_steps=4)
    labels = torch.arange(4 * NOISE_BLOCK + 7) % 10
    whole = draw(generator, labels, len(labels))
    for batch_size in (NOISE_BLOCK, 3 * NOISE_BLOCK, NOISE_BLOCK - 13, None):
        found = draw(generator, labels, batch_size)
        torch.testing.assert_close(found, whole, atol=1e-5, rtol=1e-5)
    # More labels behind them change nothing, which lets a longer list go on where one stopped.
    for part in (1, NOISE_BLOCK, 2 * NOISE_BLOCK + 3):
        found = draw(generator, labels[:part], None)
        torch.testing.assert_close(found, whole[:part], atol=1e-5, rtol=1e-5)
    assert len(whole.flatten(1).unique(dim=0)) == len(labels)


def test_block_noise_is_standard_normal_and_new_at_every_call() -> None:
    draw_noise = block_noise(range(20, 220), (3, 8, 8), seeded)
    first, second = draw_noise(), draw_noise()
    assert first.shape == (200, 3, 8, 8)
    for drawn in (first, second):
        assert drawn.mean() == pytest.approx(0, abs=0.03)
        assert drawn.std() == pytest.approx(1, abs=0.03)
    assert (first * second).mean() == pytest.approx(0, abs=0.03)
    of_block_1 = torch.randn(NOISE_BLOCK, 3, 8, 8, generator=seeded(1))
    assert torch.equal(first[NOISE_BLOCK - 20 : 2 * NOISE_BLOCK - 20], of_block_1)


def test_to_uint8_rounds_and_clamps() -> None:
    images = torch.tensor([-2.0, -1.0, -1 + 0.9 / 255, 0.0, 1 - 1.1 / 255, 1.0, 7.0])
    assert to_uint8(images).tolist() == [0, 0, 0, 128, 254, 255, 255]
    levels = torch.arange(256)
    assert torch.equal(to_uint8(levels / 127.5 - 1), levels.to(torch.uint8))
    cut = to_uint8(images, truncated=True).tolist()
    assert cut == [math.floor((min(max(x, -1), 1) + 1) * 127.5) for x in images.tolist()]
    assert cut != to_uint8(images).tolist()
    with pytest.raises(TypeError, match=r"images must be floating-point .* got torch.uint8"):
        to_uint8(torch.zeros(1, dtype=torch.uint8))
