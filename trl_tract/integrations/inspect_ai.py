"""A judge as a scorer of inspect_ai. Knows a task's state; knows nothing of models."""

from collections.abc import Callable
from typing import Any, Literal

import anyio
import anyio.to_thread

try:
    from inspect_ai.scorer import Score, Scorer, Target, mean, scorer, stderr
    from inspect_ai.solver import TaskState
except ImportError as error:
    raise ImportError('tract_scorer needs inspect_ai: pip install "trl-tract[inspect]"') from error

from trl_tract.integrations.forms import Item
from trl_tract.integrations.reach import Ask, reach
from trl_tract.judge.judge import CoTRAILJudge
from trl_tract.rows.row import Prompt

JudgePrompt = Callable[[TaskState, Target], Prompt]
_AT_ONCE = 256
"""Samples that may wait for the judge at once, a thread each."""


@scorer(metrics=[mean(), stderr()])  # type: ignore[untyped-decorator]
def tract_scorer(
    judge: CoTRAILJudge | str,
    *,
    prompt: Literal["rubric", "input"] | JudgePrompt = "rubric",
    reference: bool = False,
    seed: int | None = None,
    **settings: Any,
) -> Scorer:
    """Score a sample's output: the expected score, with the judge's rationale as the explanation.

    A sample that the judge cannot score is unscored, with the reason as its explanation: metrics leave it out. Metadata
    has `grid_mass`, `spread` and `distribution`.

    Args:
        judge: A judge; its directory or hub id; or the address of `trl-tract serve`.
        prompt: `rubric`: the sample's input and the output, by the rubric saved with the judge. `input`: the sample's
            input is the judge's whole prompt, and the output does not count. Or a function that writes the prompt.
        reference: Whether the target is an answer that would earn the highest score. With `prompt="rubric"` alone.
        seed: Random seed in place of the judge's.
        **settings: Arguments of `CoTRAILJudge` where it is loaded here.

    Returns:
        A scorer: `inspect score LOG --scorer trl_tract/tract_scorer -S judge=DIRECTORY` finds it by its name.
    """
    ask: list[Ask] = []  # loaded when the first sample is scored, not when a task is listed
    limiter = anyio.CapacityLimiter(_AT_ONCE)
    loading = anyio.Lock()

    def item(state: TaskState, target: Target) -> Item:
        if callable(prompt):
            written = prompt(state, target)
            return Item(prompt=written if isinstance(written, str) else [dict(turn) for turn in written], seed=seed)
        if prompt == "input":
            given = state.input
            turns = given if isinstance(given, str) else [{"role": one.role, "content": one.text} for one in given]
            return Item(prompt=turns, seed=seed)
        texts = {"response": state.output.completion, "instruction": state.input_text}
        return Item(**texts, reference=target.text if reference else None, seed=seed)

    async def score(state: TaskState, target: Target) -> Score:
        async with loading:
            if not ask:
                ask.append(await anyio.to_thread.run_sync(lambda: reach(judge, **settings)))
        try:
            told = await anyio.to_thread.run_sync(ask[0], item(state, target), limiter=limiter)
        except (ValueError, RuntimeError, OSError) as error:
            return Score.unscored(reason="the judge failed", answer=state.output.completion, explanation=str(error))
        metadata = {"grid_mass": told.grid_mass, "spread": told.spread, "distribution": told.distribution}
        if told.score is None:
            return Score.unscored(
                reason="no score", answer=state.output.completion, explanation=told.error, metadata=metadata
            )
        return Score(
            value=told.score,
            answer=state.output.completion,
            explanation="\n\n".join(told.rationales).strip(),
            metadata=metadata,
        )

    return score
