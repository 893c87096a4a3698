import copy
import math
import platform
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Iterator, Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from task.config import load_config
from task.data import ImageSet, build_dataset, normalize
from task.generators.base import Batch, Generator
from task.generators.diffusion.generator import Diffusion, build_diffusion
from task.generators.registry import weightless_generator
from task.randomness import seeded_global_generator
from task.training.devices import (
    autocast,
    check_deterministic,
    compile_where_wanted,
    configure_torch,
    is_compiled,
    select_device,
)
from task.training.loop import (
    Callback,
    FitResult,
    Optimizers,
    fit,
    fit_options,
    held_out_losses,
)
from task.training.precision import fastest_precision
from tests.training.generators import Known

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


@pytest.fixture
def model() -> Diffusion:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return build_diffusion(CONFIG)


def seeded(seed: int = 1) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def train(
    model: Generator,
    images: ImageSet,
    rng: torch.Generator | None = None,
    *,
    lr: float = 1e-3,
    callbacks: list[Callback] | None = None,
    received: Mapping[str, Tensor] | None = None,
    **options: Any,
) -> FitResult:
    defaults = {"epochs": 1, "batch_size": 64, "precision": "float32"}
    return fit(
        *(model, images.images, images.labels),
        options=fit_options(CONFIG, **(defaults | options)),
        optimizers=model.optimizers(lr),
        rng=rng or seeded(),
        callbacks=callbacks or [],
        received=received,
    )


def measure(
    model: Generator, images: ImageSet, rng: torch.Generator | None = None, **options: Any
) -> float:
    defaults = {"batch_size": 64, "precision": "float32"}
    losses = held_out_losses(
        *(model, images.images, images.labels),
        options=fit_options(CONFIG, **(defaults | options)),
        rng=rng or seeded(99),
    )
    assert losses is not None
    return losses["loss"]


def same_bits(one: nn.Module, other: nn.Module) -> bool:
    first, second = one.state_dict(), other.state_dict()
    return all(torch.equal(first[name], second[name]) for name in first)


def numbered(count: int) -> ImageSet:
    """Images that are as bright as their number says, which is their label as well."""
    numbers = torch.arange(count)
    pixels = numbers.to(torch.uint8)[:, None, None, None].repeat(1, 1, 8, 8)
    return ImageSet(pixels, numbers)


def test_loss_goes_down_on_real_digits(model: Diffusion, digits: ImageSet) -> None:
    before = measure(model, digits)
    first = train(model, digits, lr=3e-3, batch_size=32)
    last = train(model, digits, lr=3e-3, batch_size=32, epochs=8, rng=seeded(2))
    after = measure(model, digits)
    assert after < 0.8 * before
    assert last.loss < first.loss < before


def test_steps_are_those_of_the_optimizer_on_the_mean_loss_of_a_batch() -> None:
    images = numbered(12)

    def squared(model: Known, batch: Batch) -> Tensor:
        return (model.weight * batch.labels - 3).square()

    trained, expected = Known(squared), Known(squared)
    result = train(trained, images, epochs=5, batch_size=12, lr=0.01)
    optimizer = torch.optim.SGD(expected.parameters(), lr=0.01)
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
    model: Diffusion, digits: ImageSet
) -> None:
    one, again, other = (copy.deepcopy(model) for _ in range(3))
    losses = [
        train(trained, digits, rng=seeded(seed)).loss
        for trained, seed in ((one, 1), (again, 1), (other, 2))
    ]
    assert same_bits(one, again) and losses[0] == losses[1]
    assert not same_bits(one, other) and losses[0] != losses[2]
    assert not same_bits(one, model)


def test_dropout_follows_the_generator_and_the_global_one_stays(
    model: Diffusion, digits: ImageSet
) -> None:
    plain = copy.deepcopy(model)
    for module in plain.modules():
        if isinstance(module, nn.Dropout2d):
            module.p = 0.0
    one, again = copy.deepcopy(model), copy.deepcopy(model)
    for trained, seed in ((one, 5), (again, 6), (plain, 5)):
        torch.manual_seed(seed)
        state = torch.get_rng_state()
        train(trained, digits)
        assert torch.equal(torch.get_rng_state(), state)
    assert same_bits(one, again)
    assert not same_bits(one, plain)  # there was dropout to be seeded


def test_every_image_is_seen_once_in_every_epoch_in_a_new_order() -> None:
    recorder = Known()
    train(recorder, numbered(10), epochs=3, batch_size=4)
    assert [len(batch) for batch in recorder.batches] == [4, 4, 2] * 3
    labels = torch.cat([batch.labels for batch in recorder.batches]).reshape(3, 10)
    assert all(sorted(epoch) == [*range(10)] for epoch in labels.tolist())
    assert len({tuple(epoch) for epoch in labels.tolist()}) == 3


def test_images_are_normalized_and_stay_with_their_labels() -> None:
    recorder = Known()
    train(recorder, numbered(10), batch_size=4, channels_last=False)
    for batch in recorder.batches:
        expected = normalize(batch.labels.to(torch.uint8))[:, None, None, None]
        assert torch.equal(batch.images, expected.expand(-1, 1, 8, 8))
        assert torch.equal(batch.indices, batch.labels)


def test_last_partial_batch_counts_by_its_images() -> None:
    # Means of batches of 4, 4 and 1 images; only weighted do they give the mean of all.
    images = numbered(9)
    result = train(Known(), images, epochs=2, batch_size=4)
    assert result.loss == pytest.approx(4.0, rel=1e-6)
    assert measure(Known(), images, batch_size=4) == pytest.approx(4.0, rel=1e-6)


def test_speed_is_images_of_all_epochs_over_seconds() -> None:
    result = train(Known(), numbered(10), epochs=3)
    assert result.seconds > 0
    assert result.images_per_second * result.seconds == pytest.approx(30)


@pytest.mark.parametrize("flip", [False, True])
def test_images_are_mirrored_only_where_asked(flip: bool) -> None:
    images = ImageSet(
        torch.arange(8, dtype=torch.uint8).expand(100, 1, 8, 8), torch.zeros(100).long()
    )
    recorder = Known()
    train(recorder, images, horizontal_flip=flip)
    seen = torch.cat([batch.images for batch in recorder.batches])
    mirrored = (seen[:, 0, 0, 0] > seen[:, 0, 0, -1]).sum()
    assert 30 < mirrored < 70 if flip else mirrored == 0


@pytest.mark.parametrize("channels_last", [False, True])
def test_memory_format_is_that_of_model_and_images(channels_last: bool) -> None:
    recorder = Known()
    recorder.kernel = nn.Conv2d(4, 4, 3)
    images = ImageSet(torch.zeros(4, 3, 8, 8, dtype=torch.uint8), torch.zeros(4).long())
    train(recorder, images, channels_last=channels_last)
    wanted = torch.channels_last if channels_last else torch.contiguous_format
    assert recorder.batches[0].images.is_contiguous(memory_format=wanted)
    assert recorder.kernel.weight.is_contiguous(memory_format=wanted)


def test_memory_format_changes_the_weights_by_rounding_only(
    model: Diffusion, digits: ImageSet
) -> None:
    other = copy.deepcopy(model)
    train(model, digits, channels_last=True)
    train(other, digits, channels_last=False)
    for one, two in zip(model.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(one, two, rtol=1e-3, atol=1e-4)


def test_bfloat16_comes_close_to_float32_and_keeps_float32_weights(
    model: Diffusion, digits: ImageSet
) -> None:
    other = copy.deepcopy(model)
    full = train(model, digits, epochs=2)
    half = train(other, digits, epochs=2, precision="bfloat16")
    assert half.loss != full.loss
    assert half.loss == pytest.approx(full.loss, rel=0.02)
    assert {p.dtype for p in other.parameters()} == {torch.float32}
    expected = measure(model, digits)
    assert measure(other, digits) == pytest.approx(expected, rel=0.05)
    assert measure(model, digits, precision="bfloat16") == pytest.approx(expected, rel=0.02)


def test_held_out_loss_repeats_and_has_no_side_effects(model: Diffusion, digits: ImageSet) -> None:
    before, state = copy.deepcopy(model), torch.get_rng_state()
    losses = [measure(model, digits) for _ in range(2)]
    assert losses[0] == losses[1]
    assert measure(model, digits, rng=seeded(7)) != losses[0]
    assert same_bits(model, before)
    assert all(parameter.grad is None for parameter in model.parameters())
    assert torch.equal(torch.get_rng_state(), state)


def test_held_out_loss_is_that_of_the_generator_without_dropout(
    model: Diffusion, digits: ImageSet
) -> None:
    found = measure(model.train(), digits, batch_size=200)
    with torch.no_grad():
        batch = Batch(normalize(digits.images), digits.labels, torch.arange(200))
        expected = model.eval().example_losses(batch, seeded(99))["loss"]
    assert found == pytest.approx(expected.mean().item(), rel=1e-5)


class Lossless(Known):
    def example_losses(self, batch: Batch, rng: torch.Generator) -> None:
        return None


def test_family_without_a_loss_of_an_image_has_no_held_out_losses() -> None:
    images = numbered(4)
    options, nothing = fit_options(CONFIG, precision="float32"), Lossless()
    args = (nothing, images.images, images.labels)
    assert held_out_losses(*args, options=options, rng=seeded()) is None


class Adversarial(Known):
    """Two players whose losses are computed lazily: the second sees the first's step."""

    def __init__(self) -> None:
        super().__init__()
        self.other = nn.Parameter(torch.tensor(1.0))
        self.seen: list[tuple[float, float]] = []
        self.steps = 0

    def optimizers(self, lr: float) -> dict[str, torch.optim.Optimizer]:
        return {
            name: torch.optim.SGD([weight], lr=lr)
            for name, weight in (("critic", self.weight), ("artist", self.other))
        }

    def losses(self, batch: Batch, rng: torch.Generator) -> Iterator[tuple[str, Tensor]]:
        yield "critic", self.weight * torch.ones(len(batch))
        assert torch.is_autocast_enabled("cpu")
        self.seen.append((self.weight.item(), self.other.item()))
        yield "artist", self.weight * self.other * torch.ones(len(batch))

    def after_step(self) -> None:
        self.steps += 1


def test_each_loss_is_computed_after_the_step_of_the_one_before() -> None:
    model = Adversarial()
    result = train(model, numbered(3), lr=0.5, batch_size=3, epochs=2, precision="bfloat16")
    # The critic steps by 0.5, and the artist by 0.5 of what the critic is then.
    assert model.seen == [(0.5, 1.0), (0.0, 0.75)]
    assert (model.weight.item(), model.other.item()) == (0.0, 0.75)
    assert model.steps == 2
    assert result.loss == pytest.approx(((1 + 0.5) + (0.5 + 0)) / 2)


class Pull(Callback):
    """FedProx's pull to the weights that the server sent, beside a correction of the server's."""

    def __init__(self, strength: float) -> None:
        self.strength = strength
        self.names: list[str] = []

    def start(
        self, generator: Generator, optimizers: Optimizers, received: Mapping[str, Tensor]
    ) -> None:
        self.weights = list(generator.parameters())
        self.anchors = [weight.detach().clone() for weight in self.weights]
        self.correction = received["correction"]

    def before_step(self, name: str) -> None:
        self.names.append(name)
        for weight, anchor in zip(self.weights, self.anchors, strict=True):
            assert weight.grad is not None
            weight.grad += self.strength * (weight.detach() - anchor) + self.correction

    def finish(self) -> Mapping[str, Tensor]:
        return {"steps": torch.tensor(len(self.names))}


def test_accumulated_batches_train_as_one_batch_of_all() -> None:
    for num_images in (8, 9, 5):  # the last step of an epoch has two batches, one, and a short one
        whole, parts = Accumulated(), Accumulated()
        common = {"lr": 0.1, "epochs": 2}
        expected = train(whole, numbered(num_images), batch_size=4, **common)
        found = train(parts, numbered(num_images), batch_size=2, accumulation=2, **common)
        assert parts.weight.item() == pytest.approx(whole.weight.item(), rel=1e-6)
        assert parts.weight.item() != 1.0
        assert found.loss == pytest.approx(expected.loss, rel=1e-6)
        assert parts.steps == whole.steps == 2 * math.ceil(num_images / 4)


class Accumulated(Known):
    """Its loss depends on weight and label, so that every batch must count by its images."""

    def __init__(self) -> None:
        super().__init__(lambda model, batch: (model.weight - batch.labels).square())
        self.steps = 0

    def after_step(self) -> None:
        self.steps += 1


def test_callback_changes_gradients_and_tells_the_server() -> None:
    def rising(model: Known, batch: Batch) -> Tensor:
        return -model.weight * torch.ones(len(batch))

    model, pull = Known(rising), Pull(strength=2.0)
    received = {"correction": torch.tensor(0.25)}
    result = train(
        *(model, numbered(4)),
        **{"lr": 0.1, "epochs": 3, "batch_size": 2},
        callbacks=[pull],
        received=received,
    )
    # Of plain steps: x <- x - 0.1 (-1 + 2 (x - 1) + 0.25), six times.
    expected = 1.0
    for _ in range(6):
        expected -= 0.1 * (-1 + 2 * (expected - 1) + 0.25)
    assert model.weight.item() == pytest.approx(expected, rel=1e-6)
    assert pull.names == ["sgd"] * 6 and result.tensors == {"steps": torch.tensor(6)}


def test_model_trains_on_after_a_held_out_loss(model: Diffusion, digits: ImageSet) -> None:
    other = copy.deepcopy(model)
    measure(other, digits)
    train(model, digits)
    train(other, digits)
    assert same_bits(model, other)


def test_fastest_precision_names_one_and_leaves_model_and_generator(model: Diffusion) -> None:
    before, state = copy.deepcopy(model.eval()), torch.get_rng_state()
    assert fastest_precision(CONFIG, model, CPU) in ("float32", "bfloat16")
    assert same_bits(model, before) and not model.training
    assert torch.equal(torch.get_rng_state(), state)


class Slow(Known):
    """A model that takes its time in one of the two precisions."""

    def __init__(self, precision: str) -> None:
        super().__init__()
        self.slow_under_autocast = precision == "bfloat16"

    def losses(self, batch: Batch, rng: torch.Generator) -> Iterator[tuple[str, Tensor]]:
        if torch.is_autocast_enabled("cpu") == self.slow_under_autocast:
            torch.randn(400_000).sort()
        yield from super().losses(batch, rng)


@pytest.mark.parametrize("patience", [20.0, 0.0])
@pytest.mark.parametrize(("slow", "fast"), [("float32", "bfloat16"), ("bfloat16", "float32")])
def test_fastest_precision_names_the_faster(
    slow: str, fast: str, patience: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("task.training.precision.PRECISION_SECONDS", patience)
    assert fastest_precision(CONFIG, Slow(slow), CPU) == fast


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
    monkeypatch.setattr("task.training.devices.find_spec", lambda _: True)
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
    model: Diffusion, digits: ImageSet
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
            train(each, images, rng=seeded(client))
    # Adam's first steps are as long as lr however small a gradient, so single weights part by more.
    plain, fused = flat(model), flat(compiled)
    assert (fused - plain).norm() < 0.1 * (plain - start).norm()
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 3


def test_device_is_the_one_named() -> None:
    assert select_device("cpu") == torch.device("cpu")
    assert select_device("auto").type == ("cuda" if torch.cuda.is_available() else "cpu")


def test_family_without_deterministic_gradients_on_a_gpu_is_refused_there(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    for model, refused in (("stylegan2_ada_tiny", True), ("resnet_gan", False)):
        config = load_config([f"model={model}", "train.deterministic=true"])
        generator = weightless_generator(config)
        on_cpu = config.changed({"train.device": "cpu"})
        for each in (on_cpu, on_cpu.changed({"train.deterministic": False})):
            check_deterministic(generator, each)
        with pytest.raises(ValueError) if refused else nullcontext() as error:
            check_deterministic(generator, config)
        if refused:
            assert "train.deterministic must be false on a GPU" in str(error.value)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
@pytest.mark.parametrize("name", ["cuda", "cuda:0", "cuda:7"])
def test_missing_gpu_is_refused_with_a_way_out(name: str) -> None:
    with pytest.raises(ValueError, match=rf"train\.device must be auto or cpu .*got '{name}'"):
        select_device(name)


@pytest.mark.parametrize("precision", ["float16", "auto", ""])
def test_unknown_precision_is_refused(precision: str, model: Diffusion, digits: ImageSet) -> None:
    message = f"precision must be float32 or bfloat16, got {precision!r}"
    with pytest.raises(ValueError, match=message):
        autocast(torch.device("cpu"), precision)
    with pytest.raises(ValueError, match=message):
        train(model, digits, precision=precision)
    with pytest.raises(ValueError, match=message):
        measure(model, digits, precision=precision)


def test_no_images_are_refused(model: Diffusion, digits: ImageSet) -> None:
    none = digits.subset(np.array([], dtype=np.int64))
    with pytest.raises(ValueError, match="at least 1 image to train, got 0"):
        train(model, none)
    with pytest.raises(ValueError, match="at least 1 image, got 0"):
        measure(model, none)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_gpu_gives_about_the_same_held_out_loss(model: Diffusion, digits: ImageSet) -> None:
    expected = measure(model, digits)
    found = measure(model, digits, rng=torch.Generator("cuda").manual_seed(0))
    assert next(model.parameters()).device.type == "cuda"
    assert found == pytest.approx(expected, rel=0.1)  # other noise
