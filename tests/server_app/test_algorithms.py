"""Both halves of the strategies together, on losses whose optimum is known."""

import copy
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from server_app.build_strategy import build_strategy
from server_app.server_optimizers import Yogi
from server_app.strategies import Strategy
from server_app.weighting import Weighting
from task.config import Config, load_config
from task.generators.base import Batch
from task.protocol.wire import WeightLayout
from task.training.algorithms.moments import STEP_UNIT, CarriedMoments, averaged_beside
from task.training.algorithms.names import MOMENTS, OWN_MOMENTS
from task.training.algorithms.parameters import trained_parameters
from task.training.algorithms.registry import client_algorithm
from task.training.loop import fit, fit_options
from task.training.optimizer_state import load_optimizer_tensors, optimizer_tensors
from task.training.private import SeededDraws
from tests.training.generators import Known

# Curvature, optimum and images of two clients.
CLIENTS = ((1.0, 0.0, 3), (0.1, 4.0, 1))


class WithAdam(Known):
    """Trained by Adam in place of SGD."""

    def optimizers(self, lr: float) -> dict[str, torch.optim.Optimizer]:
        return {"sgd": torch.optim.Adam(self.parameters(), lr=lr)}


def quadratic(curvature: float, optimum: float, kind: type[Known] = Known) -> Known:
    def loss(model: Known, batch: Batch) -> Tensor:
        return (curvature * (model.weight - optimum).square() / 2).expand(len(batch))

    return kind(loss)


class Federation:
    """Clients with a quadratic loss each, in one process, and what each of them keeps."""

    def __init__(
        self,
        *words: str,
        clients: Any = CLIENTS,
        lr: float = 0.5,
        steps: int = 4,
        kind: type[Known] = Known,
    ) -> None:
        self.kind = kind
        self.config: Config = load_config(words)
        self.clients, self.lr, self.steps = clients, lr, steps
        self.layout = WeightLayout.of(Known())
        self.strategy = self.new_strategy()
        self.kept: list[dict[str, Tensor]] = [{} for _ in clients]
        self.weights = {"weight": torch.tensor(1.0)}

    def new_strategy(self) -> Strategy:
        trained = trained_parameters(model := self.kind(), model.optimizers(self.lr))
        averaged = averaged_beside(self.config, model, model.optimizers(self.lr))
        return build_strategy(
            self.config, self.layout, Weighting(), trained=trained, averaged=averaged
        )

    def play(self, drawn: list[int] | None = None) -> float:
        """Play a round; returns the weight after it."""
        drawn = [*range(len(self.clients))] if drawn is None else drawn
        packed = self.strategy.broadcast(self.weights, len(drawn), len(self.clients))
        beside = {n: torch.from_numpy(a) for n, a in self.strategy.beside().items()}
        for client in drawn:
            curvature, optimum, images = self.clients[client]
            model = quadratic(curvature, optimum, self.kind)
            model.load_state_dict(self.layout.unpack(packed))
            algorithm = client_algorithm(self.config)
            result = fit(
                *(model, torch.zeros(images, 1, 8, 8, dtype=torch.uint8), torch.zeros(images)),
                options=fit_options(
                    self.config, epochs=self.steps, batch_size=9, precision="float32"
                ),
                optimizers=model.optimizers(self.lr),
                rng=torch.Generator().manual_seed(0),
                callbacks=algorithm.callbacks,
                received={**beside, **self.kept[client]},
            )
            self.kept[client] = {name: result.tensors[name] for name in algorithm.kept}
            sent = {name: result.tensors[name].numpy() for name in algorithm.sent}
            assert sent.keys() == self.strategy.expected.keys()
            self.strategy.add(client, self.layout.pack(model.state_dict()), images, sent)
        self.weights = dict(self.strategy.finish())
        return self.weights["weight"].item()


# Of 3/4 of the first loss and 1/4 of the second, by their images.
OPTIMUM = (0.25 * 0.1 * 4) / (0.75 + 0.25 * 0.1)


@pytest.mark.parametrize(
    ("words", "converges"),
    [
        (["strategy=fedavg"], False),
        (["strategy=fedprox", "strategy.proximal_mu=0.1"], False),
        (["strategy=scaffold"], True),
        (["strategy=feddyn", "strategy.alpha=0.5"], True),
    ],
)
def test_scaffold_and_feddyn_find_the_joint_optimum_which_others_miss(
    words: list[str], converges: bool
) -> None:
    federation = Federation(*words)
    for _ in range(25):
        found = federation.play()
    assert (abs(found - OPTIMUM) < 1e-3) == converges
    assert abs(federation.play() - found) < 1e-4  # it has come to rest


def test_scaffold_goes_on_where_clients_are_drawn_or_have_lost_their_own() -> None:
    federation = Federation("strategy=scaffold")
    for server_round in range(30):
        federation.play([server_round % 2])
    # Drawn alone, each counts fully.
    mean = np.mean([federation.play([client]) for client in (0, 1)])
    assert abs(mean - 0.4 / 1.1) < 0.05
    # A client that keeps nothing corrects nothing; what it says does not add up.
    for _ in range(10):
        federation.kept[1] = {}
        found = federation.play()
    assert 0 < found < 4
    for _ in range(25):
        found = federation.play()
    assert abs(found - OPTIMUM) < 2e-3


@pytest.mark.parametrize(
    "words",
    [
        *([f"strategy={name}"] for name in ("feddyn", "fedadam", "fedyogi", "fedavgm")),
        ["strategy=scaffold", "train.optimizer_state=averaged"],
    ],
)
def test_state_of_the_server_goes_on_to_the_bit(words: list[str]) -> None:
    federation = Federation(*words, kind=WithAdam)
    for _ in range(3):
        federation.play()
    resumed = Federation(*words, kind=WithAdam)
    resumed.kept = [dict(each) for each in federation.kept]
    state = copy.deepcopy(federation.strategy.state_dict())
    assert state
    resumed.weights, resumed.strategy = federation.weights, resumed.new_strategy()
    resumed.strategy.load_state_dict(state)
    assert resumed.play() == federation.play()


def one_client(*words: str) -> Federation:
    """A client that takes one step of SGD with a learning rate of 1: its update is its gradient."""
    return Federation(*words, clients=[(0.3, 2.0, 4)], lr=1.0, steps=1)


def followed(optimizer: Any, rounds: int) -> float:
    """Train on the same loss without a federation."""
    weight = nn.Parameter(torch.tensor(1.0))
    made = optimizer([weight])
    for _ in range(rounds):
        weight.grad = 0.3 * (weight.detach() - 2)
        made.step()
    return weight.item()


@pytest.mark.parametrize(
    ("words", "optimizer"),
    [
        (["strategy=fedavg"], lambda p: torch.optim.SGD(p, lr=1.0)),
        # The first step is taken where the pull is 0, and there is nobody to differ from.
        (["strategy=fedprox", "strategy.proximal_mu=3"], lambda p: torch.optim.SGD(p, lr=1.0)),
        (["strategy=scaffold"], lambda p: torch.optim.SGD(p, lr=1.0)),
        (
            ["strategy=fedavgm", "strategy.server_lr=0.5", "strategy.momentum=0.8"],
            lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.8),
        ),
        (
            ["strategy=fedadam", "strategy.server_lr=0.1"],
            lambda p: torch.optim.Adam(p, lr=0.1, betas=(0.9, 0.99), eps=1e-3),
        ),
        (
            ["strategy=fedyogi", "strategy.server_lr=0.1"],
            lambda p: Yogi(p, lr=0.1, betas=(0.9, 0.99), eps=1e-3),
        ),
    ],
)
def test_one_client_and_one_step_are_training_without_a_federation(
    words: list[str], optimizer: Any
) -> None:
    federation = one_client(*words)
    for _ in range(6):
        found = federation.play()
    assert found == pytest.approx(followed(optimizer, 6), rel=1e-5)


@pytest.mark.parametrize("state", ["kept", "averaged"])
def test_optimizer_of_one_client_goes_on_as_without_a_federation(state: str) -> None:
    client = [(0.3, 2.0, 4)]
    words = "strategy=fedprox", "strategy.proximal_mu=0", f"train.optimizer_state={state}"
    federation = Federation(*words, clients=client, lr=0.1, steps=3, kind=WithAdam)
    for _ in range(3):
        found = federation.play()
    assert found == pytest.approx(followed(lambda p: torch.optim.Adam(p, lr=0.1), 9), rel=1e-5)
    anew = Federation(clients=client, lr=0.1, steps=3, kind=WithAdam)
    for _ in range(3):
        without = anew.play()
    assert abs(found - without) > 1e-3


def test_moments_are_averaged_by_images_and_of_squares_their_roots() -> None:
    federation = Federation("train.optimizer_state=averaged", steps=1, kind=WithAdam)
    assert federation.strategy.expected == {MOMENTS: 3} and federation.strategy.beside() == {}
    federation.play()
    # Gradients at 1 of the two clients, which have 3 images and 1.
    gradients, shares = np.array([1.0, 0.1 * -3]), np.array([0.75, 0.25])
    mean, root = 0.1 * shares @ gradients, np.sqrt(0.001) * shares @ np.abs(gradients)
    (found,) = federation.strategy.beside().values()
    expected = [1 / STEP_UNIT, mean, root]
    assert found.tolist() == pytest.approx(expected, rel=1e-5)
    # A client takes them up whole, and is refused those of another model.
    model, moments = WithAdam(), CarriedMoments()
    moments.start(model, model.optimizers(0.5), {MOMENTS: torch.from_numpy(found)})
    assert moments.finish()[MOMENTS].tolist() == pytest.approx(expected, rel=1e-5)
    assert model.weight.item() == 1
    for wrong in (torch.ones(2), torch.ones(4)):
        with pytest.raises(RuntimeError):
            moments.start(model, model.optimizers(0.5), {MOMENTS: wrong})
    with pytest.raises(ValueError, match=r"^train\.optimizer_state must be new .* 'SGD'"):
        moments.start(Known(), Known().optimizers(0.5), {})


def test_moments_of_steps_that_cannot_be_are_left_out() -> None:
    model, moments = WithAdam(), CarriedMoments()
    for steps in (0.0, -1.0):
        optimizers = model.optimizers(0.5)
        moments.start(model, optimizers, {MOMENTS: torch.tensor([steps, 0.1, 0.1])})
        assert not optimizers["sgd"].state  # it begins anew
    assert moments.finish()[MOMENTS].tolist() == [0, 0, 0]
    # A million steps are no larger than weights.
    moments.start(model, model.optimizers(0.5), {MOMENTS: torch.tensor([1e6 / STEP_UNIT, 0, 0])})
    assert 0 < moments.finish()[MOMENTS][0] < 16


class Personal(Known):
    """Three weights: one that travels, one that stays, and one whose whole optimizer stays."""

    local = frozenset({"own", "latent"})
    local_optimizers = frozenset({"latents"})

    def __init__(self) -> None:
        super().__init__()
        self.own, self.latent = (nn.Parameter(torch.tensor([2.0, 3.0])) for _ in range(2))

    def optimizers(self, lr: float) -> dict[str, torch.optim.Optimizer]:
        return {
            "adam": torch.optim.Adam([self.weight, self.own], lr=lr, fused=True),
            "latents": torch.optim.Adam([self.latent], lr=lr),
        }

    def losses(self, batch: Batch, rng: torch.Generator) -> Iterator[tuple[str, Tensor]]:
        ones = torch.ones(len(batch))
        yield "adam", ones * (self.weight**2 + self.own.square().sum())
        yield "latents", ones * self.latent.square().sum()


def test_moments_of_what_stays_are_apart_and_no_step_is_taken_to_load_them() -> None:
    def steps(model: Personal, optimizers: Any, number: int) -> None:
        for _ in range(number):
            for name, losses in model.losses(Batch(*[torch.zeros(2)] * 3), torch.Generator()):
                model.zero_grad()
                losses.mean().backward()  # type: ignore[no-untyped-call]
                optimizers[name].step()

    whole, model = Personal(), Personal()
    continuing, optimizers = whole.optimizers(0.1), model.optimizers(0.1)
    steps(whole, continuing, 6)
    moments = CarriedMoments()
    moments.start(model, optimizers, {})
    steps(model, optimizers, 3)
    left = moments.finish()
    assert {name: each.numel() for name, each in left.items()} == {MOMENTS: 3, OWN_MOMENTS: 5}
    new = model.optimizers(0.1)
    # As `LocalState` does, before the callbacks start.
    load_optimizer_tensors(new["latents"], optimizer_tensors(optimizers["latents"]))
    moments.start(model, new, left)
    steps(model, new, 3)
    for name, each in model.named_parameters():
        torch.testing.assert_close(each, whole.get_parameter(name), rtol=1e-5, atol=1e-6)
    assert new["latents"].state[model.latent]["step"] == 6
    words = "federation.local=[up]", "train.optimizer_state="
    kept, averaged = (
        client_algorithm(load_config([words[0], words[1] + n])) for n in ("kept", "averaged")
    )
    assert (kept.sent, kept.kept) == ((), (MOMENTS, OWN_MOMENTS))
    assert (averaged.sent, averaged.kept) == ((MOMENTS,), (OWN_MOMENTS,))


def test_feddyn_of_one_client_takes_the_steps_of_its_paper() -> None:
    federation, alpha = one_client("strategy=feddyn", "strategy.alpha=0.5"), 0.5
    weight = linear = term = 0.0
    weight = 1.0
    for _ in range(4):
        local = weight - (0.3 * (weight - 2) - linear)
        linear -= alpha * (local - weight)
        term -= alpha * (local - weight)
        weight = local - term / alpha
        assert federation.play() == pytest.approx(weight, rel=1e-5)


def test_yogi_takes_the_steps_of_its_paper() -> None:
    weight = nn.Parameter(torch.tensor([1.0, -2.0]))
    optimizer = Yogi([weight], lr=0.1, betas=(0.9, 0.99), eps=1e-3)
    expected, first, second = np.array([1.0, -2.0]), np.zeros(2), np.zeros(2)
    for step, gradient in enumerate(([1.0, 0.1], [0.1, 0.5], [-0.3, 0.0]), start=1):
        weight.grad = torch.tensor(gradient)
        optimizer.step()
        square = np.square(gradient)
        first = 0.9 * first + 0.1 * np.array(gradient)
        second = second - 0.01 * square * np.sign(second - square)
        root = np.sqrt(second / (1 - 0.99**step)) + 1e-3
        expected = expected - 0.1 * first / (1 - 0.9**step) / root
    torch.testing.assert_close(
        weight.detach().double(), torch.from_numpy(expected), rtol=1e-5, atol=0
    )


def test_steps_of_the_server_leave_alone_what_clients_do_not_train() -> None:
    layout = WeightLayout({"w": torch.Size([2]), "running_var": torch.Size([1])})
    config = load_config(["strategy=fedadam", "strategy.server_lr=1"])
    strategy = build_strategy(config, layout, Weighting(), trained={"w"})
    weights = {"w": torch.zeros(2), "running_var": torch.tensor([0.02])}
    for update in ([-1.0, 1.0, -0.005], [-1.0, 1.0, -0.005]):
        sent = strategy.broadcast(weights, 1)
        strategy.add(0, sent + np.array(update, np.float32), 5)
        weights = dict(strategy.finish())
    assert weights["running_var"].item() == pytest.approx(0.01)
    assert weights["w"].tolist() == pytest.approx([-2, 2], rel=1e-2)  # of any size: Adam's steps
    assert strategy.num_trained == 2
    with pytest.raises(ValueError, match=r"^trained must be names of .* that travel, got 'other'"):
        build_strategy(config, layout, Weighting(), trained={"other"})


def test_server_steps_on_the_mean_of_clipped_updates_with_its_noise() -> None:
    words = [
        "strategy=fedavgm",
        "strategy.server_lr=2",
        "strategy.momentum=0",
        "privacy=dp_clients",
    ]
    words += ["privacy.epsilon=null", "privacy.noise_multiplier=0", "privacy.clipping_norm=0.5"]
    config, layout = load_config(words), WeightLayout({"w": torch.Size([2])})
    weighting = Weighting.of(config, simulated=True)
    strategy = build_strategy(config, layout, weighting, trained={"w"})
    sent = strategy.broadcast({"w": torch.ones(2)}, 2)
    strategy.add(0, sent + np.float32([3, 4]), 90)  # clipped to 0.3 and 0.4
    strategy.add(1, sent, 10)
    found = strategy.finish(SeededDraws(torch.Generator()))["w"]
    torch.testing.assert_close(found, torch.tensor([1.3, 1.4]))
