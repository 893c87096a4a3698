"""The classifier that hospitals train together."""

import math

import pytest
import torch

from task.config import load_config
from task.efficientnet import NUM_FEATURES, pretrained_efficientnet, pretrained_file
from task.efficientnet import enlarged as to_its_size
from task.generators.base import Batch
from task.generators.classifier import Classifier
from task.generators.registry import initial_generator, weightless_generator

SMALL = ["model=classifier", "model.network=small"]


def made(*words: str) -> Classifier:
    generator = initial_generator(load_config(words))
    assert isinstance(generator, Classifier)
    return generator


def test_loss_is_cross_entropy_and_accuracy_the_share_of_right_answers() -> None:
    model = made(*SMALL).eval()
    images = torch.randn(6, 1, 16, 16, generator=torch.Generator().manual_seed(0)).clamp(-1, 1)
    logits = model.logits(images).detach()
    labels = logits.argmax(1)
    labels[:2] = (labels[:2] + 1) % 10
    batch = Batch(images, labels, torch.arange(6))
    found = model.example_losses(batch, torch.Generator())
    assert found["accuracy"].tolist() == [0, 0, 1, 1, 1, 1]
    for one, label, loss in zip(
        logits.tolist(), labels.tolist(), found["loss"].tolist(), strict=True
    ):
        expected = math.log(sum(map(math.exp, one))) - one[label]
        assert loss == pytest.approx(expected, rel=1e-5)
    model.start()
    ((name, losses),) = model.losses(batch, torch.Generator())
    assert name in model.optimizers(0.1) and torch.equal(losses, found["loss"])
    assert float(model.measured()["accuracy"]) == pytest.approx(4 / 6)


@pytest.mark.skipif(pretrained_file() is None, reason="the extra pretrained is not installed")
@pytest.mark.parametrize("fine_tuning", ["head", "last_blocks", "all", "discriminative"])
def test_parts_of_efficientnet_look_as_the_whole_and_train_what_is_asked(
    fine_tuning: str,
) -> None:
    model = made("model=classifier", f"model.fine_tuning={fine_tuning}")
    file = pretrained_file()
    assert file is not None
    whole = pretrained_efficientnet(file, "cpu")
    images = torch.rand(2, 1, 16, 16, generator=torch.Generator().manual_seed(0)) * 2 - 1
    with torch.no_grad():
        expected = whole(to_its_size(images))[0]
        assert torch.allclose(model.trained(model.below(images)), expected, atol=1e-4)
    shared = model.num_parameters
    body = sum(each.numel() for name, each in whole.named_parameters() if "classes" not in name)
    head = 10 * (NUM_FEATURES + 1)
    frozen = {name for name in model.state_dict() if name.startswith(tuple(model.frozen or "?"))}
    if fine_tuning == "head":
        assert shared == head and len(frozen) == len(model.state_dict()) - 2
    elif fine_tuning == "last_blocks":
        assert head < shared < head + body / 2 and frozen
    else:
        assert shared == head + body and not frozen
    (optimizer,) = model.optimizers(0.01).values()
    by_rate = {group["lr"] for group in optimizer.param_groups}
    assert by_rate == ({0.01, 0.001} if fine_tuning == "discriminative" else {0.01})
    # A step moves what is trained, and nothing else.
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    model.train()
    batch = Batch(images, torch.tensor([0, 1]), torch.arange(2))
    ((_, losses),) = model.losses(batch, torch.Generator())
    losses.mean().backward()
    optimizer.step()
    moved = {n for n, tensor in model.state_dict().items() if not torch.equal(tensor, before[n])}
    assert {"head.weight", "head.bias"} <= moved and not moved & frozen
    assert any(name.startswith("trained.") for name in moved) == (fine_tuning != "head")


def test_nothing_is_drawn_and_values_that_ask_for_it_are_refused() -> None:
    config = load_config(SMALL)
    assert config.diffusion is None and config.eval.num_images == 0
    with pytest.raises(ValueError, match="a classifier draws no images"):
        weightless_generator(config).sample(torch.zeros(1), lambda: torch.zeros(1))
    for word, message in (
        ("eval.num_images=100", "eval.num_images must be left out with model.family=classifier"),
        ("eval.final_metrics=true", "eval.final_metrics must be left out"),
        ("model.fine_tuning=all", "model.fine_tuning must be left out with model.network=small"),
    ):
        with pytest.raises(ValueError, match=message):
            load_config([*SMALL, word])
