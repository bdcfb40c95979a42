"""What an import costs is what it imports: heavy modules wait until they are needed. Measured in docs/benchmarks.md."""

import ast
import subprocess
import sys

import pytest
from pages import ROOT

# Hundreds of modules each, needed for one thing each. What TRL and datasets import themselves is not among them.
HEAVY = {"bitsandbytes", "evaluate", "gguf", "matplotlib", "scipy", "sklearn", "vllm"}


def imported_at_once(file) -> set[str]:
    """Modules that are imported with the file: not inside functions, not for type checkers alone."""
    found: set[str] = set()
    waiting = list(ast.parse(file.read_text(encoding="utf-8")).body)
    while waiting:
        node = waiting.pop()
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            continue
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            continue
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found.add(str(node.module))
        waiting += [child for child in ast.iter_child_nodes(node) if isinstance(child, ast.stmt)]
    return found


def reached_from(module: str) -> set[str]:
    """Modules that are imported with a module of this package, and with those in turn."""
    found, waiting = set(), {module}
    while waiting:
        name = waiting.pop()
        found.add(name)
        path = ROOT / name.replace(".", "/")
        files = [file for file in (path.with_suffix(".py"), path / "__init__.py") if file.exists()]
        waiting |= {each for file in files for each in imported_at_once(file)} - found
    return found


def outermost(modules: set[str]) -> set[str]:
    return {module.partition(".")[0] for module in modules}


def test_no_room_imports_a_heavy_module_before_it_is_needed():
    rooms = {
        file.relative_to(ROOT).as_posix(): outermost(imported_at_once(file)) & HEAVY
        for file in ROOT.glob("trl_tract/**/*.py")
    }
    assert rooms
    assert not {room: heavy for room, heavy in rooms.items() if heavy}


def test_backends_come_without_an_http_client_until_a_server_is_asked_for():
    assert "aiohttp" in outermost(reached_from("trl_tract.backends.server"))
    assert "aiohttp" not in outermost(reached_from("trl_tract.backends"))


@pytest.mark.parametrize("room", ["files", "backends", "distill", "judge"])
def test_what_runs_for_hours_reads_no_clock_that_can_be_set(room):
    # A system's clock jumps; `time.monotonic` does not.
    clocks = {"time.time", "time.time_ns", "datetime.now", "datetime.datetime.now", "datetime.utcnow", "time.localtime"}
    read = {
        f"{file}: {node.lineno}"
        for file in (ROOT / "trl_tract" / room).glob("*.py")
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8")))
        if isinstance(node, ast.Attribute) and ast.unparse(node) in clocks
    }
    assert not read


@pytest.mark.process
def test_the_help_of_the_command_imports_nothing_that_is_not_python_s_own_or_this_package_s():
    code = "import sys; before = set(sys.modules); from trl_tract.cli import main; main(['--help'])\n"
    code += "print({name.partition('.')[0] for name in set(sys.modules) - before} - sys.stdlib_module_names)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "{'trl_tract'}"
