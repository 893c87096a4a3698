"""How well a run's model fills in the lower half of real test images that it never saw.

python -m tests.benchmarks.restoration RUN PICTURE
"""

import sys
from pathlib import Path

import torch
from torch import Tensor

from task.data import ImageSet, build_dataset
from task.evaluation.classifier import accuracy
from task.evaluation.features import cached_classifier
from task.generation.grids import Panel, save_panels
from task.runs.run import Run, load_run

COLUMNS = 5
GRAY = 128


def main(run_folder: str, picture: str) -> None:
    """Print how often a classifier finds the class, and draw some images.

    Args:
        run_folder: of a finished run on a data set with test images.
        picture: file to write.
    """
    run = load_run(run_folder)
    data = run.config.data
    dataset = build_dataset(run.config, download=False)
    real = dataset.test.subset(dataset.test.labels.argsort(stable=True))
    lower = torch.arange(data.image_size) >= data.image_size // 2
    mask = lower[:, None].expand(data.image_size, data.image_size)
    noise = torch.randint_like(real.images, 256, generator=torch.Generator().manual_seed(0))
    ways = {
        "real": real.images,
        "noise": torch.where(mask, noise, real.images),
        "gray": real.images.masked_fill(mask, GRAY),
        "1 walk": filled(run, real, mask, num_resamples=1),
        "10 walks": filled(run, real, mask, num_resamples=10),
    }
    classifier = cached_classifier(run.config, dataset.train, "cpu")
    for name, images in ways.items():
        share = accuracy(classifier, images, real.labels)
        print(f"{name}: class found in {share:.1%} of {len(real)}")
    rows = range(len(data.classes))
    shown = torch.cat([(real.labels == row).nonzero().flatten()[:COLUMNS] for row in rows])
    titles = {"real": "real", "gray": "lower half hidden", "10 walks": "filled in"}
    panels = [Panel(ways[name][shown], title) for name, title in titles.items()]
    save_panels(panels, Path(picture), rows=data.classes, columns=COLUMNS, tile=32)


def filled(run: Run, real: ImageSet, mask: Tensor, *, num_resamples: int) -> Tensor:
    """Fill a mask in by the class of each image, sorted by class."""
    return torch.cat(
        [
            run.restore(
                real.images[real.labels == label], label, mask=mask, num_resamples=num_resamples
            ).images
            for label in range(len(run.config.data.classes))
        ]
    )


if __name__ == "__main__":
    main(*sys.argv[1:])
