"""EfficientNet-Lite0 with its published weights, on photographs that scikit-learn carries."""

import sys
from pathlib import Path

import pytest
import torch
from sklearn.datasets import load_sample_images
from torch import Tensor
from torchvision.transforms.functional import gaussian_blur

from task import efficientnet
from task.config import load_config, settle_extractor
from task.data import ImageSet, normalize
from task.efficientnet import (
    EfficientNet,
    check_pretrained,
    enlarged,
    pretrained_efficientnet,
)
from task.evaluation.features import (
    automatic_extractor,
    build_extractor,
    efficientnet_extractor,
    extract,
)
from task.protocol.node import NodeConfig, check_extractor

# Of ImageNet's classes.
PALACE, DAISY = 698, 985


@pytest.fixture(scope="module")
def network() -> EfficientNet:
    return pretrained_efficientnet(check_pretrained("a test", "another"), "cpu")


@pytest.fixture(scope="module")
def photographs() -> Tensor:
    """Squares of a palace in China and of a flower, [2, 3, 427, 427] uint8."""
    found = [torch.tensor(image).permute(2, 0, 1) for image in load_sample_images().images]
    return torch.stack(found)[..., :427, 100:527]


def without_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, efficientnet.MODULE, None)
    monkeypatch.setattr(efficientnet.importlib.util, "find_spec", lambda _: None)


@torch.no_grad()
def test_classes_of_photographs_are_found(network: EfficientNet, photographs: Tensor) -> None:
    features, logits = network(enlarged(normalize(photographs)))
    assert logits.argmax(1).tolist() == [PALACE, DAISY]
    assert features.shape == (2, 1280) and features.min() >= 0
    assert sum(weight.numel() for weight in network.parameters()) == 4_631_000


@torch.no_grad()
def test_network_is_that_of_another_implementation(
    network: EfficientNet, photographs: Tensor
) -> None:
    from efficientnet_lite_pytorch import EfficientNet as Other

    with torch.random.fork_rng():
        other = Other.from_name("efficientnet-lite0")
    file = check_pretrained("a test", "another")
    other.load_state_dict(torch.load(file, weights_only=True))
    images = enlarged(normalize(photographs))
    expected = other.eval()(((images + 1) * 127.5 - 127) / 128)
    torch.testing.assert_close(network(images)[1], expected, rtol=1e-4, atol=1e-4)


def test_maps_of_five_depths_tell_how_unlike_images_look(
    network: EfficientNet, photographs: Tensor
) -> None:
    images = enlarged(normalize(photographs), 64).contiguous().requires_grad_()
    maps = network.maps(images)
    assert [tuple(each.shape[1:]) for each in maps] == [
        (channels, side, side)
        for channels, side in ((16, 32), (24, 16), (40, 8), (112, 4), (320, 2))
    ]
    sum(each.abs().mean() for each in maps).backward()
    assert images.grad is not None and images.grad.abs().amax((1, 2, 3)).min() > 0
    assert all(weight.grad is None for weight in network.parameters())
    with torch.no_grad():
        blurred = [network.maps(gaussian_blur(images, [9, 9], [sigma])) for sigma in (0.5, 1.0)]
        for real, slightly, strongly in zip(maps, *blurred, strict=True):
            assert 0 < (real - slightly).abs().mean() < (real - strongly).abs().mean()


def test_odd_sides_are_rounded_up(network: EfficientNet) -> None:
    with torch.no_grad():
        maps = network.maps(torch.zeros(1, 3, 33, 47))
    sides = [tuple(each.shape[2:]) for each in maps]
    assert sides == [(17, 24), (9, 12), (5, 6), (3, 3), (2, 2)]


def test_extractor_sees_gray_images_in_three_channels_and_parts_as_one(
    photographs: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    extractor = efficientnet_extractor(image_range="correct", device="cpu")
    gray = photographs[:, :1, ::13, ::13]
    found = extract(extractor, gray)
    assert found.probabilities is None and found.features.shape == (2, 1280)
    monkeypatch.setattr("task.evaluation.features.ENLARGED_AT_ONCE", 1)
    again = extract(extractor, gray.expand(-1, 3, -1, -1))
    torch.testing.assert_close(again.features, found.features, rtol=1e-4, atol=1e-4)
    assert (extractor.name, extractor.sha256[:8]) == ("efficientnet", "57934424")
    with pytest.raises(ValueError, match="images must be of 1 or 3 channels, got 2"):
        extract(extractor, photographs[:, :2])


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["data=digits"], "classifier"),
        (["data=fashion_mnist"], "efficientnet"),
        (["data=fashion_mnist", "data.image_size=24"], "classifier"),
        (["data=cifar10", "data.image_size=16"], "efficientnet"),
        (["data=cifar10", "eval.extractor=inception"], "inception"),
        (["experiment=table1"], "classifier"),
    ],
)
def test_automatic_extractor_suits_the_images_and_what_is_installed(
    words: list[str], expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = load_config(words)
    assert settle_extractor(config, automatic_extractor(config)).eval.extractor == expected
    without_package(monkeypatch)
    assert automatic_extractor(config) == "classifier"


def test_missing_package_is_said_with_what_installs_it(monkeypatch: pytest.MonkeyPatch) -> None:
    without_package(monkeypatch)
    config = load_config(["eval.extractor=efficientnet"])
    none = ImageSet(torch.zeros(0, 1, 8, 8, dtype=torch.uint8), torch.zeros(0, dtype=torch.int64))
    with pytest.raises(
        FileNotFoundError,
        match=r"^eval\.extractor=efficientnet needs .*feddm\[pretrained\].*extractor=classifier",
    ):
        build_extractor(config, none, "cpu")


def test_node_that_is_to_score_says_what_is_missing_before_training(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    scoring = load_config(["eval.extractor=efficientnet"])
    check_extractor(scoring, NodeConfig())
    without_package(monkeypatch)
    with pytest.raises(FileNotFoundError, match=r"feddm\[pretrained\].*score-images=false"):
        check_extractor(scoring, NodeConfig())
    check_extractor(scoring, NodeConfig(score_images=False))
    check_extractor(scoring.changed({"eval.num_images": 0}), NodeConfig())
    check_extractor(load_config(), NodeConfig())


def test_other_weights_are_refused(tmp_path: Path) -> None:
    file = tmp_path / "other.pth"
    torch.save({}, file)
    with pytest.raises(ValueError, match=r"must be a file of SHA-256 57934424.*other\.pth of SHA"):
        pretrained_efficientnet(file, "cpu")
