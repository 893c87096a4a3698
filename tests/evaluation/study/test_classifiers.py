from pathlib import Path

import pytest
import torch
from torchvision import models

from task.config.study_config import load_study_config
from task.efficientnet import MissingWeightsError, pretrained_file
from task.evaluation.study.classifiers import ClassifierKind, build_classifier

IMAGES = torch.rand(2, 1, 16, 16, generator=torch.Generator().manual_seed(0)) * 2 - 1


def build(*words: str) -> ClassifierKind:
    study = load_study_config([f"study.{word}" for word in words])
    return build_classifier(
        study, channels=1, image_size=16, num_classes=3, device=torch.device("cpu")
    )


def trained(kind: ClassifierKind) -> int:
    network = kind.make()
    with torch.no_grad():
        assert network.train()(kind.frozen(IMAGES)).shape == (2, 3)
    groups = kind.parameter_groups(network)
    return sum(each.numel() for group in groups for each in group["params"])  # type: ignore[attr-defined]


@pytest.mark.skipif(pretrained_file() is None, reason="the extra pretrained is not installed")
def test_fine_tuning_trains_as_much_of_efficientnet_as_it_says() -> None:
    sizes = {
        each: trained(build("classifier=efficientnet", f"fine_tuning={each}"))
        for each in ("head", "last_blocks", "all")
    }
    assert sizes["head"] == 3 * 1280 + 3
    assert sizes["head"] < sizes["last_blocks"] < sizes["all"]
    # All parts see the same at the start.
    features = [
        build("classifier=efficientnet", f"fine_tuning={each}") for each in ("head", "last_blocks")
    ]
    said = [each.make()[0](each.frozen(IMAGES)) for each in features]  # type: ignore[index]
    torch.testing.assert_close(said[0], said[1])
    rates = build("classifier=efficientnet", "fine_tuning=discriminative")
    groups = rates.parameter_groups(rates.make())
    assert [group["lr"] for group in groups] == pytest.approx([3e-4, 3e-5])


def test_network_of_torchvision_is_read_from_a_file_and_keeps_its_statistics(
    tmp_path: Path,
) -> None:
    torch.manual_seed(0)
    network = models.resnet18()
    file = tmp_path / "resnet18.pth"
    torch.save(network.state_dict(), file)
    words = ("classifier=resnet18", f"weights={file}")
    assert trained(build(*words)) == 3 * 512 + 3
    kind = build(*words, "fine_tuning=last_blocks")
    made = kind.make().train()
    before = {name: each.clone() for name, each in made.named_buffers()}
    made(kind.frozen(IMAGES))
    assert all(torch.equal(each, before[name]) for name, each in made.named_buffers())
    other = tmp_path / "other.pth"
    torch.save(models.resnet18().state_dict(), other)
    assert build("classifier=resnet18", f"weights={other}").sha256 != kind.sha256
    assert trained(build(*words)) < trained(kind) < trained(build(*words, "fine_tuning=all"))


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("classifier=resnet18",), "study.weights must be the file of the weights of resnet18"),
        (("weights=x.pth",), "study.weights must be left out with study.classifier=auto"),
        (("classifier=nothing", "weights=x.pth"), "a network of torchvision, such as resnet18"),
        (("classifier=resnet18", "weights=no.pth"), "study.weights: no.pth: there is no such file"),
        (("ratios=[0]",), "study.ratios must be a list, each element > 0, got"),
        (("real_fractions=[2]",), r"study.real_fractions must be each in \(0, 1\], got 2"),
        (("val_fraction=1.0",), r"study.val_fraction must be in \(0, 1\), got 1.0"),
        (("nonsense=1",), "no such value: study.nonsense"),
        (("classifier=small", "fine_tuning=all"), "study.fine_tuning must be left out with"),
        (("fine_tuning=some",), "study.fine_tuning must be one of head, last_blocks"),
    ],
)
def test_wrong_values_are_named(words: tuple[str, ...], message: str) -> None:
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        build(*words)


def test_file_of_other_weights_is_refused(tmp_path: Path) -> None:
    torch.save({"x": torch.zeros(1)}, tmp_path / "other.pth")
    with pytest.raises(ValueError, match="holds no weights of resnet18"):
        build("classifier=resnet18", f"weights={tmp_path / 'other.pth'}")


def test_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("task.efficientnet.pretrained_file", lambda: None)
    with pytest.raises(MissingWeightsError, match=r"study\.classifier=small"):
        build("classifier=efficientnet")
