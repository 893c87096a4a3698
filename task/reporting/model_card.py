"""The model card of an export: what the model is, was trained on, can do and must not be used for.

It speaks of images in numbers only. Names and paths of runs, nodes and files stay out of it.
"""

from collections.abc import Iterable, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

from markupsafe import Markup

from task.audit.findings import MEMBERS, Outcome, findings
from task.audit.records import newest_audit
from task.config import FederationConfig
from task.reporting.metric_table import HEADS, caption, measured, metric_rows, with_std
from task.reporting.rendering import render
from task.reporting.run_summary import describe_privacy
from task.reporting.warning_signs import State, image_checks, memory_checks
from task.runs.evaluations import Evaluation
from task.runs.layout import STUDY_FILE, STUDY_FOLDER, client_numbers, understood
from task.runs.records import HELD_OUT, SCORING_CLIENTS, TEST, TRAIN, Records
from task.runs.run import POOLED, Run

# They say where a run finds images and not what these show.
DATA_WITHOUT_NAME = {
    "image_folder": "a folder of images; say here what they show",
    "dicom_folder": "a folder of DICOM files; say here what they show",
}

# The arguments of each way to aggregate, in the configuration's federation.
AGGREGATION_ARGUMENTS = {
    "trimmed_mean": ("trim_fraction",),
    "bounded_mean": ("update_range", "max_images_per_client"),
    "krum": ("num_malicious", "num_selected"),
}

CardRows = list[tuple[object, ...]]

# A sum or mean over fewer would be that of one of them.
MIN_COUNTED = 2


def write_model_card(
    run: Run,
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
    data, server_round = run.config.data, exported["round"]
    # The scores are of the global weights.
    results = results_of(run.of_round(server_round)) if exported["client"] is None else None
    counts, num_clients, num_silent = training_counts(run)
    trained_with = ", ".join(f"{name} {number}" for name, number in run.versions.items())
    card = render(
        "model_card.md",
        library=library,
        data=data,
        data_set=DATA_WITHOUT_NAME.get(data.name, data.name),
        trained_where=trained_where(run),
        rounds=run.config.federation.rounds,
        exported=exported,
        usage=Markup(usage),
        privacy=describe_privacy(run) if run.config.privacy.unit else "",
        num_clients=num_clients,
        num_silent=num_silent,
        counts=None if counts is None else _class_rows(data.classes, counts),
        title=run.generator.title,
        training=training_rows(run, server_round),
        heads=HEADS,
        min_counted=MIN_COUNTED,
        results=results,
        study=study_sentences(run, exported),
        trained_with=trained_with or "versions that the run does not record",
        torch_version=version("torch"),
    )
    (folder / "README.md").write_text(card, encoding="utf-8")


def study_sentences(run: Run, exported: Mapping[str, Any]) -> list[str]:
    """Say what a study of the exported weights found, with its warnings; empty without one."""
    found = run.study
    if found is None or exported["client"] is not None:
        return []
    with understood(run.path / STUDY_FOLDER / STUDY_FILE):
        # A study of several runs says of each what it found.
        weights = exported["weights_sha256"]
        own = [
            each["sentence"]
            for each in found["headlines"]
            if found["weights_sha256"][each["source"]] == weights
        ]
        if not own:
            return []
        return [*own, f"Classifier: {found['classifier']}.", *found["warnings"]]


def trained_where(run: Run) -> str:
    """Say where the images were, as part of a sentence."""
    if run.config.train.mode == "centralized":
        return "on all images in one place"
    if run.partition is not None:
        return "over clients that one machine simulated, which shared weights and no images"
    return "over sites that shared weights and never images"


def training_counts(run: Run) -> tuple[list[int] | None, int | None, int]:
    """Count the training images of each class over all clients.

    Returns:
        The counts, None where they are not known or would be those of a single site; the number
        of clients, None for a centralized run; how many of them did not say.
    """
    counts = run.class_counts
    if POOLED in counts:
        return counts[POOLED], None, 0
    known = [of_client for of_client in counts.values() if of_client is not None]
    num_clients = len({*(client_numbers(run.path) or {}).values()} or counts)
    told = run.partition is not None or len(known) >= MIN_COUNTED
    return _summed(known) if told else None, num_clients or None, num_clients - len(known)


def _summed(counts: Iterable[Sequence[int]]) -> list[int]:
    return [sum(of_class) for of_class in zip(*counts, strict=True)]


def _class_rows(classes: Sequence[str], counts: Sequence[int]) -> CardRows:
    rows = zip(classes, map("{:,}".format, counts), strict=True)
    return [*rows, ("all", f"{sum(counts):,}")]


def training_rows(run: Run, server_round: int) -> CardRows:
    """List how the model was trained."""
    config, generator = run.config, run.generator
    train, federation = config.train, config.federation
    federated = train.mode == "federated"
    return [
        ("algorithm", federation.aggregation if federated else "centralized training"),
        *[("strategy", config.strategy.described)]
        * (federated and config.strategy.name != "fedavg"),
        *[("secure aggregation", "yes")] * (federated and federation.secure_aggregation),
        ("rounds" if federated else "rounds of local epochs", server_round),
        *(_federation_rows(federation) if federated else []),
        ("local epochs", train.local_epochs),
        *[("started from", run.started_from)] * (run.started_from is not None),
        ("batch size", train.trained_batch_size),
        ("learning rate", train.trained_lr),
        *[("learning rates over rounds", train.lr_schedule)] * (train.lr_schedule != "constant"),
        *[("rounds of warm-up", train.warmup_rounds)] * (train.warmup_rounds > 0),
        # "auto" is not what was used, which depends on the machine.
        *[("precision", train.precision)] * (train.precision != "auto"),
        *[("partition.beta (Dirichlet)", config.partition.beta)] * (run.partition is not None),
        *generator.description().items(),
        ("parameters", f"{generator.num_parameters:,}"),
        ("network", ", ".join(f"{k} {v}" for k, v in vars(config.model).items())),
        ("seed", config.seed),
    ]


def _federation_rows(federation: FederationConfig) -> list[tuple[str, object]]:
    names = AGGREGATION_ARGUMENTS.get(federation.aggregation, ())
    chosen = [
        (name, getattr(federation, name)) for name in (*names, "max_update_norm", "ema_decay")
    ]
    return [
        *((name, value) for name, value in chosen if value is not None),
        ("clients per round", federation.clients_per_round or "all"),
    ]


def results_of(run: Run) -> dict[str, Any] | None:
    """Collect what was measured of weights, with the same of real images beside it.

    Args:
        run: with what was measured of them alone.

    Returns:
        What the template shows; None where nothing was measured.
    """
    records = run.records
    evaluations = [_card_evaluation(each) for each in run.main_evaluations]
    centralized = run.config.train.mode == "centralized"
    found = {
        "evaluations": evaluations,
        "own_scores": None if evaluations else _own_scores(records),
        "held_out_loss": records.last("loss", reference=TEST) if centralized else None,
        "clients_scores": None if centralized else _clients_scores(records),
        "audit": _audit(run),
    }
    return {**found, "gaps": _warnings_and_gaps(run)} if any(found.values()) else None


def _card_evaluation(found: Evaluation) -> dict[str, Any]:
    drawn = f"after round {found.round}"
    if "sampler" in found.drawn:
        steps = found.drawn["num_inference_steps"]
        drawn += f", drawn by {found.drawn['sampler']} in {steps} steps"
    return {
        "extractor": found.label.extractor,
        "image_range": found.label.image_range,
        "rows": metric_rows(found),
        "caption": [drawn, *caption(found, [])],
    }


def _own_scores(records: Records) -> dict[str, Any] | None:
    rows = [
        (quantity.heading, with_std(generated), with_std(real))
        for quantity, generated, real in measured(records, references=(None, TRAIN, TEST))
    ]
    agreement = records.last("class_agreement")
    if not rows or agreement is None:
        return None
    number = "Images" if agreement.n is None else f"{agreement.n:,} images"
    return {"number": number, "round": agreement.round, "rows": rows}


def _clients_scores(records: Records) -> dict[str, Any] | None:
    """Collect what clients measured together, without what fewer than `MIN_COUNTED` measured."""
    # The clients' own scores may be of a scoring that was broken off.
    counted = [
        (quantity.heading, generated, real, generated.context.get("num_clients", 0))
        for quantity, generated, real in measured(records, references=[HELD_OUT])
        if generated is not None
    ]
    loss = records.last("loss", reference=TEST)
    if loss is not None:
        tellers = len(records.of_clients("loss", reference=TEST))
        counted.insert(0, ("loss on held-out images", loss, None, tellers))
    rows = [
        (title, with_std(generated), with_std(real), tellers, generated.round)
        for title, generated, real, tellers in counted
        if tellers >= MIN_COUNTED
    ]
    return {"rows": rows, "withheld": len(rows) < len(counted)} if counted else None


def _audit(run: Run) -> list[str]:
    """Say what attacks came to; of single clients how many show, and of one in all nothing."""
    audit = newest_audit(run)
    if audit is None:
        return []
    found = findings(audit.attacks)
    whole = [each for each in audit.attacks if each.client is None]
    clients = {each.client for each in audit.attacks} - {None}
    shown = {each.client for each in found if each.outcome is Outcome.DETECTED} - {None}
    lines = [each.line for each in findings(whole)]
    if len(clients) >= MIN_COUNTED:
        outcome = Outcome.DETECTED if shown else Outcome.NOT_DETECTED
        lines.append(
            f"{outcome}: attacks on the images of each client by itself tell training images from "
            f"held-out ones of {len(shown)} of {len(clients)} clients."
        )
    return lines


def _warnings_and_gaps(run: Run) -> list[str]:
    """Say what is wrong with the images of a round, and what nobody has measured of them.

    A single client's own scores are left out, and so is what a single hospital has scored.
    """
    alone = run.records.value(SCORING_CLIENTS) or MIN_COUNTED
    if alone < MIN_COUNTED:
        return []
    heads = {State.WARNING: "Warning", State.UNMEASURED: "Not measured"}
    return [
        f"{heads[check.state]}: {check.subject}. {check.says}"
        for check in (*image_checks(run), *memory_checks(run))
        if check.state in heads
        and check.client is None
        # What attacks came to stands by itself.
        and (check.subject != MEMBERS or check.state is State.UNMEASURED)
    ]
