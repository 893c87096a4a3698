"""What a metric sees of an image: the features and the class probabilities of a network.

Four networks to choose from. Figures of one say nothing about figures of another, so each result
carries the extractor's name, its hash and the range of the images that it saw.
"""

import hashlib
import io
import logging
import zipfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.error import URLError

import torch
from torch import Tensor, nn

from task.checks import require, require_one_of
from task.classifier_networks import WIDTHS, convolutional_network
from task.config import IMAGE_RANGES, Config
from task.data import ImageSet, normalize
from task.efficientnet import (
    ENLARGED_AT_ONCE,
    WEIGHTS_SHA256,
    check_pretrained,
    enlarged,
    pretrained_efficientnet,
    pretrained_file,
    suits,
)
from task.evaluation import classifier
from task.progress import tracked
from task.runs.checkpoint import load_weights, save_weights

INCEPTION_FILE = "weights-inception-2015-12-05-6726825d.pth"
INCEPTION_URL = (
    f"https://github.com/toshas/torch-fidelity/releases/download/v0.2.0/{INCEPTION_FILE}"
)
INCEPTION_SHA256 = "6726825d0af5f729cebd5821db510b11b1cfad8faad88a03f1befd49fb9129b2"

# Images, where nothing says how many.
LOOKED_AT_ONCE = 256

# Of a hash, where a person reads it.
HASH_DIGITS = 12

_log = logging.getLogger(__name__)

# network(images [N, C, H, W] uint8 in the range asked for) -> features [N, D], logits [N, K] or
# None
Network = Callable[[Tensor], tuple[Tensor, Tensor | None]]


@dataclass(frozen=True)
class FeatureExtractor:
    """A network that metrics look through.

    Attributes:
        name: one of `task.config.EXTRACTORS`.
        sha256: of its weights, 64 hexadecimal digits.
        image_range: "correct" or "paper", see `in_range`.
        network: takes what `in_range` returns, on `device`.
        device: that computes and holds the features.
    """

    name: str
    sha256: str
    image_range: str
    network: Network
    device: torch.device

    def __post_init__(self) -> None:
        require_one_of("image_range", self.image_range, IMAGE_RANGES)


@dataclass(frozen=True, eq=False)
class Features:
    """What an extractor found in N images.

    Attributes:
        features: [N, D] float32.
        probabilities: [N, K] float64, or None where the network has no classes.
    """

    features: Tensor
    probabilities: Tensor | None

    def __len__(self) -> int:
        return len(self.features)

    def subset(self, indices: Tensor) -> "Features":
        """Take the rows at `indices` ([M] int64, on the CPU), in that order."""
        chosen = indices.to(self.features.device)
        probabilities = None if self.probabilities is None else self.probabilities[chosen]
        return Features(self.features[chosen], probabilities)


def in_range(images: Tensor, image_range: str) -> Tensor:
    """Bring images to the range in which a metric sees them.

    "paper" is what the released code handed to its metrics, and so what the published tables were
    computed with: an image in [-1, 1], taken for one in [0, 1], multiplied by 255 and cast to
    uint8, where negatives wrap. Pixel p in [0, 1] becomes (510 p - 255) mod 256; for p = u / 255
    that is (2 u - 255) mod 256 = (2 u + 1) mod 256.

    Args:
        images: [N, C, H, W] uint8.
        image_range: "correct" (the images themselves) or "paper".

    Raises:
        TypeError: the images are not uint8.
        ValueError: `image_range` is neither.
    """
    require_one_of("image_range", image_range, IMAGE_RANGES)
    if images.dtype != torch.uint8:
        raise TypeError(f"images must be uint8, got {images.dtype}")
    return images if image_range == "correct" else images * 2 + 1  # uint8 wraps at 256


@torch.no_grad()
def extract(
    extractor: FeatureExtractor, images: Tensor, *, batch_size: int | None = None
) -> Features:
    """Look at images through an extractor.

    Args:
        extractor: see `build_extractor`.
        images: [N, C, H, W] uint8 as they were drawn or loaded; `in_range` is applied here.
        batch_size: images at a time, >= 1; None: `LOOKED_AT_ONCE`.

    Returns:
        Features on the extractor's device.

    Raises:
        ValueError: there are no images, or the network returns no [N, D] features.
    """
    batch_size = LOOKED_AT_ONCE if batch_size is None else batch_size
    require(batch_size >= 1, "batch_size", ">= 1", batch_size)
    require(len(images) > 0, "images", "at least one", 0)
    features, probabilities = [], []
    batches = torch.split(images, batch_size)
    stage = f"extracting features of {len(images):,} images"
    for batch in tracked(batches, len(batches), stage):
        found, logits = extractor.network(
            in_range(batch, extractor.image_range).to(extractor.device)
        )
        require(
            found.ndim == 2 and len(found) == len(batch),
            f"features of extractor {extractor.name}",
            f"[{len(batch)}, D]",
            tuple(found.shape),
        )
        features.append(found.float())
        if logits is not None:
            probabilities.append(logits.double().softmax(1))
    return Features(torch.cat(features), torch.cat(probabilities) if probabilities else None)


def automatic_extractor(config: Config) -> str:
    """Return what `eval.extractor=auto` stands for on this machine.

    That is EfficientNet where its package is installed and `suits` the images, else the classifier.
    """
    suited = suits(config.data.channels, config.data.image_size)
    return "efficientnet" if suited and pretrained_file() is not None else "classifier"


def build_extractor(
    config: Config, train: ImageSet, device: str | torch.device
) -> FeatureExtractor:
    """Make the extractor that `eval.extractor` names, for the images of `eval.image_range`.

    Args:
        config: with absolute folders, see `task.config.anchored`, and a settled extractor.
        train: the real training images, which the classifier is trained on.
        device: that computes.

    Raises:
        FileNotFoundError: a file is not there and cannot be downloaded.
        ValueError: a file is not what it should be, or the extractor is "auto" or unknown.
    """
    chosen = config.eval
    if chosen.extractor == "inception":
        weights = Path(chosen.inception_weights) if chosen.inception_weights else None
        return inception_extractor(weights, image_range=chosen.image_range, device=device)
    if chosen.extractor == "classifier":
        model = cached_classifier(config, train, device)
        return classifier_extractor(model, image_range=chosen.image_range)
    if chosen.extractor == "efficientnet":
        return efficientnet_extractor(image_range=chosen.image_range, device=device)
    if chosen.extractor == "exported":
        program = Path(chosen.exported_program)
        return exported_extractor(program, image_range=chosen.image_range, device=device)
    raise ValueError(f"eval.extractor must be a settled extractor, got {chosen.extractor!r}")


def hub_inception_file() -> Path:
    """Return where torch.hub keeps Inception's weights, whether they are there or not."""
    return Path(torch.hub.get_dir()) / "checkpoints" / INCEPTION_FILE


def inception_extractor(
    weights: Path | None, *, image_range: str, device: str | torch.device
) -> FeatureExtractor:
    """Make the extractor of the true FID, IS and KID: torch-fidelity's port of Inception-2015.

    Features are its 2,048 pooled ones, logits those without a bias, as FID and IS in torchmetrics
    take them. Gray images fill three channels. Images are resized to 299x299, for "correct" with
    antialiasing (torchmetrics' default), for "paper" without, as torchmetrics did then.

    Args:
        weights: the file of weights, or None for the one in torch.hub's folder, downloaded into
            it on first use. Its SHA-256 must be that of the published weights.
        image_range: "correct" or "paper".
        device: that computes.

    Raises:
        FileNotFoundError: the file is not there and cannot be downloaded.
        ValueError: it is another file.
    """
    require_one_of("image_range", image_range, IMAGE_RANGES)
    # Imported here because it takes seconds, and every process of a run would pay them.
    from torchmetrics.image.fid import NoTrainInceptionV3

    content = _inception_file(weights).read_bytes()
    sha256 = hashlib.sha256(content).hexdigest()
    require(
        sha256 == INCEPTION_SHA256,
        "eval.inception_weights",
        f"the file {INCEPTION_FILE} of SHA-256 {INCEPTION_SHA256}",
        f"{weights or 'the one in the folder of torch.hub'} of SHA-256 {sha256}",
    )
    # torch-fidelity unpickles whatever its file holds, so it gets one that holds tensors only.
    tensors = io.BytesIO()
    torch.save(torch.load(io.BytesIO(content), weights_only=True, map_location="cpu"), tensors)
    tensors.seek(0)
    model = NoTrainInceptionV3(
        name="inception-v3-compat",
        features_list=["2048"],
        feature_extractor_weights_path=tensors,  # type: ignore[arg-type]
        antialias=image_range == "correct",
    ).to(device)

    def network(images: Tensor) -> tuple[Tensor, Tensor | None]:
        features: Tensor = model(_colored(images, 3))
        return features, features @ model.fc.weight.T

    return FeatureExtractor("inception", sha256, image_range, network, torch.device(device))


def _inception_file(weights: Path | None) -> Path:
    """Return the file of Inception's weights, downloaded if need be.

    Raises:
        FileNotFoundError: it is not there and cannot be downloaded.
    """
    file = weights or hub_inception_file()
    if file.is_file():
        return file
    reason = "there is no such file"
    if weights is None:
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            torch.hub.download_url_to_file(
                INCEPTION_URL, str(file), hash_prefix=INCEPTION_SHA256, progress=False
            )
            return file
        except (URLError, OSError, RuntimeError) as error:
            reason = f"it is missing, and downloading it failed ({error})"
    raise FileNotFoundError(
        f"eval.extractor=inception needs Inception's weights in {file}: {reason}. Download "
        f"{INCEPTION_URL} on a machine with a network and copy it to that place, name its place "
        "with eval.inception_weights, or choose eval.extractor=classifier, which needs no file"
    )


def classifier_extractor(model: nn.Sequential, *, image_range: str) -> FeatureExtractor:
    """Make an extractor of the project's own classifier; see `cached_classifier`.

    Features are the 128 maps of its last convolution, averaged over the plane as Inception's are.
    The flattened maps that its last layer reads would be more than most test splits have images.

    Args:
        model: from `task.evaluation.classifier.train_classifier`.
        image_range: "correct" or "paper"; it was trained on correct images.
    """
    trunk, head = model[:-2].eval(), model[-2:].eval()

    def network(images: Tensor) -> tuple[Tensor, Tensor | None]:
        maps = trunk(normalize(images))
        return maps.mean((2, 3)), head(maps)

    device = next(model.parameters()).device
    return FeatureExtractor(
        "classifier", weights_sha256(model.state_dict()), image_range, network, device
    )


def efficientnet_extractor(*, image_range: str, device: str | torch.device) -> FeatureExtractor:
    """Make the extractor of features that were trained on ImageNet, without a download.

    Features are the 1,280 pooled ones of EfficientNet-Lite0, of images enlarged to 224x224 with
    antialiasing; gray images fill three channels. It gives no class probabilities: an Inception
    score of another network's classes would be one in name alone.

    Args:
        image_range: "correct" or "paper".
        device: that computes.

    Raises:
        FileNotFoundError: the package of the weights is not installed.
        ValueError: its file is another one.
    """
    file = check_pretrained(
        "eval.extractor=efficientnet", "eval.extractor=classifier, which needs no file"
    )
    model = pretrained_efficientnet(file, device)

    def network(images: Tensor) -> tuple[Tensor, Tensor | None]:
        parts = torch.split(images, ENLARGED_AT_ONCE)
        return torch.cat([model(enlarged(normalize(part)))[0] for part in parts]), None

    return FeatureExtractor(
        "efficientnet", WEIGHTS_SHA256, image_range, network, torch.device(device)
    )


def cached_classifier(config: Config, train: ImageSet, device: str | torch.device) -> nn.Sequential:
    """Train the classifier on images, or take it from the cache if it was trained on them before.

    The cache's key is a hash of the images, the labels and all that decides about the training,
    so that no setting of a data set can be forgotten in it.

    Args:
        config: its classes, `data.horizontal_flip`, `eval.seed` and `data.cache_dir` count.
        train: the images; labels are numbers of the configuration's classes.
        device: that trains and holds the classifier.

    Raises:
        ValueError: see `task.evaluation.classifier.train_classifier`.
    """
    num_classes = len(config.data.classes)
    settings: dict[str, Any] = {
        "num_classes": num_classes,
        "horizontal_flip": config.data.horizontal_flip,
        "seed": config.eval.seed,
    }
    recipe = (
        *(WIDTHS, classifier.BATCH_SIZE, classifier.MAX_LR, classifier.WEIGHT_DECAY),
        *(classifier.MAX_EPOCHS, classifier.MAX_STEPS),
    )
    kinds = {**settings, "device": torch.device(device).type}
    key = _key((recipe, sorted(kinds.items())), train.images, train.labels)
    file = Path(config.data.cache_dir) / f"classifier-{key[:32]}.safetensors"
    weights = _stored(file)
    if weights is None:
        model = classifier.train_classifier(train, **settings, device=device)
        _store(file, model.state_dict(), key)
        return model
    _, channels, image_size, _ = train.images.shape
    # Modules draw their first weights, of no use here, from the global generator.
    with torch.random.fork_rng(devices=[]):
        model = convolutional_network(channels, image_size, num_classes)
    model.load_state_dict(weights)
    return model.to(device).eval()


def cached_features(
    extractor: FeatureExtractor,
    images: Tensor,
    *,
    batch_size: int | None = None,
    cache_dir: Path,
) -> Features:
    """Look at images through an extractor, or take what it found in them before from the cache.

    Args:
        extractor: see `build_extractor`.
        images: [N, C, H, W] uint8.
        batch_size: images at a time, see `extract`.
        cache_dir: folder of the cache, made if need be.

    Raises:
        ValueError: see `extract`.
    """
    told = (extractor.name, extractor.sha256, extractor.image_range, extractor.device.type)
    key = _key(told, images)
    file = cache_dir / f"features-{key[:32]}.safetensors"
    stored = _stored(file)
    if stored is None:
        found = extract(extractor, images, batch_size=batch_size)
        seen = {"features": found.features, "probabilities": found.probabilities}
        _store(file, {name: t for name, t in seen.items() if t is not None}, key)
        return found
    tensors = {name: tensor.to(extractor.device) for name, tensor in stored.items()}
    return Features(tensors["features"], tensors.get("probabilities"))


def _store(file: Path, tensors: Mapping[str, Tensor], key: str) -> None:
    """Keep what was computed; a machine without such a folder computes it each time."""
    try:
        file.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        save_weights(file, tensors, {"key": key})
    except OSError as error:
        _log.warning("data.cache_dir cannot be written, and nothing is kept: %s", error)


def _stored(file: Path) -> dict[str, Tensor] | None:
    """Return what a file of the cache holds; None where there is none, or a damaged one."""
    try:
        return load_weights(file)[0] if file.exists() else None
    except (OSError, ValueError) as error:
        _log.warning("A file of data.cache_dir cannot be read and is made anew: %s", error)
        return None


def _key(told: object, *tensors: Tensor) -> str:
    digest = hashlib.sha256(repr(told).encode())
    for tensor in tensors:
        digest.update(repr(tuple(tensor.shape)).encode())
        digest.update(tensor.contiguous().numpy().data)
    return digest.hexdigest()


def weights_sha256(weights: Mapping[str, Tensor]) -> str:
    """Hash tensors by name, dtype, shape and value; the order does not count."""
    digest = hashlib.sha256()
    for name, tensor in sorted(weights.items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\0".encode())
        digest.update(tensor.detach().cpu().contiguous().numpy().data)
    return digest.hexdigest()


def exported_extractor(
    program: Path, *, image_range: str, device: str | torch.device
) -> FeatureExtractor:
    """Make an extractor of a program that `torch.export.save` wrote.

    Only for a program that you trust as you trust code: `torch.export.load` unpickles weights of
    unusual layout, constants and, where safe loading fails, example inputs (torch 2.15, as its
    documentation warns). So the path comes from the operator's own configuration and never from
    a message or a run directory of someone else.

    The program takes one argument, images [N, C, H, W] with N dynamic: uint8 as they are, or
    float32 in [-1, 1], as its own input's dtype says. It returns features [N, D], or features
    and logits [N, K]. Gray images fill the channels that it takes.

    Args:
        program: the file.
        image_range: "correct" or "paper".
        device: that computes; the program's weights are moved to it.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is no such program.
    """
    if not program.is_file():
        raise FileNotFoundError(
            f"eval.exported_program={program}: there is no such file; save a network there with "
            "torch.export.save, or choose eval.extractor=classifier, which needs no file"
        )
    content = program.read_bytes()
    try:
        loaded = torch.export.load(io.BytesIO(content))
    except (RuntimeError, ValueError, KeyError, zipfile.BadZipFile) as error:
        raise ValueError(
            f"eval.exported_program must be a file that torch.export.save wrote, got {program}: "
            f"{error}"
        ) from error
    inputs = {
        node.name: node.meta["val"] for node in loaded.graph.nodes if node.op == "placeholder"
    }
    names = loaded.graph_signature.user_inputs
    example = inputs[names[0]] if len(names) == 1 else None
    name = f"eval.exported_program={program}"
    if not isinstance(example, Tensor) or example.ndim != 4:
        raise ValueError(f"{name} must take one argument, images [N, C, H, W], got {len(names)}")
    require(
        not isinstance(example.shape[0], int),
        name,
        "exported with a dynamic batch (dynamic_shapes=({0: torch.export.Dim.DYNAMIC},))",
        tuple(example.shape),
    )
    channels, as_uint8 = int(example.shape[1]), example.dtype == torch.uint8
    from torch.export.passes import move_to_device_pass

    model = move_to_device_pass(loaded, torch.device(device)).module()

    def network(images: Tensor) -> tuple[Tensor, Tensor | None]:
        images = _colored(images, channels)
        output = model(images if as_uint8 else normalize(images))
        return (output, None) if isinstance(output, Tensor) else (output[0], output[1])

    sha256 = hashlib.sha256(content).hexdigest()
    return FeatureExtractor("exported", sha256, image_range, network, torch.device(device))


def _colored(images: Tensor, channels: int) -> Tensor:
    if images.shape[1] == channels:
        return images
    require(images.shape[1] == 1, "images", f"of 1 or {channels} channels", images.shape[1])
    return images.expand(-1, channels, -1, -1)
