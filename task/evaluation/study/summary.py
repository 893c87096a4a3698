"""What a study found: figures of each arm, its gains, and a sentence for each run that drew."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from statistics import fmean, stdev
from typing import Any

import numpy as np

from task.config.study_config import StudyConfig
from task.evaluation.study.arms import Arm, ArmKind
from task.evaluation.study.figures import TITLES, figures_of
from task.evaluation.study.gains import (
    INTERVAL,
    Floats,
    Gain,
    gain_of,
    holm,
    macro_auc,
    patient_weights,
    resampled_accuracy,
    seed_weights,
    sensitivities,
)
from task.evaluation.study.study import ArmResult, Material
from task.randomness import Stream, numpy_generator

SIGNIFICANCE_LEVEL = 1 - INTERVAL
# What an arm is chosen by and judged by.
PRIMARY = "macro_auc"
VERDICTS = {1: "gain", 0: "no gain shown", -1: "loss"}


class Resampled:
    """Figures of all arms for the same draws of test patients and of classifiers."""

    def __init__(self, material: Material, study: StudyConfig) -> None:
        """Draw the patients."""
        self._material = material
        self._labels = material.test.labels.numpy()
        rng = numpy_generator(study.seed, Stream.STUDY, 5)
        self.weights = patient_weights(material.patients, study.num_bootstraps, rng)
        # A difference of arms may be one of a few classifiers' first weights.
        self._of_seeds = seed_weights(study.num_seeds, study.num_bootstraps, rng)
        self.rarest = int(
            np.argmin(
                np.where(
                    np.bincount(self._labels, minlength=len(material.classes)) > 0,
                    np.bincount(material.train.labels.numpy(), minlength=len(material.classes)),
                    np.inf,
                )
            )
        )

    def figures(self, result: ArmResult) -> dict[str, Floats]:
        """Compute what gains are told of, each [B + 1], as means over the classifiers of an arm."""
        found: dict[str, list[Floats]] = {}
        for fit in result.fits:
            said = fit.test.numpy().astype(np.float64)
            by_class = sensitivities(said, self._labels, self.weights)
            own = {
                "macro_auc": macro_auc(said, self._labels, self.weights),
                "balanced_accuracy": resampled_accuracy(said, self._labels, self.weights),
            }
            own |= {f"sensitivity/{label}": by_class[label] for label in range(len(by_class))}
            for hospital in self.hospitals:
                weights = self.weights * (self._hospitals == hospital)
                own[f"hospital/{hospital}"] = resampled_accuracy(said, self._labels, weights)
            for name, values in own.items():
                found.setdefault(name, []).append(values)
        return {
            name: (self._of_seeds.T * np.stack(values)).sum(0) for name, values in found.items()
        }

    @property
    def hospitals(self) -> list[int]:
        """The hospitals that have test images; empty where all are of one place."""
        return sorted({*self._hospitals.tolist()}) if self._material.hospitals is not None else []

    @property
    def _hospitals(self) -> np.ndarray:
        given = self._material.hospitals
        return np.zeros(len(self._labels), dtype=np.int64) if given is None else given.numpy()


def summarize(
    material: Material, study: StudyConfig, results: Iterable[ArmResult], *, odir: bool
) -> dict[str, Any]:
    """Compute all that a study tells, as JSON.

    Args:
        material: its images.
        study: its values.
        results: its arms, those of real images alone first in each fraction.
        odir: whether the classes are ODIR's.
    """
    resampled = Resampled(material, study)
    figures: dict[Arm, dict[str, Floats]] = {}
    rows: list[dict[str, Any]] = []
    for result in results:
        figures[result.arm] = resampled.figures(result)
        rows.append(_arm_row(material, result, odir=odir))
    gains = {
        arm: _gains(figures, arm, ArmKind.REAL) for arm in figures if arm.kind is not ArmKind.REAL
    }
    corrected = holm([each[PRIMARY].p_value for each in gains.values()])
    p_values = dict(zip(gains, corrected, strict=True))
    for arm, row in zip(figures, rows, strict=True):
        if arm in gains:
            row["gains"] = {name: asdict(each) for name, each in gains[arm].items()}
            row["p_holm"] = p_values[arm]
            row["verdict"] = VERDICTS[_direction(gains[arm][PRIMARY], p_values[arm])]
    headlines = [
        _headline(source, study, figures, rows, gains, p_values) for source in material.sources
    ]
    return {"rarest_class": resampled.rarest, "arms": rows, "headlines": headlines}


def _gains(figures: Mapping[Arm, Mapping[str, Floats]], arm: Arm, over: ArmKind) -> dict[str, Gain]:
    base = figures[Arm(over, arm.fraction)]
    found = {}
    for name, values in figures[arm].items():
        # A class or hospital without test images has no figure.
        if np.isfinite(values - base[name])[1:].any() and np.isfinite(values[0]):
            found[name] = gain_of(values, base[name])
    return found


def _direction(gain: Gain, p_value: float) -> int:
    if p_value >= SIGNIFICANCE_LEVEL:
        return 0
    return (gain.low > 0) - (gain.high < 0)


def _arm_row(material: Material, result: ArmResult, *, odir: bool) -> dict[str, Any]:
    arm, labels = result.arm, material.test.labels
    values: dict[str, list[float]] = {}
    validation = []
    for fit in result.fits:
        for name, label, value in figures_of(fit.test, labels, odir=odir):
            values.setdefault(name if label is None else f"{name}/{label}", []).append(value)
        chosen_by = figures_of(fit.validation, material.validation.labels)
        validation += [value for name, _, value in chosen_by if name == PRIMARY]
    return {
        "kind": arm.kind.name.lower(),
        "title": arm.title,
        "source": arm.source or None,
        "fraction": arm.fraction,
        "ratio": arm.ratio,
        "num_real": result.num_real,
        "num_synthetic": result.num_synthetic,
        "steps": [fit.step for fit in result.fits],
        f"validation_{PRIMARY}": fmean(validation) if validation else None,
        "figures": {
            name: {"mean": fmean(each), "std": stdev(each) if len(each) > 1 else None}
            for name, each in values.items()
        },
    }


def _headline(
    source: str,
    study: StudyConfig,
    figures: Mapping[Arm, Mapping[str, Floats]],
    rows: Sequence[Mapping[str, Any]],
    gains: Mapping[Arm, Mapping[str, Gain]],
    p_values: Mapping[Arm, float],
) -> dict[str, Any]:
    """Say in a sentence what the images of a run are good for, at the largest fraction."""
    fraction = max(study.real_fractions)
    chances = {
        arm: row[f"validation_{PRIMARY}"]
        for arm, row in zip(figures, rows, strict=True)
        if arm.source == source and arm.kind is ArmKind.BOTH and arm.fraction == fraction
    }
    # By the validation images, never by the test images; the smallest ratio of equal ones.
    best = max(chances, key=lambda arm: (chances[arm] or 0.0, -arm.ratio))
    gain, control = gains[best][PRIMARY], _gains(figures, best, ArmKind.OVERSAMPLED)[PRIMARY]
    direction = _direction(gain, p_values[best])
    directions = [_direction(gains[arm][PRIMARY], p_values[arm]) for arm in chances]
    found = {1: "A gain is shown", 0: "No gain is shown", -1: "A loss is shown"}[direction]
    sentence = (
        f"{found}: {best.ratio:g} generated images for each real one, the ratio that validation "
        f"images chose, change the macro AUC on the test images by {_told(gain)} beside real "
        f"images alone (Holm's p = {p_values[best]:.2g}), and by {_told(control)} beside real "
        f"images, oversampled. Of {len(directions)} ratios {directions.count(1)} show a gain and "
        f"{directions.count(-1)} a loss."
    )
    return {
        "source": source,
        "fraction": fraction,
        "ratio": best.ratio,
        "verdict": VERDICTS[direction],
        "gain": asdict(gain),
        "over_control": asdict(control),
        "p_holm": p_values[best],
        "sentence": sentence,
    }


def _told(gain: Gain) -> str:
    return f"{gain.value:+.3f} ({INTERVAL:.0%} interval {gain.low:+.3f} to {gain.high:+.3f})"


def title_of(name: str, classes: Sequence[str]) -> str:
    """Name a figure of a study for a reader, such as "sensitivity/3"."""
    kind, _, place = name.partition("/")
    if kind == "hospital":
        return f"balanced accuracy at hospital {place}"
    return TITLES[kind][0] + (f" of {classes[int(place)]}" if place else "")
