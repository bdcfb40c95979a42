"""The README beside trained weights: what the judge scores, how it is asked, how well it does, how it was trained.

Training writes it; what becomes known later (the evaluation, the other stage) is added to it, and whatever else people
have written into it by then stays. Knows nothing of trainers, runs or how judgements come about.
"""

import re
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from huggingface_hub import EvalResult, ModelCard, ModelCardData
from trl import SFTConfig

from trl_tract import __version__
from trl_tract.evaluation.pairs import METRICS
from trl_tract.evaluation.report import ScoreReport
from trl_tract.saved.judge_config import JudgeConfig
from trl_tract.saved.training_rows import TrainingRows
from trl_tract.scale.text import some_scores
from trl_tract.text.display import excerpt
from trl_tract.text.markdown import code_span, fenced, plain_line, python_literal

PROMPT_CHARACTERS = 8000
"""Longer prompts are cut in the card, and left out of its quick start."""

_TEMPLATE = """\
---
{metadata}
---

# {title}

An LLM judge that {writes}, trained with [TRACT](https://aclanthology.org/2025.acl-long.147)
(regression-aware fine-tuning): its score is the expected value under the model, not a decoded token.

- Score grid: {grid}
- Marker before the score: {marker}
- Base model: {base_model}

## Quick start

```bash
pip install trl-tract
```

{quick_start}

`score` is in rubric units and may lie between two scores of the grid; `std` is how far the judge's probabilities
spread, and `grid_mass` how much of them is on the grid at all. An item that cannot be scored has an `error` that says
why.

## Evaluation

<!-- evaluation -->
{evaluation}
<!-- /evaluation -->

## Training data

<!-- training data -->
{data}
<!-- /training data -->

## Training

<!-- settings -->
{settings}
<!-- /settings -->

Versions: {versions}.

## Prompt

{prompt}

## Limits

It judges what its training rows judged, on their grid and in their wording: other prompts give other, unchecked scores.
The text to be judged is written by somebody who may want a high score, and instructions in it can move the judge.
Compare with people's scores on rows of your own before relying on it: `trl-tract judge`, then `trl-tract report`.

## Citation

```bibtex
@inproceedings{{chiang-etal-2025-tract,
    title = "{{TRACT}}: Regression-Aware Fine-tuning Meets Chain-of-Thought Reasoning for {{LLM}}-as-a-Judge",
    author = "Chiang, Cheng-Han and Lee, Hung-yi and Lukasik, Michal",
    booktitle = "Proceedings of the 63rd Annual Meeting of the Association for Computational Linguistics",
    year = "2025",
    url = "https://aclanthology.org/2025.acl-long.147"
}}

@software{{vonwerra2020trl,
    title = {{{{TRL: Transformers Reinforcement Learning}}}},
    author = {{von Werra, Leandro and Belkada, Younes and Tunstall, Lewis and Beeching, Edward and Thrush, Tristan and
        Lambert, Nathan and Huang, Shengyi and Rasul, Kashif and Gallouédec, Quentin}},
    license = {{Apache-2.0}},
    url = {{https://github.com/huggingface/trl}},
    year = {{2020}}
}}
```
"""

_QUICK_START = """\
from trl_tract import CoTRAILJudge

judge = CoTRAILJudge.from_pretrained({path})
prompt = {prompt}
judgement = judge.judge([{{"prompt": prompt}}])[0]
print(judgement.score, judgement.rationales)
"""

_SETTINGS = [
    "raft_weight",
    "rationale_weight",
    "score_in_ce",
    "normalize_grid",
    "learning_rate",
    "lr_scheduler_type",
    "num_train_epochs",
    "max_steps",
    "per_device_train_batch_size",
    "gradient_accumulation_steps",
    "max_length",
    "bf16",
    "seed",
]
_ADAPTER_SETTINGS = ["peft_type", "r", "lora_alpha", "lora_dropout", "target_modules"]
_PACKAGES = ["trl", "transformers", "torch"]
_METRIC_TYPES = {"pearson": "pearsonr", "spearman": "spearmanr"}  # what the Hub calls them
_SOURCES = {"self": "self-written, by the stage-one model", "annotated": "annotated"}


def write_model_card(args: SFTConfig, judge_config: JudgeConfig | None, **known: Any) -> None:
    """Write `README.md` into the output directory of `args`; `known` are arguments of `model_card`."""
    directory = Path(args.output_dir or ".")
    known["model_name"] = known.get("model_name") or directory.name or "model"
    known["hub_id"] = known.get("hub_id") or args.hub_model_id or directory.name
    ModelCard(model_card(args, judge_config, **known)).save(str(directory / "README.md"))


def model_card(
    args: SFTConfig | None,
    judge_config: JudgeConfig | None,
    *,
    base_model: str | None,
    model_name: str,
    hub_id: str,
    dataset_name: str | None = None,
    tags: Sequence[str] = (),
    metrics: Mapping[str, Any] | None = None,
    rows: TrainingRows | None = None,
    adapter: Any = None,
) -> str:
    """The card's text.

    Args:
        args: The run's settings; None for a judge of which no more than its weights is known.
        judge_config: Grid and marker, where they are known.
        base_model: Hub id or directory of the seed model; a directory stays out of the card's metadata.
        model_name: Title of the card.
        hub_id: Where the quick start loads the judge from.
        dataset_name: Hub id of the training rows.
        tags: Hub tags.
        metrics: The last evaluation's log entry; empty without one.
        rows: The training rows.
        adapter: The PEFT configuration, where an adapter was trained.
    """
    rows = rows or TrainingRows()
    on_hub = base_model if base_model and not Path(base_model).exists() else None
    metadata = ModelCardData(
        base_model=on_hub,
        datasets=dataset_name,
        library_name="transformers",
        tags=["generated_from_trainer", "llm-as-a-judge", *tags],
    )
    prompt = rows.prompt if len(rows.rendered or "") <= PROMPT_CHARACTERS else None
    aspects = judge_config.scales if judge_config and len(judge_config.scales) > 1 else ()
    code = _QUICK_START.format(path=python_literal(hub_id), prompt=python_literal(prompt))
    if aspects:
        scores = "{name: its.score for name, its in judgement.aspects.items()}"
        code = code.replace("judgement.score,", f"{scores},")
    marker = args.score_marker if args else judge_config.format.marker if judge_config else "see tract_config.json"
    settings = [*_setting_lines(args, _SETTINGS), *_setting_lines(adapter, _ADAPTER_SETTINGS)]
    return _TEMPLATE.format(
        metadata=metadata.to_yaml(),
        title=plain_line(model_name),
        writes="writes a rationale and then a score"
        if judge_config is None or judge_config.writes_rationale
        else "scores without a rationale",
        grid=_grids(judge_config) if judge_config else "see tract_config.json",
        marker=", ".join(code_span(aspect.marker) for aspect in aspects) or code_span(marker),
        base_model=code_span(on_hub or (Path(base_model).name if base_model else "unknown")),
        quick_start=fenced(code, "python"),
        evaluation=_given_rationales(metrics or {}),
        data=_row_lines(rows, dataset_name) if args else "Not known here.",
        settings="\n".join(settings) or "Not known here.",
        versions=", ".join([f"trl-tract {__version__}", *(f"{name} {version(name)}" for name in _PACKAGES)]),
        prompt=_prompt_section(rows),
    )


def with_hub_id(text: str, hub_id: str) -> str:
    """A card whose quick start loads the judge from `hub_id`; whatever else is in it stays."""
    loading = r"(CoTRAILJudge\.from_pretrained\()(['\"])[^'\"\n]*\2"
    return re.sub(loading, lambda found: f"{found.group(1)}{python_literal(hub_id)}", text, count=1)


def add_evaluation(
    readme: Path,
    report: ScoreReport,
    *,
    dataset_name: str,
    dataset_type: str | None = None,
    grid_mass: float | None = None,
    errors: Mapping[str, int] | None = None,
    notes: Sequence[str] = (),
    aspect: str | None = None,
) -> None:
    """Put the evaluation on held-out items into a card: a table with intervals, and the Hub's metadata.

    Args:
        readme: The card.
        report: Agreement with the gold scores.
        dataset_name: What the items are called.
        dataset_type: Their hub id, if they have one.
        grid_mass: Mean probability on the grid.
        errors: Why items have no score, and how many for each reason.
        notes: Lines to add, Markdown.
        aspect: The one that the report is about, where the judge scores several; its table goes behind those before.

    Raises:
        ValueError: The card has no place for an evaluation any more.
    """
    card = ModelCard.load(readme)
    units = "items" if report.n_groups is None else "groups"
    lines = [
        f"Agreement with the gold scores of {report.n:,} held-out items of {code_span(dataset_name)}; the judge wrote "
        f"its own rationales. 95 % intervals from {report.n_bootstrap:,} bootstrap resamples of {units}.",
        "",
        "| metric | value | 95 % interval |",
        "| :-- | --: | :-: |",
    ]
    results = []
    for name in METRICS:
        interval = getattr(report, name)
        value = "undefined" if np.isnan(interval.value) else f"{interval.value:.3f}"
        ends = "-" if np.isnan(interval.low) else f"{interval.low:.3f} to {interval.high:.3f}"
        lines.append(f"| {name} | {value} | {ends} |")
        if not np.isnan(interval.value):
            known = {} if np.isnan(interval.low) else {"interval_95": [round(interval.low, 4), round(interval.high, 4)]}
            results.append(
                EvalResult(
                    task_type="text-generation",
                    dataset_type=dataset_type or "held-out",
                    dataset_name=dataset_name,
                    metric_type=_METRIC_TYPES.get(name, name),
                    metric_name=name if aspect is None else f"{name}, {aspect}",
                    metric_value=round(interval.value, 4),
                    metric_args={**known, "n": report.n},
                )
            )
    failures = "; ".join(f"{plain_line(reason)}: {count}" for reason, count in (errors or {}).items())
    lines += ["", f"- Items without a score: {report.failed}{f' ({failures})' if failures else ''}"]
    if grid_mass is not None:
        lines.append(f"- Mean probability on the grid: {grid_mass:.3f}")
    lines += [f"- {note}" for note in notes]
    content, before = "\n".join(lines), _section(card.text, "evaluation", readme)
    earlier: list[EvalResult] = []
    if aspect is not None:
        content = f"### {plain_line(aspect)}\n\n{content}"
        if before.startswith("###"):
            content, earlier = f"{before}\n\n{content}", list(card.data.eval_results or [])
    text = _with_section(card.text, "evaluation", content, readme)
    if results:
        card.data.model_name = card.data.model_name or _title(text)
        card.data.eval_results = [*earlier, *results]
    card.text = text
    card.save(readme)


def add_training_run(readme: Path, stage_one: Path, *, data: str, summary: Mapping[str, Any]) -> None:
    """Tell a stage-two card of the whole run: where the rows came from, and stage one's settings beside stage two's.

    Args:
        readme: The stage-two card.
        stage_one: The stage-one card.
        data: File or hub id of the annotated rows; of a path the name alone is written.
        summary: What self-generation counted, from its `summary.json`.

    Raises:
        ValueError: A card lost the places that these are written to.
    """
    card, first = ModelCard.load(readme), ModelCard.load(stage_one)
    text, before = card.text, first.text
    own, annotated = int(summary.get("self_written", 0)), int(summary.get("annotated", 0))
    name = Path(data).name if Path(data).exists() else data
    lines = [
        f"- Annotated rows: {int(summary['rows']):,}, from {code_span(name)}; stage one trained on them",
        f"- Stage two: {own + annotated:,} rows, {_share(own, own + annotated)} of them with a rationale that the "
        f"stage-one model wrote itself ({own:,}), the others annotated ({annotated:,}); the gold scores are the "
        "annotated ones",
        f"- Rationales sampled more than once: {int(summary.get('resampled', 0)):,}; rows left out: "
        f"{int(summary.get('dropped', 0)):,}",
    ]
    text = _with_section(text, "training data", "\n".join(lines), readme)
    one, two = _section(before, "settings", stage_one), _section(text, "settings", readme)
    if not two.startswith("###"):
        one, two = f"### Stage one\n\n{one}", f"### Stage two, from the same base model\n\n{two}"
        text = _with_section(text, "settings", f"{one}\n\n{two}", readme)
    if not Path(data).exists() and not card.data.datasets:
        card.data.datasets = data
    card.text = text
    card.save(readme)


def _grids(judge_config: JudgeConfig) -> str:
    named = ((f"{plain_line(scale.name)}: " if scale.name else "", scale.grid.texts) for scale in judge_config.scales)
    return "; ".join(name + some_scores(texts) for name, texts in named)


def _setting_lines(settings: Any, names: Sequence[str]) -> list[str]:
    """A line for each setting that there is; an enum by its value, a set in alphabetical order."""
    lines = []
    for name in names:
        if hasattr(settings, name):
            value = getattr(settings, name)
            shown = ", ".join(sorted(value)) if isinstance(value, set) else getattr(value, "value", value)
            lines.append(f"- `{name}`: {plain_line(str(shown))}")
    return lines


def _given_rationales(metrics: Mapping[str, Any]) -> str:
    scores = {name.removeprefix("eval_"): value for name, value in metrics.items() if name.startswith("eval_score/")}
    lines = [f"- Held-out {name} (given rationales): {value:.3f}" for name, value in scores.items()]
    return "\n".join(lines) or "Not evaluated yet."


def _row_lines(rows: TrainingRows, dataset_name: str | None) -> str:
    lines = [f"- Data: {code_span(dataset_name)}"] if dataset_name else []
    if rows.count is not None:
        lines.append(f"- Rows: {rows.count:,}")
    total = sum(rows.sources.values())
    lines += [
        f"- Rationales {_SOURCES.get(source, source)}: {count:,} of {total:,}, {_share(count, total)}"
        for source, count in sorted(rows.sources.items())
    ]
    return "\n".join(lines) or "Not known: the rows were streamed."


def _share(count: int, total: int) -> str:
    return f"{count / total:.1%}" if total else "none"


def _prompt_section(rows: TrainingRows) -> str:
    if rows.rendered is None:
        return (
            "How the prompts of the training rows were written is not known here: they came tokenised, or as a stream."
        )
    shown = excerpt(rows.rendered, PROMPT_CHARACTERS)
    cut = f", the first {shown.shown:,} of {shown.length:,} characters" if shown.is_cut else ""
    return (
        f"A training prompt as the model read it{cut}. Chat templates are applied by the judge: pass it the prompt "
        f"alone, as above.\n\n<details><summary>Show the prompt</summary>\n\n{fenced(shown.text, 'text')}\n\n</details>"
    )


def _section(text: str, name: str, card: Path) -> str:
    found = re.search(rf"<!-- {name} -->\n(.*?)\n<!-- /{name} -->", text, re.DOTALL)
    if found is None:
        raise ValueError(
            f"{card} has no part between <!-- {name} --> and <!-- /{name} -->. Put these lines back where it should "
            "stand"
        )
    return found.group(1)


def _with_section(text: str, name: str, content: str, card: Path) -> str:
    old = _section(text, name, card)
    return text.replace(f"<!-- {name} -->\n{old}\n", f"<!-- {name} -->\n{content}\n", 1)


def _title(text: str) -> str:
    found = re.search(r"^# (.+)$", text, re.MULTILINE)
    return found.group(1) if found else "judge"
