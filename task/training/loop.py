"""The training loop: the same for clients, for the pooled data, and for what times a step."""

import copy
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from task.config import Config
from task.data import normalize, random_horizontal_flip
from task.generators.base import Batch, Generator, NothingMeasured
from task.randomness import seeded_global_generator
from task.training.devices import autocast, compile_where_wanted, move
from task.training.distributed import average_gradients, average_results, run_in_processes
from task.training.private import (
    PatientSampler,
    PrivateDraws,
    PrivateSteps,
    SeededDraws,
    check_private,
    joined_patients,
    private_gradient,
    secret_generator,
)

Optimizers = Mapping[str, torch.optim.Optimizer]


@dataclass(frozen=True, kw_only=True)
class FitOptions:
    """How a generator is trained.

    Attributes:
        epochs: passes over the images, each in a new order; the last partial batch counts.
        batch_size: images that go through the networks at a time.
        horizontal_flip: mirror each image with probability 1/2.
        precision: "float32", or "bfloat16" for autocast over float32 weights.
        channels_last: memory format of images and weights.
        accumulation: batches whose mean gradient a step is taken on.
        clip_norm: the largest L2 norm of the gradients of an optimizer's step; None: any.
        num_processes: that train together, see `task.training.distributed.count_processes`.
        compile: `train.compile`, for the other processes; this one has done it.
        private: how each patient is protected, in place of epochs over all images; None: not.
    """

    epochs: int
    batch_size: int
    horizontal_flip: bool
    precision: str
    channels_last: bool
    accumulation: int = 1
    clip_norm: float | None = None
    num_processes: int = 1
    compile: bool | None = None
    private: PrivateSteps | None = None


def fit_options(config: Config, **changes: Any) -> FitOptions:
    """Make the options of a configuration, with some of them changed."""
    train = config.train
    options = FitOptions(
        epochs=train.local_epochs,
        batch_size=train.trained_batch_size,
        horizontal_flip=config.data.horizontal_flip,
        precision=train.precision,
        channels_last=train.channels_last,
        accumulation=train.accumulation,
        clip_norm=train.clip_norm,
        compile=train.compile,
        private=PrivateSteps.of(config),
    )
    return replace(options, **changes)


def timed_options(config: Config, *, epochs: int, **changes: Any) -> FitOptions:
    """Make options that look at each image so many times, to measure what a run's training takes.

    With differential privacy every image, as of a patient of its own, is drawn in each step.
    """
    options = fit_options(config, epochs=epochs, **changes)
    if options.private is not None:
        spending = replace(options.private.spending, sampling_rate=1.0, steps=epochs)
        options = replace(options, private=replace(options.private, spending=spending))
    return options


@dataclass(frozen=True)
class FitResult:
    """What a client reports of its local epochs.

    Attributes:
        loss: mean over the images of all epochs; the sum of those of a family with several.
        measures: what the family measured of it, by the names of `Generator.measures`.
        seconds: wall-clock time.
        images_per_second: images that went through the networks, over `seconds`.
        tensors: what the callbacks leave, for the server or the client's next round, by name.
    """

    loss: float
    seconds: float
    images_per_second: float
    measures: dict[str, float] = field(default_factory=dict)
    tensors: dict[str, Tensor] = field(default_factory=dict)


class Callback:
    """The client's part of a federated algorithm; this one does nothing.

    With several processes each has a copy, and that of the first one finishes.
    """

    def start(
        self, generator: Generator, optimizers: Optimizers, received: Mapping[str, Tensor]
    ) -> None:
        """Begin the local epochs.

        Args:
            generator: with the weights that the server sent, on its device.
            optimizers: of the generator.
            received: what the server sent beside the weights, and what `finish` has left in the
                client's last round, by name, on the CPU.
        """

    def before_step(self, name: str) -> None:
        """Change the gradients of the generator before the optimizer of a name takes its step.

        With several processes they are the same in all of them.
        """

    def finish(self) -> Mapping[str, Tensor]:
        """End the local epochs; returns what is sent beside the weights, or kept, on the CPU."""
        return {}


def fit(
    generator: Generator,
    images: Tensor,
    labels: Tensor,
    *,
    options: FitOptions,
    optimizers: Optimizers,
    rng: torch.Generator,
    callbacks: Sequence[Callback] = (),
    received: Mapping[str, Tensor] | None = None,
    patients: Tensor | None = None,
    private_draws: PrivateDraws | None = None,
) -> FitResult:
    """Train a generator on images, such as the local epochs of one client.

    Args:
        generator: trained in place, on the device of `rng`, and left in training mode. Where
            several processes train, it stays where it is and takes the weights up.
        images: [N, C, H, W] uint8.
        labels: [N] int64.
        options: how.
        optimizers: of `Generator.optimizers`; every round of a client has new ones.
        rng: of every draw; its device is the one that is trained on.
        callbacks: of the federated algorithm.
        received: see `Callback.start`.
        patients: [N] int64, equal for the images of one patient, whom `options.private` protects;
            None: each image is of another.
        private_draws: of patients and noise, where they are protected; None: from `rng`.

    Raises:
        ValueError: there are no images, no such precision, or batches are to be accumulated for
            several optimizers.
        RuntimeError: one of several processes was killed.

    Source: Algorithm 1 of the paper, the lines of the client.
    """
    if len(images) == 0:
        raise ValueError("a client needs at least 1 image to train, got 0")
    if options.private is None and options.accumulation > 1 and len(optimizers) > 1:
        raise ValueError(
            f"train.accumulation must be 1 with a {generator.title}, whose {len(optimizers)} "
            f"optimizers follow each other, got {options.accumulation}; train.batch_size alone "
            "says what a step is taken on"
        )
    if patients is None:
        patients = torch.arange(len(images))
    job = _Job(
        generator, images, labels, patients, private_draws, options, callbacks, received or {}
    )
    if options.num_processes == 1:
        return _fit(job, optimizers, rng)
    done = run_in_processes(
        _fit_beside,
        # A copy, because what is handed over moves to shared memory.
        replace(
            job,
            generator=copy.deepcopy(generator).cpu(),
            images=images.cpu(),
            labels=labels.cpu(),
        ),
        {name: _on_cpu(optimizer) for name, optimizer in optimizers.items()},
        rng.get_state(),
        num_processes=options.num_processes,
        device_type=rng.device.type,
    )
    generator.load_state_dict(done["generator"])
    generator.train()
    for name, optimizer in optimizers.items():
        optimizer.load_state_dict(done["optimizers"][name])
    rng.set_state(done["rng"])
    return FitResult(**done["result"])


@dataclass(frozen=True)
class _Job:
    """What is trained on what, and how; see `fit`."""

    generator: Generator
    images: Tensor
    labels: Tensor
    patients: Tensor
    private_draws: PrivateDraws | None
    options: FitOptions
    callbacks: Sequence[Callback]
    received: Mapping[str, Tensor]


def _fit(job: _Job, optimizers: Optimizers, rng: torch.Generator, rank: int = 0) -> FitResult:
    options, device = job.options, rng.device
    move(job.generator, device, channels_last=options.channels_last)
    job.generator.train()
    job = replace(job, images=job.images.to(device), labels=job.labels.to(device))
    for callback in job.callbacks:
        callback.start(job.generator, optimizers, job.received)
    job.generator.start()
    start = time.perf_counter()
    with seeded_global_generator(rng, rank):
        if job.private_draws is not None:
            torch.set_rng_state(secret_generator(torch.device("cpu")).get_state())  # of dropout
        if options.private is None:
            loss_sum, seen = _train_epochs(job, optimizers, rng, rank)
        else:
            loss_sum, seen = _private_steps(job, options.private, optimizers, rng)
    mean_loss = float(loss_sum / seen)
    seconds = time.perf_counter() - start
    tensors = {n: t for callback in job.callbacks for n, t in callback.finish().items()}
    measures = {name: float(value) for name, value in job.generator.measured().items()}
    return FitResult(mean_loss, seconds, seen / seconds, measures, tensors)


def _train_epochs(
    job: _Job, optimizers: Optimizers, rng: torch.Generator, rank: int
) -> tuple[Tensor, int]:
    """Take the steps of all epochs; returns the sum of the losses, and of how many images."""
    options, device = job.options, rng.device
    loss_sum = torch.zeros((), device=device, dtype=torch.float64)
    for _ in range(options.epochs):
        order = torch.randperm(len(job.images), generator=rng, device=device)
        for indices in torch.split(order, options.batch_size * options.accumulation):
            # Read once at the end: reading a loss in the step would wait for the GPU.
            loss_sum += _step(job, indices, optimizers, rng, rank)
    return loss_sum, options.epochs * len(job.images)


def _private_steps(
    job: _Job, private: PrivateSteps, optimizers: Optimizers, rng: torch.Generator
) -> tuple[Tensor, int]:
    """Take the steps of a round, on patients in place of images; returns as `_train_epochs`."""
    generator = job.generator
    check_private(generator, optimizers)
    (name,) = {*optimizers} & generator.private
    optimizer = optimizers[name]
    trained = {id(each) for group in optimizer.param_groups for each in group["params"]}
    parameters: list[torch.nn.Parameter] = []
    # Of single images, such as latents: what stays with the client shows in no other patient's.
    own: list[torch.nn.Parameter] = []
    for path, each in generator.named_parameters():
        if id(each) in trained:
            is_own = generator.bound_to_images and generator.stays(path)
            (own if is_own else parameters).append(each)
    sampler = PatientSampler(joined_patients(job.images, job.patients))
    rate = private.spending.sampling_rate
    draws = job.private_draws or SeededDraws(rng)

    # Several patients are looked at together only as they come, and what has its noise is not to be
    # scaled by anything that knows of images.
    job = replace(job, options=replace(job.options, channels_last=False, clip_norm=None))
    generator.means = NothingMeasured()

    def mean_loss(indices: Tensor) -> Tensor:
        with autocast(rng.device, job.options.precision):
            return generator.private_losses(_batch(job, indices, rng, rank=0), rng).mean()

    loss_sum, seen = torch.zeros((), device=rng.device, dtype=torch.float64), 0
    for step in range(1, private.spending.steps + 1):
        drawn = sampler.draw(rate, draws)
        loss = private_gradient(
            generator,
            parameters,
            drawn,
            mean_loss,
            steps=private,
            expected_patients=rate * len(sampler),
            chunk=job.options.batch_size,
            draws=draws,
            own=own,
        )
        _take_step(job, name, optimizer)
        if step % generator.private_steps == 0:
            losses = generator.public_losses(job.options.batch_size, rng)
            for other, public in _under_autocast(losses, rng.device, job.options.precision):
                optimizers[other].zero_grad(set_to_none=True)
                public.mean().backward()  # type: ignore[no-untyped-call]
                _take_step(job, other, optimizers[other])
            generator.after_step()
        loss_sum += loss.double() * len(drawn)
        seen += len(drawn)
    return loss_sum, max(1, seen)


def _step(
    job: _Job, indices: Tensor, optimizers: Optimizers, rng: torch.Generator, rank: int
) -> Tensor:
    """Take the steps of the images of some indices; returns the sum of their losses, float64."""
    loss_sum = torch.zeros((), device=rng.device, dtype=torch.float64)
    batches = torch.split(indices, job.options.batch_size)
    for number, of_batch in enumerate(batches, start=1):
        batch = _batch(job, of_batch, rng, rank)
        losses = job.generator.losses(batch, rng)
        for name, each in _under_autocast(losses, rng.device, job.options.precision):
            loss = batch.weight * each.mean()
            if number == 1:
                optimizers[name].zero_grad(set_to_none=True)
            (loss * (len(batch) / len(indices))).backward()  # type: ignore[no-untyped-call]
            if number == len(batches):
                _take_step(job, name, optimizers[name])
            loss_sum += loss.detach().double() * len(batch)
    job.generator.after_step()
    return loss_sum


def _batch(job: _Job, indices: Tensor, rng: torch.Generator, rank: int) -> Batch:
    options = job.options
    memory_format = torch.channels_last if options.channels_last else torch.contiguous_format
    x_start = normalize(job.images[indices]).to(memory_format=memory_format)
    if options.horizontal_flip:
        x_start = random_horizontal_flip(x_start, rng)
    return Batch(x_start, job.labels[indices], indices, rank, options.num_processes)


def _take_step(job: _Job, name: str, optimizer: torch.optim.Optimizer) -> None:
    if job.options.num_processes > 1:
        average_gradients(optimizer)
    for callback in job.callbacks:
        callback.before_step(name)
    if job.options.clip_norm is not None:
        clip_gradients(optimizer, job.options.clip_norm)
    optimizer.step()


def clip_gradients(optimizer: torch.optim.Optimizer, norm: float) -> None:
    """Scale the gradients of an optimizer's parameters down to an L2 norm, all by one factor."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    torch.nn.utils.clip_grad_norm_(parameters, norm)


def _under_autocast(
    losses: Iterable[tuple[str, Tensor]], device: torch.device, precision: str
) -> Iterator[tuple[str, Tensor]]:
    """Compute each loss under autocast, and leave it for the step in between."""
    losses = iter(losses)
    while True:
        with autocast(device, precision):
            found = next(losses, None)
        if found is None:
            return
        yield found


def _fit_beside(
    rank: int,
    device: torch.device,
    job: _Job,
    optimizer_states: Mapping[str, dict[str, Any]],
    rng_state: Tensor,
) -> dict[str, Any]:
    """Be one of the processes that train together; returns what `fit` takes up."""
    # A copy, because a CPU would change what the others share.
    job = replace(job, generator=copy.deepcopy(job.generator))
    generator = job.generator
    move(generator, device, channels_last=job.options.channels_last)
    compile_where_wanted(
        generator,
        job.options.compile,
        device,
        deterministic=torch.are_deterministic_algorithms_enabled(),
    )
    optimizers = generator.optimizers(lr=0.0)
    for name, state in optimizer_states.items():
        optimizers[name].load_state_dict(copy.deepcopy(state))  # with its learning rate
    rng = torch.Generator(device)
    rng.set_state(rng_state)
    result = _fit(job, optimizers, rng, rank)
    numbers = [result.loss, *result.measures.values()]
    (loss, *measures), seconds = average_results(numbers, result.seconds, device)
    return {
        "generator": generator.state_dict(),
        "optimizers": {name: each.state_dict() for name, each in optimizers.items()},
        "rng": rng.get_state(),
        "result": {
            "loss": loss,
            "seconds": seconds,
            "images_per_second": job.options.epochs * len(job.images) / seconds,
            "measures": dict(zip(result.measures, measures, strict=True)),
            "tensors": result.tensors,
        },
    }


def _on_cpu(optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """Return the state of an optimizer with all of its tensors on the CPU."""
    state = optimizer.state_dict()
    gathered = {
        number: {name: tensor.cpu() for name, tensor in moments.items()}
        for number, moments in state["state"].items()
    }
    return {**state, "state": gathered}


@torch.no_grad()  # not inference_mode: the generator may be moved here and trained afterwards
def held_out_losses(
    generator: Generator,
    images: Tensor,
    labels: Tensor,
    *,
    options: FitOptions,
    rng: torch.Generator,
) -> dict[str, float] | None:
    """Return the mean loss over images and its parts, without training; None where there is none.

    The same state of `rng` gives the same draws, so that rounds can be compared.

    Args:
        generator: left in eval mode, on the device of `rng`.
        images: [N, C, H, W] uint8.
        labels: [N] int64.
        options: for the size of a batch, the precision and the memory format.
        rng: of every draw.

    Raises:
        ValueError: there are no images, or no such precision.
    """
    if len(images) == 0:
        raise ValueError("a held-out loss needs at least 1 image, got 0")
    device = rng.device
    memory_format = torch.channels_last if options.channels_last else torch.contiguous_format
    move(generator, device, channels_last=options.channels_last)
    generator.eval()
    sums: dict[str, Tensor] = {}
    for indices in torch.split(torch.arange(len(images)), options.batch_size):
        x_start = normalize(images[indices].to(device)).to(memory_format=memory_format)
        batch = Batch(x_start, labels[indices].to(device), indices.to(device))
        with autocast(device, options.precision):
            losses = generator.example_losses(batch, rng)
            if losses is None:
                return None
            for name, each in losses.items():
                sums[name] = sums.get(name, 0.0) + each.mean().double() * len(batch)
    return {name: float(each / len(images)) for name, each in sums.items()}
