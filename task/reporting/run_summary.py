"""A run in a few lines: for the end of its log, and for the top of its report."""

from collections.abc import Iterator
from typing import NamedTuple

from task.config import Config
from task.evaluation.noise_position import MOST_COMPARED
from task.progress import duration
from task.reporting.history import RunHistory
from task.reporting.metric_table import HOSPITAL_TITLES, REAL_BESIDE, TITLES

AGREEMENT = {"class_agreement": "found in the class asked for ^"}
# Of the metrics, those that say the most in one line each.
HEADLINES = ("noise_position", "fid_train", "fid_test", "precision", "recall")


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


def summary_lines(history: RunHistory) -> list[str]:
    """Say how a run ended, in lines for its log, which are fewer than 15."""
    metrics = [
        (title, f"{generated} ({f'real images {real}; ' if real else ''}{of})")
        for title, of, generated, real in found_metrics(history, *HEADLINES)
    ]
    rows = [*key_figures(history), *metrics]
    width = max(len(name) for name, _ in rows)
    return [f"{name:<{width}}  {value}" for name, value in rows]


def key_figures(history: RunHistory, *, losses: bool = True) -> list[tuple[str, str]]:
    """List what is asked first of a run, by name."""
    figures = [
        ("rounds", f"{history.rounds_done} of {history.config.federation.rounds}"),
        *(loss_figures(history) if losses else []),
        *_time(history),
        ("training images", "not told" if not history.num_images else f"{history.num_images:,}"),
    ]
    if history.setting != "centralised" and history.clients:
        figures.append(("clients", str(len(history.clients))))
        figures.append(("left out", _left_out(history)))
    return figures


def found_metrics(history: RunHistory, *names: str) -> list[Found]:
    """List what was measured last in the run itself.

    Args:
        history: of the run.
        *names: of the metrics of the full evaluation; none: all.
    """
    chosen = {name: title for name, title in TITLES.items() if not names or name in names}
    rows = []
    for name, title in {**chosen, **AGREEMENT, **HOSPITAL_TITLES}.items():
        found = history.final(name)
        if found is not None:
            real = history.final(REAL_BESIDE.get(name, f"floor_{name}"))
            beside = "" if real is None else f"{real:.4g}"
            of = _looked_at(history, name) + _by_chance(history, name)
            last = max(history.values[name])
            of += f", round {last}" * (last != history.rounds_done)
            rows.append(Found(title, of, f"{found:.4g}", beside))
    return rows


def _by_chance(history: RunHistory, name: str) -> str:
    """Name the agreement that one class for every image would have, beside an agreement."""
    if not name.endswith("class_agreement"):
        return ""
    chance = history.final(name.replace("class_agreement", "chance_agreement"))
    return f", by chance {1 / len(history.config.data.classes) if chance is None else chance:.4g}"


def evaluated_metrics(history: RunHistory, *names: str) -> list[Found]:
    """List metrics of the evaluations of the newest weights; without one, of the run itself.

    Args:
        history: of the run.
        *names: of the metrics of the full evaluation.
    """
    rows = []
    for each in history.current_evaluations:
        label, values = each.report.label, each.report.describe()
        n_scored = label.n_generated if label.n_scored is None else label.n_scored
        looked_at = f"{label.extractor}, {label.image_range}, n={n_scored:,}"
        of = f", seed {label.seed}" * (label.seed != 0)
        of += f", drawn with {each.otherwise}" * bool(each.otherwise)
        of += f", round {each.round}" * (each.round != history.config.federation.rounds)
        rows += [
            Found(
                TITLES[name],
                (_compared(label.n_generated) if name == "noise_position" else looked_at) + of,
                f"{values[name]:.4g}",
                f"{values[f'floor_{name}']:.4g}" if label.has_comparable_floor else "",
            )
            for name in names
            if values.get(name) is not None
        ]
    return rows or found_metrics(history, *names)


def _looked_at(history: RunHistory, name: str) -> str:
    if name in HOSPITAL_TITLES:
        # As short as what other figures are of.
        words = (history.scoring or "").replace("extractor ", "").replace("image range ", "")
        return f"hospitals, {words}"
    if name in AGREEMENT:
        number = history.final("num_generated_images") or 0
        return f"a classifier trained on the real images, n={number:,.0f}"
    generated = history.final("num_generated_images")
    if name == "noise_position" and generated:
        return _compared(generated)
    chosen = history.config.eval
    number = history.final("n_scored") or history.final("n_generated") or chosen.num_images
    of = f"{chosen.extractor}, {chosen.image_range}, n={number:,.0f}"
    return of + f", seed {chosen.seed}" * (chosen.seed != 0)


def _compared(num_generated: float) -> str:
    """Say what a place between real images and noise is of."""
    return f"pixels and spectra, n={min(num_generated, MOST_COMPARED):,.0f}"


def describe_run(history: RunHistory) -> list[str]:
    """Say in sentences what was trained, by whom and on what."""
    config = history.config
    return [_who_trained_what(history), _diffusion(config), _where(history)]


def _who_trained_what(history: RunHistory) -> str:
    data, num_clients = history.config.data, len(history.clients)
    if history.setting != "centralised" and not num_clients:
        return f"No client has answered yet. {_what_is_done(history)}"
    who = {
        "centralised": "One machine, on the pooled images,",
        "simulation": f"{num_clients} simulated hospitals, on one machine,",
        "real nodes": f"{num_clients} hospitals, each on its own images,",
    }[history.setting]
    return (
        f"{who} trained a U-Net of {history.num_parameters:,} parameters to draw images of "
        f"{data.name}: {len(data.classes)} classes, {data.image_size}x{data.image_size} pixels, "
        f"{data.channels} channel{'s' * (data.channels > 1)}. {_what_is_done(history)}"
    )


def _what_is_done(history: RunHistory) -> str:
    config = history.config
    return (
        f"{history.rounds_done} of {config.federation.rounds} rounds of "
        f"{config.train.local_epochs} local epochs are done."
    )


def _diffusion(config: Config) -> str:
    diffusion = config.diffusion
    steps = diffusion.num_inference_steps or diffusion.num_timesteps
    return (
        f"The diffusion has {diffusion.num_timesteps} timesteps on a {diffusion.schedule} "
        f"schedule; the prediction type is {diffusion.prediction_type}, and images are "
        f"drawn by {diffusion.sampler} in {steps} steps."
    )


def _where(history: RunHistory) -> str:
    train = history.config.train
    if history.setting == "real nodes":
        drawn = f" on {history.device}" if history.device else ""
        return (
            f"Each hospital chose device and precision itself; the server drew its images{drawn}."
        )
    device = history.device or f"the device of train.device={train.device}"
    return f"It ran on {device} in {train.precision}."


def loss_figures(history: RunHistory) -> Iterator[tuple[str, str]]:
    """List the last losses of a run, by name."""
    for name in ("train_loss", "test_loss"):
        series = history.values.get(name)
        if series:
            last = max(series)
            yield name.replace("_", " "), f"{series[last]:.4g} (round {last})"


def _time(history: RunHistory) -> Iterator[tuple[str, str]]:
    total = sum(history.values.get("round_seconds", {}).values())
    training = sum(history.values.get("seconds_training", {}).values())
    if history.seconds > 0:
        yield "time", duration(history.seconds)
    if total > 0:
        yield "of the rounds, without training", f"{1 - training / total:.0%}"


def _left_out(history: RunHistory) -> str:
    clients = sorted({each.client for each in history.left_out})
    if not clients:
        return "no client"
    shown = " ".join(map(str, clients[:10])) + (" ..." if len(clients) > 10 else "")
    return f"{len(history.left_out)} replies, of clients {shown}"
