"""What a run would do, before it does it: steps, tokens, an estimate of time and memory, five rows. Writes nothing.

Knows nothing of how steps are done; what is in a row, and what is refused, comes from `check`.
"""

import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from trl_tract.backends.loading import load_tokenizer
from trl_tract.commands.check import RowsReport, examine, what_is_refused
from trl_tract.commands.estimate import (
    Batch,
    ModelSize,
    Speed,
    count,
    generation_memory,
    generation_seconds,
    measure_speed,
    time_range,
    training_memory,
    training_operations,
)
from trl_tract.commands.token_view import labelled, legend, painted, view_row
from trl_tract.files.journal import changed_settings
from trl_tract.rows.encoding import RowEncoder
from trl_tract.runs.pipeline import steps_of
from trl_tract.runs.run import finished_steps, nothing_trained
from trl_tract.runs.spec import RunSpec
from trl_tract.scale.scales import Scales
from trl_tract.sources.columns import OwnColumns
from trl_tract.sources.schemas import Item, load_items, split_items, try_items
from trl_tract.training.config import TRACTConfig
from trl_tract.training.early_warnings import EarlyWarnings

Say = Callable[[str], None]


@dataclass(frozen=True)
class Plan:
    """What the tokens of training rows come to in updates.

    Attributes:
        updates: Optimiser steps of a stage.
        epochs: Passes over the rows.
        rows_per_update: Over all processes and accumulated batches.
        mean_tokens: Of an update, without padding.
        most_tokens: Of an update of the longest rows, padding included.
        batch_rows: Rows of a batch on one device.
        longest: Tokens of the longest row.
    """

    updates: int
    epochs: float
    rows_per_update: int
    mean_tokens: float
    most_tokens: int
    batch_rows: int
    longest: int

    @classmethod
    def of(cls, lengths: Sequence[int], training: Mapping[str, Any], processes: int) -> "Plan":
        """The plan of training on rows of these lengths, as Trainer counts updates.

        Args:
            lengths: Tokens of each row.
            training: Fields of TRACTConfig.
            processes: That share each update.

        Example:
            >>> Plan.of([100] * 20, {"per_device_train_batch_size": 4, "num_train_epochs": 3}, 1).updates
            15
        """
        batch = int(training.get("per_device_train_batch_size", 8))
        accumulated = int(training.get("gradient_accumulation_steps", 1))
        tokens, longest = sum(lengths), max(lengths)
        rows = len(lengths)
        if training.get("packing"):
            limit = int(training.get("max_length") or longest)
            rows, longest = math.ceil(tokens / limit), limit
        batches = math.ceil(rows / (batch * processes))
        per_epoch = max(math.ceil(batches / accumulated), 1)
        epochs = float(training.get("num_train_epochs", 3.0))
        updates = math.ceil(epochs * per_epoch)
        steps = int(training.get("max_steps", -1))
        if steps > 0:
            updates, epochs = steps, steps / per_epoch
        together = min(batch * accumulated * processes, rows)
        return cls(
            updates=updates,
            epochs=epochs,
            rows_per_update=together,
            mean_tokens=together * tokens / rows,
            most_tokens=together * longest,
            batch_rows=min(batch, rows),
            longest=longest,
        )

    def __str__(self) -> str:
        return (
            f"{self.updates:,} updates of {self.rows_per_update} rows ({self.epochs:g} epochs); an update has "
            f"{self.mean_tokens:,.0f} tokens in the mean, {self.most_tokens:,} at most with padding"
        )


def dry_run(spec: RunSpec, output_dir: str | Path, *, colour: bool, say: Say = print) -> bool:
    """Print what `run_tract` would do with the same arguments; whether it would take all rows."""
    training, scales = spec.training, spec.scales
    done = _finished(Path(output_dir), spec.settings())
    tokenizer = load_tokenizer(spec.model)
    numbered = list(enumerate(try_items(spec.data, scales, spec.own)))
    items = [item for _, item in numbered if isinstance(item, Item)]
    held_out: list[Item] = []
    kept = numbered
    if spec.eval_data is not None:
        held_out = load_items(spec.eval_data, scales, spec.own)
    elif len(items) == len(numbered) and items:
        _, held_out = split_items(items, spec.eval_fraction, spec.seed)
        out = set(map(id, held_out))
        kept = [(number, item) for number, item in numbered if id(item) not in out]
    report, encoder = examine(kept, Path(spec.data).name, tokenizer, training)
    say(f"Dry run: nothing is trained or written. trl-tract run would do this in {output_dir}:")
    speed, size = _measured(spec.model, spec.model_args, training, say)
    # The stage-one model's own rationales are taken to be as long as the annotated ones.
    plan = Plan.of(report.tokens, training, _processes()) if report.tokens else None
    again = spec.num_generations if spec.writes_rationales else 1
    stage_two = Plan.of(report.tokens * again, training, _processes()) if plan else None
    steps = steps_of(spec)
    for number, (name, title) in enumerate(steps.items(), start=1):
        lines = [f"[{number}/{len(steps)}] {title}"]
        if name in done:
            lines[0] += f": finished before, in {done[name]:.0f} s"
        elif plan and stage_two and name in ("stage1", "stage2"):
            this = plan if name == "stage1" else stage_two
            lines += [str(this), _training_time(size, speed, this, report, training)]
        elif spec.writes_rationales and report.tokens and name in ("distill", "judge-stage1", "judge-tract"):
            rows = report.trained if name == "distill" else len(held_out)
            each = (spec.num_generations if name == "distill" else 1) * max(len(scales.aspects), 1)
            batch = int(spec.backend.get("batch_size", 8))
            lines += _generation(size, speed, report, rows, each, spec.generation, batch, len(scales.aspects))
        say("\n    ".join(line for line in lines if line))
    say(f"\n{report.trained:,} rows to train on, {len(held_out):,} held-out items")
    _warn(training, output_dir, say)
    return _rest(report, encoder, plan, size, speed, training, spec.model_args, colour, say)


def _finished(directory: Path, settings: Mapping[str, Any]) -> dict[str, float]:
    """The steps that the run would find finished.

    Raises:
        FileExistsError: It would refuse the directory.
    """
    if not (directory / "settings.json").exists():
        return {}
    changed = changed_settings(directory, settings)
    if changed and nothing_trained(directory):
        return {}
    if changed:
        raise FileExistsError(
            f"the run would be refused: {directory} holds another run ({'; '.join(changed[:5])}). Choose another "
            "output directory, or the settings that it was started with"
        )
    return finished_steps(directory)


def dry_train(
    model: str,
    data: str,
    output_dir: str | Path,
    *,
    own: OwnColumns | None,
    training: Mapping[str, Any],
    model_args: Mapping[str, Any],
    colour: bool,
    say: Say = print,
) -> bool:
    """Print what `trl-tract train` would do with the same arguments; whether it would take all rows."""
    found = enumerate(try_items(data, Scales.of(training), own, only_trained=True))
    report, encoder = examine(found, Path(data).name, load_tokenizer(model), training)
    say(f"Dry run: nothing is trained or written. trl-tract train would train one stage in {output_dir}:")
    speed, size = _measured(model, model_args, training, say)
    plan = Plan.of(report.tokens, training, _processes()) if report.tokens else None
    say(f"{report.trained:,} rows to train on")
    if plan:
        say(f"{plan}\n{_training_time(size, speed, plan, report, training)}")
    _warn(training, output_dir, say)
    return _rest(report, encoder, plan, size, speed, training, model_args, colour, say)


def _processes() -> int:
    return int(os.environ.get("WORLD_SIZE", "1"))


def _measured(
    model: str, model_args: Mapping[str, Any], training: Mapping[str, Any], say: Say
) -> tuple[Speed | None, ModelSize | None]:
    """What the estimates need; without it they are left out, and why is said."""
    try:
        size = count(model, dict(model_args))
    except (OSError, ValueError, KeyError, AttributeError) as error:
        say(f"No estimate of time and memory: the model cannot be counted ({' '.join(str(error).split())})")
        return None, None
    computed = "bfloat16" if training.get("bf16") or training.get("fp16") else "float32"
    speed = measure_speed(computed)
    if computed != "float32" and not torch.accelerator.is_available():
        faster = measure_speed("float32").operations / speed.operations
        if faster > 1.5:
            say(f"bfloat16 is slow on this processor, float32 {faster:.0f} times as fast: add --bf16 false")
    return speed, size


def _training_time(
    size: ModelSize | None, speed: Speed | None, plan: Plan, report: RowsReport, training: Mapping[str, Any]
) -> str:
    if size is None or speed is None:
        return ""
    tokens = plan.updates * plan.mean_tokens / _processes()
    seconds = training_operations(size, tokens, float(np.mean(report.tokens)), dict(training)) / speed.operations
    return f"time, an estimate: {time_range(seconds)}"


def _warn(training: Mapping[str, Any], output_dir: str | Path, say: Say) -> None:
    """What training would warn of at its start, while it costs nothing to change it."""
    for warning in EarlyWarnings(TRACTConfig(**{**training, "output_dir": str(output_dir)})).at_start():
        say(f"\nTraining would warn: {warning}")


def _generation(
    size: ModelSize | None,
    speed: Speed | None,
    report: RowsReport,
    rows: int,
    each: int,
    generation: Mapping[str, Any],
    batch: int,
    aspects: int,
) -> list[str]:
    """Lines about `each` rationales for every one of `rows` prompts; with aspects a completion has several."""
    most = int(generation.get("max_new_tokens", 1024))
    # A batch goes on until its longest rationale ends.
    length = min(float(np.percentile(report.completion_tokens, 95)) / max(aspects, 1), most)
    lines = [f"{rows * each:,} rationales for {rows:,} prompts, at most {most:,} tokens each"]
    if size is not None and speed is not None:
        seconds = generation_seconds(
            size,
            speed,
            rows=rows * each,
            prompt_tokens=float(np.mean(report.prompt_tokens)),
            new_tokens=length,
            batch=batch,
        )
        longest = max(report.prompt_tokens) + most
        lines.append(f"memory, an estimate: {generation_memory(size, batch=batch, tokens=longest)}")
        lines.append(
            f"time, an estimate: {time_range(seconds / _processes())}, if rationales are as long as the annotated ones"
        )
    return lines


def _rest(
    report: RowsReport,
    encoder: RowEncoder | None,
    plan: Plan | None,
    size: ModelSize | None,
    speed: Speed | None,
    training: Mapping[str, Any],
    model_args: Mapping[str, Any],
    colour: bool,
    say: Say,
) -> bool:
    """Refusals, memory, how it was estimated, and five rows."""
    if report.refused:
        say(f"Refused: {what_is_refused(report, training.get('max_length', 3000))}")
    elif not report.trained:
        say("Refused: none of the rows has a completion (rationale, marker and score), so there is none to train on")
    if plan and size and speed:
        batch = _largest_batch(plan, report, encoder)
        say(f"\nMemory of training on one device, an estimate: {training_memory(size, training, model_args, batch)}")
        for line in _how(size, speed, batch):
            say(f"    {line}")
    for number, row in report.examples[:5] if encoder else ():
        assert encoder is not None
        tokens = view_row(encoder, row)
        gold = ", ".join(f"{token.gold:g}" for token in tokens if token.gold is not None)
        say(f"\nrow {number}, gold score {gold}: {legend(tokens, colour=colour)}")
        say(painted(tokens) if colour else labelled(tokens))
    return report.trained > 0 and (not report.refused or training.get("invalid_rows") == "drop")


def _largest_batch(plan: Plan, report: RowsReport, encoder: RowEncoder | None) -> Batch:
    """The batch that decides how much memory training needs."""
    grids = [scale.grid for scale in encoder.scales] if encoder else []
    # A score needs a whole softmax at its own position, and one more at each inner node of its grid's trie.
    nodes = [len(grid.trie.nodes) if grid.paths else 1 for grid in grids]
    share = sum(report.completion_tokens) / max(sum(report.tokens), 1)
    length = plan.longest + sum(nodes) - len(nodes)
    return Batch(plan.batch_rows, length, round(plan.batch_rows * plan.longest * share), plan.batch_rows * sum(nodes))


def _how(size: ModelSize, speed: Speed, batch: Batch) -> Iterator[str]:
    """How the estimates came about, so that nobody takes them for more."""
    yield (
        f"counted: {size.total / 1e6:,.1f} million parameters, {size.trainable / 1e6:,.1f} million of them trained; "
        f"activations for {batch.rows:,} rows of {batch.length:,} tokens, the largest batch; context and allocator are "
        "rules of thumb, 0.6 GiB and a tenth of the activations"
    )
    yield (
        f"time: operations counted from parameters and tokens, over the speed of a matrix product in {speed.dtype} "
        f"measured here just now ({speed.operations / 1e9:,.3g} GFLOP/s on {speed.device}) and, the upper end, a third "
        "of it; no step was run"
    )
