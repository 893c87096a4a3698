import math
from collections.abc import Mapping
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor

from task.audit.findings import Outcome, Search, findings
from task.audit.membership import Attack, attack_members, drawn_images
from task.audit.pairs import closest_pairs
from task.audit.roc import Sample, separation
from task.audit.searches import single_images
from task.config import load_config
from task.data import Dataset, ImageSet, normalize
from task.evaluation.near_copies import Copying, TrainingImages, copying_test, shifted
from task.generators.base import Batch, Generator
from task.generators.diffusion.membership import (
    EARLY,
    alpha_sigma,
    losses_at,
    noise_predictor,
    pia,
    secmi,
    sima,
)
from task.generators.registry import initial_generator

CPU = torch.device("cpu")


def images_of(number: int, seed: int, *, groups: Tensor | None = None) -> ImageSet:
    rng = torch.Generator().manual_seed(seed)
    images = torch.randint(256, (number, 1, 8, 8), generator=rng).byte()
    return ImageSet(images, torch.arange(number) % 3, groups)


class Knowing(Generator):
    """A model whose loss is how far an image is from the nearest that it has seen."""

    title = "model that knows"
    image_shape = (1, 8, 8)

    def __init__(self, seen: ImageSet, sign: float = 1.0) -> None:
        super().__init__()
        self._seen, self._sign = normalize(seen.images).flatten(1), sign

    def optimizers(self, lr: float) -> dict[str, torch.optim.Optimizer]:
        return {}

    def losses(self, batch: Batch, rng: torch.Generator):  # type: ignore[no-untyped-def]
        yield from ()

    def example_losses(self, batch: Batch, rng: torch.Generator) -> Mapping[str, Tensor]:
        nearest = torch.cdist(batch.images.flatten(1), self._seen).amin(1)
        return {"loss": self._sign * nearest}

    def sample(self, labels: Tensor, noise: object, *, advance: object = None) -> Tensor:
        raise NotImplementedError


def audited(model: Generator, data: Dataset, **options: object) -> dict[object, Attack]:
    options = {"num_images": 500, "batch_size": 32, "device": CPU, "seed": 0, **options}
    found = attack_members(model, data, **options)  # type: ignore[arg-type]
    return {each.client: each for each in found}


def test_model_that_remembers_is_caught_and_one_that_shuns_is_its_complement() -> None:
    data = Dataset(images_of(60, 0), images_of(50, 1))
    shares = {
        0: (np.arange(30), np.arange(25)),
        1: (np.arange(30, 60), np.arange(25, 50)),
        2: (np.arange(5), np.arange(5)),
    }
    found = audited(Knowing(data.train.subset(np.arange(30))), data, shares=shares)
    # It remembers the images of client 0 alone; of client 2 there are too few to say.
    assert found[0].found.auc == 1 and found[1].found.auc < 0.7
    assert {*found} == {None, 0, 1}
    assert 0.6 < found[None].found.auc < 0.9
    shuns = audited(Knowing(data.train.subset(np.arange(30)), sign=-1.0), data)
    assert shuns[None].found.auc == pytest.approx(1 - found[None].found.auc)
    told = findings([*found.values()], skipped=[2])
    outcomes = [Outcome.DETECTED, Outcome.DETECTED, Outcome.NOT_DETECTED, Outcome.NOT_MEASURED]
    assert [each.outcome for each in told] == outcomes
    assert told[0].says.startswith("Attacks tell training images by the global model from held-out")
    assert told[1].client == 0 and "training images of client 0 by the global" in told[1].says
    assert "from held-out ones of client 1, by the global model." in told[2].says
    assert told[3].says.startswith("Client 2: not attacked.")


def test_no_held_out_images_or_no_known_attack_gives_no_attack() -> None:
    data = Dataset(images_of(60, 0), images_of(0, 1))
    assert audited(Knowing(data.train), data) == {}

    class Silent(Knowing):
        def member_scores(self, batch: Batch, rng: torch.Generator) -> dict[str, Tensor]:
            return {}

    assert audited(Silent(data.train), Dataset(data.train, images_of(50, 1))) == {}

    class Diverged(Knowing):
        def member_scores(self, batch: Batch, rng: torch.Generator) -> dict[str, Tensor]:
            return {"loss": torch.full((len(batch),), math.nan)}

    assert audited(Diverged(data.train), Dataset(data.train, images_of(50, 1))) == {}


def test_images_are_drawn_of_as_many_patients_as_can_be() -> None:
    groups = torch.arange(40) // 4
    grouped = images_of(40, 0, groups=groups)
    chosen = drawn_images(grouped, np.arange(40), 15, seed=0)
    counts = np.bincount(groups.numpy()[chosen], minlength=10)
    assert len({*chosen.tolist()}) == 15 and {*counts.tolist()} == {1, 2}
    assert np.array_equal(drawn_images(images_of(10, 0), np.arange(10), 15, 0), np.arange(10))
    own = np.arange(20, 40)
    assert {*drawn_images(grouped, own, 500, seed=0).tolist()} == {*own.tolist()}
    assert len(drawn_images(grouped, own[:0], 5, seed=0)) == 0
    single = single_images(grouped, seed=0)
    assert single.groups is not None and sorted(single.groups.tolist()) == [*range(10)]


def test_each_client_is_attacked_with_images_of_its_own() -> None:
    data = Dataset(images_of(400, 0), images_of(400, 1))
    shares = {client: (np.arange(client, 400, 20),) * 2 for client in range(20)}
    found = audited(Knowing(data.train), data, num_images=20, shares=shares)
    assert {*found} == {None, *range(20)}
    assert {each.found.members for each in found.values()} == {20}


def test_few_patients_are_tested_exactly_or_said_to_be_too_few() -> None:
    apart = [Sample(np.arange(10.0) + start, np.arange(10)) for start in (10, 0)]
    found = separation(*apart, seed=0)
    assert found is not None and found.auc == 1
    assert found.p_value == pytest.approx(found.least_p_value) == 1 / math.comb(20, 10)
    attack = Attack("loss", 3, False, found)
    assert findings([attack])[0].outcome is Outcome.DETECTED
    others = [Attack("loss", client, False, replace(found, p_value=0.5)) for client in range(2000)]
    (told,) = findings(others)
    assert told.outcome is Outcome.NOT_MEASURED and "too few images for attacks" in told.says


@pytest.mark.parametrize("prediction_type", ["epsilon", "sample", "v_prediction"])
def test_attacks_on_a_denoiser_whose_answers_are_known(prediction_type: str) -> None:
    """The best denoiser of one image, whatever it predicts, sees exactly what noise is there."""
    known = torch.rand(1, 1, 4, 4, generator=torch.Generator().manual_seed(0)) * 2 - 1
    other = -known

    def network(x_t: Tensor, log_snr: Tensor, labels: Tensor) -> Tensor:
        alpha, sigma = alpha_sigma(float(log_snr[0]))
        noise = (x_t - alpha * known) / sigma
        if prediction_type == "epsilon":
            return noise
        return (
            known.expand_as(x_t) if prediction_type == "sample" else alpha * noise - sigma * known
        )

    predict = noise_predictor(network, prediction_type)
    images, labels = torch.cat([known, other]), torch.zeros(2, dtype=torch.int64)
    rng = torch.Generator().manual_seed(0)
    member, stranger = losses_at(predict, images, labels, 0.0, rng).tolist()
    # alpha = sigma at a log-SNR of 0: the noise is wrong by the difference of the images.
    assert member == pytest.approx(0, abs=1e-6)
    assert stranger == pytest.approx(float((known - other).square().mean()), rel=1e-4)
    # At the clean image a member looks like alpha - 1 of itself over sigma.
    alpha, sigma = alpha_sigma(EARLY)
    norms = sima(predict, images, labels)
    assert float(norms[0]) == pytest.approx((1 - alpha) / sigma * float(known.norm()), rel=1e-4)
    for attack in (sima, pia, secmi):
        scores = attack(predict, images, labels)
        assert float(scores[0]) < float(scores[1]), attack.__name__


def test_log_snr_maps_to_the_scales_of_every_schedule() -> None:
    alpha, sigma = alpha_sigma(2.1)
    assert alpha**2 + sigma**2 == pytest.approx(1)
    assert math.log(alpha**2 / sigma**2) == pytest.approx(2.1)


@pytest.mark.parametrize(
    ("words", "names"),
    [
        (["model=tiny", "diffusion=fast"], {"SimA", "PIA", "SecMI", "loss at log-SNR 2"}),
        (["model=tiny", "diffusion=fast", "diffusion.label_dropout=0.2"], {"loss without class"}),
        (["model=vae_small"], {"loss"}),
        (["model=classifier", "model.network=small"], {"loss"}),
        (["model=resnet_gan", "model.width=4"], {"discriminator"}),
        (["model=stylegan2_ada_tiny"], {"discriminator"}),
    ],
)
def test_families_are_attacked_alike_however_images_are_grouped(
    words: list[str], names: set[str]
) -> None:
    torch.manual_seed(0)
    model = initial_generator(load_config(["data.image_size=16", *words])).eval()
    images = torch.rand(4, *model.image_shape, generator=torch.Generator().manual_seed(1)) * 2 - 1
    labels = torch.arange(4)
    scored = []
    for _ in range(2):
        rng = torch.Generator().manual_seed(0)
        scored.append(model.member_scores(Batch(images, labels, labels), rng))
    assert all(any(name.startswith(each) for name in scored[0]) for each in names)
    for name, scores in scored[0].items():
        assert scores.shape == (4,) and bool(scores.isfinite().all())
        assert torch.equal(scores, scored[1][name])


def test_copies_that_are_shifted_or_mirrored_are_found_and_paired() -> None:
    train, held_out = images_of(80, 0).images, images_of(60, 1).images
    fresh = images_of(60, 2).images
    fresh[:9] = train[:9].roll(1, dims=-1).flip(-1)
    unmoved = TrainingImages(train, horizontal_flip=True)
    found = Copying.of(unmoved.nearest(fresh), unmoved.nearest(held_out))
    assert found.p_value > 0.01
    moved = TrainingImages(train, horizontal_flip=True, most_shifted=1)
    found = Copying.of(moved.nearest(fresh), moved.nearest(held_out))
    assert found.p_value < 1e-3 and 0.1 <= found.copied <= 0.25
    assert len([*shifted(train[:1], 1)]) == 9
    # No image is the nearest other one of itself, nor of its mirror image.
    others = moved.nearest_others(torch.arange(80))
    assert float(others.distance.min()) > 0.1 and not (others.place == torch.arange(80)).any()
    fresh[20] = train[11]
    chosen, nearest = closest_pairs(moved.nearest(fresh), 10)
    pairs = dict(zip(chosen.tolist(), nearest.tolist(), strict=True))
    assert chosen[0] == 20 and pairs == {20: 11, **{number: number for number in range(9)}}


def test_all_looks_together_seldom_find_what_is_not_there() -> None:
    """Two hundred audits of honest models: attacks on all, on 5 clients twice, and searches."""
    alarms = {"members": 0, "copies": 0}
    for seed in range(200):
        rng = np.random.default_rng(seed)
        attacks = []
        clients = [(client, own) for client in range(5) for own in (False, True)]
        for (client, is_local), (n, m) in [((None, False), (200, 179))] + [
            (each, (25, 18)) for each in clients
        ]:
            for number in range(4):
                sets = [Sample(rng.normal(size=k), np.arange(k)) for k in (n, m)]
                # The bootstrap is not what is tested here, and takes most of the time.
                separated = separation(*sets, seed=0, num_draws=20)  # type: ignore[misc]
                assert separated is not None
                attacks.append(Attack(f"attack {number}", client, is_local, separated))
        copies = []
        for space in ("pixels", "features"):
            nearness = (torch.from_numpy(rng.random(k)) for k in (200, 60))
            p_value, share = copying_test(*nearness)
            copies.append(Search(space, Copying(0.1, 0.1, share, p_value), 200, 60))
        for what, found in (("members", findings(attacks)), ("copies", findings([], copies))):
            alarms[what] += any(each.outcome is Outcome.DETECTED for each in found)
    # One in a hundred of each kind: two, and as chance has it.
    assert max(alarms.values()) <= 4 and sum(alarms.values()) <= 4, alarms
