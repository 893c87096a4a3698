"""Several processes against one, with gloo on a CPU."""

import copy
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from task.config import load_config
from task.data import ImageSet, build_dataset
from task.generators.base import Batch, Generator
from task.generators.diffusion.generator import Diffusion, build_diffusion
from task.training.algorithms.names import CONTROL, OWN_CONTROL
from task.training.algorithms.scaffold import ControlVariate
from task.training.distributed import count_processes
from task.training.loop import Callback, FitResult, fit, fit_options
from tests.processes import process, wait_for
from tests.training.generators import Known

ROOT = Path(__file__).resolve().parents[2]
SMALL = ["experiment=demo", "model.width=8", "model.num_poolings=1", "data.image_size=8"]
CONFIG = load_config([*SMALL, "diffusion.label_dropout=0.2"])


@pytest.fixture(scope="module")
def digits() -> ImageSet:
    return build_dataset(CONFIG, download=False).train.subset(np.arange(68))


def new_model(*, dropout: float) -> Diffusion:
    config = load_config([*SMALL, "diffusion.label_dropout=0.2", f"model.dropout={dropout}"])
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return build_diffusion(config)


class Training:
    """A model and what trains it, on the digits."""

    def __init__(self, model: Generator, *, num_processes: int) -> None:
        self.model, self.num_processes = copy.deepcopy(model), num_processes
        self.optimizers = self.model.optimizers(lr=1e-3)
        self.rng = torch.Generator().manual_seed(1)

    def __call__(
        self,
        images: ImageSet,
        callbacks: tuple[Callback, ...] = (),
        received: Mapping[str, Tensor] | None = None,
        **options: Any,
    ) -> FitResult:
        defaults = {
            **{"epochs": 1, "batch_size": 33, "horizontal_flip": True, "precision": "float32"},
            **{"num_processes": self.num_processes, "compile": False},
        }
        return fit(
            *(self.model, images.images, images.labels),
            options=fit_options(CONFIG, **(defaults | options)),
            optimizers=self.optimizers,
            rng=self.rng,
            callbacks=callbacks,
            received={"pull": torch.tensor(0.5), **(received or {})},
        )

    def weights(self) -> dict[str, Tensor]:
        return self.model.state_dict()


def gaps(one: Training, other: Training) -> float:
    return max((one.weights()[n] - t).abs().max().item() for n, t in other.weights().items())


@pytest.mark.slow
def test_two_processes_go_where_one_goes_with_the_same_batch(digits: ImageSet) -> None:
    alone, together = (Training(new_model(dropout=0), num_processes=n) for n in (1, 2))
    start = copy.deepcopy(alone)
    # The second call goes on with the same Adam; its last batch is smaller than the processes.
    for images, batch_size in ((digits, 33), (digits.subset(np.arange(35)), 17)):
        expected, found = (
            each(images, epochs=2, batch_size=batch_size) for each in (alone, together)
        )
        assert found.loss == pytest.approx(expected.loss, rel=1e-6)
        assert found.images_per_second * found.seconds == pytest.approx(2 * len(images))
    # Adam makes a step of a gradient's rounding near 0; whole steps go a hundred times as far.
    assert gaps(alone, together) < 2e-5 < 1e-3 < gaps(start, together)
    assert torch.equal(alone.rng.get_state(), together.rng.get_state())
    moments = (each.optimizers["adam"].state_dict()["state"] for each in (alone, together))
    for one, other in zip(*(m.values() for m in moments), strict=True):
        assert one["step"] == other["step"] == 12
        torch.testing.assert_close(one["exp_avg"], other["exp_avg"], rtol=1e-3, atol=1e-6)


@pytest.mark.slow
def test_processes_drop_channels_of_their_own_and_repeat_to_the_bit(digits: ImageSet) -> None:
    model = new_model(dropout=0.5)
    alone, together, again = (Training(model, num_processes=n) for n in (1, 2, 2))
    losses = [each(digits).loss for each in (alone, together, again)]
    assert gaps(together, again) == 0 and losses[1] == losses[2]
    assert gaps(alone, together) > 1e-4 and losses[0] != losses[1]


class Counting(Callback):
    """Adds what the server sent to every gradient, and counts steps."""

    def start(self, generator: Generator, optimizers: Any, received: Any) -> None:
        self.weights, self.pull = [*generator.parameters()], received["pull"]
        self.steps = 0

    def before_step(self, name: str) -> None:
        self.steps += 1
        for weight in self.weights:
            assert weight.grad is not None
            weight.grad += self.pull

    def finish(self) -> dict[str, Tensor]:
        return {"steps": torch.tensor(self.steps)}


@pytest.mark.slow
def test_callbacks_change_the_steps_of_all_processes_and_tell_once(digits: ImageSet) -> None:
    # Every step of SGD is 1e-3 of the pull alone, whatever the images.
    training = Training(Known(), num_processes=2)
    result = training(digits, callbacks=(Counting(),))
    assert training.model.weight.item() == pytest.approx(1 - 3 * 0.5e-3)
    assert result.tensors == {"steps": torch.tensor(3)}


@pytest.mark.slow
def test_control_variates_of_two_processes_are_those_of_one(digits: ImageSet) -> None:
    model = new_model(dropout=0)
    control = torch.full((model.num_parameters,), 0.01)
    own = torch.zeros(model.num_parameters)
    trainings = [Training(model, num_processes=n) for n in (1, 2)]
    alone, together = (
        each(digits, (ControlVariate(),), {CONTROL: control, OWN_CONTROL: own}).tensors[OWN_CONTROL]
        for each in trainings
    )
    torch.testing.assert_close(together, alone, rtol=1e-2, atol=1e-5)
    assert alone.abs().mean() > 1e-3 and gaps(*trainings) < 2e-5


@pytest.mark.parametrize("count", [1, 2, 3, 5, 8])
def test_parts_of_a_batch_make_the_loss_and_the_gradient_of_the_whole(count: int) -> None:
    model = new_model(dropout=0)
    numbers = torch.arange(5)

    def loss_and_gradient(rank: int, count: int) -> list[Tensor]:
        images = torch.rand(5, 1, 8, 8, generator=torch.Generator().manual_seed(2))
        batch = Batch(images, numbers, numbers, rank, count)
        ((_, losses),) = model.losses(batch, torch.Generator().manual_seed(3))
        loss = batch.weight * losses.mean()
        return [loss, *torch.autograd.grad(loss, [*model.parameters()])]

    parts = [loss_and_gradient(rank, count) for rank in range(count)]
    for whole, *shared in zip(loss_and_gradient(0, 1), *parts, strict=True):
        torch.testing.assert_close(torch.stack(shared).mean(0), whole, rtol=1e-4, atol=1e-6)
    assert sum(part[0] == 0 for part in parts) == max(0, count - 5)


class Failing(Known):
    """It fails in one of two processes while the other waits for it."""

    def __init__(self, failure: Callable[[], None]) -> None:
        super().__init__()
        self.failure = failure

    def losses(self, batch: Batch, rng: torch.Generator) -> Iterator[tuple[str, Tensor]]:
        if batch.rank == 1:
            self.failure()
        yield from super().losses(batch, rng)


def no_memory() -> None:
    raise torch.OutOfMemoryError("no memory left")


def sudden_end() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.parametrize(
    ("failure", "expected", "message"),
    [
        (no_memory, torch.OutOfMemoryError, "no memory left"),
        pytest.param(
            *(sudden_end, RuntimeError, r"ended without an exc.*, exit codes .*-9.*lower train\.b"),
            marks=pytest.mark.slow,
        ),
    ],
)
def test_one_that_fails_ends_all_and_its_exception_is_raised_here(
    digits: ImageSet, failure: Any, expected: type[Exception], message: str
) -> None:
    training = Training(Failing(failure), num_processes=2)
    before = copy.deepcopy(training)
    with pytest.raises(expected, match=message) as caught:
        training(digits)
    assert gaps(before, training) == 0
    assert not torch.multiprocessing.active_children()
    if failure is no_memory:
        assert "in no_memory" in caught.value.__notes__[0]  # where it happened, for the log


def never() -> None:
    time.sleep(600)


ORPHANS = """
import torch
from tests.training.test_distributed import Failing, Training, build_dataset, CONFIG, never
if __name__ == "__main__":
    digits = build_dataset(CONFIG, download=False).train
    Training(Failing(never), num_processes=2)(digits)
"""


def children_of(pid: int) -> list[int]:
    found = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    commands = {int(child): Path(f"/proc/{child}/cmdline").read_bytes() for child in found}
    return [child for child, command in commands.items() if b"spawn_main" in command]


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere nothing ends them")
def test_killed_parent_leaves_no_process(tmp_path: Path) -> None:
    script = tmp_path / "main.py"
    script.write_text(ORPHANS)
    with process(
        [sys.executable, script], log=tmp_path / "log", cwd=ROOT, env={"PYTHONPATH": str(ROOT)}
    ) as parent:
        wait_for(lambda: len(children_of(parent.pid)) == 2, seconds=120, what="two processes")
        children = children_of(parent.pid)
        # Not only while they start: one waits for the other, deep in gloo.
        wait_for(
            lambda: all(len([*Path(f"/proc/{c}/task").iterdir()]) > 3 for c in children),
            seconds=120,
            what="the start of their communication",
        )
        parent.kill()
        parent.wait()
        wait_for(
            lambda: not any(Path(f"/proc/{child}").exists() for child in children),
            seconds=20,
            what="their end",
        )


@pytest.mark.parametrize("one_per_gpu", [True, False])
def test_a_cpu_takes_one_process_or_as_many_as_asked(one_per_gpu: bool) -> None:
    cpu = torch.device("cpu")
    counts = [count_processes(wanted, cpu, one_per_gpu=one_per_gpu) for wanted in (None, 1, 3)]
    assert counts == [1, 1, 3]


@pytest.fixture
def gpus(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The GPUs of a machine, by model, to be filled by the test."""
    models: list[str] = []
    monkeypatch.setattr(torch.cuda, "device_count", lambda: len(models))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda number: models[number])
    return models


def test_gpus_are_all_used_where_they_are_alike(gpus: list[str]) -> None:
    cuda = torch.device("cuda")
    gpus += ["A", "A", "A"]
    assert count_processes(None, cuda, one_per_gpu=True) == 3
    assert count_processes(None, cuda, one_per_gpu=False) == 1
    assert count_processes(2, cuda, one_per_gpu=False) == 2
    assert count_processes(None, torch.device("cuda:1"), one_per_gpu=True) == 1
    gpus[1] = "B"
    assert count_processes(None, cuda, one_per_gpu=True) == 1


@pytest.mark.parametrize(
    ("models", "device", "message"),
    [
        (["A"], "cuda", r"at most 1, the GPUs .*\(or null\), with train\.device=cuda, got 2"),
        (["A", "A"], "cuda:1", r"at most 1, .* with train\.device=cuda:1, got 2"),
        (["A", "B"], "cuda", r"1 \(or CUDA_VISIBLE_DEVICES .*\['A', 'B'\], got 2"),
    ],
)
def test_more_processes_than_gpus_that_are_alike_are_refused(
    gpus: list[str], models: list[str], device: str, message: str
) -> None:
    gpus += models
    with pytest.raises(ValueError, match=f"train.num_processes must be {message}"):
        count_processes(2, torch.device(device), one_per_gpu=True)
