"""The charts of a report, as specifications of Vega-Lite in colours that all readers can tell.

Every chart is drawn in a browser from the values that it holds. A chart is a specification with
the sentence that says what is seen, for those who do not see it.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import count
from typing import Any

import altair as alt

from task.reporting.history import POOLED, RunHistory
from task.reporting.metric_table import Figure, figures
from task.runs.records import TEST, TRAIN, Series

# Told apart by readers without red, green or blue, at a contrast of 4.5 or more on white.
COLOURS = ("#0072b2", "#b84300", "#007a5a", "#9a3f78", "#5b5b5b", "#7a6100")
GREY, FAINT, INK = "#8c8c8c", "#d9dde2", "#1a1a1a"
STATES = {"trained": COLOURS[0], "left out": COLOURS[1], "not there": "#f0c9b4", "not asked": FAINT}

# Of a round, as the server's clock divides it, in the order in which they are stacked.
PHASES = {
    "training": COLOURS[0],
    "waiting": COLOURS[1],
    "sending": COLOURS[2],
    "aggregating": COLOURS[3],
    "checkpoint": COLOURS[5],
    "evaluating": COLOURS[4],
}

HEIGHT = 260
ROW = 22
# Of a map in a row: more rounds cannot be told apart, and make a page large.
MOST_CELLS = 60
# So that a point at the edge of a chart is whole, in pixels.
EDGE = 6
# So that the names and the legend of 50 clients fit on a screen.
CROWDED = 25
CROWDED_ROW = 12

# Labels of an axis of rounds, which have room on a phone.
MOST_TICKS = 8

CONFIG: dict[str, Any] = {
    # That of the page, which inverts the lightness of charts where the reader's screen is dark.
    "background": "transparent",
    "font": "system-ui, sans-serif",
    "view": {"stroke": None},
    "axis": {
        "labelColor": INK,
        "titleColor": INK,
        "labelFontSize": 12,
        "titleFontSize": 12,
        "titleFontWeight": "normal",
        "gridColor": "#e6e8eb",
        "domainColor": "#6b6b6b",
        "tickColor": "#6b6b6b",
    },
    "legend": {
        "orient": "top",
        "title": None,
        "labelColor": INK,
        "labelFontSize": 12,
        "labelLimit": 0,
        "columns": 3,
    },
}


@dataclass(frozen=True)
class Drawing:
    """A chart of a page.

    Attributes:
        title: above it.
        says: what is seen.
        spec: of Vega-Lite.
        narrow: whether it is one of several side by side.
    """

    title: str
    says: str
    spec: dict[str, Any]
    narrow: bool = False


def loss_chart(history: RunHistory) -> Drawing | None:
    """Draw the training loss of every client and of all, and the test loss, by round."""
    shared = {
        f"{reference} loss": series
        for reference in (TRAIN, TEST)
        if (series := history.records.series("loss", reference=reference))
    }
    if not shared:
        return None
    clients = history.records.of_clients("loss", reference=TRAIN)
    ends = "; ".join(f"{title} {_span(series)}" for title, series in shared.items())
    domain = _domain(*clients.values(), *shared.values())
    layers = _client_layers(clients, "loss", domain)
    layers.append(_named_lines(shared, "loss", domain=domain))
    return Drawing(
        "Loss by round",
        f"Lines of the global model: {ends}."
        + (f" Grey lines: train loss of {len(clients)} clients." if clients else ""),
        _spec(alt.layer(*layers)),
    )


def update_chart(history: RunHistory) -> Drawing | None:
    """Draw how far the weights of each client moved in each round."""
    clients = history.records.of_clients("update_norm")
    if not clients:
        return None
    values = [value for series in clients.values() for value in series.values()]
    return Drawing(
        "How far each client moved the weights",
        f"Grey lines of {len(clients)} clients: L2 norm of the update, between "
        f"{min(values):.3g} and {max(values):.3g}.",
        _spec(alt.layer(*_client_layers(clients, "update norm (L2)", _domain(*clients.values())))),
    )


def time_chart(history: RunHistory) -> Drawing | None:
    """Draw the seconds of every round, phase by phase."""
    found = _phases(history)
    phases = [name for name in PHASES if found.get(name)]
    if not phases:
        return None
    rows = [
        {"round": number, "phase": name, "seconds": seconds, "order": phases.index(name)}
        for name in phases
        for number, seconds in found[name].items()
    ]
    chosen = alt.selection_point(fields=["phase"], bind="legend")
    chart = (
        _chart(rows)
        .mark_bar()
        .encode(
            x=_round_axis(rows, kind="O"),
            y=alt.Y("seconds:Q", title="time (s)"),
            color=alt.Color(
                "phase:N", scale=alt.Scale(domain=phases, range=[PHASES[name] for name in phases])
            ),
            order=alt.Order("order:Q"),
            opacity=alt.when(chosen).then(alt.value(1)).otherwise(alt.value(0.15)),
            tooltip=["round:Q", "phase:N", alt.Tooltip("seconds:Q", format=".2f")],
        )
        .add_params(chosen)
    )
    spent = ", ".join(f"{name} {sum(found[name].values()):,.0f} s" for name in phases)
    says = f"A bar per round, stacked of {spent}."
    if "waiting" in phases:
        says += " While the server waits, nobody trains: nodes start, fetch and send."
    return Drawing("Time of each round", says, _spec(chart))


def _phases(history: RunHistory) -> dict[str, Series]:
    """Return the seconds of each phase; of waiting only those in which no client trained."""
    found = {name: history.records.series(f"seconds_{name}") for name in PHASES}
    if epochs := history.records.series("seconds_epochs"):
        return found | {"training": epochs}
    waited, trained = found["waiting"], found["training"]
    trained = {number: min(trained.get(number, 0.0), spent) for number, spent in waited.items()}
    idle = {number: spent - trained[number] for number, spent in waited.items()}
    return found | {"training": trained, "waiting": idle}


def overhead_chart(history: RunHistory) -> Drawing | None:
    """Draw the share of every round in which no client trained."""
    series = history.records.series("overhead_share")
    if not series:
        return None
    named = {"outside training": series}
    line = _named_lines(named, "share of the round", percent=True, domain=[0.0, 1.0])
    return Drawing(
        "Time outside training",
        f"A line: the share of each round in which nobody trained, {_span(series, percent=True)}.",
        _spec(line),
    )


def metric_charts(runs: Mapping[str, RunHistory], of: str = "") -> list[Drawing]:
    """Draw each metric that was recorded in several rounds, with its floor of real images.

    Args:
        runs: by label; several are compared.
        of: what follows the titles.
    """
    drawings = []
    for figure in figures():
        title = figure.heading + of
        lines = _lines(runs, figure)
        if not any(len(series) > 1 for series in lines.values()):
            continue
        says = "; ".join(f"{label} {_span(series)}" for label, series in lines.items())
        floors = _lines(runs, figure, real=True)
        if floors:
            ends = "; ".join(f"{label} {_span(series)}" for label, series in floors.items())
            says += f". Dashed, of real images: {ends}"
        chart = _named_lines(lines, title, floors=floors)
        drawings.append(Drawing(title, f"Lines by round: {says}.", _spec(chart), True))
    return drawings


def _lines(
    runs: Mapping[str, RunHistory], figure: Figure, *, real: bool = False
) -> dict[str, Series]:
    """Return the values of a metric by run and round, of the runs that have some."""
    metric, reference = figure
    found = {
        label: run.records.series(metric, reference=reference, real=real)
        for label, run in runs.items()
    }
    return {label: series for label, series in found.items() if series}


def participation_chart(history: RunHistory) -> Drawing | None:
    """Draw a map of which client trained in which round."""
    states = history.participation()
    if not states:
        return None
    reasons = {
        (each.round, each.client): str(each.context["reason"])
        for each in history.records.left_out
        if each.context["activity"] == "train"
    }
    rows = _stretches(states, reasons, join=history.rounds_done > MOST_CELLS)
    seen = [state for state in STATES if state in states.values()]
    chart = (
        _chart(rows)
        .mark_rect(stroke="#ffffff", strokeWidth=0.5)
        .encode(
            x=alt.X(
                "begin:Q",
                title="round",
                scale=alt.Scale(domain=[0.5, history.rounds_done + 0.5], nice=False),
                axis=_ticks(1, history.rounds_done, grid=False),
            ),
            x2="end:Q",
            y=_client_axis(),
            color=alt.Color(
                "state:N", scale=alt.Scale(domain=seen, range=[STATES[name] for name in seen])
            ),
            tooltip=["client:N", "rounds:N", "state:N", "reason:N"],
        )
        .properties(height=_height(len(history.clients)))
    )
    tally = ", ".join(f"{state} {[*states.values()].count(state)} times" for state in seen)
    return Drawing(
        "Who trained in which round",
        f"A row per client, a column per round: {tally}.",
        _spec(chart),
    )


def class_chart(history: RunHistory) -> Drawing | None:
    """Draw a map of the training images of each class at each client."""
    known = {who: counts for who, counts in history.class_counts.items() if counts is not None}
    if not known:
        return None
    rows: list[dict[str, Any]] = [
        {"client": "all" if who == POOLED else str(who), "class": name, "images": number}
        for who, counts in known.items()
        for name, number in zip(history.config.data.classes, counts, strict=True)
    ]
    largest = max(row["images"] for row in rows)
    base = _chart(rows).encode(
        x=alt.X(
            "class:N",
            sort=None,
            title="class",
            axis=alt.Axis(labelAngle=0 if _short(history) else -45, labelLimit=120),
        ),
        y=_client_axis(),
    )
    cells = base.mark_rect(stroke="#ffffff").encode(
        color=alt.Color(
            "images:Q", scale=alt.Scale(range=["#f3f7fb", "#08427a"], domain=[0, largest])
        ),
        tooltip=["client:N", "class:N", "images:Q"],
    )
    dark = alt.datum.images > largest * 0.5
    numbers = base.mark_text(fontSize=10).encode(
        text="images:Q",
        color=alt.when(dark).then(alt.value("#ffffff")).otherwise(alt.value(INK)),
    )
    who = "the pooled data" if POOLED in known else f"{len(known)} clients"
    return Drawing(
        "Training images of each class",
        f"A cell per class of {who}: between {min(row['images'] for row in rows):,} and "
        f"{largest:,} images.",
        _spec(alt.layer(cells, numbers).properties(height=_height(len(known)))),
    )


def compared_chart(runs: Mapping[str, RunHistory], figure: Figure, title: str) -> Drawing | None:
    """Draw a global value of several runs by round."""
    lines = _lines(runs, figure)
    if not lines:
        return None
    says = "; ".join(f"{label} {_span(series)}" for label, series in lines.items())
    return Drawing(
        f"{title} by round", f"A line per run: {says}.", _spec(_named_lines(lines, title))
    )


def _chart(rows: Sequence[Mapping[str, Any]]) -> alt.Chart:
    return alt.Chart(alt.Data(values=rows))  # type: ignore[no-untyped-call]


def _spec(chart: Any) -> dict[str, Any]:
    if "height" not in chart.to_dict(validate=False):
        chart = chart.properties(height=HEIGHT)
    spec: dict[str, Any] = chart.properties(width="container").to_dict()
    return spec


def _scale(names: Sequence[str]) -> alt.Scale:
    colours = [COLOURS[number % len(COLOURS)] for number in range(len(names))]
    return alt.Scale(domain=list(names), range=colours)


def _height(num_rows: int) -> int:
    return max(2, num_rows) * (ROW if num_rows <= CROWDED else CROWDED_ROW)


def _short(history: RunHistory) -> bool:
    return sum(map(len, history.config.data.classes)) <= 30


def _client_axis() -> alt.Y:
    return alt.Y(
        "client:O", title="client", sort=None, axis=alt.Axis(labelOverlap=True, grid=False)
    )


def _round_axis(rows: Sequence[Mapping[str, Any]], *, kind: str = "Q") -> alt.X:
    if kind == "O":
        return alt.X("round:O", title="round", axis=alt.Axis(labelAngle=0, labelOverlap=True))
    numbers = [row["round"] for row in rows]
    return alt.X(
        "round:Q",
        title="round",
        scale=alt.Scale(
            domain=[min(numbers), max(numbers) + (min(numbers) == max(numbers))],
            nice=False,
            padding=EDGE,
        ),
        axis=_ticks(min(numbers), max(numbers)),
    )


def _ticks(first: int, last: int, **style: Any) -> alt.Axis:
    """Label whole rounds alone: what a library chooses by itself lies between few rounds too."""
    return alt.Axis(values=whole_ticks(first, last), format="d", labelOverlap=True, **style)


def whole_ticks(first: int, last: int) -> list[int]:
    """Choose at most `MOST_TICKS` whole numbers from `first` to `last`, in steps of 1, 2, 5, 10."""
    steps = (digit * 10**power for power in count() for digit in (1, 2, 5))
    step = next(step for step in steps if last // step - (first - 1) // step <= MOST_TICKS)
    return [number for number in range(first, last + 1) if number % step == 0]


def _named_lines(
    lines: Mapping[str, Series],
    title: str,
    *,
    percent: bool = False,
    domain: list[float] | None = None,
    floors: Mapping[str, Series] | None = None,
) -> Any:
    """Draw a line per name, with a point where a value was recorded; a legend where several.

    Floors are dashed lines in the colour of the line of the same name.
    """
    kinds = {"generated images": lines, "real images": floors or {}}
    rows = [
        {"line": label, "of": kind, "round": number, "value": value}
        for kind, named in kinds.items()
        for label, series in named.items()
        for number, value in series.items()
    ]
    chosen = alt.selection_point(fields=["line"], bind="legend")
    legend = alt.Legend() if len(lines) > 1 else None
    base = _chart(rows).encode(
        x=_round_axis(rows),
        y=alt.Y(
            "value:Q",
            title=title,
            scale=alt.Scale(zero=False, padding=EDGE)
            if domain is None
            else alt.Scale(domain=domain, padding=EDGE),
            axis=alt.Axis(format=".0%") if percent else alt.Axis(),
        ),
        color=alt.Color("line:N", scale=_scale(list(lines)), legend=legend),
        opacity=alt.when(chosen).then(alt.value(1)).otherwise(alt.value(0.15)),
        tooltip=[
            "line:N",
            *["of:N"] * bool(floors),
            "round:Q",
            alt.Tooltip("value:Q", title=title, format=".1%" if percent else ".4g"),
        ],
    )
    stroked = base.mark_line(strokeWidth=2.5).encode(
        strokeDash=alt.StrokeDash(
            "of:N",
            scale=alt.Scale(domain=list(kinds), range=[[1, 0], [5, 4]]),
            legend=alt.Legend(symbolType="stroke", symbolStrokeWidth=2) if floors else None,
        )
    )
    points = base.mark_point(filled=True, size=40).add_params(chosen)
    return alt.layer(stroked, points)


def _client_layers(clients: Mapping[int, Series], title: str, domain: list[float]) -> list[Any]:
    """Draw grey lines, of which the one under the pointer, or the chosen one, stands out."""
    if not clients:
        return []
    rows = [
        {"client": str(client), "round": number, "value": value}
        for client, series in clients.items()
        for number, value in series.items()
    ]
    # Selections need names of their own where a page has several of them.
    menu = alt.binding_select(
        options=[None, *map(str, clients)],
        labels=["none", *(f"client {client}" for client in clients)],
        name="Highlighted: ",
    )
    chosen = alt.selection_point(
        name="highlighted",
        fields=["client"],
        bind=menu,
        on="pointerover",
        clear="dblclick",
        empty=False,
    )
    base = _chart(rows).encode(
        x=_round_axis(rows),
        y=alt.Y("value:Q", title=title, scale=alt.Scale(domain=domain, padding=EDGE)),
        detail="client:N",
    )
    lines = (
        base.mark_line(interpolate="linear")
        .encode(
            color=alt.when(chosen).then(alt.value(INK)).otherwise(alt.value(GREY)),
            opacity=alt.when(chosen).then(alt.value(1)).otherwise(alt.value(0.45)),
            strokeWidth=alt.when(chosen).then(alt.value(3)).otherwise(alt.value(1.5)),
            tooltip=[alt.Tooltip("client:N")],
        )
        .add_params(chosen)
    )
    points = (
        base.transform_filter(chosen)
        .mark_point(filled=True, size=45, color=INK)
        .encode(tooltip=["client:N", "round:Q", alt.Tooltip("value:Q", title=title, format=".4g")])
    )
    return [lines, points]


def _domain(*lines: Series) -> list[float]:
    """Return the least and the largest value, which no chosen line must change."""
    values = [value for series in lines for value in series.values()]
    return [min(values), max(values)]


def _stretches(
    states: Mapping[tuple[int, int], str],
    reasons: Mapping[tuple[int, int | None], str],
    *,
    join: bool,
) -> list[dict[str, Any]]:
    """List the cells of a map; rounds in which a client's state was the same may be joined."""
    rows: list[dict[str, Any]] = []
    for number, client in sorted(states, key=lambda key: (key[1], key[0])):
        state = states[number, client]
        reason = reasons.get((number, client), "-")
        last = rows[-1] if rows else {}
        alike = [last.get(key) for key in ("client", "state", "reason")] == [client, state, reason]
        if join and alike:
            last["end"] = number + 0.5
            last["rounds"] = f"{last['begin'] + 0.5:.0f} to {number}"
            continue
        rows.append(
            {
                "client": client,
                "state": state,
                "reason": reason,
                "begin": number - 0.5,
                "end": number + 0.5,
                "rounds": str(number),
            }
        )
    return rows


def _span(series: Series, *, percent: bool = False) -> str:
    first, last = (series[number] for number in (min(series), max(series)))
    form = ".0%" if percent else ".4g"
    if len(series) == 1:
        return f"{first:{form}} in round {min(series)}"
    return f"from {first:{form}} in round {min(series)} to {last:{form}} in round {max(series)}"
