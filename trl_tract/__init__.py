"""TRACT for TRL: two-stage regression-aware fine-tuning of an LLM judge that writes a rationale and then a score."""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from trl_tract.backends import ServerBackend, TransformersBackend, VLLMBackend
    from trl_tract.distill.bootstrap import CoTBootstrap
    from trl_tract.distill.distill import CoTSelfDistill
    from trl_tract.evaluation.report import score_report
    from trl_tract.judge.judge import CoTRAILJudge, Judgement
    from trl_tract.judge.rewards import make_reward_func
    from trl_tract.runs.pipeline import run_tract
    from trl_tract.scale.decisions import expected_score
    from trl_tract.scale.grid import ScoreGrid
    from trl_tract.sources.prompts import from_feedback_collection, from_prometheus_eval, rubric_prompt
    from trl_tract.training.config import TRACTConfig
    from trl_tract.training.judge_eval import JudgeEvalCallback
    from trl_tract.training.real_config import REALConfig
    from trl_tract.training.real_trainer import REALTrainer
    from trl_tract.training.trainer import TRACTTrainer

__version__ = "0.1.0"

# Imported at first use: `trl-tract --help` and a user's own imports should not wait for TRL.
_FILES = {
    "CoTBootstrap": "distill.bootstrap",
    "CoTRAILJudge": "judge.judge",
    "CoTSelfDistill": "distill.distill",
    "JudgeEvalCallback": "training.judge_eval",
    "Judgement": "judge.judge",
    "REALConfig": "training.real_config",
    "REALTrainer": "training.real_trainer",
    "ScoreGrid": "scale.grid",
    "ServerBackend": "backends",
    "TRACTConfig": "training.config",
    "TRACTTrainer": "training.trainer",
    "TransformersBackend": "backends",
    "VLLMBackend": "backends",
    "expected_score": "scale.decisions",
    "from_feedback_collection": "sources.prompts",
    "from_prometheus_eval": "sources.prompts",
    "make_reward_func": "judge.rewards",
    "rubric_prompt": "sources.prompts",
    "run_tract": "runs.pipeline",
    "score_report": "evaluation.report",
}

__all__ = [
    "CoTBootstrap",
    "CoTRAILJudge",
    "CoTSelfDistill",
    "JudgeEvalCallback",
    "Judgement",
    "REALConfig",
    "REALTrainer",
    "ScoreGrid",
    "ServerBackend",
    "TRACTConfig",
    "TRACTTrainer",
    "TransformersBackend",
    "VLLMBackend",
    "expected_score",
    "from_feedback_collection",
    "from_prometheus_eval",
    "make_reward_func",
    "rubric_prompt",
    "run_tract",
    "score_report",
]


def __getattr__(name: str) -> Any:
    if name not in _FILES:
        raise AttributeError(f"module 'trl_tract' has no attribute {name!r}")
    return getattr(importlib.import_module(f"trl_tract.{_FILES[name]}"), name)


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
