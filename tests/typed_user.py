"""A script as a user would write it, for `mypy --strict`: the types are the package's own, not Any."""

from typing import assert_type

from trl_tract import (
    CoTRAILJudge,
    CoTSelfDistill,
    Judgement,
    ScoreGrid,
    TRACTConfig,
    TRACTTrainer,
    make_reward_func,
    rubric_prompt,
    score_report,
)
from trl_tract.evaluation.report import ScoreReport


def train(model: str, rows: object) -> str:
    """Stage one, as a script would have it."""
    args = TRACTConfig("stage1", score_values=[1, 2, 3, 4, 5], raft_weight=0.5)
    trainer = TRACTTrainer(model, args, train_dataset=rows)
    trainer.train()
    trainer.save_model()
    assert_type(args.raft_weight, float)
    assert_type(args.score_marker, str)
    return "stage1"


def write(stage_one: str) -> None:
    """Self-generation."""
    CoTSelfDistill.from_pretrained(stage_one).distill_file("rows.jsonl", "self-generated")


def judge(path: str, replies: list[str], gold: list[float]) -> ScoreReport:
    """Judging, and how well it agrees."""
    descriptions = {"1": "Rude.", "5": "Polite."}
    prompts = [
        rubric_prompt(instruction="Answer.", response=reply, criterion="Is it polite?", descriptions=descriptions)
        for reply in replies
    ]
    assert_type(prompts[0], str)
    judge = CoTRAILJudge.from_pretrained(path, num_generations=2)
    judgements = judge.judge(prompts)
    assert_type(judgements, list[Judgement])
    assert_type(judgements[0].score, float)
    assert_type(judgements[0].error, str | None)
    make_reward_func(judge, scale="unit")
    report = score_report([judgement.score for judgement in judgements], gold)
    assert_type(report, ScoreReport)
    assert_type(report.pearson.value, float)
    return report


grid = ScoreGrid.from_values({"poor": 1, "good": 2})
assert_type(grid.texts, tuple[str, ...])
