"""Pages from the templates of `templates/`: every value is escaped for the language of the page.

Templates of HTML, too, end with `.md`: Flower sends no files but those of a few endings to where a
run starts, `.md` among them.
"""

import base64
import hashlib
import re
from functools import cache

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

# What means something in Markdown or HTML, but "_" within a word, so that names and paths stay
# readable.
MARKS = re.compile(r"[\\`*<>\[\]|~$&!#]|(?<!\w)_|_(?!\w)")
# What begins a list or a rule where it stands first in a line.
FIRST = re.compile(r"\A(\d*)([-+=.)])(?=[-+=]*(?:\s|\Z))")


def render(template: str, **values: object) -> str:
    """Fill a template.

    Args:
        template: name of a file of `templates/`, NAME.html.md for HTML and NAME.md for Markdown; a
            value that is `Markup` is not escaped.
        **values: by the names that the template gives them.

    Returns:
        The page.

    Raises:
        jinja2.UndefinedError: a value is missing.
    """
    language = template.split(".")[1]
    # Sections add themselves to the contents as they are shown.
    return environment(language).get_template(template).render(values, contents=[])


@cache
def environment(language: str) -> Environment:
    """Return what compiles the templates of a language, "html" or "md"."""
    made = Environment(
        loader=PackageLoader("task.reporting"),
        autoescape=True,
        finalize=markdown_text if language == "md" else None,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=language == "md",
    )
    # A browser reads no NaN.
    made.policies["json.dumps_kwargs"] = {"allow_nan": False}
    made.filters["sha256"] = content_hash
    return made


def markdown_text(value: object) -> Markup:
    """Write a value as Markdown that shows it as it is, in one line.

    Source: CommonMark, where a backslash before a punctuation mark takes its meaning from it.
    """
    if hasattr(value, "__html__"):
        return Markup(value)
    words = " ".join(str(value).split())
    return Markup(FIRST.sub(r"\1\\\2", MARKS.sub(r"\\\g<0>", words)))


def content_hash(script: str) -> Markup:
    """Name a script for the policy of a page, by which a browser runs no other."""
    digest = hashlib.sha256(str(script).encode()).digest()
    return Markup("'sha256-{}'").format(base64.b64encode(digest).decode("ascii"))
