"""A judge as a reward function for TRL's GRPOTrainer and RLOOTrainer.

Knows what those trainers hand to a reward function, lists alone; knows nothing of their classes or of models.
"""

import logging
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, Literal

from trl_tract.judge.judge import CoTRAILJudge, Judgement
from trl_tract.rows.row import RENDERED_WITH, Prompt, Row
from trl_tract.sources.rubric import Rubric
from trl_tract.sources.schemas import as_text

logger = logging.getLogger(__name__)

JudgePrompt = Callable[[Row], Prompt | None]
RewardFunc = Callable[..., list[float | None]]


def make_reward_func(
    judge: CoTRAILJudge,
    *,
    prompt: JudgePrompt | None = None,
    scale: Literal["unit"] | None = None,
    failed: float | None = None,
    aspect: str | None = None,
) -> RewardFunc:
    """Make a reward function from a judge: `GRPOTrainer(policy, reward_funcs=make_reward_func(judge), ...)`.

    A completion that the judge cannot score gets None, which TRL reads as "this reward does not apply": it is left out
    of the group's mean and has no effect. With other reward functions in the same trainer, TRL adds up the others, so
    None counts as 0; set `failed` there. TRL's log shows `rewards/tract_judge/mean` and `std`, and

    - `rewards/tract_judge/failed`: fraction of judged completions without a score, 0 to 1;
    - `rewards/tract_judge/grid_mass`: mean probability mass on the score grid. A policy can learn to raise or lower it;
    set the judge's `normalize_grid` to remove its effect on the score.

    With `log_completions=True`, the table of completions shows the judge's rationale, or the reason for a missing
    score. The names use the function's `__name__`; set it if one trainer has two judges.

    Args:
        judge: The judge. Its random seed depends on the trainer's step, so a resumed run gives the same rewards.
        prompt: Writes the judge's prompt, text or messages, of a row: `prompt` and `completion` as TRL gives them
            (text, or messages if the dataset is conversational; the completion is untrusted) and the dataset's other
            columns. None from it means that this reward does not apply to the row. By default the prompt is made of
            the columns `criterion`, `descriptions` (score text -> what earns it) and, if there is one, `reference`, in
            the order or template of the rubric that was saved with the judge, else by `rubric_prompt`. Without these
            columns the saved rubric itself is used. A row where both are None is not judged. The prompt is text, or a
            chat message where the judge was trained on such. Write the prompt as in the judge's training rows: a judge
            trained on messages needs messages. The columns `tools`, `chat_template_kwargs` and `prompt_is_text` are the
            judge's: its prompt is rendered with them, as that of a training row is.
        scale: None for rubric units. `"unit"` maps the ends of the score range to 0 and 1 without clipping: an expected
            score with mass off the grid can be below 0.
        failed: Reward of a completion that the judge cannot score, in the units of the returned rewards. None: no
            reward.
        aspect: For a judge of several aspects: the aspect whose score is the reward. None: the mean of all aspects,
            each mapped to 0 to 1 regardless of `scale`; a completion without one of the scores gets no reward.

    Returns:
        A reward function: lists of prompts, completions and columns in, a float or None for each completion out.

    Raises:
        ValueError: An unknown `scale` or `aspect`, or a `failed` that is not finite; or no `prompt` for a judge of
            several aspects, since a rubric describes one. From the reward function: columns that the default prompt
            needs are missing, or descriptions that are not of the judge's scores.
    """
    if not callable(getattr(judge, "judge", None)):
        raise TypeError(f"judge is {judge!r}, not a judge. Load one with CoTRAILJudge.from_pretrained(path)")
    if scale not in (None, "unit"):
        raise ValueError(f"scale={scale!r} is unknown. Use None for rubric units, or 'unit' for 0 to 1")
    names = [each.name for each in judge.scales]
    if aspect is not None and aspect not in filter(None, names):
        raise ValueError(f"aspect={aspect!r} is unknown: this judge scores {', '.join(filter(None, names)) or 'one'}")
    if len(names) > 1 and prompt is None:
        raise ValueError(
            f"this judge scores {', '.join(names)}, but the default prompt describes only one. Write the prompt with "
            "make_reward_func(judge, prompt=...)"
        )
    if failed is not None and not math.isfinite(failed):
        raise ValueError(
            f"failed={failed} would make the rewards of the whole group useless. Use a finite number, or None"
        )
    return _JudgeReward(judge, prompt, scale, failed, aspect)


class _JudgeReward:
    """What `make_reward_func` returns; not a closure, so that it can be pickled if its judge can."""

    def __init__(
        self,
        judge: CoTRAILJudge,
        prompt: JudgePrompt | None,
        scale: Literal["unit"] | None,
        failed: float | None,
        aspect: str | None,
    ) -> None:
        self.__name__ = "tract_judge"  # What TRL calls this reward in its logs.
        self.judge = judge
        self.prompt = prompt
        self.in_units = scale == "unit" or (len(judge.scales) > 1 and aspect is None)
        self.failed = failed
        self.scales = [each for each in judge.scales if aspect in (None, each.name)]

    def __call__(
        self,
        prompts: Sequence[Any],
        completions: Sequence[Any],
        *,
        trainer_state: Any = None,
        log_extra: Callable[[str, list[Any]], None] | None = None,
        log_metric: Callable[[str, float], None] | None = None,
        **columns: Any,
    ) -> list[float | None]:
        asked: dict[int, Row] = {}
        for i, (before, completion) in enumerate(zip(prompts, completions, strict=True)):
            # What TRL adds beside the columns is not a list of the batch's length.
            rest = {key: of[i] for key, of in columns.items() if isinstance(of, list) and len(of) == len(prompts)}
            row = {**rest, "prompt": before, "completion": completion}
            written = self._rubric_row(row) if self.prompt is None else {"prompt": self.prompt(row)}
            if written is not None and written["prompt"] is not None:
                asked[i] = {name: rest[name] for name in RENDERED_WITH if name in rest} | written
        # With the step: a completion that comes up again is judged anew, not by the words of the first time.
        step = 0 if trainer_state is None else int(trainer_state.global_step)
        judged = self.judge.judge(list(asked.values()), seed=self.judge.seed + step)
        judgements = dict(zip(asked, judged, strict=True))
        rewards = [self._reward(judgements[i]) if i in judgements else None for i in range(len(prompts))]
        self._report(judgements, len(prompts), log_extra, log_metric)
        return rewards

    def _judged(self, judgement: Judgement) -> list[Judgement]:
        """The judgements that the reward is made of, one for each scale; the whole where it has none of them."""
        return [judgement.aspects.get(scale.name, judgement) for scale in self.scales]

    def _reward(self, judgement: Judgement) -> float | None:
        judged = self._judged(judgement)
        if _lack(judged) is not None:
            return self.failed
        rewards = []
        for scale, own in zip(self.scales, judged, strict=True):
            low, high = scale.grid.values[0], scale.grid.values[-1]
            rewards.append((own.score - low) / (high - low) if self.in_units else own.score)
        return sum(rewards) / len(rewards)

    def _report(
        self,
        judgements: Mapping[int, Judgement],
        count: int,
        log_extra: Callable[[str, list[Any]], None] | None,
        log_metric: Callable[[str, float], None] | None,
    ) -> None:
        name = self.__name__
        judged = {i: self._judged(judgement) for i, judgement in judgements.items()}
        lost = {i: reason for i, own in judged.items() if (reason := _lack(own)) is not None}
        masses = [each.grid_mass for i, own in judged.items() if i not in lost for each in own]
        if lost:
            i, reason = next(iter(lost.items()))
            logger.warning(
                "%s: no score for %d of %d completions; their reward is %s (first: completion %d of the batch, %s)",
                name,
                len(lost),
                len(judgements),
                self.failed,
                i,
                reason,
            )
        if log_metric is not None and judgements:
            # A share, since TRL averages what it is given over processes and over the steps between two logs.
            log_metric(f"rewards/{name}/failed", len(lost) / len(judgements))
            if masses:
                log_metric(f"rewards/{name}/grid_mass", sum(masses) / len(masses))
        if log_extra is not None:
            said = [judgements.get(i, Judgement()) for i in range(count)]
            log_extra(f"{name}/rationale", ["\n\n".join(judgement.rationales) for judgement in said])
            log_extra(f"{name}/error", [lost.get(i, "") for i in range(count)])

    def _rubric_row(self, row: Row) -> Row | None:
        own = self.judge.rubric
        absent = [column for column in ("criterion", "descriptions") if column not in row]
        if own is not None and len(absent) == 2:
            return self._asked(own, row)
        if absent:
            raise ValueError(
                f"the judge's prompt needs the dataset column(s) {' and '.join(absent)}; found: "
                f"{', '.join(sorted(row))}. Add `criterion` (the rubric's question), `descriptions` (a mapping from "
                "each score to its description) and optionally `reference`, and leave remove_unused_columns at False. "
                "Or write the prompt yourself with make_reward_func(judge, prompt=...)"
            )
        if row["criterion"] is None and row["descriptions"] is None:
            return None
        # `datasets` gives every row the keys of all rows, and None where a row lacks one.
        texts = {str(score): text for score, text in (row["descriptions"] or {}).items() if text is not None}
        grid = self.judge.grid.texts
        if row["criterion"] is None or set(texts) != set(grid):
            raise ValueError(
                f"criterion={row['criterion']!r} with descriptions of the scores {', '.join(texts) or 'none'}: the "
                f"judge needs a criterion and one description for each of its scores {', '.join(grid)}"
            )
        # In the words and the order of the rubric that the judge was trained with, if there was one.
        asked = own or Rubric("", {})
        if idle := [column for column in ("criterion", "descriptions") if not asked.shows(column)]:
            raise ValueError(
                f"the column {idle[0]} would have no effect, because the template of the judge's rubric has no "
                f"{{{idle[0]}}}. Remove the columns criterion and descriptions, or write the prompt yourself with "
                "make_reward_func(judge, prompt=...)"
            )
        described = {score: texts[score] for score in grid}
        return self._asked(replace(asked, criterion=row["criterion"], descriptions=described, scale=None), row)

    def _asked(self, rubric: Rubric, row: Row) -> Row:
        marker = self.judge.scales[0].marker
        said = _prompt_text(row["prompt"]), _completion_text(row["completion"])
        prompt = rubric.prompt(*said, row.get("reference"), marker)
        return as_text({"prompt": prompt}, bool(self.judge.chat))


def _lack(judged: Sequence[Judgement]) -> str | None:
    """Why there is no reward; None if every judgement has a score."""
    lacking = [own.error or f"its score is {own.score}" for own in judged if own.error or not math.isfinite(own.score)]
    return "; ".join(lacking) or None


def _prompt_text(prompt: Prompt) -> str:
    """What the policy was asked: its text, its only message, or a conversation with the roles written out."""
    if isinstance(prompt, str):
        return prompt
    if len(prompt) == 1:
        return _content(prompt[0])
    return "\n\n".join(f"{message['role']}: {_content(message)}" for message in prompt)


def _completion_text(completion: Prompt) -> str:
    """What the policy wrote; of a completion with tool calls, its last answer. Empty if there is none."""
    if isinstance(completion, str):
        return completion
    answers = [_content(message) for message in completion if message.get("role") == "assistant"]
    return answers[-1] if answers else ""


def _content(message: Mapping[str, Any]) -> str:
    """The text of a message; of one in blocks, its text blocks."""
    content = message.get("content")
    if isinstance(content, list):
        return "\n".join(block["text"] for block in content if block.get("type") == "text")
    return content or ""
