"""The steps of a run: train, distil, judge. Each reads files, writes files, and can run in a process of its own.

GPU memory is not given back inside a process, so on a GPU every step gets one.
"""

import json
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, ClassVar

from datasets import Dataset
from transformers import set_seed
from trl import ModelConfig, get_peft_config, get_quantization_config

from trl_tract.backends import make_backend
from trl_tract.distill.distill import CoTSelfDistill
from trl_tract.files.blocks import BlockLog, Record, Report, Shard
from trl_tract.files.checkpoints import last_complete_checkpoint
from trl_tract.files.journal import JsonlRows, digest, read_jsonl, write_json, write_jsonl
from trl_tract.judge.judge import CoTRAILJudge
from trl_tract.judge.judgement import Judgement
from trl_tract.rows.golds import gold_score
from trl_tract.saved.judge_config import JudgeConfig
from trl_tract.scale.scale import Scale
from trl_tract.text.secrets import without_secrets
from trl_tract.text.terminal import hide_host_warnings
from trl_tract.training.config import TRACTConfig
from trl_tract.training.log_lines import write_lines_in_logs
from trl_tract.training.trainer import TRACTTrainer


@dataclass
class TrainStep:
    """Train one model with CoT-RAFT, going on from its last checkpoint if it has one.

    Attributes:
        model: Model directory or hub id to start from.
        train_data: JSONL of training rows.
        output_dir: Receives the model or adapter, the tokenizer and `tract_config.json`.
        eval_data: JSONL of evaluation rows with completions, or None.
        training: Fields of TRACTConfig.
        model_args: Fields of TRL's ModelConfig: dtype, LoRA, quantisation.
    """

    kind: ClassVar[str] = "train"
    model: str
    train_data: str
    output_dir: str
    eval_data: str | None = None
    training: dict[str, Any] = field(default_factory=dict)
    model_args: dict[str, Any] = field(default_factory=dict)

    def run(self) -> None:
        """Train and save."""
        args = TRACTConfig(**{**self.training, "output_dir": self.output_dir})
        model_args = ModelConfig(**{**self.model_args, "model_name_or_path": self.model})
        init: dict[str, Any] = {
            "revision": model_args.model_revision,
            "attn_implementation": model_args.attn_implementation,
            "dtype": model_args.dtype,
        }
        args.model_init_kwargs = {**init, **(args.model_init_kwargs or {})}
        trainer = TRACTTrainer(
            self.model,
            args,
            train_dataset=_dataset(self.train_data),
            eval_dataset=_dataset(self.eval_data) if self.eval_data else None,
            peft_config=get_peft_config(model_args),
            quantization_config=get_quantization_config(model_args),
        )
        write_lines_in_logs(trainer)
        trainer.train(resume_from_checkpoint=last_complete_checkpoint(self.output_dir) is not None)
        trainer.save_model()
        trainer.save_state()
        trainer.create_model_card()


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
class JudgeStep:
    """Judge rows; what is finished of them survives an interruption.

    Attributes:
        model: Judge directory, or a seed model with `untrained`.
        data: JSONL of rows with `prompt` and, if known, `score`.
        output_dir: Receives `judgements.jsonl`.
        settings: Arguments of CoTRAILJudge.
        backend: Arguments of `make_backend`: `name`, and what that backend takes.
        untrained: The model was never trained as a judge: grid and marker come from `settings`.
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
    shard: str | None = None
    block_size: int = 64

    def run(self) -> Path | None:
        """Judge, or go on judging; the judgements, or None if other shards still have to be done."""
        settings = dict(self.settings)
        if not self.untrained:
            # What is missing is said before the directory is claimed for this model.
            scales = JudgeConfig.load(self.model).scales
            if len(scales) > 1:
                settings.setdefault("aspects", {scale.name: scale.to_dict() for scale in scales})
            else:
                settings.setdefault("score_values", list(scales[0].grid.values))
        rows = JsonlRows(Path(self.data))
        name = self.backend.get("name", "transformers")
        directory, final = Path(self.output_dir), Path(self.output_dir) / "judgements.jsonl"
        log = BlockLog(
            directory,
            {**settings, "model": self.model, "backend": name, "rows_digest": digest(rows)},
            "judging",
            rows=len(rows),
            block_size=self.block_size,
            shard=Shard.parse(self.shard) if self.shard else None,
        )
        if final.exists():
            return final
        backend = make_backend(self.model, **self.backend)
        if self.untrained:
            judge = CoTRAILJudge(backend, **self.settings)
        else:
            judge = CoTRAILJudge.from_pretrained(self.model, backend, **self.settings)

        def work(numbers: range, report: Report) -> list[Record]:
            block = [rows[i] for i in numbers]
            judgements = judge.judge(block, first=numbers.start, on_progress=report)
            return [
                {
                    "reference": None if row.get("score") is None else gold_score(row["score"]),
                    **{name: row[name] for name in ("id", "group", "side", "subset") if name in row},
                    **_with_references(judgement.to_dict(), row, [scale for scale in judge.scales if scale.name]),
                    "backend": backend.name,
                }
                for row, judgement in zip(block, judgements, strict=True)
            ]

        def write(records: Iterator[Record]) -> None:
            write_jsonl(final, records)

        done = log.run(work, final, write, max_calls=backend.max_calls, cancel=backend.cancel)
        return final if done else None


Step = TrainStep | DistillStep | JudgeStep
STEPS: dict[str, type[TrainStep] | type[DistillStep] | type[JudgeStep]] = {
    step.kind: step for step in (TrainStep, DistillStep, JudgeStep)
}


def run_step(step: Step, spec_file: Path, *, isolate: bool) -> None:
    """Run a step here, or in a process of its own.

    Raises:
        RuntimeError: The process failed; its own message stands above.
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
            f"the step {spec_file.stem} ended with exit code {finished.returncode}; its error stands above. Start the "
            "same command again to go on from there"
        )


def _with_references(judged: Record, row: Mapping[str, Any], aspects: Sequence[Scale]) -> Record:
    """The aspects' judgements with the gold scores of the row, where it has them."""
    golds = row.get("scores") or {}
    for aspect in aspects:
        # An item whose prompt could not be read has an error and no aspects.
        own = judged.setdefault("aspects", {}).setdefault(
            aspect.name, {**Judgement().to_dict(), "error": judged["error"]}
        )
        gold = aspect.grid.in_numbers(golds.get(aspect.name))
        own["reference"] = None if gold is None else gold_score(gold)
    return judged


def _dataset(path: str) -> Dataset:
    return Dataset.from_list(list(read_jsonl(Path(path))))


if __name__ == "__main__":
    hide_host_warnings()
    spec = json.loads(sys.stdin.read() if sys.argv[1] == "-" else Path(sys.argv[1]).read_text(encoding="utf-8"))
    STEPS[spec.pop("kind")](**spec).run()
