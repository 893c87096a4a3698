"""Several generators of one family, each of which draws the classes that it was trained on.

It is what a run draws from whose hospitals keep parts of the model (`federation.local`): there is
not one model, but that of each.
"""

import hashlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import NoReturn

import torch
from torch import Tensor, nn

from task.checks import require
from task.generators.base import Advance, Batch, Generator, NoiseSource

MEMBER = "members."
CLASS_COUNTS = "class_counts"


class Ensemble(Generator):
    """Draws each image from one of its members, as often as the member has images of the class.

    Which member draws an image depends on its noise, and so on its place alone. A class that no
    member has seen is drawn by all, as often as they have images.

    Attributes:
        members: of one family and configuration.
        class_counts: [members, classes] int64, the training images of each.
    """

    class_counts: Tensor

    def __init__(self, members: Sequence[Generator], num_classes: int) -> None:
        """Join members, whose weights and class counts come with the `state_dict`.

        Args:
            members: at least one.
            num_classes: that labels count.
        """
        super().__init__()
        first = members[0]
        self.members = nn.ModuleList(members)
        counts = torch.zeros(len(members), num_classes, dtype=torch.int64)
        self.register_buffer(CLASS_COUNTS, counts)
        self.title = f"ensemble of {len(members)} {first.title}s"
        self.image_shape, self.noise_dim = first.image_shape, first.noise_dim
        self.evaluations_per_image = first.evaluations_per_image

    @property
    def generators(self) -> list[Generator]:
        """The members."""
        return [each for each in self.members if isinstance(each, Generator)]

    def optimizers(self, lr: float) -> NoReturn:
        """Refuse to be trained: members are, each by itself.

        Raises:
            ValueError: always.
        """
        raise ValueError(f"an {self.title} is not trained; each of its members is")

    def losses(self, batch: Batch, rng: torch.Generator) -> Iterator[tuple[str, Tensor]]:
        """Refuse to be trained; see `optimizers`."""
        self.optimizers(0)

    @torch.inference_mode()
    def sample(
        self, labels: Tensor, noise: NoiseSource, *, advance: Advance = lambda number: None
    ) -> Tensor:
        """Draw an image for each label."""
        own = ImageNoise(noise())
        drawing = self._drawing(labels, own.uniform())
        images = torch.empty((len(labels), *self.image_shape), device=labels.device)
        for number, member in enumerate(self.generators):
            mine = (drawing == number).nonzero()[:, 0]
            if len(mine) > 0:
                drawn = member.sample(labels[mine], own.of(mine.tolist()), advance=advance)
                images[mine] = drawn.float()
        return images

    def sampling_step(self, labels: Tensor, noise: NoiseSource) -> Tensor:
        """Take a step of one member."""
        return self.generators[0].sampling_step(labels, noise)

    def _drawing(self, labels: Tensor, uniform: Tensor) -> Tensor:
        """Choose the member that draws each image, [N] int64, by a number in [0, 1) of each."""
        counts = self.class_counts.double().cpu()
        counts[:, counts.sum(0) == 0] = counts.sum(1, keepdim=True)
        up_to = counts.cumsum(0).T[labels.cpu()]  # [N, members]
        chosen = (up_to <= uniform[:, None] * up_to[:, -1:]).sum(1)
        return chosen.clamp(max=len(self.members) - 1).to(labels.device)

    def member_scores(self, batch: Batch, rng: torch.Generator) -> dict[str, Tensor]:
        """Say by the member that knows an image best how much it looks like a training image."""
        state, found = rng.get_state(), []
        for member in self.generators:
            rng.set_state(state)
            found.append(member.member_scores(batch, rng))
        return {name: torch.stack([each[name] for each in found]).amax(0) for name in found[0]}

    def description(self) -> Mapping[str, object]:
        """Say how a member is trained and draws, and which of them draws what."""
        drawn_by = f"{len(self.members)} models, each the classes that its hospital has"
        return {**self.generators[0].description(), "drawn by": drawn_by}


class ImageNoise:
    """A source of noise for each of several images, whichever of them are drawn together."""

    def __init__(self, first: Tensor) -> None:
        """Derive the sources.

        Args:
            first: [N, ...] float32, noise of each image, all of which seeds its source.
        """
        self._shape, self._device = first.shape[1:], first.device
        self._sources = [torch.Generator().manual_seed(_seed(each)) for each in first.cpu()]

    def uniform(self) -> Tensor:
        """Draw a number in [0, 1) for each image, [N] float64."""
        drawn = [torch.rand(1, generator=rng, dtype=torch.float64) for rng in self._sources]
        return torch.cat(drawn)

    def of(self, places: Iterable[int]) -> NoiseSource:
        """Return the source of the images at some places, 0-based."""
        sources = [self._sources[place] for place in places]

        def draw_noise() -> Tensor:
            drawn = [torch.randn(self._shape, generator=rng) for rng in sources]
            return torch.stack(drawn).to(self._device)

        return draw_noise


def _seed(noise: Tensor) -> int:
    """Make a seed, of 63 bits, of the noise of an image."""
    digest = hashlib.sha256(noise.contiguous().numpy().tobytes()).digest()
    return int.from_bytes(digest[:8], "little") >> 1


def count_members(weights: Iterable[str]) -> int:
    """Return of how many members the names of a `state_dict` are; 0: it is of no ensemble."""
    numbers = {name.split(".")[1] for name in weights if name.startswith(MEMBER)}
    return len(numbers)


def join_members(
    members: Sequence[Mapping[str, Tensor]], class_counts: Sequence[Sequence[int]]
) -> dict[str, Tensor]:
    """Make the `state_dict` of an ensemble.

    Args:
        members: the `state_dict` of each.
        class_counts: the training images of each class of each.

    Raises:
        ValueError: there is no member, or not as many counts.
    """
    require(0 < len(members) == len(class_counts), "members", "one or more", len(members))
    joined = {
        f"{MEMBER}{number}.{name}": tensor
        for number, weights in enumerate(members)
        for name, tensor in weights.items()
    }
    return joined | {CLASS_COUNTS: torch.tensor(class_counts, dtype=torch.int64)}
