"""A family of generators from outside feddm: every pixel of a class is Gaussian in logits."""

from collections.abc import Iterator
from typing import Literal

import torch
from torch import Tensor, nn

from task.config import Config, ModelConfig
from task.generators.base import Advance, Batch, Generator, NoiseSource
from task.generators.registry import register


class PixelGaussiansConfig(ModelConfig):
    """Nothing is to be chosen."""

    family: Literal["pixel_gaussians"]


class PixelGaussians(Generator):
    """A mixture of Gaussians, one for each class, with a mean and a deviation for each pixel."""

    title = "mixture of Gaussians"

    def __init__(self, image_shape: tuple[int, int, int], num_classes: int) -> None:
        super().__init__()
        self.image_shape = image_shape
        self.mean = nn.Parameter(torch.zeros(num_classes, *image_shape))
        self.log_std = nn.Parameter(torch.zeros(num_classes, *image_shape))

    def optimizers(self, lr: float) -> dict[str, torch.optim.Optimizer]:
        return {"adam": torch.optim.Adam(self.parameters(), lr=lr)}

    def example_losses(self, batch: Batch, rng: torch.Generator) -> dict[str, Tensor]:
        logits, labels = torch.atanh(0.95 * batch.images), batch.labels
        place = (logits - self.mean[labels]) * (-self.log_std[labels]).exp()
        return {"loss": (place.square() / 2 + self.log_std[labels]).flatten(1).mean(1)}

    def losses(self, batch: Batch, rng: torch.Generator) -> Iterator[tuple[str, Tensor]]:
        yield "adam", self.example_losses(batch, rng)["loss"][batch.part]

    @torch.no_grad()
    def sample(
        self, labels: Tensor, noise: NoiseSource, *, advance: Advance = lambda number: None
    ) -> Tensor:
        images = torch.tanh(self.mean[labels] + self.log_std[labels].exp() * noise())
        advance(len(labels))
        return images


def build(config: Config) -> PixelGaussians:
    data = config.data
    shape = (data.channels, data.image_size, data.image_size)
    return PixelGaussians(shape, len(data.classes))


register("pixel_gaussians", PixelGaussiansConfig, build)
