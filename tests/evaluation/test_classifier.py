import pytest
import torch
from torch import nn

from task.data import Dataset, ImageSet, normalize
from task.evaluation.classifier import accuracy, classify, convolutional_network, train_classifier
from tests.helpers import digits_dataset


@pytest.fixture(scope="module")
def digits() -> Dataset:
    return digits_dataset(image_size=16, test_fraction=0.1)


def train(images: ImageSet, seed: int = 0, horizontal_flip: bool = False) -> nn.Module:
    return train_classifier(
        images, num_classes=10, horizontal_flip=horizontal_flip, seed=seed, device="cpu"
    )


def weights(model: nn.Module) -> torch.Tensor:
    return torch.cat([value.double().flatten() for value in model.state_dict().values()])


@pytest.mark.slow
def test_classifier_reads_digits_it_has_not_seen(digits: Dataset) -> None:
    model = train(digits.train)
    assert accuracy(model, digits.test.images, digits.test.labels) >= 0.97
    assert not model.training


@pytest.mark.parametrize("horizontal_flip", [False, True])
def test_train_classifier_follows_the_seed_and_no_global_generator(
    digits: Dataset, horizontal_flip: bool
) -> None:
    few = digits.train.subset(torch.arange(50))
    state = torch.get_rng_state()
    first = weights(train(few, horizontal_flip=horizontal_flip))
    assert torch.equal(torch.get_rng_state(), state)
    torch.rand(1)
    assert torch.equal(weights(train(few, horizontal_flip=horizontal_flip)), first)
    assert not torch.equal(weights(train(few, 1, horizontal_flip)), first)
    assert not torch.equal(weights(train(few, 0, not horizontal_flip)), first)


def test_classify_does_not_depend_on_the_batch_size(digits: Dataset) -> None:
    model = convolutional_network(1, 16, 10).eval()
    images = digits.test.images
    expected = model(normalize(images)).argmax(1)
    for batch_size in (1, 50, 1000):
        assert torch.equal(classify(model, images, batch_size=batch_size), expected)


def test_accuracy_is_the_share_of_right_answers(digits: Dataset) -> None:
    model = convolutional_network(1, 16, 10)
    images = digits.test.images[:8]
    labels = classify(model, images)
    assert accuracy(model, images, labels) == 1
    labels[:2] = (labels[:2] + 1) % 10
    assert accuracy(model, images, labels) == 0.75


def test_one_image_of_any_shape_is_enough_to_train() -> None:
    one = ImageSet(torch.zeros(1, 3, 8, 8, dtype=torch.uint8), torch.tensor([3]))
    assert torch.isfinite(weights(train(one))).all()


def test_wrong_input_is_refused(digits: Dataset) -> None:
    empty = digits.train.subset(torch.arange(0))
    with pytest.raises(ValueError, match="train must be at least one image"):
        train(empty)
    with pytest.raises(ValueError, match="labels must be below num_classes=9"):
        train_classifier(digits.train, num_classes=9, horizontal_flip=False, seed=0, device="cpu")
    with pytest.raises(ValueError, match="labels must be one per image"):
        accuracy(convolutional_network(1, 16, 10), digits.test.images, digits.test.labels[1:])
    with pytest.raises(ValueError, match="labels must be one per image"):
        accuracy(convolutional_network(1, 16, 10), empty.images, empty.labels)
    with pytest.raises(ValueError, match=r"data\.image_size must be at least 8"):
        convolutional_network(1, 4, 10)
