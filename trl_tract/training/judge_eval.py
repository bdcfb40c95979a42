"""Evaluation by the model's own rationales while it is trained: held-out items are judged as the finished judge will.

Knows the judge and what the trainer holds; knows nothing of losses.
"""

import inspect
import itertools
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from accelerate.utils import gather_object
from transformers import TrainerCallback
from transformers.utils import logging

from trl_tract.backends.transformers import TransformersBackend
from trl_tract.evaluation.metrics import mae, pearson, rmse, spread
from trl_tract.evaluation.verdict import MANY_FAILED
from trl_tract.judge.judge import CoTRAILJudge
from trl_tract.judge.judgement import Judgement
from trl_tract.rows.golds import mean_golds
from trl_tract.rows.rendering import as_prompt_completion
from trl_tract.rows.row import ROW_NUMBER, Row
from trl_tract.scale.text import ScoreNotFoundError

logger = logging.get_logger(__name__)

_OF_TRAINING = {"backend", "score_values", "score_marker", "completion_format", "aspects"}


class JudgeEvalCallback(TrainerCallback):
    """Judge held-out items at each evaluation, with rationales that the model in training writes itself.

    `eval_score/...` metrics use the annotated rationales, and can be good although the finished judge is not. This
    callback runs the judge with the current weights, and adds these metrics to the evaluation:

    - `eval_judge/rmse`, `eval_judge/mae`: errors, in rubric units;
    - `eval_judge/pearson`: correlation; NaN if all scores are the same;
    - `eval_judge/spread`: standard deviation of the scores divided by that of the gold scores; near 0, all scores are
      the same;
    - `eval_judge/grid_mass`: mean probability mass on the grid;
    - `eval_judge/failed`: fraction of items without a score. From 0.2 on, the other metrics are NaN, so that a model
      that often fails to score is never selected as the best one.

    With several aspects, the names end with the aspect: `eval_judge/rmse/tone`. You can use them in
    `metric_for_best_model` and with transformers' `EarlyStoppingCallback`. The callback does not change training,
    including its random numbers.

    Args:
        items: Rows with `prompt` and gold scores, written like the training rows; other columns are ignored. None:
            `num_items` rows of the trainer's evaluation set, evenly spaced.
        num_items: Number of rows of the evaluation set to judge.
        batch_size: Number of rationales generated at once. None: `per_device_eval_batch_size`.
        **settings: Arguments of `CoTRAILJudge`, such as `max_new_tokens` and `temperature`.

    Raises:
        ValueError: There are no items, or one has no gold score; an unknown setting.

    Example:
        `TRACTTrainer(model, TRACTConfig("out", eval_strategy="steps", eval_steps=50), train_dataset=rows,
        eval_dataset=held_out, callbacks=[JudgeEvalCallback(num_items=32, max_new_tokens=256)])`
    """

    def __init__(
        self,
        items: Iterable[Mapping[str, Any]] | None = None,
        *,
        num_items: int = 64,
        batch_size: int | None = None,
        **settings: Any,
    ) -> None:
        if num_items < 1:
            raise ValueError(f"num_items={num_items} must be 1 or more")
        known = inspect.signature(CoTRAILJudge).parameters.keys() - _OF_TRAINING
        if unknown := sorted(settings.keys() - known):
            raise ValueError(f"{unknown[0]!r} is not a judge setting. Settings: {', '.join(sorted(known))}")
        self.items = None if items is None else list(items)
        self.num_items, self.batch_size, self.settings = num_items, batch_size, settings
        self._read: dict[str | None, tuple[list[Row], np.ndarray[Any, np.dtype[np.float64]]]] = {}

    def check(self, trainer: Any) -> None:
        """Read the items and make the judge, so that what is wrong is said before training."""
        eval_dataset = trainer.given_eval_rows
        self._read = {}
        if trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled:
            raise ValueError(
                "judging during training needs the full weights on each device, but FSDP and DeepSpeed shard them. "
                "Leave JudgeEvalCallback and judge_eval_items out, and judge the checkpoints with trl-tract judge"
            )
        if self.items is not None:
            if isinstance(eval_dataset, Mapping):
                raise ValueError("both items and several evaluation sets were given. Use only one of the two")
            self._read[None] = _read_items(enumerate(self.items), trainer, "items", drop=False)
        elif isinstance(eval_dataset, Mapping):
            self._read = {name: self._part_of(rows, trainer, name) for name, rows in eval_dataset.items()}
        elif eval_dataset is None:
            raise ValueError("there are no rows to judge during training. Give an eval_dataset, or items")
        else:
            self._read[None] = self._part_of(eval_dataset, trainer, "eval")
        self._judge(trainer)

    def metrics(self, trainer: Any, dataset: str | None = None) -> dict[str, float]:
        """Judge, each process its share of the items.

        Returns:
            The figures that the class lists, from `judge/rmse` on; none for an evaluation set that was not given to the
            trainer at the start.
        """
        if not self._read:  # added to a trainer that was made before
            self.check(trainer)
        if dataset not in self._read:
            return {}
        rows, gold = self._read[dataset]
        rank, processes = trainer.accelerator.process_index, trainer.accelerator.num_processes
        judge = self._judge(trainer)
        silent = None if trainer.is_world_process_zero() else lambda count: None
        own = judge.judge(rows[rank::processes], on_progress=silent)
        numbers = range(rank, len(rows), processes)
        names = [scale.name for scale in judge.scales]
        told = [(number, _figures(each, names), each.error) for number, each in zip(numbers, own, strict=True)]
        outcomes = gather_object(told)
        judged = {number: figures for number, figures, _ in outcomes}
        self._tell_of([error for _, _, error in outcomes if error], len(rows), dataset)
        table = np.array([judged[number] for number in range(len(rows))])  # (n, A, 2): score and grid mass
        found: dict[str, float] = {}
        for column, name in enumerate(names):
            behind = f"/{name}" if name else ""
            figures = _agreement(table[:, column, 0], gold[:, column], table[:, column, 1])
            found |= {f"judge/{figure}{behind}": value for figure, value in figures.items()}
        return found

    def _tell_of(self, errors: Sequence[str], count: int, dataset: str | None) -> None:
        if len(errors) < MANY_FAILED * count:
            return
        reason, times = Counter(errors).most_common(1)[0]
        of = f" of {dataset}" if dataset else ""
        logger.warning(
            f"{len(errors)} of {count} judged items{of} have no score ({times} of them: {reason}), so eval_judge/rmse "
            "and the other eval_judge metrics are NaN. This evaluation cannot select the best checkpoint or trigger "
            "early stopping. Raise max_new_tokens in judge_eval_settings, or start evaluating later (eval_delay)"
        )

    def _part_of(self, rows: Any, trainer: Any, name: str) -> Any:
        """Some rows of an evaluation set: evenly spaced, or the first of a stream."""
        if hasattr(rows, "__len__"):
            count = min(self.num_items, len(rows))
            places = [place * len(rows) // count for place in range(count)]
            part = [(place, rows[place]) for place in places]
        else:
            part = list(enumerate(itertools.islice(rows, self.num_items)))
        return _read_items(part, trainer, f"the {name} dataset", drop=trainer.args.invalid_rows == "drop")

    def _judge(self, trainer: Any) -> CoTRAILJudge:
        size = self.batch_size or trainer.args.per_device_eval_batch_size
        backend = TransformersBackend(trainer.model, trainer._tokenizer, batch_size=size)
        return CoTRAILJudge.from_config(trainer.judge_config, backend, **self.settings)


def prepare_judging(trainer: Any) -> None:
    """Make the trainer's callbacks of this kind ready; one is made of `judge_eval_items` where there is none."""
    if trainer.args.judge_eval_items and not _callbacks(trainer):
        settings = trainer.args.judge_eval_settings or {}
        trainer.add_callback(JudgeEvalCallback(num_items=trainer.args.judge_eval_items, **settings))
    for callback in _callbacks(trainer):
        callback.check(trainer)


def is_judged(metric: str) -> bool:
    """Whether a metric is one of those that come from judging: `judge/rmse`, with or without `eval_` before it."""
    return re.match(r"(?:\w+_)?judge/", metric) is not None


def check_metric(trainer: Any) -> None:
    """Refuse to choose the best checkpoint by judging where nothing is judged: the host would find out much later."""
    metric = trainer.args.metric_for_best_model or ""
    if is_judged(metric) and not _callbacks(trainer):
        raise ValueError(
            f"metric_for_best_model={metric!r} comes from judging held-out rows, but none are judged. Set "
            "judge_eval_items=64, or add a JudgeEvalCallback"
        )


def judged_now(trainer: Any, eval_dataset: Any, prefix: str) -> dict[str, float]:
    """The figures of the trainer's callbacks, by the names under which they are logged; says once what others mean.

    Args:
        eval_dataset: What is evaluated: the name of an evaluation set, or None. Other rows than those that were given
            at the start are not judged.
    """
    callbacks = _callbacks(trainer)
    if not trainer.args.drop_rationale and trainer.is_world_process_zero():
        logger.warning_once(_READ + ("" if callbacks else _INSTEAD))
    if eval_dataset is not None and not isinstance(eval_dataset, str):
        return {}
    found = [callback.metrics(trainer, eval_dataset) for callback in callbacks]
    return {f"{prefix}_{name}": value for each in found for name, value in each.items()}


_READ = (
    "eval_score/... metrics use the annotated rationales of the evaluation rows. A judge writes its own rationales, "
    "and its errors can be much larger"
)
_INSTEAD = ". judge_eval_items=64 judges 64 rows at each evaluation and logs eval_judge/... metrics"


def _callbacks(trainer: Any) -> list[JudgeEvalCallback]:
    return [each for each in trainer.callback_handler.callbacks if isinstance(each, JudgeEvalCallback)]


def _read_items(
    rows: Iterable[tuple[int, Mapping[str, Any]]], trainer: Any, where: str, *, drop: bool
) -> tuple[list[Row], np.ndarray[Any, np.dtype[np.float64]]]:
    """What the judge is asked with, and the gold scores `(n, A)`, rubric units."""
    asked: list[Row] = []
    golds: list[list[float]] = []
    refused: list[str] = []
    for place, row in rows:
        number = row.get(ROW_NUMBER, place)
        try:
            if "input_ids" in row and "prompt" not in row:
                raise ValueError("it is tokenised, but a judge needs its prompt. Give items to JudgeEvalCallback")
            gold = mean_golds(row, trainer.scales)
            if gold is None:
                raise ValueError("it has no gold score")
            item = as_prompt_completion(row)
        except (ScoreNotFoundError, ValueError) as error:
            if not drop:
                raise ValueError(f"{where}, row {number} cannot be judged during training: {error}") from error
            refused.append(str(error))
            continue
        asked.append({column: value for column, value in item.items() if column != "completion"})
        golds.append(gold)
    if not golds:
        reason = f": {refused[0]}" if refused else ""
        raise ValueError(f"{where} has no row that can be judged during training{reason}")
    if refused:
        logger.warning("%s: %d rows are not judged during training (first: %s)", where, len(refused), refused[0])
    return asked, np.array(golds)


def _figures(judgement: Judgement, names: Sequence[str]) -> list[tuple[float, float]]:
    """Score and grid mass on each scale; an item whose prompt cannot be read has no aspects."""
    judged = [judgement.aspects.get(name, judgement) for name in names]
    return [(own.score, own.grid_mass) for own in judged]


def _agreement(score: Any, gold: Any, mass: Any) -> dict[str, float]:
    given = np.isfinite(score)
    failed = float((~given).mean())
    figures = dict.fromkeys(("rmse", "mae", "pearson", "spread", "grid_mass"), np.nan)
    if failed < MANY_FAILED:
        score, gold = score[given], gold[given]
        figures = {
            "rmse": rmse(score, gold),
            "mae": mae(score, gold),
            "pearson": pearson(score, gold),
            "spread": spread(score, gold),
            "grid_mass": float(mass[given].mean()),
        }
    return figures | {"failed": failed}
