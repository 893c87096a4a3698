"""The page of a report: its template, its style and its script. Every value is escaped."""

TEMPLATE = """\
{%- macro table(block) %}
{%- if not block.folded %}
<p class="caption">{{ block.title }}</p>
{%- endif %}
<div class="wide" tabindex="0" role="region" aria-label="{{ block.title }}">
<table aria-label="{{ block.title }}">
<thead><tr>{% for head in block.heads %}<th scope="col">{{ head }}</th>{% endfor %}</tr></thead>
<tbody>
{%- for row in block.rows %}
<tr><th scope="row">{{ row[0] }}</th>{% for cell in row[1:] %}<td>{{ cell }}</td>{% endfor %}</tr>
{%- endfor %}
</tbody>
</table>
</div>
{%- endmacro %}
{%- macro code(block) %}
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
{%- macro pictures(block) %}
{%- if block.slider and block.pictures|length > 1 %}
<div class="slides">
<p class="slider"><label for="slider">{{ block.title }}</label>
{%- set last = block.pictures|length - 1 %}
<input type="range" id="slider" min="0" max="{{ last }}" step="1" value="{{ last }}"
 aria-valuetext="{{ block.pictures[-1].title }}">
<output for="slider">{{ block.pictures[-1].title }}</output></p>
{%- for picture in block.pictures %}
<img src="{{ picture.source }}" alt="{{ picture.says }}" data-title="{{ picture.title }}"
 {{ ' hidden' if not loop.last }}{{ ' class=last' if loop.last }}>
{%- endfor %}
</div>
{%- else %}
<div class="beside">
{%- for picture in block.pictures %}
<figure><img src="{{ picture.source }}" alt="{{ picture.says }}">
<figcaption>{{ picture.title }}</figcaption></figure>
{%- endfor %}
</div>
{%- endif %}
{%- endmacro -%}
<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
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
{%- elif block.kind == "list" %}
<ul>{% for item in block.items %}<li>{{ item }}</li>{% endfor %}</ul>
{%- elif block.kind == "figures" %}
<dl class="figures">
{%- for name, value in block.pairs %}<div><dt>{{ name }}</dt><dd>{{ value }}</dd></div>{% endfor -%}
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
{%- set shown = table(block) if block.kind == "table" else code(block) %}
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
* { box-sizing: border-box; }
html { scroll-behavior: smooth; }
body { font: 1rem/1.5 system-ui, sans-serif; color: #1a1a1a; background: #fff; margin: 0 auto;
  max-width: 76rem; padding: 0 1rem 2rem; overflow-wrap: break-word; }
h1 { font-size: 1.9rem; line-height: 1.2; margin: 1.5rem 0 .75rem; }
h2 { font-size: 1.35rem; margin: 2.25rem 0 .75rem; border-top: 1px solid #d4d8de;
  padding-top: 1.25rem; }
h3 { font-size: 1rem; margin: 0 0 .25rem; }
a { color: #00558a; }
:focus-visible { outline: 3px solid #00558a; outline-offset: 2px; }
.skip { position: absolute; left: -999rem; background: #fff; padding: .5rem 1rem; }
.skip:focus { left: 1rem; top: .5rem; }
main:focus { outline: none; }
nav ul { display: flex; flex-wrap: wrap; gap: .25rem 1.25rem; list-style: none; padding: 0;
  margin: 0; }
nav a { display: inline-block; padding: .2rem 0; }
.warning { border-left: .4rem solid #b84300; background: #fdf3ec; padding: .1rem 1.25rem .5rem;
  margin-top: 1.25rem; }
.calm { border-left: .4rem solid #007a5a; background: #eff8f4; padding: .1rem 1.25rem .5rem;
  margin-top: 1.25rem; }
.warning h2, .calm h2 { border: 0; margin: .5rem 0; padding: 0; font-size: 1.15rem; }
.warning ul { padding-left: 1.1rem; margin: .5rem 0; }
.figures { display: grid; gap: .75rem; margin: 1rem 0;
  grid-template-columns: repeat(auto-fill, minmax(min(100%, 12.5rem), 1fr)); }
.figures div { border: 1px solid #d4d8de; border-radius: .4rem; padding: .6rem .9rem; }
.figures dt { font-size: .85rem; color: #4a4a4a; }
.figures dd { margin: 0; font-size: 1.1rem; font-weight: 600;
  font-variant-numeric: tabular-nums; }
.charts { display: grid; gap: 1.75rem 1.5rem;
  grid-template-columns: repeat(auto-fit, minmax(min(100%, 30rem), 1fr)); }
.charts + .charts { margin-top: 1.75rem; }
.charts:has(.narrow) { grid-template-columns: repeat(auto-fill, minmax(min(100%, 21rem), 1fr)); }
figure { margin: 0; min-width: 0; }
.plot { width: 100%; }
.plot svg { display: block; max-width: 100%; height: auto; }
figcaption { font-size: .85rem; color: #4a4a4a; margin-top: .25rem; }
.controls { font-size: .9rem; }
.controls select { font: inherit; padding: .15rem .4rem; }
.slider { display: flex; flex-wrap: wrap; align-items: center; gap: .5rem 1rem; }
.slider input { flex: 1 1 12rem; max-width: 30rem; min-height: 1.5rem; accent-color: #00558a; }
.slider output { font-weight: 600; font-variant-numeric: tabular-nums; }
img { max-width: 100%; height: auto; }
img[hidden] { display: none; }
.beside { display: grid; gap: 1.25rem;
  grid-template-columns: repeat(auto-fit, minmax(min(100%, 20rem), 1fr)); }
.wide { overflow-x: auto; margin: .4rem 0 1rem; }
table { border-collapse: collapse; font-size: .95rem; font-variant-numeric: tabular-nums; }
.caption { font-weight: 600; margin: 1rem 0 .4rem; }
th, td { padding: .25rem .8rem; text-align: right; border-bottom: 1px solid #e3e6ea;
  vertical-align: top; }
th:first-child { text-align: left; padding-left: 0; }
tbody th { font-weight: normal; }
thead th { border-bottom: 2px solid #6b6b6b; }
details { margin: 1rem 0; }
summary { cursor: pointer; font-weight: 600; padding: .2rem 0; }
pre { white-space: pre-wrap; overflow-wrap: anywhere; background: #f4f6f8; padding: .8rem 1rem;
  font-size: .85rem; border-radius: .4rem; }
footer { margin-top: 2.5rem; color: #4a4a4a; font-size: .85rem; }
@media (max-width: 40rem) { .figures { grid-template-columns: 1fr 1fr; } }
@media (prefers-reduced-motion: reduce) { html { scroll-behavior: auto; } }
@media print {
  @page { margin: 14mm; }
  body { max-width: none; padding: 0; font-size: 9.5pt; }
  nav, .skip, .slider, .controls { display: none; }
  .slides img { display: none; }
  .slides img.last { display: block; }
  h2, h3, .caption, .slides { break-after: avoid; }
  h2 + p { break-after: avoid; }
  figure, tr, .figures div, .warning li { break-inside: avoid; }
  .slides img, .beside img { max-height: 150mm; }
  .slides { break-inside: avoid; }
  .charts, .charts:has(.narrow) { display: block; }
  .charts figure { margin-bottom: 1rem; }
  .charts figure:not(:only-child) { display: inline-block; width: 49%; vertical-align: top; }
  details.table { display: none; }
  .wide { overflow: visible; }
  .figures { grid-template-columns: repeat(4, 1fr); }
  details::details-content { content-visibility: visible; display: block; }
  pre { background: none; border: 1px solid #d4d8de; }
  a { color: inherit; text-decoration: none; }
}
"""

SCRIPT = """
(() => {
  const slider = document.getElementById("slider");
  if (slider) {
    const pictures = [...document.querySelectorAll(".slides img")];
    const output = document.querySelector(".slider output");
    slider.addEventListener("input", () => {
      const chosen = pictures[Number(slider.value)];
      for (const picture of pictures) picture.hidden = picture !== chosen;
      slider.setAttribute("aria-valuetext", chosen.dataset.title);
      output.textContent = chosen.dataset.title;
    });
  }

  const read = (element) => JSON.parse(element.textContent);
  const config = read(document.getElementById("chart-config"));
  const views = [];
  // A chart that fails takes no other with it.
  const draw = async (element) => {
    const number = element.dataset.chart;
    const { view } = await vegaEmbed(`#chart-${number}`, read(element), {
      // Expressions are interpreted, because the page may not make code of text.
      ast: true, config, renderer: "svg", actions: false, bind: `#controls-${number}`,
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
  });
  addEventListener("afterprint", () => {
    for (const { view, size } of views) view.width(size[0]).height(size[1]).run();
    for (const details of opened) details.open = false;
  });
})();
"""
