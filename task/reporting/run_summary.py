"""A run in a few lines: for the end of its log, and for the top of its report."""

import math
from collections.abc import Iterator
from typing import NamedTuple

from task.evaluation.metrics import METRICS, Use
from task.progress import duration
from task.reporting.metric_table import Quantity, quantities
from task.runs.records import HELD_OUT, SPENT_EPSILON, TEST, TRAIN, Record, Records
from task.runs.run import Run
from task.training.private import described_privacy, too_little_noise

# Clients, of those that a line tells of.
MOST_NAMED = 10


class Found(NamedTuple):
    """A figure of generated images.

    Attributes:
        title: of the metric.
        of: through what was looked, and at how many images; unlike figures have unlike words.
        generated: the figure.
        real: of real images; empty where there is none.
    """

    title: str
    of: str
    generated: str
    real: str


def summary_lines(run: Run) -> list[str]:
    """Say how a run ended, in lines for its log, which are fewer than 15."""
    metrics = [
        (title, f"{generated} ({f'real images {real}; ' if real else ''}{of})")
        for title, of, generated, real in found_metrics(run, *quantities(Use.SUMMARY))
    ]
    rows = [*key_figures(run), *metrics]
    width = max(len(name) for name, _ in rows)
    return [f"{name:<{width}}  {value}" for name, value in rows]


def key_figures(run: Run, *, losses: bool = True) -> list[tuple[str, str]]:
    """List what is asked first of a run, by name."""
    found = [
        ("rounds", f"{run.rounds_done} of {run.config.federation.rounds}"),
        *(loss_figures(run) if losses else []),
        *_time(run),
        *([("privacy", _privacy(run))] if run.config.privacy.unit else []),
        ("training images", "not told" if not run.num_images else f"{run.num_images:,}"),
    ]
    if run.setting != "centralized" and run.clients:
        found.append(("clients", _named_clients(run)))
        found.append(("left out", _left_out(run)))
    return found


def _named_clients(run: Run) -> str:
    named = [f"{each} {run.hospitals[each]}" for each in run.clients if each in run.hospitals]
    shown = ", ".join(named[:MOST_NAMED]) + " ..." * (len(named) > MOST_NAMED)
    return f"{len(run.clients)}{f': {shown}' if named else ''}"


def _privacy(run: Run) -> str:
    spent = run.records.last(SPENT_EPSILON)
    if spent is None:
        if not run.rounds_done:
            return "nothing spent yet"
        return f"none: there is {too_little_noise(run.config)}"
    unit = run.config.privacy.unit
    return f"epsilon {spent.value:.3g}, delta {spent.context['delta']:g}, for each {unit}"


def found_metrics(run: Run, *wanted: Quantity) -> list[Found]:
    """List what was measured last in the run itself.

    Args:
        run: of the run.
        *wanted: which figures; none: all.
    """
    return [
        _found(run.records, each, f", round {each.round}" * (each.round != run.rounds_done))
        for quantity in wanted or quantities()
        if (each := quantity.found(run.records)) is not None
    ]


def evaluated_metrics(run: Run, *wanted: Quantity) -> list[Found]:
    """List figures of the evaluations of the newest weights; without one, of the run itself.

    Args:
        run: of the run.
        *wanted: which figures.
    """
    rows = []
    for each in run.current_evaluations:
        of = f", drawn with {each.otherwise}" * bool(each.otherwise)
        of += f", round {each.round}" * (each.round != run.config.federation.rounds)
        rows += [
            _found(each.records, record, of)
            for quantity in wanted
            if (record := quantity.found(each.records)) is not None
        ]
    return rows or found_metrics(run, *wanted)


def _found(records: Records, each: Record, of: str) -> Found:
    """Write a record down, with that of real images beside it."""
    quantity, looked_at = Quantity(each.metric, each.reference), _looked_at(each)
    real = quantity.found(records, real=True)
    if each.metric == "class_agreement":
        chance = records.value("chance_agreement", reference=each.reference)
        looked_at += "" if chance is None else f", by chance {chance:.4g}"
    beside = "" if real is None else f"{real.value:.4g}"
    return Found(quantity.heading, looked_at + of, f"{each.value:.4g}", beside)


def _looked_at(each: Record) -> str:
    """Say through what was looked, and at how many images."""
    metric, context = METRICS[each.metric], each.context
    number = "" if each.n is None else f"n={min(each.n, metric.most or each.n):,}"
    if each.reference != HELD_OUT and metric.through:
        return ", ".join(filter(None, [metric.through, number]))
    settings = [context.get("extractor"), context.get("image_range")]
    seed = f"seed {context['seed']}" if context.get("seed") else ""
    who = "hospitals" * (each.reference == HELD_OUT)
    return ", ".join(filter(None, [who, *settings, number, seed]))


def describe_run(run: Run) -> list[str]:
    """Say in sentences what was trained, by whom and on what."""
    found = [_who_trained_what(run), _generator(run), _where(run)]
    if run.setting != "centralized":
        found.append(_what_travelled(run))
        if run.config.federation.drawn_by == "clients":
            found.append(
                "Images are drawn by what each hospital made of the weights in the round, of each "
                "class by those that have it: by as many models as there are hospitals."
            )
    return [*found, describe_privacy(run)] if run.config.privacy.unit else found


def describe_privacy(run: Run) -> str:
    """Say in sentences what protects whom in a private run, and who sees to it."""
    config = run.config
    spent = run.records.value(SPENT_EPSILON)
    enough = spent is not None or not run.rounds_done
    told = described_privacy(config, (spent or 0.0) if enough else math.inf)
    if not enough:
        return f"Differential privacy: {told}."
    if config.privacy.protects_clients:
        return (
            f"Differential privacy: {told}, after {run.rounds_done} rounds, for the weights and "
            "all that is made of them, against a hospital's update being left out of every round. "
            "The server drew the noise; what it received itself, and the figures of hospitals "
            "that it recorded, are not protected."
        )
    who = {
        "centralized": "The machine that trained drew the noise from the run's seed",
        "simulation": "The simulated hospitals drew the noise from the run's seed",
        "real nodes": "Each hospital's own node drew the noise, from a seed that it told nobody",
    }[run.setting]
    return (
        f"Differential privacy: {told}, after {run.rounds_done} rounds, for the weights and all "
        f"that is made of them, against a patient's images being left out of every step. {who}. "
        "Images that were held out to measure are not protected."
    )


def _who_trained_what(run: Run) -> str:
    data, num_clients = run.config.data, len(run.clients)
    if run.setting != "centralized" and not num_clients:
        return f"No client has answered yet. {_what_is_done(run)}"
    who = {
        "centralized": "One machine, on the pooled images,",
        "simulation": f"{num_clients} simulated hospitals, on one machine,",
        "real nodes": f"{num_clients} hospitals, each on its own images,",
    }[run.setting]
    purpose = "to draw images" if run.config.model.draws else "to name the classes of images"
    return (
        f"{who} trained a model of {run.generator.num_parameters:,} parameters {purpose} "
        f"of {data.name}: {len(data.classes)} classes, "
        f"{data.image_size}x{data.image_size} pixels, "
        f"{data.channels} channel{'s' * (data.channels > 1)}. {_what_is_done(run)}"
    )


def _what_is_done(run: Run) -> str:
    config = run.config
    return (
        f"{run.rounds_done} of {config.federation.rounds} rounds of "
        f"{config.train.local_epochs} local epochs are done."
    )


def _generator(run: Run) -> str:
    told = [f"{name} {value}" for name, value in run.generator.description().items()]
    started = f" It started from {run.started_from}." if run.started_from else ""
    return f"It is a {'; '.join([run.generator.title, *told])}.{started}"


def _what_travelled(run: Run) -> str:
    """Say which parts of the weights were sent, and how."""
    generator, federation = run.generator, run.config.federation
    frozen = tuple(generator.frozen)
    state = {
        name: tensor.numel()
        for name, tensor in generator.state_dict().items()
        if tensor.is_floating_point() and not name.startswith(frozen)
    }
    sent = sum(numel for name, numel in state.items() if not generator.stays(name))
    how = f"in every round, as {federation.wire_dtype}"
    parts = [part for part in generator.parts if part not in generator.kept_parts]
    if federation.sharing == "usplit":
        how += f"; of two clients one sent {parts[0]} back and the other {parts[-1]}"
        between = ", ".join(parts[1:-1])
        how += f", and by chance one of them {between}" * bool(between)
    beside = [
        *["gradients of clients and of all"] * (run.config.strategy.name == "scaffold"),
        *["moments of optimizers"] * (run.config.train.optimizer_state == "averaged"),
    ]
    how += f"; beside them {' and '.join(beside)}, as float32" * bool(beside)
    if not generator.kept_parts:
        trained = " but those that nobody trains" * bool(frozen)
        return f"All weights{trained} travelled {how}."
    kept = ", ".join(generator.kept_parts)
    told = (
        "and were sent after evaluated rounds"
        if federation.drawn_by == "clients"
        else "and were never sent"
    )
    return (
        f"Of the weights {sent / sum(state.values()):.0%} travelled {how} "
        f"({', '.join(parts) or 'what is in no part'}). The parts {kept} stayed with each hospital "
        f"{told}."
    )


def _where(run: Run) -> str:
    train = run.config.train
    if run.setting == "real nodes":
        chosen = "Each hospital chose device and precision itself"
        if not run.draws:
            return f"{chosen}."
        return f"{chosen}; the server drew its images{f' on {run.device}' if run.device else ''}."
    device = run.device or f"the device of train.device={train.device}"
    return f"It ran on {device} in {train.precision}."


def loss_figures(run: Run) -> Iterator[tuple[str, str]]:
    """List the last losses of a run, by name."""
    for reference in (TRAIN, TEST):
        last = run.records.last("loss", reference=reference)
        if last is not None:
            yield f"{reference} loss", f"{last.value:.4g} (round {last.round})"
    # Of a classifier.
    last = run.records.last("accuracy", reference=TEST)
    if last is not None:
        yield f"{TEST} accuracy", f"{last.value:.4g} (round {last.round}, n={last.n:,})"


def _time(run: Run) -> Iterator[tuple[str, str]]:
    total = sum(run.records.series("round_seconds").values())
    training = sum(run.records.series("seconds_training").values())
    if run.seconds > 0:
        yield "time", duration(run.seconds)
    if total > 0:
        yield "of the rounds, without training", f"{1 - training / total:.0%}"


def _left_out(run: Run) -> str:
    left_out = run.records.left_out
    clients = sorted({each.client for each in left_out if each.client is not None})
    if not clients:
        return "no client"
    shown = " ".join(map(str, clients[:MOST_NAMED])) + " ..." * (len(clients) > MOST_NAMED)
    return f"{len(left_out)} replies, of clients {shown}"
