"""Several models that draw together, each the classes that it has."""

from collections import Counter

import pytest
import torch
from torch import Tensor

from task.config import load_config
from task.generators.base import Advance, Batch, NoiseSource
from task.generators.ensemble import CLASS_COUNTS, Ensemble, count_members, join_members
from task.generators.noise import generation_noise
from task.generators.registry import build_generator, drawing_generator, with_weights
from tests.training.generators import Known

WORDS = ["model=tiny", "model.width=4", "data.image_size=8", "model.num_poolings=1"]
CONFIG = load_config([*WORDS, "diffusion=fast", "diffusion.num_inference_steps=2"])


class Numbered(Known):
    """Draws its own number, beside what its noise is."""

    def __init__(self, number: int) -> None:
        super().__init__()
        self.number = number

    def sample(
        self, labels: Tensor, noise: NoiseSource, *, advance: Advance = lambda number: None
    ) -> Tensor:
        advance(len(labels))
        noise()
        images = noise()
        images[:, :, 0, 0] = self.number
        return images

    def member_scores(self, batch: Batch, rng: torch.Generator) -> dict[str, Tensor]:
        drawn = torch.rand(len(batch), generator=rng)
        return {"loss": drawn + (batch.labels == self.number)}


def ensemble(counts: list[list[int]]) -> Ensemble:
    made = Ensemble([Numbered(number) for number in range(len(counts))], len(counts[0]))
    made.class_counts.copy_(torch.tensor(counts))
    return made


def noise_of(places: range, label: int = 0) -> NoiseSource:
    draw = generation_noise(places, (1, 8, 8), seed=3, label=label)
    return lambda: torch.from_numpy(draw())


def test_each_class_is_drawn_by_those_that_have_it_as_often_as_they_do() -> None:
    made = ensemble([[0, 300, 5, 0], [10, 100, 5, 0]])
    assert made.title == "ensemble of 2 known models"
    advanced: list[int] = []
    found = {
        label: Counter(
            made.sample(
                torch.full((2000,), label), noise_of(range(2000), label), advance=advanced.append
            )[:, 0, 0, 0].tolist()
        )
        for label in range(4)
    }
    assert found[0] == {1: 2000}
    assert found[1][0] == pytest.approx(1500, abs=80)
    assert found[2][0] == pytest.approx(1000, abs=90)
    # Of a class that nobody has, by the images of each: 305 and 115.
    assert found[3][0] == pytest.approx(2000 * 305 / 420, abs=80)
    assert sum(advanced) == 8000


def test_an_image_depends_on_its_place_and_not_on_those_drawn_with_it() -> None:
    made = ensemble([[3], [3], [1]])
    whole = made.sample(torch.zeros(60, dtype=torch.int64), noise_of(range(60)))
    parts = [
        made.sample(torch.zeros(20, dtype=torch.int64), noise_of(range(n, n + 20)))
        for n in (0, 20, 40)
    ]
    assert torch.equal(torch.cat(parts), whole)
    # Noise beside the number, that no two images share.
    pixels = whole[:, 0].flatten(1)[:, 1:]
    assert len(pixels.unique(dim=0)) == 60
    assert abs(pixels.mean().item()) < 0.05 and abs(pixels.std().item() - 1) < 0.05


def test_weights_of_members_are_joined_and_drawn_from() -> None:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        members = [build_generator(CONFIG) for _ in range(2)]
    counts = [[0, 7] + [1] * 8, [4, 0] + [1] * 8]
    weights = join_members([each.state_dict() for each in members], counts)
    assert count_members(weights) == 2 and count_members(members[0].state_dict()) == 0
    assert weights[CLASS_COUNTS].tolist() == counts
    made = with_weights(CONFIG, members[0], weights)
    assert isinstance(made, Ensemble) and type(drawing_generator(CONFIG, weights)) is Ensemble
    assert made.evaluations_per_image == 2
    assert "2 models" in str(made.description()["drawn by"])
    assert made.state_dict().keys() == weights.keys()
    found = made.eval().sample(torch.ones(3, dtype=torch.int64), noise_of(range(3)))
    assert found.shape == (3, 1, 8, 8) and bool(found.isfinite().all())
    # Class 1 is the first member's alone.
    changed = {**weights, **{n: 2 * t for n, t in weights.items() if n.startswith("members.1.")}}
    made.load_state_dict(changed)
    assert torch.equal(made.sample(torch.ones(3, dtype=torch.int64), noise_of(range(3))), found)
    assert with_weights(CONFIG, members[0], members[1].state_dict()) is members[0]
    with pytest.raises(ValueError, match=r"^members must be one or more, got 0"):
        join_members([], [])


def test_an_ensemble_is_attacked_through_the_member_that_knows_an_image_and_not_trained() -> None:
    made = ensemble([[1, 1], [1, 1]])
    batch = Batch(torch.zeros(3, 1, 8, 8), torch.tensor([0, 1, 7]), torch.arange(3))
    scores = made.member_scores(batch, torch.Generator().manual_seed(0))["loss"]
    drawn = torch.rand(3, generator=torch.Generator().manual_seed(0))
    assert torch.equal(scores, drawn + torch.tensor([1.0, 1.0, 0.0]))
    assert not made.has_test_loss and not made.keeps_state
    with pytest.raises(ValueError, match="ensemble of 2 known models is not trained"):
        made.optimizers(0.1)
    with pytest.raises(ValueError, match="is not trained"):
        made.losses(batch, torch.Generator())
