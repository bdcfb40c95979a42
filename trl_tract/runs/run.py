"""A directory of finished steps: each is done once, and again when what it made is gone, cut, or of something else.

Knows nothing of training, judging or reports.
"""

import shutil
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock, Timeout

from trl_tract.files.fingerprint import file_digests, model_files
from trl_tract.files.journal import digest, guard, read_json, refuse_links, write_json
from trl_tract.runs.launching import Launch
from trl_tract.runs.steps import Step, run_step, say_now

_BESIDE = {"trainer_state.json", "settings.json", "finished.json", "summary.json"}


class Run:
    """A directory of finished steps.

    Args:
        settings: Whatever changes the results: a directory with other settings is refused.
        isolate: Run each step in a process of its own; by default on a GPU.

    Attributes:
        steps: Name -> what is written down of the steps: `seconds`, once finished; `made`, the digest of each file;
            `of`, the digest of what it was made of.

    Raises:
        FileExistsError: The directory holds another run, of which something is finished, or a link.
        RuntimeError: It holds another one, which is being done.
    """

    def __init__(
        self,
        directory: Path,
        settings: Mapping[str, Any],
        *,
        isolate: bool | None = None,
        launch: Launch | None = None,
        total: int,
        say: Callable[[str], None] = say_now,
    ) -> None:
        refuse_links(directory)
        try:
            guard(directory, settings, "run")
        except FileExistsError:
            if not nothing_trained(directory):
                raise
            # A mistake in the options, corrected: nothing is lost, and another directory would only be a nuisance.
            with _alone(directory):
                say("The settings changed before anything was trained: starting over")
                (directory / "steps.json").unlink(missing_ok=True)
                write_json(directory / "settings.json", settings, checked=True)
        self.directory = directory
        self.isolate = torch.cuda.is_available() if isolate is None else isolate
        self.launch = launch
        self.total = total
        self.say = say
        self.steps = _steps(directory)
        self._met = 0

    @property
    def seconds(self) -> dict[str, float]:
        """The steps that are finished, with the seconds that each took."""
        return _seconds(self.steps)

    def step(
        self, name: str, title: str, work: Step | Callable[[], None], *, makes: Sequence[str], of: Sequence[str] = ()
    ) -> None:
        """Do `work`, unless it is finished and what it made is there, whole, and made of what is there now.

        Args:
            makes: Patterns of the files and folders that it makes.
            of: The steps on whose results it works.
        """
        self._met += 1
        heading = f"[{self._met}/{self.total}] {title}"
        with _alone(self.directory):
            self.steps = _steps(self.directory)  # another process may have gone on meanwhile
            origin = digest([self._result(each) for each in of])
            known = self.steps.get(name, {"of": origin})
            made = known.get("made", {})
            changed = sorted(dict(made.items() - self._digests(made).items()))
            if "seconds" in known and known["of"] == origin and not changed:
                self.say(f"{heading}: finished before, in {known['seconds']:.0f} s")
                return
            self.say(heading)
            if changed:
                self.say(f"    {', '.join(changed[:3])}: missing or changed since; running this step again")
            if known["of"] != origin:
                self.say(f"    the output of {' and '.join(of)} has changed; this step's old output is deleted")
            if known["of"] != origin or any(file.endswith("settings.json") for file in changed):
                for path in self._made(makes):
                    shutil.rmtree(path) if path.is_dir() else path.unlink()
            self._note(name, {"of": origin})
            started = time.monotonic()
            if callable(work):
                work()
            else:
                run_step(work, self.directory / f"{name}.json", isolate=self.isolate, launch=self.launch)
            seconds = time.monotonic() - started
            made = self._digests(str(file.relative_to(self.directory)) for file in _files(self._made(makes)))
            self._note(name, {"of": origin, "seconds": seconds, "made": made})

    def leave_out(self, title: str) -> None:
        """Say that a step is not done, for lack of what it would work on."""
        self._met += 1
        self.say(f"[{self._met}/{self.total}] {title}: left out")

    def _note(self, name: str, known: dict[str, Any]) -> None:
        self.steps[name] = known
        write_json(self.directory / "steps.json", self.steps, checked=True)

    def _result(self, name: str) -> dict[str, str]:
        """Of the files that a step made, those that later steps work on."""
        made: dict[str, str] = self.steps[name]["made"]
        return {file: digest for file, digest in made.items() if Path(file).name not in _BESIDE}

    def _made(self, makes: Sequence[str]) -> list[Path]:
        return sorted(path for pattern in makes for path in self.directory.glob(pattern))

    def _digests(self, files: Iterable[str]) -> dict[str, str]:
        there = [file for file in files if (self.directory / file).is_file()]
        return dict(zip(there, file_digests([self.directory / file for file in there]).values(), strict=True))


def _files(paths: Iterable[Path]) -> Iterator[Path]:
    """The files that count: of a folder of blocks the result, of a model no checkpoints, logs or cards."""
    for path in paths:
        if (path / "blocks").is_dir():
            yield from sorted(path.glob("*.json*"))
        elif path.is_dir():
            yield from (*model_files(path), *path.glob("trainer_state.json"))
        else:
            yield path


@contextmanager
def _alone(directory: Path) -> Iterator[None]:
    """Keep other processes out of a run's directory."""
    lock = FileLock(directory / "run.lock", blocking=False)
    try:
        lock.acquire()
    except Timeout as error:
        raise RuntimeError(
            f"another process is working in {directory}. Wait until it ends, or stop it; two runs would write the same "
            "files"
        ) from error
    try:
        yield
    finally:
        lock.release()


def nothing_trained(directory: Path) -> bool:
    """Whether a run was begun in the directory, but came to no result that would be missed."""
    if not (directory / "settings.json").exists():
        return False
    return not finished_steps(directory).keys() - {"prepare", "settings"} and not any(directory.glob("*/checkpoint-*"))


def finished_steps(directory: Path) -> dict[str, float]:
    """The steps of a run that are finished, with the seconds that each took."""
    return _seconds(_steps(directory))


def _steps(directory: Path) -> dict[str, Any]:
    file = directory / "steps.json"
    try:
        steps = read_json(file) if file.exists() else {}
    except ValueError as error:
        raise ValueError(f"{error}. Or delete it; every step is then checked again") from error
    # Before version 0.2 the seconds stood there alone.
    return {name: known if isinstance(known, dict) else {"seconds": known} for name, known in steps.items()}


def _seconds(steps: Mapping[str, Any]) -> dict[str, float]:
    return {name: known["seconds"] for name, known in steps.items() if "seconds" in known}
