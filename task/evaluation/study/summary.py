"""What a study found: figures of each arm, its gains, and a sentence for each run that drew."""

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict
from itertools import combinations
from statistics import fmean, stdev
from typing import Any

import numpy as np
import torch

from task.checks import require
from task.config.study_config import StudyConfig
from task.evaluation.study.arms import Arm, ArmKind
from task.evaluation.study.figures import figures_of
from task.evaluation.study.gains import (
    INTERVAL,
    Floats,
    Gain,
    gain_of,
    holm,
    macro_auc,
    patient_weights,
    resampled_accuracy,
    sensitivities,
)
from task.evaluation.study.study import ArmResult, Material
from task.progress import tracked
from task.randomness import Stream, numpy_generator

SIGNIFICANCE_LEVEL = 1 - INTERVAL
# What an arm is chosen by and judged by.
PRIMARY = "macro_auc"
# Tested patients of a class or a hospital below which draws of them tell no interval.
LEAST_PATIENTS = 10
VERDICTS = {1: "gain", 0: "no gain shown", -1: "loss"}
# What a hospital may have, by the kind of its classifier.
WAYS = {
    "own": "its own images alone",
    "own_both": "generated ones beside them",
    "synthetic": "generated ones alone",
    "run": "a classifier that was trained in a run",
    "real": "the real images of all",
}

# By name, [S, B + 1]: of each seed, for the images as they are and for each draw of patients.
ArmFigures = Mapping[str, Floats]


class Resampled:
    """Figures of all arms for the same draws of test patients."""

    def __init__(self, material: Material, study: StudyConfig) -> None:
        """Draw the patients."""
        self._labels = material.test.labels.numpy()
        self._hospitals = None if material.hospitals is None else material.hospitals.test.numpy()
        rng = numpy_generator(study.seed, Stream.STUDY, 5)
        self._patients = material.patients
        self._weights = patient_weights(self._patients, study.num_bootstraps, rng)
        self._seed = study.seed

    def figures(self, result: ArmResult) -> ArmFigures:
        """Compute what gains are told of; of the classifiers of one hospital, on its own images."""
        found: dict[str, list[Floats]] = {}
        for fit in result.fits:
            said = fit.test.numpy().astype(np.float64)
            own = self._on_all(said) if result.arm.hospital is None else {}
            for name, values in {**own, **self._by_hospital(said, result.arm.hospital)}.items():
                found.setdefault(name, []).append(values)
        return {name: np.stack(values) for name, values in found.items()}

    def _on_all(self, said: Floats) -> dict[str, Floats]:
        by_class = sensitivities(said, self._labels, self._weights)
        return {
            "macro_auc": macro_auc(said, self._labels, self._weights),
            "balanced_accuracy": resampled_accuracy(said, self._labels, self._weights),
            **{f"sensitivity/{label}": each for label, each in enumerate(by_class)},
        }

    def _by_hospital(self, said: Floats, only: int | None) -> dict[str, Floats]:
        """Compute the balanced accuracy on the test images of one hospital, or of each."""
        if self._hospitals is None:
            return {}
        found = {}
        for hospital in sorted({*self._hospitals.tolist()}) if only is None else [only]:
            own = self._hospitals == hospital
            values = resampled_accuracy(said[own], self._labels[own], self._weights[own])
            found[f"hospital/{hospital}"] = values
        return found

    def gains(
        self, ours: ArmFigures, theirs: ArmFigures, *, paired: bool = True
    ) -> dict[str, Gain]:
        """Compare two arms.

        What has no figure on the test images is left out, and what is of too few patients.

        Args:
            ours: of one arm.
            theirs: of the other; the figures of ours are looked up in it.
            paired: see `gain_of`.
        """
        return {
            name: gain_of(
                values, theirs[name], numpy_generator(self._seed, Stream.STUDY, 7), paired=paired
            )
            for name, values in ours.items()
            if np.isfinite(values[:, 0]).all()
            and np.isfinite(theirs[name][:, 0]).all()
            and ("/" not in name or self.num_patients(name) >= LEAST_PATIENTS)
        }

    def num_patients(self, name: str) -> int:
        """Count the patients of whom the figure of a class or of a hospital is."""
        kind, _, number = name.partition("/")
        of_each = self._hospitals if kind == "hospital" else self._labels
        return len({*self._patients[of_each == int(number)].tolist()})


def rarest_class(material: Material) -> int:
    """Return the class with the fewest training images of those that are tested."""
    number = len(material.classes)
    train, test = (
        images.labels.bincount(minlength=number) for images in (material.train, material.test)
    )
    return int(torch.where(test > 0, train, train.max() + 1).argmin())


def check_bootstraps(study: StudyConfig, num_sources: int, num_classifiers: int = 0) -> None:
    """Check that a p value can fall below 5% after the correction over all arms of a study.

    Args:
        study: its values.
        num_sources: runs that draw.
        num_classifiers: arms of classifiers that runs have trained.

    Raises:
        ValueError: it cannot.
    """
    with_generated = num_sources * (1 + len(study.ratios))
    tests = len(study.real_fractions) * (2 + 2 * with_generated) + num_classifiers
    # The least p value is 2 / (B + 2).
    needed = math.ceil(2 * tests / SIGNIFICANCE_LEVEL)
    require(
        study.num_bootstraps >= needed,
        "study.num_bootstraps",
        f"at least {needed} for {tests} comparisons, or none could be significant",
        study.num_bootstraps,
    )


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
    trained = [*results]
    figures: dict[Arm, ArmFigures] = {}
    at_hospitals: dict[Arm, ArmFigures] = {}
    rows: list[dict[str, Any]] = []
    for result in tracked(trained, len(trained), "comparing arms"):
        if result.arm.hospital is not None:
            at_hospitals[result.arm] = resampled.figures(result)
        else:
            figures[result.arm] = resampled.figures(result)
            rows.append(_arm_row(material, result, odir=odir))
    # By what it is held against.
    gains: dict[tuple[Arm, ArmKind], dict[str, Gain]] = {}
    for arm, values in figures.items():
        if arm.kind is not ArmKind.REAL:
            real = figures[_base(ArmKind.REAL, arm)]
            paired = arm.kind is not ArmKind.RUN
            gains[arm, ArmKind.REAL] = resampled.gains(values, real, paired=paired)
        if arm.is_synthetic:
            control = figures[_base(ArmKind.OVERSAMPLED, arm)]
            gains[arm, ArmKind.OVERSAMPLED] = resampled.gains(values, control)
    corrected = holm([each[PRIMARY].p_value for each in gains.values()])
    p_values = dict(zip(gains, corrected, strict=True))
    for arm, row in zip(figures, rows, strict=True):
        for over, name in ((ArmKind.REAL, "gains"), (ArmKind.OVERSAMPLED, "over_control")):
            if (arm, over) in gains:
                row[name] = {name: asdict(each) for name, each in gains[arm, over].items()}
                row[f"p_holm_{name}"] = p_values[arm, over]
        if arm.kind is not ArmKind.REAL:
            row["verdict"] = VERDICTS[_verdict(arm, gains, p_values)]
    chosen = {
        source: _arm_chosen_by_validation(source, study, figures, rows)
        for source in material.sources
    }
    compared = [*_at_hospitals(material, figures, at_hospitals, resampled)]
    return {
        "rarest_class": rarest_class(material),
        "arms": rows,
        "headlines": [_headline(name, arm, gains, p_values) for name, arm in chosen.items()],
        "between": _between(chosen, figures, resampled),
        "at_hospitals": compared,
        "at_hospitals_sentence": _hospitals_sentence(compared),
    }


def _hospitals_sentence(compared: Sequence[Mapping[str, Any]]) -> str:
    """Say what hospitals get of each way, as the mean over them; "" where none is compared."""
    if not compared:
        return ""
    told = []
    for place, first in enumerate(compared[0]["classifiers"]):
        means = [each["classifiers"][place]["balanced_accuracy"]["mean"] for each in compared]
        of = f" ({first['source']})" if first["source"] else ""
        told.append(f"{fmean(means):.3f} with {WAYS[first['kind']]}{of}")
    return (
        f"Of {len(compared)} hospitals the mean balanced accuracy, each on its own test images, is "
        f"{', '.join(told)}."
    )


def _at_hospitals(
    material: Material,
    figures: Mapping[Arm, ArmFigures],
    at_hospitals: Mapping[Arm, ArmFigures],
    resampled: Resampled,
) -> Iterator[dict[str, Any]]:
    """Compare for each hospital what it can do: alone, with generated images, in a federation.

    All is measured on its own test images, by the balanced accuracy.
    """
    hospitals = material.hospitals
    if hospitals is None:
        return
    everywhere = [
        arm
        for arm in figures
        if arm.fraction == 1 and arm.kind in (ArmKind.SYNTHETIC, ArmKind.REAL, ArmKind.RUN)
    ]
    for own, alone in at_hospitals.items():
        hospital = own.hospital
        if own.kind is not ArmKind.OWN or hospital is None:
            continue
        beside = [arm for arm in at_hospitals if arm.hospital == hospital and arm != own]
        name = f"hospital/{hospital}"
        found = []
        for arm in (own, *beside, *everywhere):
            values = (at_hospitals if arm in at_hospitals else figures)[arm]
            paired = arm.kind is not ArmKind.RUN
            gain = resampled.gains({name: values[name]}, alone, paired=paired).get(name)
            told: dict[str, Any] = {
                "kind": arm.kind.name.lower(),
                "source": arm.source or None,
                "balanced_accuracy": _mean_of_seeds(values[name][:, 0].tolist()),
            }
            if arm != own and gain is not None:
                told["gain_over_own"] = asdict(gain)
            found.append(told)
        yield {
            "hospital": hospital,
            "num_train": int(hospitals.train.eq(hospital).sum()),
            "num_test": int(hospitals.test.eq(hospital).sum()),
            "num_test_patients": resampled.num_patients(name),
            "classifiers": found,
        }


def _mean_of_seeds(values: Sequence[float]) -> dict[str, float | None]:
    return {"mean": fmean(values), "std": stdev(values) if len(values) > 1 else None}


def _base(kind: ArmKind, arm: Arm) -> Arm:
    return Arm(kind, arm.fraction)


Compared = Mapping[tuple[Arm, ArmKind], Mapping[str, Gain]]
Corrected = Mapping[tuple[Arm, ArmKind], float]


def _verdict(arm: Arm, gains: Compared, p_values: Corrected) -> int:
    """Say whether an arm gains, 1, or loses, -1; with generated images, over oversampling too."""
    found = []
    for over in (ArmKind.REAL, ArmKind.OVERSAMPLED) if arm.is_synthetic else (ArmKind.REAL,):
        gain = gains[arm, over][PRIMARY]
        significant = p_values[arm, over] < SIGNIFICANCE_LEVEL
        found.append(((gain.low > 0) - (gain.high < 0)) * significant)
    return verdict_of(found)


def verdict_of(found: Sequence[int]) -> int:
    """Judge an arm by the signs of what is significant, over real images and, perhaps, the control.

    A loss is one over real images alone, which is what a hospital has; a gain is one over both.
    """
    return -1 if found[0] < 0 else int(min(found) > 0)


def _arm_chosen_by_validation(
    source: str,
    study: StudyConfig,
    figures: Mapping[Arm, ArmFigures],
    rows: Sequence[Mapping[str, Any]],
) -> Arm:
    """Return the arm that a run is judged by: of the largest fraction, chosen by validation."""
    fraction = max(study.real_fractions)
    chances = {
        arm: row[f"validation_{PRIMARY}"]
        for arm, row in zip(figures, rows, strict=True)
        if arm.source == source and arm.kind is ArmKind.BOTH and arm.fraction == fraction
    }
    # The smallest ratio of equal ones.
    return max(chances, key=lambda arm: (chances[arm] or 0.0, -arm.ratio))


def _headline(source: str, arm: Arm, gains: Compared, p_values: Corrected) -> dict[str, Any]:
    """Say in a sentence what the images of a run are good for."""
    gain, control = (gains[arm, over][PRIMARY] for over in (ArmKind.REAL, ArmKind.OVERSAMPLED))
    direction = _verdict(arm, gains, p_values)
    others = [
        _verdict(each, gains, p_values)
        for each, over in gains
        if over is ArmKind.REAL
        and (each.source, each.kind, each.fraction) == (source, ArmKind.BOTH, arm.fraction)
    ]
    found = {1: "A gain is shown", 0: "No gain is shown", -1: "A loss is shown"}[direction]
    sentence = (
        f"{found}: {arm.ratio:g} generated images for each real one, the ratio that validation "
        f"images chose, change the macro AUC on the test images by {_told(gain)} beside real "
        f"images alone (Holm's p = {p_values[arm, ArmKind.REAL]:.2g}), and by {_told(control)} "
        f"beside real images, oversampled (p = {p_values[arm, ArmKind.OVERSAMPLED]:.2g}). Of "
        f"{len(others)} ratios {others.count(1)} show a gain and {others.count(-1)} a loss."
    )
    return {
        "source": source,
        "fraction": arm.fraction,
        "ratio": arm.ratio,
        "verdict": VERDICTS[direction],
        "sentence": sentence,
    }


def _between(
    chosen: Mapping[str, Arm], figures: Mapping[Arm, ArmFigures], resampled: Resampled
) -> list[dict[str, Any]]:
    """Compare the runs that drew, each by its chosen arm."""
    found = []
    for first, second in combinations(chosen, 2):
        ours, theirs = (figures[chosen[name]] for name in (first, second))
        gain = resampled.gains(ours, theirs)[PRIMARY]
        found.append({"first": first, "second": second, PRIMARY: asdict(gain)})
    return found


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
        **({"runs": list(result.runs)} if result.runs else {}),
        f"validation_{PRIMARY}": fmean(validation) if validation else None,
        "figures": {name: _mean_of_seeds(each) for name, each in values.items()},
    }


def _told(gain: Gain) -> str:
    return f"{gain.value:+.3f} ({INTERVAL:.0%} interval {gain.low:+.3f} to {gain.high:+.3f})"
