import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import pytest
import torch

from task.config import Config, load_config
from task.data import Dataset, ImageSet
from task.evaluation.comparison import Comparison, extract_real, random_order
from task.evaluation.distances import frechet_distance, inception_score
from task.evaluation.evaluate import evaluate_images, scores_of
from task.evaluation.features import FeatureExtractor, cached_classifier, classifier_extractor
from task.evaluation.halves import halve
from task.evaluation.metrics import METRICS, Use
from task.randomness import Stream, torch_generator
from task.runs.evaluations import Evaluation, evaluation_of
from task.runs.records import TEST, TRAIN
from tests.helpers import digits_dataset

HONEST = 400
SHARES = ("precision", "recall", "density", "coverage")


@pytest.fixture(scope="module", autouse=True)
def few_subsets() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("task.evaluation.metrics.KID_SUBSETS", 10)
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
def extractor(config: Config, digits: Dataset) -> FeatureExtractor:
    return looking(config, digits.train)


def looking(config: Config, train: ImageSet) -> FeatureExtractor:
    return classifier_extractor(cached_classifier(config, train, "cpu"), image_range="correct")


@pytest.fixture(scope="module")
def config(cache: Path) -> Config:
    return load_config(["data=digits", "data.image_size=8", f"data.cache_dir={cache}"])


def evaluate(
    config: Config,
    generated: ImageSet,
    digits: Dataset,
    extractor: FeatureExtractor,
    **changes: Any,
) -> Evaluation:
    settings = {"use": Use.ROUNDS, "server_round": 3, **changes}
    return evaluate_images(config, generated, digits, extractor=extractor, **settings)


@pytest.fixture(scope="module")
def report(
    config: Config, honest: ImageSet, digits: Dataset, extractor: FeatureExtractor
) -> Evaluation:
    return evaluate(config, honest, digits, extractor, use=Use.EVALUATION)


def value(found: Evaluation, metric: str, reference: str | None = None, **which: Any) -> float:
    """Return what was measured; `whole` of all generated images."""
    records = found.whole if which.pop("whole", False) else found.records
    measured = records.value(metric, reference=reference, **which)
    assert measured is not None
    return measured


def beside(found: Evaluation, metric: str, reference: str | None = None) -> tuple[float, float]:
    """Return what was measured of generated images and of real ones."""
    ours, real = (value(found, metric, reference, real=real) for real in (False, True))
    return ours, real


def noise(number: int) -> ImageSet:
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(256, (number, 1, 8, 8), generator=generator, dtype=torch.uint8)
    return ImageSet(images, torch.arange(number) % 10)


def test_real_images_in_place_of_generated_ones_reach_the_floor(
    report: Evaluation, digits: Dataset, honest: ImageSet
) -> None:
    label = report.label
    assert label.n_floor == label.n_scored == len(digits.test) < label.n_generated == HONEST
    assert label.n_rarest == min((honest.labels == label).sum() for label in range(10))
    assert max(beside(report, "noise_position")) < 0.1
    for reference in (TRAIN, TEST):
        ours, floor = beside(report, "fid", reference)
        assert ours == pytest.approx(floor, rel=1)
    for name in SHARES:
        ours, floor = beside(report, name)
        assert ours == pytest.approx(floor, abs=0.15)
    ours, floor = beside(report, "inception_score")
    assert ours == pytest.approx(floor, rel=0.1)
    kid = report.records.last("kid", reference=TRAIN)
    assert kid is not None and kid.std is not None and abs(kid.value) < 3 * kid.std
    assert kid.n == len(digits.test) and kid.round == 3
    # All test images in each subset have no spread.
    assert report.records.last("kid", reference=TEST).std is None  # type: ignore[union-attr]
    ours, floor = beside(report, "cas")
    assert ours == pytest.approx(floor, abs=0.06)
    agreement, known = beside(report, "class_agreement")
    assert min(value(report, "cas_real", real=True), agreement) > 0.93
    assert agreement == pytest.approx(known, abs=0.04)
    assert 0.1 <= value(report, "chance_agreement") < 0.15
    ours, floor = beside(report, "pixel_distance")
    assert ours == pytest.approx(floor, rel=0.1)
    assert value(report, "pixel_p_value") > 0.01


@pytest.mark.parametrize("number", [179, 500])
def test_perfect_generator_reaches_the_floor_within_its_spread(
    number: int, config: Config, everything: Dataset
) -> None:
    """Real images that nothing was trained on, dealt out as generated and as test images."""
    order = torch.randperm(len(everything.train), generator=torch.Generator().manual_seed(1))
    train = everything.train.subset(order[:1100])
    rest = everything.train.subset(order[1100:])
    unseen = ImageSet(
        torch.cat([rest.images, everything.test.images]),
        torch.cat([rest.labels, everything.test.labels]),
    )
    looks = looking(config, train)
    gaps: dict[str, list[float]] = {}
    for seed in range(6):
        order = torch.randperm(len(unseen), generator=torch.Generator().manual_seed(seed))
        perfect, test = unseen.subset(order[:number]), unseen.subset(order[number : number + 179])
        report = evaluate(config, perfect, Dataset(train, test), looks)
        # Floors against test images are of images that the classifier was trained on.
        for name, reference in (("inception_score", None), ("fid", TRAIN), ("kid", TRAIN)):
            ours, theirs = beside(report, name, reference)
            gaps.setdefault(name, []).append(ours - theirs)
    for name, values in gaps.items():
        assert abs(fmean(values)) < 3 * stdev(values), name


def searched(
    config: Config, generated: ImageSet, digits: Dataset, *, flip: bool = False
) -> dict[str, float]:
    """Search for copies in pixels."""
    config = config.changed({"data.horizontal_flip": flip})
    comparison = Comparison(config, generated, digits, torch.device("cpu"))
    metrics = [metric for metric in METRICS.values() if metric.name.startswith("pixel")]
    return {m.name: found.value for m, found in scores_of(comparison, metrics) if not found.real}


def test_noise_is_far_from_everything(
    config: Config, digits: Dataset, extractor: FeatureExtractor
) -> None:
    report = evaluate(config, noise(HONEST), digits, extractor)
    for metric, reference in (("fid", TRAIN), ("fid", TEST), ("kid", TEST)):
        ours, floor = beside(report, metric, reference)
        assert ours > 20 * abs(floor)
    assert value(report, "coverage") < 0.05
    assert value(report, "noise_position") == pytest.approx(1, abs=0.1)
    assert searched(config, noise(HONEST), digits)["pixel_p_value"] > 0.01


def test_copies_of_training_images_show(
    config: Config, digits: Dataset, extractor: FeatureExtractor
) -> None:
    copies = digits.train.subset(torch.arange(HONEST))
    report = evaluate(config, copies, digits, extractor, use=Use.EVALUATION)
    assert value(report, "pixel_distance") == 0 and value(report, "pixel_copied") > 0.9
    assert value(report, "feature_distance") == pytest.approx(0, abs=1e-5)
    assert max(value(report, f"{space}_p_value") for space in ("pixel", "feature")) < 1e-6
    mirrored = ImageSet(copies.images.flip(-1), copies.labels)
    seen = searched(config, mirrored, digits, flip=True)
    assert seen["pixel_distance"] == 0 and seen["pixel_p_value"] < 1e-6
    assert searched(config, mirrored, digits)["pixel_p_value"] > 0.01


def test_pixel_distance_is_the_root_mean_square_of_the_difference(config: Config) -> None:
    def gray(*values: int) -> ImageSet:
        images = torch.tensor(values, dtype=torch.uint8).view(-1, 1, 1, 1).expand(-1, 1, 8, 8)
        return ImageSet(images, torch.arange(len(values)) % 10)

    dataset = Dataset(gray(*range(0, 20)), gray(*range(71, 82)))
    comparison = Comparison(config, gray(*range(117, 128)), dataset, torch.device("cpu"))
    found = [*METRICS["pixel_distance"].compute(comparison)]
    assert [each.real for each in found] == [False, True]
    assert found[0].value == pytest.approx((122 - 19) / 255)
    assert found[1].value == pytest.approx((76 - 19) / 255)


def test_copies_are_searched_beside_one_image_of_each_patient(
    config: Config, digits: Dataset
) -> None:
    number = len(digits.test)
    patients = torch.arange(number) // 3
    grouped = ImageSet(digits.test.images, digits.test.labels, patients)
    comparison = Comparison(
        config, digits.test, Dataset(digits.train, grouped), torch.device("cpu"), most_searched=40
    )
    assert len(set(patients[comparison.searched].tolist())) == len(comparison.searched) == 40
    whole = dataclasses.replace(comparison, most_searched=None)
    assert sorted(patients[whole.searched].tolist()) == sorted(set(patients.tolist()))
    (_, real) = METRICS["pixel_distance"].compute(whole)
    assert real.n == len(whole.searched) == -(-number // 3)


def test_scores_are_those_of_the_features(
    config: Config, digits: Dataset, honest: ImageSet, extractor: FeatureExtractor
) -> None:
    real = extract_real(config, digits, extractor)
    seen = extract_real(config, Dataset(honest, honest), extractor).train
    report = evaluate(config, honest, digits, extractor, real=real)
    whole = config.changed({"eval.batch_size": 1000})
    assert report == evaluate(whole, honest, digits, extractor)
    fid = frechet_distance(seen.features, real.train.features)
    assert value(report, "fid", TRAIN, whole=True) == pytest.approx(fid)
    ours, floor = beside(report, "fid", TRAIN)
    assert ours > fid  # of fewer images
    assert real.test is not None and real.test.probabilities is not None
    expected = frechet_distance(real.test.features, real.train.features)
    assert floor == pytest.approx(expected)
    generator = torch_generator(0, Stream.METRICS, 5)
    score = inception_score(real.test.probabilities, generator=generator).mean
    # The stand-ins are all test images in another order, so other splits.
    assert value(report, "inception_score", real=True) == pytest.approx(score, rel=0.05)


def test_paper_range_is_another_measure_and_mirrors_ct_scans_alone(
    config: Config, digits: Dataset, honest: ImageSet, extractor: FeatureExtractor
) -> None:
    wrapped = dataclasses.replace(extractor, image_range="paper")
    correct, plain, mirrored = (
        evaluate(
            config.changed({"data.name": name}),
            honest,
            digits,
            looks,
        )
        for looks, name in (
            (extractor, "sars_cov_2_ct"),
            (wrapped, "cifar10"),
            (wrapped, "sars_cov_2_ct"),
        )
    )
    labels = [(r.label.image_range, r.label.real_flipped) for r in (correct, plain, mirrored)]
    assert labels == [("correct", False), ("paper", False), ("paper", True)]
    assert len({value(r, "fid", TRAIN) for r in (correct, plain, mirrored)}) == 3
    # Mirrored on both sides, real images are as far apart as unmirrored ones.
    for ours, theirs in zip(
        beside(mirrored, "fid", TRAIN), beside(plain, "fid", TRAIN), strict=True
    ):
        assert ours == pytest.approx(theirs, rel=0.5)


def test_evaluation_is_read_as_it_was_written(
    report: Evaluation,
    config: Config,
    digits: Dataset,
    honest: ImageSet,
    extractor: FeatureExtractor,
) -> None:
    content = json.loads(json.dumps(report.content()))
    assert evaluation_of(content) == report
    assert content["data"] == "digits" and content["round"] == 3
    assert (content["extractor"], content["extractor_sha256"]) == ("classifier", extractor.sha256)
    assert (content["n_train"], content["n_test"]) == (len(digits.train), len(digits.test))
    measured = {each["metric"] for each in content["records"]}
    assert measured == METRICS.keys()
    unsure = dataclasses.replace(
        extractor, network=lambda images: (extractor.network(images)[0], None)
    )
    less = evaluate(config, honest, digits, unsure).records
    assert not {"inception_score", "cas", "pixel_copied"} & {each.metric for each in less.all}


def test_permuted_classes_bring_cas_to_chance(
    report: Evaluation, config: Config, honest: ImageSet, digits: Dataset
) -> None:
    order = torch.randperm(HONEST, generator=torch.Generator().manual_seed(0))
    permuted = ImageSet(honest.images, honest.labels[order])
    assert value(report, "cas") > 0.9
    comparison = Comparison(config, permuted, digits, torch.device("cpu"))
    assert next(iter(METRICS["cas"].compute(comparison))).value < 0.2


@pytest.fixture(scope="module")
def untested(digits: Dataset) -> Dataset:
    """The training images without a test split, as the paper's CT scans are."""
    return Dataset(digits.train, digits.test.subset(torch.arange(0)))


def test_without_a_test_split_all_is_measured_against_the_training_images(
    config: Config,
    digits: Dataset,
    untested: Dataset,
    honest: ImageSet,
    extractor: FeatureExtractor,
) -> None:
    found = evaluate(config, honest, untested, extractor, use=Use.EVALUATION)
    assert (found.label.n_test, found.label.n_floor) == (0, HONEST)
    measured = {each.metric for each in found.records.all}
    assert measured == {
        *("noise_position", "inception_score", "fid", "kid", "class_agreement"),
        *("chance_agreement", *SHARES),
    }
    assert found.records.last("fid", reference=TEST) is None
    whole = evaluate(config, honest, digits, extractor)
    assert value(found, "fid", TRAIN, whole=True) == value(whole, "fid", TRAIN, whole=True)
    swapped = evaluate(config, honest, Dataset(honest, digits.train), extractor)
    for name in SHARES:
        assert value(found, name, whole=True) == value(swapped, name)


def test_the_floor_without_a_test_split_is_one_half_of_the_images_against_the_other(
    config: Config, untested: Dataset, extractor: FeatureExtractor
) -> None:
    number = len(untested.train)
    report = evaluate(config, untested.train, untested, extractor)
    assert report.label.n_floor == number // 2
    seen = extract_real(config, untested, extractor)
    assert seen.test is None
    order = torch.randperm(number, generator=torch_generator(0, Stream.METRICS, 2))
    halves = [seen.train.subset(half).features for half in torch.tensor_split(order, 2)]
    assert number % 2 == 0
    assert value(report, "fid", TRAIN, real=True) == pytest.approx(frechet_distance(*halves))
    # The images are their own best copies, which no other half of them is.
    assert value(report, "fid", TRAIN, whole=True) == pytest.approx(0, abs=1e-6)
    assert value(report, "precision", whole=True) == value(report, "coverage", whole=True) == 1
    assert value(report, "fid", TRAIN, real=True) > 0.1
    assert value(report, "precision", real=True) < 1
    few = evaluate(config, untested.train.subset(torch.arange(30)), untested, extractor)
    assert few.label.n_floor == 30


def test_no_half_of_the_training_images_has_a_part_of_a_patient(
    config: Config, untested: Dataset, extractor: FeatureExtractor
) -> None:
    number = len(untested.train)
    groups = torch.arange(number) // 9
    order = random_order(number, 0, 2)
    halves = halve(order, groups)
    owners = [set(groups[half].tolist()) for half in halves]
    assert not owners[0] & owners[1] and all(len(part) > 1 for part in owners)
    assert torch.equal(torch.cat(halves).sort().values, torch.arange(number))
    assert abs(len(halves[0]) - len(halves[1])) <= 9
    uneven = torch.where(torch.arange(number) < number - 1, 0, 1)
    assert sorted(map(len, halve(order, uneven))) == [1, number - 1]
    # Every image is there twice: halves of images show the same, halves of patients do not.
    twice = untested.train.subset(torch.arange(100).repeat(2))
    known = dataclasses.replace(twice, groups=torch.arange(100).repeat(2))
    floors = []
    for train in (twice, known):
        dataset = Dataset(train, untested.test)
        found = evaluate(config, untested.train, dataset, extractor)
        places = METRICS["noise_position"].compute(
            Comparison(config, untested.train, dataset, torch.device("cpu"))
        )
        floors.append(
            (value(found, "fid", TRAIN, real=True), next(p.value for p in places if p.real))
        )
    assert floors[1][0] > 1.2 * floors[0][0] and floors[1][1] > 1.2 * floors[0][1]
    one = dataclasses.replace(twice, groups=torch.zeros(200, dtype=torch.int64))
    with pytest.raises(ValueError, match="must be of at least 2 patients"):
        evaluate(config, untested.train, Dataset(one, untested.test), extractor)


def test_a_set_that_lacks_classes_is_measured_without_a_classifier_of_its_own(
    config: Config, digits: Dataset, honest: ImageSet, extractor: FeatureExtractor
) -> None:
    part = honest.subset(torch.nonzero(honest.labels < 3).flatten())
    whole = evaluate(config, honest, digits, extractor)
    found = evaluate(config, part, digits, extractor)
    assert value(found, "fid", TRAIN) > 2 * value(whole, "fid", TRAIN)
    assert value(found, "recall") < 0.6


def test_wrong_input_is_refused(
    config: Config, digits: Dataset, honest: ImageSet, extractor: FeatureExtractor
) -> None:
    few = honest.subset(torch.arange(5))
    with pytest.raises(ValueError, match="of at least 10 images"):
        evaluate(config, few, digits, extractor)
    tiny = Dataset(digits.train.subset(torch.arange(19)), digits.test.subset(torch.arange(0)))
    with pytest.raises(ValueError, match="of at least 10 images"):
        evaluate(config, honest, tiny, extractor)
    without = honest.subset(torch.nonzero(honest.labels != 3).flatten())
    with pytest.raises(ValueError, match=r"generated\.labels must be of every class.* \[3\]"):
        evaluate(config, without, digits, extractor, use=Use.EVALUATION)
    wide = ImageSet(honest.images.repeat(1, 1, 1, 2), honest.labels)
    with pytest.raises(ValueError, match=r"generated\.images must be \[N, 1, 8, 8\]"):
        evaluate(config, wide, digits, extractor)
