"""Tables as Markdown, as one HTML page without further files, and runs as CSV."""

import csv
import io
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from typing import Any
from urllib.parse import quote

from task.reporting.figures import Picture
from task.reporting.markdown import bullets, plain, table
from task.reporting.metric_table import Figure
from task.reporting.tables import Column, Table

MISSING = "-"
# What a spreadsheet runs.
FORMULA = ("=", "+", "-", "@", "\t", "\r")

STYLE = """
body { font: 1rem/1.45 system-ui, sans-serif; margin: 2rem auto; max-width: 72rem; padding: 0 1rem;
  color: #1a1a1a; background: #fff; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; margin: 1.5rem 0 .5rem; font-variant-numeric: tabular-nums; }
caption { text-align: left; padding-bottom: .5rem; }
caption ul { font-size: .85rem; margin: .25rem 0 0; }
th, td { padding: .25rem .75rem; text-align: right; white-space: nowrap; }
th[scope=row], thead tr:first-child th:first-child { text-align: left; }
thead th[scope=colgroup] { text-align: center; }
thead tr:first-child { border-top: 2px solid; }
tbody { border-top: 1px solid; border-bottom: 2px solid; }
img { max-width: 100%; }
@media print { body { margin: 0; max-width: none; font-size: 9pt; } .wide { overflow: visible; }
  table, figure { break-inside: avoid; } th, td { padding: .15rem .4rem; } }
"""


@dataclass(frozen=True)
class Page:
    """What is shown of a folder of runs.

    Attributes:
        title: of the page.
        tables: in order.
        left_out: runs by why they are not in a table.
        pictures: shown after the tables.
    """

    title: str
    tables: Sequence[Table]
    left_out: Mapping[str, Sequence[str]]
    pictures: Sequence[Picture] = ()


def markdown(page: Page) -> str:
    """Write a page as Markdown."""
    blocks = [f"# {plain(page.title)}"]
    for each in page.tables:
        blocks += [f"## {plain(each.title)}", bullets(each.caption), _markdown_table(each)]
        if each.verdicts:
            blocks += [bullets(each.verdicts)]
    for picture in page.pictures:
        blocks += [f"![{plain(picture.title)}]({_url(picture)})", f"*{plain(picture.caption)}*"]
    if page.left_out:
        blocks += ["## In no table"]
    for reason, runs in page.left_out.items():
        blocks += [f"{plain(reason)}:", bullets(runs)]
    return "\n\n".join(blocks) + "\n"


def _markdown_table(of: Table) -> str:
    heads = [f"{c.label} {metric.heading}" for c in of.columns for metric in of.metrics]
    return table(["", *heads], ([label, *_cells(of, label)] for label in of.rows))


def _cells(table: Table, label: str) -> list[str]:
    return [_cell(column, label, metric) for column in table.columns for metric in table.metrics]


def _cell(column: Column, label: str, metric: Figure) -> str:
    return str(column.rows.get(label, {}).get(metric, MISSING))


def _url(picture: Picture) -> str:
    return quote(picture.file.as_posix())


def html(page: Page) -> str:
    """Write a page as HTML that needs nothing from elsewhere but its pictures."""
    left_out = [
        f"<p>{escape(reason)}:</p>\n{_html_list(runs)}" for reason, runs in page.left_out.items()
    ]
    return "\n".join(
        [
            "<!doctype html>",
            '<html lang="en">',
            '<head><meta charset="utf-8">',
            '<meta name="viewport" content="width=device-width, initial-scale=1">',
            f"<title>{escape(page.title)}</title>",
            f"<style>{STYLE}</style></head>",
            f"<body>\n<h1>{escape(page.title)}</h1>",
            *map(_html_table, page.tables),
            *map(_html_picture, page.pictures),
            *(["<h2>In no table</h2>", *left_out] if left_out else []),
            "</body>\n</html>\n",
        ]
    )


def _html_table(table: Table) -> str:
    span = len(table.metrics)
    groups = [
        f'<th scope="colgroup" colspan="{span}">{escape(column.label)}</th>'
        for column in table.columns
    ]
    heads = [f'<th scope="col">{escape(m.heading)}</th>' for _ in groups for m in table.metrics]
    rows = [
        f'<tr><th scope="row">{escape(label)}</th>'
        + "".join(f"<td>{escape(cell)}</td>" for cell in _cells(table, label))
        + "</tr>"
        for label in table.rows
    ]
    return "\n".join(
        [
            '<section>\n<div class="wide">\n<table>',
            f"<caption><strong>{escape(table.title)}</strong>\n{_html_list(table.caption)}"
            "</caption>",
            "<colgroup></colgroup>" + f'<colgroup span="{span}"></colgroup>' * len(groups),
            f'<thead>\n<tr><td rowspan="2"></td>{"".join(groups)}</tr>',
            f"<tr>{''.join(heads)}</tr>\n</thead>",
            "<tbody>",
            *rows,
            "</tbody>\n</table>\n</div>",
            _html_list(table.verdicts) if table.verdicts else "",
            "</section>",
        ]
    )


def _html_list(lines: Iterable[str]) -> str:
    return "<ul>" + "".join(f"<li>{escape(line)}</li>" for line in lines) + "</ul>"


def _html_picture(picture: Picture) -> str:
    return (
        f'<figure><img src="{escape(_url(picture))}" alt="{escape(picture.title)}">'
        f"<figcaption>{escape(picture.caption)}</figcaption></figure>"
    )


def csv_text(rows: Sequence[Mapping[str, Any]]) -> str:
    """Write rows as CSV, with a column for every key that one of them has.

    A spreadsheet takes text that begins with one of `FORMULA` for a formula and runs it; such text
    gets an apostrophe before it.

    Source: OWASP, "CSV Injection".
    """
    stream = io.StringIO()
    columns = list(dict.fromkeys(key for row in rows for key in row))
    writer = csv.DictWriter(stream, columns, lineterminator="\n")
    writer.writeheader()
    writer.writerows({key: _harmless(value) for key, value in row.items()} for row in rows)
    return stream.getvalue()


def _harmless(value: object) -> object:
    # Numbers are no text, so that a minus stays what it is.
    return f"'{value}" if isinstance(value, str) and value.startswith(FORMULA) else value
