"""The blocks of a run, done by workers of a Ray cluster: one actor for each GPU, or for a share of the CPUs.

Only the process that hands the blocks out touches the output directory. A worker whose process or machine dies is
started again by Ray, and its blocks are done again. Knows nothing of what is done with rows.
"""

import logging
import os
import platform
import queue
import secrets
import shutil
import tempfile
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from trl_tract.files.blocks import Record, Report
from trl_tract.files.crew import Crew
from trl_tract.files.journal import differences
from trl_tract.files.shards import Shard

logger = logging.getLogger(__name__)

_CALLS = 32  # threads of a worker; its engine may take fewer calls at once
_TRIES = 10  # times that a block is done again because its worker died
_RESTARTS = 100
_PATIENCE = 60  # seconds without a worker until that is said
_OBJECTS = 2**28  # bytes of Ray's object store, where it is started here: blocks of text
_FOLDER = "trl-tract-ray-"
_TOKEN = secrets.token_hex(32)


class _Worker:
    """The actor. What it needs is loaded at its first call, so that what is wrong with that is an error of the call."""

    def __init__(self, load: bytes) -> None:
        self._load = load
        self._loading = threading.Lock()
        self._crew: Crew | None = None

    def made_with(self) -> tuple[str, Mapping[str, Any], int]:
        """This machine's name, what its records depend on, and the blocks that it takes at once."""
        crew = self._loaded()
        return platform.node(), crew.made_with, crew.max_calls

    def do(self, rows: Sequence[Any], first: int) -> list[Record]:
        """The records of a block."""
        crew = self._loaded()
        with self._room:
            return crew.do(list(rows), first, lambda count: None)

    def _loaded(self) -> Crew:
        with self._loading:
            if self._crew is None:
                from ray import cloudpickle

                from trl_tract.text.progress import hide_bars_of_libraries
                from trl_tract.text.terminal import hide_host_warnings

                hide_bars_of_libraries()
                hide_host_warnings()
                try:
                    self._crew = cloudpickle.loads(self._load)()
                except Exception as error:
                    raise RuntimeError(f"a worker on {platform.node()} cannot start: {error}") from error
                self._room = threading.Semaphore(self._crew.max_calls)
            return self._crew


class _Team:
    """Workers, each of which has the block that it is at and the next one."""

    def __init__(self, ray: Any, actors: Sequence[Any], known: Mapping[str, Any]) -> None:
        self._ray = ray
        self._actors = actors
        self._known = dict(known)
        self._comparing = threading.Lock()
        self._free: queue.Queue[Any] = queue.Queue()
        for actor in actors:
            threading.Thread(target=self._welcome, args=(actor,), daemon=True).start()

    def crew(self) -> Crew:
        """The team, as soon as its first worker has begun."""
        self._free.put(self._next())
        calls = self._calls * len(self._actors)
        return Crew(self._do, self._known, calls, self.dismiss)

    def dismiss(self) -> None:
        """End all workers."""
        for actor in self._actors:
            with suppress(self._ray.exceptions.RayError):
                self._ray.kill(actor)

    def _welcome(self, actor: Any) -> None:
        try:
            machine, made_with, calls = self._get(actor.made_with.remote(), "no row was done")
            with self._comparing:
                there = {name: made_with.get(name) for name in self._known}
                if changed := differences(self._known, there):
                    raise RuntimeError(
                        f"a worker on {machine} would give different results ({'; '.join(changed[:5])}; 'there' is the "
                        "machine where the command was started). Use the same files and the same version of trl-tract "
                        "on all machines"
                    )
                self._known |= made_with
                self._calls = calls + 1
        except Exception as error:
            self._free.put(error)
            return
        for _ in range(self._calls):
            self._free.put(actor)

    def _next(self) -> Any:
        while True:
            try:
                actor = self._free.get(timeout=_PATIENCE)
            except queue.Empty:
                total, free = self._ray.cluster_resources(), self._ray.available_resources()
                has = ", ".join(f"{free.get(name, 0):g} of {total.get(name, 0):g} {name}s" for name in ("GPU", "CPU"))
                logger.warning("waiting for a worker; free in the cluster: %s", has)
                continue
            if isinstance(actor, Exception):
                self._free.put(actor)  # whoever comes next has to know as well
                raise actor
            return actor

    def _do(self, rows: list[Any], first: int, report: Report) -> list[Record]:
        actor = self._next()
        try:
            where = f"rows {first} to {first + len(rows) - 1} were not done"
            return self._get(actor.do.remote(rows, first), where)  # type: ignore[no-any-return]
        finally:
            self._free.put(actor)

    def _get(self, reference: Any, failed: str) -> Any:
        """What a worker returns, or its own exception."""
        errors = self._ray.exceptions
        try:
            return self._ray.get(reference)
        except errors.RayTaskError as error:
            raise error.cause from None
        except errors.RayError as error:
            reason = " ".join(str(error).split())
            raise RuntimeError(
                f"{failed}, because a Ray worker or its machine died more than {_TRIES} times: {reason}. Finished "
                "blocks are on disk. Fix the cause and run the same command again"
            ) from error


@contextmanager
def ray_crew(
    load: Callable[[], Crew],
    known: Mapping[str, Any],
    *,
    workers: int | None = None,
    backend: Mapping[str, Any],
    say: Callable[[str], None] = print,
) -> Iterator[Crew]:
    """Workers of a Ray cluster, for as long as a run takes; RAY_ADDRESS says where it is, else it is started here.

    Args:
        load: What each worker calls to load its model.
        known: Of all that the records depend on, what is known here; a worker that differs is refused.
        workers: How many. None: one for each GPU, or each machine, of the cluster.
        backend: Arguments of `make_backend`: an engine that spreads a model over several GPUs gets as many.
        say: Told who is at work.

    Raises:
        ImportError: Ray is not installed.
        ValueError: A server would do the work, or the machine is too small for that many workers.
        RuntimeError: A worker cannot begin, or has another model; or this is one of several processes of a launcher.
    """
    if backend.get("name") == "server":
        raise ValueError(
            "--engine ray has no effect with --backend server, where the server generates. Leave --engine out"
        )
    if Shard.from_launcher().count > 1:
        raise RuntimeError("--engine ray starts its own workers. Start the command once, without a launcher")
    try:
        import ray
    except ImportError as error:
        raise ImportError('--engine ray needs Ray: pip install "trl-tract[ray]"') from error
    with _connected(ray) as here:
        resources, count = _shares([node for node in ray.nodes() if node["Alive"]], workers, _cards(backend), here)
        actor = ray.remote(_Worker).options(
            **resources, max_restarts=_RESTARTS, max_task_retries=_TRIES, max_concurrency=_CALLS
        )
        each = " and ".join(f"{amount} {name[4:-1].upper()}{'s' * (amount > 1)}" for name, amount in resources.items())
        say(f"Running on {count} Ray workers {'on this machine' if here else 'in the cluster'}, each with {each}")
        packed = ray.cloudpickle.dumps(load)
        team = _Team(ray, [actor.remote(packed) for _ in range(count)], known)
        try:
            yield team.crew()
        finally:
            team.dismiss()


def _cards(backend: Mapping[str, Any]) -> int:
    """GPUs that one engine takes."""
    cards = 1
    for name in ("tensor_parallel_size", "pipeline_parallel_size", "data_parallel_size"):
        cards *= int(backend.get(name, 1))
    return cards


def _shares(
    nodes: Sequence[Mapping[str, Any]], workers: int | None, cards: int, here: bool
) -> tuple[dict[str, int], int]:
    """What each worker gets, and how many there are; a worker never spans machines."""
    gpus = [int(node["Resources"].get("GPU", 0)) // cards for node in nodes]
    cpus = [int(node["Resources"].get("CPU", 0)) for node in nodes]
    if any(gpus):
        count, most = workers or sum(gpus), sum(gpus)
        resources = {"num_gpus": cards, "num_cpus": 1}
    else:
        count, most = workers or sum(map(bool, cpus)), sum(cpus)
        share = next((share for share in range(max(cpus), 1, -1) if sum(own // share for own in cpus) >= count), 1)
        resources = {"num_cpus": share}
    if workers is not None and workers < 1:
        raise ValueError(f"--num_processes {workers} must be 1 or more")
    if here and count > most:  # a cluster may still grow
        raise ValueError(f"--num_processes {count}: this machine has resources for {most} workers")
    return resources, count


@contextmanager
def _connected(ray: Any) -> Iterator[bool]:
    """Be connected to a cluster: the one there is, or one of this machine alone; whether it is that."""
    if ray.is_initialized():
        yield False
        return
    settings: dict[str, Any] = {"logging_level": logging.ERROR}
    address = os.environ.get("RAY_ADDRESS")
    if address and address.startswith("ray://"):
        raise ValueError(
            f"RAY_ADDRESS={address} is an address for Ray Client, which is not supported. Run the command on a machine "
            "of the cluster, for example with `ray job submit`, and with RAY_ADDRESS=auto"
        )
    with ExitStack() as stack:
        if not address:
            stack.enter_context(_own_environment())
            settings |= {"include_dashboard": False, "_temp_dir": str(stack.enter_context(_folder()))}
            # Ray's own default is a niceness of 15: behind all else that the machine does.
            settings |= {"object_store_memory": _OBJECTS, "_system_config": {"worker_niceness": 0}}
        stack.callback(ray.shutdown)
        ray.init(address or "local", **settings)
        yield not address


@contextmanager
def _own_environment() -> Iterator[None]:
    """Ray listens on all interfaces: with a token, which is not left in a file. And it reports no usage."""
    wanted = {"RAY_AUTH_TOKEN": _TOKEN, "RAY_USAGE_STATS_ENABLED": "0"}
    before = {name: os.environ.get(name) for name in (*wanted, "RAY_AUTH_MODE")}  # the last one is set by Ray
    os.environ.update({name: value for name, value in wanted.items() if before[name] is None})
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)


@contextmanager
def _folder() -> Iterator[Path]:
    """A folder for Ray's sockets and logs, which goes away; those of processes that were killed go now."""
    place = Path(tempfile.gettempdir())
    for left in place.glob(f"{_FOLDER}*"):
        lock = Path(f"{left}.lock")
        if left.is_dir():
            with suppress(Timeout, OSError), FileLock(lock, blocking=False):  # who has it is alive
                shutil.rmtree(left, ignore_errors=True)
                lock.unlink()
    folder = place / f"{_FOLDER}{secrets.token_hex(4)}"
    lock = Path(f"{folder}.lock")
    with FileLock(lock):
        folder.mkdir(mode=0o700)
        try:
            yield folder
        finally:
            shutil.rmtree(folder, ignore_errors=True)
            lock.unlink(missing_ok=True)
