"""Imports point down the levels of the package, and importing it costs next to nothing."""

import ast
import subprocess
import sys

import architecture
import pytest
from architecture import LEVEL_OF, LEVELS, imported_by, name_of, room_of

import trl_tract

ROOT = architecture.PACKAGE
FILES = architecture.files()


def test_every_file_stands_in_a_room_that_has_a_level():
    strangers = {room_of(file) for file in FILES} - set(LEVEL_OF)
    assert not strangers, (
        f"{sorted(strangers)} has no level. Put the file into one of the folders {sorted(LEVEL_OF)}: the lowest level "
        "whose folder says in its __init__.py that it holds such things. docs/contributing.md has the table"
    )


@pytest.mark.parametrize("file", FILES, ids=name_of)
def test_a_file_imports_from_its_own_folder_and_from_lower_levels(file):
    room = room_of(file)
    others = {name.partition(".")[0] for name in imported_by(file)} - {room}
    wrong = {other for other in others if LEVEL_OF[other] >= LEVEL_OF[room]}
    assert not wrong, (
        f"{file.relative_to(ROOT)} imports {sorted(wrong)}, which do not stand below {room!r}. Move what both need to "
        f"a lower level: {LEVELS}"
    )


def test_files_do_not_import_each_other_in_a_circle():
    waiting = {name_of(file): imported_by(file) - {name_of(file)} for file in FILES}
    while free := {name for name, needed in waiting.items() if not needed & waiting.keys()}:
        waiting = {name: needed for name, needed in waiting.items() if name not in free}
    assert not waiting, "each of these needs another one of them: move what they share into a file of its own"


def test_imports_are_written_in_full():
    relative = [
        f"{name_of(file)}, line {node.lineno}"
        for file in FILES
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8")))
        if isinstance(node, ast.ImportFrom) and node.level
    ]
    assert not relative


def test_a_file_is_about_400_lines_at_most():
    lengths = {name_of(file): len(file.read_text(encoding="utf-8").splitlines()) for file in FILES}
    assert not {name: length for name, length in lengths.items() if length > 420}, "cut these along their ideas"


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
