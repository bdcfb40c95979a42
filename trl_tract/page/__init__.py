"""One HTML page about one judge, complete in itself, and its pictures as PNG files.

Everything that models or people wrote is escaped, and a content security policy forbids scripts and requests besides.
Takes records and finished reports; knows nothing of models, of training, or of where the records came from.
"""

import base64
import hashlib
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np
from jinja2 import Environment, PackageLoader, StrictUndefined

from trl_tract import __version__
from trl_tract.evaluation.pairs import METRICS
from trl_tract.evaluation.report import Comparison, Interval, ScoreReport
from trl_tract.page.charts import JudgedScores, score_charts
from trl_tract.page.drawing import DARK, LIGHT, Chart
from trl_tract.page.learning import learning_charts
from trl_tract.text.display import common_prefix, excerpt, prompt_text, short

RATIONALE_CHARACTERS = 1500
"""Characters of a rationale that are shown; the page says how long the whole is."""
PROMPT_CHARACTERS = 6000
"""Characters of a prompt that are shown."""

_REASONS = 20
_SAMPLES = 5
_METRIC_TITLES = {
    "pearson": ("Pearson", "linear correlation"),
    "spearman": ("Spearman", "correlation of the ranks"),
    "kendall": ("Kendall tau-b", "pairs put in the same order, less those in the opposite one"),
    "rmse": ("RMSE", "root of the mean squared error, rubric units"),
    "mae": ("MAE", "mean absolute error, rubric units"),
    "qwk": ("Quadratic-weighted kappa", "agreement beyond chance after rounding"),
    "accuracy": ("Accuracy", "equal after rounding"),
}


@dataclass(frozen=True)
class OtherJudge:
    """A judge of the same items, to compare with.

    Attributes:
        name: What it is called.
        report: Its own agreement.
        difference: The page's judge minus this one.
    """

    name: str
    report: ScoreReport
    difference: Comparison


@dataclass(frozen=True, kw_only=True)
class JudgedItems:
    """One judge's results, as a page shows them.

    Attributes:
        name: What the judge is called.
        records: One for each item, as in `judgements.jsonl`: `reference`, `score`, and, where known, `id`, `group`,
            `scores`, `rationales`, `probs` `(S, K)`, `grid_mass`, `std`, `error`.
        report: Agreement of the records' scores with their gold scores.
        grid: The score grid, rubric units; None: the integers.
        prompts: One for each item, text or chat messages; None where they are not at hand.
        settings: How the items were judged.
        others: Judges of the same items.
        curves: Stage -> the `log_history` of its trainer.
    """

    name: str
    records: Sequence[Mapping[str, Any]]
    report: ScoreReport
    grid: tuple[float, ...] | None = None
    prompts: Sequence[Any] | None = None
    settings: Mapping[str, Any] = field(default_factory=dict)
    others: Sequence[OtherJudge] = ()
    curves: Mapping[str, Sequence[Mapping[str, Any]]] = field(default_factory=dict)


def write_page(judged: JudgedItems, path: str | Path, *, worst: int = 12) -> list[Path]:
    """Write the page and, in a folder beside it, its pictures as PNG files.

    Args:
        judged: The judge and its items.
        path: The HTML file; its folder is made where missing.
        worst: How many of the items with the largest errors are shown.

    Returns:
        The page, then the PNG files, in `<name of the page>-plots`.

    Raises:
        ImportError: matplotlib is not installed.
        ValueError: There are not as many prompts as records.
    """
    path = Path(path)
    charts, learning = score_charts(_scores(judged)), learning_charts(judged.curves)
    pictures = path.with_name(f"{path.stem}-plots")
    pictures.mkdir(parents=True, exist_ok=True)
    written = [path]
    for chart in (*charts, *learning):
        written.append(pictures / f"{chart.name}.png")
        written[-1].write_bytes(chart.png())
    path.write_text(page_html(judged, charts, learning, worst=worst), encoding="utf-8", newline="\n")
    return written


def page_html(
    judged: JudgedItems, charts: Sequence[Chart] = (), learning: Sequence[Chart] = (), *, worst: int = 12
) -> str:
    """The page as a string: one HTML document with its style, its pictures and nothing else to load.

    Args:
        judged: The judge and its items.
        charts: Pictures of its scores.
        learning: Pictures of its training.
        worst: How many of the items with the largest errors are shown.

    Raises:
        ValueError: There are not as many prompts as records.
    """
    if judged.prompts is not None and len(judged.prompts) != len(judged.records):
        raise ValueError(
            f"{len(judged.prompts)} prompts and {len(judged.records)} judgements: give the rows that were judged"
        )
    style, style_hash = _style()
    failures = Counter(record["error"] for record in judged.records if record.get("error")).most_common()
    context = {
        "version": __version__,
        "style": style,
        "style_hash": style_hash,
        "name": short(judged.name, 200),
        "report": judged.report,
        "tiles": _tiles(judged),
        "others": [{"name": short(other.name, 200)} for other in judged.others],
        "metrics": [_metric(judged, name) for name in METRICS],
        "charts": [_embedded(chart) for chart in charts],
        "learning": [_embedded(chart) for chart in learning],
        "failures": [{"reason": excerpt(str(reason), 500), "count": count} for reason, count in failures[:_REASONS]],
        "more_failures": sum(count for _, count in failures[_REASONS:]),
        "items": _items(judged, _worst(judged.records, worst)),
        "settings": [(short(str(name), 100), short(str(value), 500)) for name, value in judged.settings.items()],
    }
    sections = {
        "agreement": "Agreement",
        "pictures": "Pictures" if charts else "",
        "learning": "Learning curves" if learning else "",
        "failures": "Items without a score",
        "errors": "Largest errors",
        "settings": "How it was judged" if judged.settings else "",
    }
    context["sections"] = [(anchor, title) for anchor, title in sections.items() if title]
    return _environment().get_template("page.html").render(context)


@cache
def _environment() -> Environment:
    return Environment(loader=PackageLoader("trl_tract.page", "."), autoescape=True, undefined=StrictUndefined)


@cache
def _style() -> tuple[str, str]:
    """The style sheet and its hash, by which the policy knows it from any other."""
    style = files("trl_tract.page").joinpath("page.css").read_text(encoding="utf-8")
    return style, f"sha256-{base64.b64encode(hashlib.sha256(style.encode()).digest()).decode()}"


def _scores(judged: JudgedItems) -> JudgedScores:
    given = [record for record in judged.records if _is_number(record.get("score"))]
    probs = [record.get("probs") for record in given]
    widths = {len(sample) for samples in probs if samples for sample in samples}
    grid = judged.grid
    known = bool(given) and all(probs) and len(widths) == 1 and (grid is None or widths == {len(grid)})
    return JudgedScores(
        predicted=np.array([record["score"] for record in given], dtype=np.float64),
        gold=np.array([record["reference"] for record in given], dtype=np.float64),
        grid_mass=np.array([_or_nan(record.get("grid_mass")) for record in given], dtype=np.float64),
        probs=np.array([_mean_probs(samples) for samples in probs]) if known else None,
        grid=grid,
    )


def _tiles(judged: JudgedItems) -> list[dict[str, str]]:
    report = judged.report
    tiles = [
        _tile("Pearson", report.pearson),
        _tile("Spearman", report.spearman),
        _tile("RMSE", report.rmse),
        _tile("Kappa", report.qwk),
    ]
    mass = [record["grid_mass"] for record in judged.records if _is_number(record.get("grid_mass"))]
    if mass:
        tiles.append({"label": "Mean grid mass", "number": f"{np.mean(mass):.3f}", "range": "probability"})
    tiles.append({"label": "Without a score", "number": f"{report.failed:,}", "range": f"of {len(judged.records):,}"})
    return tiles


def _tile(label: str, interval: Interval) -> dict[str, str]:
    number = "undefined" if np.isnan(interval.value) else f"{interval.value:z.3f}"
    known = not np.isnan(interval.low)
    return {"label": label, "number": number, "range": f"{interval.low:z.3f} to {interval.high:z.3f}" if known else ""}


def _metric(judged: JudgedItems, name: str) -> dict[str, Any]:
    title, meaning = _METRIC_TITLES[name]
    return {
        "title": title,
        "meaning": meaning,
        "mine": getattr(judged.report, name).to_dict(),
        "others": [
            {"value": getattr(other.report, name).to_dict(), "difference": getattr(other.difference, name).to_dict()}
            for other in judged.others
        ],
    }


def _embedded(chart: Chart) -> dict[str, Any]:
    # An image cannot run scripts or ask for anything, whatever is in it.
    light, dark = (
        f"data:image/svg+xml;base64,{base64.b64encode(chart.svg(theme)).decode()}" for theme in (LIGHT, DARK)
    )
    width, height = (round(100 * inches) for inches in chart.size)
    return {
        "title": chart.title,
        "caption": chart.caption,
        "alt": chart.alt,
        "light": light,
        "dark": dark,
        "width": width,
        "height": height,
    }


def _worst(records: Sequence[Mapping[str, Any]], count: int) -> list[int]:
    """Items with the largest absolute errors, largest first; equal ones in their order."""
    errors = np.array(
        [abs(r["score"] - r["reference"]) if _is_number(r.get("score")) else -1.0 for r in records], dtype=np.float64
    )
    return [int(index) for index in np.argsort(-errors, kind="stable")[:count] if errors[index] >= 0]


def _items(judged: JudgedItems, indices: Sequence[int]) -> list[dict[str, Any]]:
    prompts = [] if judged.prompts is None else [prompt_text(judged.prompts[index]) for index in indices]
    common = common_prefix(prompts) if len(set(prompts)) > 1 else 0
    return [_item(judged, index, common) for index in indices]


def _item(judged: JudgedItems, index: int, common: int) -> dict[str, Any]:
    record = judged.records[index]
    facts = [("Item", str(record.get("id", index)))]
    if record.get("group") is not None:
        facts.append(("Group", str(record["group"])))
    for label, name in (("Spread", "std"), ("Grid mass", "grid_mass")):
        if _is_number(record.get(name)):
            facts.append((label, f"{record[name]:.3f}"))
    scores = [score for score in record.get("scores") or [] if _is_number(score)]
    if len(scores) > 1:
        facts.append(("Scores", ", ".join(f"{score:.2f}" for score in scores[:20])))
    rationales = list(record.get("rationales") or [])
    prompt = None if judged.prompts is None else prompt_text(judged.prompts[index])
    return {
        "score": record["score"],
        "gold": record["reference"],
        "facts": [(label, short(text, 120)) for label, text in facts],
        "bars": _bars(record.get("probs"), judged.grid, record["reference"]),
        "rationale_count": len(rationales),
        "rationales": [
            {
                "text": excerpt(str(text), RATIONALE_CHARACTERS),
                "score": f"{scores[number]:.2f}" if number < len(scores) else "",
            }
            for number, text in enumerate(rationales[:_SAMPLES])
            if text
        ],
        "prompt": None if prompt is None else excerpt(prompt, PROMPT_CHARACTERS),
        "prompt_start": None if prompt is None else _beginning(prompt, common),
    }


def _beginning(text: str, common: int) -> str:
    """The first words that set a prompt apart: those behind the instructions that all prompts begin with."""
    start = text.rfind("\n", 0, common) + 1
    words = " ".join(text[start : start + 1000].split())
    shown = excerpt(words, 140)
    return f"{'… ' if start else ''}{shown.text}{'…' if shown.is_cut or start + 1000 < len(text) else ''}"


def _bars(probs: Any, grid: Sequence[float] | None, gold: float) -> dict[str, Any] | None:
    """Places of the bars of one item's score distribution, the tallest of them 55 units high."""
    if not probs:
        return None
    mean = _mean_probs(probs)
    values = grid if grid is not None and len(grid) == len(mean) else None
    width, height = 300.0, 55.0
    step = width / len(mean)
    tallest = float(mean.max()) or 1.0
    every = max(1, -(-len(mean) // 11))
    bars = []
    for place, probability in enumerate(mean):
        tall = height * float(probability) / tallest
        bars.append(
            {
                "x": round((place + 0.15) * step, 2),
                "y": round(84 - tall, 2),
                "width": round(0.7 * step, 2),
                "height": round(tall, 2),
                "middle": round((place + 0.5) * step, 2),
                "label": f"{values[place]:g}" if values is not None and place % every == 0 else "",
                "share": f"{probability:.2f}" if every == 1 and probability >= 0.005 else "",
            }
        )
    names = [f"{value:g}" for value in values] if values is not None else [f"no. {i + 1}" for i in range(len(mean))]
    stated = ", ".join(f"{name}: {probability:.2f}" for name, probability in zip(names, mean, strict=True))
    place_of_gold = None
    if values is not None and values[0] <= gold <= values[-1]:
        place_of_gold = round((float(np.interp(gold, values, np.arange(len(values)))) + 0.5) * step, 2)
    return {
        "width": width,
        "bars": bars,
        "gold": place_of_gold,
        "description": f"Score distribution. {stated}. Gold score {gold:.3g}.",
    }


def _mean_probs(samples: Any) -> np.ndarray[Any, np.dtype[np.float64]]:
    return np.asarray(samples, dtype=np.float64).mean(axis=0)  # type: ignore[no-any-return]


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and bool(np.isfinite(value))


def _or_nan(value: Any) -> float:
    return float(value) if _is_number(value) else float("nan")
