"""Notebooks: run from top to bottom, and what of a run is kept in the repository.

python tests/notebooks.py        # runs all of examples/notebooks in their order and writes their outputs anew
"""

import os
import re
import sys
import tempfile
from pathlib import Path
from typing import Any

import nbformat
from nbclient import NotebookClient

NOTEBOOKS = Path(__file__).parent.parent / "examples" / "notebooks"
# A kernel sees no warnings of its own start, no progress bars of its libraries, and this checkout.
QUIET = {"HF_HUB_DISABLE_PROGRESS_BARS": "1", "TOKENIZERS_PARALLELISM": "false", "PYTHONWARNINGS": "ignore"}


def paths() -> list[Path]:
    """The notebooks in the order in which they are read; later ones use what earlier ones have saved."""
    return sorted(NOTEBOOKS.glob("*.ipynb"))


def execute(path: Path, folder: Path) -> Any:
    """Run a notebook in `folder`; the notebook with its outputs. The first error ends it.

    Raises:
        nbclient.exceptions.CellExecutionError: A cell failed.
    """
    notebook = nbformat.read(path, as_version=4)
    for name, value in QUIET.items():
        os.environ.setdefault(name, value)
    root = str(NOTEBOOKS.parent.parent)
    os.environ["PYTHONPATH"] = os.pathsep.join([root, *filter(None, [os.environ.get("PYTHONPATH")])])
    NotebookClient(
        notebook, timeout=None, kernel_name="python3", resources={"metadata": {"path": str(folder)}}
    ).execute()
    return notebook


def clean(notebook: Any) -> Any:
    """What is committed: sources and outputs, without who ran it, when, on what, and what it warned of."""
    notebook.metadata = {
        "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
        "language_info": {"name": "python"},
    }
    for number, cell in enumerate(notebook.cells):
        cell.id = f"cell-{number}"
        cell.metadata = {}
        if cell.cell_type == "code":
            cell.outputs = _joined([output for output in cell.outputs if output.get("name") != "stderr"])
            for output in cell.outputs:
                output.pop("metadata", None)
                if output.output_type in ("display_data", "execute_result"):
                    output["metadata"] = {}
                    # The text beside a picture says the size of the window that it was not shown in.
                    if "image/png" in output.data:
                        output.data.pop("text/plain", None)
    return notebook


def _joined(outputs: list[Any]) -> list[Any]:
    """What was printed in one go as one output: the kernel cuts it where its clock says so."""
    joined: list[Any] = []
    for output in outputs:
        if joined and output.output_type == joined[-1].output_type == "stream":
            joined[-1].text += output.text
        else:
            joined.append(output)
    return joined


def texts(notebook: Any) -> list[str]:
    """Everything that the outputs say in words."""
    found: list[str] = []
    for cell in notebook.cells:
        for output in cell.get("outputs", []):
            found.append(output.get("text", ""))
            data = output.get("data", {})
            found += [str(data[kind]) for kind in data if not kind.startswith("image/")]
    return found


def code(notebook: Any) -> str:
    """The code cells as one module; cell magics are left out."""
    cells = [cell.source for cell in notebook.cells if cell.cell_type == "code"]
    return "\n\n".join(re.sub(r"^%%.*\n", "", cell) for cell in cells)


def write(notebook: Any, path: Path) -> None:
    """Write a notebook as it is committed: a line of source or output on a line of its own."""
    path.write_text(nbformat.writes(notebook), encoding="utf-8", newline="\n")


if __name__ == "__main__":
    wanted = sys.argv[1:]
    with tempfile.TemporaryDirectory() as directory:
        folder = Path(os.environ.get("NOTEBOOK_FOLDER", directory))
        for notebook_path in paths():
            if not wanted or notebook_path.stem in wanted:
                print(notebook_path.name, flush=True)
                write(clean(execute(notebook_path, folder)), notebook_path)
