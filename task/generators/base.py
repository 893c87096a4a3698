"""The contract of a generator: a model that is trained on images and draws images."""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Protocol

import torch
from torch import Tensor, nn

# draw_noise() -> standard normal noise beside N labels, [N, *Generator.noise_shape] float32, new at
# every call
NoiseSource = Callable[[], Tensor]
# Is told after each evaluation of a network for how many images it was.
Advance = Callable[[int], object]


# Of the loss of an image that is attacked.
MEMBER_DRAWS = 8


class Projection(Protocol):
    """An orthogonal projection onto what is known of images."""

    def __call__(self, images: Tensor) -> Tensor:
        """Project images, [N, C, H, W] float32."""
        ...

    def least(self, values: Tensor) -> Tensor:
        """Give the values, [N, C, H, W], that it ties to each other the least one of them."""
        ...


class Restore(Protocol):
    """Draws images of which a projection is known."""

    def __call__(
        self, labels: Tensor, noise: NoiseSource, known: Tensor, projection: Projection
    ) -> Tensor:
        """Draw an image for each label.

        Args:
            labels: [N] int64.
            noise: source of all draws.
            known: [N, C, H, W] float32 in [-1, 1], any images that have the known projection.
            projection: onto what is known.

        Returns:
            [N, C, H, W] float32 in [-1, 1], with the projection of `known` but for rounding.
        """
        ...


@dataclass(frozen=True)
class Batch:
    """Images that a generator takes a step on.

    Several processes that train together hold the same batch and draw the same numbers for it, but
    each computes the losses of its own `part` alone.

    Attributes:
        images: [N, C, H, W] float32 in [-1, 1].
        labels: [N] int64.
        indices: [N] int64, the place of each image among those that are trained on, or among the
            held-out ones that `example_losses` is asked for.
        rank: of this process among those that train together, 0-based.
        num_processes: how many there are.
    """

    images: Tensor
    labels: Tensor
    indices: Tensor
    rank: int = 0
    num_processes: int = 1

    def __len__(self) -> int:
        return len(self.images)

    @property
    def part(self) -> slice:
        """The images whose losses this process computes: its own, or one where it has none."""
        start, end = self._bounds()
        return slice(start, end) if start < end else slice(0, 1)

    @property
    def weight(self) -> float:
        """What makes the mean over processes of (weight * mean loss of a part) that of all."""
        start, end = self._bounds()
        return (end - start) * self.num_processes / len(self)

    def _bounds(self) -> tuple[int, int]:
        start, end = (len(self) * i // self.num_processes for i in (self.rank, self.rank + 1))
        return start, end


class StepMeans:
    """Means of what steps of training measure, read without any step waiting for a GPU."""

    def __init__(self) -> None:
        # On the device that computes them, until they are read.
        self._sums: dict[str, Tensor] = {}
        self._counts: dict[str, int] = {}

    @torch.no_grad()
    def add(self, batch: Batch, **values: Tensor) -> None:
        """Add values of the images of `batch.part`, tensors of any shape, by name.

        The mean over the processes that train together is that of the whole batch.
        """
        for name, value in values.items():
            added = batch.weight * value.detach().mean().double() * len(batch)
            self._sums[name] = self._sums[name] + added if name in self._sums else added
            self._counts[name] = self._counts.get(name, 0) + len(batch)

    def read(self) -> dict[str, Tensor]:
        """Return the mean over images of what was added by each name, scalars."""
        return {name: total / self._counts[name] for name, total in self._sums.items()}


class NothingMeasured(StepMeans):
    """Means of nothing: of training whose measures nobody may see."""

    def add(self, batch: Batch, **values: Tensor) -> None:
        """Forget them."""


class Generator(nn.Module, ABC):
    """A family's networks, their losses and how they draw.

    A family is one subclass and one entry in `task.generators.registry`.

    Attributes:
        title: what it is called in messages and reports.
        image_shape: (C, H, W) of the images.
        local: beginnings of the names in the `state_dict` of what stays at a client between
            rounds: no message carries it, nor the file of the final weights.
        frozen: beginnings of the names of what nobody trains: it stands in the file of the final
            weights, and no message carries it.
        local_optimizers: names of the optimizers whose state a client keeps between rounds; the
            others are new in each.
        parts: beginnings of the names in the `state_dict` of each part that `federation.local` may
            keep at clients, or `federation.sharing` may have some of them send, from that which
            images go into to that which they come out of. What is in no part always travels.
        undrawn: names of the parts that `sample` does not read.
        kept_parts: names of the parts that stay at clients; `local` says so as well.
        bound_to_images: whether something of what stays belongs to single training images.
        private: names of the optimizers whose losses look at real images.
        private_steps: of those optimizers before each step of the others, with privacy=dp_sgd.
        loss_parts: names of what `example_losses` gives beside the loss.
        measures: names of what `measured` gives.
        noise_dim: how many numbers an image is drawn from; None: noise of the shape of the image.
        evaluations_per_image: how often `sample` evaluates a network for an image.
        deterministic_on_gpu: whether `train.deterministic` trains it on a GPU.
        means: of what steps add to them since `start`.
    """

    title: str
    image_shape: tuple[int, int, int]
    local: frozenset[str] = frozenset()
    frozen: frozenset[str] = frozenset()
    local_optimizers: frozenset[str] = frozenset()
    parts: Mapping[str, tuple[str, ...]] = MappingProxyType({})
    undrawn: frozenset[str] = frozenset()
    kept_parts: tuple[str, ...] = ()
    bound_to_images: bool = False
    private: frozenset[str] = frozenset()
    private_steps: int = 1
    loss_parts: tuple[str, ...] = ()
    measures: tuple[str, ...] = ()
    noise_dim: int | None = None
    evaluations_per_image: int = 1
    deterministic_on_gpu: bool = True

    def __init__(self) -> None:
        """Make a generator without networks."""
        super().__init__()
        self.means = StepMeans()

    @property
    def noise_shape(self) -> tuple[int, ...]:
        """The shape of the noise that an image is drawn from, without that of the batch."""
        return self.image_shape if self.noise_dim is None else (self.noise_dim,)

    def prepare(self, num_images: int) -> None:
        """Make what has an entry for each training image, before the optimizers are made.

        It draws no random numbers, so that nothing depends on what a process did before.

        Args:
            num_images: that are trained on; `Batch.indices` are below it.
        """

    def start(self) -> None:
        """Begin the epochs of a round: forget what was `measured`, read what steps must know.

        It is the place to wait for the device, which no step does.
        """
        self.means = StepMeans()

    @abstractmethod
    def optimizers(self, lr: float) -> dict[str, torch.optim.Optimizer]:
        """Make new optimizers, by the names that `losses` yields.

        Args:
            lr: the learning rate, `train.lr`.
        """

    @abstractmethod
    def losses(self, batch: Batch, rng: torch.Generator) -> Iterator[tuple[str, Tensor]]:
        """Yield losses; the training loop takes a step on the mean of each before the next.

        Args:
            batch: on the device of the generator.
            rng: the source of all draws, which are for the whole batch; dropout alone has another.

        Yields:
            The name of the optimizer that takes the step, and the losses of `batch.part`, float32.
        """

    def private_losses(self, batch: Batch, rng: torch.Generator) -> Tensor:
        """Return the losses of a patient's images with which its optimizer of `private` is trained.

        No image of another patient, and nothing that one has changed but through the weights, makes
        a difference to them, and they leave nothing behind. Here: the one of `losses`.

        Args:
            batch: images of one patient, each as often as it is looked at.
            rng: see `losses`.

        Raises:
            ValueError: the family has several.
        """
        ((_, losses),) = self.losses(batch, rng)
        return losses

    def public_losses(self, num_images: int, rng: torch.Generator) -> Iterator[tuple[str, Tensor]]:
        """Yield the losses of the other optimizers, which look at no real image; here none.

        Args:
            num_images: that the losses are of.
            rng: see `losses`.

        Yields:
            See `losses`.
        """
        yield from ()

    def after_step(self) -> None:
        """Update what follows the steps without a gradient, such as a moving average."""

    def example_losses(self, batch: Batch, rng: torch.Generator) -> Mapping[str, Tensor] | None:
        """Return the "loss" of each image and its `loss_parts`, [N] float32; None without one."""
        return None

    def member_scores(self, batch: Batch, rng: torch.Generator) -> dict[str, Tensor]:
        """Say in every known way how much images look like ones that were trained on.

        The weights are those that images are drawn with. Draws depend on the state of `rng` and
        not on the images, so that members and others who are given the same state get the same.
        Here: by the loss, where there are `example_losses`.

        Args:
            batch: any images, whole.
            rng: of all draws.

        Returns:
            By attack [N] float32, larger for images that were trained on.
        """
        total = torch.zeros(len(batch), device=batch.images.device)
        for _ in range(MEMBER_DRAWS):
            losses = self.example_losses(batch, rng)
            if losses is None:
                return {}
            total += losses["loss"]
        return {"loss": -total / MEMBER_DRAWS}

    def measured(self) -> dict[str, Tensor]:
        """Return the `measures` of the training since `start`, as means over its steps."""
        return self.means.read()

    def why_diverged(self, measures: Mapping[str, float]) -> str:
        """Say why what a client measured in a round shows no training any more; else nothing.

        Here: one of them is not finite.
        """
        wrong = (f"{name} is {each}" for name, each in measures.items() if not math.isfinite(each))
        return next(wrong, "")

    @abstractmethod
    def sample(
        self, labels: Tensor, noise: NoiseSource, *, advance: Advance = lambda number: None
    ) -> Tensor:
        """Draw an image for each label.

        Args:
            labels: [N] int64.
            noise: source of all draws.
            advance: see `Advance`; of an image there are `evaluations_per_image`.

        Returns:
            [N, C, H, W] float32 in about [-1, 1]. They may be inference tensors.
        """

    def sampling_step(self, labels: Tensor, noise: NoiseSource) -> Tensor:
        """Do one of the evaluations of `sample`, by which its time and memory are measured."""
        return self.sample(labels, noise)

    def restoring(
        self, *, jump_length: int | None = None, num_resamples: int | None = None
    ) -> Restore:
        """Make what draws images of which a part is known; see `task.generation.restoration`.

        Args:
            jump_length: steps that are taken back at a time; None: what suits the family.
            num_resamples: how often each stretch of that length is taken; None: likewise.

        Raises:
            ValueError: an option is out of range, or the family cannot restore.
        """
        raise ValueError(
            f"model must be of a family that restores images, such as diffusion, got a {self.title}"
        )

    def description(self) -> Mapping[str, object]:
        """Say by name how it is trained and draws, for reports and model cards."""
        return {}

    @property
    def num_parameters(self) -> int:
        """The number of trained values."""
        return sum(each.numel() for each in self.parameters() if each.requires_grad)

    def drawing_settings(self) -> Mapping[str, Any]:
        """Return in plain values what drawing needs beside the weights, for an export."""
        return {}

    @property
    def has_test_loss(self) -> bool:
        """Whether there are `example_losses`."""
        return type(self).example_losses is not Generator.example_losses

    @property
    def keeps_state(self) -> bool:
        """Whether a client has to keep anything between rounds."""
        return bool(self.local or self.local_optimizers)

    @property
    def draws_by_itself(self) -> bool:
        """Whether images can be drawn from what travels, without parts that stay at clients."""
        return self.undrawn.issuperset(self.kept_parts)

    def beginnings(self, parts: Iterable[str]) -> tuple[str, ...]:
        """Return the beginnings of the names of what is in some of the `parts`."""
        return tuple(beginning for part in parts for beginning in self.parts[part])

    def stays(self, name: str) -> bool:
        """Whether an entry of the `state_dict` stays at a client; see `local`."""
        return name.startswith(tuple(self.local))

    def shared(self, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Leave out of a `state_dict` what stays at a client."""
        return {name: tensor for name, tensor in weights.items() if not self.stays(name)}

    def load_shared(self, weights: Mapping[str, Tensor], *, assign: bool = False) -> None:
        """Take up a `state_dict` of which what stays at a client may be missing, and is kept.

        Args:
            weights: of a generator of the same configuration.
            assign: see `nn.Module.load_state_dict`.

        Raises:
            RuntimeError: other entries are missing, unknown or of another shape.
        """
        kept = {name: tensor for name, tensor in self.state_dict().items() if self.stays(name)}
        self.load_state_dict({**kept, **weights}, assign=assign)

    def compile(self, *args: Any, **kwargs: Any) -> None:
        """Compile the networks in place; the generator itself is never called."""
        for network in self.children():
            network.compile(*args, **kwargs)

    @property
    def reads_files(self) -> bool:
        """Whether training needs files that `load_frozen` reads."""
        return type(self).load_frozen is not Generator.load_frozen

    def load_frozen(self) -> None:
        """Read from files what nobody trains, and pre-trained weights to begin with.

        Called where training starts; what draws has it among the weights of a run.

        Raises:
            FileNotFoundError: the file, or what else training needs, is not there.
            ValueError: it does not fit the model.
        """
