"""The report page: one self-contained HTML file about one judge, and its pictures as PNG files.

Everything that models or people wrote is escaped, and a content security policy forbids requests, and scripts but the
page's own, besides.
Takes records and finished reports; knows nothing of models, of training, or of where the records came from.
"""

import base64
import hashlib
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
from trl_tract.evaluation.verdict import says_one_thing
from trl_tract.page.charts import score_charts
from trl_tract.page.drawing import DARK, LIGHT, Chart
from trl_tract.page.items import COLUMNS, ReadItems, read_items, shown_items
from trl_tract.page.learning import learning_charts
from trl_tract.scale.text import some_scores
from trl_tract.text.display import excerpt, short

_REASONS = 20
_TONES = {
    **dict.fromkeys(("better", "above raters"), "good"),
    **dict.fromkeys(("nothing scored", "many failed", "one score", "reversed", "worse"), "bad"),
}
_METRIC_TITLES = {
    "pearson": ("Pearson", "linear correlation"),
    "spearman": ("Spearman", "rank correlation"),
    "kendall": ("Kendall tau-b", "concordant minus discordant pairs"),
    "rmse": ("RMSE", "root mean squared error, rubric units"),
    "mae": ("MAE", "mean absolute error, rubric units"),
    "qwk": ("Quadratic-weighted kappa", "agreement beyond chance after rounding"),
    "accuracy": ("Accuracy", "fraction equal after rounding"),
}


@dataclass(frozen=True)
class OtherJudge:
    """A judge of the same items, to compare with.

    Attributes:
        difference: The page's judge minus this one.
    """

    name: str
    report: ScoreReport
    difference: Comparison


@dataclass(frozen=True, kw_only=True)
class JudgedItems:
    """One judge's results, as a page shows them.

    Attributes:
        records: One for each item, as in `judgements.jsonl`: `reference`, `score`, and, where known, `id`, `group`,
            `scores`, `rationales`, `probs` `(S, K)`, `grid_mass`, `std`, `error`.
        grid: The score grid, rubric units; None: the integers.
        prompts: One for each item, text or chat messages; None where they are not at hand.
        about: What the page's head says of the judge: the base model, the rows, the date.
        curves: Stage -> the `log_history` of its trainer.
    """

    name: str
    records: Sequence[Mapping[str, Any]]
    report: ScoreReport
    grid: tuple[float, ...] | None = None
    prompts: Sequence[Any] | None = None
    about: Mapping[str, str] = field(default_factory=dict)
    settings: Mapping[str, Any] = field(default_factory=dict)
    others: Sequence[OtherJudge] = ()
    curves: Mapping[str, Sequence[Mapping[str, Any]]] = field(default_factory=dict)


def write_page(judged: JudgedItems, path: str | Path, *, worst: int = 12) -> list[Path]:
    """Write the page and, in a folder beside it, its pictures as PNG files.

    Args:
        worst: How many of the items with the largest errors are shown in full.

    Returns:
        The page, then the PNG files, in `<name of the page>-plots`.

    Raises:
        ImportError: matplotlib is not installed.
        ValueError: There are not as many prompts as records.
    """
    path = Path(path)
    items = read_items(judged.records, judged.grid)
    charts, learning = score_charts(items.scores), learning_charts(judged.curves)
    pictures = path.with_name(f"{path.stem}-plots")
    pngs = {pictures / f"{chart.name}.png": chart for chart in (*charts, *learning)}
    for target in (path, pictures, *pngs):
        if target.is_symlink():
            target.unlink()  # what is written takes the link's place, not that of what it leads to
    pictures.mkdir(parents=True, exist_ok=True)
    for file, chart in pngs.items():
        file.write_bytes(chart.png())
    path.write_text(_html(judged, items, charts, learning, worst), encoding="utf-8", newline="\n")
    return [path, *pngs]


def page_html(judged: JudgedItems, *, worst: int = 12) -> str:
    """The page as a string, without pictures: one HTML document with its style, its script and nothing else to load."""
    return _html(judged, read_items(judged.records, judged.grid), [], [], worst)


def _html(judged: JudgedItems, items: ReadItems, charts: Sequence[Chart], learning: Sequence[Chart], worst: int) -> str:
    if judged.prompts is not None and len(judged.prompts) != len(judged.records):
        raise ValueError(
            f"{len(judged.prompts)} prompts and {len(judged.records)} judgements. Give the rows that were judged"
        )
    report, failures = judged.report, items.failures.most_common()
    sections = {
        "agreement": "Agreement",
        "pictures": "Charts" if charts else "",
        "learning": "Learning curves" if learning else "",
        "failures": "Items without a score",
        "errors": "Largest errors",
        "items": "All items",
        "settings": "Judging settings" if judged.settings else "",
    }
    return (
        _environment()
        .get_template("page.html")
        .render(
            version=__version__,
            style=_own("page.css"),
            script=_own("items.js"),
            name=short(judged.name, 200),
            about=_about(judged),
            report=report,
            verdict=report.verdict,
            tone=_TONES.get(report.verdict[0].kind, "unsure"),
            tiles=_tiles(judged, items),
            baselines=list(report.baselines),
            others=[{"name": short(other.name, 200)} for other in judged.others],
            metrics=[_metric(judged, name) for name in METRICS],
            charts=[_embedded(chart) for chart in charts],
            learning=[_embedded(chart) for chart in learning],
            failures=[{"reason": excerpt(reason, 500), "count": count} for reason, count in failures[:_REASONS]],
            more_failures=sum(count for _, count in failures[_REASONS:]),
            items=shown_items(judged.records, judged.prompts, judged.grid, items.worst(worst)),
            columns=COLUMNS,
            table=items.table,
            settings=[(short(str(name), 100), short(str(value), 500)) for name, value in judged.settings.items()],
            sections=[(anchor, title) for anchor, title in sections.items() if title],
        )
    )


@cache
def _environment() -> Environment:
    return Environment(loader=PackageLoader("trl_tract.page", "."), autoescape=True, undefined=StrictUndefined)


@cache
def _own(file: str) -> dict[str, str]:
    """The page's style sheet or script, and its hash, by which the policy knows it from any other."""
    text = files("trl_tract.page").joinpath(file).read_text(encoding="utf-8")
    return {"text": text, "hash": f"sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}"}


def _about(judged: JudgedItems) -> list[tuple[str, str]]:
    facts = dict(judged.about)
    if judged.grid is not None:
        facts["Scores"] = some_scores([f"{value:g}" for value in judged.grid])
    return [(label, short(text, 200)) for label, text in facts.items()]


def _tiles(judged: JudgedItems, items: ReadItems) -> list[dict[str, str]]:
    report = judged.report
    tiles = [_tile("RMSE", report.rmse)]
    if report.standing is not None:
        always = Interval(report.standing.mean["rmse"], np.nan, np.nan)
        tiles.append({**_tile("RMSE of the mean", always), "range": "if always predicted"})
    if not says_one_thing(report.spread):
        # Correlations of scores that are nearly the same are no headline.
        tiles += [_tile("Pearson", report.pearson), _tile("Spearman", report.spearman), _tile("Kappa", report.qwk)]
    if not np.isnan(report.spread):
        spread = Interval(report.spread, np.nan, np.nan)
        tiles.append({**_tile("Spread", spread), "range": "relative to gold"})
    mass = items.scores.grid_mass
    if np.isfinite(mass).any():
        tiles.append({"label": "Mean grid mass", "number": f"{np.nanmean(mass):.3f}", "range": "probability"})
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
        "baselines": [baseline.get(name) for baseline in judged.report.baselines.values()],
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
