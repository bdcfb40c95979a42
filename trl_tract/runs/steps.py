"""The steps of a run: train, distil, judge. Each reads files, writes files, and can run in a process of its own.

GPU memory is not given back inside a process, so on a GPU every step gets one.
"""

import json
import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field, fields, replace
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

from transformers import set_seed

from trl_tract.backends import Backend, make_author, make_backend
from trl_tract.backends.base import Sampling, settings_that_count
from trl_tract.backends.loading import load_tokenizer, tokenizer_to_train
from trl_tract.distill.bootstrap import CoTBootstrap
from trl_tract.distill.distill import CoTSelfDistill
from trl_tract.evaluation.recalibration import Recalibration, applied_by_default
from trl_tract.files.blocks import BlockLog, Record, Report
from trl_tract.files.crew import Crew
from trl_tract.files.fingerprint import made_by
from trl_tract.files.journal import JsonlRows, KnownRows, write_json, write_jsonl
from trl_tract.files.shards import Shard
from trl_tract.judge.judge import CoTRAILJudge
from trl_tract.judge.judgement import Judgement
from trl_tract.judge.scoring import check_without_rationales
from trl_tract.rows.golds import read_golds
from trl_tract.rows.row import REFUSED
from trl_tract.runs.away import AwayBackend, AwayDistill
from trl_tract.runs.launching import Launch
from trl_tract.runs.ray_crew import ray_crew
from trl_tract.runs.train_steps import RLStep, TrainStep
from trl_tract.saved.judge_config import JudgeConfig
from trl_tract.scale.scale import Scale, read_scales
from trl_tract.scale.text import ScoreNotFoundError
from trl_tract.text.secrets import without_secrets
from trl_tract.text.terminal import hide_host_warnings

say_now: Callable[[str], None] = partial(print, flush=True)


@dataclass
class _BlockStep:
    """A step whose rows are done in blocks.

    Attributes:
        model: Directory or hub id of who does them.
        data: JSONL of the rows.
        output_dir: Receives the result.
        settings: Arguments of the class that does them.
        backend: Arguments of `make_backend`: `name`, and what that backend takes.
        shard: `i/n`, this job's share of the rows; None: this process's share under a launcher.
    """

    kind: ClassVar[str]
    model: str
    data: str
    output_dir: str
    settings: dict[str, Any] = field(default_factory=dict)
    backend: dict[str, Any] = field(default_factory=dict)
    shard: str | None = None

    @property
    def share(self) -> Shard | None:
        """`shard`, read."""
        return Shard.parse(self.shard) if self.shard else None

    def make_backend(self) -> Backend:
        """The model, loaded."""
        return make_backend(self.model, **self.backend)


@dataclass
class DistillStep(_BlockStep):
    """Let a stage-one model write its own rationale for every training row: `rows.jsonl` and `summary.json`.

    Attributes:
        engine: `ray`: the blocks are done by the workers of a Ray cluster; `local`: by this process.
        workers: Of Ray; None: one for each GPU, or each machine.
    """

    kind: ClassVar[str] = "distill"
    engine: str = "local"
    workers: int | None = None

    def run(self) -> Path | None:
        """Generate, or go on generating; the stage-two rows, or None if other shards still have to be done."""
        JudgeConfig.load(self.model)  # what is missing is said before the weights are loaded
        if self.engine == "local":
            return self._distiller(self.make_backend()).distill_file(self.data, self.output_dir, shard=self.share)
        tokenizer = load_tokenizer(self.model, self.backend.get("revision"))
        away = AwayBackend(tokenizer, self.model, self.backend.get("name", "transformers"))
        distiller = AwayDistill.from_pretrained(self.model, away, **self.settings)  # type: ignore[arg-type]
        rendered = distiller.settle(JsonlRows(Path(self.data)))
        known = distiller.made_with()
        step = replace(self, settings={**self.settings, **rendered})
        with ray_crew(step.crew, known, workers=self.workers, backend=self.backend, say=say_now) as crew:
            away.hire(crew, known)
            return distiller.distill_file(self.data, self.output_dir, shard=self.share)

    def crew(self) -> Crew:
        """This process, with the model loaded."""
        backend = self.make_backend()
        distiller = self._distiller(backend)
        return Crew(distiller.block, distiller.made_with(), backend.max_calls, backend.cancel)

    def _distiller(self, backend: Backend) -> CoTSelfDistill:
        return CoTSelfDistill.from_pretrained(self.model, backend, **self.settings)


@dataclass
class BootstrapStep(_BlockStep):
    """Let a model write rationales for the rows that have only scores: `rows.jsonl`, all rows, and `summary.json`.

    Attributes:
        author: Who writes, if not `model`.
        chat_template: Jinja file, or model, with the chat template that `model` is asked with; None: its own.
    """

    kind: ClassVar[str] = "bootstrap"
    author: str | None = None
    chat_template: str | None = None

    def run(self) -> Path | None:
        """Generate, or go on generating; the rows, or None if other shards still have to be done."""
        author = make_author(self.author or self.model, **self.backend)
        if author.tokenizer is not None and self.chat_template and self.author is None:
            author.tokenizer.chat_template = tokenizer_to_train(
                self.model, self.chat_template, self.backend.get("revision")
            ).chat_template
        probe = author.tokenizer is not None  # who is paid by the token is not measured
        writer = CoTBootstrap(author, **{"probe": probe, "say": say_now, **self.settings})
        return writer.bootstrap_file(self.data, self.output_dir, shard=self.share)


OF_RATIONALES = {each.name for each in fields(Sampling)} | {"num_generations", "max_attempts", "append_marker"}
"""Settings of judging that change nothing where no rationale is written."""


@dataclass
class JudgeStep(_BlockStep):
    """Judge rows: `judgements.jsonl`.

    Attributes:
        untrained: The model was never trained as a judge: grid and marker come from `settings`.
        asked_like: A judge's directory, from which grid, marker, prompts and tokenizer come, for a model that was never
            trained as one; None: the model is a judge.
        engine, workers: As of `DistillStep`.
    """

    kind: ClassVar[str] = "judge"
    untrained: bool = False
    asked_like: str | None = None
    block_size: int = 64
    engine: str = "local"
    workers: int | None = None

    def run(self) -> Path | None:
        """Judge, or go on judging; the judgements, or None if other shards still have to be done."""
        # Files are looked at before they are loaded, and a finished result without loading them; a server can be asked.
        if not self._writes:
            check_without_rationales(self.settings.get("num_generations", 1))
        is_server = self.backend.get("name") == "server"
        backend = self.make_backend() if is_server and self.engine == "local" else None
        scales, made_with = self._config().scales, self._made_with(backend)
        directory = Path(self.output_dir)
        final = directory / "judgements.jsonl"
        log = BlockLog(
            directory,
            made_with,
            "judging",
            rows=KnownRows(JsonlRows(Path(self.data)), lambda row, number: _references(row, number, scales)),
            block_size=self.block_size,
            shard=self.share,
        )
        if log.finished:
            return final

        def write(records: Iterator[Record]) -> None:
            write_jsonl(final, records)

        with (
            nullcontext(self.crew(backend, made_with))
            if self.engine == "local"
            else ray_crew(self.crew, made_with, workers=self.workers, backend=self.backend, say=say_now)
        ) as crew:
            done = log.run(crew.do, write, (final.name,), max_calls=crew.max_calls, cancel=crew.cancel)
        return final if done else None

    def crew(self, backend: Backend | None = None, made_with: Mapping[str, Any] | None = None) -> Crew:
        """This process, with the model loaded; what judgements depend on is found out where it is not given."""
        backend, scales = backend or self.make_backend(), self._config().scales
        made_with = made_with or self._made_with(backend)  # reads the model's files
        if self.untrained:
            judge = CoTRAILJudge(backend, **self.settings)
        elif self.asked_like is not None:
            backend.tokenizer = load_tokenizer(self.asked_like)  # with the template that rows were made with
            judge = CoTRAILJudge.from_config(JudgeConfig.load(self.asked_like), backend, **self.settings)
        else:
            recalibrate = made_with.get("recalibrate", False)
            judge = CoTRAILJudge.from_pretrained(self.model, backend, **{**self.settings, "recalibrate": recalibrate})

        def do(rows: list[Any], first: int, report: Report) -> list[Record]:
            judgements = judge.judge(rows, on_progress=report)
            return [
                _record(row, _references(row, number, scales), judgement, scales) | {"backend": backend.name}
                for number, (row, judgement) in enumerate(zip(rows, judgements, strict=True), start=first)
            ]

        return Crew(do, made_with, backend.max_calls, backend.cancel)

    @property
    def _writes(self) -> bool:
        return bool(self.settings.get("writes_rationale", self._config().writes_rationale))

    def _config(self) -> JudgeConfig:
        if self.untrained:
            return JudgeConfig(read_scales(self.settings))
        # What is missing is said before the directory is claimed for this model.
        return JudgeConfig.load(self.asked_like or self.model)

    def _made_with(self, backend: Backend | None) -> dict[str, Any]:
        """All that judgements depend on, as settings; of a backend whose files tell, the files are asked."""
        scales, revision, writes = self._config().scales, self.backend.get("revision"), self._writes
        settings = {name: value for name, value in self.settings.items() if writes or name not in OF_RATIONALES}
        if not self.untrained and scales[0].name:
            settings.setdefault("aspects", {scale.name: scale.to_dict() for scale in scales})
        elif not self.untrained:
            settings.setdefault("score_values", list(scales[0].grid.values))
        if settings.get("recalibrate") is None:
            settings.pop("recalibrate", None)
            if not self.untrained and applied_by_default(self.model, revision):
                settings["recalibrate"] = True
        if settings.get("recalibrate"):
            settings["recalibration"] = _recalibrations(self.model, revision, scales)
        name = self.backend.get("name", "transformers")
        asked = backend if name == "server" else None
        engine = settings_that_count(self.backend)
        return {**settings, **engine, "model": self.model, "backend": name, **made_by(asked, self.model, revision)}


Step = TrainStep | RLStep | BootstrapStep | DistillStep | JudgeStep
_SPEC = "TRL_TRACT_STEP"
STEPS: dict[str, type[Step]] = {step.kind: step for step in (TrainStep, RLStep, BootstrapStep, DistillStep, JudgeStep)}


def shared_out(step: Step, launch: Launch) -> tuple[Step, Launch]:
    """A step as each of several processes does it, and how they are started."""
    if isinstance(step, RLStep):
        return step, Launch()  # its groups of completions were tried in one process alone
    if isinstance(step, TrainStep):
        launch, each = launch.shared(step.training)
        return replace(step, training={**step.training, **each}), launch
    backend, launch = spread(step.backend, launch)
    return replace(step, backend=backend), launch


def spread(backend: Mapping[str, Any], launch: Launch) -> tuple[dict[str, Any], Launch]:
    """A backend's options where it is to use as many accelerators as there are processes, and how these are started.

    vLLM is one process that starts an engine on each accelerator, if it was not told otherwise.
    """
    name, options = backend.get("name", "transformers"), dict(backend)
    if name == "transformers":
        return options, Launch(launch.processes)
    told = any(option.endswith("parallel_size") for option in options)
    if name == "vllm" and launch.processes > 1 and not told:
        options["data_parallel_size"] = launch.processes
    return options, Launch(sees_all=True)


def run_step(step: Step, spec_file: Path, *, isolate: bool, launch: Launch | None = None) -> None:
    """Run a step here, in a process of its own, or in several."""
    step, launch = shared_out(step, launch or Launch())
    spec = {"kind": step.kind, **asdict(step)}
    write_json(spec_file, without_secrets(spec))
    spec_file.chmod(0o600)
    if not isolate and not launch.starts:
        set_seed(0)
        step.run()
        return
    # In the environment: the file has no keys in it, and other users can read a command line.
    code = launch.run("trl_tract.runs.steps", [], **{_SPEC: json.dumps(spec)})
    if code:
        raise RuntimeError(
            f"the step {spec_file.stem} failed with exit code {code}. Its error message is above. Run the same command "
            "again to continue"
        )


def _references(row: Mapping[str, Any], number: int, scales: Sequence[Scale]) -> list[list[float]] | None:
    """The gold scores of a row, for each scale its annotators', where it has them."""
    if row.get(REFUSED):
        return None  # what is wrong with the row is the item's error
    try:
        return read_golds(row, scales)
    except ScoreNotFoundError as error:
        raise ValueError(f"row {number}: {error}") from error
    except (ValueError, KeyError, TypeError):
        return None  # a prompt that cannot be read is the item's error


def _record(
    row: Mapping[str, Any], golds: list[list[float]] | None, judgement: Judgement, scales: Sequence[Scale]
) -> Record:
    """A line of `judgements.jsonl`: a judgement, what tells its item, and gold scores or None in their place."""
    judged = judgement.to_dict()
    given = [_reference(scores) for scores in golds or [[]] * len(scales)]
    keys = {name: row[name] for name in ("id", "group", "side", "subset") if name in row}
    if not scales[0].name:
        return {**given[0], **keys, **judged}
    # An item whose prompt could not be read has an error and no aspects.
    empty = {**Judgement().to_dict(), "error": judged["error"]}
    aspects = judged.get("aspects", {})
    judged["aspects"] = {
        scale.name: {**aspects.get(scale.name, empty), **own} for scale, own in zip(scales, given, strict=True)
    }
    return {"reference": None, **keys, **judged}


def _recalibrations(model: str, revision: str | None, scales: Sequence[Scale]) -> dict[str, Any]:
    """What is saved with a judge to adjust its scores: fitted again, it makes other scores of the same judge."""
    saved = {scale.name: asdict(Recalibration.load(model, revision, scale=scale.name)) for scale in scales}
    return saved if scales[0].name else saved[""]


def _reference(scores: list[float]) -> Record:
    if len(scores) < 2:
        return {"reference": scores[0] if scores else None}
    return {"reference": sum(scores) / len(scores), "raters": scores}


if __name__ == "__main__":
    hide_host_warnings()
    spec = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8") if sys.argv[1:] else os.environ.pop(_SPEC))
    STEPS[spec.pop("kind")](**spec).run()
