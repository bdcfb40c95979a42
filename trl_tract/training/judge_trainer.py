"""What the trainers of judges have in common: what they save, and how they go on. Knows nothing of losses."""

import time
from pathlib import Path
from typing import Any

from accelerate.utils import is_peft_model
from peft import PeftConfig
from transformers.utils import logging

from trl_tract.evaluation.recalibration import FILE_NAME as CALIBRATION_FILE
from trl_tract.files.fingerprint import drop_links
from trl_tract.rows.rendering import RenderedRow
from trl_tract.rows.row import Row
from trl_tract.saved.judge_config import JudgeConfig
from trl_tract.saved.model_card import write_model_card
from trl_tract.saved.training_rows import TrainingRows
from trl_tract.sources.columns import FILE_NAME as PROMPT_FILE
from trl_tract.training.adapters import only_the_trained_adapter
from trl_tract.training.resuming import checkpoint_of, save_objective

logger = logging.get_logger(__name__)


class KeepsJudge:
    """Before a trainer of TRL's: saves `judge_config` beside its weights, and goes on from its own checkpoints alone.

    Attributes:
        judge_config: Grid and marker; None until rows were seen.
    """

    args: Any
    model: Any
    state: Any
    control: Any
    judge_config: JudgeConfig | None
    hub_model_id: str | None
    _trained_rows: Any  # as they were given, without those that were dropped
    _began = 0.0
    _best_step: int | None = None  # whose weights were loaded at the end; None: those of the last step stand
    _tag_names: list[str]

    def _rendered(self, row: Row) -> RenderedRow:
        """A row as the trainer reads it, for the model card."""
        raise NotImplementedError

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> Any:
        """Train; `resume_from_checkpoint=True` goes on from the last checkpoint that was written to its end."""
        checkpoint = checkpoint_of(resume_from_checkpoint, self.args, self.judge_config, self._adapter)
        self._began, self._best_step = time.time(), None
        done = super().train(checkpoint, *args, **kwargs)  # type: ignore[misc]
        if self.args.load_best_model_at_end and self.state.best_model_checkpoint is None:
            told = "never evaluated" if self.state.best_metric is None else "NaN at every evaluation"
            metric = self.args.metric_for_best_model
            self._warn([f"{metric} was {told}. The saved model is from the last step, not the best checkpoint"])
        return done

    def _warn(self, warnings: list[str]) -> None:
        if self.is_world_process_zero():  # type: ignore[attr-defined]
            for warning in warnings:
                logger.warning(warning)

    @property
    def _adapter(self) -> PeftConfig | None:
        return self.model.active_peft_config if is_peft_model(self.model) else None

    def _run_epoch(self, **kwargs: Any) -> None:
        if self.state.global_step >= self.state.max_steps:
            # The checkpoint is the last one. The host would look for an end only behind a further step.
            self.control.should_training_stop = True
            return
        super()._run_epoch(**kwargs)  # type: ignore[misc]

    def _load_best_model(self) -> None:
        super()._load_best_model()  # type: ignore[misc]
        self._best_step = int(self.state.best_model_checkpoint.rpartition("-")[2])

    @property
    def _evaluation(self) -> dict[str, Any]:
        """The log entry of the last evaluation of the weights that are saved; empty without one."""
        entries = (entry for entry in reversed(self.state.log_history) if "eval_loss" in entry)
        return next((entry for entry in entries if self._best_step in (None, entry["step"])), {})

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Save the model, and beside it `tract_config.json`, from which a judge reads grid and marker."""
        folder = Path(output_dir or self.args.output_dir)
        if self.args.should_save:
            drop_links(folder, checkpoint=_internal_call and output_dir is not None)
            self._drop_what_is_of_another_judge(folder)
        super().save_model(output_dir, _internal_call)  # type: ignore[misc]
        if self.args.should_save and self.judge_config is not None:
            self.judge_config.save(output_dir or self.args.output_dir)
            if _internal_call and output_dir is not None:
                save_objective(Path(output_dir), self.args, self.judge_config, self._adapter)

    def _drop_what_is_of_another_judge(self, folder: Path) -> None:
        """Delete what an earlier training left in a directory and loading would take for this judge's own."""
        if not is_peft_model(self.model):
            for name in ("adapter_config.json", "adapter_model.safetensors", "adapter_model.bin"):
                (folder / name).unlink(missing_ok=True)
        for name in (CALIBRATION_FILE, PROMPT_FILE):
            file = folder / name
            if file.is_file() and file.stat().st_mtime < self._began:
                file.unlink()

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        with only_the_trained_adapter(self.model, Path(output_dir or self.args.output_dir)):
            super()._save(output_dir, state_dict)  # type: ignore[misc]

    def create_model_card(
        self, model_name: str | None = None, dataset_name: str | None = None, tags: str | list[str] | None = None
    ) -> None:
        """Write a model card that says what the judge scores and how to use it."""
        if self.is_world_process_zero():  # type: ignore[attr-defined]
            tags = [tags] if isinstance(tags, str) else list(tags or [])
            write_model_card(
                self.args,
                self.judge_config,
                base_model=getattr(self.model.config, "_name_or_path", None),
                model_name=model_name,
                hub_id=self.hub_model_id,
                dataset_name=dataset_name,
                tags=[*self._tag_names, *tags],
                metrics=self._evaluation,
                rows=TrainingRows.of(self._trained_rows, self._rendered),
                adapter=self._adapter,
            )

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        # The host pushes the output directory before anything but weights and tokenizer has been saved there.
        if self.args.should_save and self.judge_config is not None:
            self.judge_config.save(self.args.output_dir)
        super()._push_from_checkpoint(checkpoint_folder)  # type: ignore[misc]
