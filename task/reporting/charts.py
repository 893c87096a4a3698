"""The charts of a report, as specifications of Vega-Lite in colors that all readers can tell.

Every chart is drawn in a browser from the values that it holds. A chart is a specification with
the sentence that says what is seen, for those who do not see it.
"""

from collections.abc import Iterable, Mapping, Sequence
from itertools import count
from typing import Any, NamedTuple

import altair as alt

from task.audit.records import auc_by_round, audited_rounds
from task.reporting.metric_table import Quantity, quantities
from task.runs.records import TEST, TRAIN, Series
from task.runs.run import POOLED, Run

# Told apart by readers without red, green or blue, at a contrast of 4.5 or more on white.
COLORS = ("#0072b2", "#b84300", "#007a5a", "#9a3f78", "#5b5b5b", "#7a6100")
GRAY, FAINT, INK = "#8c8c8c", "#d9dde2", "#1a1a1a"
STATES = {"trained": COLORS[0], "left out": COLORS[1], "not there": "#f0c9b4", "not asked": FAINT}

# Of a round, as the server's clock divides it, in the order in which they are stacked.
PHASES = {
    "training": COLORS[0],
    "waiting": COLORS[1],
    "sending": COLORS[2],
    "aggregating": COLORS[3],
    "checkpoint": COLORS[5],
    "evaluating": COLORS[4],
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


class Drawing(NamedTuple):
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


def course_charts(run: Run) -> list[Drawing]:
    """Draw losses, updates and times by round."""
    return [*_loss_of_all(run), *_updates(run), *_phase_times(run), *_overhead(run)]


def _loss_of_all(run: Run) -> list[Drawing]:
    """Draw the training loss of every client and of all, and the test loss."""
    shared = {
        f"{reference} loss": series
        for reference in (TRAIN, TEST)
        if (series := run.records.series("loss", reference=reference))
    }
    if not shared:
        return []
    clients = run.records.of_clients("loss", reference=TRAIN)
    says = f"Lines of the global model: {_spans(shared)}."
    says += f" Gray lines: train loss of {len(clients)} clients." if clients else ""
    domain = _extent(v for series in (*clients.values(), *shared.values()) for v in series.values())
    layers = [*_client_lines(clients, "loss", domain), _named_lines(shared, "loss", domain=domain)]
    return [Drawing("Loss by round", says, _spec(alt.layer(*layers)))]


def _updates(run: Run) -> list[Drawing]:
    """Draw how far the weights of each client moved in each round."""
    clients = run.records.of_clients("update_norm")
    if not clients:
        return []
    least, largest = _extent(value for series in clients.values() for value in series.values())
    says = (
        f"Gray lines of {len(clients)} clients: L2 norm of the update, between "
        f"{least:.3g} and {largest:.3g}."
    )
    layers = _client_lines(clients, "update norm (L2)", [least, largest])
    return [Drawing("How far each client moved the weights", says, _spec(alt.layer(*layers)))]


def _phase_times(run: Run) -> list[Drawing]:
    """Draw the seconds of every round, phase by phase."""
    found = _phases(run)
    phases = [name for name in PHASES if found.get(name)]
    if not phases:
        return []
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
            x=alt.X("round:O", title="round", axis=alt.Axis(labelAngle=0, labelOverlap=True)),
            y=alt.Y("seconds:Q", title="time (s)"),
            color=_colors("phase", {name: PHASES[name] for name in phases}),
            order=alt.Order("order:Q"),
            opacity=_if_else(chosen, 1, 0.15),
            tooltip=["round:Q", "phase:N", alt.Tooltip("seconds:Q", format=".2f")],
        )
        .add_params(chosen)
    )
    spent = ", ".join(f"{name} {sum(found[name].values()):,.0f} s" for name in phases)
    says = f"A bar per round, stacked of {spent}."
    if "waiting" in phases:
        says += " While the server waits, nobody trains: nodes start, fetch and send."
    return [Drawing("Time of each round", says, _spec(chart))]


def _phases(run: Run) -> dict[str, Series]:
    """Return the seconds of each phase; of waiting only those in which no client trained."""
    found = {name: run.records.series(f"seconds_{name}") for name in PHASES}
    if epochs := run.records.series("seconds_epochs"):
        return found | {"training": epochs}
    waited, trained = found["waiting"], found["training"]
    trained = {number: min(trained.get(number, 0.0), spent) for number, spent in waited.items()}
    idle = {number: spent - trained[number] for number, spent in waited.items()}
    return found | {"training": trained, "waiting": idle}


def _overhead(run: Run) -> list[Drawing]:
    """Draw the share of every round in which no client trained."""
    series = run.records.series("overhead_share")
    if not series:
        return []
    says = (
        f"A line: the share of each round in which nobody trained, {_span(series, percent=True)}."
    )
    line = _named_lines(
        {"outside training": series}, "share of the round", domain=[0, 1], percent=True
    )
    return [Drawing("Time outside training", says, _spec(line))]


def audit_charts(run: Run) -> list[Drawing]:
    """Draw how well training images were told from others, where several rounds were audited.

    Of the attacks those that tell best after the last of them, as many as there are colors.
    """
    aucs = auc_by_round(run.records)
    if len(audited_rounds(run.records)) < 2 or not aucs:
        return []
    best = sorted(aucs, key=lambda name: (-aucs[name][max(aucs[name])], name))[: len(COLORS)]
    lines = {name: aucs[name] for name in best}
    says = f"A line per attack, 0.5 is guessing: {_spans(lines)}."
    spec = _spec(_named_lines(lines, "AUC", domain=[0, 1]))
    return [Drawing("How well attacks tell training images, by round", says, spec)]


def loss_charts(runs: Mapping[str, Run], of: str) -> list[Drawing]:
    """Draw the losses of several runs by round.

    Args:
        runs: by label.
        of: what stands behind the name of a loss.
    """
    drawings = []
    for reference in (TRAIN, TEST):
        lines, title = _series(runs, Quantity("loss", reference)), f"{reference} loss{of}"
        if lines:
            says = f"A line per run: {_spans(lines)}."
            drawings.append(Drawing(f"{title} by round", says, _spec(_named_lines(lines, title))))
    return drawings


def _series(
    runs: Mapping[str, Run], quantity: Quantity, *, real: bool = False
) -> dict[str, Series]:
    """Return the values of a metric by run and round, of the runs that have some."""
    found = {
        label: run.records.series(quantity.name, reference=quantity.reference, real=real)
        for label, run in runs.items()
    }
    return {label: series for label, series in found.items() if series}


def metric_charts(runs: Mapping[str, Run], of: str = "") -> list[Drawing]:
    """Draw each metric that was recorded in several rounds, with its floor of real images.

    Args:
        runs: by label; several are compared.
        of: what follows the titles.
    """
    drawings = []
    for quantity in quantities():
        lines, title = _series(runs, quantity), quantity.heading + of
        if not any(len(series) > 1 for series in lines.values()):
            continue
        floors = _series(runs, quantity, real=True)
        says = f"Lines by round: {_spans(lines)}"
        says += f". Dashed, of real images: {_spans(floors)}" if floors else ""
        drawings.append(
            Drawing(title, f"{says}.", _spec(_named_lines(lines, title, floors=floors)), True)
        )
    return drawings


def participation_charts(run: Run) -> list[Drawing]:
    """Draw a map of which client trained in which round."""
    states = run.participation()
    if not states:
        return []
    seen = {state: color for state, color in STATES.items() if state in states.values()}
    rounds = alt.Scale(domain=[0.5, run.rounds_done + 0.5], nice=False)
    chart = (
        _chart(_cells(run, states))
        .mark_rect(stroke="#ffffff", strokeWidth=0.5)
        .encode(
            x=alt.X(
                "begin:Q",
                title="round",
                scale=rounds,
                axis=_whole_axis(1, run.rounds_done, grid=False),
            ),
            x2="end:Q",
            y=_client_axis(),
            color=_colors("state", seen),
            tooltip=["client:N", "rounds:N", "state:N", "reason:N"],
        )
        .properties(height=_height(len(run.clients)))
    )
    tally = ", ".join(f"{state} {[*states.values()].count(state)} times" for state in seen)
    says = f"A row per client, a column per round: {tally}."
    return [Drawing("Who trained in which round", says, _spec(chart))]


def _cells(run: Run, states: Mapping[tuple[int, int], str]) -> list[dict[str, Any]]:
    """List the cells of a map; of many rounds, those in which a client's state was the same join.

    Args:
        run: of the run.
        states: by round and client.
    """
    reasons = {
        (each.round, each.client): each.context["reason"]
        for each in run.records.left_out
        if each.context["activity"] == "train"
    }
    rows: list[dict[str, Any]] = []
    for number, client in sorted(states, key=lambda key: (key[1], key[0])):
        cell = {
            "client": client,
            "state": states[number, client],
            "reason": reasons.get((number, client), "-"),
        }
        if run.rounds_done > MOST_CELLS and rows and cell.items() <= rows[-1].items():
            rows[-1]["rounds"] = f"{rows[-1]['begin'] + 0.5:.0f} to {number}"
            rows[-1]["end"] = number + 0.5
        else:
            place = {"begin": number - 0.5, "end": number + 0.5, "rounds": str(number)}
            rows.append(cell | place)
    return rows


def class_charts(run: Run) -> list[Drawing]:
    """Draw a map of the training images of each class at each client."""
    known = {who: counts for who, counts in run.class_counts.items() if counts is not None}
    if not known:
        return []
    classes = run.config.data.classes
    rows: list[dict[str, Any]] = [
        {"client": "all" if who == POOLED else str(who), "class": name, "images": number}
        for who, counts in known.items()
        for name, number in zip(classes, counts, strict=True)
    ]
    least, largest = _extent(row["images"] for row in rows)
    angle = 0 if sum(map(len, classes)) <= 30 else -45
    axis = alt.Axis(labelAngle=angle, labelLimit=120)
    base = _chart(rows).encode(
        x=alt.X("class:N", sort=None, title="class", axis=axis), y=_client_axis()
    )
    shades = alt.Scale(range=["#f3f7fb", "#08427a"], domain=[0, largest])
    cells = base.mark_rect(stroke="#ffffff").encode(
        color=alt.Color("images:Q", scale=shades), tooltip=["client:N", "class:N", "images:Q"]
    )
    numbers = base.mark_text(fontSize=10).encode(
        text="images:Q", color=_if_else(alt.datum.images > largest * 0.5, "#ffffff", INK)
    )
    who = "the pooled data" if POOLED in known else f"{len(known)} clients"
    says = f"A cell per class of {who}: between {least:,} and {largest:,} images."
    chart = alt.layer(cells, numbers).properties(height=_height(len(known)))
    return [Drawing("Training images of each class", says, _spec(chart))]


def _chart(rows: Sequence[Mapping[str, Any]]) -> alt.Chart:
    return alt.Chart(alt.Data(values=rows))  # type: ignore[no-untyped-call]


def _spec(chart: Any) -> dict[str, Any]:
    return {"height": HEIGHT, **chart.properties(width="container").to_dict()}


def _if_else(condition: Any, then: Any, otherwise: Any) -> Any:
    return alt.when(condition).then(alt.value(then)).otherwise(alt.value(otherwise))


def _colors(field: str, colors: Mapping[str, str], **legend: Any) -> alt.Color:
    scale = alt.Scale(domain=[*colors], range=[*colors.values()])
    return alt.Color(f"{field}:N", scale=scale, **legend)


def _height(num_rows: int) -> int:
    return max(2, num_rows) * (ROW if num_rows <= CROWDED else CROWDED_ROW)


def _client_axis() -> alt.Y:
    axis = alt.Axis(labelOverlap=True, grid=False)
    return alt.Y("client:O", title="client", sort=None, axis=axis)


def _round_axis(rows: Sequence[Mapping[str, Any]]) -> alt.X:
    first, last = _extent([row["round"] for row in rows])
    scale = alt.Scale(domain=[first, last + (first == last)], nice=False, padding=EDGE)
    return alt.X("round:Q", title="round", scale=scale, axis=_whole_axis(first, last))


def _whole_axis(first: int, last: int, **style: Any) -> alt.Axis:
    """Label whole rounds alone: what a library chooses by itself lies between few rounds too."""
    return alt.Axis(values=whole_ticks(first, last), format="d", labelOverlap=True, **style)


def whole_ticks(first: int, last: int) -> list[int]:
    """Choose at most `MOST_TICKS` whole numbers from `first` to `last`, in steps of 1, 2, 5, 10."""
    steps = (digit * 10**power for power in count() for digit in (1, 2, 5))
    step = next(step for step in steps if last // step - (first - 1) // step <= MOST_TICKS)
    return [number for number in range(first, last + 1) if number % step == 0]


def _value_axis(title: str, domain: Sequence[float] | None, *, percent: bool = False) -> alt.Y:
    bounds: dict[str, Any] = {"zero": False} if domain is None else {"domain": domain}
    axis = alt.Axis(format=".0%") if percent else alt.Axis()
    return alt.Y("value:Q", title=title, scale=alt.Scale(**bounds, padding=EDGE), axis=axis)


def _extent(values: Iterable[Any]) -> list[Any]:
    """Return the least and the largest value, which a layer whose lines are hidden keeps."""
    known = sorted(values)
    return [known[0], known[-1]]


def _named_lines(
    lines: Mapping[str, Series],
    title: str,
    *,
    domain: Sequence[float] | None = None,
    percent: bool = False,
    floors: Mapping[str, Series] | None = None,
) -> Any:
    """Draw a line per name, with a point where a value was recorded; a legend where several.

    Floors are dashed lines in the color of the line of the same name.
    """
    kinds = {"generated images": lines, "real images": floors or {}}
    rows = [
        {"line": label, "of": kind, "round": number, "value": value}
        for kind, named in kinds.items()
        for label, series in named.items()
        for number, value in series.items()
    ]
    chosen = alt.selection_point(fields=["line"], bind="legend")
    colors = {label: COLORS[number % len(COLORS)] for number, label in enumerate(lines)}
    base = _chart(rows).encode(
        x=_round_axis(rows),
        y=_value_axis(title, domain, percent=percent),
        color=_colors("line", colors, **({} if len(lines) > 1 else {"legend": None})),
        opacity=_if_else(chosen, 1, 0.15),
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


def _client_lines(
    clients: Mapping[int, Series], title: str, domain: Sequence[float]
) -> list[alt.Chart]:
    """Draw gray lines, of which the one under the pointer, or the chosen one, stands out."""
    if not clients:
        return []
    rows = [
        {"client": str(client), "round": number, "value": value}
        for client, series in clients.items()
        for number, value in series.items()
    ]
    menu = alt.binding_select(
        options=[None, *map(str, clients)],
        labels=["none", *(f"client {client}" for client in clients)],
        name="Highlighted: ",
    )
    chosen = alt.selection_point(
        # Selections need names of their own where a page has several of them.
        name="highlighted",
        fields=["client"],
        bind=menu,
        on="pointerover",
        clear="dblclick",
        empty=False,
    )
    base = _chart(rows).encode(x=_round_axis(rows), y=_value_axis(title, domain), detail="client:N")
    lines = base.mark_line(interpolate="linear").encode(
        color=_if_else(chosen, INK, GRAY),
        opacity=_if_else(chosen, 1, 0.45),
        strokeWidth=_if_else(chosen, 3, 1.5),
        tooltip=[alt.Tooltip("client:N")],
    )
    value = alt.Tooltip("value:Q", title=title, format=".4g")
    points = (
        base.transform_filter(chosen)
        .mark_point(filled=True, size=45, color=INK)
        .encode(tooltip=["client:N", "round:Q", value])
    )
    return [lines.add_params(chosen), points]


def _spans(lines: Mapping[str, Series]) -> str:
    return "; ".join(f"{name} {_span(series)}" for name, series in lines.items())


def _span(series: Series, *, percent: bool = False) -> str:
    first, last = (series[number] for number in (min(series), max(series)))
    form = ".0%" if percent else ".4g"
    if len(series) == 1:
        return f"{first:{form}} in round {min(series)}"
    return f"from {first:{form}} in round {min(series)} to {last:{form}} in round {max(series)}"
