"""An inspect_ai task scored by a TRACT judge.

    inspect eval examples/inspect_task.py -T judge=my-judge/tract -T data=rows.jsonl --model MODEL

Rows have an `instruction` and optionally a `reference`. A judge with a saved rubric gets both with the response.
"""

from inspect_ai import Task, task
from inspect_ai.dataset import FieldSpec, json_dataset
from inspect_ai.solver import generate

from trl_tract.integrations.inspect_ai import tract_scorer


@task
def judged(judge: str, data: str, reference: bool = False) -> Task:
    """Ask the model for an answer to each instruction, and score it.

    Args:
        judge: A judge's directory or hub id, or the address of `trl-tract serve`.
        data: JSONL with the columns `instruction` and, if used, `reference`.
        reference: Whether to give the judge the reference.
    """
    fields = FieldSpec(input="instruction", target="reference")
    return Task(
        dataset=json_dataset(data, fields),
        solver=generate(),
        scorer=tract_scorer(judge, reference=reference),
    )
