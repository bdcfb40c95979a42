"""Which checkpoint a run goes on from, and whether it was trained towards the same. Knows nothing of models."""

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

from peft import PeftConfig

from trl_tract.files.checkpoints import last_complete_checkpoint
from trl_tract.files.journal import read_json, write_json
from trl_tract.rows.template import TemplateSettings
from trl_tract.saved.judge_config import FILE_NAME as CONFIG_NAME
from trl_tract.saved.judge_config import JudgeConfig
from trl_tract.scale.text import some_scores
from trl_tract.text.secrets import without_secrets
from trl_tract.training.config import TRACTConfig, field_values
from trl_tract.training.real_config import REALConfig

FILE_NAME = "tract_objective.json"
_ADAPTER = ("peft_type", "r", "lora_alpha", "use_rslora", "use_dora", "rank_pattern", "alpha_pattern")
# Of training arguments, those that leave the trained weights as they are, up to rounding.
_ASIDE = re.compile(
    # Where files go, and what is told.
    r"output_dir|run_name|project|report_to|disable_tqdm|debug|skip_memory_metrics|num_completions_to_print"
    r"|(log|logging|hub|push_to|trackio|include)_\w+"
    # Checkpoints and evaluations.
    r"|(do|save|eval|restore)_\w+|resume_from_checkpoint|ignore_data_skip|enable_jit_checkpoint|\w+_full_eval"
    r"|per_device_eval_batch_size|batch_eval_metrics|prediction_loss_only|num_generations_eval|judge_eval_settings"
    r"|metric_for_best_model|greater_is_better"
    # What it is computed on, and how: memory, processes, batches that add up to the same update.
    r"|use_cpu|local_rank|tf32|use_cache|torch_\w+|(gradient|activation)_(checkpointing|offloading)\w*|dataset_num_proc"
    r"|dataloader_(num_workers|pin_memory|persistent_workers|prefetch_factor|multiprocessing_context)"
    r"|ddp_\w+|ds3_\w+|fsdp\w*|deepspeed|parallelism_config"
    r"|vllm_(mode|model_impl|enable_sleep_mode|server_\w+|group_port|gpu_\w+|max_model_length|tensor_parallel_size)"
    r"|per_device_train_batch_size|gradient_accumulation_steps|steps_per_generation"
)
_CHOOSING = {
    *("metric_for_best_model", "greater_is_better", "judge_eval_settings", "num_generations_eval"),
    *("eval_strategy", "eval_steps", "eval_delay", "save_strategy", "save_steps"),
}
"""Those among them that choose a checkpoint, where a metric does."""
_UPDATE = "per_device_train_batch_size x gradient_accumulation_steps x processes"


def training_settings(args: TRACTConfig | REALConfig) -> dict[str, Any]:
    """The training arguments that decide what the saved weights are; JSON-serialisable, without secrets."""
    choosing = set() if args.metric_for_best_model is None else _CHOOSING
    fields = {
        name: value for name, value in field_values(args).items() if name in choosing or not _ASIDE.fullmatch(name)
    }
    rows = args.train_batch_size * args.gradient_accumulation_steps * args.world_size
    return {**without_secrets(fields), _UPDATE: rows}


def save_objective(checkpoint: Path, args: TRACTConfig, judge_config: JudgeConfig, adapter: PeftConfig | None) -> None:
    """Write down what a checkpoint is trained towards."""
    write_json(checkpoint / FILE_NAME, _objective(args, judge_config, adapter), checked=True)


def _objective(args: TRACTConfig, judge_config: JudgeConfig | None, adapter: PeftConfig | None) -> dict[str, Any]:
    """What is trained towards, what prompts are rendered with, and what adapter the weights are of."""
    put_on = {} if adapter is None else adapter.to_dict()
    own = {f"adapter.{name}": put_on[name] for name in _ADAPTER if name in put_on}
    return args.objective | (judge_config.template.arguments if judge_config else {}) | own


def settings_of(args: TRACTConfig) -> TemplateSettings:
    """What prompts are rendered with; a run that may go on from a checkpoint has the date that the checkpoint has."""
    settings, last = args.template_settings, last_complete_checkpoint(args.output_dir)
    if settings.date is None and last is not None and (last / CONFIG_NAME).is_file():
        return replace(settings, date=JudgeConfig.load(last).template.date)
    return settings


def checkpoint_of(
    resume_from_checkpoint: str | bool | None,
    args: TRACTConfig,
    judge_config: JudgeConfig | None,
    adapter: PeftConfig | None = None,
) -> str | None:
    """The checkpoint to go on from; None to start over.

    Args:
        resume_from_checkpoint: As for Trainer; True is the last one in the output directory that was written to its
            end.
    """
    if not resume_from_checkpoint:
        return None
    last = last_complete_checkpoint(args.output_dir) if resume_from_checkpoint is True else resume_from_checkpoint
    if last is None:
        raise ValueError(f"no complete checkpoint in {args.output_dir}. Start without resume_from_checkpoint")
    found = Path(last)
    then, now = _objective_of(found), json.loads(json.dumps(_objective(args, judge_config, adapter)))
    changed = [name for name, value in then.items() if value != now.get(name)]
    if changed:
        values = "; ".join(f"{name} was {_shown(then[name])} and is {_shown(now.get(name))}" for name in changed)
        raise ValueError(
            f"{found} was trained with other settings: {values}. Restore them to continue from it, or use another "
            "output_dir"
        )
    # Under FSDP and DeepSpeed it is a directory.
    if found.is_dir() and not [*found.glob("optimizer*"), *found.glob("global_step*")]:
        raise ValueError(
            f"{found} has no optimizer state, as with save_only_model=True, so training cannot continue from it. Start "
            "without resume_from_checkpoint, or delete the checkpoints to train again"
        )
    return str(found)


def _objective_of(checkpoint: Path) -> dict[str, Any]:
    """What a checkpoint was trained towards, as far as it says.

    Raises:
        ValueError: Another trainer wrote it, or a file of it is damaged.
    """
    file = checkpoint / FILE_NAME
    if file.is_file():
        try:
            return read_json(file)
        except ValueError as error:
            raise ValueError(f"{error}, or continue from an earlier checkpoint") from error
    if not (checkpoint / CONFIG_NAME).is_file():
        raise ValueError(
            f"{checkpoint} is not a checkpoint of this trainer: it has no {CONFIG_NAME}. Start without "
            "resume_from_checkpoint, or use another output_dir"
        )
    config = JudgeConfig.load(checkpoint)
    saved: dict[str, Any] = {"normalize_grid": config.normalize_grid, "drop_rationale": not config.writes_rationale}
    if len(config.scales) > 1:
        return saved | {"aspects": {scale.name: scale.to_dict() for scale in config.scales}}
    grid = config.scales[0].grid
    return saved | {"score_values": list(grid.values), "score_marker": config.scales[0].marker}


def _shown(value: Any) -> str:
    """A value for a message; the middle of a long grid is left out."""
    return f"[{some_scores([str(each) for each in value])}]" if isinstance(value, list) else repr(value)
