from pathlib import Path

import pytest
import torch
from torch import Tensor

from task.config import Config, load_config
from task.data import Dataset, ImageSet
from task.evaluation import features
from task.evaluation.evaluate import evaluate_images
from task.evaluation.features import build_extractor
from task.evaluation.hospital_scores import in_proportion, score_images
from task.evaluation.metrics import Use, metrics_of
from task.protocol.wire import Key
from task.randomness import torch_generator
from task.runs.records import TEST
from tests.helpers import digits_dataset

CPU = torch.device("cpu")


@pytest.fixture
def config(tmp_path: Path) -> Config:
    words = ["data=digits", "data.image_size=8", "eval.extractor=classifier"]
    return load_config([*words, f"data.cache_dir={tmp_path / 'cache'}"])


@pytest.fixture(scope="module")
def digits() -> ImageSet:
    return digits_dataset(image_size=8, test_fraction=0.1).train


def of_each(images: ImageSet, first: int, number: int, *classes: int) -> ImageSet:
    """Take images of some classes, the same number of each, from the first one on."""
    chosen = [(images.labels == c).nonzero().flatten()[first : first + number] for c in classes]
    return images.subset(torch.cat(chosen))


@pytest.fixture(scope="module")
def hospital(digits: ImageSet) -> Dataset:
    return Dataset(of_each(digits, 0, 6, *range(10)), of_each(digits, 6, 6, *range(10)))


@pytest.fixture(scope="module")
def generated(digits: ImageSet, hospital: Dataset) -> ImageSet:
    """Real digits with some noise, one copied and six with another class than was asked for."""
    images = of_each(digits, 12, 6, *range(10))
    noise = torch.randint(0, 40, images.images.shape, generator=torch.Generator().manual_seed(0))
    pixels = (images.images.int() + noise).clamp(max=255).byte()
    pixels[0] = hospital.train.images[0]
    return ImageSet(pixels, torch.where(images.labels == 3, 4, images.labels))


def test_scores_are_what_measuring_the_same_images_finds(
    config: Config, hospital: Dataset, generated: ImageSet
) -> None:
    # As many of each class everywhere, so that all images of all sets are compared.
    balanced = ImageSet(generated.images, hospital.test.labels)
    scores = score_images(config, balanced, hospital, device=CPU)
    extractor = build_extractor(config, hospital.train, CPU)
    found = evaluate_images(config, balanced, hospital, extractor=extractor, server_round=1)
    expected = {
        key: found.records.value(metric.name, reference=reference, real=real)
        for metric in metrics_of(Use.HOSPITALS, Use.HOSPITALS_OF_CLASSES)
        for reference in [TEST if metric.name in ("fid", "kid") else None]
        for key, real in metric.keys.items()
    }
    assert None not in expected.values() and {"fid", "floor-fid", "pixel-copied"} <= set(expected)
    assert scores == pytest.approx({Key.NUM_EXAMPLES: 60, **expected}, rel=1e-6)
    assert scores["fid"] > scores["floor-fid"] > 0
    assert 0 < scores["noise-position"] < 0.5


def test_hospital_scores_the_classes_that_it_holds(
    config: Config, hospital: Dataset, generated: ImageSet, digits: ImageSet
) -> None:
    own = Dataset(*(of_each(part, 0, 6, 0, 1, 2) for part in (hospital.train, hospital.test)))
    whole = score_images(config, generated, own, device=CPU)
    known = of_each(generated, 0, 6, 0, 1, 2)
    assert whole == score_images(config, known, own, device=CPU)
    assert whole[Key.NUM_EXAMPLES] == 18
    # Of one class a classifier finds all: no score.
    single = Dataset(of_each(digits, 0, 12, 4), of_each(digits, 12, 12, 4))
    alone = score_images(config, of_each(generated, 0, 12, 4), single, device=CPU)
    assert alone.keys() == whole.keys() - {
        key for metric in metrics_of(Use.HOSPITALS_OF_CLASSES) for key in metric.keys
    }
    none = score_images(config, of_each(digits, 0, 20, 8, 9), own, device=CPU)
    assert none == {Key.NUM_EXAMPLES: 0}


def test_hospital_with_too_few_held_out_images_has_no_scores(
    config: Config, hospital: Dataset, generated: ImageSet
) -> None:
    few = Dataset(hospital.train, hospital.test.subset(torch.arange(9)))
    assert score_images(config, generated, few, device=CPU) == {Key.NUM_EXAMPLES: 0}
    without = Dataset(hospital.train, hospital.test.subset(torch.arange(0)))
    assert score_images(config, generated, without, device=CPU) == {Key.NUM_EXAMPLES: 0}


def test_what_was_learned_of_real_images_is_kept_for_the_next_process(
    config: Config,
    hospital: Dataset,
    generated: ImageSet,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    first = score_images(config, generated, hospital, device=CPU)
    kept = sorted(path.name.split("-")[0] for path in Path(config.data.cache_dir).iterdir())
    assert kept == ["classifier", "features", "features"]
    assert Path(config.data.cache_dir).stat().st_mode & 0o777 == 0o700

    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("computed anew")

    monkeypatch.setattr("task.evaluation.classifier.train_classifier", refuse)
    monkeypatch.setattr(features, "extract", refuse)
    assert score_images(config, generated, hospital, device=CPU) == first


def test_damaged_cache_changes_no_score(
    config: Config, hospital: Dataset, generated: ImageSet
) -> None:
    first = score_images(config, generated, hospital, device=CPU)
    for file in Path(config.data.cache_dir).iterdir():
        content = bytearray(file.read_bytes())
        content[-1] ^= 1
        file.write_bytes(content)
    assert score_images(config, generated, hospital, device=CPU) == first


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda g: ImageSet(g.images[:, :, 1:], g.labels), r"generated images must be \[N, 1, 8"),
        (lambda g: ImageSet(g.images, g.labels + 1), r"generated labels must be in \[0, 10\)"),
        (lambda g: ImageSet(g.images, g.labels - 1), r"generated labels must be in \[0, 10\)"),
    ],
)
def test_images_that_no_run_draws_are_refused(
    config: Config, hospital: Dataset, generated: ImageSet, change: object, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        score_images(config, change(generated), hospital, device=CPU)  # type: ignore[operator]


def chosen(held_out: list[int], *others: list[int]) -> list[list[int]]:
    """Count the images of each class that are chosen from sets of these counts."""
    labels = [
        torch.arange(len(counts)).repeat_interleave(Tensor(counts).long())
        for counts in (held_out, *others)
    ]
    found = in_proportion(
        *labels,
        num_classes=len(held_out),
        generator=torch_generator(0, 10),  # type: ignore[arg-type]
    )
    for indices in found:
        assert len(indices.unique()) == len(indices)
    return [
        set_labels[indices].bincount(minlength=len(held_out)).tolist()
        for set_labels, indices in zip(labels[1:], found, strict=True)
    ]


@pytest.mark.parametrize(
    ("held_out", "others", "expected"),
    [
        ([10, 10], [[50, 50], [90, 90]], [50, 50]),
        ([30, 10], [[50, 50], [270, 90]], [50, 16]),
        ([300, 100], [[50, 50], [900, 900]], [50, 16]),
        ([5, 0, 5], [[10, 10, 10], [20, 20, 20]], [10, 0, 10]),
        ([5, 5, 5], [[10, 10, 0], [20, 0, 20]], [10, 0, 0]),
        ([3, 0], [[0, 9], [4, 4]], [0, 0]),
        ([49, 49], [[7, 7], [441, 441]], [7, 7]),
    ],
)
def test_sets_are_compared_in_the_proportions_of_the_held_out_images(
    held_out: list[int], others: list[list[int]], expected: list[int]
) -> None:
    assert chosen(held_out, *others) == [expected, expected]
