"""What a study found, as tables for pages: the arms, the classes, the hospitals."""

from collections.abc import Mapping, Sequence
from typing import Any

from task.evaluation.study.arms import ArmKind
from task.evaluation.study.figures import TITLES
from task.evaluation.study.summary import PRIMARY

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
        f"{found['num_seeds']} classifiers each; the loss or the batches even out the classes by "
        f"study.balance={found['balance']}, but in the control, which oversamples them."
    )
    resampled = "images" if images["test"]["patients"] is None else "patients"
    told.append(
        "Gains: over real images of the same fraction, alone or oversampled; intervals at 95% over "
        f"{found['num_bootstraps']:,} draws of test {resampled}, and by Student's t over the "
        "classifiers; p values of the macro AUC by Holm's correction over all comparisons."
    )
    if found["at_hospitals"]:
        told.append(
            "Alone and together: balanced accuracy on each hospital's own test images, and the "
            "gain over its own images alone with its interval, not corrected for their number. "
            "Generated images are as many as the real ones of all hospitals; their generator has "
            "been trained on this hospital's images too, which one that stays out would not give. "
            "The validation images of all choose among weights here as well."
        )
    if any(row["kind"] == RUN for row in found["arms"]):
        told.append(
            "Classifiers of runs were trained in those runs, by their steps and their loss, and no "
            "validation images chose among their weights."
        )
    if any(row["fraction"] < 1 for row in found["arms"]):
        told.append(
            "At a fraction below 1 the generator has been trained on real images that the "
            "classifier is not given: a gain there may be theirs."
        )
    return told


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
                *([row["source"] or "-"] if several else []),
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
                        "-" if gain is None else told_gain(gain),
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
            [hospital, f"{number:,}", told_gain(gain)]
            for hospital, number in found["hospitals"].items()
            if (gain := after["gains"].get(f"hospital/{hospital}"))
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
            [str(each["hospital"]), f"{each['num_train']:,}", f"{each['num_test']:,}", *cells]
        )
    heads = ["hospital", "its training images", "its test images"]
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


def _mean(figure: Mapping[str, float | None] | None) -> str:
    if figure is None:
        return "-"
    return f"{figure['mean']:.3f}" + ("" if figure["std"] is None else f" ± {figure['std']:.3f}")


def _count(numbers: Sequence[int]) -> str:
    least, most = min(numbers), max(numbers)
    return f"{least:,}" if least == most else f"{least:,} to {most:,}"
