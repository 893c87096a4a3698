"""The distance of each remedy of a comparison over what it sends."""

import math
from collections.abc import Callable, Iterable, Sequence
from itertools import cycle
from pathlib import Path

from matplotlib.figure import Figure

from task.reporting.charts import COLORS, GRAY
from task.reporting.figures import Picture
from task.reporting.generator_tables import DISTANCE, SENT
from task.reporting.remedy_tables import CENTRALIZED, FEDAVG, RemedyGroup, row_scores
from task.reporting.study_figure import DPI, save_figure
from task.reporting.tables import Cell

# With six colors, 42 points that can be told apart, by their shapes alone as well.
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
# Inches of a line of the legend, and the characters of a name that has another beside it.
LEGEND_LINE, LONGEST_OF_TWO = 0.19, 60
# The width of a point, of the largest value.
POINT = 0.02


def draw_remedies(
    groups: Sequence[RemedyGroup], folder: Path, *, say: Callable[[str], object]
) -> list[Picture]:
    """Draw FD over the megabytes sent in all rounds, a point for each remedy.

    Args:
        groups: one picture each.
        folder: in which the pictures come, as figures/remedies-<number>.png.
        say: is told in a line which remedies a picture lacks.
    """
    (folder / "figures").mkdir(parents=True, exist_ok=True)
    pictures = []
    for number, group in enumerate(groups, 1):
        file = Path("figures") / f"remedies-{number}.png"
        scores = {label: row_scores(members) for label, members in group.rows.items()}
        distances = {label: row[DISTANCE] for label, row in scores.items() if DISTANCE in row}
        sent = {label: row[SENT] for label, row in scores.items() if SENT in row}
        points = [
            (label, sent[label], distance) for label, distance in distances.items() if label in sent
        ]
        lacking = [each for each in group.rows if each not in sent or each not in distances]
        if told := ", ".join(each for each in lacking if each != CENTRALIZED):
            say(f"{file} lacks {told}: {DISTANCE.title} or the bytes sent are not known")
        if len(points) > 1:
            levels = [
                (each, distances[each]) for each in (FEDAVG, CENTRALIZED) if each in distances
            ]
            _save_points(points, levels, folder / file)
            pictures.append(_remedy_picture(group, file))
    return pictures


def _save_points(
    points: Sequence[tuple[str, Cell, Cell]], levels: Iterable[tuple[str, Cell]], file: Path
) -> None:
    names = [label for label, *_ in points]
    columns = 2 if max(map(len, names)) <= LONGEST_OF_TWO else 1
    lines = math.ceil((len(names) + 2) / columns)
    figure = Figure(figsize=(8.4, 4.2 + LEGEND_LINE * lines), dpi=DPI, layout="constrained")
    panel = figure.subplots()
    places = side_by_side([sent.mean for _, sent, _ in points])
    for (label, _, distance), place, color, marker in zip(
        points, places, cycle(COLORS), cycle(MARKERS), strict=False
    ):
        panel.errorbar(
            place,
            distance.mean,
            yerr=distance.std,
            fmt=marker,
            capsize=3,
            color=color,
            label=label,
        )
    for (label, distance), style in zip(levels, ("--", ":"), strict=False):
        panel.axhline(distance.mean, linestyle=style, color=GRAY, label=f"level of {label}")
    panel.set_xlim(left=0)
    panel.set_xlabel(f"{SENT.title}, all rounds")
    panel.set_ylabel(DISTANCE.title)
    figure.legend(fontsize=8, loc="outside lower left", ncols=columns)
    save_figure(figure, file)


def side_by_side(values: Sequence[float]) -> list[float]:
    """Move values that are nearly equal apart, in their order, so that their points are seen.

    Args:
        values: 0 or more each.
    """
    step = POINT * max(values)
    places = []
    for number, value in enumerate(values):
        near = [each for each, other in enumerate(values) if abs(other - value) <= step]
        places.append(value + step * (near.index(number) - (len(near) - 1) / 2))
    return places


def _remedy_picture(group: RemedyGroup, file: Path) -> Picture:
    return Picture(
        file,
        f"Remedies: {group.label}",
        f"{DISTANCE.title} over the megabytes of weights that were sent in all rounds: less of "
        "both is better. Points of equal traffic stand side by side. Bars: the standard deviation "
        f"over seeds. {group.scale}.",
    )
