"""The steps of a run: train, distil, judge. Each reads files, writes files, and can run in a process of its own.

GPU memory is not given back inside a process, so on a GPU every step gets one.
"""

import json
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence, Set
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

from datasets import Dataset
from transformers import IntervalStrategy, TrainerCallback, set_seed
from trl import ModelConfig, get_peft_config, get_quantization_config

from trl_tract.backends import make_author, make_backend
from trl_tract.backends.base import settings_that_count
from trl_tract.backends.loading import adapter_config, load_tokenizer, tokenizer_to_train
from trl_tract.distill.bootstrap import CoTBootstrap
from trl_tract.distill.distill import CoTSelfDistill
from trl_tract.evaluation.recalibration import Recalibration
from trl_tract.files.blocks import BlockLog, Record, Report
from trl_tract.files.checkpoints import checkpoint_made_of, last_complete_checkpoint, seal_checkpoint
from trl_tract.files.fingerprint import made_by
from trl_tract.files.journal import (
    JsonlRows,
    KnownRows,
    differences,
    refuse_links,
    write_json,
    write_jsonl,
)
from trl_tract.files.seal import contents
from trl_tract.files.shards import Shard
from trl_tract.judge.judge import CoTRAILJudge
from trl_tract.judge.judgement import Judgement
from trl_tract.rows.golds import read_golds
from trl_tract.rows.row import REFUSED
from trl_tract.saved.judge_config import FILE_NAME, JudgeConfig
from trl_tract.scale.scale import Scale, read_scales
from trl_tract.scale.text import ScoreNotFoundError
from trl_tract.sources.arrow import training_dataset
from trl_tract.sources.columns import FILE_NAME as PROMPT_FILE
from trl_tract.sources.columns import OwnColumns
from trl_tract.sources.door import held_out_rows
from trl_tract.text.secrets import without_secrets
from trl_tract.text.terminal import hide_host_warnings
from trl_tract.training.config import TRACTConfig
from trl_tract.training.log_lines import write_lines_in_logs
from trl_tract.training.real_config import REALConfig
from trl_tract.training.real_trainer import REALTrainer
from trl_tract.training.trainer import TRACTTrainer

say_now: Callable[[str], None] = partial(print, flush=True)
ON_HELD_OUT: Mapping[str, Any] = {
    "eval_strategy": "steps",
    "save_strategy": "steps",
    "save_total_limit": 2,
    "load_best_model_at_end": True,
    "num_generations_eval": 1,
}
"""How the checkpoint of a reinforcement stage is chosen: by the loss on held-out rows, a rationale for each."""
MOST_HELD_OUT = 200
ROWS = "_rows"
"""Folder of a model's directory where its rows are while it is trained; the hub's client leaves `_*` alone."""


@dataclass
class TrainStep:
    """Train one model with CoT-RAFT, going on from its last checkpoint if it has one.

    Attributes:
        model: Model directory or hub id to start from.
        train_data: JSONL of training rows.
        output_dir: Receives the model or adapter, the tokenizer and `tract_config.json`.
        eval_data: JSONL of evaluation rows with completions, or None: with `judge_eval_items`, rows of `train_data`.
        training: Fields of TRACTConfig.
        model_args: Fields of TRL's ModelConfig: dtype, LoRA, quantisation.
        asked_like: A judge's directory, whose prompts are rendered alike (thinking, date), since it wrote the rows.
        own: The rows' columns and rubric as `OwnColumns.to_dict` has them, saved with the model; None: none.
    """

    kind: ClassVar[str] = "train"
    model: str
    train_data: str
    output_dir: str
    eval_data: str | None = None
    training: dict[str, Any] = field(default_factory=dict)
    model_args: dict[str, Any] = field(default_factory=dict)
    asked_like: str | None = None
    own: dict[str, Any] | None = None

    def run(self) -> None:
        """Train and save."""
        template = self.training.get("chat_template_path")
        files = {"data": self.train_data, "eval_data": self.eval_data, "chat_template": template}
        aside = ("model_name_or_path", "attn_implementation")  # the place of the model, and how it is computed
        put_on = {name: value for name, value in self.model_args.items() if name not in aside}
        made_of = {"model": self.model, "contents": contents(files), "model_args": without_secrets(put_on)}
        made_of |= made_by(None, self.model)
        checkpoint = self._last_checkpoint(made_of)
        trainer = self._trainer(checkpoint)
        write_lines_in_logs(trainer)
        trainer.add_callback(_SealCheckpoints(made_of))
        trainer.train(resume_from_checkpoint=checkpoint is not None)
        trainer.save_model()
        trainer.save_state()
        trainer.create_model_card()
        if trainer.args.process_index == 0:
            if self.own is None:
                (Path(self.output_dir) / PROMPT_FILE).unlink(missing_ok=True)  # of an earlier training
            else:
                OwnColumns.from_dict(self.own).save(self.output_dir)
            shutil.rmtree(Path(self.output_dir) / ROWS, ignore_errors=True)

    def _trainer(self, checkpoint: Path | None) -> Any:
        args = TRACTConfig(**{**self.training, "output_dir": self.output_dir})
        for judge in (checkpoint, self.asked_like):
            if judge is not None and (Path(judge) / FILE_NAME).is_file():
                template = JudgeConfig.load(judge).template
                args.thinking, args.template_date = template.thinking, template.date
        put_on = self._loaded_as(args)
        rows, held_out = _dataset(self.train_data, args, "train", args.scales), None
        if self.eval_data:
            held_out = _dataset(self.eval_data, args, "eval", args.scales)
        elif args.judge_eval_items:
            rows, held_out = _split(rows, held_out_rows(Path(self.train_data), args.judge_eval_items, args.seed))
        return TRACTTrainer(
            self.model,
            args,
            train_dataset=rows,
            eval_dataset=held_out,
            **put_on,
        )

    def _loaded_as(self, args: Any) -> dict[str, Any]:
        """What the weights are loaded as is put into `args`; the adapter and the quantisation are returned."""
        model_args = ModelConfig(**{**self.model_args, "model_name_or_path": self.model})
        init: dict[str, Any] = {
            "revision": model_args.model_revision,
            "attn_implementation": model_args.attn_implementation,
            "dtype": model_args.dtype,
        }
        args.model_init_kwargs = {**init, **(args.model_init_kwargs or {})}
        return {
            "peft_config": get_peft_config(model_args),
            "quantization_config": get_quantization_config(model_args),
        }

    def _last_checkpoint(self, made_of: Mapping[str, Any]) -> Path | None:
        """The checkpoint to go on from.

        Raises:
            FileExistsError: It was made of another model or other rows; or a link is in the directory.
        """
        refuse_links(Path(self.output_dir))
        checkpoint = last_complete_checkpoint(self.output_dir)
        held = {} if checkpoint is None else checkpoint_made_of(checkpoint)
        if held and (changed := differences(held, made_of)):
            raise FileExistsError(
                f"{checkpoint} is of another training ({'; '.join(changed)}). Choose another output directory, or "
                "delete the checkpoints to start over"
            )
        return checkpoint


@dataclass
class RLStep(TrainStep):
    """Train a judge on its own errors, going on from its last checkpoint if it has one.

    Where no evaluation is asked for, a part of the rows is held out, and the checkpoint with the least loss on them is
    what is saved.

    Attributes:
        model: A judge, full or adapter, or a seed model.
        train_data: JSONL of rows with prompts and gold scores.
        eval_data: JSONL of such rows to choose the checkpoint by; None: a tenth of the rows of `train_data`, 200 at
            most.
        training: Fields of REALConfig.
    """

    kind: ClassVar[str] = "rl"

    def _trainer(self, checkpoint: Path | None) -> Any:
        given = {**self.training, "output_dir": self.output_dir}
        if IntervalStrategy(given.get("eval_strategy", "no")) is IntervalStrategy.NO:
            steps = given.get("save_steps", 500)
            often = 0.2 if steps == 500 else steps  # a fifth of the training, unless the host's default was changed
            given |= {**ON_HELD_OUT, "eval_steps": often, "save_steps": often}
        args = REALConfig.from_fields(given)
        put_on = self._loaded_as(args)
        if adapter_config(self.model) is not None:
            del put_on["peft_config"]  # its own adapter is trained on
        saved = (Path(self.model) / FILE_NAME).is_file()
        scales = JudgeConfig.load(self.model).scales if saved else args.scales
        rows = _dataset(self.train_data, args, "train", scales)
        if self.eval_data:
            held_out = _dataset(self.eval_data, args, "eval", scales)
        else:
            count = min(max(len(rows) // 10, 1), MOST_HELD_OUT)
            rows, held_out = _split(rows, held_out_rows(Path(self.train_data), count, args.seed))
        return REALTrainer(self.model, args, train_dataset=rows, eval_dataset=held_out, **put_on)


class _SealCheckpoints(TrainerCallback):
    def __init__(self, made_of: Mapping[str, Any]) -> None:
        self.made_of = made_of

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.is_world_process_zero:
            seal_checkpoint(Path(args.output_dir) / f"checkpoint-{state.global_step}", self.made_of)


@dataclass
class DistillStep:
    """Let a stage-one model write its own rationale for every training row.

    Attributes:
        model: Stage-one model or adapter directory.
        data: JSONL of training rows.
        output_dir: Receives `rows.jsonl`, the stage-two rows, and `summary.json`.
        settings: Arguments of CoTSelfDistill.
        backend: Arguments of `make_backend`: `name`, and what that backend takes.
        shard: `i/n`, this job's share of the rows; None: this process's share under a launcher.
    """

    kind: ClassVar[str] = "distill"
    model: str
    data: str
    output_dir: str
    settings: dict[str, Any] = field(default_factory=dict)
    backend: dict[str, Any] = field(default_factory=dict)
    shard: str | None = None

    def run(self) -> Path | None:
        """Generate, or go on generating; the stage-two rows, or None if other shards still have to be done."""
        JudgeConfig.load(self.model)  # what is missing is said before the weights are loaded
        shard = Shard.parse(self.shard) if self.shard else None
        distiller = CoTSelfDistill.from_pretrained(
            self.model, make_backend(self.model, **self.backend), **self.settings
        )
        return distiller.distill_file(self.data, self.output_dir, shard=shard)


@dataclass
class BootstrapStep:
    """Let a model write rationales for the rows that have only scores.

    Attributes:
        model: Who writes: a model directory or hub id; the seed model where `author` is None.
        data: JSONL of rows, some or all without a completion.
        output_dir: Receives `rows.jsonl`, all rows with completions, and `summary.json`.
        settings: Arguments of CoTBootstrap.
        backend: Arguments of `make_backend`: `name`, and what that backend takes; or of `ChatBackend`, with the name
            `chat`.
        author: Who writes, if not `model`.
        chat_template: Jinja file, or model, with the chat template that `model` is asked with; None: its own.
        shard: `i/n`, this job's share of the rows; None: this process's share under a launcher.
    """

    kind: ClassVar[str] = "bootstrap"
    model: str
    data: str
    output_dir: str
    settings: dict[str, Any] = field(default_factory=dict)
    backend: dict[str, Any] = field(default_factory=dict)
    author: str | None = None
    chat_template: str | None = None
    shard: str | None = None

    def run(self) -> Path | None:
        """Generate, or go on generating; the rows, or None if other shards still have to be done."""
        shard = Shard.parse(self.shard) if self.shard else None
        author = make_author(self.author or self.model, **self.backend)
        if author.tokenizer is not None and self.chat_template and self.author is None:
            author.tokenizer.chat_template = tokenizer_to_train(self.model, self.chat_template).chat_template
        probe = author.tokenizer is not None  # who is paid by the token is not measured
        writer = CoTBootstrap(author, **{"probe": probe, "say": say_now, **self.settings})
        return writer.bootstrap_file(self.data, self.output_dir, shard=shard)


@dataclass
class JudgeStep:
    """Judge rows; what is finished of them survives an interruption.

    Attributes:
        model: Judge directory, or a seed model with `untrained`.
        data: JSONL of rows with `prompt` and, if known, `score`.
        output_dir: Receives `judgements.jsonl`.
        settings: Arguments of CoTRAILJudge.
        backend: Arguments of `make_backend`: `name`, and what that backend takes.
        untrained: The model was never trained as a judge: grid and marker come from `settings`.
        asked_like: A judge's directory, from which grid, marker, prompts and tokenizer come, for a model that was never
            trained as one; None: the model is a judge.
        shard: `i/n`, this job's share of the rows; None: this process's share under a launcher.
        block_size: Items that are judged together and then written to disk.
    """

    kind: ClassVar[str] = "judge"
    model: str
    data: str
    output_dir: str
    settings: dict[str, Any] = field(default_factory=dict)
    backend: dict[str, Any] = field(default_factory=dict)
    untrained: bool = False
    asked_like: str | None = None
    shard: str | None = None
    block_size: int = 64

    def run(self) -> Path | None:
        """Judge, or go on judging; the judgements, or None if other shards still have to be done."""
        settings = dict(self.settings)
        if self.untrained:
            scales = read_scales(settings)
        else:
            # What is missing is said before the directory is claimed for this model.
            config = JudgeConfig.load(self.asked_like or self.model)
            scales = config.scales
            if scales[0].name:
                settings.setdefault("aspects", {scale.name: scale.to_dict() for scale in scales})
            else:
                settings.setdefault("score_values", list(scales[0].grid.values))
        if settings.get("recalibrate"):
            settings["recalibration"] = _recalibrations(self.model, self.backend.get("revision"), scales)
        engine = settings_that_count(self.backend)
        name = self.backend.get("name", "transformers")
        # Files are looked at before they are loaded, and a finished result without loading them; a server can be asked.
        backend = make_backend(self.model, **self.backend) if name == "server" else None
        directory = Path(self.output_dir)
        final = directory / "judgements.jsonl"
        log = BlockLog(
            directory,
            {**settings, **engine, "model": self.model, "backend": name, **made_by(backend, self.model)},
            "judging",
            rows=KnownRows(JsonlRows(Path(self.data)), lambda row, number: _references(row, number, scales)),
            block_size=self.block_size,
            shard=Shard.parse(self.shard) if self.shard else None,
        )
        if log.finished:
            return final
        backend = backend or make_backend(self.model, **self.backend)
        if self.untrained:
            judge = CoTRAILJudge(backend, **self.settings)
        elif self.asked_like is not None:
            backend.tokenizer = load_tokenizer(self.asked_like)  # with the template that rows were made with
            judge = CoTRAILJudge.from_config(config, backend, **self.settings)
        else:
            judge = CoTRAILJudge.from_pretrained(self.model, backend, **self.settings)

        def work(rows: list[Any], first: int, report: Report) -> list[Record]:
            judgements = judge.judge(rows, on_progress=report)
            return [
                _record(row, _references(row, number, scales), judgement, scales) | {"backend": backend.name}
                for number, (row, judgement) in enumerate(zip(rows, judgements, strict=True), start=first)
            ]

        def write(records: Iterator[Record]) -> None:
            write_jsonl(final, records)

        cancel = backend.cancel
        return final if log.run(work, write, (final.name,), max_calls=backend.max_calls, cancel=cancel) else None


Step = TrainStep | RLStep | BootstrapStep | DistillStep | JudgeStep
STEPS: dict[str, type[Step]] = {step.kind: step for step in (TrainStep, RLStep, BootstrapStep, DistillStep, JudgeStep)}


def run_step(step: Step, spec_file: Path, *, isolate: bool) -> None:
    """Run a step here, or in a process of its own.

    Raises:
        RuntimeError: The process failed; its own message is above.
    """
    spec = {"kind": step.kind, **asdict(step)}
    write_json(spec_file, without_secrets(spec))
    spec_file.chmod(0o600)
    if not isolate:
        set_seed(0)
        step.run()
        return
    # By a pipe: the file has no keys in it, and other users can read a command line.
    command = [sys.executable, "-m", "trl_tract.runs.steps", "-"]
    finished = subprocess.run(command, input=json.dumps(spec), text=True, check=False)
    if finished.returncode:
        raise RuntimeError(
            f"the step {spec_file.stem} ended with exit code {finished.returncode}; its error is above. Run the "
            "same command again to continue"
        )


def _references(row: Mapping[str, Any], number: int, scales: Sequence[Scale]) -> list[list[float]] | None:
    """The gold scores of a row, for each scale its annotators', where it has them.

    Raises:
        ValueError: One of them cannot be read; the row is named.
    """
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


def _dataset(path: str, args: TRACTConfig | REALConfig, name: str, scales: Sequence[Scale]) -> Dataset:
    """The rows of a file on disk beside the model, under a name that no upload takes along."""
    with args.main_process_first(desc=f"reading the {name} rows"):
        return training_dataset(
            Path(path), scales, Path(str(args.output_dir)) / ROWS / name, reuse=args.local_process_index > 0
        )


def _split(rows: Dataset, places: Set[int]) -> tuple[Dataset, Dataset]:
    """The rows that are not at `places`, and those that are."""
    return rows.select([place for place in range(len(rows)) if place not in places]), rows.select(sorted(places))


if __name__ == "__main__":
    hide_host_warnings()
    spec = json.loads(sys.stdin.read() if sys.argv[1] == "-" else Path(sys.argv[1]).read_text(encoding="utf-8"))
    STEPS[spec.pop("kind")](**spec).run()
