"""The model card of an export: what the model is, was trained on, can do and must not be used for.

It speaks of images in numbers only. Names and paths of runs, nodes and files stay out of it.
"""

from collections.abc import Iterable, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

from task.config import FederationConfig
from task.reporting.history import RunHistory, read_history
from task.reporting.markdown import bullets, plain, table
from task.reporting.metric_table import HEADS, caption, measured, metric_rows, with_std
from task.reporting.warning_signs import State, image_checks
from task.runs.evaluations import Evaluation
from task.runs.records import HELD_OUT, SCORING_CLIENTS, TEST, TRAIN, Records
from task.runs.run import FinishedRun
from task.runs.run_directory import (
    CLASS_COUNTS_FILE,
    MACHINE_FILE,
    NODES_FILE,
    POOLED_FILE,
    read_json,
)

# How `server_app` makes one number of those of real nodes.
TOGETHER = """\
A value over two clients is their mean, weighted by images; over more it is their weighted median,
in which no client has more than a third of the weight. In a simulation losses are means.
"""

# They say where a run finds images and not what these show.
DATA_WITHOUT_NAME = {
    "image_folder": "a folder of images; say here what they show",
    "dicom_folder": "a folder of DICOM files; say here what they show",
}

# The arguments of each way to aggregate, in the configuration's federation.
AGGREGATION_ARGUMENTS = {
    "trimmed_mean": ("trim_fraction",),
    "krum": ("num_malicious", "num_selected"),
}

# A sum or mean over fewer would be that of one of them.
MIN_COUNTED = 2

UNMEASURED = """\
## Results

Nothing was measured of these weights: assume nothing about quality or copied images.
"""

LIMITS = """\
## Intended use

Research on generative models and on training them over several sites: figures, ablations, and
images to try out software on. Look at the results above, and at images, before any use.

## Out of scope

- Diagnosis, treatment, or any other decision about a person. This is no medical device.
- Images presented as real ones, or as evidence.
- Standing in for real data in a study without a check that the conclusions hold on real data.

## Limits

- It draws {size}x{size} images of the classes above and nothing else; a class with few training
  images is drawn worse.
- It has learned the biases of its data: whom the images show, the devices, the labels' errors.
- Distances between sets of images, such as FID, say little about a single image.

## Privacy

Weights are made from images and can hold some of them. Training was {trained_where}.
There was neither differential privacy nor secure aggregation: **there is no formal guarantee** that
a training image cannot be drawn again, or that nobody can tell whether an image was trained on.
The shares of copied images above, where there are any, are evidence and no proof. Whoever holds
the data decides whether this model may be passed on.
"""


def write_model_card(
    run: FinishedRun,
    folder: Path,
    *,
    usage: str,
    library: str,
    exported: Mapping[str, Any],
) -> None:
    """Write README.md, a model card in Hugging Face's format.

    Args:
        run: that the weights are of.
        folder: of the export.
        usage: how to draw with the export, in Markdown.
        library: that loads it, in Hugging Face's words.
        exported: "round", "client" (None: the global weights), "weights_sha256", "format", "by".

    Raises:
        ValueError: a file of the run is not what a run of this version of feddm writes.
    """
    history = read_history(run.path).of_round(exported["round"])
    measured = exported["client"] is None  # the evaluations are of the global weights
    parts = [
        front_matter(library),
        heading(run, exported),
        f"## How to use\n\n{usage}",
        data_section(run),
        training_section(run, exported),
        results_section(run, history, exported["round"]) if measured else UNMEASURED,
        LIMITS.format(size=run.config.data.image_size, trained_where=trained_where(run)),
        origin_section(run, exported),
    ]
    (folder / "README.md").write_text("\n".join(parts), encoding="utf-8")


def front_matter(library: str) -> str:
    """Return what Hugging Face reads of a card."""
    return f"""\
---
# Choose a license before you publish this; the data may limit the choice.
license: unknown
library_name: {library}
pipeline_tag: unconditional-image-generation
tags:
- diffusion
- class-conditional-image-generation
- federated-learning
- feddm
---
"""


def heading(run: FinishedRun, exported: Mapping[str, Any]) -> str:
    """Say in a few lines what the model is."""
    data = run.config.data
    colour = "grey" if data.channels == 1 else "colour"
    whose = (
        "The weights are the global ones"
        if exported["client"] is None
        else "The weights are those of a single client, after its own epochs on the global ones,"
    )
    return f"""\
# Class-conditional diffusion model

Draws {colour} images of {data.image_size}x{data.image_size} pixels.

- Data set: {DATA_WITHOUT_NAME.get(data.name, data.name)}.
- Classes: {", ".join(map(plain, data.classes))}.
- Trained with feddm {trained_where(run)}.
- {whose} after round {exported["round"]} of {run.config.federation.rounds}.
"""


def trained_where(run: FinishedRun) -> str:
    """Say where the images were, as part of a sentence."""
    if run.config.train.mode == "centralized":
        return "on all images in one place"
    if run.partition is not None:
        return "over clients that one machine simulated, which shared weights and no images"
    return "over sites that shared weights and never images"


def data_section(run: FinishedRun) -> str:
    """Say how many images of each class there were, over all clients together."""
    counts, clients, silent = training_counts(run)
    told = [] if clients is None else [f"Clients: {clients}."]
    if silent:
        told.append(f"{silent} of them did not say how many images they hold.")
    if counts is None:
        told.append("How many images of each class they hold together is not known.")
        return "## Data\n\n" + " ".join(told) + "\n"
    rows = list(zip(run.config.data.classes, map("{:,}".format, counts), strict=True))
    of_classes = table(["class", "training images"], [*rows, ("all", f"{sum(counts):,}")])
    return "\n".join(["## Data\n", *([" ".join(told) + "\n"] if told else []), of_classes, ""])


def training_counts(run: FinishedRun) -> tuple[list[int] | None, int | None, int]:
    """Count the training images of each class over all clients.

    Returns:
        The counts, None where they are not known or would be those of a single site; the number
        of clients, None for a centralised run; how many of them did not say.
    """
    if run.partition is not None:
        counts = run.partition["train_counts"]
        return _summed(counts), len(counts), 0
    pooled = read_json(run.path / POOLED_FILE)
    if pooled is not None:
        return pooled["train_counts"], None, 0
    told = (read_json(run.path / CLASS_COUNTS_FILE) or {"clients": {}})["clients"]
    known = [counts for counts in told.values() if counts is not None]
    num_clients = len(read_json(run.path / NODES_FILE) or told)
    counts = _summed(known) if len(known) >= MIN_COUNTED else None
    return counts, num_clients or None, num_clients - len(known)


def _summed(counts: Iterable[Sequence[int]]) -> list[int]:
    return [sum(of_class) for of_class in zip(*counts, strict=True)]


def training_section(run: FinishedRun, exported: Mapping[str, Any]) -> str:
    """List how the model was trained."""
    config = run.config
    train, diffusion, federation = config.train, config.diffusion, config.federation
    federated = train.mode == "federated"
    rows = [
        ("algorithm", federation.aggregation if federated else "centralised training"),
        ("rounds" if federated else "rounds of local epochs", exported["round"]),
        *(_federation_rows(federation) if federated else []),
        ("local epochs", train.local_epochs),
        ("batch size", train.batch_size),
        ("learning rate (Adam)", train.lr),
        # "auto" is not what was used, which depends on the machine.
        *[("precision", train.precision)] * (train.precision != "auto"),
        *[("partition.beta (Dirichlet)", config.partition.beta)] * (run.partition is not None),
        ("schedule", f"{diffusion.schedule}, {diffusion.num_timesteps} timesteps"),
        ("prediction type", diffusion.prediction_type),
        ("loss weighting", f"{diffusion.loss_weighting}, {diffusion.loss_reduction} over pixels"),
        ("label dropout", diffusion.label_dropout),
        ("network", ", ".join(f"{k} {v}" for k, v in vars(config.model).items())),
        ("seed", config.seed),
    ]
    return f"## Training\n\n{table(['', ''], rows)}\n"


def _federation_rows(federation: FederationConfig) -> list[tuple[str, object]]:
    names = AGGREGATION_ARGUMENTS.get(federation.aggregation, ())
    chosen = [
        (name, getattr(federation, name)) for name in (*names, "max_update_norm", "ema_decay")
    ]
    return [
        *((name, value) for name, value in chosen if value is not None),
        ("clients per round", federation.clients_per_round or "all"),
    ]


def results_section(run: FinishedRun, history: RunHistory, server_round: int) -> str:
    """Show what was measured of the weights of a round, with the same of real images beside it."""
    records = history.records.of_round(server_round)
    evaluations = [found for found in run.evaluations if found.round == server_round]
    parts = [_evaluation(found) for found in evaluations] or _own_scores(records)
    centralised = run.config.train.mode == "centralized"
    parts += _held_out_loss(records) if centralised else _hospital_scores(records)
    if not parts:
        return UNMEASURED
    return "\n".join(["## Results and memorisation\n", *parts, _checked(history)])


def _own_scores(records: Records) -> list[str]:
    rows = [
        (figure.heading, with_std(generated), with_std(real))
        for figure, generated, real in measured(records, references=(None, TRAIN, TEST))
    ]
    agreement = records.last("class_agreement")
    if not rows or agreement is None:
        return []
    number = "Images" if agreement.n is None else f"{agreement.n:,} images"
    title = f"### {number} at the end of the run, round {agreement.round}\n"
    return [title, table(HEADS, rows) + "\n"]


def _checked(history: RunHistory) -> str:
    """Say what is wrong with the images of a round, and what nobody has measured of them.

    A single client's own scores are left out, and so is what a single hospital has scored.
    """
    alone = history.records.value(SCORING_CLIENTS) or MIN_COUNTED
    if alone < MIN_COUNTED:
        return ""
    heads = {State.WARNING: "Warning", State.UNMEASURED: "Not measured"}
    lines = [
        f"{heads[check.state]}: {check.subject}. {check.says}"
        for check in image_checks(history)
        if check.state in heads and check.client is None
    ]
    return f"### Warnings and gaps\n\n{bullets(lines)}\n" if lines else ""


def _evaluation(found: Evaluation) -> str:
    title = f"### Through {found.label.extractor}, image range {found.label.image_range}\n"
    drawn = f"after round {found.round}"
    if "sampler" in found.drawn:
        steps = found.drawn["num_inference_steps"]
        drawn += f", drawn by {found.drawn['sampler']} in {steps} steps"
    held = bullets([drawn, *caption(found, [])])
    return f"{title}\n{table(HEADS, metric_rows(found))}\n\n{held}\n"


def _held_out_loss(records: Records) -> list[str]:
    found = records.last("loss", reference=TEST)
    if found is None:
        return []
    row = ("loss", f"{found.value:.4f}", found.round)
    return ["### On held-out images\n", table(["", "", "after round"], [row]) + "\n"]


def _hospital_scores(records: Records) -> list[str]:
    """Show what clients measured together, without what fewer than `MIN_COUNTED` measured."""
    # The clients' own scores may be of a scoring that was broken off.
    counted = [
        (figure.heading, generated, real, generated.context.get("num_clients", 0))
        for figure, generated, real in measured(records, references=[HELD_OUT])
        if generated is not None
    ]
    loss = records.last("loss", reference=TEST)
    if loss is not None:
        tellers = len(records.of_clients("loss", reference=TEST))
        counted.insert(0, ("loss on held-out images", loss, None, tellers))
    if not counted:
        return []
    rows = [
        (title, with_std(generated), with_std(real), tellers, generated.round)
        for title, generated, real, tellers in counted
        if tellers >= MIN_COUNTED
    ]
    parts = ["### By the clients, on their own images\n"]
    if rows:
        parts.append(table([*HEADS, "over clients", "after round"], rows) + "\n")
        parts.append(TOGETHER)
    if len(rows) < len(counted):
        parts.append(f"Scores of fewer than {MIN_COUNTED} clients are not told.\n")
    return parts


def origin_section(run: FinishedRun, exported: Mapping[str, Any]) -> str:
    """Say which weights these are, and what trained and wrote them."""
    versions = (read_json(run.path / MACHINE_FILE) or {}).get("versions", {})
    trained = ", ".join(f"{name} {number}" for name, number in versions.items())
    return f"""\
## How this was made

- Trained with {trained or "versions that the run does not record"}.
- Written by {exported["by"]} with torch {version("torch")} as {exported["format"]}.
- SHA-256 of the run's own file of these weights: `{exported["weights_sha256"]}`.
"""
