"""A judge as a scorer of MLflow. Knows the columns of an evaluation; knows nothing of models."""

import threading
from collections.abc import Callable, Mapping
from typing import Any

try:
    from mlflow.entities import AssessmentError, AssessmentSource, AssessmentSourceType, Feedback
    from mlflow.genai.scorers import Scorer, scorer
except ImportError as error:
    raise ImportError('tract_scorer needs MLflow: pip install "trl-tract[mlflow]"') from error

from trl_tract.integrations.forms import Item
from trl_tract.integrations.reach import Ask, reach
from trl_tract.judge.judge import CoTRAILJudge
from trl_tract.rows.row import Prompt

JudgePrompt = Callable[[Any, Any, Any], Prompt]


def tract_scorer(
    judge: CoTRAILJudge | str,
    *,
    prompt: JudgePrompt | None = None,
    instruction: str | None = None,
    reference: str | None = None,
    name: str = "tract",
    seed: int | None = None,
    **settings: Any,
) -> Scorer:
    """A scorer for `mlflow.genai.evaluate(data=..., scorers=[tract_scorer("my-judge/tract")])`.

    Its feedback has the expected score as value, the judge's rationale, and grid mass and spread as metadata. A row
    that the judge cannot score has an error and no value: one NaN would cost MLflow's aggregates of all rows.

    Args:
        judge: A judge; its directory or hub id; or the address of `trl-tract serve`.
        prompt: Writes the judge's prompt of a row's inputs, outputs and expectations. None: the rubric that was saved
            with the judge does, of instruction, response (the outputs) and reference.
        instruction: Key of the inputs that holds what the response answers. None: the only one.
        reference: Key of the expectations that holds a reference answer, such as `expected_response`. None: none.
        name: Of the feedback.
        seed: Random seed in place of the judge's.
        **settings: Arguments of `CoTRAILJudge` where it is loaded here.
    """
    ask: list[Ask] = []
    loading = threading.Lock()
    source = AssessmentSource(AssessmentSourceType.LLM_JUDGE, judge if isinstance(judge, str) else repr(judge))

    def item(inputs: Any, outputs: Any, expectations: Any) -> Item:
        if prompt is not None:
            written = prompt(inputs, outputs, expectations)
            return Item(prompt=written if isinstance(written, str) else [dict(turn) for turn in written], seed=seed)
        best = None if reference is None else _text(expectations, reference, "expectations")
        return Item(
            response=_text(outputs, None, "outputs"),
            instruction=_text(inputs, instruction, "inputs"),
            reference=best,
            seed=seed,
        )

    def failed(code: str, message: str | None, metadata: dict[str, str] | None = None) -> Feedback:
        return Feedback(
            name=name, error=AssessmentError(error_code=code, error_message=message), source=source, metadata=metadata
        )

    @scorer(name=name)  # type: ignore[untyped-decorator]
    def score(inputs: Any = None, outputs: Any = None, expectations: Any = None) -> Feedback:
        try:
            asked = item(inputs, outputs, expectations)
        except ValueError as error:
            return failed("UNREADABLE_ROW", str(error))
        with loading:
            if not ask:
                ask.append(reach(judge, **settings))
        try:
            told = ask[0](asked)
        except (ValueError, RuntimeError, OSError) as error:
            return failed("JUDGE_FAILED", str(error))
        numbers = {"grid_mass": told.grid_mass, "spread": told.spread}
        metadata = {key: f"{number:.6g}" for key, number in numbers.items() if number is not None}
        if told.score is None:
            return failed("NO_SCORE", told.error, metadata)
        rationale = "\n\n".join(told.rationales).strip()
        return Feedback(name=name, value=float(told.score), rationale=rationale, source=source, metadata=metadata)

    return score


def _text(given: Any, key: str | None, what: str) -> str:
    """A text, or the one of a mapping."""
    if isinstance(given, Mapping) and key is not None and key not in given:
        raise ValueError(f"the {what} have no {key!r}; they have {', '.join(map(str, given)) or 'nothing'}")
    if isinstance(given, Mapping) and (key is not None or len(given) == 1):
        given = given[key] if key is not None else next(iter(given.values()))
    if isinstance(given, Mapping):
        raise ValueError(
            f"the {what} have {', '.join(map(str, given)) or 'nothing'}: say which one to use, or build the prompt "
            "with tract_scorer(judge, prompt=...)"
        )
    if not isinstance(given, str):
        raise ValueError(f"the {what} are {type(given).__name__}, not text. Build the prompt with prompt=...")
    return given
