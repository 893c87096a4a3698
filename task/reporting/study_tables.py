"""What a study found, as tables for pages: the arms, the classes, the hospitals."""

from collections.abc import Mapping, Sequence
from typing import Any

from task.evaluation.study.arms import ArmKind
from task.evaluation.study.figures import TITLES
from task.evaluation.study.summary import LEAST_PATIENTS, PRIMARY

RUN = ArmKind.RUN.name.lower()
# A heading and rows, the first of which are the heads of the columns.
StudyTable = tuple[str, Sequence[str], Sequence[Sequence[str]]]


def study_tables(found: Mapping[str, Any]) -> list[StudyTable]:
    """Lay out the tables of a study.

    Args:
        found: what `feddm study` wrote.
    """
    tables = [_arm_table(found), *_class_tables(found), *_hospital_tables(found)]
    if found["at_hospitals"]:
        tables.append(_alone_table(found))
    if found["between"]:
        rows = [
            [f"{e['first']} beside {e['second']}", told_gain(e[PRIMARY])] for e in found["between"]
        ]
        tables.append(
            ("Generators", ["at the ratio chosen for each", "difference in macro AUC"], rows)
        )
    return tables


def study_notes(found: Mapping[str, Any]) -> list[str]:
    """Say in sentences what was measured on which images, and what weakens it."""
    images, classes = found["images"], found["classes"]
    told = []
    for name, role in (
        ("train", "train the classifiers"),
        ("validation", "choose among their weights and among the ratios"),
        ("test", "are measured on"),
    ):
        counts = images[name]
        each = ", ".join(f"{c} {n:,}" for c, n in zip(classes, counts["by_class"], strict=True))
        patients = counts["patients"]
        whose = "" if patients is None else f" of {patients:,} patients"
        told.append(f"{counts['images']:,} real images{whose} {role} ({each}).")
    told.append(
        f"Classifier: {found['classifier']}; {found['steps']} optimizer steps in every arm, "
        f"{_quantity(found['num_seeds'], 'classifier')} each; the loss or the batches even out the "
        f"classes by study.balance={found['balance']}, but in the control, which oversamples them."
    )
    resampled = "images" if images["test"]["patients"] is None else "patients"
    told.append(
        "Gains: over real images of the same fraction, alone or oversampled; intervals at 95% over "
        f"{found['num_bootstraps']:,} draws of test {resampled}, and by Student's t over the "
        "classifiers; p values of the macro AUC by Holm's correction over all comparisons with "
        "real images. Intervals of classes, hospitals and pairs of generators are not corrected, "
        f"and left out below {LEAST_PATIENTS} tested patients. Each generator is one training of "
        "it: how another would do is in no interval."
    )
    if found["at_hospitals"]:
        told.append(
            "Alone and together: balanced accuracy on each hospital's own test images, and the "
            "gain over its own images alone with its interval, not corrected for their number. "
            "Generated images are as many as the real ones of all hospitals; their generator has "
            "been trained on this hospital's images too, which one that stays out would not give. "
            "Its own validation images, where it has any, choose among the weights."
        )
    told += [_told_of_run(row) for row in found["arms"] if row["kind"] == RUN]
    if any(row["fraction"] < 1 for row in found["arms"]):
        told.append(
            "At a fraction below 1 the generator has been trained on real images that the "
            "classifier is not given: a gain there may be theirs."
        )
    return told


def _told_of_run(row: Mapping[str, Any]) -> str:
    """Say what a classifier is that runs have trained."""
    number, first = len(row["runs"]), row["runs"][0]
    alone = "" if number > 1 else "; a single run is taken to spread as the others do"
    return (
        f"A {row['title']}: {first['classifier']}, trained with train.mode={first['mode']} in "
        f"{_quantity(number, 'run')}, by a loss that does not weigh classes, and no validation "
        f"images chose among the weights. Its gain is not paired by seeds{alone}."
    )


def _arm_table(found: Mapping[str, Any]) -> StudyTable:
    several = len(found["headlines"]) > 1
    names = [name for name in TITLES if any(name in row["figures"] for row in found["arms"])]
    heads = [
        "arm",
        *(["generator"] if several else []),
        *("of the real images", "real", "synthetic"),
        *("gain in macro AUC", "p (Holm)", "over oversampling", "p (Holm) "),
        *(f"{TITLES[name][0]} {'↑' if TITLES[name][1] else '↓'}" for name in names),
    ]
    rows = []
    for row in found["arms"]:
        found_gains = [
            (row.get(name, {}).get(PRIMARY), row.get(f"p_holm_{name}"))
            for name in ("gains", "over_control")
        ]
        rows.append(
            [
                row["title"],
                *([row["source"] if row["source"] and row["ratio"] else "-"] if several else []),
                f"{row['fraction']:g}",
                _count(row["num_real"]),
                _count(row["num_synthetic"]),
                *(
                    text
                    for gain, p_value in found_gains
                    for text in (
                        ("-", "-") if gain is None else (told_gain(gain), f"{p_value:.2g}")
                    )
                ),
                *(_mean(row["figures"].get(name)) for name in names),
            ]
        )
    return "Arms", heads, rows


def _class_tables(found: Mapping[str, Any]) -> list[StudyTable]:
    """Set the sensitivity of each class before and after, for each generator."""
    tables: list[StudyTable] = []
    for headline in found["headlines"]:
        before, after = arms_of(found, headline)
        rows = []
        for label, name in enumerate(found["classes"]):
            key = f"sensitivity/{label}"
            if key in before["figures"]:
                gain = after["gains"].get(key)
                rarest = " (rarest)" if label == found["rarest_class"] else ""
                rows.append(
                    [
                        f"{name}{rarest}",
                        f"{found['images']['train']['by_class'][label]:,}",
                        f"{found['images']['test']['by_class'][label]:,}",
                        *(_mean(each["figures"][key]) for each in (before, after)),
                        _told_or_dash(gain),
                        *(
                            _mean(each["figures"].get(f"specificity/{label}"))
                            for each in (before, after)
                        ),
                    ]
                )
        heads = [
            *("class", "training images", "test images"),
            *("sensitivity, real alone", f"with {headline['ratio']:g} x synthetic", "gain"),
            *("specificity, real alone", f"with {headline['ratio']:g} x synthetic "),
        ]
        tables.append((f"Classes{_of(found, headline)}", heads, rows))
    return tables


def _hospital_tables(found: Mapping[str, Any]) -> list[StudyTable]:
    """Set the balanced accuracy on each hospital's own test images before and after."""
    if not found["hospitals"]:
        return []
    tables: list[StudyTable] = []
    for headline in found["headlines"]:
        _, after = arms_of(found, headline)
        rows = [
            [hospital, f"{number:,}", _told_or_dash(after["gains"].get(f"hospital/{hospital}"))]
            for hospital, number in found["hospitals"].items()
        ]
        heads = ["hospital", "its test images", "gain in balanced accuracy"]
        tables.append((f"Hospitals{_of(found, headline)}", heads, rows))
    return tables


def _alone_table(found: Mapping[str, Any]) -> StudyTable:
    """Set what each hospital gets by itself beside what it gets of others."""
    several = len(found["headlines"]) > 1
    titles = {
        "own": "own images",
        "own_both": "own + generated",
        "synthetic": "generated alone",
        "real": "real ones of all",
        RUN: "trained by run",
    }

    def title(of: Mapping[str, Any]) -> str:
        named = of["source"] and (several or of["kind"] == RUN)
        return titles[of["kind"]] + (f" {of['source']}" if named else "")

    rows = []
    for each in found["at_hospitals"]:
        cells = [
            _mean(of["balanced_accuracy"])
            + (f"; {told_gain(of['gain_over_own'])}" if "gain_over_own" in of else "")
            for of in each["classifiers"]
        ]
        rows.append(
            [
                str(each["hospital"]),
                *(f"{each[f'num_{of}']:,}" for of in ("train", "test", "test_patients")),
                *cells,
            ]
        )
    heads = ["hospital", "its training images", "its test images", "of patients"]
    heads += map(title, found["at_hospitals"][0]["classifiers"])
    return "Alone and together", heads, rows


def arms_of(
    found: Mapping[str, Any], headline: Mapping[str, Any]
) -> tuple[Mapping[str, Any], Mapping[str, Any]]:
    """Find the arms that a headline compares: real images alone, and with generated ones."""
    at = [row for row in found["arms"] if row["fraction"] == headline["fraction"]]
    (before,) = [row for row in at if row["kind"] == "real"]
    (after,) = [
        row
        for row in at
        if (row["kind"], row["source"], row["ratio"])
        == ("both", headline["source"], headline["ratio"])
    ]
    return before, after


def _of(found: Mapping[str, Any], headline: Mapping[str, Any]) -> str:
    return f" with images of {headline['source']}" if len(found["headlines"]) > 1 else ""


def told_gain(gain: Mapping[str, float]) -> str:
    """Write a gain with its interval."""
    return f"{gain['value']:+.3f} ({gain['low']:+.3f} to {gain['high']:+.3f})"


def _quantity(number: int, what: str) -> str:
    return f"{number} {what}{'s' * (number > 1)}"


def _told_or_dash(gain: Mapping[str, float] | None) -> str:
    return "-" if gain is None else told_gain(gain)


def _mean(figure: Mapping[str, float | None] | None) -> str:
    if figure is None:
        return "-"
    return f"{figure['mean']:.3f}" + ("" if figure["std"] is None else f" ± {figure['std']:.3f}")


def _count(numbers: Sequence[int]) -> str:
    least, most = min(numbers), max(numbers)
    return f"{least:,}" if least == most else f"{least:,} to {most:,}"
