"""Training's bars as lines of a log file, where nobody watches them. Knows nothing of losses or rows."""

import sys
from typing import Any

from transformers import ProgressCallback, TrainerCallback

from trl_tract.text.progress import ProgressLines, is_watched


class TrainingLines(TrainerCallback):
    """Training's progress and metrics as lines of a log file."""

    def __init__(self) -> None:
        self.lines: Any = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Start counting."""
        if state.is_world_process_zero:
            self.lines = ProgressLines(total=state.max_steps, initial=state.global_step, desc="training", unit="step")

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Count an update."""
        if self.lines is not None:
            self.lines.update(state.global_step - self.lines.n)

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        """Write the metrics on a line of their own."""
        if self.lines is not None:
            shown = {name: value for name, value in (logs or {}).items() if name != "total_flos"}
            numbers = ", ".join(
                f"{name} {value:.4g}" if isinstance(value, float) else f"{name} {value}"
                for name, value in shown.items()
            )
            print(f"step {state.global_step}: {numbers}", file=sys.stderr, flush=True)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Write the last line."""
        if self.lines is not None:
            self.lines.close()
            self.lines = None


def write_lines_in_logs(trainer: Any) -> None:
    """Put lines in the place of a trainer's bars, where nobody watches them."""
    if not is_watched() and not trainer.args.disable_tqdm:
        trainer.remove_callback(ProgressCallback)
        trainer.add_callback(TrainingLines())
