import hashlib
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from task.config import load_config
from task.data import Dataset, ImageSet, normalize
from task.evaluation import features
from task.evaluation.classifier import convolutional_network, train_classifier
from task.evaluation.features import (
    FeatureExtractor,
    build_extractor,
    cached_classifier,
    cached_features,
    classifier_extractor,
    exported_extractor,
    extract,
    in_range,
    inception_extractor,
    weights_sha256,
)
from tests.helpers import digits_dataset


@pytest.fixture(scope="module")
def digits() -> Dataset:
    return digits_dataset(image_size=8, test_fraction=0.1)


def cached(images: ImageSet, cache_dir: Path, *overrides: str) -> nn.Sequential:
    config = load_config(["data=digits", f"data.cache_dir={cache_dir}", *overrides])
    return cached_classifier(config, images, "cpu")


def trained(images: ImageSet) -> nn.Sequential:
    return train_classifier(images, num_classes=10, horizontal_flip=False, seed=0, device="cpu")


def test_paper_range_wraps_as_the_released_code_does() -> None:
    # By hand: p = 0, 64/255, 127/255, 128/255, 1 give -255, -127, -1, 1, 255 before the cast.
    pixels = torch.tensor([0, 64, 127, 128, 255], dtype=torch.uint8).view(1, 1, 1, 5)
    assert in_range(pixels, "paper").flatten().tolist() == [1, 129, 255, 1, 255]
    assert torch.equal(in_range(pixels, "correct"), pixels)
    every = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16)
    expected = (510 * every.double() / 255 - 255).round().remainder(256).byte()
    assert torch.equal(in_range(every, "paper"), expected)


def test_in_range_refuses_other_words_and_images() -> None:
    with pytest.raises(ValueError, match="image_range must be one of correct, paper, got 'both'"):
        in_range(torch.zeros(1, 1, 8, 8, dtype=torch.uint8), "both")
    with pytest.raises(TypeError, match="uint8"):
        in_range(torch.zeros(1, 1, 8, 8), "paper")


@pytest.mark.parametrize("image_range", ["correct", "paper"])
def test_classifier_features_are_its_pooled_maps_and_class_probabilities(
    digits: Dataset, image_range: str
) -> None:
    model = convolutional_network(1, 8, 10).eval()
    images = digits.test.images[:20]
    extractor = classifier_extractor(model, image_range=image_range)
    found = extract(extractor, images, batch_size=7)
    seen = normalize(in_range(images, image_range))
    assert found.probabilities is not None
    torch.testing.assert_close(found.probabilities, model(seen).double().softmax(1))
    torch.testing.assert_close(found.features, model[:-2](seen).mean((2, 3)))
    assert found.features.shape == (20, 128)
    assert torch.equal(found.subset(torch.tensor([3, 1])).features, found.features[[3, 1]])


def test_classifier_comes_from_the_cache_for_the_same_images_and_settings_only(
    digits: Dataset, tmp_path: Path
) -> None:
    few = digits.train.subset(torch.arange(60))
    cache = tmp_path / "new" / "cache"
    first = cached(few, cache)
    (file,) = cache.iterdir()
    written = file.stat().st_mtime_ns
    state = torch.get_rng_state()
    again = cached(few, cache)
    assert torch.equal(torch.get_rng_state(), state)
    assert file.stat().st_mtime_ns == written
    assert not again.training
    hashes = {weights_sha256(model.state_dict()) for model in (first, again, trained(few))}
    assert hashes == {classifier_extractor(first, image_range="correct").sha256}
    cached(few, cache, "eval.seed=1")
    cached(few, cache, "data.horizontal_flip=true")
    relabeled = ImageSet(few.images, few.labels.roll(1))
    cached(relabeled, cache)
    assert len([*cache.iterdir()]) == 4


@pytest.mark.parametrize("length", [None, 0, 7, -1], ids=["bit", "empty", "head", "cut"])
def test_damaged_files_of_the_cache_are_made_anew(
    digits: Dataset, tmp_path: Path, caplog: pytest.LogCaptureFixture, length: int | None
) -> None:
    few = digits.train.subset(torch.arange(20))
    extractor = classifier_extractor(cached(few, tmp_path), image_range="correct")
    found = cached_features(extractor, few.images, cache_dir=tmp_path)
    whole = {file: file.read_bytes() for file in tmp_path.iterdir()}
    assert len(whole) == 2
    for file, content in whole.items():
        flipped = content[:-1] + bytes([content[-1] ^ 1])
        file.write_bytes(flipped if length is None else content[:length])
    assert weights_sha256(cached(few, tmp_path).state_dict()) == extractor.sha256
    again = cached_features(extractor, few.images, cache_dir=tmp_path)
    assert torch.equal(again.features, found.features)
    told = [record.getMessage() for record in caplog.records]
    assert all(str(file) in line for file, line in zip(sorted(whole), told, strict=True))
    cached(few, tmp_path)
    cached_features(extractor, few.images, cache_dir=tmp_path)
    assert len(caplog.records) == 2


def test_cache_that_cannot_be_written_is_said_and_done_without(
    digits: Dataset, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    few = digits.train.subset(torch.arange(20))
    (tmp_path / "file").touch()
    nowhere = tmp_path / "file" / "cache"
    for _ in range(2):
        model = cached(few, nowhere)
        assert weights_sha256(model.state_dict()) == weights_sha256(trained(few).state_dict())
    assert [str(nowhere) in record.getMessage() for record in caplog.records] == [True, True]
    assert "data.cache_dir cannot be written" in caplog.text


class Program(nn.Module):
    """Means over the plane, and logits where asked for."""

    def __init__(self, logits: bool) -> None:
        super().__init__()
        self.head = nn.Linear(3, 4)
        self.logits = logits

    def forward(self, images: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        found = images.float().mean((2, 3))
        return (found, self.head(found)) if self.logits else found


def save_program(file: Path, *, dtype: torch.dtype, logits: bool, dynamic: bool = True) -> Program:
    torch.manual_seed(0)
    model = Program(logits).eval()
    shapes = ({0: torch.export.Dim.DYNAMIC},) if dynamic else None
    example = torch.zeros(2, 3, 8, 8, dtype=dtype)
    torch.export.save(torch.export.export(model, (example,), dynamic_shapes=shapes), file)
    return model


@pytest.mark.parametrize("logits", [False, True])
@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32])
def test_exported_program_sees_images_as_its_input_asks(
    digits: Dataset, tmp_path: Path, dtype: torch.dtype, logits: bool
) -> None:
    file = tmp_path / "program.pt2"
    model = save_program(file, dtype=dtype, logits=logits)
    extractor = exported_extractor(file, image_range="correct", device="cpu")
    images = digits.test.images[:5]
    found = extract(extractor, images, batch_size=2)
    color = images.expand(-1, 3, -1, -1)
    seen = color.float() if dtype == torch.uint8 else normalize(color)
    torch.testing.assert_close(found.features, seen.mean((2, 3)))
    if logits:
        expected = model.head(seen.mean((2, 3))).double().softmax(1)
        # The logits are of float32, of features up to 255.
        torch.testing.assert_close(found.probabilities, expected, rtol=1e-5, atol=1e-6)
    else:
        assert found.probabilities is None
    assert extractor.sha256 == hashlib.sha256(file.read_bytes()).hexdigest()


def test_what_is_no_exported_program_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "program.pt2"
    with pytest.raises(FileNotFoundError, match=r"program\.pt2: there is no such file"):
        exported_extractor(file, image_range="correct", device="cpu")
    file.write_bytes(b"nothing of the kind")
    with pytest.raises(ValueError, match=r"must be a file that torch\.export\.save wrote"):
        exported_extractor(file, image_range="correct", device="cpu")
    save_program(file, dtype=torch.uint8, logits=False, dynamic=False)
    with pytest.raises(ValueError, match="exported with a dynamic batch"):
        exported_extractor(file, image_range="correct", device="cpu")


def test_inception_without_weights_and_network_says_what_to_put_where(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, digits: Dataset
) -> None:
    for name in ("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    monkeypatch.delenv("no_proxy", raising=False)
    monkeypatch.delenv("NO_PROXY", raising=False)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    with pytest.raises(FileNotFoundError) as caught:
        build_extractor(load_config(["eval.extractor=inception"]), digits.train, "cpu")
    place = tmp_path / "hub" / "checkpoints" / features.INCEPTION_FILE
    for words in (str(place), features.INCEPTION_URL, "eval.inception_weights", "downloading"):
        assert words in str(caught.value)
    assert [*place.parent.iterdir()] == []
    elsewhere = tmp_path / "w.pth"
    with pytest.raises(FileNotFoundError, match=r"w\.pth: there is no such file"):
        inception_extractor(elsewhere, image_range="correct", device="cpu")


def test_inception_refuses_other_weights(tmp_path: Path) -> None:
    other = tmp_path / "other.pth"
    torch.save({"fc.bias": torch.zeros(1008)}, other)
    with pytest.raises(ValueError, match=r"eval\.inception_weights must be .* of SHA-256 67268"):
        inception_extractor(other, image_range="correct", device="cpu")


def test_inception_features_are_those_of_torchmetrics(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, digits: Dataset
) -> None:
    from torch_fidelity import feature_extractor_inceptionv3 as fidelity
    from torchmetrics.image.fid import NoTrainInceptionV3

    file = tmp_path / "random.pth"
    with torch.random.fork_rng(), monkeypatch.context() as untrained:
        torch.manual_seed(0)
        untrained.setattr(fidelity, "load_state_dict_from_url", lambda *_, **__: {})
        untrained.setattr(fidelity.FeatureExtractorInceptionV3, "load_state_dict", lambda *_: None)
        random = NoTrainInceptionV3("random", ["2048"])
        torch.save(random.state_dict(), file)
    monkeypatch.setattr(features, "INCEPTION_SHA256", hashlib.sha256(file.read_bytes()).hexdigest())
    images = digits.test.images[:2]
    for image_range, layer in (("correct", "2048"), ("paper", "logits_unbiased")):
        extractor = inception_extractor(file, image_range=image_range, device="cpu")
        found = extract(extractor, images, batch_size=2)
        seen = in_range(images, image_range).repeat(1, 3, 1, 1)
        antialias = image_range == "correct"
        expected = NoTrainInceptionV3("oracle", [layer], str(file), antialias=antialias)(seen)
        if layer == "2048":
            torch.testing.assert_close(found.features, expected)
        else:
            torch.testing.assert_close(found.probabilities, expected.double().softmax(1))


def test_build_extractor_makes_what_the_configuration_names(
    digits: Dataset, tmp_path: Path
) -> None:
    few = digits.train.subset(torch.arange(30))
    words = [f"data.cache_dir={tmp_path}", "eval.extractor=classifier", "eval.image_range=paper"]
    extractor = build_extractor(load_config(words), few, "cpu")
    assert (extractor.name, extractor.image_range) == ("classifier", "paper")
    file = tmp_path / "program.pt2"
    save_program(file, dtype=torch.uint8, logits=False)
    chosen = ["eval.extractor=exported", f"eval.exported_program={file}"]
    assert build_extractor(load_config(chosen), few, "cpu").name == "exported"
    with pytest.raises(ValueError, match=r"a settled extractor, got 'auto'"):
        build_extractor(load_config(), few, "cpu")


def test_extract_refuses_what_it_cannot_look_at(digits: Dataset) -> None:
    device = torch.device("cpu")
    planes = FeatureExtractor("planes", "0", "correct", lambda x: (x.float(), None), device)
    with pytest.raises(ValueError, match=r"features of extractor planes must be \[2, D\]"):
        extract(planes, digits.test.images[:2], batch_size=5)
    with pytest.raises(ValueError, match="images must be at least one"):
        extract(planes, digits.test.images[:0], batch_size=5)
    with pytest.raises(ValueError, match="batch_size must be >= 1"):
        extract(planes, digits.test.images, batch_size=0)
