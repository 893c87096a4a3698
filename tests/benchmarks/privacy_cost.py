"""What privacy costs: `python -m tests.benchmarks.privacy_cost --fashion DIR --xrays DIR`.

A table in Markdown: how good the images of one small network are, by the epsilon of each patient,
for hospitals together and for one alone, and by the number of patients. Every image is a patient.
"""

import argparse
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torchvision.io import write_png

from server_app.dataset import load_images
from task.config import load_config
from task.data import Dataset, ImageSet
from task.runs.records import SPENT_EPSILON, read_records

HOSPITALS, SIDE, SEED = 10, 16, 0
EPSILONS = (1.0, 3.0, 10.0, None)  # None: without privacy
# Of these many patients of all, at the largest epsilon.
SHARES = (0.1, 0.3)
COMMON = (
    *("data=image_folder", "data.fit=stretch", "data.channels=1"),
    *(f"data.image_size={SIDE}", "partition.beta=inf", "eval.every=1000"),
    *("eval.extractor=classifier", "eval.final_metrics=true", "eval.num_images=0"),
)
# The same network, trained as one does without privacy: many steps on few images each.
NOT_PRIVATE = (
    *("experiment=demo", "model=vae_small"),
    *("train.lr=5e-3", "train.local_epochs=1", "federation.rounds=100"),
)


@dataclass(frozen=True)
class Case:
    """A run: so many of the patients, at ten hospitals or one, with an epsilon each."""

    data: str
    share: float
    together: bool
    epsilon: float | None


def private(epsilon: float) -> list[str]:
    """Return what trains with an epsilon."""
    return ["experiment=private", f"privacy.epsilon={epsilon:g}"]


def cases(data: str) -> Iterator[Case]:
    """List what is trained on a data set."""
    for epsilon in EPSILONS:
        yield Case(data, 1.0, True, epsilon)
    for share in SHARES:
        yield Case(data, share, True, 10.0)
    for epsilon in EPSILONS:
        yield Case(data, 1 / HOSPITALS, False, epsilon)


def stratified(images: ImageSet, share: float) -> ImageSet:
    """Take a share of each class, the first of a fixed order."""
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(SEED))
    chosen = [
        each[: max(1, round(share * len(each)))]
        for label in images.labels.unique()
        if len(each := order[images.labels[order] == label])
    ]
    return images.subset(torch.cat(chosen).numpy())


def write_folder(dataset: Dataset, classes: list[str], share: float, folder: Path) -> None:
    """Write a share of the training images, and all test images, as a tree of pictures."""
    splits = {"train": stratified(dataset.train, share), "test": dataset.test}
    for split, images in splits.items():
        for number, (image, label) in enumerate(zip(images.images, images.labels, strict=True)):
            place = folder / split / classes[int(label)]
            place.mkdir(parents=True, exist_ok=True)
            write_png(image.cpu(), str(place / f"{number:05d}.png"))


def run(case: Case, folder: Path, classes: list[str], results: Path) -> dict[str, float]:
    """Train and measure as a user would; returns the figures by name, real ones with a *."""
    name = f"{case.data}-{case.share:g}-{case.together}-{case.epsilon}"
    words = [
        *(*COMMON, f"data.root={folder}", f"data.classes=[{','.join(classes)}]"),
        *(f"output_dir={results}", f"run_name={name}", f"seed={SEED}"),
        *(NOT_PRIVATE if case.epsilon is None else private(case.epsilon)),
        f"federation.num_supernodes={HOSPITALS}",
        *([] if case.together else ["train.mode=centralized"]),
    ]
    command = [Path(sys.executable).with_name("feddm-train"), *words]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise RuntimeError(f"{name}: {done.stdout[-3000:]}{done.stderr[-3000:]}")
    records = read_records(results / name / "metrics.jsonl")
    found = {"epsilon": records.value(SPENT_EPSILON) or float("inf")}
    for each in records.all:
        if each.metric in ("fid", "cas", "class_agreement"):
            found[each.metric + "*" * each.real] = each.value
    return found


def real_figure(found: dict[str, float], name: str) -> str:
    """Write the figure of real images in place of generated ones, where there are enough."""
    return f"{found[name + '*']:.3g}" if name + "*" in found else "too few"


def main() -> None:
    """Train all cases and print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--fashion", required=True, help="what holds FashionMNIST/raw")
    parser.add_argument("--xrays", required=True, help="what holds train/normal, train/pneumonia")
    given = parser.parse_args()
    print("| images | patients | hospitals | epsilon | FD ↓ | CAS ↑ | in the class asked for ↑ |")
    print("|---|---|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as temporary:
        for data, root in (("fashion_mnist", given.fashion), ("chest_xray", given.xrays)):
            config = load_config([f"data={data}", f"data.root={root}", f"data.image_size={SIDE}"])
            dataset, classes = load_images(config), list(config.data.classes)
            for case in cases(data):
                folder = Path(temporary) / f"{data}-{case.share:g}"
                if not folder.exists():
                    write_folder(dataset, classes, case.share, folder)
                patients = len(stratified(dataset.train, case.share))
                found = run(case, folder, classes, Path(temporary) / "runs")
                figures = " | ".join(
                    f"{found[name]:.3g} ({real_figure(found, name)})"
                    for name in ("fid", "cas", "class_agreement")
                )
                who = HOSPITALS if case.together else 1
                print(f"| {data} | {patients} | {who} | {found['epsilon']:.3g} | {figures} |")
                sys.stdout.flush()


if __name__ == "__main__":
    main()
