"""The page of a report: its template, its style and its script. Every value is escaped."""

TEMPLATE = """\
{%- macro table(block) %}
{%- if not block.folded %}
<p class="caption">{{ block.title }}</p>
{%- endif %}
<div class="wide" tabindex="0" role="region" aria-label="{{ block.title }}">
{#- The roles stay what they are where a phone shows each row as a block. #}
<table role="table" aria-label="{{ block.title }}">
<thead role="rowgroup"><tr role="row">
{%- for head in block.heads %}<th role="columnheader" scope="col">{{ head }}</th>{% endfor -%}
</tr></thead>
<tbody role="rowgroup">
{%- for row in block.rows %}
<tr role="row"><th role="rowheader" scope="row" data-head="{{ block.heads[0] }}">
{{- row[0] }}</th>
{%- for cell in row[1:] %}<td role="cell" data-head="{{ block.heads[loop.index] }}">{{ cell }}</td>
{%- endfor %}</tr>
{%- endfor %}
</tbody>
</table>
</div>
{%- endmacro %}
{%- macro listing(block) %}
<ul>{% for item in block.items %}<li>{{ item }}</li>{% endfor %}</ul>
{%- endmacro %}
{%- macro code(block) %}
{%- if block.title and not block.folded %}
<p class="caption">{{ block.title }}</p>
{%- endif %}
<pre><code>{{ block.text }}</code></pre>
{%- endmacro %}
{%- macro chart(drawing, number) %}
<figure class="chart{{ ' narrow' if drawing.narrow }}">
<h3>{{ drawing.title }}</h3>
<div class="plot" id="chart-{{ number }}" role="img"
 aria-label="{{ drawing.title }}. {{ drawing.says }}"></div>
<div class="controls" id="controls-{{ number }}"></div>
<figcaption>{{ drawing.says }}</figcaption>
<script type="application/json" data-chart="{{ number }}">{{ drawing.spec|tojson }}</script>
</figure>
{%- endmacro %}
{%- macro picture(picture, shown=true) %}
<div class="picture{{ ' last' if shown }}" data-title="{{ picture.title }}"
 {{- ' hidden' if not shown }}>
{%- if picture.rows %}
<div class="rows" aria-hidden="true">
{%- for row in picture.rows %}<span>{{ row }}</span>{% endfor %}</div>
{%- endif %}
<img src="{{ picture.source }}" alt="{{ picture.says }}">
</div>
{%- endmacro %}
{%- macro pictures(block) %}
<div class="slides">
<p class="slider">
{%- if block.slider and block.pictures|length > 1 %}
<label for="slider">{{ block.title }}</label>
{%- set last = block.pictures|length - 1 %}
<input type="range" id="slider" min="0" max="{{ last }}" step="1" value="{{ last }}"
 aria-valuetext="{{ block.pictures[-1].title }}">
<output for="slider">{{ block.pictures[-1].title }}</output>
{%- endif %}
<label class="zoom">Zoom <select id="zoom">
<option value="">to fit</option><option>1</option><option>2</option><option>4</option>
</select></label></p>
<div class="frame" tabindex="0" role="region" aria-label="Samples">
{%- if block.slider %}
{%- for each in block.pictures %}{{ picture(each, loop.last) }}{% endfor %}
{%- else %}
<div class="beside">
{%- for each in block.pictures %}
<figure>{{ picture(each) }}<figcaption>{{ each.title }}</figcaption></figure>
{%- endfor %}
</div>
{%- endif %}
</div>
</div>
{%- endmacro -%}
<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="color-scheme" content="light dark">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy"
 content="default-src 'none'; img-src data:; style-src 'unsafe-inline';
 script-src {{ hashes }}">
<title>{{ page.title }}</title>
<style>{{ style }}</style>
</head>
<body>
<a class="skip" href="#content">Skip to the content</a>
<header><h1>{{ page.title }}</h1></header>
<nav aria-label="Contents"><ul>
{%- for section in page.sections %}
<li><a href="#{{ section.anchor }}">{{ section.title }}</a></li>
{%- endfor %}

</ul></nav>
<main id="content" tabindex="-1">
{%- set counter = namespace(charts=0) %}
{%- for section in page.sections %}
<section aria-labelledby="{{ section.anchor }}" class="{{ section.look }}">
<h2 id="{{ section.anchor }}">{{ section.title }}</h2>
{%- for block in section.blocks %}
{%- if block.kind == "text" %}
<p>{{ block.text }}</p>
{%- elif block.kind == "figures" %}
<dl class="figures">
{%- for name, value in block.pairs %}<div><dt>{{ name }}</dt><dd>{{ value }}</dd></div>{% endfor -%}
</dl>
{%- elif block.kind == "facts" %}
<dl class="facts">
{%- for name, value in block.pairs %}<dt>{{ name }}</dt><dd>{{ value }}</dd>{% endfor -%}
</dl>
{%- elif block.kind == "charts" %}
<div class="charts">
{%- for drawing in block.drawings %}
{%- set counter.charts = counter.charts + 1 %}
{{ chart(drawing, counter.charts) }}
{%- endfor %}
</div>
{%- elif block.kind == "pictures" %}
{{ pictures(block) }}
{%- else %}
{%- set shown = {"table": table, "list": listing, "code": code}[block.kind](block) %}
{%- if block.folded %}
<details class="{{ block.kind }}"><summary>{{ block.title }}</summary>{{ shown }}</details>
{%- else %}
{{ shown }}
{%- endif %}
{%- endif %}
{%- endfor %}
</section>
{%- endfor %}
</main>
<footer><p>{{ footer }}</p></footer>
<script>{{ library }}</script>
<script type="application/json" id="chart-config">{{ config|tojson }}</script>
<script>{{ script }}</script>
</body>
</html>
"""

STYLE = """
:root { color-scheme: light dark; --ink: #1a1a1a; --paper: #fff; --muted: #4a4a4a; --line: #d4d8de;
  --strong: #6b6b6b; --accent: #00558a; --code: #f4f6f8;
  --bad: #b84300; --bad-paper: #fdf3ec; --good: #007a5a; --good-paper: #eff8f4; }
@media screen and (prefers-color-scheme: dark) {
  :root { --ink: #e6e6e6; --paper: #14171a; --muted: #b4b8bd; --line: #3a4048; --strong: #8d949c;
    --accent: #7cc4f5; --code: #1e2328;
    --bad: #ff9a5c; --bad-paper: #2e2119; --good: #4fcfa8; --good-paper: #15271f; }
  /* Light becomes dark and hues stay. */
  .plot { filter: invert(1) hue-rotate(180deg); }
}
* { box-sizing: border-box; }
html { scroll-behavior: smooth; }
body { font: 1rem/1.5 system-ui, sans-serif; color: var(--ink); background: var(--paper);
  margin: 0 auto; max-width: 76rem; padding: 0 1rem 2rem; overflow-wrap: break-word; }
h1 { font-size: 1.9rem; line-height: 1.2; margin: 1.5rem 0 .75rem; }
h2 { font-size: 1.35rem; margin: 2.25rem 0 .75rem; border-top: 1px solid var(--line);
  padding-top: 1.25rem; }
h3 { font-size: 1rem; margin: 0 0 .25rem; }
a { color: var(--accent); }
:focus-visible { outline: 3px solid var(--accent); outline-offset: 2px; }
.skip { position: absolute; left: -999rem; background: var(--paper); padding: .5rem 1rem; }
.skip:focus { left: 1rem; top: .5rem; }
main:focus { outline: none; }
nav ul { display: flex; flex-wrap: wrap; gap: .25rem 1.25rem; list-style: none; padding: 0;
  margin: 0; }
nav a { display: inline-block; padding: .2rem 0; }
.warning { border-left: .4rem solid var(--bad); background: var(--bad-paper); }
.calm { border-left: .4rem solid var(--good); background: var(--good-paper); }
.warning, .calm { padding: .1rem 1.25rem .5rem; margin-top: 1.25rem; }
.warning h2, .calm h2 { border: 0; margin: .5rem 0; padding: 0; font-size: 1.15rem; }
.warning ul, .calm ul { padding-left: 1.1rem; margin: .5rem 0; }
.figures { display: grid; gap: .75rem; margin: 1rem 0;
  grid-template-columns: repeat(auto-fill, minmax(min(100%, 12.5rem), 1fr)); }
.figures div { border: 1px solid var(--line); border-radius: .4rem; padding: .6rem .9rem; }
.figures dt { font-size: .85rem; color: var(--muted); }
.figures dd { margin: 0; font-size: 1.1rem; font-weight: 600;
  font-variant-numeric: tabular-nums; }
.facts { display: grid; grid-template-columns: max-content 1fr; gap: .2rem 1.5rem; margin: 1rem 0; }
.facts dt { color: var(--muted); }
.facts dd { margin: 0; overflow-wrap: anywhere; }
.charts { display: grid; gap: 1.75rem 1.5rem;
  grid-template-columns: repeat(auto-fit, minmax(min(100%, 30rem), 1fr)); }
.charts + .charts { margin-top: 1.75rem; }
.charts:has(.narrow) { grid-template-columns: repeat(auto-fill, minmax(min(100%, 21rem), 1fr)); }
figure { margin: 0; min-width: 0; }
.plot { width: 100%; }
.plot svg { display: block; max-width: 100%; height: auto; }
figcaption { font-size: .85rem; color: var(--muted); margin-top: .25rem; }
.controls { font-size: .9rem; }
select { font: inherit; padding: .15rem .4rem; }
.slider { display: flex; flex-wrap: wrap; align-items: center; gap: .5rem 1rem; }
.slider input { flex: 1 1 12rem; max-width: 30rem; min-height: 1.5rem;
  accent-color: var(--accent); }
.slider output { font-weight: 600; font-variant-numeric: tabular-nums; }
.zoomed { overflow: auto; max-height: 90vh; }
.picture { display: flex; width: fit-content; max-width: 100%; }
.picture[hidden] { display: none; }
.picture img { min-width: 0; max-width: 100%; height: auto; align-self: flex-start;
  image-rendering: pixelated; }
.rows { display: flex; flex-direction: column; flex: none; max-width: 9rem; margin-right: .75rem;
  text-align: right; font-size: .9rem; line-height: 1.15; }
.rows span { flex: 1 1 0; min-height: 0; display: flex; align-items: center;
  justify-content: flex-end; overflow: hidden; }
.zoomed .picture, .zoomed .picture img { max-width: none; }
.zoomed .picture img { flex: none; }
.beside { display: grid; gap: 1.25rem;
  grid-template-columns: repeat(auto-fit, minmax(min(100%, 20rem), 1fr)); }
.wide { overflow-x: auto; margin: .4rem 0 1rem; }
table { border-collapse: collapse; font-size: .95rem; font-variant-numeric: tabular-nums; }
.caption { font-weight: 600; margin: 1rem 0 .4rem; }
th, td { padding: .25rem .8rem; text-align: right; border-bottom: 1px solid var(--line);
  vertical-align: top; unicode-bidi: isolate; }
th:first-child { text-align: left; padding-left: 0; }
tbody th { font-weight: normal; }
thead th { border-bottom: 2px solid var(--strong); }
th button { font: inherit; color: inherit; background: none; border: 0; padding: 0; cursor: pointer;
  text-align: inherit; }
th button::after { content: " \\2195"; content: " \\2195" / ""; color: var(--muted); }
th[aria-sort=ascending] button::after { content: " \\25b2"; content: " \\25b2" / ""; }
th[aria-sort=descending] button::after { content: " \\25bc"; content: " \\25bc" / ""; }
.stacked table, .stacked tbody, .stacked tbody tr, .stacked tbody th { display: block; }
.stacked thead tr { display: flex; flex-wrap: wrap; gap: .2rem 1rem; }
.stacked thead th { padding: .2rem 0; border: 0; text-align: left; }
.stacked tbody tr { border-top: 2px solid var(--line); padding: .3rem 0; }
.stacked tbody th { border: 0; font-weight: 600; }
.stacked tbody th::before { content: attr(data-head) " "; }
.stacked td { display: flex; justify-content: space-between; gap: 1rem; border: 0;
  padding: .1rem 0; overflow-wrap: anywhere; }
.stacked td::before { content: attr(data-head); color: var(--muted); text-align: left; }
details { margin: 1rem 0; }
summary { cursor: pointer; font-weight: 600; padding: .2rem 0; }
pre { white-space: pre-wrap; overflow-wrap: anywhere; background: var(--code); padding: .8rem 1rem;
  font-size: .85rem; border-radius: .4rem; }
footer { margin-top: 2.5rem; color: var(--muted); font-size: .85rem; }
@media (max-width: 40rem) {
  .figures { grid-template-columns: 1fr 1fr; }
  .facts { grid-template-columns: 1fr; gap: 0; }
  .facts dd { margin-bottom: .5rem; }
  .rows { max-width: 5rem; margin-right: .4rem; font-size: .75rem; }
}
@media (prefers-reduced-motion: reduce) { html { scroll-behavior: auto; } }
@media print {
  @page { margin: 14mm; }
  body { max-width: none; padding: 0; font-size: 9.5pt; }
  nav, .skip, .slider, .controls { display: none; }
  .picture { display: none; }
  .picture.last { display: flex; }
  h2, h3, .caption, .slides { break-after: avoid; }
  h2 + p { break-after: avoid; }
  figure, tr, .figures div, .warning li { break-inside: avoid; }
  .zoomed { overflow: visible; max-height: none; }
  .zoomed .picture img, .picture img { width: auto !important; max-width: 100%;
    max-height: 150mm; }
  .slides { break-inside: avoid; }
  th button::after { content: none; }
  .charts, .charts:has(.narrow) { display: block; }
  .charts figure { margin-bottom: 1rem; }
  .charts figure:not(:only-child) { display: inline-block; width: 49%; vertical-align: top; }
  details.table { display: none; }
  .wide { overflow: visible; }
  .figures { grid-template-columns: repeat(4, 1fr); }
  details::details-content { content-visibility: visible; display: block; }
  pre { background: none; border: 1px solid var(--line); }
  a { color: inherit; text-decoration: none; }
}
"""

SCRIPT = """
(() => {
  const slider = document.getElementById("slider");
  if (slider) {
    const pictures = [...document.querySelectorAll(".slides .picture")];
    const output = document.querySelector(".slider output");
    slider.addEventListener("input", () => {
      const chosen = pictures[Number(slider.value)];
      for (const picture of pictures) picture.hidden = picture !== chosen;
      slider.setAttribute("aria-valuetext", chosen.dataset.title);
      output.textContent = chosen.dataset.title;
    });
  }

  const zoom = document.getElementById("zoom");
  if (zoom) zoom.addEventListener("change", () => {
    document.querySelector(".frame").classList.toggle("zoomed", zoom.value !== "");
    for (const image of document.querySelectorAll(".picture img")) {
      image.style.width = zoom.value && `${image.naturalWidth * zoom.value}px`;
    }
  });

  // Numbers by their size, words by the alphabet, and what is missing last.
  const order = (a, b) => {
    const [x, y] = [a, b].map((text) => parseFloat(text.replaceAll(",", "")));
    if (isNaN(x) !== isNaN(y)) return isNaN(x) ? 1 : -1;
    return isNaN(x) ? a.localeCompare(b) : x - y || a.localeCompare(b, "en", { numeric: true });
  };
  const missing = (text) => text === "" || text === "-";
  const sortBy = (body, column, sign) => {
    const text = (row) => row.cells[column].textContent.trim();
    body.append(...[...body.rows].sort((a, b) => {
      const [x, y] = [text(a), text(b)];
      return missing(x) - missing(y) || sign * order(x, y);
    }));
  };
  for (const table of document.querySelectorAll("table")) {
    const body = table.tBodies[0], heads = [...table.tHead.rows[0].cells];
    if (body.rows.length < 2) continue;
    heads.forEach((head, column) => {
      const button = document.createElement("button");
      button.type = "button";
      button.append(...head.childNodes);
      head.append(button);
      button.addEventListener("click", () => {
        const up = head.getAttribute("aria-sort") !== "ascending";
        for (const other of heads) other.removeAttribute("aria-sort");
        head.setAttribute("aria-sort", up ? "ascending" : "descending");
        sortBy(body, column, up ? 1 : -1);
      });
    });
  }

  // A table that is wider than the screen becomes a block for each row.
  const regions = [...document.querySelectorAll(".wide")];
  const stack = () => {
    for (const region of regions) {
      region.classList.remove("stacked");
      region.classList.toggle("stacked", region.scrollWidth > region.clientWidth);
    }
  };
  stack();
  addEventListener("resize", stack);
  document.addEventListener("toggle", stack, true);

  const read = (element) => JSON.parse(element.textContent);
  const config = read(document.getElementById("chart-config"));
  const views = [];
  // A chart that fails takes no other with it.
  const draw = async (element) => {
    const number = element.dataset.chart;
    const { view } = await vegaEmbed(`#chart-${number}`, read(element), {
      // Expressions are interpreted, because the page may not make code of text.
      ast: true, config, renderer: "svg", actions: false, bind: `#controls-${number}`,
      tooltip: { theme: matchMedia("(prefers-color-scheme: dark)").matches ? "dark" : "light" },
    });
    views.push({ view, figure: element.closest("figure") });
    // To a screen reader a chart is one picture, with a sentence of its own.
    document.querySelector(`#chart-${number} svg`).setAttribute("aria-hidden", "true");
  };
  const drawn = [...document.querySelectorAll("script[data-chart]")].map(draw);
  // For whoever waits for the whole page, such as a test.
  window.chartsDrawn = Promise.all(drawn).then(() => drawn.length);

  let opened = [];
  // Of a page of A4 and half of it: a chart that is only made smaller has letters too small.
  const FULL = 680, HALF = 330, LOW = 180;
  addEventListener("beforeprint", () => {
    for (const drawing of views) {
      const { view, figure } = drawing, alone = figure.matches(":only-child");
      // What a view is told is its width with the axes, and what it says is without them.
      drawing.size = [figure.querySelector("svg").viewBox.baseVal.width, view.height()];
      if (!alone) view.height(Math.min(view.height(), LOW));
      view.width(alone ? FULL : HALF).run();
    }
    opened = [...document.querySelectorAll("details.code:not([open])")];
    for (const details of opened) details.open = true;
    for (const region of regions) region.classList.remove("stacked");
  });
  addEventListener("afterprint", () => {
    for (const { view, size } of views) view.width(size[0]).height(size[1]).run();
    for (const details of opened) details.open = false;
    stack();
  });
})();
"""
