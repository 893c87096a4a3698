"""What a reader of a run should know first: signs that its figures may mislead."""

import math
import re
from collections.abc import Iterator, Mapping
from statistics import median

from task.history import GLOBAL, RunHistory, Series

# Below five values a median and its deviations say nothing of a sixth.
LEAST_COMPARED = 5
# Deviations from the median, in units of a normal distribution's sigma. Clients whose images differ
# in kind spread widely, so that the usual 3.5 would point at honest ones.
FAR = 6.0
# 1.4826 times the median absolute deviation is the sigma of a normal distribution.
SIGMAS_PER_MAD = 1.4826
# Clients that are nearly alike are not far apart for a difference below a tenth of the median.
LEAST_SPREAD = 0.1 / FAR
# Of the rounds in which a client could be compared: a single odd round is no drift.
DRIFTING_SHARE = 0.25
LEAST_DRIFTING_ROUNDS = 2

# What is compared between the clients of a round.
COMPARED = {"train_loss": "train loss", "train_update_norm": "update norm"}

# A Frechet distance shrinks with the number of images; below about a thousand the number itself
# decides much of it.
FEW_IMAGES = 1000
# Of generated images, what is as near as the nearest 1 % of held-out ones where nothing is copied.
COPIED_BY_CHANCE = 0.01
# Standard errors above chance: one in a thousand honest runs comes so far.
SURE = 3.0


def warning_signs(history: RunHistory) -> list[str]:
    """List what a reader should know first, a sentence each; empty where there is nothing."""
    found = [_unfinished, _not_finite, _left_out, _absent, _drifting, _copying, _few_images]
    return [sentence for look in found for sentence in look(history)]


def far_rounds(series: Mapping[int, Series]) -> dict[int, tuple[int, int]]:
    """Count the rounds in which each client's value is far from those of the others.

    Far is more than `FAR` sigmas from the median of the clients of the round, where sigma is
    estimated from the median absolute deviation, which a few odd clients do not move.

    Args:
        series: values by client.

    Returns:
        By client, the rounds in which it is far, and those in which it could be compared.
    """
    counts = dict.fromkeys(series, (0, 0))
    for number in {number for values in series.values() for number in values}:
        present = {client: values[number] for client, values in series.items() if number in values}
        if len(present) < LEAST_COMPARED:
            continue
        middle = median(present.values())
        deviation = median(abs(value - middle) for value in present.values())
        sigma = max(SIGMAS_PER_MAD * deviation, LEAST_SPREAD * abs(middle))
        for client, value in present.items():
            far, compared = counts[client]
            counts[client] = (far + (abs(value - middle) > FAR * sigma), compared + 1)
    return counts


def _unfinished(history: RunHistory) -> Iterator[str]:
    rounds = history.config.federation.rounds
    if not history.finished:
        state = "it is still going on" if history.running else "it is not going on; resume it"
        done = f"{history.rounds_done} of {rounds} rounds are done"
        yield f"The run is not finished: {done}; {state}."


def _not_finite(history: RunHistory) -> Iterator[str]:
    rounds: dict[tuple[str, str], list[int]] = {}
    for number, who, name in history.not_finite:
        rounds.setdefault((who, name), []).append(number)
    for (who, name), numbers in rounds.items():
        whose = "" if who == GLOBAL else f" of {who.replace('-', ' ')}"
        means = ": the run has diverged" if name.endswith("_loss") else ""
        title = name.replace("_", " ").capitalize()
        yield (
            f"{title}{whose} was not a number in {_rounds(len(set(numbers)))}, from round "
            f"{min(numbers)} on{means}."
        )


def _left_out(history: RunHistory) -> Iterator[str]:
    for client in history.clients:
        own = [each for each in history.left_out if each.client == client]
        reasons = dict.fromkeys(each.reason for each in own)
        if own:
            rounds = len({each.round for each in own})
            yield (
                f"Client {client} was left out {_times(len(own))} in {_rounds(rounds)}: "
                f"{'; '.join(reasons)}."
            )


def _absent(history: RunHistory) -> Iterator[str]:
    states = history.participation()
    for client in history.clients:
        missed = [
            number
            for (number, who), state in states.items()
            if who == client and state == "not there"
        ]
        if missed:
            yield (
                f"Client {client} was not there in {_rounds(len(missed))} although all clients are "
                f"asked (first in round {min(missed)}, last in round {max(missed)})."
            )


def _drifting(history: RunHistory) -> Iterator[str]:
    for name, title in COMPARED.items():
        for client, (far, compared) in far_rounds(history.of_clients(name)).items():
            if far >= max(LEAST_DRIFTING_ROUNDS, DRIFTING_SHARE * compared):
                yield (
                    f"Client {client} drifts: its {title} is far from that of the other clients "
                    f"in {far} of {compared} rounds (more than {FAR:g} robust standard deviations "
                    "from their median). It may have other images, many more or fewer, or a fault."
                )


def _copying(history: RunHistory) -> Iterator[str]:
    for each in history.evaluations:
        report = each.report
        spaces = (("pixels", report.pixel_copying), ("features", report.feature_copying))
        for space, copies in spaces:
            n = report.label.n_generated
            if copies is not None and is_copying(copies.copied, n):
                yield (
                    "Generated images lie closer to training images than real held-out ones do: "
                    f"{copies.copied:.1%} of {n:,} are as near, in {space}, as the nearest 1 % of "
                    f"held-out images ({each.name}). Look at them for copies; blurred images are "
                    "near in pixels, too."
                )
    n = num_scored(history)
    for space in ("pixel", "feature"):
        share = history.final(f"quality_{space}_copied")
        if share is not None and is_copying(share, n):
            yield (
                "Generated images lie closer to the hospitals' training images than their "
                f"held-out ones do: {share:.1%} are as near, in {space}s, as the nearest 1 %."
            )


def is_copying(share: float, num_images: int) -> bool:
    """Whether more images are near training images than chance explains.

    Args:
        share: of the images that are as near as the nearest 1 % of held-out ones.
        num_images: of which it is a share, > 0.
    """
    error = math.sqrt(COPIED_BY_CHANCE * (1 - COPIED_BY_CHANCE) / num_images)
    return share > COPIED_BY_CHANCE + SURE * error


def num_scored(history: RunHistory) -> int:
    """Return the number of images that hospitals scored last."""
    said = re.match(r"\d+", history.scoring or "")
    return int(said[0]) if said else history.config.eval.num_images


def _few_images(history: RunHistory) -> Iterator[str]:
    measured = {each.name: each.report.label.n_generated for each in history.evaluations}
    if history.final("quality_num_hospitals"):
        measured["the hospitals' scores"] = num_scored(history)
    for what, number in measured.items():
        if number < FEW_IMAGES:
            yield (
                f"Few images were measured: {number:,} in {what}. Below {FEW_IMAGES:,} the figures "
                "depend much on the number; compare equal numbers only."
            )


def _times(number: int) -> str:
    return "once" if number == 1 else f"{number} times"


def _rounds(number: int) -> str:
    return f"{number} round{'' if number == 1 else 's'}"
