"""Words that mean something in Markdown or HTML, read back by a parser of CommonMark."""

import random
import string
from html.parser import HTMLParser

import pytest
from markdown_it import MarkdownIt

from task.reporting.rendering import environment

HOSTILE = [
    "<script>alert(1)</script>",
    "</td><img src=x onerror=alert(2)>",
    'it\'s "a" `b` *c* _d_ **e** ~~f~~',
    "a|b",
    "a\\b\\|c",
    "[x](javascript:alert(3)) ![y](http://z/a.png)",
    "&lt;b&gt; &amp;",
    "# x",
    "- y",
    "1. z",
    "2)",
    "---",
    "===",
    "> q",
    "+ p",
    "run_name a_b",
    "$\\frac{1}{2}$",
]


class Read(HTMLParser):
    """The elements and the text of what Markdown became."""

    def __init__(self, markdown: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.texts: list[str] = []
        self.feed(MarkdownIt("commonmark").enable(["table", "strikethrough"]).render(markdown))

    def handle_starttag(self, tag: str, attrs: object) -> None:
        self.tags.append(tag)
        self.texts.append("")

    def handle_data(self, data: str) -> None:
        if data.strip():
            self.texts[-1] += data


def written(template: str, **values: object) -> str:
    parts = '{% from "parts.md" import listing, table %}'
    return environment("md").from_string(parts + template).render(values)


def random_texts() -> list[str]:
    chosen = random.Random(0)
    signs = string.punctuation + " 1ab"
    return ["".join(chosen.choices(signs, k=chosen.randint(1, 12))) for _ in range(500)]


@pytest.mark.parametrize("texts", [HOSTILE, random_texts()], ids=["hostile", "random"])
def test_text_is_shown_as_it_is(texts: list[str]) -> None:
    for text in texts:
        shown = " ".join(text.split())
        if not shown:
            continue
        line = Read(written("{{ text }}", text=text))
        assert (line.tags, line.texts) == (["p"], [shown]), text
        item = Read(written("{{ listing([text]) }}", text=text))
        assert (item.tags, item.texts[1]) == (["ul", "li"], shown), text
        cells = Read(written('{{ table(["", text], [[text, text]]) }}', text=text))
        assert cells.tags.count("td") == cells.tags.count("th") == 2, text
        assert cells.texts.count(shown) == 3, text


def test_names_and_paths_stay_readable() -> None:
    text = "partition.beta /x/run_name n=500 -0.5 a_b"
    assert written("{{ text }}", text=text) == text
