import itertools
import math

import pytest
import torch
from torch import Tensor, nn
from torchmetrics.image.fid import FrechetInceptionDistance
from torchmetrics.image.inception import InceptionScore
from torchmetrics.image.kid import KernelInceptionDistance

from task.evaluation import distances
from task.evaluation.distances import (
    density_coverage,
    energy_distance,
    frechet_distance,
    gaussian_distance,
    inception_score,
    kid,
    neighbor_distances,
    share_near,
    squared_mmd,
)
from task.evaluation.near_copies import copying_test, least_share_shown

# torchmetrics says that it keeps all features.
pytestmark = pytest.mark.filterwarnings("ignore:Metric `:UserWarning")


class Flat(nn.Module):
    """Hands torchmetrics its images back as features."""

    num_features = 6

    def forward(self, images: Tensor) -> Tensor:
        return images.flatten(1)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def points(number: int, dimensions: int = 6, *, seed: int = 0, shift: float = 0) -> Tensor:
    mix = torch.randn(dimensions, dimensions, generator=generator(99), dtype=torch.float64)
    noise = torch.randn(number, dimensions, generator=generator(seed), dtype=torch.float64)
    return noise @ mix + shift


@pytest.fixture(params=[(1024, 8192), (7, 5)], ids=["whole", "small blocks"])
def blocks(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(distances, "BLOCK_ROWS", request.param[0])
    monkeypatch.setattr(distances, "BLOCK_COLUMNS", request.param[1])


def distance(a: Tensor, b: Tensor) -> float:
    return math.sqrt(sum((x - y) ** 2 for x, y in zip(a.tolist(), b.tolist(), strict=True)))


def radius(features: Tensor, index: int, k: int) -> float:
    others = [distance(features[index], x) for i, x in enumerate(features) if i != index]
    return sorted(others)[k - 1]


def test_a_set_against_itself_is_at_distance_zero_and_covers_itself() -> None:
    x = points(200)
    assert frechet_distance(x, x) == pytest.approx(0, abs=1e-8)
    assert abs(squared_mmd(x, points(200, seed=1))) < 0.1 * squared_mmd(x, points(200, shift=3))
    assert share_near(x, x) == 1
    assert density_coverage(x, x) == pytest.approx((1, 1), abs=0.02)
    assert neighbor_distances(x, x)[0].max() == 0


def test_a_set_against_noise_elsewhere_is_far_and_covers_nothing() -> None:
    x, noise = points(100), points(100, seed=1, shift=100)
    assert frechet_distance(x, noise) > 1e4
    assert kid(x, noise, subset_size=50, generator=generator()).mean > 1e3
    assert share_near(x, noise) == share_near(noise, x) == 0
    assert density_coverage(x, noise) == (0, 0)


def test_frechet_distance_of_known_gaussians_is_the_closed_form() -> None:
    # Diagonal covariances commute: |m|^2 + sum (s1 - s2)^2, with s the standard deviations.
    zero, one = torch.zeros(3, dtype=torch.float64), torch.ones(3, dtype=torch.float64)
    first = torch.diag(torch.tensor([1.0, 4.0, 0.0], dtype=torch.float64))
    second = torch.diag(torch.tensor([9.0, 4.0, 16.0], dtype=torch.float64))
    assert gaussian_distance(zero, first, 2 * one, second) == pytest.approx(12 + 4 + 0 + 16)
    # Rotated together, nothing changes.
    turn, _ = torch.linalg.qr(points(3, 3, seed=5))
    rotated = (turn @ first @ turn.T, turn @ second @ turn.T)
    assert gaussian_distance(zero, rotated[0], 2 * turn @ one, rotated[1]) == pytest.approx(32)


@pytest.mark.parametrize("number", [4, 300], ids=["singular", "regular"])
@pytest.mark.usefixtures("blocks")
def test_frechet_distance_is_that_of_torchmetrics(number: int) -> None:
    real, generated = points(number), points(number, seed=1, shift=0.5) * 1.3
    oracle = FrechetInceptionDistance(feature=Flat())
    oracle.update(real, real=True)
    oracle.update(generated, real=False)
    assert frechet_distance(real, generated) == pytest.approx(oracle.compute().item(), rel=1e-5)


def test_inception_score_is_that_of_torchmetrics() -> None:
    logits = points(120)
    oracle = InceptionScore(feature=Flat(), splits=10)
    oracle.update(logits)
    with torch.random.fork_rng():
        torch.manual_seed(3)
        mean, std = oracle.compute()
    found = inception_score(logits.softmax(1), splits=10, generator=generator(3))
    assert found == pytest.approx((mean.item(), std.item()))


def test_inception_score_of_sure_and_even_classes_is_their_number() -> None:
    sure = torch.eye(4).repeat(5000, 1)
    assert inception_score(sure, generator=generator()).mean == pytest.approx(4, abs=0.01)
    unsure = torch.full((20, 4), 0.25)
    assert inception_score(unsure, generator=generator()) == pytest.approx((1, 0))


@pytest.mark.usefixtures("blocks")
def test_squared_mmd_is_the_double_loop() -> None:
    real, generated = points(12), points(9, seed=1, shift=0.3)

    def kernel(a: Tensor, b: Tensor) -> float:
        products = sum(x * y for x, y in zip(a.tolist(), b.tolist(), strict=True))
        return float((products / 6 + 1) ** 3)

    def within(x: Tensor) -> float:
        n = len(x)
        pairs = [kernel(x[i], x[j]) for i in range(n) for j in range(n) if i != j]
        return sum(pairs) / (n * (n - 1))

    between = sum(kernel(a, b) for a in real for b in generated) / (12 * 9)
    expected = within(real) + within(generated) - 2 * between
    assert squared_mmd(real, generated) == pytest.approx(expected)


def test_kid_of_whole_sets_is_that_of_torchmetrics() -> None:
    real, generated = points(30), points(30, seed=1, shift=0.3)
    oracle = KernelInceptionDistance(feature=Flat(), subsets=2, subset_size=30)
    oracle.update(real, real=True)
    oracle.update(generated, real=False)
    found = kid(real, generated, subsets=2, subset_size=30, generator=generator())
    assert found.mean == pytest.approx(oracle.compute()[0].item(), rel=1e-4)
    assert found.mean == pytest.approx(squared_mmd(real, generated))
    assert found.std == pytest.approx(0, abs=1e-6)


def test_kid_follows_its_generator() -> None:
    real, generated = points(60), points(50, seed=1)
    first, again, other = (
        kid(real, generated, subsets=5, subset_size=20, generator=generator(s)) for s in (1, 1, 2)
    )
    assert first == again != other


@pytest.mark.usefixtures("blocks")
def test_precision_and_recall_are_those_of_loops() -> None:
    real, generated = points(40), points(30, seed=1) * 0.8

    def share(queries: Tensor, reference: Tensor) -> float:
        radii = [radius(reference, i, 3) for i in range(len(reference))]
        near = [
            any(distance(q, x) <= r for x, r in zip(reference, radii, strict=True)) for q in queries
        ]
        return sum(near) / len(queries)

    expected = (share(generated, real), share(real, generated))
    assert 0 < min(expected) < 1
    found = share_near(generated, real), share_near(real, generated)
    assert found == pytest.approx(expected)


@pytest.mark.usefixtures("blocks")
def test_density_and_coverage_are_those_of_loops() -> None:
    real, generated = points(40), points(30, seed=1, shift=1)
    inside = [
        [distance(real[i], g) < radius(real, i, 5) for g in generated] for i in range(len(real))
    ]
    density = sum(map(sum, inside)) / (5 * 30)
    coverage = sum(map(any, inside)) / 40
    assert 0 < coverage < 1
    assert density_coverage(real, generated) == pytest.approx((density, coverage))


@pytest.mark.usefixtures("blocks")
def test_nearest_distances_are_those_of_loops_and_zero_for_copies() -> None:
    reference = torch.randint(256, (40, 9), generator=generator(), dtype=torch.uint8)
    queries = torch.randint(256, (10, 9), generator=generator(1), dtype=torch.uint8)
    expected = [min(distance(q, x) for x in reference) for q in queries]
    assert neighbor_distances(queries, reference)[0].tolist() == pytest.approx(expected)
    assert neighbor_distances(reference[11:33], reference)[0].tolist() == [0] * 22
    assert neighbor_distances(points(30)[7:9].float(), points(30).float())[0].tolist() == [0, 0]


def test_nearest_beside_the_next_ones_is_0_for_copies_and_1_among_equals() -> None:
    corners = torch.eye(12)
    found = neighbor_distances(torch.cat([corners[:1], torch.zeros(1, 12)]), corners)
    assert found.ratio.tolist() == pytest.approx([0, 1])
    for number in (30, 80):
        found = neighbor_distances(points(7, seed=1), points(number))
        distances, places = torch.cdist(points(7, seed=1), points(number)).sort(1)
        expected = distances[:, 0] / distances[:, :50].mean(1)
        assert found.ratio.tolist() == pytest.approx(expected.tolist())
        assert found.place.tolist() == places[:, 0].tolist()


@pytest.mark.usefixtures("blocks")
def test_nearest_other_image_is_the_second_nearest() -> None:
    images = points(20)
    found = neighbor_distances(images, images, own=torch.arange(20)[:, None])
    distances, places = torch.cdist(images, images).sort(1)
    assert found.distance.tolist() == pytest.approx(distances[:, 1].tolist())
    assert found.place.tolist() == places[:, 1].tolist()
    with pytest.raises(ValueError, match="one image at least beside the query itself, got 1"):
        neighbor_distances(images[:1], images[:1], own=torch.zeros(1, 1, dtype=torch.int64))


def test_energy_distance_agrees_with_its_definition() -> None:
    first, second = points(1500), points(40, seed=1)
    between = torch.cdist(first.double(), second.double()).mean()
    within = [torch.pdist(x.double()).mean() for x in (first, second)]
    assert energy_distance(first, second) == pytest.approx(float(2 * between - sum(within)))


def test_p_value_of_copying_is_the_share_of_orders_with_as_much_evidence() -> None:
    held_out, generated = torch.tensor([2.5, 5.5, 6.5]), torch.tensor([1.0, 2.0, 3.0, 4.0, 7.0])
    both = torch.cat([generated, held_out])
    p_value, share = copying_test(generated, held_out)
    values = []
    for chosen in itertools.combinations(range(8), 5):
        others = [i for i in range(8) if i not in chosen]
        values.append(copying_test(both[[*chosen]], both[others])[0])
    assert p_value == pytest.approx(sum(p <= p_value + 1e-9 for p in values) / 56)
    assert share == pytest.approx(2 / 5)
    assert copying_test(held_out + 10, generated)[0] == 1


@pytest.mark.parametrize("held_out", [10, 50, 179, 1000])
def test_honest_images_are_seldom_taken_for_copies_and_copies_are_found(held_out: int) -> None:
    draws = generator()
    honest = [
        copying_test(torch.rand(500, generator=draws), torch.rand(held_out, generator=draws))[0]
        for _ in range(400)
    ]
    # At a true rate of 1 %, 12 or more of 400 come in 1 of 1,000 tries.
    assert sum(p < 0.01 for p in honest) < 12
    assert sum(p < 0.1 for p in honest) < 60
    copied = torch.rand(500, generator=draws)
    copied[:300] = 0
    p_value, share = copying_test(copied, torch.rand(held_out, generator=draws))
    assert p_value < 0.01 and share == pytest.approx(0.6, abs=0.15)
    # Copies alone, however few images are held out.
    p_value, share = copying_test(0 * copied, torch.rand(held_out, generator=draws) + 0.01)
    assert p_value < 0.01 and share == 1


def test_smallest_share_of_copies_that_shows_falls_with_held_out_images() -> None:
    shares = [least_share_shown(500, held_out, 0.01) for held_out in (2, 10, 179)]
    assert shares[0] is None and shares[1] is not None and shares[2] is not None
    assert 0.1 < shares[1] < 0.5 and shares[2] < 0.07


def test_wrong_input_is_refused() -> None:
    few, flat = points(3), points(3).flatten()
    with pytest.raises(ValueError, match=r"features must be of >= 4 images, got 3"):
        share_near(few, points(10))
    with pytest.raises(ValueError, match=r"features must be of >= 6 images, got 5"):
        density_coverage(points(5), points(10))
    with pytest.raises(ValueError, match="k must be >= 1, got 0"):
        share_near(few, few, k=0)
    with pytest.raises(ValueError, match=r"features must be of >= 2 images, got 1"):
        frechet_distance(few, few[:1])
    with pytest.raises(ValueError, match=r"features must be \[N, D\]"):
        frechet_distance(flat, few)
    with pytest.raises(ValueError, match=r"features must be \[N, 6\]"):
        squared_mmd(few, points(3, 5))
    with pytest.raises(ValueError, match="features must be of >= 1000 images"):
        kid(few, few, generator=generator())
    with pytest.raises(ValueError, match="subsets must be >= 2"):
        kid(few, few, subsets=1, generator=generator())
    with pytest.raises(ValueError, match="of at least 10 images"):
        inception_score(few.softmax(1), generator=generator())
    with pytest.raises(ValueError, match="splits must be >= 2"):
        inception_score(few.softmax(1), splits=1, generator=generator())
