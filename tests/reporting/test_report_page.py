"""The page of a real run, as a reader sees it in a browser."""

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from flwr.app import Error, Message

from tests.helpers import SMALL_RUN, ClientNodes, Network, played, simulated

pytest.importorskip("playwright", reason="needs `uv sync --group browser`")
pytest.importorskip("axe_playwright_python", reason="needs `uv sync --group browser`")

from axe_playwright_python.sync_playwright import Axe
from playwright.sync_api import Browser, Page, sync_playwright

CHROMIUM = shutil.which("chromium")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="needs a chromium on the PATH")

# Nothing but what a page needs, and no word to anyone.
ARGUMENTS = [
    *("--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync"),
    *("--disable-background-networking", "--disable-component-update"),
]
LAPTOP, PHONE = (1366, 768), (390, 844)


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The page that a small run writes at its end; a client fails in its first round."""
    run_config = {
        **SMALL_RUN,
        "output_dir": str(tmp_path_factory.mktemp("runs")),
        "run_name": "small",
        "eval.every": 1,
        "federation.node_wait": 10.0,
    }
    nodes = ClientNodes(Network(), run_config, *simulated(3))
    failures = iter([True])

    def answer(asked: Message) -> Message:
        if asked.metadata.message_type == "train" and next(failures, False):
            return Message(Error(code=102, reason="FileNotFoundError"), reply_to=asked)
        return nodes(asked)

    return played(run_config, nodes, answer) / "report.html"


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with sync_playwright() as playwright:
        opened = playwright.chromium.launch(executable_path=CHROMIUM, args=ARGUMENTS)
        yield opened
        opened.close()


SCREENS = {"laptop": (LAPTOP, "light"), "phone": (PHONE, "light"), "dark": (PHONE, "dark")}


@pytest.fixture(scope="module", params=SCREENS.values(), ids=SCREENS)
def page(browser: Browser, report: Path, request: pytest.FixtureRequest) -> Iterator[Page]:
    """The opened page; whatever it complains of or asks for is kept in `complaints`."""
    (width, height), scheme = request.param
    context = browser.new_context(
        viewport={"width": width, "height": height}, offline=True, color_scheme=scheme
    )
    opened = context.new_page()
    complaints: list[str] = []
    opened.on("console", lambda message: complaints.append(message.text))
    opened.on("pageerror", lambda error: complaints.append(str(error)))
    opened.on("request", lambda asked: complaints.extend(_from_elsewhere(asked.url)))
    opened.goto(report.as_uri())
    opened.evaluate("window.chartsDrawn")
    opened.complaints = complaints  # type: ignore[attr-defined]
    yield opened
    context.close()


def _from_elsewhere(url: str) -> list[str]:
    return [] if url.startswith(("file:", "data:")) else [url]


def test_page_draws_every_chart_without_a_complaint_or_a_request(page: Any) -> None:
    marks = page.evaluate(
        "[...document.querySelectorAll('.plot')].map(plot =>"
        " plot.querySelectorAll('svg .role-mark path').length)"
    )
    assert len(marks) == 6 and min(marks) > 0
    assert page.complaints == []


def test_page_and_each_table_fit_the_screen(page: Page) -> None:
    page.evaluate("for (const each of document.querySelectorAll('details')) each.open = true")
    page.wait_for_timeout(100)
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
    cut = "[...document.querySelectorAll('.wide')].filter(e => e.scrollWidth > e.clientWidth)"
    assert page.locator(".wide").count() > 2 and page.evaluate(f"{cut}.length") == 0
    page.evaluate("for (const each of document.querySelectorAll('details')) each.open = false")


def test_samples_come_before_every_figure(page: Page) -> None:
    heads = page.locator("h2").all_text_contents()
    assert heads[1:3] == ["Samples", "Summary"]


def test_rounds_are_labeled_once_and_whole(page: Page) -> None:
    labels = page.locator(".plot").first.locator(".role-axis-label text").all_text_contents()
    rounds = [label for label in labels if "." not in label]
    assert rounds == ["1", "2"]


def test_table_is_sorted_by_click_and_by_keyboard(page: Page) -> None:
    table = page.get_by_label("Training images of each class in figures").locator("table")
    page.locator("details", has=table).evaluate("each => { each.open = true }")
    head = table.locator("thead th").nth(1)

    def shown() -> list[int]:
        return [int(text) for text in table.locator("tbody td:nth-child(2)").all_text_contents()]

    counts = shown()
    assert len(counts) == 3 and head.get_attribute("aria-sort") is None
    head.locator("button").click()
    assert (head.get_attribute("aria-sort"), shown()) == ("ascending", sorted(counts))
    head.locator("button").press("Enter")
    assert head.get_attribute("aria-sort") == "descending"
    assert shown() == sorted(counts, reverse=True)
    table.locator("thead th").nth(0).locator("button").press("Space")
    assert head.get_attribute("aria-sort") is None and shown() == counts
    page.locator("details", has=table).evaluate("each => { each.open = false }")


def test_samples_are_enlarged_without_blur(page: Page) -> None:
    image = page.locator(".picture:visible img")
    box = image.bounding_box()
    assert box is not None
    page.get_by_label("Zoom").select_option("4")
    enlarged = image.bounding_box()
    assert enlarged is not None and enlarged["width"] == 4 * image.evaluate("e => e.naturalWidth")
    assert image.evaluate("e => getComputedStyle(e).imageRendering") == "pixelated"
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
    page.get_by_label("Zoom").select_option("")
    assert image.bounding_box() == box


def test_dark_screen_shows_a_dark_page_with_light_charts(browser: Browser, report: Path) -> None:
    found = {}
    for scheme in ("light", "dark"):
        context = browser.new_context(color_scheme=scheme)  # type: ignore[arg-type]
        opened = context.new_page()
        opened.goto(report.as_uri())
        found[scheme] = opened.evaluate(
            "[getComputedStyle(document.body).backgroundColor,"
            " getComputedStyle(document.querySelector('.plot')).filter]"
        )
        context.close()
    assert found["light"] == ["rgb(255, 255, 255)", "none"]
    assert found["dark"] == ["rgb(20, 23, 26)", "invert(1) hue-rotate(180deg)"]


def test_slider_moves_by_keyboard_and_changes_the_picture(page: Page) -> None:
    def shown() -> str | None:
        return page.locator(".slides .picture:visible").get_attribute("data-title")

    slider = page.get_by_label("Round of the samples")
    assert shown() == "round 2"
    slider.press("ArrowLeft")
    assert shown() == page.locator(".slider output").text_content() == "round 1"
    assert slider.get_attribute("aria-valuetext") == "round 1"


def test_client_is_highlighted_by_its_menu(page: Page) -> None:
    drawn = page.locator(".plot").first.locator("path[stroke='#1a1a1a'][stroke-width='3']")
    assert drawn.count() == 0
    page.locator(".controls select").first.select_option(label="client 2")
    assert drawn.count() == 1


def test_page_has_no_barrier_that_axe_knows(page: Page) -> None:
    found = Axe().run(page, options={"runOnly": ["wcag2a", "wcag2aa"]})
    assert found.violations_count == 0, found.generate_report()
    assert page.locator("img:not([alt]), img[alt='']").count() == 0
    assert page.locator("h1").count() == 1


def test_chart_that_fails_takes_nothing_else_with_it(
    browser: Browser, report: Path, tmp_path: Path
) -> None:
    text = report.read_text(encoding="utf-8")
    broken = tmp_path / "broken.html"
    broken.write_text(
        text.replace(
            '<script type="application/json">{', "<script type='application/json'>NaN{", 1
        ),
        encoding="utf-8",
    )
    opened = browser.new_page()
    opened.goto(broken.as_uri())
    opened.locator(".plot").nth(1).locator("svg").wait_for()
    opened.get_by_label("Round of the samples").press("ArrowLeft")
    assert opened.locator(".slider output").text_content() == "round 1"
    assert opened.locator(".plot").first.locator("svg").count() == 0
    opened.close()


def _widths(page: Page) -> list[float]:
    found: list[float] = page.evaluate(
        "[...document.querySelectorAll('.plot svg')].map(svg => svg.viewBox.baseVal.width)"
    )
    return found


def test_page_opens_the_configuration_and_draws_for_paper(page: Page) -> None:
    on_screen = _widths(page)
    page.emulate_media(media="print")
    page.evaluate("dispatchEvent(new Event('beforeprint'))")
    assert set(_widths(page)) == {330.0, 680.0}
    assert page.locator("details.code[open]").count() == 1
    assert page.locator(".slides .picture:visible").get_attribute("data-title") == "round 2"
    page.evaluate("dispatchEvent(new Event('afterprint'))")
    assert page.locator("details[open]").count() == 0
    page.emulate_media(media="screen")
    assert _widths(page) == on_screen
