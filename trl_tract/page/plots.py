"""Pictures of scores against gold scores, as PNG files. Knows nothing of models, or of how the scores came about."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from trl_tract.evaluation.metrics import pearson, rmse
from trl_tract.evaluation.pairs import Floats, as_pairs

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_COLUMNS = 4
_LEVELS = 20  # with more distinct values than this a side is continuous: no jitter, no mean per value
_DOT, _MEAN = "#4477aa", "#cc3311"  # told apart in greyscale and by colour-blind readers


def plot_predictions(judges: Mapping[str, tuple[npt.ArrayLike, npt.ArrayLike]], path: str | Path) -> Path:
    """One panel per judge: each item's score against its gold score, all panels on the same axes.

    Values on a few levels are jittered, by up to a quarter of a step, so that equal scores can be counted by eye. The
    line is perfect agreement; a red bar is the mean score of the items with one gold score.

    Args:
        judges: Name -> (predictions, references), both `(n,)` in rubric units; a NaN prediction is named in the title
            and not drawn.
        path: The PNG to write; its folder is made where missing.

    Returns:
        `path`.

    Raises:
        ImportError: matplotlib is not installed.
        ValueError: There are no judges, nothing to draw, or a judge's scores are unusable (as in `score_report`).

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     plot_predictions({"seed model": ([1.5, 2.2, 4.1], [1, 2, 5])}, f"{folder}/scores.png").name
        'scores.png'
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
        from matplotlib.layout_engine import ConstrainedLayoutEngine
        from matplotlib.ticker import MaxNLocator
    except ImportError as error:
        raise ImportError('Plots need matplotlib: pip install "trl-tract[demo]"') from error

    pairs = {name: as_pairs(*sides, f"predictions of {name!r}") for name, sides in judges.items()}
    shown = [side[np.isfinite(predicted)] for predicted, gold in pairs.values() for side in (predicted, gold)]
    everything = np.concatenate([np.empty(0), *shown])
    if not everything.size:
        raise ValueError(f"There is nothing to draw: {len(pairs)} judges and no prediction. Pass at least one of each.")
    low, high = float(everything.min()), float(everything.max())
    margin = max(0.06 * (high - low), *(1.2 * _jitter(side) for side in shown)) or 0.5
    rows = -(-len(pairs) // _COLUMNS)
    columns = -(-len(pairs) // rows)
    # Figure, not pyplot: no global state, no window, and the user's own backend stays as it is.
    figure = Figure(figsize=(3.6 * columns, 4.1 * rows + 0.4), layout=ConstrainedLayoutEngine(h_pad=0.1, w_pad=0.1))
    FigureCanvasAgg(figure)
    panels = figure.subplots(rows, columns, squeeze=False).flatten().tolist()
    for panel, (name, (predicted, gold)) in zip(panels, pairs.items(), strict=False):
        given = np.isfinite(predicted)
        _draw(panel, predicted[given], gold[given])
        panel.set_title(_title(name, predicted, gold), fontsize=10)
        panel.set(xlabel="gold score", ylabel="predicted score")
        panel.set(xlim=(low - margin, high + margin), ylim=(low - margin, high + margin), aspect="equal")
        panel.axline(
            (low, low), slope=1, color="0.45", linewidth=1, linestyle="--", zorder=1, label="perfect agreement"
        )
        for axis in (panel.xaxis, panel.yaxis):
            axis.set_major_locator(MaxNLocator(6, steps=[1, 2, 5, 10]))
    for panel in panels[len(pairs) :]:
        panel.remove()
    lines = {
        line.get_label(): line for panel in panels[: len(pairs)] for line in (*panel.lines, *panel.collections[1:])
    }
    figure.legend(
        lines.values(), lines.keys(), loc="outside lower center", ncols=min(columns, 2), frameon=False, fontsize=9
    )
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, format="png", dpi=150, bbox_inches="tight")
    return path


def _draw(panel: Axes, predicted: Floats, gold: Floats) -> None:
    opacity = float(np.clip(20 / max(len(gold), 1) ** 0.6, 0.01, 0.6))
    size = 12 if len(gold) < 5000 else 4
    x, y = _jittered(gold, seed=0), _jittered(predicted, seed=1)
    panel.scatter(x, y, s=size, color=_DOT, alpha=opacity, linewidths=0, zorder=2)
    levels = np.unique(gold)
    if 0 < len(levels) <= _LEVELS:
        means = [predicted[gold == level].mean() for level in levels]
        width = 0.3 * _step(levels)
        label = "mean prediction per gold score"
        panel.hlines(means, levels - width, levels + width, color=_MEAN, linewidth=2, zorder=3, label=label)
    panel.grid(color="0.9", linewidth=0.6, zorder=0)
    panel.spines[["top", "right"]].set_visible(False)


def _step(levels: Floats) -> float:
    return float(np.diff(levels).min()) if len(levels) > 1 else 1.0


def _jitter(scores: Floats) -> float:
    """How far to move scores to either side, rubric units; 0 where they do not hide one another."""
    levels = np.unique(scores)
    return 0.0 if len(levels) > _LEVELS or len(levels) == len(scores) else 0.25 * _step(levels)


def _jittered(scores: Floats, seed: int) -> Floats:
    reach = _jitter(scores)
    return scores + np.random.default_rng(seed).uniform(-reach, reach, len(scores))


def _title(name: str, predicted: Floats, gold: Floats) -> str:
    given = ~np.isnan(predicted)
    r, error = pearson(predicted[given], gold[given]), rmse(predicted[given], gold[given])
    correlation = "r undefined" if np.isnan(r) else f"r = {r:.3f}"
    rms = "RMSE undefined" if np.isnan(error) else f"RMSE = {error:.3f}"
    failed = f", {(~given).sum()} failed" if not given.all() else ""
    # A "$" in a name would start a formula.
    return f"{textwrap.fill(name, 36)}\n{correlation}   {rms}\nn = {given.sum()}{failed}".replace("$", r"\$")
