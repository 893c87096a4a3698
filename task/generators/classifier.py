"""A classifier, trained by hospitals as generators are; it draws nothing."""

from collections.abc import Iterator
from typing import NoReturn, Self

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from task.classifier_networks import LOWER_SHARE, convolutional_network, efficientnet_parts
from task.config import ClassifierConfig, Config, FineTuning
from task.efficientnet import (
    NUM_FEATURES,
    EfficientNet,
    check_pretrained,
    pretrained_efficientnet,
)
from task.generators.base import Advance, Batch, Generator, NoiseSource


class Classifier(Generator):
    """Names the class of an image.

    Its loss is the cross-entropy; beside it stands the accuracy, the share of images that are found
    in their class.

    Attributes:
        below: what is trained by nobody.
        trained: the pre-trained layers that are.
        head: what is new, and maps to logits.
    """

    title = "classifier"
    private = frozenset({"adamw"})
    undrawn = frozenset({"trained", "head"})
    loss_parts = ("accuracy",)
    measures = loss_parts

    def __init__(
        self,
        below: nn.Module,
        trained: nn.Module,
        head: nn.Module,
        *,
        image_shape: tuple[int, int, int],
        network: str,
        fine_tuning: FineTuning | None = None,
    ) -> None:
        """Join three networks.

        Args:
            below: maps images [N, C, H, W] in [-1, 1] to what `trained` takes.
            trained: maps that to what `head` takes.
            head: maps that to logits [N, classes].
            image_shape: (C, H, W).
            network: what it is called.
            fine_tuning: of EfficientNet; None: a network from scratch.
        """
        super().__init__()
        self.below, self.trained, self.head = below, trained, head
        self.below.eval()
        self.image_shape, self.network = image_shape, network
        self.parts = {
            name: (f"{name}.",)
            for name, part in (("trained", trained), ("head", head))
            if [*part.parameters()]
        }
        self._fine_tuning = fine_tuning
        if [*below.parameters()]:
            self.frozen = frozenset({"below."})

    def train(self, mode: bool = True) -> Self:
        """Set the mode of what is trained."""
        super().train(mode)
        self.below.eval()
        return self

    @property
    def reads_files(self) -> bool:
        """Whether there are weights to begin with."""
        return self._fine_tuning is not None

    def load_frozen(self) -> None:
        """Read the pre-trained weights, of what is frozen and of what is trained.

        Raises:
            FileNotFoundError: their package is not installed.
        """
        if self._fine_tuning is None:
            return
        file = check_pretrained("model.network=efficientnet", "model.network=small")
        found = efficientnet_parts(pretrained_efficientnet(file, "cpu"), self._fine_tuning)
        for part, pretrained in zip((self.below, self.trained), found, strict=True):
            part.load_state_dict(pretrained.state_dict())

    def optimizers(self, lr: float) -> dict[str, torch.optim.Optimizer]:
        """Make the one AdamW; the rate of pre-trained layers depends on the fine-tuning."""
        lower = lr * (LOWER_SHARE if self._fine_tuning == "discriminative" else 1)
        groups = [
            {"params": [*part.parameters()], "lr": each}
            for part, each in ((self.head, lr), (self.trained, lower))
            if [*part.parameters()]
        ]
        return {"adamw": torch.optim.AdamW(groups, fused=True)}

    def logits(self, images: Tensor) -> Tensor:
        """Map images [N, C, H, W] float in [-1, 1] to logits [N, classes] float32."""
        with torch.no_grad():
            looked_at = self.below(images)
        found: Tensor = self.head(self.trained(looked_at)).float()
        return found

    def losses(self, batch: Batch, rng: torch.Generator) -> Iterator[tuple[str, Tensor]]:
        """Yield the cross-entropy of each image."""
        found = self.example_losses(batch, rng)
        self.means.add(batch, accuracy=found["accuracy"])
        yield "adamw", found["loss"]

    def example_losses(self, batch: Batch, rng: torch.Generator) -> dict[str, Tensor]:
        """Return the cross-entropy of each image, and 1 where it is found in its class, else 0."""
        logits, labels = self.logits(batch.images[batch.part]), batch.labels[batch.part]
        right = (logits.argmax(1) == labels).float()
        return {"loss": F.cross_entropy(logits, labels, reduction="none"), "accuracy": right}

    def sample(
        self, labels: Tensor, noise: NoiseSource, *, advance: Advance = lambda number: None
    ) -> NoReturn:
        """Refuse to draw.

        Raises:
            ValueError: always.
        """
        raise ValueError("a classifier draws no images")

    def description(self) -> dict[str, object]:
        """Say which network it is and what of it is trained."""
        if self._fine_tuning is None:
            return {"network": self.network}
        return {"network": self.network, "trained": self._fine_tuning}


def build_classifier_family(config: Config) -> Classifier:
    """Make the classifier of a configuration, with weights from torch's generator.

    Raises:
        TypeError: the configuration is of another family.
    """
    data, model = config.data, config.model
    if not isinstance(model, ClassifierConfig):
        raise TypeError(f"expected a configuration of model.family=classifier, got {model.family}")
    shape, num_classes = (data.channels, data.image_size, data.image_size), len(data.classes)
    if model.network == "small":
        network = convolutional_network(data.channels, data.image_size, num_classes)
        return Classifier(
            nn.Identity(), nn.Identity(), network, image_shape=shape, network="three convolutions"
        )
    below, trained = efficientnet_parts(EfficientNet(), model.fine_tuning)
    return Classifier(
        below,
        trained,
        nn.Linear(NUM_FEATURES, num_classes),
        image_shape=shape,
        network="EfficientNet-Lite0 of ImageNet",
        fine_tuning=model.fine_tuning,
    )
