"""The tables of options.md and api.md, made from the options and the public names themselves.

python docs/option_tables.py          # writes them anew
python docs/option_tables.py --check  # ends with 1 if they are not up to date
"""

import dataclasses
import inspect
import re
import sys
from pathlib import Path

import trl

import trl_tract
from trl_tract.commands.entry_points import COMMANDS, _option_groups
from trl_tract.commands.parsing import host_fields

PAGE = Path(__file__).with_name("options.md")
NAMES_PAGE = Path(__file__).with_name("api.md")
NAMES = re.compile(r"(?<=<!-- names -->\n\n).*?(?=\n\n<!-- /names -->)", re.DOTALL)
TABLES = re.compile(r"(?<=<!-- options -->\n\n).*?(?=\n\n<!-- /options -->)", re.DOTALL)


def table(kind: type) -> str:
    """One group of options: heading, what it is about, a row for each option."""
    theirs = host_fields(kind)
    rows = []
    for field in dataclasses.fields(kind):
        if field.name in theirs:
            continue
        default = field.default if field.default_factory is dataclasses.MISSING else field.default_factory()
        shown = "required" if default is dataclasses.MISSING else "" if default is None else f"`{_written(default)}`"
        text = " ".join(str(field.metadata.get("help", "")).split()).replace("%%", "%")
        if choices := field.metadata.get("choices"):
            text += f" One of {', '.join(f'`{choice}`' for choice in choices)}."
        rows.append(f"| `--{field.name}` | {shown} | {text.replace('|', chr(92) + '|')} |")
    own = {"TRACTConfig": "TRACT's own settings", "REALConfig": "The reinforcement stage's own settings"}
    about = own.get(kind.__name__) or str(kind.__doc__).strip().rstrip(".")
    return "\n".join(
        [f"## {kind.__name__}", "", f"{about}.", "", "| option | default | what it does |", "|---|---|---|", *rows]
    )


def _written(default: object) -> str:
    if isinstance(default, bool):
        return str(default).lower()
    return " ".join(f"{each:g}" for each in default) if isinstance(default, list) else str(default)


def page() -> str:
    """The page with its tables as they should be."""
    groups = {kind: None for command in COMMANDS if command != "completion" for kind in _option_groups(command)}
    tables = "\n\n".join(table(kind) for kind in groups if kind is not trl.ModelConfig)
    return TABLES.sub(lambda _: tables, PAGE.read_text(encoding="utf-8"))


def names() -> str:
    """api.md with its table of public names as it should be: the rest of that page is there on the site alone."""
    rows = []
    for name in trl_tract.__all__:
        thing = getattr(trl_tract, name)
        sentence = " ".join(str(inspect.getdoc(thing)).split("\n\n")[0].split()).split(": `")[0]
        source = str(thing.__module__).replace(".", "/")
        text = sentence.rstrip(".").replace("|", "\\|")
        rows.append(f"| `{name}` | {text} | `{source}.py` |")
    table = "\n".join(["| name | what it is | its arguments are in the docstring in |", "|---|---|---|", *rows])
    return NAMES.sub(lambda _: table, NAMES_PAGE.read_text(encoding="utf-8"))


if __name__ == "__main__":
    if "--check" in sys.argv:
        sys.exit(PAGE.read_text(encoding="utf-8") != page() or NAMES_PAGE.read_text(encoding="utf-8") != names())
    PAGE.write_text(page(), encoding="utf-8")
    NAMES_PAGE.write_text(names(), encoding="utf-8")
