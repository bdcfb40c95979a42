"""The steps of a run that train: with CoT-RAFT, and with reinforcement. Knows nothing of generation.

Each reads files, writes files, goes on from its last checkpoint, and can run in a process of its own.
"""

import shutil
from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

from datasets import Dataset
from transformers import IntervalStrategy, TrainerCallback
from transformers.trainer_utils import SaveStrategy
from trl import ModelConfig, get_peft_config, get_quantization_config

from trl_tract.backends.loading import adapter_config
from trl_tract.files.checkpoints import checkpoint_made_of, last_complete_checkpoint, seal_checkpoint
from trl_tract.files.fingerprint import made_by
from trl_tract.files.journal import differences, read_jsonl, refuse_links, write_json
from trl_tract.files.seal import contents
from trl_tract.saved.judge_config import FILE_NAME, JudgeConfig
from trl_tract.scale.scale import Scale
from trl_tract.sources.arrow import training_dataset
from trl_tract.sources.columns import FILE_NAME as PROMPT_FILE
from trl_tract.sources.columns import OwnColumns
from trl_tract.sources.door import group_of, held_out_rows
from trl_tract.text.secrets import without_secrets
from trl_tract.training.config import TRACTConfig
from trl_tract.training.log_lines import write_lines_in_logs
from trl_tract.training.real_config import REALConfig
from trl_tract.training.real_trainer import REALTrainer
from trl_tract.training.resuming import training_settings
from trl_tract.training.trainer import TRACTTrainer

RECIPE = "tract_recipe.json"
"""File beside a judge, with the settings that its run derived, and why."""
ROWS = "_rows"
"""Folder of a model's directory where its rows are while it is trained; the hub's client leaves `_*` alone."""
MOST_HELD_OUT = 200


@dataclass
class TrainStep:
    """Train one model with CoT-RAFT, going on from its last checkpoint if it has one.

    Attributes:
        eval_data: JSONL of evaluation rows with completions, or None: with `judge_eval_items`, rows of `train_data`.
        asked_like: A judge's directory, whose prompts are rendered alike (thinking, date), since it wrote the rows.
        own: The rows' columns and rubric as `OwnColumns.to_dict` has them, saved with the model; None: none.
        recipe: Settings that were derived, and why, to be saved with the model: see `Recipe.to_dict`; None: none.
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
    recipe: dict[str, Any] | None = None

    def run(self) -> None:
        """Train and save."""
        args = self._arguments()
        template = self.training.get("chat_template_path")
        files = {"data": self.train_data, "eval_data": self.eval_data, "chat_template": template}
        aside = ("model_name_or_path", "attn_implementation")  # the place of the model, and how it is computed
        put_on = {name: value for name, value in self.model_args.items() if name not in aside}
        made_of = {"model": self.model, "contents": contents(files), "model_args": without_secrets(put_on)}
        made_of |= {
            "training": training_settings(args),
            **made_by(None, self.model, self.model_args.get("model_revision")),
        }
        if "chat_template" in made_of["contents"]:
            del made_of["training"]["chat_template_path"]  # it may lie elsewhere now
        checkpoint = self._last_checkpoint(made_of)
        trainer = self._trainer(args, checkpoint)
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
            recipe = Path(self.output_dir) / RECIPE
            if self.recipe is None:
                recipe.unlink(missing_ok=True)
            else:
                write_json(recipe, self.recipe)
            shutil.rmtree(Path(self.output_dir) / ROWS, ignore_errors=True)

    def _arguments(self) -> Any:
        return TRACTConfig(**{**self.training, "output_dir": self.output_dir})

    def _trainer(self, args: Any, checkpoint: Path | None) -> Any:
        for judge in (checkpoint, self.asked_like):
            if judge is not None and (Path(judge) / FILE_NAME).is_file():
                template = JudgeConfig.load(judge).template
                args.thinking, args.template_date = template.thinking, template.date
        put_on = self._loaded_as(args)
        rows, held_out = _dataset(self.train_data, args, "train", args.scales), None
        if self.eval_data:
            held_out = _dataset(self.eval_data, args, "eval", args.scales)
        elif args.judge_eval_items:
            rows, held_out = _split(rows, self._held_out(args.judge_eval_items, args.seed))
        return TRACTTrainer(self.model, args, train_dataset=rows, eval_dataset=held_out, **put_on)

    def _held_out(self, count: int, seed: int) -> set[int]:
        return held_out_rows(map(group_of, read_jsonl(Path(self.train_data))), count, seed)

    def _loaded_as(self, args: Any) -> dict[str, Any]:
        """What the weights are loaded as is put into `args`; the adapter and the quantisation are returned."""
        model_args = ModelConfig(**{**self.model_args, "model_name_or_path": self.model})
        init: dict[str, Any] = {
            "revision": model_args.model_revision,
            "attn_implementation": model_args.attn_implementation,
            "dtype": model_args.dtype,
        }
        args.model_init_kwargs = {**init, **(args.model_init_kwargs or {})}
        return {"peft_config": get_peft_config(model_args), "quantization_config": get_quantization_config(model_args)}

    def _last_checkpoint(self, made_of: Mapping[str, Any]) -> Path | None:
        """The checkpoint to go on from."""
        refuse_links(Path(self.output_dir))
        checkpoint = last_complete_checkpoint(self.output_dir)
        held = {} if checkpoint is None else checkpoint_made_of(checkpoint)
        # Not told of by an earlier version, or of no meaning to a later one of the host: it cannot be compared.
        known = [name for name in made_of["training"] if name in held.get("training", {})]
        then, now = ({**each, "training": {name: each["training"][name] for name in known}} for each in (held, made_of))
        if held and (changed := differences(then, now)):
            raise FileExistsError(
                f"{checkpoint} belongs to another training run ({'; '.join(changed[:5])}). Choose another output "
                "directory, restore the original settings, or delete the checkpoints to start over"
            )
        return checkpoint


@dataclass
class RLStep(TrainStep):
    """Train a judge on its own errors, going on from its last checkpoint if it has one.

    Where nothing is said of an evaluation, a part of the rows is held out, and the checkpoint with the least loss on
    them is what is saved.

    Attributes:
        training: Fields of REALConfig that are given; those that are not are as `_choosing` and REALConfig have them.
        eval_data: JSONL of such rows to choose the checkpoint by; None: a tenth of the rows of `train_data`, 200 at
            most.
    """

    kind: ClassVar[str] = "rl"

    def _arguments(self) -> Any:
        fields = self.training if "eval_strategy" in self.training else _choosing(self.training)
        return REALConfig(**{**fields, "output_dir": self.output_dir})

    def _trainer(self, args: Any, checkpoint: Path | None) -> Any:
        put_on = self._loaded_as(args)
        if adapter_config(self.model) is not None:
            del put_on["peft_config"]  # its own adapter is trained on
        saved = (Path(self.model) / FILE_NAME).is_file()
        scales = JudgeConfig.load(self.model).scales if saved else args.scales
        rows, held_out = _dataset(self.train_data, args, "train", scales), None
        if self.eval_data:
            held_out = _dataset(self.eval_data, args, "eval", scales)
        elif args.eval_strategy != IntervalStrategy.NO:
            count = min(max(len(rows) // 10, 1), MOST_HELD_OUT)
            rows, held_out = _split(rows, self._held_out(count, args.seed))
        return REALTrainer(self.model, args, train_dataset=rows, eval_dataset=held_out, **put_on)


def _choosing(given: Mapping[str, Any]) -> dict[str, Any]:
    """Fields that choose the checkpoint by the loss on held-out rows, a rationale for each; what is given stays."""
    saves = SaveStrategy(given.get("save_strategy", "steps"))
    often = given.get("save_steps") or given.get("eval_steps") or 0.2  # part of the training
    return {
        "eval_strategy": "epoch" if saves == SaveStrategy.EPOCH else "steps",  # as often as it saves
        "eval_steps": often,
        "save_steps": often,
        "save_total_limit": 2,
        "load_best_model_at_end": saves != SaveStrategy.NO,
        "num_generations_eval": 1,
        **given,
    }


class _SealCheckpoints(TrainerCallback):
    def __init__(self, made_of: Mapping[str, Any]) -> None:
        self.made_of = made_of

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.is_world_process_zero:
            seal_checkpoint(Path(args.output_dir) / f"checkpoint-{state.global_step}", self.made_of)


def _dataset(path: str, args: TRACTConfig | REALConfig, name: str, scales: Sequence[Scale]) -> Dataset:
    """The rows of a file on disk beside the model, under a name that no upload takes along."""
    with args.main_process_first(desc=f"reading the {name} rows"):
        return training_dataset(
            Path(path), scales, Path(str(args.output_dir)) / ROWS / name, reuse=args.local_process_index > 0
        )


def _split(rows: Dataset, places: Set[int]) -> tuple[Dataset, Dataset]:
    """The rows that are not at `places`, and those that are."""
    return rows.select([place for place in range(len(rows)) if place not in places]), rows.select(sorted(places))
