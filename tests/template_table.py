"""The table of docs/templates.md: what each chat template that TRL ships does around a rationale.

`python tests/template_table.py` writes it into the page.
"""

from pathlib import Path

import trl
from template_tokenizers import TEMPLATES, template_tokenizer

from trl_tract.rows.frame import Frame
from trl_tract.rows.template import Template, TemplateSettings
from trl_tract.scale.text import ScoreNotFoundError

PAGE = Path(__file__).parents[1] / "docs" / "templates.md"
BEGIN, END = "<!-- table: tests/template_table.py -->\n", "<!-- end of table -->\n"
ROW = {"prompt": [{"role": "user", "content": " Judge. \n"}]}


def table() -> str:
    """A line for each template; one with a `_training` variant that does the same stands for both."""
    lines = [
        f"Templates of TRL {trl.__version__}, each rendered with a question and a rationale.\n",
        "| template | `off`: between question and rationale | `rationale`: thinking starts with, ends with "
        "| after the score | added before the question | removed |",
        "|---|---|---|---|---|---|",
    ]
    described = {name: _described(name) for name in TEMPLATES}
    for name, cells in described.items():
        base = name.removesuffix("_training")
        if name != base and described[base] == cells:
            continue
        both = " (and `_training`)" if described.get(f"{name}_training") == cells else ""
        lines.append(f"| `{name}`{both} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def _described(name: str) -> list[str]:
    off = Template(template_tokenizer(name), TemplateSettings(thinking="off", date="2026-01-31"))
    frame = off.frame()
    try:
        inside: Frame | None = Template(off.tokenizer, TemplateSettings(thinking="rationale")).frame()
    except ScoreNotFoundError:
        inside = None
    opener = "" if inside is None or inside.block is None else inside.block[0]
    asked = off.ask(ROW)
    adds = off.before(ROW)
    switch = ", ".join(f"`{key}={value}`" for key, value in frame.variables.items())
    given = asked.text.rpartition("Judge.")[2].removeprefix(" \n")
    return [
        f"{_code(given)}{f' by {switch}' if switch else ''}",
        "none" if inside is None else f"{_code(opener)}, {_code(inside.closing)}",
        _code(frame.ending) if frame.ending else "nothing",
        _code(adds if len(adds) <= 60 else f"{adds[:30]}…{adds[-20:]}") + (", a date" if off.writes_date else ""),
        "white space at the ends of a message" if " Judge. \n" not in asked.text else "nothing",
    ]


def _code(text: str) -> str:
    return f"`{text.replace('|', chr(92) + '|')}`".replace("\n", "⏎") if text else "nothing"


if __name__ == "__main__":
    page = PAGE.read_text(encoding="utf-8")
    before, _, rest = page.partition(BEGIN)
    PAGE.write_text(before + BEGIN + table() + END + rest.partition(END)[2], encoding="utf-8")
