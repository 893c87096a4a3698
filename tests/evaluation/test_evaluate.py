import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import pytest
import torch

from task.data import Dataset, ImageSet
from task.evaluation.distances import frechet_distance, inception_score
from task.evaluation.evaluate import (
    MetricReport,
    classification_accuracy_score,
    evaluate_images,
    extract_real,
)
from task.evaluation.features import FeatureExtractor, cached_classifier, classifier_extractor
from task.randomness import Stream, torch_generator
from tests.helpers import digits_dataset

HONEST = 400


@pytest.fixture(scope="module", autouse=True)
def few_subsets() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("task.evaluation.evaluate.KID_SUBSETS", 10)
        yield


@pytest.fixture(scope="module")
def everything() -> Dataset:
    return digits_dataset(image_size=8, test_fraction=0.2)


@pytest.fixture(scope="module")
def digits(everything: Dataset) -> Dataset:
    order = torch.randperm(len(everything.train), generator=torch.Generator().manual_seed(0))
    return Dataset(everything.train.subset(order[HONEST:]), everything.test)


@pytest.fixture(scope="module")
def honest(everything: Dataset) -> ImageSet:
    """Real images that are in neither split, as a perfect generator would draw them."""
    order = torch.randperm(len(everything.train), generator=torch.Generator().manual_seed(0))
    return everything.train.subset(order[:HONEST])


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="module")
def extractor(digits: Dataset, cache: Path) -> FeatureExtractor:
    return looking(digits.train, cache)


def looking(train: ImageSet, cache: Path) -> FeatureExtractor:
    model = cached_classifier(
        train, num_classes=10, horizontal_flip=False, seed=0, device="cpu", cache_dir=cache
    )
    return classifier_extractor(model, image_range="correct")


def evaluate(
    generated: ImageSet, digits: Dataset, extractor: FeatureExtractor, **changes: Any
) -> MetricReport:
    settings: dict[str, Any] = {
        "data_name": "digits",
        "num_classes": 10,
        "horizontal_flip": False,
        "seed": 0,
        "with_classification": False,
        **changes,
    }
    return evaluate_images(generated, digits, extractor=extractor, **settings)


@pytest.fixture(scope="module")
def report(
    honest: ImageSet, digits: Dataset, extractor: FeatureExtractor, cache: Path
) -> MetricReport:
    return evaluate(honest, digits, extractor, with_classification=True, cache_dir=cache)


def noise(number: int) -> ImageSet:
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(256, (number, 1, 8, 8), generator=generator, dtype=torch.uint8)
    return ImageSet(images, torch.arange(number) % 10)


def test_real_images_in_place_of_generated_ones_reach_the_floor(
    report: MetricReport, digits: Dataset, honest: ImageSet
) -> None:
    found, floor = report.generated, report.floor
    assert report.label.n_floor == len(digits.test) < report.label.n_generated == HONEST
    assert report.label.n_scored == report.label.n_floor and report.label.has_comparable_floor
    assert report.label.n_rarest == min((honest.labels == label).sum() for label in range(10))
    assert max(found.noise_position or 0, floor.noise_position or 0) < 0.1
    for name in ("fid_train", "fid_test"):
        assert getattr(found, name) == pytest.approx(getattr(floor, name), rel=1)
    for name in ("precision", "recall", "density", "coverage"):
        assert getattr(found, name) == pytest.approx(getattr(floor, name), abs=0.15)
    assert found.inception_score is not None
    assert found.inception_score == pytest.approx(floor.inception_score, rel=0.1)
    assert abs(found.kid_train) < 3 * found.kid_train_std
    classification = report.classification
    assert classification is not None
    assert classification.cas == pytest.approx(classification.cas_real_same_n, abs=0.06)
    assert min(classification.cas_real, classification.agreement) > 0.93
    assert classification.agreement == pytest.approx(classification.agreement_real, abs=0.04)
    assert classification.chance_agreement is not None
    assert 0.1 <= classification.chance_agreement < 0.15
    assert report.pixel_copying is not None
    assert report.pixel_copying.generated == pytest.approx(report.pixel_copying.held_out, rel=0.1)
    assert report.pixel_copying.p_value is not None and report.pixel_copying.p_value > 0.01


@pytest.mark.parametrize("number", [179, 500])
def test_perfect_generator_reaches_the_floor_within_its_spread(
    number: int, everything: Dataset, cache: Path
) -> None:
    """Real images that nothing was trained on, dealt out as generated and as test images."""
    order = torch.randperm(len(everything.train), generator=torch.Generator().manual_seed(1))
    train = everything.train.subset(order[:1100])
    rest = everything.train.subset(order[1100:])
    unseen = ImageSet(
        torch.cat([rest.images, everything.test.images]),
        torch.cat([rest.labels, everything.test.labels]),
    )
    looks = looking(train, cache)
    gaps: dict[str, list[float]] = {}
    for seed in range(6):
        order = torch.randperm(len(unseen), generator=torch.Generator().manual_seed(seed))
        perfect, test = unseen.subset(order[:number]), unseen.subset(order[number : number + 179])
        report = evaluate(perfect, Dataset(train, test), looks, with_copying=False)
        # Floors against test images are of images that the classifier was trained on.
        for name in ("inception_score", "fid_train", "kid_train"):
            ours, theirs = getattr(report.generated, name), getattr(report.floor, name)
            gaps.setdefault(name, []).append(ours - theirs)
    for name, values in gaps.items():
        assert abs(fmean(values)) < 3 * stdev(values), name


def test_noise_is_far_from_everything(
    digits: Dataset, honest: ImageSet, extractor: FeatureExtractor
) -> None:
    report = evaluate(noise(HONEST), digits, extractor)
    assert report.generated.fid_train > 20 * report.floor.fid_train
    assert report.generated.fid_test > 20 * report.floor.fid_test
    assert report.generated.kid_test > 20 * abs(report.floor.kid_test)
    assert report.generated.coverage < 0.05
    assert report.pixel_copying is not None and report.pixel_copying.p_value is not None
    assert report.pixel_copying.p_value > 0.01
    assert report.generated.noise_position == pytest.approx(1, abs=0.1)


def test_copies_of_training_images_show(digits: Dataset, extractor: FeatureExtractor) -> None:
    copies = digits.train.subset(torch.arange(HONEST))
    report = evaluate(copies, digits, extractor)
    assert report.pixel_copying is not None and report.feature_copying is not None
    assert report.pixel_copying.generated == 0 and report.pixel_copying.copied > 0.9
    assert report.feature_copying.generated == pytest.approx(0, abs=1e-5)
    for found in (report.pixel_copying, report.feature_copying):
        assert found.p_value is not None and found.p_value < 1e-6
    mirrored = ImageSet(copies.images.flip(-1), copies.labels)
    seen = evaluate(mirrored, digits, extractor, horizontal_flip=True).pixel_copying
    unseen = evaluate(mirrored, digits, extractor).pixel_copying
    assert seen is not None and seen.generated == 0 and (seen.p_value or 0) < 1e-6
    assert unseen is not None and unseen.p_value is not None and unseen.p_value > 0.01


def test_pixel_distance_is_the_root_mean_square_of_the_difference(
    extractor: FeatureExtractor,
) -> None:
    def grey(*values: int) -> ImageSet:
        images = torch.tensor(values, dtype=torch.uint8).view(-1, 1, 1, 1).expand(-1, 1, 8, 8)
        return ImageSet(images, torch.arange(len(values)) % 10)

    dataset = Dataset(grey(*range(0, 20)), grey(*range(71, 82)))
    report = evaluate(grey(*range(117, 128)), dataset, extractor)
    assert report.pixel_copying is not None
    assert report.pixel_copying.generated == pytest.approx((122 - 19) / 255)
    assert report.pixel_copying.held_out == pytest.approx((76 - 19) / 255)


def test_scores_are_those_of_the_features(
    digits: Dataset, honest: ImageSet, extractor: FeatureExtractor
) -> None:
    settings: dict[str, Any] = {"extractor": extractor, "data_name": "digits", "seed": 0}
    real = extract_real(digits, **settings)
    seen = extract_real(Dataset(honest, honest), **settings).train
    report = evaluate(honest, digits, extractor, real=real, with_copying=False)
    assert report == evaluate(honest, digits, extractor, batch_size=1000, with_copying=False)
    fid = frechet_distance(seen.features, real.train.features)
    assert report.whole is not None and report.whole.fid_train == pytest.approx(fid)
    assert report.generated.fid_train > fid  # of fewer images
    assert real.test is not None and real.test.probabilities is not None
    floor = frechet_distance(real.test.features, real.train.features)
    assert report.floor.fid_train == pytest.approx(floor)
    generator = torch_generator(0, Stream.METRICS, 5)
    score = inception_score(real.test.probabilities, generator=generator).mean
    # The stand-ins are all test images in another order, so other splits.
    assert report.floor.inception_score == pytest.approx(score, rel=0.05)


def test_paper_range_is_another_measure_and_mirrors_ct_scans_alone(
    digits: Dataset, honest: ImageSet, extractor: FeatureExtractor
) -> None:
    wrapped = dataclasses.replace(extractor, image_range="paper")
    correct, plain, mirrored = (
        evaluate(honest, digits, looks, data_name=name, horizontal_flip=True, with_copying=False)
        for looks, name in (
            (extractor, "sars_cov_2_ct"),
            (wrapped, "cifar10"),
            (wrapped, "sars_cov_2_ct"),
        )
    )
    labels = [(r.label.image_range, r.label.real_flipped) for r in (correct, plain, mirrored)]
    assert labels == [("correct", False), ("paper", False), ("paper", True)]
    assert len({r.generated.fid_train for r in (correct, plain, mirrored)}) == 3
    # Mirrored on both sides, real images are as far apart as unmirrored ones.
    assert mirrored.floor.fid_train == pytest.approx(plain.floor.fid_train, rel=0.5)
    assert mirrored.generated.fid_train == pytest.approx(plain.generated.fid_train, rel=0.5)


def test_describe_holds_plain_values_and_all_that_labels_a_cell(
    report: MetricReport, digits: Dataset, honest: ImageSet, extractor: FeatureExtractor
) -> None:
    found = json.loads(json.dumps(report.describe()))
    assert found["data"] == "digits"
    assert (found["extractor"], found["extractor_sha256"]) == ("classifier", extractor.sha256)
    assert (found["n_train"], found["n_test"]) == (len(digits.train), len(digits.test))
    assert found["kid_subset_size"] == len(digits.test)
    assert found["fid_test"] == report.generated.fid_test
    assert found["floor_fid_test"] == report.floor.fid_test
    assert report.pixel_copying is not None
    assert found["pixel_copied"] == report.pixel_copying.copied
    assert {"cas", "cas_real", "cas_real_same_n", "agreement", "feature_held_out"} <= set(found)
    unsure = dataclasses.replace(
        extractor, network=lambda images: (extractor.network(images)[0], None)
    )
    less = evaluate(honest, digits, unsure, with_copying=False).describe()
    left_out = {"inception_score", "floor_inception_score", "cas", "pixel_copied"}
    assert not left_out & set(less)


def test_permuted_classes_bring_cas_to_chance(
    report: MetricReport, honest: ImageSet, digits: Dataset
) -> None:
    settings: dict[str, Any] = {
        "num_classes": 10,
        "horizontal_flip": False,
        "seed": 0,
        "device": "cpu",
    }
    order = torch.randperm(HONEST, generator=torch.Generator().manual_seed(0))
    permuted = ImageSet(honest.images, honest.labels[order])
    assert report.classification is not None and report.classification.cas > 0.9
    assert classification_accuracy_score(permuted, digits.test, **settings) < 0.2


@pytest.fixture(scope="module")
def untested(digits: Dataset) -> Dataset:
    """The training images without a test split, as the paper's CT scans are."""
    return Dataset(digits.train, digits.test.subset(torch.arange(0)))


def test_without_a_test_split_all_is_measured_against_the_training_images(
    digits: Dataset, untested: Dataset, honest: ImageSet, extractor: FeatureExtractor
) -> None:
    found = evaluate(honest, untested, extractor, with_classification=True)
    assert (found.label.n_test, found.label.n_floor) == (0, HONEST)
    assert (found.classification, found.pixel_copying, found.feature_copying) == (None, None, None)
    assert not {"fid_test", "kid_test", "floor_fid_test", "cas"} & found.describe().keys()
    beside = evaluate(honest, digits, extractor, with_copying=False)
    assert found.whole is not None and beside.whole is not None
    assert found.whole.fid_train == beside.whole.fid_train
    swapped = evaluate(honest, Dataset(honest, digits.train), extractor, with_copying=False)
    for name in ("precision", "recall", "density", "coverage"):
        assert getattr(found.whole, name) == getattr(swapped.generated, name)


def test_the_floor_without_a_test_split_is_one_half_of_the_images_against_the_other(
    untested: Dataset, extractor: FeatureExtractor
) -> None:
    number = len(untested.train)
    report = evaluate(untested.train, untested, extractor)
    assert report.label.n_floor == number // 2 == report.label.kid_subset_size
    seen = extract_real(untested, extractor=extractor, data_name="digits", seed=0)
    assert seen.test is None
    order = torch.randperm(number, generator=torch_generator(0, Stream.METRICS, 2))
    halves = [seen.train.subset(half).features for half in torch.tensor_split(order, 2)]
    assert number % 2 == 0
    assert report.floor.fid_train == pytest.approx(frechet_distance(*halves))
    # The images are their own best copies, which no other half of them is.
    assert report.whole is not None
    assert report.whole.fid_train == pytest.approx(0, abs=1e-6)
    assert report.whole.precision == report.whole.coverage == 1
    assert report.floor.fid_train > 0.1 and report.floor.precision < 1
    few = evaluate(untested.train.subset(torch.arange(30)), untested, extractor)
    assert few.label.n_floor == few.label.kid_subset_size == 30


def test_a_set_that_lacks_classes_is_measured_without_classification(
    digits: Dataset, untested: Dataset, honest: ImageSet, extractor: FeatureExtractor
) -> None:
    part = honest.subset(torch.nonzero(honest.labels < 3).flatten())
    whole = evaluate(honest, digits, extractor).generated
    # The second has nothing held out to test a classifier on, so that none is trained.
    for dataset, asked in ((digits, False), (untested, True)):
        report = evaluate(part, dataset, extractor, with_classification=asked)
        assert report.classification is None
        assert report.generated.fid_train > 2 * whole.fid_train
        assert report.generated.recall < 0.6


def test_wrong_input_is_refused(
    digits: Dataset, honest: ImageSet, extractor: FeatureExtractor
) -> None:
    few = honest.subset(torch.arange(5))
    with pytest.raises(ValueError, match="of at least 10 images"):
        evaluate(few, digits, extractor)
    tiny = Dataset(digits.train.subset(torch.arange(19)), digits.test.subset(torch.arange(0)))
    with pytest.raises(ValueError, match="of at least 10 images"):
        evaluate(honest, tiny, extractor)
    without = honest.subset(torch.nonzero(honest.labels != 3).flatten())
    with pytest.raises(ValueError, match=r"generated\.labels must be of every class.* \[3\]"):
        evaluate(without, digits, extractor, with_classification=True)
    wide = ImageSet(honest.images.repeat(1, 1, 1, 2), honest.labels)
    with pytest.raises(ValueError, match=r"generated\.images must be \[N, 1, 8, 8\]"):
        evaluate(wide, digits, extractor)
