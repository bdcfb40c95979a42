"""How the tests are run, the fixtures that many of them share, and the names of `tiny.py`."""

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import ast
import functools
import gc
import importlib
import importlib.util
import shutil
import signal
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import settings as hypothesis_settings
from processes import two_ranks as open_two_ranks

# A shell starts what it puts into the background with Ctrl-C ignored, and so would the tests of Ctrl-C be.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

# The same examples in every run, none remembered on disk, no clock on a busy machine.
hypothesis_settings.register_profile("tests", database=None, derandomize=True, deadline=None)
hypothesis_settings.load_profile("tests")


NEEDED_BY = {"inspect_ai": "trl_tract/integrations/inspect_ai.py", "mlflow": "trl_tract/integrations/mlflow.py"}
"""Packages of extras that the tests do without, and the file of ours that cannot be imported where one is missing."""


def pytest_configure(config: pytest.Config) -> None:
    """Leave out what cannot be imported for its doctests: `collect_ignore` would hold below `tests` alone."""
    missing = [file for package, file in NEEDED_BY.items() if importlib.util.find_spec(package) is None]
    config.option.ignore = [*(config.option.ignore or []), *(str(config.rootpath / file) for file in missing)]
    # The package waits for the disk many times. Real weights would fill the memory.
    memory = Path("/dev/shm")
    if "not slow" in config.option.markexpr and os.access(memory, os.W_OK) and shutil.disk_usage(memory).free > 2**32:
        os.environ.setdefault("PYTEST_DEBUG_TEMPROOT", str(memory))


def __getattr__(name: str) -> Any:
    # On demand: the process that hands the tests out to others would wait seconds for torch and use nothing of it.
    if name.startswith(("_", "pytest", "collect")):
        raise AttributeError(name)
    return getattr(importlib.import_module("tiny"), name)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """With several workers: a file belongs to one of them, and all that starts processes to one of them.

    The tests of templates, which share nothing, go one by one to whoever has time: they come last and take the longest.
    """
    if config.getvalue("dist") != "load":
        return None
    from xdist.scheduler import LoadScopeScheduling

    class ByFile(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            file, *_, test = nodeid.partition("[")[0].split("::")
            if file.startswith("tests/test_template"):
                return nodeid
            return "process" if {test, "pytestmark"} & _marked(config.rootpath / file) else file

    config.option.loadscopereorder = False
    return ByFile(config, log)


@functools.cache
def _marked(file: Path) -> set[str]:
    """The tests of a file that are marked `process`, read from its text: who hands tests out sees their names alone."""
    found = set()
    for node in ast.parse(file.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.Assign) and "mark.process" in ast.unparse(node):
            found.add(ast.unparse(node.targets[0]))
        elif isinstance(node, ast.FunctionDef) and any("mark.process" in ast.unparse(d) for d in node.decorator_list):
            found.add(node.name)
    return found


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """First what starts processes: one worker is at it for as long as the others are at the rest.

    What needs an environment with vLLM is left out unless `-m` names it.
    """
    if hasattr(config, "workerinput"):
        items.sort(key=lambda item: item.get_closest_marker("process") is None)
    if "vllm" not in config.option.markexpr:
        config.hook.pytest_deselected(items=[item for item in items if item.get_closest_marker("vllm")])
        items[:] = [item for item in items if not item.get_closest_marker("vllm")]


def pytest_collection_finish() -> None:
    _keep_modules()


_running: list[pytest.Item] = []
_kept = 0


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Any:
    """Tell `_only_where_marked` which test is running."""
    _running[:] = [item]
    try:
        return (yield)
    finally:
        if len(sys.modules) > _kept + 100:
            _keep_modules()


def _keep_modules() -> None:
    """Every training ends with a full collection of garbage: it need not look at the modules again, which stay."""
    global _kept
    _kept = len(sys.modules)
    gc.collect()
    gc.freeze()


def _only_where_marked(event: str, arguments: tuple[Any, ...]) -> None:
    """An interpreter that is started costs seconds: `-m "not slow and not process"` promises to start none."""
    if event == "subprocess.Popen" and str(arguments[0]).startswith(sys.prefix) and _running:
        marks = {mark.name for mark in _running[0].iter_markers()}
        if not marks & {"process", "slow", "vllm"}:
            raise AssertionError(f"{_running[0].nodeid} starts {arguments[1]}: mark it `process`")


sys.addaudithook(_only_where_marked)


@pytest.fixture(scope="session")
def two_ranks() -> Any:
    """`two_ranks(function, *args)`: what a function returns on each of two ranks; one launch serves all tests."""
    with open_two_ranks() as call:
        yield call


@pytest.fixture(scope="module")
def without_matplotlib() -> Any:
    """Runs end without a page, whose pictures take more than a second: for files that look at other things."""
    with pytest.MonkeyPatch.context() as patch:
        for name in ("matplotlib", "matplotlib.figure"):
            patch.setitem(sys.modules, name, None)
        yield


@pytest.fixture(scope="session")
def mistral_tokenizer() -> Any:
    """The real Mistral-7B-Instruct-v0.2 vocabulary in transformers' own Llama tokenizer."""
    from tiny import make_mistral_tokenizer

    return make_mistral_tokenizer()


@pytest.fixture(scope="session")
def tokenizer() -> Any:
    """SmolLM2's kind."""
    from tiny import make_tokenizer

    return make_tokenizer()


@pytest.fixture(scope="session")
def vocabularies(mistral_tokenizer: Any) -> dict[str, Any]:
    """Such as write a number digit by digit, or some numbers as one token, and a real one."""
    from tiny import make_tokenizer

    made = {"splitting": make_tokenizer(), "merging": make_tokenizer(split_digits=False)}
    return {**made, "mistral": mistral_tokenizer}


@pytest.fixture(scope="session")
def seed_model(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The directory of a random model and its tokenizer."""
    from tiny import save_seed

    return save_seed(tmp_path_factory.mktemp("seed"))
