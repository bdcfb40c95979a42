"""Imports point down the levels of the package, and importing it costs next to nothing."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import trl_tract

ROOT = Path(trl_tract.__file__).parent
# Folders are levels, lowest first: a file imports from its own folder and from levels below, never from a neighbour.
LEVELS = [
    {"scale", "evaluation", "text"},
    {"files", "rows", "backends", "page"},
    {"sources", "saved"},
    {"judge", "distill", "training"},
    {"runs"},
    {"demo", "integrations"},
    {"commands", "cli"},
]
LEVEL_OF = {room: level for level, rooms in enumerate(LEVELS) for room in rooms}
NEIGHBOURS = {("cli", "commands")}  # the command's entry point is one file beside its folder


def room_of(file: Path) -> str:
    return file.relative_to(ROOT).parts[0].removesuffix(".py")


def rooms_imported_by(file: Path) -> set[str]:
    """Rooms that `file` imports, at the top or inside a function; for type checkers alone does not count."""
    tree = ast.parse(file.read_text(encoding="utf-8"))
    for node in ast.walk(tree):
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            node.body = []
    names: list[str] = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}: write imports in full"
            names += [f"{node.module}.{alias.name}" for alias in node.names]
    parts = [name.split(".") for name in names]
    inside = {part[1] for part in parts if part[0] == "trl_tract" and len(part) > 1}
    return inside - {"__version__"} - set(trl_tract.__all__)


FILES = [
    file for file in sorted(ROOT.rglob("*.py")) if file.parent != ROOT or file.stem not in ("__init__", "__main__")
]


def test_every_file_stands_in_a_room_that_has_a_level():
    strangers = {room_of(file) for file in FILES} - set(LEVEL_OF)
    assert not strangers, (
        f"{sorted(strangers)} has no level. Put the file into one of the folders {sorted(LEVEL_OF)}: the lowest level "
        "whose folder says in its __init__.py that it holds such things"
    )


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(ROOT)))
def test_a_file_imports_from_its_own_folder_and_from_lower_levels(file):
    room = room_of(file)
    wrong = {
        other
        for other in rooms_imported_by(file) - {room}
        if LEVEL_OF[other] >= LEVEL_OF[room] and (room, other) not in NEIGHBOURS
    }
    assert not wrong, (
        f"{file.relative_to(ROOT)} imports {sorted(wrong)}, which do not stand below {room!r}. Move what both need to "
        f"a lower level: {LEVELS}"
    )


def test_a_folder_says_what_it_holds():
    for folder in {file.parent for file in FILES} - {ROOT}:
        first = ast.parse((folder / "__init__.py").read_text(encoding="utf-8")).body[0]
        assert isinstance(first, ast.Expr), f"{folder}/__init__.py begins with a docstring that says what is in it"


@pytest.mark.parametrize(
    ("room", "unknown"),
    [
        ("sources/prompts", {"torch", "transformers", "trl"}),
        ("evaluation", {"trl"}),
        ("scale", {"transformers", "trl"}),
        ("training/losses", {"transformers", "trl"}),
        ("judge", {"trl", "datasets"}),
        ("page", {"torch", "transformers", "trl"}),
        ("evaluation/metrics", {"torch", "transformers", "trl"}),
        ("evaluation/report", {"torch", "transformers", "trl"}),
        ("evaluation/calibration", {"torch", "transformers", "trl"}),
        ("evaluation/recalibration", {"torch", "trl"}),
        ("evaluation/intervals", {"torch", "transformers", "trl"}),
    ],
)
def test_a_room_knows_nothing_of_what_its_docstring_says(room, unknown):
    imported: set[str] = set()
    path = ROOT / room
    for file in path.rglob("*.py") if path.is_dir() else [path.with_suffix(".py")]:
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                imported |= {alias.name.split(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                imported.add(str(node.module).split(".")[0])
    assert not imported & unknown


def test_nothing_comes_from_trl_experimental():
    # Trainers vanish from there between minor versions.
    assert not [file for file in ROOT.rglob("*.py") if "trl.experimental" in file.read_text(encoding="utf-8")]


def test_the_public_names_are_sorted():
    assert list(trl_tract.__all__) == sorted(trl_tract.__all__)


def test_every_public_name_can_be_imported():
    for name in trl_tract.__all__:
        assert getattr(trl_tract, name) is not None
    assert set(trl_tract.__all__) <= set(dir(trl_tract))


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="module 'trl_tract' has no attribute 'SFTTrainer'"):
        _ = trl_tract.SFTTrainer


@pytest.mark.process
def test_importing_the_package_imports_neither_torch_nor_trl():
    code = "import sys, trl_tract; print(sorted({'torch', 'trl', 'transformers', 'datasets'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
