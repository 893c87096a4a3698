"""The classifiers of a study: networks from scratch or pre-trained, and what of them is trained."""

import copy
import io
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load as load_safetensors
from torch import Tensor, nn

from task.checks import require
from task.classifier_networks import (
    LAST_BLOCKS,
    LOWER_SHARE,
    convolutional_network,
    efficientnet_parts,
)
from task.config.study_config import OWN_CLASSIFIERS, StudyConfig
from task.efficientnet import (
    NUM_FEATURES,
    check_pretrained,
    enlarged,
    pretrained_efficientnet,
    pretrained_file,
    suits,
)
from task.files import file_sha256

# torchvision's networks were trained on images that were normalized so, by channel in [0, 1].
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
SMALL_LR, TUNING_LR = 3e-3, 3e-4


@dataclass(frozen=True)
class ClassifierKind:
    """A network in two parts: what nobody trains, applied once to each image, and the rest.

    Attributes:
        title: what it is called.
        frozen: maps images [N, C, H, W] float32 in [-1, 1] to what the other part takes.
        make: makes the other part with new weights from torch's global generator, in training mode;
            it maps to logits [N, classes].
        lr: of what is new in it.
        lower_lr: of its pre-trained layers.
        head: names of the parameters that are new, by their beginnings.
        sha256: of the file of its pre-trained weights; "" where there is none.
    """

    title: str
    frozen: Callable[[Tensor], Tensor]
    make: Callable[[], nn.Module]
    lr: float
    lower_lr: float
    head: tuple[str, ...] = ("",)
    sha256: str = ""

    def parameter_groups(self, network: nn.Module) -> list[dict[str, object]]:
        """Group the parameters that are trained by their learning rates."""
        groups: list[dict[str, object]] = []
        for lr, new in ((self.lr, True), (self.lower_lr, False)):
            chosen = [
                parameter
                for name, parameter in network.named_parameters()
                if parameter.requires_grad and name.startswith(self.head) == new
            ]
            if chosen:
                groups.append({"params": chosen, "lr": lr})
        return groups


def settled_classifier(study: StudyConfig, channels: int, image_size: int) -> str:
    """Return the classifier that "auto" stands for here, or the one that was asked for."""
    if study.classifier != "auto":
        return study.classifier
    there = pretrained_file() is not None and suits(channels, image_size)
    return "efficientnet" if there else "small"


def build_classifier(
    study: StudyConfig,
    *,
    channels: int,
    image_size: int,
    num_classes: int,
    device: torch.device,
) -> ClassifierKind:
    """Find the network of a study.

    Args:
        study: which, and what of it is trained.
        channels: of the images.
        image_size: their side.
        num_classes: number of logits.
        device: that trains.

    Raises:
        FileNotFoundError: its weights are not there.
        ValueError: there is no such network, or the file holds weights of another.
    """
    name = settled_classifier(study, channels, image_size)
    lr = study.lr or (SMALL_LR if name == "small" or study.fine_tuning == "head" else TUNING_LR)
    lower_lr = lr * (LOWER_SHARE if study.fine_tuning == "discriminative" else 1)
    if name == "small":
        require(
            study.fine_tuning == "head",
            "study.fine_tuning",
            "left out with study.classifier=small, all of which is trained",
            study.fine_tuning,
        )
        return ClassifierKind(
            "network of three convolutions, from scratch",
            _unchanged,
            lambda: convolutional_network(channels, image_size, num_classes),
            lr,
            lr,
        )
    if name == "efficientnet":
        file = check_pretrained("study.classifier=efficientnet", "study.classifier=small")
        network = pretrained_efficientnet(file, device)
        parts: Parts = (*efficientnet_parts(network, study.fine_tuning), NUM_FEATURES)
        title = f"EfficientNet-Lite0 of ImageNet, trained: {study.fine_tuning}"
    else:
        parts = torchvision_parts(name, Path(study.weights), study.fine_tuning, device)
        file = Path(study.weights)
        title = f"{name}, pre-trained, trained: {study.fine_tuning}"
    frozen, tuned, num_features = parts

    def make() -> nn.Module:
        head = nn.Linear(num_features, num_classes)
        return nn.Sequential(copy.deepcopy(tuned), head)

    return ClassifierKind(title, frozen, make, lr, lower_lr, head=("1.",), sha256=file_sha256(file))


def _unchanged(images: Tensor) -> Tensor:
    return images


Parts = tuple[Callable[[Tensor], Tensor], nn.Module, int]


def torchvision_parts(name: str, file: Path, fine_tuning: str, device: torch.device) -> Parts:
    """Build a network of torchvision from a file of its weights; its last layer is left out.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: torchvision has no such network, or the weights are of another.
    """
    # Imported here: its models take a second.
    from torchvision import models  # type: ignore[import-untyped]

    known = models.list_models(module=models)
    require(
        name in known,
        "study.classifier",
        f"one of {', '.join(OWN_CLASSIFIERS)} or a network of torchvision, such as resnet18",
        name,
    )
    if not file.is_file():
        raise FileNotFoundError(f"study.weights: {file}: there is no such file")
    network = models.get_model(name, weights=None)
    try:
        network.load_state_dict(_read_weights(file))
    except (RuntimeError, ValueError) as error:
        first = " ".join(str(error).split())[:200]
        raise ValueError(f"study.weights: {file} holds no weights of {name}: {first}") from error
    linear = [each for each, module in network.named_modules() if isinstance(module, nn.Linear)]
    require(linear != [], "study.classifier", "a network that ends in a linear layer", name)
    last = linear[-1]
    features = network.get_submodule(last).in_features
    network.set_submodule(last, nn.Identity())
    body = _Body(_Normalized(), network).to(device).eval()
    if fine_tuning == "head":
        body.requires_grad_(False)
        return body, nn.Identity(), features
    if fine_tuning == "last_blocks":
        parts = [each for each in network.children() if [*each.parameters()]]
        require(
            len(parts) > 2 * LAST_BLOCKS,
            "study.fine_tuning",
            f"head, all or discriminative with {name}, of whose parts the last cannot be told",
            fine_tuning,
        )
        for part in parts[:-LAST_BLOCKS]:
            _freeze(part.parameters())
    return _unchanged, body, features


class _Body(nn.Sequential):
    """A pre-trained network, whose batch normalizations keep the statistics of its images."""

    def train(self, mode: bool = True) -> "_Body":
        return super().train(False)


class _Normalized(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        for name, values in (("mean", IMAGENET_MEAN), ("std", IMAGENET_STD)):
            self.register_buffer(name, torch.tensor(values).view(1, 3, 1, 1))
        self.mean: Tensor
        self.std: Tensor

    def forward(self, images: Tensor) -> Tensor:
        return ((enlarged(images) + 1) / 2 - self.mean) / self.std


def _freeze(parameters: Iterable[nn.Parameter]) -> None:
    for parameter in parameters:
        parameter.requires_grad_(False)


def _read_weights(file: Path) -> Mapping[str, Tensor]:
    content = file.read_bytes()
    if file.suffix == ".safetensors":
        return load_safetensors(content)
    found = torch.load(io.BytesIO(content), weights_only=True, map_location="cpu")
    if not isinstance(found, Mapping):
        raise ValueError(f"expected weights by name, got {type(found).__name__}")
    return found
