"""The forward process and the loss against closed forms."""

import copy
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from task.config import ModelConfig, load_config
from task.generators.base import Batch
from task.generators.diffusion.generator import build_diffusion
from task.generators.diffusion.noise_schedule import log_snr
from task.generators.diffusion.objective import (
    Denoiser,
    DiffusionObjective,
    diffusion_losses,
    q_sample,
    training_target,
)
from task.generators.diffusion.samplers import predict_x_start
from task.generators.registry import register

PREDICTION_TYPES = ("epsilon", "v_prediction", "sample")


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def batch(num: int = 6) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return x_start, labels, noise and alphas_cumprod, all that can be float64."""
    x_start = torch.rand(num, 3, 4, 4, dtype=torch.float64, generator=seeded()) * 2 - 1
    noise = torch.randn(num, 3, 4, 4, dtype=torch.float64, generator=seeded(1))
    alphas_cumprod = torch.linspace(0.9999, 3e-5, num, dtype=torch.float64)
    return x_start, torch.arange(num), noise, alphas_cumprod


def objective(**changes: Any) -> DiffusionObjective:
    return replace(build_diffusion(load_config(["model=tiny"])).objective, **changes)


def losses(
    objective: DiffusionObjective,
    model: Denoiser,
    x_start: Tensor,
    labels: Tensor,
    rng: torch.Generator,
) -> Tensor:
    return objective.losses(model, x_start, *objective.draw(x_start, labels, rng))


def test_q_sample_has_closed_form_moments() -> None:
    x_start = 0.3 + 0.5 * torch.randn(2, 1, 400, 400, generator=seeded())
    noise = torch.randn(2, 1, 400, 400, generator=seeded(1))
    alphas_cumprod = torch.tensor([0.9, 0.1], dtype=torch.float64)
    x_t = q_sample(x_start, noise, alphas_cumprod).flatten(1)
    assert x_t.dtype == torch.float32
    expected = (alphas_cumprod.sqrt() * 0.3).float()
    torch.testing.assert_close(x_t.mean(1), expected, atol=0.01, rtol=0)
    expected = (alphas_cumprod * 0.25 + 1 - alphas_cumprod).float()
    torch.testing.assert_close(x_t.var(1), expected, atol=0, rtol=0.02)


@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
def test_predict_x_start_inverts_training_target(prediction_type: str) -> None:
    x_start, _, noise, alphas_cumprod = batch()
    x_t = q_sample(x_start, noise, alphas_cumprod)
    target = training_target(x_start, noise, alphas_cumprod, prediction_type)
    for image, alpha_cumprod in enumerate(alphas_cumprod.tolist()):
        known = (target[image], x_t[image], alpha_cumprod, prediction_type)
        torch.testing.assert_close(predict_x_start(*known), x_start[image])


@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
def test_released_loss_is_paper_loss_per_pixel(prediction_type: str) -> None:
    x_start, labels, noise, alphas_cumprod = batch()
    alpha = alphas_cumprod.sqrt().view(-1, 1, 1, 1)
    sigma = (1 - alphas_cumprod).sqrt().view(-1, 1, 1, 1)

    def loss_and_gradient(
        prediction_type: str, loss_reduction: str
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        weight = torch.tensor(0.7, dtype=torch.float64, requires_grad=True)

        def model(x_t: Tensor, log_snr: Tensor, labels: Tensor) -> Tensor:
            epsilon = torch.tanh(weight * x_t)
            x_0 = (x_t - sigma * epsilon) / alpha
            v = alpha * epsilon - sigma * x_0
            return {"epsilon": epsilon, "sample": x_0, "v_prediction": v}[prediction_type]

        loss = diffusion_losses(
            model,
            x_start,
            labels,
            alphas_cumprod=alphas_cumprod,
            noise=noise,
            prediction_type=prediction_type,
            loss_weighting="epsilon",
            loss_reduction=loss_reduction,
        )
        return loss, torch.autograd.grad(loss.sum(), weight)

    paper = loss_and_gradient("epsilon", "sum")
    released = loss_and_gradient(prediction_type, "mean")
    num_pixels = x_start[0].numel()
    torch.testing.assert_close(paper[0] / num_pixels, released[0])
    torch.testing.assert_close(paper[1][0] / num_pixels, released[1][0])


@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
def test_diffusion_losses_uniform_of_silent_model_is_mean_square_of_target(
    prediction_type: str,
) -> None:
    x_start, labels, noise, alphas_cumprod = batch()
    seen: list[Tensor] = []

    def silent(x_t: Tensor, log_snr: Tensor, labels: Tensor) -> Tensor:
        seen.extend([x_t, log_snr, labels])
        return torch.zeros_like(x_t)

    losses = diffusion_losses(
        silent,
        x_start,
        labels,
        alphas_cumprod=alphas_cumprod,
        noise=noise,
        prediction_type=prediction_type,
        loss_weighting="uniform",
        loss_reduction="mean",
    )
    target = training_target(x_start, noise, alphas_cumprod, prediction_type)
    torch.testing.assert_close(losses, target.square().flatten(1).mean(1))
    torch.testing.assert_close(seen[0], q_sample(x_start, noise, alphas_cumprod))
    assert torch.equal(seen[1], log_snr(alphas_cumprod).float())
    assert torch.equal(seen[2], labels)


@pytest.mark.parametrize("timestep_sampling", ["uniform", "stratified", "sobol"])
def test_objective_follows_generator_alone(timestep_sampling: str) -> None:
    drawn = objective(timestep_sampling=timestep_sampling)
    x_start, labels, *_ = batch()

    def loss(seed: int) -> Tensor:
        return losses(drawn, lambda x_t, *_: x_t, x_start.float(), labels, seeded(seed))

    state = torch.get_rng_state()
    assert torch.equal(loss(0), loss(0))
    assert not torch.equal(loss(0), loss(1))
    assert torch.equal(torch.get_rng_state(), state)


def test_objective_drops_labels_at_its_rate() -> None:
    seen: list[Tensor] = []

    def model(x_t: Tensor, log_snr: Tensor, labels: Tensor) -> Tensor:
        seen.append(labels)
        return x_t

    x_start, labels = torch.zeros(20_000, 1, 1, 1), torch.arange(20_000) % 10
    losses(objective(label_dropout=0.1, null_label=10), model, x_start, labels, seeded())
    losses(objective(), model, x_start, labels, seeded())
    dropped = seen[0] == 10
    assert dropped.float().mean() == pytest.approx(0.1, abs=0.01)
    assert torch.equal(seen[0][~dropped], labels[~dropped])
    assert torch.equal(seen[1], labels)


def test_losses_reach_every_parameter_in_float32_under_autocast() -> None:
    model = build_diffusion(load_config(["model=tiny", "diffusion.label_dropout=0.2"]))
    images = Batch(torch.zeros(4, 1, 8, 8), torch.arange(4), torch.arange(4))
    with torch.autocast("cpu", torch.bfloat16):
        ((name, found),) = model.losses(images, seeded())
    found.mean().backward()  # type: ignore[no-untyped-call]
    assert name in model.optimizers(1e-3) and name in model.private
    assert found.dtype == torch.float32 and found.shape == (4,)
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_example_losses_hide_no_label() -> None:
    model = build_diffusion(load_config(["model=tiny", "diffusion.label_dropout=0.9"])).eval()
    images = Batch(torch.rand(9, 1, 8, 8), torch.arange(9), torch.arange(9))
    with torch.no_grad():
        found = model.example_losses(images, seeded())
        model.objective = replace(model.objective, label_dropout=0.0)
        ((_, expected),) = model.losses(images, seeded())
    assert torch.equal(found["loss"], expected)


def test_diffusion_takes_its_configuration() -> None:
    config = load_config(["experiment=table1", "diffusion.label_dropout=0.1", "data=cifar10"])
    with torch.device("meta"):
        built = build_diffusion(config).objective
    assert (built.prediction_type, built.loss_weighting) == ("v_prediction", "epsilon")
    assert (built.loss_reduction, built.timestep_sampling) == ("mean", "sobol")
    assert (built.label_dropout, built.null_label) == (0.1, 10)
    assert built.schedule.continuous


def test_tensors_are_named_as_those_of_the_network_in_files_of_any_version() -> None:
    model = build_diffusion(load_config(["model=tiny"]))
    weights = model.state_dict()
    assert list(weights) == list(model.network.state_dict())
    nested = nn.ModuleDict({"a": model})
    assert set(nested.state_dict()) == {f"a.{name}" for name in weights}
    other = nn.ModuleDict({"a": build_diffusion(load_config(["model=tiny"]))})
    other.load_state_dict(nested.state_dict())
    assert all(
        torch.equal(weights[n], t) for n, t in copy.deepcopy(other["a"]).state_dict().items()
    )
    with pytest.raises(RuntimeError, match="Missing key"):
        model.load_state_dict({})


@pytest.mark.parametrize(
    "name", ["prediction_type", "loss_weighting", "loss_reduction", "timestep_sampling"]
)
def test_objective_rejects_unknown_words(name: str) -> None:
    x_start, labels, *_ = batch()
    with pytest.raises(ValueError, match=f"{name} must be .* got 'x0'"):
        losses(objective(**{name: "x0"}), lambda x_t, *_: x_t, x_start, labels, seeded())


def test_objective_rejects_dropout_without_null_label() -> None:
    with pytest.raises(ValueError, match=r"null_label must be a label .*=0.1, got None"):
        objective(label_dropout=0.1)


def test_diffusion_losses_rejects_uint8_images() -> None:
    with pytest.raises(TypeError, match=r"x_start must be floating-point .* got torch.uint8"):
        diffusion_losses(
            lambda x_t, *_: x_t,
            torch.zeros(1, 1, 2, 2, dtype=torch.uint8),
            torch.zeros(1, dtype=torch.int64),
            alphas_cumprod=torch.tensor([0.5]),
            noise=torch.zeros(1, 1, 2, 2),
            prediction_type="epsilon",
            loss_weighting="uniform",
            loss_reduction="mean",
        )


def test_a_family_is_registered_once() -> None:
    with pytest.raises(ValueError, match=r"family must be another name than diffusion.* got 'diff"):
        register("diffusion", ModelConfig, build_diffusion)
