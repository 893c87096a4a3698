"""Generators whose losses are known in closed form."""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn

from task.generators.base import Advance, Batch, Generator, NoiseSource


def label_losses(model: "Known", batch: Batch) -> Tensor:
    """The label of each image, whatever the weight."""
    return batch.labels.float() + 0 * model.weight


class Known(Generator):
    """One weight; it keeps the batches that it is given."""

    title = "known model"
    image_shape = (1, 8, 8)

    def __init__(self, loss: Callable[["Known", Batch], Tensor] = label_losses) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.tensor(1.0))
        self.loss = loss
        self.batches: list[Batch] = []

    def optimizers(self, lr: float) -> dict[str, torch.optim.Optimizer]:
        return {"sgd": torch.optim.SGD(self.parameters(), lr=lr)}

    def losses(self, batch: Batch, rng: torch.Generator) -> Iterator[tuple[str, Tensor]]:
        self.batches.append(batch)
        yield "sgd", self.loss(self, batch)[batch.part]

    def example_losses(self, batch: Batch, rng: torch.Generator) -> dict[str, Tensor] | None:
        return {"loss": self.loss(self, batch)}

    def sample(
        self, labels: Tensor, noise: NoiseSource, *, advance: Advance = lambda number: None
    ) -> Tensor:
        advance(len(labels))
        return self.weight * noise()
