"""`feddm evaluate --client`: a client's own model beside the global one, on its images and on all.

Source: section F of the paper, which shows such images and measures none.
"""

from collections.abc import Callable, Mapping
from pathlib import Path

from torch import Tensor

from task.checks import require
from task.config import Config
from task.data import Dataset, build_dataset
from task.data.partition import partition_dataset
from task.evaluation.comparison import extract_real
from task.evaluation.evaluate import evaluate_images
from task.evaluation.features import build_extractor
from task.evaluation.metrics import Use
from task.files import write_json
from task.generation.draw_images import draw_images, full_labels
from task.generators.base import Generator
from task.randomness import Stream
from task.reporting.metric_table import (
    label_caption,
    lay_out,
    measured,
    metric_captions,
    with_std,
)
from task.runs.evaluations import Evaluation, drawing, drawn_otherwise, evaluation_file
from task.runs.layout import PARTITION_FILE
from task.runs.records import TRAIN
from task.runs.run import Run, final_model
from task.training.devices import select_device

# The floor takes one half of the images, and the Inception score parts those into 10 splits.
MIN_IMAGES = 20


def evaluate_client(
    run: Path, config: Config, client: int, *, say: Callable[[str], object]
) -> dict[str, Evaluation]:
    """Measure a client's own model and the global one, on the client's images and on all.

    Both models draw from the same noise: as many images of each class as the client trained on,
    to be measured against those, and the images that `evaluate_run` draws, measured as there.

    Args:
        run: its folder; `evaluation-<extractor>-<image_range>-client-<client>.json` is written
            there.
        config: see `evaluation_config`.
        client: its number in the simulation.
        say: takes the text for the reader.

    Returns:
        The evaluations under "local_own", "global_own", "local_all" and "global_all".

    Raises:
        FileNotFoundError: files of the data set or of the extractor are missing.
        ValueError: the run was not federated, did not keep the client's model or was dealt from
            other data, or the client has too few images.
    """
    require(
        config.train.mode == "federated", "train.mode", "federated for --client", config.train.mode
    )
    local, local_round = final_model(run, config, client)
    shared, last = final_model(run, config)
    dataset = build_dataset(config, download=True)
    own = client_images(run, config, dataset, client)
    sets = {
        "own": (own, own.train.labels.sort().values),
        "all": (dataset, full_labels(config, dataset)),
    }
    reports = _measure(config, {"local": local, "global": shared}, sets, last, say=say)
    otherwise = drawn_otherwise(run, config)
    say(
        f"\n{run.resolve().name}, client {client}, local model of round {local_round}, global "
        f"model of round {last} of {config.federation.rounds}"
        + (f", drawn with {otherwise}" if otherwise else "")
        + f"\n\n{format_client_table(reports)}\n"
    )
    counts = {
        whose: labels.bincount(minlength=len(config.data.classes)).tolist()
        for whose, (_, labels) in sets.items()
    }
    say("\n".join(f"- {line}" for line in client_caption(reports, counts)))
    say(f"\n{client_verdict(client, reports['local_own'], reports['global_own'])}")
    file = evaluation_file(run, config, f"client-{client}", otherwise)
    found = {name: report.content() for name, report in reports.items()}
    told = {"client": client, "local_round": local_round, **drawing(config, last)}
    write_json(file, told | found)
    say(f"\nwritten to {file}")
    return reports


def _measure(
    config: Config,
    models: Mapping[str, Generator],
    sets: Mapping[str, tuple[Dataset, Tensor]],
    server_round: int,
    *,
    say: Callable[[str], object],
) -> dict[str, Evaluation]:
    """Measure what each model draws of the labels of each set, under "<model>_<set>"."""
    device = select_device(config.train.device)
    # Trained on all images for each of the sets, so that their figures share one scale.
    extractor = build_extractor(config, sets["all"][0].train, device)
    reports = {}
    for whose, (dataset, labels) in sets.items():
        real = extract_real(config, dataset, extractor)
        for name, model in models.items():
            say(f"drawing and measuring {len(labels):,} images of the {name} model on {device}")
            stream = Stream.EVALUATED_IMAGES
            images = draw_images(config, model, labels, device=device, stream=stream)
            reports[f"{name}_{whose}"] = evaluate_images(
                config,
                images,
                dataset,
                extractor=extractor,
                server_round=server_round,
                real=real,
                use=Use.ROUNDS,
            )
    return reports


def client_images(run: Path, config: Config, dataset: Dataset, client: int) -> Dataset:
    """Return the training images of a client, as a data set without a test split.

    Its share of the test images is too small to measure against.

    Args:
        run: its folder; its counts, where there are some, must count the same images.
        config: of the run.
        dataset: which the run dealt out.
        client: its number in the simulation.

    Raises:
        ValueError: the run was dealt from other data, or the client has too few images.
    """
    partition = partition_dataset(config, dataset, config.federation.num_supernodes)
    require(
        Run(run).partition in (None, partition.describe()),
        "data.root",
        f"where the images are that {run / PARTITION_FILE} counts",
        config.data.root,
    )
    indices = partition.train_indices[client]
    require(
        len(indices) >= MIN_IMAGES,
        f"client {client}",
        f"one of at least {MIN_IMAGES} training images to be measured against",
        len(indices),
    )
    return Dataset(dataset.train.subset(indices), dataset.test.subset(indices[:0]))


def format_client_table(reports: Mapping[str, Evaluation]) -> str:
    """Lay the evaluations of `evaluate_client` out: a metric per line, both models, real images."""
    heads, columns = ["metric"], []
    for whose in ("own", "all"):
        local, shared = (reports[f"{name}_{whose}"].records for name in ("local", "global"))
        heads += [f"{name}, {whose}" for name in ("local", "global", "real")]
        columns += [(local, False), (shared, False), (shared, True)]
    rows = [
        (
            quantity.heading,
            *(with_std(quantity.found(records, real=real)) for records, real in columns),
        )
        for quantity, *_ in measured(reports["local_own"].records)
    ]
    return lay_out([tuple(heads), *rows])


def client_caption(reports: Mapping[str, Evaluation], counts: Mapping[str, list[int]]) -> list[str]:
    """Say what the table of a client holds for.

    Args:
        reports: the table's.
        counts: numbers of generated images per class, of "own" and "all".
    """
    return [
        *(
            f"{whose}: {line}"
            for whose, of_each in counts.items()
            for line in label_caption(reports[f"global_{whose}"].label, of_each)
        ),
        "both models drew from the same noise, once, so that the spread over draws is not known",
        "compare local with global, never own with all",
        *metric_captions(reports["global_all"].records),
    ]


def client_verdict(client: int, local: Evaluation, shared: Evaluation) -> str:
    """Say which of two models fits a client better, where FD and KID agree on it."""
    (fid, their_fid), (kid, their_kid) = (
        [each.records.value(name, reference=TRAIN) or 0.0 for each in (local, shared)]
        for name in ("fid", "kid")
    )
    gains = (their_fid - fid, their_kid - kid)
    if min(gains) > 0:
        found = "the local model fits its client better"
    elif max(gains) < 0:
        found = "the global model fits the client better"
    elif gains == (0, 0):
        found = "both fit the client alike"
    else:
        found = "FD and KID do not agree on which fits the client better"
    return (
        f"On the {local.label.n_train:,} images of client {client} the local model's FD is "
        f"{fid:.4g} and its KID {kid:.4g}, the global model's {their_fid:.4g} and {their_kid:.4g}: "
        f"{found}."
    )
