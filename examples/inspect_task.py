"""An inspect_ai task whose answers a TRACT judge scores.

    inspect eval examples/inspect_task.py -T judge=my-judge/tract -T data=rows.jsonl --model MODEL

Rows have an `instruction` and, if known, a `reference`: what a judge with a saved rubric is given beside the response.
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
        data: JSONL with `instruction` and, with `reference`, `reference`.
        reference: Whether the judge is given the reference.
    """
    fields = FieldSpec(input="instruction", target="reference")
    return Task(
        dataset=json_dataset(data, fields),
        solver=generate(),
        scorer=tract_scorer(judge, reference=reference),
    )
