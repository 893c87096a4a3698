"""Local training of the paper's net against the plain recipe, and against the machine's limit."""

from collections.abc import Iterator, Sequence
from functools import partial
from itertools import islice
from statistics import median

import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from torchvision import transforms

from task.config import Config, load_config
from task.generators.base import Batch
from task.training.devices import select_device
from tests.benchmarks.contestants import Contestant, take_turns, timed
from tests.benchmarks.feddm import PAPER, Feddm, new_model, random_images
from tests.benchmarks.report import Figures, available_cores

# As many as CIFAR-10 has to train on.
NUM_PICTURES = 50_000
# That the paper's cell of Table I trains on: 50,000 in 5 epochs of 300 rounds.
IMAGES_OF_THE_CELL = 75e6


class Pictures(Dataset[tuple[Tensor, int]]):
    """Images as torchvision's data sets give them: one at a time, through its transforms."""

    def __init__(self, config: Config) -> None:
        images, labels = random_images(config, NUM_PICTURES)
        self.pixels = images.permute(0, 2, 3, 1).squeeze(-1).numpy()
        self.labels = labels.tolist()
        middle = (0.5,) * config.data.channels
        flip = [transforms.RandomHorizontalFlip()] if config.data.horizontal_flip else []
        self.transform = transforms.Compose(
            [*flip, transforms.ToTensor(), transforms.Normalize(middle, middle)]
        )

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return self.transform(Image.fromarray(self.pixels[index])), self.labels[index]


class PlainRecipe:
    """The training loop that everybody writes first, on the same network and loss.

    float32 (on a GPU autocast to float16 with a scaled loss), NCHW, eager, Adam as torch makes
    it, a DataLoader with transforms for each image, the loss read in every step.
    """

    def __init__(
        self, overrides: Sequence[str], device: str, num_threads: int, batch_size: int
    ) -> None:
        torch.set_num_threads(num_threads)
        config = load_config(overrides)
        self.device = select_device(device)
        self.on_gpu = self.device.type == "cuda"
        self.batch_size = batch_size
        self.model = new_model(config).to(self.device).train()
        self.optimizer = torch.optim.Adam(self.model.parameters(), lr=config.train.lr)
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=self.on_gpu)
        self.generator = torch.Generator(self.device).manual_seed(0)
        # On a CPU loading processes would take the cores that train.
        workers = 4 if self.on_gpu else 0
        self.loader = DataLoader(
            Pictures(config),
            batch_size,
            shuffle=True,
            num_workers=workers,
            pin_memory=self.on_gpu,
            persistent_workers=workers > 0,
        )
        self.batches = self._batches()

    def _batches(self) -> Iterator[tuple[Tensor, Tensor]]:
        while True:
            yield from self.loader

    def train(self, steps: int) -> float:
        """Train for some steps and return the images per second."""
        return steps * self.batch_size / timed(self.device, lambda: self._steps(steps))

    def _steps(self, steps: int) -> float:
        loss_sum = 0.0
        for images, labels in islice(self.batches, steps):
            x_start, labels = images.to(self.device), labels.to(self.device)
            with torch.autocast(self.device.type, torch.float16, enabled=self.on_gpu):
                ((_, losses),) = self.model.losses(Batch(x_start, labels, labels), self.generator)
                loss = losses.mean()
            self.optimizer.zero_grad()
            self.scaler.scale(loss).backward()
            self.scaler.step(self.optimizer)
            self.scaler.update()
            loss_sum += loss.item()
        return loss_sum


def measure(
    *,
    full: bool,
    device: str,
    overrides: Sequence[str] = PAPER,
    batch_size: int = 128,
    turns: int = 5,
    num_threads: int | None = None,
) -> Figures:
    """Let the plain recipe and the project train in turns.

    Args:
        full: whether to measure the configuration's own batch size on a CPU as well.
        device: auto, cpu, cuda or cuda:N.
        overrides: of the network.
        batch_size: of the comparison.
        turns: that count.
        num_threads: of both; None: a thread per core.
    """
    threads = num_threads or available_cores()
    # A step takes seconds on a CPU and milliseconds on a GPU.
    on_gpu = select_device(device).type == "cuda"
    steps = 100 if on_gpu else 1
    with (
        Contestant(PlainRecipe, overrides, device, threads, batch_size) as plain,
        Contestant(Feddm, overrides, device, threads) as ours,
    ):
        rates = take_turns(
            {
                "plain": partial(plain.call, "train", steps),
                "ours": partial(ours.call, "train", batch_size, steps),
                "matmul": partial(ours.call, "matmul_rate"),
            },
            turns,
        )
        flop = ours.call("flop_per_image")
        precision = ours.call("settled_precision")
    middle = {name: median(scores) for name, scores in rates.items()}
    ratios = [ours / plain for ours, plain in zip(rates["ours"], rates["plain"], strict=True)]
    figures: Figures = {
        "train.ratio": middle["ours"] / middle["plain"],
        "train.ratio_lowest_turn": min(ratios),
        "train.ratio_highest_turn": max(ratios),
        "train.images_per_second": middle["ours"],
        "train.share_of_matmul_peak": middle["ours"] * flop / middle["matmul"],
        "train.matmul_tflops": middle["matmul"] / 1e12,
        "train.gflop_per_image": flop / 1e9,
        "train.precision": precision,
        "train.batch_size": batch_size,
        "train.plain.images_per_second": middle["plain"],
        "train.plain.share_of_matmul_peak": middle["plain"] * flop / middle["matmul"],
    }
    # On a CPU a step of the paper's batch takes as long as all of a turn above.
    return figures | (own_batch(overrides, device, threads, steps) if full or on_gpu else {})


def own_batch(overrides: Sequence[str], device: str, num_threads: int, steps: int) -> Figures:
    """Train with the configuration's own batch, in a process that has seen no other."""
    batch_size = load_config(overrides).train.batch_size
    with Contestant(Feddm, overrides, device, num_threads) as ours:
        rates = take_turns(
            {
                "train": partial(ours.call, "train", batch_size, steps),
                "matmul": partial(ours.call, "matmul_rate"),
            },
            turns=3,
        )
        flop = ours.call("flop_per_image")
    rate = median(rates["train"])
    return {
        f"train.batch_{batch_size}.images_per_second": rate,
        f"train.batch_{batch_size}.share_of_matmul_peak": rate * flop / median(rates["matmul"]),
        f"train.batch_{batch_size}.hours_of_the_papers_cell": IMAGES_OF_THE_CELL / rate / 3600,
    }
