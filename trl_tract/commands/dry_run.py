"""What a run would do, before it does it: steps, updates, tokens, five rows. Writes nothing.

Knows nothing of how steps are done; what is in a row, and what is refused, comes from `check`.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from trl_tract.backends.device import slowdown
from trl_tract.backends.loading import tokenizer_to_train
from trl_tract.commands.check import RowsReport, contradictions, examine, what_is_refused
from trl_tract.commands.token_view import labelled, legend, painted, view_row
from trl_tract.files.journal import changed_settings
from trl_tract.files.shards import Shard
from trl_tract.rows.encoding import RowEncoder
from trl_tract.rows.refusals import Refusal
from trl_tract.runs.facts import measured
from trl_tract.runs.pipeline import nothing_held_out
from trl_tract.runs.run import finished_steps, nothing_trained
from trl_tract.runs.spec import RunSpec, too_few_groups
from trl_tract.runs.step_names import steps_of
from trl_tract.scale.scale import read_scales
from trl_tract.sources.columns import OwnColumns
from trl_tract.sources.door import Bare, Source, held_out_rows
from trl_tract.sources.schemas import Item
from trl_tract.training.config import TRACTConfig
from trl_tract.training.early_warnings import EarlyWarnings
from trl_tract.training.recipe import derive, tell

Say = Callable[[str], None]
_GENERATED = {f"{does}-{whom}" for does in ("judge", "calibrate") for whom in ("seed", "stage1", "tract", "real")}
_GENERATED |= {"distill"}


@dataclass(frozen=True)
class Plan:
    """What the tokens of training rows come to in updates.

    Attributes:
        rows_per_update: Over all processes and accumulated batches.
        mean_tokens: Of an update, without padding.
        most_tokens: Of an update of the longest rows, padding included.
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
            f"{self.updates:,} updates of {self.rows_per_update} rows ({self.epochs:g} epochs); "
            f"{self.mean_tokens:,.0f} tokens per update on average, at most {self.most_tokens:,} with padding"
        )


@dataclass
class _Items:
    """Which items a run would train on, hold out and keep aside; counted as they are read."""

    data: Source
    split: Callable[[Item], bool] = nothing_held_out
    aside: Callable[[Item], bool] = nothing_held_out
    held_out: int = 0
    kept_aside: int = 0
    groups: set[int] = field(default_factory=set)
    others: set[int] = field(default_factory=set)

    def hold_out(self, item: Item) -> None:
        """Count an item that is evaluated on."""
        self.held_out += 1
        self.groups.add(hash(item.group))

    def to_train_on(self) -> Iterator[tuple[int, Item | Refusal]]:
        """What is left of the data, and what of it is refused."""
        for number, item in self.data.found():
            if isinstance(item, Refusal):
                yield number, item
            elif self.split(item):
                self.hold_out(item)
            else:
                self.others.add(hash(item.group))
                if self.aside(item):
                    self.kept_aside += 1
                else:
                    yield number, item


def dry_run(spec: RunSpec, output_dir: str | Path, *, colour: bool, say: Say = print) -> bool:
    """Print what `run_tract` would do with the same arguments; whether it would take all rows."""
    spec = spec.settled(say)
    done = _finished(Path(output_dir), spec.settings())
    steps = steps_of(spec)
    data = spec.source(spec.data)
    if spec.bootstraps:  # what is still to be written is left out
        data = replace(data, bare="lacking")
    readable = replace(data, invalid_rows="drop", say=lambda _: None)  # refusals are told below, all together
    items, evaluated = _Items(data), None
    if spec.eval_data is None:
        items.split = spec.split(readable)
    else:
        evaluated = spec.source(spec.eval_data, say)
        for _, judged in evaluated.items():
            items.hold_out(judged)
    why_not = ""
    if any(name.startswith("calibrate-") for name in steps):
        aside = spec.kept_aside(readable, items.split, evaluated)
        if isinstance(aside, str):
            why_not = aside
        else:
            items.aside = aside
    tokenizer = tokenizer_to_train(spec.model, spec.training.get("chat_template_path"), spec.revision)
    with_raft = "stage2" in steps  # of the fields of TRACTConfig, reinforcement alone has but few
    training = spec.training if with_raft else {**spec.training, "max_length": None, "judge_eval_items": 0}
    report, encoder = examine(items.to_train_on(), data.title, tokenizer, training)
    if "settings" in steps and report.tokens:
        spec = _derived(spec, report, say)
    say(f"Dry run: nothing is trained or written. trl-tract run would take these steps in {output_dir}:")
    for number, (name, title) in enumerate(steps.items(), start=1):
        finished = f": finished before, in {done[name]:.0f} s" if name in done else None
        lines = [] if finished else _work(name, spec, report, items)
        left_out = ": left out" if name.startswith("calibrate-") and not items.kept_aside else ""
        say("\n    ".join([f"[{number}/{len(steps)}] {title}{finished or left_out}", *lines]))
    apart = f", {items.kept_aside:,} items set aside for calibration" if items.kept_aside else ""
    held_out = f"{items.held_out:,} held-out items in {len(items.groups):,} groups"
    say(f"\n{_to_train_on(report, training)}, {held_out}{apart}")
    if why_not:
        say(f"The judges would not be calibrated: {why_not}")
    if spec.bootstraps:
        say(
            "The counts do not include rationales that are still to be written. The settings are derived after they "
            "are written"
        )
    if few := too_few_groups(len(items.groups), 0 if spec.eval_data else len(items.others)):
        say(few)
    if with_raft:
        _warn(spec.training, output_dir, say)
    _warn_of_bfloat16(spec.training, say)
    return _rest(report, encoder if with_raft else None, spec.training, colour, say)


def _derived(spec: RunSpec, report: RowsReport, say: Say) -> RunSpec:
    """The run with the settings that it would derive, which are told."""
    kept = _trained_on(report, spec.training)
    columns: list[Sequence[Any]] = [report.tokens, report.completion_tokens]
    columns += [report.golds[scale.name] for scale in spec.scales]
    lengths, completions, *golds = ([column[row] for row in kept] for column in columns)
    by_row = list(zip(*golds, strict=True))
    facts = measured(spec.model, spec.scales, len(kept), lengths, completions, by_row, report.sequences, spec.revision)
    recipe = derive(facts, spec.set_by_user).to_dict()
    derived = spec.with_recipe(recipe)
    if spec.bootstraps:  # twice the longest rationale, and there is none
        recipe["generation"].pop("max_new_tokens", None)
    say("\n".join(tell(recipe)) + "\n")
    return derived


def _work(name: str, spec: RunSpec, report: RowsReport, items: _Items) -> list[str]:
    """How much there is to do in a step, where that is known."""
    if name == "bootstrap":
        rows = report.trained if spec.rationales == "bootstrap" else report.bare
        return [f"{rows:,} rows; the cost is estimated when this step starts"]
    if not report.tokens:
        return []
    if name in ("stage1", "stage2"):
        # The stage-one model's own rationales are taken to be as long as the annotated ones.
        times = spec.num_generations + spec.keep_annotated if name == "stage2" and spec.writes_rationales else 1
        lengths = [report.tokens[row] for row in _trained_on(report, spec.training, times)]
        lines = [str(Plan.of(lengths * times, spec.training, Shard.from_launcher().count))]
        if times > 1 and spec.stage_two_training["share_prompts"]:
            lines.append(
                f"share_prompts: the {times} rationales of a prompt share one micro-batch, so their prompt is "
                "computed once"
            )
        return lines
    calibrates = name.startswith("calibrate-")
    if name not in _GENERATED or not spec.writes_rationales or (calibrates and not items.kept_aside):
        return []
    prompts = report.trained if name == "distill" else items.kept_aside if calibrates else items.held_out
    total = prompts * len(spec.scales) * (spec.num_generations if name == "distill" else 1)
    most = f", at most {int(spec.generation.get('max_new_tokens', 1024)):,} tokens each"
    return [f"{total:,} rationales for {prompts:,} prompts{'' if spec.bootstraps else most}"]


def _trained_on(report: RowsReport, training: Mapping[str, Any], times: int = 1) -> list[int]:
    """Which of the report's rows are trained on, if each has `times` rationales; some may be judged instead."""
    judged = training.get("judge_eval_items")
    if not judged:
        return list(range(report.trained))
    groups = [group for group in report.groups_of_rows for _ in range(times)]
    held_out = {place // times for place in held_out_rows(groups, judged, training.get("seed", 42))}
    return [row for row, place in enumerate(report.places) if place not in held_out]


def _to_train_on(report: RowsReport, training: Mapping[str, Any]) -> str:
    trained_on = len(_trained_on(report, training))
    judged = report.trained - trained_on
    return f"{trained_on:,} rows to train on" + (f", {judged:,} to judge during training" if judged else "")


def _finished(directory: Path, settings: Mapping[str, Any]) -> dict[str, float]:
    """The steps that the run would find finished."""
    if not (directory / "settings.json").exists():
        return {}
    changed = changed_settings(directory, settings)
    if changed and nothing_trained(directory):
        return {}
    if changed:
        raise FileExistsError(
            f"the run would be refused: {directory} holds another run ({'; '.join(changed[:5])}). Choose another "
            "output directory, or use the settings of that run"
        )
    return finished_steps(directory)


def dry_train(
    model: str,
    data: str,
    output_dir: str | Path,
    *,
    own: OwnColumns | None,
    training: Mapping[str, Any],
    colour: bool,
    eval_data: str | None = None,
    revision: str | None = None,
    say: Say = print,
) -> bool:
    """Print what `trl-tract train` would do with the same arguments; whether it would take all rows."""
    tokenizer = tokenizer_to_train(model, training.get("chat_template_path"), revision)
    scales = read_scales(training)
    bare: Bare = "all" if training.get("drop_rationale") else "none"
    say(f"Dry run: nothing is trained or written. trl-tract train would train one stage in {output_dir}:")
    taken = True
    if eval_data is not None:
        report, _ = examine(
            Source(eval_data, scales, own, bare=bare).found(), Path(eval_data).name, tokenizer, training
        )
        say(f"{report.trained:,} rows to evaluate on")
        taken = _rest(report, None, training, colour, say)
    report, encoder = examine(Source(data, scales, own, bare=bare).found(), Path(data).name, tokenizer, training)
    counted = training if eval_data is None else {**training, "judge_eval_items": 0}  # those of eval_data are judged
    say(_to_train_on(report, counted))
    if report.tokens:
        lengths = [report.tokens[row] for row in _trained_on(report, counted)]
        say(str(Plan.of(lengths, training, Shard.from_launcher().count)))
    _warn(training, output_dir, say)
    _warn_of_bfloat16(training, say)
    return _rest(report, encoder, training, colour, say) and taken


def _warn(training: Mapping[str, Any], output_dir: str | Path, say: Say) -> None:
    """What training would warn of at its start, while it costs nothing to change it."""
    for warning in EarlyWarnings(TRACTConfig(**{**training, "output_dir": str(output_dir)})).at_start():
        say(f"\nTraining would print this warning: {warning}")


def _warn_of_bfloat16(training: Mapping[str, Any], say: Say) -> None:
    halves = (training.get("bf16") or training.get("fp16")) and not torch.accelerator.is_available()
    if halves and (times := slowdown(torch.bfloat16)):
        say(f"bfloat16 is slow on this processor; float32 is {times:.1f} times as fast: add --bf16 false")


def _rest(report: RowsReport, encoder: RowEncoder | None, training: Mapping[str, Any], colour: bool, say: Say) -> bool:
    """Five rows with their loss if there is an `encoder`, refusals, what is doubtful; whether all would be taken."""
    for number, row in report.examples[:5] if encoder else ():
        assert encoder is not None
        tokens = view_row(encoder, row, training)
        gold = ", ".join(f"{token.gold:g}" for token in tokens if token.gold is not None)
        say(f"\nrow {number}, gold score {gold}{': ' + legend(tokens, colour=True) if colour else ''}")
        say(painted(tokens) if colour else labelled(tokens))
    say("")
    if (
        encoder
        and report.tokens
        and training.get("annotator_loss") == "distribution"
        and training.get("annotator_weight")
    ):
        say("The loss has one more term: the cross-entropy with the distribution of the gold scores (annotator_loss)")
    if report.judged_only:
        say(f"{report.judged_only:,} rows have a score but no completion: they are not used for training")
    if report.refused:
        say(f"Refused: {what_is_refused(report, training)}")
    elif not report.trained:
        say("Refused: no row has a completion (rationale, marker and score), so there is nothing to train on")
    for line in contradictions(report, read_scales(training)):
        say(line)
    dropped = training.get("invalid_rows") == "drop"
    if report.refused and not dropped:
        say("Training would stop here. With --invalid_rows drop, it continues without these rows")
    return report.trained > 0 and (not report.refused or dropped)
