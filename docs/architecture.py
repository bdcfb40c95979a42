"""The rooms of the package and what they import, read from the sources: figures, a picture and a table for the pages.

    python docs/architecture.py          # writes the picture and the tables anew, and prints the figures
    python docs/architecture.py --check  # ends with 1 if they are not up to date, or a figure is over its limit

Knows nothing of what the code does.
"""

import ast
import functools
import re
import sys
from pathlib import Path

PACKAGE = Path(__file__).parents[1] / "trl_tract"
PICTURE = PACKAGE.parent / "docs" / "assets" / "architecture.svg"
PAGES = [PACKAGE.parent / "README.md", PACKAGE.parent / "docs" / "architecture.md"]
TABLE = re.compile(r"(?<=<!-- rooms -->\n\n).*?(?=\n\n<!-- /rooms -->)", re.DOTALL)
# Folders are levels, lowest first: a file imports from its own folder and from levels below, never from a neighbour.
LEVELS = [
    ("scale", "evaluation", "text"),
    ("files", "rows", "backends", "page"),
    ("sources", "saved"),
    ("judge", "distill"),
    ("training",),
    ("runs",),
    ("demo", "integrations"),
    ("commands",),
]
LEVEL_OF = {room: level for level, rooms in enumerate(LEVELS) for room in rooms}
MOST = {"rooms": 17, "levels": 8, "uphill imports": 0}
LINES = 15_600  # a goal, not yet reached: docs/decisions.md


def files() -> list[Path]:
    """The files of the package that stand in a room: all but its face."""
    return [file for file in sorted(PACKAGE.rglob("*.py")) if file != PACKAGE / "__init__.py"]


def name_of(file: Path) -> str:
    """The dotted name of a file's module, without the package's."""
    parts = file.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(part for part in parts if part != "__init__")


def room_of(file: Path) -> str:
    """The folder under the package that a file stands in; `cli.py`, the door to the commands, is one of them."""
    return _room(name_of(file))


def _room(name: str) -> str:
    room = name.partition(".")[0]
    return "commands" if room == "cli" else room


@functools.cache
def imported_by(file: Path) -> frozenset[str]:
    """Modules of the package, as in `name_of`, that a file imports, inside functions too, not for type checkers."""
    tree = ast.parse(file.read_text(encoding="utf-8"))
    for node in ast.walk(tree):
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            node.body = []
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            # `from folder import file` names a file, `from file import function` does not.
            folder = PACKAGE.parent / str(node.module).replace(".", "/")
            inside = {alias.name for alias in node.names if (folder / f"{alias.name}.py").exists()}
            found |= {f"{node.module}.{name}" for name in inside}
            if len(inside) < len(node.names):
                found.add(str(node.module))
    return frozenset(name.removeprefix("trl_tract.") for name in found if name.startswith("trl_tract."))


def rooms() -> dict[str, set[str]]:
    """Room -> the other rooms that its files import from."""
    found: dict[str, set[str]] = {}
    for file in files():
        found.setdefault(room_of(file), set()).update(map(_room, imported_by(file)))
    return {room: others - {room} for room, others in found.items()}


def uphill() -> list[str]:
    """Imports that do not lead to a lower level."""
    return [
        f"{name_of(file)} -> {name}"
        for file in files()
        for name in sorted(imported_by(file))
        if (other := _room(name)) != room_of(file) and LEVEL_OF[other] >= LEVEL_OF[room_of(file)]
    ]


def figures() -> dict[str, int]:
    """What MOST has limits for, and the lines of the package."""
    found = rooms()
    lines = sum(len(file.read_text(encoding="utf-8").splitlines()) for file in PACKAGE.rglob("*.py"))
    return {
        "rooms": len(found),
        "levels": len({LEVEL_OF[room] for room in found}),
        "uphill imports": len(uphill()),
        "lines": lines,
    }


def picture() -> str:
    """Rooms by level, an arrow for each import that no path of other arrows stands for."""
    found = rooms()
    width, height, across, down = 128, 36, 150, 84
    levels = [[room for room in level if room in found] for level in LEVELS]
    levels = [level for level in levels if level]
    place = {
        room: ((max(map(len, levels)) - len(level)) * across / 2 + i * across + 12, (len(levels) - 1 - n) * down + 12)
        for n, level in enumerate(levels)
        for i, room in enumerate(level)
    }
    arrows = [
        f'<line x1="{place[room][0] + width / 2:g}" y1="{place[room][1] + height:g}" '
        f'x2="{place[other][0] + width / 2:g}" y2="{place[other][1] - 3:g}"/>'
        for room in place
        for other in sorted(found[room])
        if not any(other in _reached(found, between) for between in found[room] - {other})
    ]
    boxes = [
        f'<rect x="{x:g}" y="{y:g}" width="{width}" height="{height}" rx="6"/>'
        f'<text x="{x + width / 2:g}" y="{y + height / 2 + 5:g}">{room}</text>'
        for room, (x, y) in place.items()
    ]
    size = f"{max(map(len, levels)) * across:g} {len(levels) * down - down + height + 24:g}"
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {size}" role="img" aria-label="Rooms by level">\n'
        "<style>line{stroke:#888;marker-end:url(#a)}marker{fill:#888}rect{fill:#00897b}"
        "text{fill:#fff;font:15px sans-serif;text-anchor:middle}</style>\n"
        '<marker id="a" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="7" markerHeight="7" orient="auto">'
        '<path d="M0 0L8 4L0 8z"/></marker>\n' + "\n".join([*arrows, *boxes]) + "\n</svg>\n"
    )


def _reached(graph: dict[str, set[str]], start: str) -> set[str]:
    found, waiting = set(), {start}
    while waiting:
        room = waiting.pop()
        new = graph[room] - found
        found |= new
        waiting |= new
    return found


def table() -> str:
    """Rooms from the top down, each with the first sentence of its docstring."""
    lines = ["| level | folder | what is in it |", "|---|---|---|"]
    for level in reversed(range(len(LEVELS))):
        for room in LEVELS[level]:
            file = next((f for f in (PACKAGE / room / "__init__.py", PACKAGE / f"{room}.py") if f.exists()), None)
            if file is not None:
                says = ast.get_docstring(ast.parse(file.read_text(encoding="utf-8"))) or ""
                lines.append(f"| {level + 1} | `{room}` | {' '.join(says.split(chr(10) * 2)[0].split())} |")
    return "\n".join(lines)


def written() -> dict[Path, str]:
    """File -> its text as the sources are now."""
    new = table()
    pages = {page: TABLE.sub(lambda match: new, page.read_text(encoding="utf-8")) for page in PAGES}
    return {PICTURE: picture(), **pages}


def stale() -> list[str]:
    """Files that are not what `written` says."""
    return [
        f"{file.name} is not what the sources are: python docs/architecture.py writes it anew"
        for file, text in written().items()
        if not file.exists() or file.read_text(encoding="utf-8") != text
    ]


def main() -> None:
    """Print the figures; write the files, or compare them."""
    found = figures()
    for name, number in found.items():
        print(f"{name}: {number:,} " + (f"(at most {MOST[name]:,})" if name in MOST else f"(goal: {LINES:,})"))
    problems = [f"too many {name}" for name in MOST if found[name] > MOST[name]] + uphill()
    if "--check" in sys.argv:
        problems += stale()
    else:
        for file, text in written().items():
            file.write_text(text, encoding="utf-8")
    if problems:
        sys.exit("\n".join(problems))


if __name__ == "__main__":
    main()
