"""The README beside trained weights: what the judge scores, how it is asked, how it was trained."""

from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard, ModelCardData

from trl_tract import __version__
from trl_tract.config import TRACTConfig
from trl_tract.judge_config import JudgeConfig
from trl_tract.prompts import some_scores

_TEMPLATE = """\
---
{metadata}
---

# {title}

An LLM judge that writes a rationale and then a score, trained with [TRACT](https://aclanthology.org/2025.acl-long.147)
(regression-aware fine-tuning): its score is the expected value under the model, not a decoded token.

- Score grid: {grid}
- Marker before the score: `{marker}`
- Base model: {base_model}
{evaluation}
## Quick start

```python
from trl_tract import CoTRAILJudge

judge = CoTRAILJudge.from_pretrained("{path}")
judgement = judge.judge([{{"prompt": "..."}}])[0]  # a prompt written like the training rows
print(judgement.score, judgement.rationales)  # judgement.error says why, where there is no score
```

## Training

{settings}

Versions: {versions}.

## Citation

```bibtex
@inproceedings{{chiang-etal-2025-tract,
    title = "{{TRACT}}: Regression-Aware Fine-tuning Meets Chain-of-Thought Reasoning for {{LLM}}-as-a-Judge",
    author = "Chiang, Cheng-Han and Lee, Hung-yi and Lukasik, Michal",
    booktitle = "Proceedings of the 63rd Annual Meeting of the Association for Computational Linguistics",
    year = "2025",
    url = "https://aclanthology.org/2025.acl-long.147"
}}
```
"""

_SETTINGS = [
    "raft_weight",
    "rationale_weight",
    "score_in_ce",
    "normalize_grid",
    "learning_rate",
    "num_train_epochs",
    "per_device_train_batch_size",
    "gradient_accumulation_steps",
    "max_length",
    "seed",
]
_PACKAGES = ["trl", "transformers", "torch"]


def write_model_card(
    args: TRACTConfig,
    judge_config: JudgeConfig | None,
    *,
    base_model: str | None,
    model_name: str | None,
    dataset_name: str | None,
    tags: Sequence[str],
    metrics: Mapping[str, Any],
) -> None:
    """Write `README.md` into the output directory of `args`.

    Args:
        args: The run's settings.
        judge_config: Grid and marker, where they are known.
        base_model: Hub id or directory of the seed model; a directory stays out of the card's metadata.
        model_name: Title of the card.
        dataset_name: Hub id of the training rows.
        tags: Hub tags.
        metrics: The last evaluation's log entry; empty without one.
    """
    on_hub = base_model if base_model and not Path(base_model).exists() else None
    metadata = ModelCardData(
        base_model=on_hub,
        datasets=dataset_name,
        library_name="transformers",
        tags=["generated_from_trainer", "llm-as-a-judge", *tags],
    )
    scores = {name.removeprefix("eval_"): value for name, value in metrics.items() if name.startswith("eval_score/")}
    evaluation = "".join(f"- Held-out {name} (given rationales): {value:.3f}\n" for name, value in scores.items())
    path = args.hub_model_id or Path(args.output_dir or ".").name
    text = _TEMPLATE.format(
        metadata=metadata.to_yaml(),
        title=model_name or Path(args.output_dir or "model").name,
        grid=some_scores(judge_config.grid.texts) if judge_config else "see tract_config.json",
        marker=args.score_marker,
        base_model=f"`{on_hub or (Path(base_model).name if base_model else 'unknown')}`",
        evaluation=evaluation,
        path=path,
        settings="\n".join(f"- `{name}`: {getattr(args, name)}" for name in _SETTINGS),
        versions=", ".join([f"trl-tract {__version__}", *(f"{name} {version(name)}" for name in _PACKAGES)]),
    )
    ModelCard(text).save(str(Path(args.output_dir or ".") / "README.md"))
