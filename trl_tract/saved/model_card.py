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
from trl_tract.evaluation.intervals import KINDS
from trl_tract.evaluation.pairs import METRICS
from trl_tract.evaluation.report import ScoreReport
from trl_tract.evaluation.verdict import says_one_thing
from trl_tract.saved.cards import render, section, with_section
from trl_tract.saved.judge_config import JudgeConfig
from trl_tract.saved.training_rows import TrainingRows
from trl_tract.scale.text import some_scores
from trl_tract.text.display import excerpt
from trl_tract.text.markdown import python_literal

PROMPT_CHARACTERS = 8000
"""Longer prompts are cut in the card, and left out of its quick start."""

_SETTINGS = [
    "raft_weight",
    "rationale_weight",
    "score_in_ce",
    "normalize_grid",
    "direct_weight",
    "gold_weight",
    "advantages",
    "no_score_penalty",
    "loss_type",
    "num_generations",
    "max_completion_length",
    "temperature",
    "beta",
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
        hub_id: Where the quick start loads the judge from.
        metrics: The log entry of the evaluation of these weights; empty without one.
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
    scales = judge_config.scales if judge_config else ()
    grids = [(f"{scale.name}: " if scale.name else "") + some_scores(scale.grid.texts) for scale in scales]
    settings = _settings(args, _SETTINGS)
    shared = settings.get("raft_weight")
    if scales and scales[0].name and shared is not None:
        own = (f"{each.name} {shared if each.raft_weight is None else each.raft_weight}" for each in scales)
        settings["raft_weight"] = ", ".join(own)
    unknown = "see tract_config.json"
    scores = {
        name.removeprefix("eval_"): value for name, value in (metrics or {}).items() if name.startswith("eval_score/")
    }
    return render(
        "model_card",
        metadata=metadata.to_yaml(),
        name=model_name,
        writes_rationale=judge_config is None or judge_config.writes_rationale,
        grid="; ".join(grids) or unknown,
        markers=[scale.marker for scale in scales] or [args.score_marker if args else unknown],
        base_model=on_hub or (Path(base_model).name if base_model else "unknown"),
        hub_id=hub_id,
        prompt=rows.prompt if len(rows.rendered or "") <= PROMPT_CHARACTERS else None,
        metrics=scores,
        is_trained_here=args is not None,
        is_reinforced=hasattr(args, "direct_weight"),
        dataset=dataset_name,
        rows=rows,
        shown=excerpt(rows.rendered or "", PROMPT_CHARACTERS),
        settings=settings | _settings(adapter, _ADAPTER_SETTINGS),
        versions=", ".join([f"trl-tract {__version__}", *(f"{name} {version(name)}" for name in _PACKAGES)]),
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
    others: Mapping[str, ScoreReport] | None = None,
    writes_rationale: bool = True,
) -> None:
    """Put the evaluation on held-out items into a card: a table with intervals, and the Hub's metadata.

    Args:
        dataset_type: Their hub id, if they have one.
        errors: Why items have no score, and how many for each reason.
        aspect: The one that the report is about, where the judge scores several; its table goes behind those before.
        others: Name -> agreement of another judge of the same items, for a column beside the baselines.
        writes_rationale: Whether the judge wrote a rationale before each score.

    Raises:
        ValueError: The card has no place for an evaluation any more.
    """
    card = ModelCard.load(readme)
    reasons = "; ".join(f"{reason}: {count}" for reason, count in (errors or {}).items())
    compared = {
        name: {metric: value for metric in METRICS if not np.isnan(value := getattr(other, metric).value)}
        for name, other in (others or {}).items()
    }
    content = render(
        "evaluation",
        report=report,
        baselines={**report.baselines, **compared},
        verdict=report.verdict,
        dataset=dataset_name,
        aspect=aspect,
        metrics={name: getattr(report, name).to_dict() for name in METRICS},
        failures=f"{report.failed} ({reasons})" if reasons else report.failed,
        grid_mass=grid_mass,
        notes=notes,
        writes_rationale=writes_rationale,
    )
    before, earlier = section(card.text, "evaluation", readme), []
    if aspect is not None and before.startswith("###"):
        content, earlier = f"{before}\n\n{content}", list(card.data.eval_results or [])
    text = with_section(card.text, "evaluation", content, readme)
    # A ranking on the Hub would show the correlations of a judge that says one thing as if they meant something.
    names = [name for name in METRICS if KINDS[name] != "correlation" or not says_one_thing(report.spread)]
    results = [
        _eval_result(report, name, dataset_name, dataset_type, aspect)
        for name in names
        if not np.isnan(getattr(report, name).value)
    ]
    if results:
        card.data.model_name = card.data.model_name or _title(text)
        card.data.eval_results = [*earlier, *results]
    card.text = text
    card.save(readme)


def add_training_run(readme: Path, stage_one: Path, *, data: str, summary: Mapping[str, Any]) -> None:
    """Tell a stage-two card of the whole run: where rows came from, and stage one's rows and settings beside its own.

    Args:
        data: File or hub id of the annotated rows; of a path the name alone is written.
        summary: What self-generation counted, from its `summary.json`.

    Raises:
        ValueError: A card lost the places that these are written to.
    """
    card, first = ModelCard.load(readme), ModelCard.load(stage_one)
    text, before = card.text, first.text
    one, two = section(before, "training data", stage_one), section(text, "training data", readme)
    if "### Stage two" not in two:
        content = render(
            "run_rows",
            data=Path(data).name if Path(data).exists() else data,
            resampled=summary.get("resampled", 0),
            dropped=summary.get("dropped", 0),
            one=one,
            two=two,
        )
        text = with_section(text, "training data", content, readme)
    one, two = section(before, "settings", stage_one), section(text, "settings", readme)
    if not two.startswith("###"):
        one, two = f"### Stage one\n\n{one}", f"### Stage two, from the same base model\n\n{two}"
        text = with_section(text, "settings", f"{one}\n\n{two}", readme)
    if not Path(data).exists() and not card.data.datasets:
        card.data.datasets = data
    card.text = text
    card.save(readme)


def _eval_result(
    report: ScoreReport, name: str, dataset_name: str, dataset_type: str | None, aspect: str | None
) -> EvalResult:
    interval = getattr(report, name)
    known = {} if np.isnan(interval.low) else {"interval_95": [round(interval.low, 4), round(interval.high, 4)]}
    return EvalResult(
        task_type="text-generation",
        dataset_type=dataset_type or "held-out",
        dataset_name=dataset_name,
        metric_type=_METRIC_TYPES.get(name, name),
        metric_name=name if aspect is None else f"{name}, {aspect}",
        metric_value=round(interval.value, 4),
        metric_args={**known, "n": report.n},
    )


def _settings(settings: Any, names: Sequence[str]) -> dict[str, Any]:
    """Each setting that there is; an enum by its value, a set in alphabetical order."""
    given = {name: getattr(settings, name) for name in names if hasattr(settings, name)}
    return {
        name: ", ".join(sorted(value)) if isinstance(value, set) else getattr(value, "value", value)
        for name, value in given.items()
    }


def _title(text: str) -> str:
    found = re.search(r"^# (.+)$", text, re.MULTILINE)
    return found.group(1) if found else "judge"
