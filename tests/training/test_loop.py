import copy
import platform
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from task.config import load_config
from task.data import ImageSet, build_dataset, normalize
from task.generators.diffusion.objective import DiffusionObjective, build_objective
from task.generators.diffusion.unet import UNet, build_unet
from task.randomness import seeded_global_generator
from task.training.devices import (
    autocast,
    compile_where_wanted,
    configure_torch,
    is_compiled,
    select_device,
)
from task.training.loop import TrainResult, held_out_loss, new_optimizer, train_epochs
from task.training.precision import faster_precision

ROOT = Path(__file__).resolve().parents[2]
CONFIG = load_config(
    [
        *("experiment=demo", "model=tiny", "model.width=8", "model.num_poolings=1"),
        *("model.dropout=0.3", "data.image_size=8"),
    ]
)


@pytest.fixture(scope="module")
def digits() -> ImageSet:
    return build_dataset(CONFIG, download=False).train.subset(np.arange(200))


@pytest.fixture(scope="module")
def objective() -> DiffusionObjective:
    return build_objective(CONFIG)


@pytest.fixture
def model() -> UNet:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return build_unet(CONFIG)


def seeded(seed: int = 1) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def train(model: nn.Module, images: ImageSet, objective: Any, **options: Any) -> TrainResult:
    defaults = {
        **{"epochs": 1, "batch_size": 64, "horizontal_flip": False},
        **{"precision": "float32", "channels_last": True, "generator": seeded()},
    }
    optimizer = new_optimizer(model, options.pop("lr", 1e-3))
    return train_epochs(
        *(model, images.images, images.labels),
        objective=objective,
        optimizer=optimizer,
        **(defaults | options),
    )


def measure(model: nn.Module, images: ImageSet, objective: Any, **options: Any) -> float:
    defaults = {
        **{"batch_size": 64, "precision": "float32", "channels_last": True},
        **{"generator": seeded(99)},
    }
    return held_out_loss(
        model, images.images, images.labels, objective=objective, **(defaults | options)
    )


def same_bits(one: nn.Module, other: nn.Module) -> bool:
    first, second = one.state_dict(), other.state_dict()
    return all(torch.equal(first[name], second[name]) for name in first)


class Scale(nn.Module):
    """One weight."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.tensor(1.0))


class Recorder:
    """An objective that keeps what it is given; its loss is a known number of each batch."""

    def __init__(self) -> None:
        self.batches: list[tuple[Tensor, Tensor]] = []

    def __call__(
        self, model: nn.Module, x_start: Tensor, labels: Tensor, generator: torch.Generator
    ) -> Tensor:
        self.batches.append((x_start, labels))
        return labels.float().mean() + 0 * sum(p.sum() for p in model.parameters())


def numbered(count: int) -> ImageSet:
    """Images that are as bright as their number says, which is their label as well."""
    numbers = torch.arange(count)
    pixels = numbers.to(torch.uint8)[:, None, None, None].repeat(1, 1, 8, 8)
    return ImageSet(pixels, numbers)


def test_loss_goes_down_on_real_digits(
    model: UNet, digits: ImageSet, objective: DiffusionObjective
) -> None:
    before = measure(model, digits, objective)
    first = train(model, digits, objective, lr=3e-3, batch_size=32)
    last = train(model, digits, objective, lr=3e-3, batch_size=32, epochs=8, generator=seeded(2))
    after = measure(model, digits, objective)
    assert after < 0.8 * before
    assert last.loss < first.loss < before


def test_steps_are_those_of_adam_on_the_mean_loss_of_a_batch() -> None:
    images = numbered(12)

    def squared(model: nn.Module, x_start: Tensor, labels: Tensor, _: torch.Generator) -> Tensor:
        return (model.weight * labels - 3).square().mean()

    trained, expected = Scale(), Scale()
    result = train(trained, images, squared, epochs=5, batch_size=12, lr=0.1)
    optimizer = torch.optim.Adam(expected.parameters(), lr=0.1)
    losses = []
    for _ in range(5):
        loss = (expected.weight * images.labels - 3).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    torch.testing.assert_close(trained.weight, expected.weight)
    assert result.loss == pytest.approx(np.mean(losses), rel=1e-5)


def test_same_seed_gives_the_same_bits_and_another_seed_others(
    model: UNet, digits: ImageSet, objective: DiffusionObjective
) -> None:
    one, again, other = (copy.deepcopy(model) for _ in range(3))
    losses = [
        train(trained, digits, objective, generator=seeded(seed)).loss
        for trained, seed in ((one, 1), (again, 1), (other, 2))
    ]
    assert same_bits(one, again) and losses[0] == losses[1]
    assert not same_bits(one, other) and losses[0] != losses[2]
    assert not same_bits(one, model)


def test_dropout_follows_the_generator_and_the_global_one_stays(
    model: UNet, digits: ImageSet, objective: DiffusionObjective
) -> None:
    plain = copy.deepcopy(model)
    for module in plain.modules():
        if isinstance(module, nn.Dropout2d):
            module.p = 0.0
    one, again = copy.deepcopy(model), copy.deepcopy(model)
    for trained, seed in ((one, 5), (again, 6), (plain, 5)):
        torch.manual_seed(seed)
        state = torch.get_rng_state()
        train(trained, digits, objective)
        assert torch.equal(torch.get_rng_state(), state)
    assert same_bits(one, again)
    assert not same_bits(one, plain)  # there was dropout to be seeded


def test_every_image_is_seen_once_in_every_epoch_in_a_new_order() -> None:
    recorder = Recorder()
    train(Scale(), numbered(10), recorder, epochs=3, batch_size=4)
    assert [len(labels) for _, labels in recorder.batches] == [4, 4, 2] * 3
    labels = torch.cat([labels for _, labels in recorder.batches]).reshape(3, 10)
    assert all(sorted(epoch) == [*range(10)] for epoch in labels.tolist())
    assert len({tuple(epoch) for epoch in labels.tolist()}) == 3


def test_images_are_normalised_and_stay_with_their_labels() -> None:
    recorder = Recorder()
    train(Scale(), numbered(10), recorder, batch_size=4, channels_last=False)
    for x_start, labels in recorder.batches:
        expected = normalize(labels.to(torch.uint8))[:, None, None, None].expand(-1, 1, 8, 8)
        assert torch.equal(x_start, expected)


def test_last_partial_batch_counts_by_its_images() -> None:
    # Means of batches of 4, 4 and 1 images; only weighted do they give the mean of all.
    images = numbered(9)
    result = train(Scale(), images, Recorder(), epochs=2, batch_size=4)
    assert result.loss == pytest.approx(4.0, rel=1e-6)
    assert measure(Scale(), images, Recorder(), batch_size=4) == pytest.approx(4.0, rel=1e-6)


def test_speed_is_images_of_all_epochs_over_seconds() -> None:
    result = train(Scale(), numbered(10), Recorder(), epochs=3)
    assert result.seconds > 0
    assert result.images_per_second * result.seconds == pytest.approx(30)


@pytest.mark.parametrize("flip", [False, True])
def test_images_are_mirrored_only_where_asked(flip: bool) -> None:
    images = ImageSet(
        torch.arange(8, dtype=torch.uint8).expand(100, 1, 8, 8), torch.zeros(100).long()
    )
    recorder = Recorder()
    train(Scale(), images, recorder, horizontal_flip=flip)
    seen = torch.cat([x_start for x_start, _ in recorder.batches])
    mirrored = (seen[:, 0, 0, 0] > seen[:, 0, 0, -1]).sum()
    assert 30 < mirrored < 70 if flip else mirrored == 0


@pytest.mark.parametrize("channels_last", [False, True])
def test_memory_format_is_that_of_model_and_images(model: UNet, channels_last: bool) -> None:
    recorder = Recorder()
    images = ImageSet(torch.zeros(4, 3, 8, 8, dtype=torch.uint8), torch.zeros(4).long())
    train(model, images, recorder, channels_last=channels_last)
    wanted = torch.channels_last if channels_last else torch.contiguous_format
    assert recorder.batches[0][0].is_contiguous(memory_format=wanted)
    kernels = [p for p in model.parameters() if p.ndim == 4 and min(p.shape) > 1]
    assert kernels and all(p.is_contiguous(memory_format=wanted) for p in kernels)


def test_memory_format_changes_the_weights_by_rounding_only(
    model: UNet, digits: ImageSet, objective: DiffusionObjective
) -> None:
    other = copy.deepcopy(model)
    train(model, digits, objective, channels_last=True)
    train(other, digits, objective, channels_last=False)
    for one, two in zip(model.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(one, two, rtol=1e-3, atol=1e-4)


def test_bfloat16_comes_close_to_float32_and_keeps_float32_weights(
    model: UNet, digits: ImageSet, objective: DiffusionObjective
) -> None:
    other = copy.deepcopy(model)
    full = train(model, digits, objective, epochs=2)
    half = train(other, digits, objective, epochs=2, precision="bfloat16")
    assert half.loss != full.loss
    assert half.loss == pytest.approx(full.loss, rel=0.02)
    assert {p.dtype for p in other.parameters()} == {torch.float32}
    expected = measure(model, digits, objective)
    assert measure(other, digits, objective) == pytest.approx(expected, rel=0.05)
    assert measure(model, digits, objective, precision="bfloat16") == pytest.approx(
        expected, rel=0.02
    )


def test_held_out_loss_repeats_and_has_no_side_effects(
    model: UNet, digits: ImageSet, objective: DiffusionObjective
) -> None:
    before, state = copy.deepcopy(model), torch.get_rng_state()
    losses = [measure(model, digits, objective) for _ in range(2)]
    assert losses[0] == losses[1]
    assert measure(model, digits, objective, generator=seeded(7)) != losses[0]
    assert same_bits(model, before)
    assert all(parameter.grad is None for parameter in model.parameters())
    assert torch.equal(torch.get_rng_state(), state)


def test_held_out_loss_is_that_of_the_objective_without_dropout(
    model: UNet, digits: ImageSet, objective: DiffusionObjective
) -> None:
    found = measure(model.train(), digits, objective, batch_size=200)
    with torch.no_grad():
        x_start = normalize(digits.images)
        expected = objective(model.eval(), x_start, digits.labels, seeded(99))
    assert found == pytest.approx(expected.item(), rel=1e-5)


def test_model_trains_on_after_a_held_out_loss(
    model: UNet, digits: ImageSet, objective: DiffusionObjective
) -> None:
    other = copy.deepcopy(model)
    measure(other, digits, objective)
    train(model, digits, objective)
    train(other, digits, objective)
    assert same_bits(model, other)


def test_faster_precision_names_one_and_leaves_model_and_generator(
    model: UNet, objective: DiffusionObjective
) -> None:
    before, state = copy.deepcopy(model.eval()), torch.get_rng_state()
    named = faster_precision(
        model,
        objective=objective,
        image_shape=(1, 8, 8),
        channels_last=True,
        device=torch.device("cpu"),
    )
    assert named in ("float32", "bfloat16")
    assert same_bits(model, before) and not model.training
    assert torch.equal(torch.get_rng_state(), state)


class Slow(nn.Module):
    """A model that takes its time in one of the two precisions."""

    def __init__(self, precision: str) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(()))
        self.slow_under_autocast = precision == "bfloat16"

    def forward(self, x_t: Tensor, log_snr: Tensor, labels: Tensor) -> Tensor:
        if torch.is_autocast_enabled("cpu") == self.slow_under_autocast:
            torch.randn(400_000).sort()
        return x_t * self.weight


@pytest.mark.parametrize("patience", [20.0, 0.0])
@pytest.mark.parametrize(("slow", "fast"), [("float32", "bfloat16"), ("bfloat16", "float32")])
def test_faster_precision_names_the_faster(
    slow: str,
    fast: str,
    patience: float,
    objective: DiffusionObjective,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("task.training.precision.PRECISION_SECONDS", patience)
    named = faster_precision(
        Slow(slow),
        objective=objective,
        image_shape=(1, 8, 8),
        channels_last=False,
        device=torch.device("cpu"),
    )
    assert named == fast


def test_seeded_global_generator_gives_its_draws_and_puts_the_global_one_back() -> None:
    state = torch.get_rng_state()
    drawn = []
    for seed in (1, 1, 2):
        with seeded_global_generator(seeded(seed)):
            drawn.append(torch.rand(4))
    assert torch.equal(drawn[0], drawn[1]) and not torch.equal(drawn[0], drawn[2])
    with pytest.raises(KeyError), seeded_global_generator(seeded()):
        torch.rand(1)
        raise KeyError
    assert torch.equal(torch.get_rng_state(), state)


@pytest.fixture
def torch_settings() -> Iterator[None]:
    threads, deterministic = (
        torch.get_num_threads(),
        torch.are_deterministic_algorithms_enabled(),
    )
    benchmark = torch.backends.cudnn.benchmark
    yield
    torch.set_num_threads(threads)
    torch.use_deterministic_algorithms(deterministic)
    torch.backends.cudnn.benchmark = benchmark


@pytest.mark.usefixtures("torch_settings")
@pytest.mark.parametrize("deterministic", [True, False])
def test_configure_torch_sets_threads_and_determinism(
    deterministic: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":16:8")  # what someone chose stays
    configure_torch(num_threads=2, deterministic=deterministic)
    assert torch.get_num_threads() == 2
    assert torch.are_deterministic_algorithms_enabled() == deterministic
    assert torch.backends.cudnn.benchmark != deterministic


def step_faults() -> str:
    """Return the code of a process that counts page faults of a buffer used again and again."""
    return """
import resource, sys, torch
from task.training.devices import keep_freed_memory
if sys.argv[1] == "keep":
    keep_freed_memory()
def fill():
    torch.ones(16_000_000)
for _ in range(10):
    fill()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(10):
    fill()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="the switch is glibc's")
def test_freed_memory_is_kept_for_the_next_step() -> None:
    faults = {
        how: int(subprocess.check_output([sys.executable, "-c", step_faults(), how], cwd=ROOT))
        for how in ("keep", "return")
    }
    assert faults["keep"] * 10 < faults["return"]


CPU, GPU = torch.device("cpu"), torch.device("cuda")


@pytest.fixture
def everything_to_compile(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A machine with compilers, headers and a GPU; returns the folder of the headers."""
    for name in ("CC", "CXX"):
        monkeypatch.setenv(name, sys.executable)  # any program that there is
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (9, 0))
    monkeypatch.setattr("?.find_spec", lambda _: True)
    monkeypatch.setattr(sysconfig, "get_path", lambda _: str(tmp_path))
    (tmp_path / "Python.h").touch()
    return tmp_path


@pytest.mark.usefixtures("everything_to_compile")
def test_models_are_compiled_where_it_is_asked_for() -> None:
    choices = (None, True, False)
    on_cpu = [is_compiled(wanted, CPU, deterministic=False) for wanted in choices]
    on_gpu = [is_compiled(wanted, GPU, deterministic=False) for wanted in choices]
    assert (on_cpu, on_gpu) == ([False, True, False], [True, True, False])
    assert not is_compiled(None, GPU, deterministic=True)


@pytest.mark.parametrize(
    ("device", "taken", "missing"),
    [
        (CPU, "compilers", r"a C\+\+ compiler"),
        (GPU, "compilers", "a C compiler"),
        (GPU, "headers", r"Python's header files in /"),
        (GPU, "capability", r"Triton and a GPU of capability 7\.0"),
    ],
)
def test_model_is_not_compiled_where_something_is_missing(
    device: torch.device,
    taken: str,
    missing: str,
    everything_to_compile: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if taken == "compilers":
        for name in ("CC", "CXX", "PATH"):
            monkeypatch.setenv(name, "")
    elif taken == "headers":
        (everything_to_compile / "Python.h").unlink()
    else:
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (6, 1))
    assert not is_compiled(None, device, deterministic=False)
    with pytest.raises(ValueError, match=rf"train\.compile must be .* without {missing}.*got true"):
        is_compiled(True, device, deterministic=False)


def flat(model: nn.Module) -> Tensor:
    return torch.cat([p.detach().reshape(-1) for p in model.parameters()]).clone()


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("c++") is None, reason="no C++ compiler")
def test_compiled_model_trains_alike_and_is_compiled_once_for_all_clients(
    model: UNet, digits: ImageSet, objective: DiffusionObjective
) -> None:
    for block in model.modules():
        if isinstance(block, nn.Dropout2d):
            block.p = 0.0  # compiled code draws what to drop in its own way
    start = flat(model)
    compiled = copy.deepcopy(model)
    compile_where_wanted(compiled, True, torch.device("cpu"), deterministic=False)
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    # Full batches of 64, and last ones of 8, 22, 47, 36, 26 and 5.
    for client, count in enumerate((200, 150, 111, 100, 90, 69)):
        images = digits.subset(np.arange(count))
        for each in (model, compiled):
            train(each, images, objective, generator=seeded(client))
    # Adam's first steps are as long as lr however small a gradient, so single weights part by more.
    plain, fused = flat(model), flat(compiled)
    assert (fused - plain).norm() < 0.1 * (plain - start).norm()
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 3


def test_device_is_the_one_named() -> None:
    assert select_device("cpu") == torch.device("cpu")
    assert select_device("auto").type == ("cuda" if torch.cuda.is_available() else "cpu")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
@pytest.mark.parametrize("name", ["cuda", "cuda:0", "cuda:7"])
def test_missing_gpu_is_refused_with_a_way_out(name: str) -> None:
    with pytest.raises(ValueError, match=rf"train\.device must be auto or cpu .*got '{name}'"):
        select_device(name)


@pytest.mark.parametrize("precision", ["float16", "auto", ""])
def test_unknown_precision_is_refused(
    precision: str, model: UNet, digits: ImageSet, objective: DiffusionObjective
) -> None:
    message = f"precision must be float32 or bfloat16, got {precision!r}"
    with pytest.raises(ValueError, match=message):
        autocast(torch.device("cpu"), precision)
    with pytest.raises(ValueError, match=message):
        train(model, digits, objective, precision=precision)
    with pytest.raises(ValueError, match=message):
        measure(model, digits, objective, precision=precision)


def test_no_images_are_refused(
    model: UNet, digits: ImageSet, objective: DiffusionObjective
) -> None:
    none = digits.subset(np.array([], dtype=np.int64))
    with pytest.raises(ValueError, match="at least 1 image to train, got 0"):
        train(model, none, objective)
    with pytest.raises(ValueError, match="at least 1 image, got 0"):
        measure(model, none, objective)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_gpu_gives_about_the_same_held_out_loss(
    model: UNet, digits: ImageSet, objective: DiffusionObjective
) -> None:
    expected = measure(model, digits, objective)
    found = measure(model, digits, objective, generator=torch.Generator("cuda").manual_seed(0))
    assert next(model.parameters()).device.type == "cuda"
    assert found == pytest.approx(expected, rel=0.1)  # other noise
