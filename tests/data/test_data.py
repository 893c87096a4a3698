from pathlib import Path

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits
from torch import Tensor
from torchvision import datasets, transforms

from task.config import hydra_override, load_config
from task.data import (
    Dataset,
    ImageSet,
    build_dataset,
    normalize,
    packaged,
    random_horizontal_flip,
    resize,
    split_validation,
)
from task.data import images as images_module
from task.data.packaged import load_packaged
from task.data.source import describe_source, hash_images

NINE = list("abcdefghi")
SHARED = Path(__file__).resolve().parents[3] / "shared" / "data"
needs_fashion_mnist = pytest.mark.skipif(
    not (SHARED / "FashionMNIST").is_dir(), reason=f"no FashionMNIST in {SHARED}"
)


def load(name: str, root: Path = SHARED, **options: object) -> Dataset:
    values = {"root": str(root), "image_size": 32, "channels": 1, **options}
    words = [hydra_override(f"data.{key}", value) for key, value in values.items()]
    return build_dataset(load_config([f"data={name}", *words]), download=True)


def pretend(monkeypatch: pytest.MonkeyPatch, name: str, found: object) -> None:
    kind, *_ = packaged.TORCHVISION_SETS[name]
    monkeypatch.setattr(datasets, kind, lambda *_, **__: found)


def test_digits_keep_every_image_once_and_their_pixels() -> None:
    digits = load("digits", image_size=8)
    everything = torch.cat([digits.train.images, digits.test.images]).flatten(1)
    expected = np.rint(load_digits().data * 255 / 16).astype(np.uint8)
    assert sorted(map(bytes, everything.numpy())) == sorted(map(bytes, expected))
    assert everything.max() == 255


def test_hash_tells_images_apart_and_not_their_order_or_their_split() -> None:
    train, test = load("digits", test_fraction=0.1).train, load("digits", test_fraction=0.1).test
    hashes = hash_images(Dataset(train, test))
    backwards = train.subset(torch.arange(len(train)).flip(0))
    assert hash_images(Dataset(backwards, test)) == hashes
    swapped = hash_images(Dataset(test, train))
    assert swapped["all"] == hashes["all"] and swapped["train"] != hashes["train"]
    pixel = train.images.clone()
    pixel[0, 0, 0, 0] ^= 1
    label = train.labels.clone()
    label[0] = (label[0] + 1) % 10
    for other in (ImageSet(pixel, train.labels), ImageSet(train.images, label)):
        assert hash_images(Dataset(other, test))["all"] != hashes["all"]


def test_source_names_a_folder_without_its_path() -> None:
    words = ["data=image_folder", "data.classes=[a]", "data.root=/hospital/ward/eyes"]
    assert describe_source(load_config(words).data) == "folder eyes"


def test_digits_split_is_stratified() -> None:
    digits = load("digits")
    held_out, everything = digits.test.labels.bincount(), np.bincount(load_digits().target)
    assert np.abs(held_out.numpy() - everything / 10).max() <= 0.5


def test_digits_split_follows_the_seed() -> None:
    first, again, other = (load("digits", split_seed=seed).test.images for seed in (0, 0, 1))
    assert torch.equal(first, again)
    assert not torch.equal(first[:100], other[:100])


def test_build_dataset_reads_the_configuration() -> None:
    digits = build_dataset(load_config(["experiment=demo"]), download=False)
    assert digits.train.images.shape[1:] == (1, 16, 16)
    assert len(digits.train) + len(digits.test) == 1797


@needs_fashion_mnist
def test_fashion_mnist_is_read_whole_and_resized() -> None:
    fashion = load("fashion_mnist")
    assert fashion.train.images.shape == (3000, 1, 32, 32)
    assert fashion.test.images.shape == (615, 1, 32, 32)
    assert fashion.train.labels[:8].tolist() == [9, 0, 0, 3, 0, 2, 7, 2]


@needs_fashion_mnist
def test_fashion_mnist_of_the_right_size_keeps_its_pixels() -> None:
    expected = datasets.FashionMNIST(SHARED, train=False)
    words = ["data=fashion_mnist", f"data.root={SHARED}", "data.channels=1"]
    # No network takes this size, so no configuration does.
    data = load_config(words).data.model_copy(update={"image_size": 28})
    found = load_packaged(data, download=False).test
    assert torch.equal(found.images[:, 0], expected.data)
    assert torch.equal(found.labels, expected.targets)


@needs_fashion_mnist
def test_gray_images_fill_three_channels() -> None:
    images = load("fashion_mnist", channels=3).test.images
    assert images.shape[1] == 3
    assert torch.equal(images[:, 0], images[:, 1]) and torch.equal(images[:, 0], images[:, 2])


def test_cifar10_arrays_become_channels_first(monkeypatch: pytest.MonkeyPatch) -> None:
    class Found:
        data = np.random.default_rng(0).integers(0, 256, (20, 32, 32, 3), dtype=np.uint8)
        targets = [*range(10)] * 2

    pretend(monkeypatch, "cifar10", Found)
    train = load("cifar10", channels=3).train
    assert train.images.shape == (20, 3, 32, 32) and train.images.is_contiguous()
    assert train.images[4, 2, 5, 6] == Found.data[4, 5, 6, 2]
    assert train.labels.tolist() == Found.targets


def test_svhn_arrays_are_channels_first_already(monkeypatch: pytest.MonkeyPatch) -> None:
    class Found:
        data = np.random.default_rng(0).integers(0, 256, (10, 3, 32, 32), dtype=np.uint8)
        labels = np.arange(10)

    pretend(monkeypatch, "svhn", Found)
    test = load("svhn", channels=3).test
    assert np.array_equal(test.images, Found.data)
    assert test.labels.tolist() == [*range(10)]


def test_color_is_never_dropped(monkeypatch: pytest.MonkeyPatch) -> None:
    class Found:
        data = np.zeros((10, 3, 32, 32), np.uint8)
        labels = np.arange(10)

    pretend(monkeypatch, "svhn", Found)
    with pytest.raises(ValueError, match=r"data\.channels must be 3"):
        load("svhn", channels=1)


@pytest.mark.parametrize("name", ["mnist", "fashion_mnist", "cifar10", "svhn"])
def test_missing_files_are_named_with_a_way_out(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for variable in ("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY"):
        monkeypatch.setenv(variable, "http://127.0.0.1:9")
    for variable in ("no_proxy", "NO_PROXY"):
        monkeypatch.delenv(variable, raising=False)
    with pytest.raises(FileNotFoundError) as caught:
        load(name, tmp_path)
    _, folder, files = packaged.TORCHVISION_SETS[name]
    message = str(caught.value)
    assert "data.root" in message and str((tmp_path / folder).resolve()) in message
    assert all(file in message for file in files)
    assert "data=digits" in message


@pytest.mark.parametrize("size", [0, 7, 100])
def test_damaged_files_are_named(tmp_path: Path, size: int) -> None:
    _, folder, files = packaged.TORCHVISION_SETS["mnist"]
    (tmp_path / folder).mkdir(parents=True)
    for file in files:
        header = bytes([0, 0, 8, 3, *(0, 0, 0, 9) * 3])
        (tmp_path / folder / file).write_bytes(header.ljust(100, b"x")[:size])
    with pytest.raises(FileNotFoundError, match=r"data\.root.*missing or damaged"):
        load("mnist", tmp_path)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"name": "digits", "test_fraction": None}, r"data\.test_fraction must be"),
        ({"name": "mnist", "test_fraction": 0.1}, r"data\.test_fraction must be null"),
        ({"name": "digits", "classes": NINE}, r"data\.classes must be at least 10 names.*got 9"),
    ],
)
def test_options_that_do_not_fit_are_refused(options: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        load(**options)


def test_image_set_refuses_other_types_and_shapes() -> None:
    images, labels = torch.zeros(3, 1, 8, 8, dtype=torch.uint8), torch.zeros(3).long()
    with pytest.raises(TypeError, match=r"torch\.float32"):
        ImageSet(images.float(), labels)
    with pytest.raises(ValueError, match="labels must be"):
        ImageSet(images, labels[:2])
    with pytest.raises(ValueError, match="images must be"):
        ImageSet(images[:, 0], labels)
    with pytest.raises(ValueError, match="groups must be"):
        ImageSet(images, labels, labels[:2])


def test_subset_keeps_order_and_pairs() -> None:
    images = torch.arange(4, dtype=torch.uint8)[:, None, None, None].expand(4, 1, 8, 8)
    chosen = ImageSet(images, torch.arange(4)).subset(np.array([3, 1]))
    assert chosen.labels.tolist() == chosen.images[:, 0, 0, 0].tolist() == [3, 1]
    assert len(chosen) == 2 and chosen.groups is None
    grouped = ImageSet(images, torch.arange(4), torch.tensor([5, 5, 6, 7])).subset(np.array([3, 1]))
    assert grouped.groups is not None and grouped.groups.tolist() == [7, 5]


@pytest.mark.parametrize(("before", "after"), [(28, 32), (64, 32), (8, 16)])
def test_resize_matches_torchvision_without_antialiasing(before: int, after: int) -> None:
    images = torch.randint(0, 256, (5, 3, before, before), dtype=torch.uint8)
    expected = transforms.Resize(after, antialias=False)(images.float())
    assert (resize(images, after).float() - expected).abs().max() <= 0.5 + 1e-4


def test_resize_in_chunks_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    images = torch.randint(0, 256, (7, 1, 8, 8), dtype=torch.uint8)
    expected = resize(images, 16)
    monkeypatch.setattr(images_module, "RESIZE_CHUNK", 2)
    assert torch.equal(resize(images, 16), expected)
    assert resize(images, 8) is images


@pytest.mark.parametrize("fraction", [0.01, 0.1, 0.5, 0.99])
def test_split_validation_covers_every_index_once_and_every_class(fraction: float) -> None:
    sizes = np.array([1, 2, 3, 100])
    labels = np.random.default_rng(0).permutation(np.repeat(np.arange(4), sizes))
    train, held_out = split_validation(labels, fraction, generator=np.random.default_rng(1))
    assert sorted([*train, *held_out]) == [*range(106)]
    expected = [0, 1, min(max(round(3 * fraction), 1), 2), round(100 * fraction)]
    assert np.bincount(labels[held_out], minlength=4).tolist() == expected


@pytest.mark.parametrize("seed", range(5))
def test_split_validation_never_divides_a_group(seed: int) -> None:
    random = np.random.default_rng(seed)
    groups, labels = random.integers(0, 60, 150) * 7, random.integers(0, 4, 150)
    train, held_out = split_validation(labels, 0.3, generator=random, groups=groups)
    assert sorted([*train, *held_out]) == [*range(150)]
    assert not set(groups[train]) & set(groups[held_out])
    share = len(set(groups[held_out])) / len(set(groups))
    assert share == pytest.approx(0.3, abs=0.04)


def test_split_validation_counts_a_group_to_its_rarest_class() -> None:
    # Ten pairs of eyes, of which the odd ones have one eye of the rare class 1.
    groups = np.repeat(np.arange(10), 2)
    labels = np.where(np.arange(20) % 4 == 2, 1, 0)
    _, held_out = split_validation(labels, 0.2, generator=np.random.default_rng(0), groups=groups)
    assert np.bincount(labels[held_out]).tolist() == [3, 1]


def test_split_validation_of_groups_of_one_holds_as_many_of_each_class_out() -> None:
    labels = np.random.default_rng(0).permutation(np.repeat(np.arange(3), [10, 20, 30]))
    _, held_out = split_validation(
        labels, 0.1, generator=np.random.default_rng(1), groups=np.arange(60)[::-1]
    )
    assert np.bincount(labels[held_out]).tolist() == [1, 2, 3]


def test_split_validation_takes_no_images_at_all() -> None:
    empty = np.array([], dtype=np.int64)
    train, held_out = split_validation(empty, 0.1, generator=np.random.default_rng(0))
    assert len(train) == len(held_out) == 0


@pytest.mark.parametrize("fraction", [0.0, 1.0, float("nan")])
def test_split_validation_refuses_fractions_out_of_range(fraction: float) -> None:
    with pytest.raises(ValueError, match="fraction must be between 0 and 1"):
        split_validation(np.zeros(4, np.int64), fraction, generator=np.random.default_rng(0))


def test_normalize_maps_the_ends_and_the_middle() -> None:
    pixels = torch.tensor([0, 51, 204, 255], dtype=torch.uint8)
    assert normalize(pixels).dtype == torch.float32
    torch.testing.assert_close(normalize(pixels), torch.tensor([-1.0, -0.6, 0.6, 1.0]))
    assert pixels.tolist() == [0, 51, 204, 255]


def test_normalize_refuses_what_is_normalized_already() -> None:
    with pytest.raises(TypeError, match="uint8"):
        normalize(torch.zeros(1))


def flips(seed: int) -> Tensor:
    images = torch.arange(8, dtype=torch.uint8).expand(1000, 3, 8, 8)
    return random_horizontal_flip(images, torch.Generator().manual_seed(seed))


def test_random_horizontal_flip_mirrors_whole_images_half_of_the_time() -> None:
    flipped = flips(0)
    kept = (flipped == torch.arange(8)).flatten(1).all(1)
    mirrored = (flipped == torch.arange(7, -1, -1)).flatten(1).all(1)
    assert (kept ^ mirrored).all()
    assert 450 < mirrored.sum() < 550


def test_random_horizontal_flip_draws_from_its_generator_only() -> None:
    state = torch.get_rng_state()
    assert torch.equal(flips(0), flips(0)) and not torch.equal(flips(0), flips(1))
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_batches_stay_on_their_device() -> None:
    images = torch.zeros(4, 1, 8, 8, dtype=torch.uint8, device="cuda")
    flipped = random_horizontal_flip(images, torch.Generator("cuda").manual_seed(0))
    assert flipped.device == normalize(flipped).device == images.device
