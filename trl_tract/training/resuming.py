"""Which checkpoint a run goes on from, and whether it was trained towards the same. Knows nothing of models."""

import json
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
from trl_tract.training.config import TRACTConfig

FILE_NAME = "tract_objective.json"
_ADAPTER = ("peft_type", "r", "lora_alpha", "use_rslora", "use_dora", "rank_pattern", "alpha_pattern")


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
    return str(found)


def _objective_of(checkpoint: Path) -> dict[str, Any]:
    """What a checkpoint was trained towards, as far as it says."""
    file = checkpoint / FILE_NAME
    if file.is_file():
        try:
            return read_json(file)
        except ValueError as error:
            raise ValueError(f"{error}, or continue from an earlier checkpoint") from error
    if not (checkpoint / CONFIG_NAME).is_file():
        return {}
    config = JudgeConfig.load(checkpoint)
    saved: dict[str, Any] = {"normalize_grid": config.normalize_grid, "drop_rationale": not config.writes_rationale}
    if len(config.scales) > 1:
        return saved | {"aspects": {scale.name: scale.to_dict() for scale in config.scales}}
    grid = config.scales[0].grid
    return saved | {"score_values": list(grid.values), "score_marker": config.scales[0].marker}


def _shown(value: Any) -> str:
    """A value for a message; the middle of a long grid is left out."""
    return f"[{some_scores([str(each) for each in value])}]" if isinstance(value, list) else repr(value)
