"""The figures of the paper, 2 to 6, drawn from the finished runs of a sweep."""

from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from task.config import FILE_SETS, Config
from task.data import build_dataset
from task.generation.draw_images import draw_images
from task.generation.grids import Panel, save_panels
from task.randomness import Stream, numpy_generator
from task.reporting.heat_maps import save_partition_heatmaps
from task.reporting.published import is_papers_federation
from task.runs.resume import WITHOUT_INFLUENCE, is_about_clients
from task.runs.run import Run, final_model, kept_clients

# What may differ between a centralized and a federated run that are shown beside each other.
NOT_COMPARED = WITHOUT_INFLUENCE | {"train.mode"}

# Of the pictures of three panels or more.
SMALL_TILE = 48
PANELS_PER_LINE = 3
NUM_COLORS = 5

OF_CLIENTS = (
    "of the global model and of clients' own models after the last round, before they are "
    f"averaged; all from the same noise. Above each, the {NUM_COLORS} dominant colors of its "
    "images by their share."
)

# Writes one picture from the runs of one data set, and returns its title and its caption.
Draw = Callable[[Sequence[Run], Path, torch.device], tuple[str, str]]


@dataclass(frozen=True)
class Picture:
    """A picture that stands in a text.

    Attributes:
        file: a PNG file, relative to the folder of the text.
        title: a few words, read aloud in place of the picture.
        caption: what it shows, in whole sentences.
    """

    file: Path
    title: str
    caption: str


class NotDrawn(Exception):
    """A figure lacks what it shows; says what."""


def draw_figures(
    runs: list[Run],
    folder: Path,
    *,
    device: torch.device,
    say: Callable[[str], object],
) -> list[Picture]:
    """Draw each figure of the paper, for each data set, that finished runs suffice for.

    Of several seeds the lowest is shown. The panels of a picture are drawn from the same noise.
    Figure 6 shows real images of patients: it is as confidential as the data set, and readable
    for its owner alone.

    Args:
        runs: of a sweep, in any order.
        folder: in which the pictures come, as figures/figure<number>-<data set>.png.
        device: that draws.
        say: is told in a line which figure is not drawn, and why.

    Returns:
        The pictures, by number of the figure, then by data set.

    Raises:
        ValueError: weights do not fit their run.

    Source: figures 2 to 6 of the paper.
    """
    (folder / "figures").mkdir(parents=True, exist_ok=True)
    by_data = _by_data(runs)
    pictures = []
    for number, draw in FIGURES.items():
        for name in sorted(by_data):
            if draw is _draw_source and by_data[name][0].config.data.name not in FILE_SETS:
                continue
            file = Path("figures") / f"figure{number}-{name}.png"
            try:
                title, caption = draw(by_data[name], folder / file, device)
            except NotDrawn as reason:
                say(f"figure {number} of {name} is not drawn: {reason}")
            else:
                if draw is _draw_source:
                    say(f"{folder / file} shows real images; it is readable for you alone")
                pictures.append(Picture(file, f"Figure {number}: {name}, {title}", caption))
    return pictures


def _by_data(runs: Sequence[Run]) -> dict[str, list[Run]]:
    """Put runs of the same images together, by a name for files; the lowest seed first."""
    sets: dict[str, list[Run]] = defaultdict(list)
    for run in sorted(runs, key=lambda run: (run.config.seed, run.path)):
        sets[repr(run.data_values)].append(run)
    named: dict[str, list[Run]] = {}
    for members in sets.values():
        name = members[0].config.data.name
        twins = sum(other.split("-")[0] == name for other in named)
        named[f"{name}-{twins + 1}" if twins else name] = members
    return named


def _draw_modes(runs: Sequence[Run], file: Path, device: torch.device) -> tuple[str, str]:
    """Figure 2: the centralized run beside the federated one."""
    central, federated = _pair(runs)
    config = central.config
    save_panels(
        _mode_panels(central, federated, config.eval.images_per_class, device),
        file,
        rows=config.data.classes,
        columns=config.eval.images_per_class,
    )
    return "centralized and FedAvg", (
        f"Samples, a row per class, drawn from the same noise. {_described(federated.config)}; "
        "the centralized run trained as many epochs on the pooled images."
    )


def _draw_partitions(runs: Sequence[Run], file: Path, device: torch.device) -> tuple[str, str]:
    """Figure 3: how the images were dealt out, for each beta."""
    alike: dict[tuple[int, int, tuple[str, ...]], dict[float, np.ndarray]] = defaultdict(dict)
    for run in runs:
        beta = run.config.partition.beta
        if run.partition is not None and beta is not None:
            counts = np.array(run.partition["train_counts"])
            key = (len(counts), run.config.seed, tuple(run.config.data.classes))
            alike[key].setdefault(beta, counts)
    if not alike:
        raise NotDrawn("no simulated run dealt its images out by partition.beta")
    # Of equal numbers of betas the first: the lowest seed.
    num_clients, seed, classes = max(alike, key=lambda key: len(alike[key]))
    by_beta = sorted(alike[num_clients, seed, classes].items())
    save_partition_heatmaps(
        {f"beta={beta:g}": counts for beta, counts in by_beta}, file, classes=classes
    )
    return "images of each class at each client", (
        "Training images, dealt out by a Dirichlet distribution of concentration beta: small is "
        f"skewed. N={num_clients} clients, seed {seed}."
    )


def _draw_clients(runs: Sequence[Run], file: Path, device: torch.device) -> tuple[str, str]:
    """Figure 4: what the models of single clients draw of every class."""
    run = _run_with_clients(runs)
    config = run.config
    columns = config.eval.images_per_class
    _save_client_panels(
        run, _grid_labels(config, columns), file, rows=config.data.classes, device=device
    )
    return "the models of single clients", (
        f"Samples, a row per class, {OF_CLIENTS} {_described(config)}."
    )


def _draw_class(runs: Sequence[Run], file: Path, device: torch.device) -> tuple[str, str]:
    """Figure 5: what the models of single clients draw of one class."""
    run = _run_with_clients(runs)
    config = run.config
    columns = config.eval.images_per_class
    label = int(
        numpy_generator(config.seed, Stream.SAMPLE_GRID, 5).integers(len(config.data.classes))
    )
    labels = torch.full((columns**2,), label)
    _save_client_panels(run, labels, file, rows=[""] * columns, device=device)
    name = config.data.classes[label]
    return f"class {name} from the models of single clients", (
        f"Samples of class {name}, chosen at random, {OF_CLIENTS} {_described(config)}."
    )


def _draw_source(runs: Sequence[Run], file: Path, device: torch.device) -> tuple[str, str]:
    """Figure 6: real medical images beside samples of both kinds of training."""
    central, federated = _pair(runs)
    config = central.config
    try:
        real = build_dataset(config, download=False).train
    except FileNotFoundError as error:
        raise NotDrawn(str(error)) from error
    indices = [(real.labels == label).nonzero() for label in range(len(config.data.classes))]
    columns = min(config.eval.images_per_class, *map(len, indices))
    generator = numpy_generator(config.seed, Stream.SAMPLE_GRID, 6)
    chosen = [generator.choice(of_class.flatten(), columns, replace=False) for of_class in indices]
    source = Panel(real.images[torch.from_numpy(np.concatenate(chosen))], "source")
    save_panels(
        [source, *_mode_panels(central, federated, columns, device)],
        file,
        rows=config.data.classes,
        columns=columns,
        tile=SMALL_TILE,
        private=True,
    )
    return "source, centralized and FedAvg", (
        "Real training images, chosen at random and as confidential as the data set, beside "
        "samples; a row per class, both models "
        f"from the same noise. {_described(federated.config)}; the centralized run trained as "
        "many epochs on the pooled images."
    )


FIGURES: dict[int, Draw] = {
    2: _draw_modes,
    3: _draw_partitions,
    4: _draw_clients,
    5: _draw_class,
    6: _draw_source,
}


def _pair(runs: Sequence[Run]) -> tuple[Run, Run]:
    pairs = _pairs(runs)
    if not pairs:
        raise NotDrawn("it takes a centralized and a federated run with otherwise equal settings")
    return pairs[0]


def _pairs(runs: Sequence[Run]) -> list[tuple[Run, Run]]:
    """List baselines with the federated runs that they fit, that of the paper's federation first.

    Next comes the one whose settings for clients the baseline was given, to no effect on it.
    """
    pairs = [
        (central, federated)
        for central in runs
        for federated in runs
        if central.config.train.mode == "centralized"
        and federated.config.train.mode == "federated"
        and _settings(central) == _settings(federated)
    ]

    def rank(pair: tuple[Run, Run]) -> tuple[bool, bool]:
        central, federated = pair
        own = _settings(central, clients=True) == _settings(federated, clients=True)
        return not is_papers_federation(federated.values), not own

    return sorted(pairs, key=rank)


def _run_with_clients(runs: Sequence[Run]) -> Run:
    kept = [run for run in runs if kept_clients(run.path)]
    if not kept:
        raise NotDrawn("no run kept models of its clients (federation.keep_local_models)")
    # The run that figure 2 shows, where it is among them.
    shown = [run for _, run in _pairs(runs) if kept_clients(run.path)]
    return [*shown, *kept][0]


def _settings(run: Run, *, clients: bool = False) -> dict[str, Any]:
    return {
        key: value
        for key, value in run.values.items()
        if key not in NOT_COMPARED and (clients or not is_about_clients(key))
    }


def _grid_labels(config: Config, columns: int) -> Tensor:
    return torch.arange(len(config.data.classes)).repeat_interleave(columns)


def _mode_panels(central: Run, federated: Run, columns: int, device: torch.device) -> list[Panel]:
    # One configuration for both: its seed decides the noise.
    config, labels = central.config, _grid_labels(central.config, columns)
    return [
        Panel(_draw(run, labels, device, config=config), title)
        for run, title in ((central, "centralized"), (federated, "FedAvg"))
    ]


def _save_client_panels(
    run: Run, labels: Tensor, file: Path, *, rows: Sequence[str], device: torch.device
) -> None:
    everyone = {None: "global model"} | {i: f"client {i}" for i in kept_clients(run.path)}
    save_panels(
        [
            Panel(_draw(run, labels, device, config=run.config, client=client), title)
            for client, title in everyone.items()
        ],
        file,
        rows=rows,
        columns=run.config.eval.images_per_class,
        tile=SMALL_TILE,
        panels_per_line=PANELS_PER_LINE,
        num_colors=NUM_COLORS,
    )


def _draw(
    run: Run,
    labels: Tensor,
    device: torch.device,
    *,
    config: Config,
    client: int | None = None,
) -> Tensor:
    model, _ = final_model(run.path, config, client)
    return draw_images(config, model, labels, device=device, stream=Stream.SAMPLE_GRID).images


def _described(config: Config) -> str:
    federation, beta = config.federation, config.partition.beta
    return (
        f"model.family={config.model.family}, "
        f"R={federation.rounds} rounds of E={config.train.local_epochs} local epochs at "
        f"N={federation.num_supernodes} clients, "
        f"{'given counts' if beta is None else f'beta={beta:g}'}, seed {config.seed}"
    )
