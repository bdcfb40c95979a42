"""Imports point down the levels of the package, and importing it costs next to nothing."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import trl_tract

ROOT = Path(trl_tract.__file__).parent
# Rooms, lowest level first. A room may import from its own level, without a circle, and from those below. A folder
# whose files stand on different levels is a floor of rooms; any other folder is one room.
LEVELS = [
    {"metrics", "prompts", "scores", "commands.options", "distillation.failures", "distillation.summary"}
    | {"files.blocks", "files.checkpoints", "files.journal", "grids.aspects", "grids.scales", "grids.trie"}
    | {"judging.judgement", "resampling.intervals", "resampling.pairs", "rows.sources", "text.display"}
    | {"text.markdown", "text.progress", "text.terminal", "training.neighbours"},
    {"backends", "calibration", "config", "data", "evaluate_metric", "losses", "recalibration"}
    | {"distillation.golds"}
    | {"commands.token_view", "grids.branches", "rows.aspect_columns", "rows.columns", "rows.encoding"}
    | {"rows.preferences", "rows.rendering", "rows.schemas", "rows.tokens", "saved.judge_config"}
    | {"saved.training_rows"}
    | {"training.early_warnings", "training.log_lines", "training.score_metrics"},
    {"distill", "judge", "page", "plots", "report", "rewards", "trainer"}
    | {"commands.check", "commands.estimate", "commands.parsing", "judging.aspect_judge", "judging.scoring"}
    | {"rows.onramp", "saved.dataset_card", "saved.hub", "saved.model_card", "training.score_head"},
    {"pipeline", "results", "run_spec", "steps"},
    {"cli", "demo", "commands.completion", "commands.dry_run", "commands.entry_points"},
]
LEVEL_OF = {room: level for level, rooms in enumerate(LEVELS) for room in rooms}
FLOORS = {room.split(".")[0] for room in LEVEL_OF if "." in room}


def files_of(room: str) -> list[Path]:
    path = ROOT.joinpath(*room.split("."))
    return [path.with_suffix(".py")] if path.with_suffix(".py").exists() else sorted(path.rglob("*.py"))


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
            assert node.level == 0, f"{file}: imports are written in full"
            names += [f"{node.module}.{alias.name}" for alias in node.names]
    parts = [name.split(".") for name in names]
    inside = [part[1:] for part in parts if part[0] == "trl_tract" and len(part) > 1]
    rooms = {".".join(part[:2]) if part[0] in FLOORS else part[0] for part in inside}
    return rooms - {"__version__"} - set(trl_tract.__all__)


IMPORTS = {room: set().union(*map(rooms_imported_by, files_of(room))) - {room} for room in LEVEL_OF}


def test_every_room_has_a_level():
    folders = [ROOT, *(ROOT / floor for floor in FLOORS)]
    found = {
        path
        for folder in folders
        for path in folder.iterdir()
        if path.suffix == ".py" or (path / "__init__.py").exists()
    }
    rooms = {".".join(path.relative_to(ROOT).with_suffix("").parts) for path in found if path.stem != "__init__"}
    assert rooms - FLOORS == set(LEVEL_OF)


def test_a_floor_says_what_its_rooms_are_for_and_nothing_else():
    for floor in FLOORS:
        (said,) = ast.parse((ROOT / floor / "__init__.py").read_text(encoding="utf-8")).body
        assert isinstance(said, ast.Expr)


@pytest.mark.parametrize("room", sorted(LEVEL_OF))
def test_a_room_imports_from_its_own_level_and_below(room):
    upward = {other for other in IMPORTS[room] if LEVEL_OF[other] > LEVEL_OF[room]}
    assert not upward


def test_rooms_do_not_import_in_circles():
    placed: set[str] = set()
    while ready := {room for room in IMPORTS if room not in placed and IMPORTS[room] <= placed}:
        placed |= ready
    assert placed == set(LEVEL_OF)


@pytest.mark.parametrize(
    ("room", "unknown"),
    [
        ("prompts", {"torch", "transformers", "trl"}),
        ("metrics", {"torch", "transformers", "trl"}),
        ("scores", {"transformers", "trl"}),
        ("losses", {"transformers", "trl"}),
        ("judge", {"trl", "datasets"}),
        ("page", {"torch", "transformers", "trl"}),
        ("report", {"torch", "transformers", "trl"}),
        ("calibration", {"torch", "transformers", "trl"}),
        ("recalibration", {"torch", "trl"}),
        ("resampling.intervals", {"torch", "transformers", "trl"}),
        ("rewards", {"torch", "transformers", "trl"}),
    ],
)
def test_a_room_knows_nothing_of_what_its_docstring_says(room, unknown):
    imported: set[str] = set()
    for file in files_of(room):
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


def test_importing_the_package_imports_neither_torch_nor_trl():
    code = "import sys, trl_tract; print(sorted({'torch', 'trl', 'transformers', 'datasets'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
