"""The clients' halves of the algorithms, where losses and steps are known in closed form."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from task.config import load_config
from task.generators.base import Batch
from task.generators.registry import weightless_generator
from task.protocol.wire import WeightLayout
from task.training.algorithms.feddyn import DynamicRegularizer
from task.training.algorithms.fedprox import ProximalPull
from task.training.algorithms.names import CONTROL, LINEAR_TERM, OWN_CONTROL
from task.training.algorithms.parameters import SentParameters, parameters_of, trained_parameters
from task.training.algorithms.scaffold import ControlVariate
from task.training.learning_rate import adopt_learning_rates, round_lr
from task.training.loop import Callback, FitResult, fit, fit_options
from tests.training.generators import Known

CONFIG = load_config(["train.lr=0.1"])
LR = 0.1


class Two(Known):
    """Two weights of two optimizers, one of which takes two steps, and what is not sent."""

    local = frozenset({"own"})

    def __init__(self) -> None:
        super().__init__()
        self.other = nn.Parameter(torch.tensor([2.0, -1.0]))
        self.own = nn.Parameter(torch.tensor(5.0))
        self.average = nn.Parameter(torch.tensor(7.0), requires_grad=False)
        self.register_buffer("statistic", torch.tensor(3.0))

    def state_dict(self, *args: Any, **options: Any) -> Any:
        state = super().state_dict(*args, **options)
        # As a family may name its weights.
        return {name.replace("other", "renamed"): each for name, each in state.items()}

    def optimizers(self, lr: float) -> dict[str, torch.optim.Optimizer]:
        return {
            "first": torch.optim.SGD([self.weight, self.own], lr=lr),
            "second": torch.optim.SGD([self.other], lr=lr),
        }

    def losses(self, batch: Batch, rng: torch.Generator) -> Iterator[tuple[str, Tensor]]:
        ones = torch.ones(len(batch))[batch.part]
        for _ in range(2):
            yield "first", ones * (self.weight**2 + self.own**2)
        # Its gradient reaches the other optimizer's weight as well, where nothing comes of it.
        yield "second", ones * (self.other.square().sum() + self.weight**2)


def train(
    model: Known, callback: Callback, received: dict[str, Tensor] | None = None, epochs: int = 3
) -> FitResult:
    options = {"epochs": epochs, "batch_size": 4, "precision": "float32"}
    return fit(
        *(model, torch.zeros(4, 1, 8, 8, dtype=torch.uint8), torch.zeros(4, dtype=torch.int64)),
        options=fit_options(CONFIG, **options),
        optimizers=model.optimizers(LR),
        rng=torch.Generator().manual_seed(0),
        callbacks=[callback],
        received=received,
    )


def test_parameters_that_are_sent_are_those_that_optimizers_move() -> None:
    model = Two()
    optimizers = model.optimizers(LR)
    assert [*trained_parameters(model, optimizers)] == ["weight", "renamed"]
    sent = SentParameters(model, optimizers)
    assert sent.joined(sent.by_name).tolist() == [1, 2, -1]
    pieces = sent.split(torch.tensor([4.0, 5.0, 6.0]))
    assert pieces["weight"].item() == 4 and pieces["renamed"].tolist() == [5, 6]
    assert sent.joined(pieces).tolist() == [4, 5, 6]
    with pytest.raises(RuntimeError):
        sent.split(torch.zeros(4))


@pytest.mark.parametrize("model", ["tiny", "vae_small", "stylegan2_ada_tiny", "resnet_gan"])
def test_parameters_that_are_sent_are_known_by_their_names_on_the_wire(model: str) -> None:
    words = [f"model={model}", "data=cifar10"]
    words += ["diffusion.ema_decay=0.9"] * (model == "tiny")
    generator = weightless_generator(load_config(words))
    optimizers = generator.optimizers(LR)
    sent = trained_parameters(generator, optimizers)
    shapes = WeightLayout.of(generator).shapes
    assert [*sent] == [name for name in shapes if name in sent]
    assert len(sent) == sum(len(parameters_of(each)) for each in optimizers.values())


def test_pull_of_fedprox_is_its_closed_form_for_the_weights_of_each_optimizer() -> None:
    model, mu = Two(), 0.5
    train(model, ProximalPull(mu))
    weight, other, own = 1.0, torch.tensor([2.0, -1.0]), 5.0
    for _ in range(3):
        for _ in range(2):
            weight -= LR * (2 * weight + mu * (weight - 1))
            own -= LR * 2 * own
        other = other - LR * (2 * other + mu * (other - torch.tensor([2.0, -1.0])))
    assert model.weight.item() == pytest.approx(weight, rel=1e-6)
    torch.testing.assert_close(model.other.detach(), other)
    # What does not travel is pulled nowhere.
    assert model.own.item() == pytest.approx(own, rel=1e-6)
    assert (model.average.item(), model.statistic.item()) == (7, 3)


def test_control_variate_is_option_2_of_its_paper_with_steps_of_sgd() -> None:
    model = Two()
    control, own = torch.tensor([0.3, -0.2, 0.1]), torch.tensor([0.1, 0.4, 0.0])
    result = train(model, ControlVariate(), {CONTROL: control, OWN_CONTROL: own})
    after = torch.cat([model.weight.detach().view(1), model.other.detach()])
    steps = torch.tensor([6, 3, 3])
    expected = own - control + (torch.tensor([1.0, 2.0, -1.0]) - after) / (steps * LR)
    torch.testing.assert_close(result.tensors[OWN_CONTROL], expected)
    # Without one of its own a client makes no correction, and leaves the mean gradient.
    plain, new = Two(), Two()
    train(plain, Callback())
    result = train(new, ControlVariate(), {CONTROL: control})
    assert torch.equal(new.weight, plain.weight) and torch.equal(new.other, plain.other)
    after = torch.cat([new.weight.detach().view(1), new.other.detach()])
    expected = (torch.tensor([1.0, 2.0, -1.0]) - after) / (steps * LR)
    torch.testing.assert_close(result.tensors[OWN_CONTROL], expected)


def test_linear_term_of_feddyn_is_the_gradient_where_the_loss_is_minimized() -> None:
    model, alpha = Known(lambda model, batch: (model.weight - 3).square().expand(len(batch))), 0.5
    kept: dict[str, Tensor] = {}
    for received in (1.0, 2.0):
        nn.init.constant_(model.weight, received)
        kept = dict(train(model, DynamicRegularizer(alpha), kept, epochs=60).tensors)
        # Of (w - 3)^2 - h w + alpha/2 (w - w_received)^2.
        gradient = 2 * (model.weight.item() - 3)
        assert kept[LINEAR_TERM].tolist() == pytest.approx([gradient], abs=1e-4)


def test_learning_rates_of_rounds_rise_in_equal_steps_and_follow_half_a_cosine() -> None:
    words = ["train.lr=0.8", "federation.rounds=7", "train.warmup_rounds=3"]
    constant, cosine = (
        load_config([*words, f"train.lr_schedule={n}"]) for n in ("constant", "cosine")
    )
    rates = [round_lr(constant, server_round) for server_round in range(1, 8)]
    assert rates == pytest.approx([0.2, 0.4, 0.6, 0.8, 0.8, 0.8, 0.8])
    rates = [round_lr(cosine, server_round) for server_round in range(1, 8)]
    assert rates == pytest.approx(
        [0.2, 0.4, 0.6, 0.8, 0.4 + 0.4 * 0.5**0.5, 0.4, 0.4 - 0.4 * 0.5**0.5]
    )
    assert round_lr(load_config(["train.lr=0.8"]), 5) == 0.8


def test_clients_alone_have_a_batch_size_and_a_learning_rate_of_their_own() -> None:
    words = ["train.lr=0.8", "train.batch_size=64", "train.client_lr_factor=0.25"]
    words += ["train.client_batch_fraction=0.125"]
    client, pooled = load_config(words), load_config([*words, "train.mode=centralized"])
    assert (round_lr(client, 1), round_lr(pooled, 1)) == (0.2, 0.8)
    assert [fit_options(each).batch_size for each in (client, pooled)] == [8, 64]
    usual = load_config([*words[:2], "train.lr_schedule=cosine", "train.client_lr_factor=0.5"])
    assert round_lr(usual, 1) == 0.4 and fit_options(usual).batch_size == 64
    # Optimizers that have gathered something go on with it.
    model = Two()
    optimizers = model.optimizers(0.1)
    adopt_learning_rates(optimizers, model.optimizers(0.05))
    assert [g["lr"] for each in optimizers.values() for g in each.param_groups] == [0.05, 0.05]
