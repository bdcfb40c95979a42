"""TRACT for TRL: two-stage regression-aware fine-tuning of a judge that writes a rationale and then a score."""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from trl_tract.backends import ServerBackend, TransformersBackend, VLLMBackend
    from trl_tract.config import TRACTConfig
    from trl_tract.distill import CoTSelfDistill
    from trl_tract.judge import CoTRAILJudge, Judgement
    from trl_tract.pipeline import run_tract
    from trl_tract.prompts import from_feedback_collection, from_prometheus_eval, rubric_prompt
    from trl_tract.report import score_report
    from trl_tract.rewards import make_reward_func
    from trl_tract.scores import ScoreGrid, expected_score
    from trl_tract.trainer import TRACTTrainer

__version__ = "0.1.0"

# Imported at first use: `trl-tract --help` and a user's own imports should not wait for TRL.
_ROOMS = {
    "CoTRAILJudge": "judge",
    "CoTSelfDistill": "distill",
    "Judgement": "judge",
    "ScoreGrid": "scores",
    "ServerBackend": "backends",
    "TRACTConfig": "config",
    "TRACTTrainer": "trainer",
    "TransformersBackend": "backends",
    "VLLMBackend": "backends",
    "expected_score": "scores",
    "from_feedback_collection": "prompts",
    "from_prometheus_eval": "prompts",
    "make_reward_func": "rewards",
    "rubric_prompt": "prompts",
    "run_tract": "pipeline",
    "score_report": "report",
}

__all__ = [
    "CoTRAILJudge",
    "CoTSelfDistill",
    "Judgement",
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
    if name not in _ROOMS:
        raise AttributeError(f"module 'trl_tract' has no attribute {name!r}")
    return getattr(importlib.import_module(f"trl_tract.{_ROOMS[name]}"), name)


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
