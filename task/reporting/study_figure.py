"""The two figures of a study: the gain by ratio, and each class before and after."""

from collections.abc import Mapping
from itertools import cycle
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from task.evaluation.study.summary import PRIMARY
from task.files import atomic_path
from task.reporting.charts import COLORS, GRAY
from task.reporting.study_tables import RUN, arms_of

GAIN_FILE, CLASSES_FILE = "gain.png", "classes.png"
DPI = 120
# Bars of one place, in its unit.
BAR = 0.38


def draw_gains(found: Mapping[str, Any], folder: Path) -> None:
    """Draw the gain in macro AUC over real images alone by ratio, a panel for each fraction."""
    fractions = sorted({row["fraction"] for row in found["arms"]}, reverse=True)
    figure = Figure(figsize=(1 + 3.4 * len(fractions), 3.6), dpi=DPI, layout="constrained")
    panels = figure.subplots(1, len(fractions), squeeze=False, sharey=True)[0]
    for panel, fraction in zip(panels, fractions, strict=True):
        at = [row for row in found["arms"] if row["fraction"] == fraction]
        for number, headline in enumerate(found["headlines"]):
            arms = [
                row for row in at if (row["kind"], row["source"]) == ("both", headline["source"])
            ]
            gains = [row["gains"][PRIMARY] for row in arms]
            places = np.arange(len(arms)) + 0.15 * (number - (len(found["headlines"]) - 1) / 2)
            values = np.array([gain["value"] for gain in gains])
            ends = np.array([[gain["low"], gain["high"]] for gain in gains]).T
            panel.errorbar(
                places,
                values,
                yerr=np.abs(ends - values),
                fmt="o-",
                capsize=3,
                color=COLORS[number % len(COLORS)],
                label=headline["source"],
            )
            panel.set_xticks(np.arange(len(arms)), [f"{row['ratio']:g}" for row in arms])
        for kind, style in (("augmented", "--"), ("oversampled", ":")):
            (control,) = [row for row in at if row["kind"] == kind]
            value = control["gains"][PRIMARY]["value"]
            panel.axhline(value, linestyle=style, color=GRAY, label=control["title"])
        of_runs = [row for row in at if row["kind"] == RUN]
        for row, color in zip(of_runs, cycle(reversed(COLORS)), strict=False):
            value = row["gains"][PRIMARY]["value"]
            panel.axhline(value, linestyle="-.", color=color, label=row["title"])
        panel.axhline(0, color="black", linewidth=0.8)
        panel.set_title(f"{fraction:.0%} of the real images", fontsize=10)
        panel.set_xlabel("generated images for each real one")
    panels[0].set_ylabel("gain in macro AUC\nover real images alone")
    # Of the largest fraction, which alone has lines of runs.
    handles, labels = panels[0].get_legend_handles_labels()
    panels[-1].legend(handles, labels, fontsize=8, loc="upper left", bbox_to_anchor=(1, 1))
    save_figure(figure, folder / GAIN_FILE)


def draw_classes(found: Mapping[str, Any], folder: Path) -> None:
    """Draw the sensitivity of each class with real images alone and with generated ones."""
    headlines, classes = found["headlines"], found["classes"]
    size = (max(5.0, 1 + 0.8 * len(classes)), 0.6 + 2.8 * len(headlines))
    figure = Figure(figsize=size, dpi=DPI, layout="constrained")
    panels = figure.subplots(len(headlines), 1, squeeze=False, sharex=True)[:, 0]
    for panel, headline in zip(panels, headlines, strict=True):
        pair = arms_of(found, headline)
        titles = "real alone", f"with {headline['ratio']:g} x synthetic"
        there = [
            label for label in range(len(classes)) if f"sensitivity/{label}" in pair[0]["figures"]
        ]
        for place, (arm, title) in enumerate(zip(pair, titles, strict=True)):
            figures = [arm["figures"][f"sensitivity/{label}"] for label in there]
            panel.bar(
                np.arange(len(there)) + BAR * (place - 0.5),
                [each["mean"] for each in figures],
                BAR,
                yerr=[each["std"] or 0.0 for each in figures],
                capsize=3,
                color=COLORS[place],
                label=title,
            )
        counts = found["images"]["test"]["by_class"]
        names = [f"{classes[label]}\n(n={counts[label]})" for label in there]
        panel.set_xticks(np.arange(len(there)), names, fontsize=8)
        panel.set_ylim(0, 1.05)
        panel.set_ylabel("sensitivity")
        panel.set_title(headline["source"], fontsize=10)
        panel.legend(fontsize=8, loc="upper left", bbox_to_anchor=(1, 1))
    save_figure(figure, folder / CLASSES_FILE)


def save_figure(figure: Figure, file: Path) -> None:
    """Write a figure as a PNG file, whole or not at all."""
    FigureCanvasAgg(figure)
    with atomic_path(file) as aside:
        figure.savefig(aside, format="png")
