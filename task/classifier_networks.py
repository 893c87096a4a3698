"""Networks that name the class of an image: a small one, and EfficientNet in two parts."""

from torch import Tensor, nn
from torch.nn import functional as F

from task.checks import require
from task.config import FineTuning
from task.efficientnet import EfficientNet, enlarged, standardized

WIDTHS = (32, 64, 128)
# Blocks that fine_tuning=last_blocks trains.
LAST_BLOCKS = 2
# Of the learning rate, that of the pre-trained layers with fine_tuning=discriminative.
LOWER_SHARE = 0.1


def convolutional_network(channels: int, image_size: int, num_classes: int) -> nn.Sequential:
    """Make the untrained classifier: three convolutions with pooling, then one linear layer.

    Args:
        channels: of the images.
        image_size: height and width, at least 8.
        num_classes: number of logits.

    Raises:
        ValueError: the images are too small to be pooled.
    """
    layers: list[nn.Module] = []
    for inner, outer in zip((channels, *WIDTHS), WIDTHS, strict=False):
        # The normalization has a bias of its own.
        layers += [nn.Conv2d(inner, outer, 3, padding=1, bias=False), nn.BatchNorm2d(outer)]
        layers += [nn.ReLU(), nn.MaxPool2d(2)]
    side = image_size // 2 ** len(WIDTHS)
    require(side > 0, "data.image_size", f"at least {2 ** len(WIDTHS)}", image_size)
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(WIDTHS[-1] * side**2, num_classes))


class Lower(nn.Module):
    """EfficientNet up to a block, and the enlarging before it."""

    def __init__(self, network: EfficientNet, num_blocks: int) -> None:
        """Take the layers of a network, which it shares with it."""
        super().__init__()
        self.stem, self.blocks = network.stem, nn.Sequential(*network.blocks[:num_blocks])

    def forward(self, images: Tensor) -> Tensor:
        """Map images [N, 1 or 3, H, W] float in [-1, 1] to what the last of its blocks says."""
        found: Tensor = self.blocks(F.relu6(self.stem(standardized(enlarged(images)))))
        return found


class Upper(nn.Module):
    """EfficientNet from a block on, but for its classes."""

    def __init__(self, network: EfficientNet, num_below: int) -> None:
        """Take the layers of a network above so many blocks, which it shares with it."""
        super().__init__()
        self.blocks, self.head = nn.Sequential(*network.blocks[num_below:]), network.head

    def forward(self, x: Tensor) -> Tensor:
        """Map what the block below says to features [N, 1280]."""
        return F.relu6(self.head(self.blocks(x))).mean((2, 3))


def efficientnet_parts(
    network: EfficientNet, fine_tuning: FineTuning
) -> tuple[nn.Sequential, nn.Sequential]:
    """Part a network into what stays as it is and what is trained below a new last layer.

    Args:
        network: whose layers the parts share.
        fine_tuning: "head" (neither part is trained), "last_blocks", "all" or "discriminative".

    Returns:
        The frozen part and the trained one, either of which may be empty; together they map images
        to features [N, 1280].
    """
    number = len(network.blocks)
    num_below = {"head": number, "last_blocks": number - LAST_BLOCKS}.get(fine_tuning, 0)
    frozen, trained = nn.Sequential(), nn.Sequential()
    (frozen if num_below else trained).append(Lower(network, num_below or number))
    (frozen if num_below == number else trained).append(Upper(network, num_below or number))
    return frozen.requires_grad_(False), trained.requires_grad_(True)
