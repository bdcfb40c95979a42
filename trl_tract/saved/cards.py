"""Cards from the templates beside this file (`*.md.jinja`), and the parts of a card that are written again later.

Everything that a template puts in is escaped as a line of Markdown, so that no prompt, name or error message can bring
markup of its own; the filters `code`, `fenced` and `python` are the other ways in. Knows nothing of scores or models.
"""

import re
from functools import cache
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from trl_tract.text.markdown import code_span, fenced, plain_line, python_literal


def render(template: str, **values: Any) -> str:
    """A card, or a part of one."""
    return _environment().get_template(f"{template}.md.jinja").render(values)


def section(text: str, name: str, card: Path) -> str:
    """What stands in a card between `<!-- name -->` and `<!-- /name -->`."""
    found = re.search(rf"<!-- {name} -->\n(.*?)\n<!-- /{name} -->", text, re.DOTALL)
    if found is None:
        raise ValueError(
            f"{card} has no section between <!-- {name} --> and <!-- /{name} -->. Put these two lines back where the "
            "section belongs"
        )
    return found.group(1)


def with_section(text: str, name: str, content: str, card: Path) -> str:
    """The card with other content in that part; whatever else is in it stays."""
    old = section(text, name, card)
    return text.replace(f"<!-- {name} -->\n{old}\n", f"<!-- {name} -->\n{content.strip()}\n", 1)


@cache
def _environment() -> Environment:
    environment = Environment(
        loader=PackageLoader("trl_tract.saved", "."),
        autoescape=True,  # so that macros and blocks give Markup, which `_escaped` leaves alone
        finalize=_escaped,
        undefined=StrictUndefined,
        keep_trailing_newline=True,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {
        "code": lambda text: Markup(code_span(str(text))),
        "fenced": lambda text, language="": Markup(fenced(str(text), language)),
        "python": lambda value: Markup(python_literal(value)),
        "share": lambda count, total: f"{count / total:.1%}" if total else "none",
        "count": lambda number: f"{int(number):,}",
    }
    return environment


def _escaped(value: Any) -> Markup:
    return value if isinstance(value, Markup) else Markup(plain_line(str(value)))
