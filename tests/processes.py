"""Processes for tests at the price of a fork: a server has imported everything before.

Whatever starts a process here or an interpreter elsewhere is marked `process`. `tests/conftest.py` sees to that, and
has one worker run all such tests, so that there is one server.
"""

import contextlib
import gc
import multiprocessing
import multiprocessing.forkserver
import os
import runpy
import socket
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from datetime import timedelta
from typing import Any

import pytest

CONTEXT = multiprocessing.get_context("forkserver")
# With what the files of tests import: a process imports the one that its target stands in.
PRELOADED = ["conftest", "tiny", "trl_tract.cli", "trl_tract.runs.pipeline"]


def start(target: Callable[..., Any], *args: Any) -> Any:
    """A process that has begun `target(*args)`: `join`, `exitcode`, `kill`."""
    _ensure_server()
    process = CONTEXT.Process(target=_begin, args=(target, *args))
    process.start()
    return process


def start_module(module: str, *arguments: str) -> Any:
    """A process that does what `python -m module arguments...` does."""
    return start(_run_module, module, arguments)


@contextlib.contextmanager
def two_ranks() -> Iterator[Callable[..., list[Any]]]:
    """A function that calls a function on two ranks of one gloo group and gives what both return, rank 0 first."""
    _ensure_server()
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with contextlib.ExitStack() as stack:
        ranks = [stack.enter_context(ProcessPoolExecutor(1, CONTEXT, _join, (rank, port))) for rank in (0, 1)]
        yield lambda function, *args: [done.result() for done in [rank.submit(_job, function, *args) for rank in ranks]]


def _ensure_server() -> None:
    CONTEXT.set_forkserver_preload(PRELOADED)
    # Python 3.11 does not hand `sys.path` on to the server, and passes over in silence what the server cannot import.
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", os.pathsep.join(sys.path))
        patch.setenv("DS_ACCELERATOR", "cpu")  # DeepSpeed takes the CPU only when told to
        multiprocessing.forkserver.ensure_running()


def _begin(target: Callable[..., Any], *args: Any) -> None:
    gc.freeze()  # what is imported stays: a full collection, as training ends with one, need not look at it
    target(*args)


def _run_module(module: str, arguments: tuple[str, ...]) -> None:
    sys.argv = [module, *arguments]
    sys.modules.pop(module, None)
    runpy.run_module(module, run_name="__main__")


def _join(rank: int, port: int) -> None:
    import torch

    gc.freeze()
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2"}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    # A rank whose other one failed gives up after this time.
    torch.distributed.init_process_group("gloo", timeout=timedelta(seconds=60))


def _job(function: Callable[..., Any], *args: Any) -> Any:
    from accelerate.state import AcceleratorState

    try:
        return function(*args)
    finally:
        AcceleratorState._reset_state(reset_partial_state=True)  # the next job may shard, or not
