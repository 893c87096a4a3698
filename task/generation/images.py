"""Images from a finished model by class and place: the same image at the same place, always."""

import io
from collections.abc import Iterable, Iterator, Sequence

import torch
from PIL import Image
from torch import Tensor

from task.checks import require
from task.config import Config
from task.data import ImageSet
from task.generation.batches import fitting_batch_size, to_uint8
from task.generation.grids import mosaic
from task.generators.base import Advance, Generator
from task.generators.noise import generation_noise
from task.training.devices import autocast, move

# In a picture of many images.
IMAGES_PER_ROW = 16
PREVIEW_TILE = 48


class GeneratedImages(ImageSet):
    """Images that a model drew, which a notebook shows as a picture."""

    def to_pil(self) -> list[Image.Image]:
        """Return the images as Pillow has them, gray ("L") or colored ("RGB")."""
        return [to_pil(image) for image in self.images]

    def grid(self) -> Image.Image:
        """Lay all images out in one picture, at most 16 in a row; a class begins a row.

        Where the classes have different numbers of images, or more than 16, rows are just filled.
        """
        first_class = int((self.labels == self.labels[0]).sum())
        columns = min(first_class, IMAGES_PER_ROW)
        white = torch.full_like(self.images[:1], 255).expand(-len(self) % columns, -1, -1, -1)
        return Image.fromarray(mosaic(torch.cat([self.images, white]), columns, tile=PREVIEW_TILE))

    def _repr_png_(self) -> bytes:
        file = io.BytesIO()
        self.grid().save(file, "PNG")
        return file.getvalue()


def to_pil(image: Tensor) -> Image.Image:
    """Turn an image, uint8 [1 or 3, H, W], into Pillow's."""
    pixels = image.permute(1, 2, 0).numpy()
    return Image.fromarray(pixels[..., 0] if len(image) == 1 else pixels)


def class_labels(
    classes: Sequence[str], asked: Iterable[str | int] | str | int | None
) -> list[int]:
    """Turn names and numbers of classes into labels, in the order in which they were asked for.

    Args:
        classes: names of all classes, in the order of their labels.
        asked: of each a name, or a label as a number or a text. A text that is the name of one
            class and the label of another is the name. A single one needs no list. None: every
            class.

    Raises:
        ValueError: one is no class, or is asked for twice, or there is none.
    """
    if asked is None:
        return list(range(len(classes)))
    labels = [
        _class_label(classes, one) for one in ([asked] if isinstance(asked, str | int) else asked)
    ]
    require(bool(labels), "classes", "at least one (None: every class)", labels)
    require(len(set(labels)) == len(labels), "classes", "different ones", labels)
    return labels


def _class_label(classes: Sequence[str], asked: str | int) -> int:
    names = list(classes)
    if asked in names:
        return names.index(str(asked))
    labels = {str(label): label for label in range(len(names))}
    known = f"one of {', '.join(names)}, or a number from 0 to {len(names) - 1}"
    require(str(asked) in labels, "class", known, asked)
    return labels[str(asked)]


class ImageSource:
    """Draws the images of a model by class and place.

    The image at a place depends on the seed, the class and the place, and on the batch that it is
    drawn in by rounding alone; every device, and every export, starts from the same noise.

    Attributes:
        device: that draws.
        image_shape: (C, H, W) of an image.
        batch_size: images that are drawn side by side.
        evaluations: of the model for an image.
    """

    def __init__(self, config: Config, generator: Generator, device: torch.device) -> None:
        """Bring a generator to a device, to draw as it was built to.

        Args:
            config: of the run, with the seed, `eval.batch_size` and `eval.precision`.
            generator: moved to `device`, and set to evaluate.
            device: that draws.

        Raises:
            ValueError: `eval.precision` is "auto".
        """
        self._config, self._generator, self.device = config, generator, device
        self.image_shape = generator.image_shape
        self.evaluations = generator.evaluations_per_image
        move(generator, device, channels_last=config.train.channels_last)
        generator.eval()
        with autocast(device, config.eval.precision):
            self.batch_size = config.eval.batch_size or fitting_batch_size(generator, device)

    def batches(self, num_images: int) -> Iterator[range]:
        """Split the places of a number of images into batches."""
        places = range(num_images)
        for start in places[:: self.batch_size]:
            yield places[start : start + self.batch_size]

    def draw(self, label: int, places: range, advance: Advance = lambda number: None) -> Tensor:
        """Draw the images of a class at some places, uint8 [N, C, H, W] on the CPU.

        Args:
            label: of the class.
            places: 0-based, without gaps, a batch.
            advance: is told of each evaluation of the model for how many images it was; of an
                image there are `evaluations`.
        """
        noise = generation_noise(
            places, self._generator.noise_shape, seed=self._config.seed, label=label
        )
        labels = torch.full((len(places),), label, device=self.device)

        def draw_noise() -> Tensor:
            return torch.from_numpy(noise()).to(self.device)

        with autocast(self.device, self._config.eval.precision):
            images = self._generator.sample(labels, draw_noise, advance=advance)
        return to_uint8(images).cpu()

    def draw_classes(self, labels: Sequence[int], num_images: int) -> GeneratedImages:
        """Draw so many images of each class, class after class."""
        require(num_images >= 1, "num_images", ">= 1", num_images)
        batches = [
            self.draw(label, places) for label in labels for places in self.batches(num_images)
        ]
        return GeneratedImages(
            torch.cat(batches), torch.tensor(labels).repeat_interleave(num_images)
        )
