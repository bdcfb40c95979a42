"""The pictures of one judge's scores.

Needs matplotlib. Knows nothing of files, HTML, models or names: no text from data reaches a drawing.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from trl_tract.evaluation.metrics import calibration_error
from trl_tract.evaluation.pairs import Floats, round_to_grid
from trl_tract.page.bins import Bins, density, gold_bins, prediction_bins
from trl_tract.page.drawing import Chart, Theme, legible, require_matplotlib

if TYPE_CHECKING:
    from matplotlib.axes import Axes

MAX_POINTS = 1500
"""With more items than this, a random part of them is drawn as points; all else is computed from every item."""

_MAX_CELLS = 60  # grid values a confusion matrix may have: beyond that a cell is smaller than a pixel on a phone
_LABELLED_CELLS = 11  # up to this many, the counts fit into the cells


@dataclass(frozen=True)
class JudgedScores:
    """Items with a score, as arrays. n items, K grid values.

    Attributes:
        predicted: Scores, rubric units, `(n,)`.
        gold: Gold scores, rubric units, `(n,)`.
        grid_mass: Probability on the grid, `(n,)`; NaN where unknown.
        probs: Probability of each grid value, mean over the item's rationales, `(n, K)`; None where unknown.
        grid: The grid's values, rubric units; None: the integers.
    """

    predicted: Floats
    gold: Floats
    grid_mass: Floats
    probs: Floats | None = None
    grid: tuple[float, ...] | None = None


def score_charts(scores: JudgedScores) -> list[Chart]:
    """The pictures of one judge; those for which there is nothing to draw are left out.

    Raises:
        ImportError: matplotlib is not installed.
    """
    require_matplotlib()
    if not len(scores.gold):
        return []
    charts = [_predicted_against_gold(scores), _histograms(scores), _error_by_gold(scores), _reliability(scores)]
    if scores.probs is not None and scores.grid is not None:
        charts.append(_probability_reliability(scores.probs, scores.gold, scores.grid))
    charts += _confusion(scores)
    if np.isfinite(scores.grid_mass).any():
        charts.append(_grid_mass(scores))
    return charts


def _predicted_against_gold(scores: JudgedScores) -> Chart:
    predicted, gold = scores.predicted, scores.gold
    n = len(gold)
    bins = gold_bins(gold)
    drawn = np.arange(n)
    if n > MAX_POINTS:
        drawn = np.sort(np.random.default_rng(0).choice(n, MAX_POINTS, replace=False))

    def draw(axes: Axes, theme: Theme) -> None:
        low, high = float(min(predicted.min(), gold.min())), float(max(predicted.max(), gold.max()))
        margin = max(0.06 * (high - low), 0.6 * bins.step) or 0.5
        axes.axline((low, low), slope=1, color=theme.muted, linewidth=1.2, linestyle=(0, (4, 3)), zorder=2)
        largest = max(bins.counts)
        for code, centre in enumerate(bins.centres):
            inside = predicted[bins.codes == code]
            if len(inside) >= 5 and np.ptp(inside) > 0:
                at, height = density(inside, low - margin, high + margin)
                width = 0.45 * bins.step * np.sqrt(len(inside) / largest) * height / height.max()
                axes.fill_betweenx(
                    at, centre - width, centre + width, where=height > 0.01 * height.max(), color=theme.faint, lw=0
                )
        rng = np.random.default_rng(1)
        x = gold[drawn] + (rng.uniform(-0.22, 0.22, len(drawn)) * bins.step if bins.exact else 0)
        y = predicted[drawn] + rng.uniform(-1, 1, len(drawn)) * 0.22 * _jitter_step(predicted)
        opacity = float(np.clip(12 / len(drawn) ** 0.5, 0.25, 0.75))
        axes.scatter(x, y, s=9 if n < 500 else 5, color=theme.series[0], alpha=opacity, linewidths=0, zorder=3)
        means = [predicted[bins.codes == code].mean() for code in range(len(bins.centres))]
        width = 0.34 * bins.step
        axes.hlines(means, bins.centres - width, bins.centres + width, color=theme.series[1], linewidth=2.4, zorder=4)
        axes.set(xlabel="gold score", ylabel="predicted score")
        axes.set(xlim=(low - margin, high + margin), ylim=(low - margin, high + margin))

    drawing = f"{MAX_POINTS:,} of {n:,} items, drawn at random, are" if n > MAX_POINTS else f"All {n:,} items are"
    return Chart(
        "predicted-against-gold",
        "Predicted against gold",
        f"{drawing} shown as points, with some horizontal jitter. The shading is the density of all {n:,} items at "
        "each gold score, and the short bar is their mean prediction. On the dashed line, prediction and gold score "
        "are equal.",
        f"Scatter plot of {n:,} predicted scores against gold scores. Mean prediction by gold score: "
        + _listed(bins, [predicted[bins.codes == code].mean() for code in range(len(bins.centres))]),
        draw,
        (5.2, 4.6),
    )


def _histograms(scores: JudgedScores) -> Chart:
    sides = {"gold": scores.gold, "predicted": scores.predicted}
    points = np.concatenate([*sides.values(), scores.grid or ()])
    low, high = float(points.min()), float(points.max())
    # On a short grid a bar for each score and one between each two, else twenty.
    bars = 2 * len(scores.grid) - 1 if scores.grid and len(scores.grid) <= _LABELLED_CELLS else 21
    half = (high - low) / (bars - 1) / 2 or 0.5
    edges = np.linspace(low - half, high + half, bars + 1)
    counts = {name: np.histogram(side, bins=edges)[0] for name, side in sides.items()}

    def draw(axes: Axes, theme: Theme) -> None:
        axes.stairs(counts["gold"], edges, fill=True, color=theme.faint, label="gold")
        axes.stairs(counts["gold"], edges, color=theme.muted, linewidth=1, linestyle=(0, (3, 2)))
        axes.stairs(counts["predicted"], edges, color=theme.series[1], linewidth=2, label="predicted")
        axes.set(xlabel="score", ylabel="items")
        axes.xaxis.grid(False)
        axes.legend(frameon=False, labelcolor=theme.ink)

    spreads = {name: f"mean {side.mean():.2f}, standard deviation {side.std():.2f}" for name, side in sides.items()}
    return Chart(
        "score-histograms",
        "Predicted and gold scores",
        "Number of items with each score, for predictions (line) and gold scores (shading). A single tall peak means "
        f"that the judge gives nearly the same score to all items. Gold: {spreads['gold']}; predicted: "
        f"{spreads['predicted']}.",
        "Two histograms. "
        + " ".join(
            f"{name.capitalize()} scores: {spreads[name]}; the fullest bar, around "
            f"{edges[:-1][count.argmax()] + half:.3g}, holds {count.max():,} items."
            for name, count in counts.items()
        ),
        draw,
    )


def _error_by_gold(scores: JudgedScores) -> Chart:
    error, bins = scores.predicted - scores.gold, gold_bins(scores.gold)
    groups = [error[bins.codes == code] for code in range(len(bins.centres))]

    def draw(axes: Axes, theme: Theme) -> None:
        axes.axhline(0, color=theme.muted, linewidth=1.2, linestyle=(0, (4, 3)))
        boxes = [
            dict(zip(("whislo", "q1", "med", "q3", "whishi"), np.percentile(group, [5, 25, 50, 75, 95]), strict=True))
            for group in groups
        ]
        line = {"color": theme.series[0], "linewidth": 1.4}
        axes.bxp(
            boxes,
            positions=bins.centres.tolist(),
            widths=0.6 * bins.step,
            showfliers=False,
            patch_artist=True,
            boxprops={"facecolor": theme.faint, "edgecolor": theme.series[0], "linewidth": 1.2},
            medianprops={"color": theme.series[1], "linewidth": 2.2},
            whiskerprops=line,
            capprops=line,
            manage_ticks=False,
        )
        axes.set(xlabel="gold score", ylabel="predicted - gold")
        axes.xaxis.grid(False)

    return Chart(
        "error-by-gold",
        "Error by gold score",
        "The box holds the middle half of the errors, its bar is the median, and the whiskers reach from the 5th to "
        "the 95th percentile. A downward slope means that the judge stays too close to the middle of its scale.",
        "Box plot of errors. Mean error by gold score: "
        + _listed(bins, [group.mean() for group in groups], signed=True),
        draw,
    )


def _reliability(scores: JudgedScores) -> Chart:
    bins = prediction_bins(scores.predicted)
    groups = [scores.gold[bins.codes == code] for code in range(len(bins.centres))]
    x = np.array([scores.predicted[bins.codes == code].mean() for code in range(len(bins.centres))])
    y = np.array([group.mean() for group in groups])
    half = np.array([1.96 * group.std(ddof=1) / len(group) ** 0.5 if len(group) > 1 else 0.0 for group in groups])

    def draw(axes: Axes, theme: Theme) -> None:
        middle = float(x.mean())
        axes.axline((middle, middle), slope=1, color=theme.muted, linewidth=1.2, linestyle=(0, (4, 3)))
        axes.errorbar(x, y, yerr=half, color=theme.series[0], linewidth=1.6, marker="o", markersize=6, capsize=3)
        axes.set(xlabel="mean predicted score", ylabel="mean gold score")

    error = calibration_error(scores.predicted, scores.gold, grid=scores.grid)
    return Chart(
        "reliability",
        "Reliability of the scores",
        "Items sorted by prediction, in groups of about equal size. Items predicted near 3 should have a mean gold "
        f"score near 3. The whiskers are 95 % intervals of the mean. Calibration error: {error:.3f} rubric units.",
        "Mean gold score by mean predicted score: " + "; ".join(f"{a:.2f}: {b:.2f}" for a, b in zip(x, y, strict=True)),
        draw,
    )


def _probability_reliability(probs: Floats, gold: Floats, grid: tuple[float, ...]) -> Chart:
    stated = probs.ravel()
    hit = (round_to_grid(gold, grid)[:, None] == np.array(grid)).ravel()
    codes = np.minimum((stated * 10).astype(np.int64), 9)
    counts = np.bincount(codes, minlength=10)
    used = counts > 0
    x = np.bincount(codes, weights=stated, minlength=10)[used] / counts[used]
    y = np.bincount(codes, weights=hit, minlength=10)[used] / counts[used]

    def draw(axes: Axes, theme: Theme) -> None:
        axes.plot([0, 1], [0, 1], color=theme.muted, linewidth=1.2, linestyle=(0, (4, 3)))
        area = 18 + 180 * (counts[used] / counts.max()) ** 0.5
        axes.plot(x, y, color=theme.series[0], linewidth=1.6)
        axes.scatter(x, y, s=area, color=theme.series[0], linewidths=0, zorder=3)
        axes.set(xlabel="predicted probability of a score", ylabel="fraction with this gold score", xlim=(-0.04, 1.04))
        axes.set_ylim(-0.04, 1.04)

    return Chart(
        "reliability-of-probabilities",
        "Reliability of the probabilities",
        "Of all scores predicted with about this probability, the fraction that was the gold score (rounded to the "
        "grid). Below the dashed line, the judge is overconfident. Larger dots stand for more predictions.",
        "Fraction of gold scores by predicted probability: "
        + "; ".join(f"{a:.2f}: {b:.2f}" for a, b in zip(x, y, strict=True)),
        draw,
    )


def _confusion(scores: JudgedScores) -> list[Chart]:
    predicted, gold = round_to_grid(scores.predicted, scores.grid), round_to_grid(scores.gold, scores.grid)
    if scores.grid is not None:
        values = np.array(sorted(scores.grid))
    else:
        low, high = min(predicted.min(), gold.min()), max(predicted.max(), gold.max())
        if high - low >= _MAX_CELLS:
            return []
        values = np.arange(low, high + 1)
    if len(values) > _MAX_CELLS:
        return []
    counts = np.zeros((len(values), len(values)), dtype=np.int64)
    np.add.at(counts, (np.searchsorted(values, gold), np.searchsorted(values, predicted)), 1)
    share = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    labels = [f"{value:g}" for value in values]

    def draw(axes: Axes, theme: Theme) -> None:
        from matplotlib.colors import LinearSegmentedColormap

        ramp = LinearSegmentedColormap.from_list("ramp", theme.ramp)
        axes.grid(False)
        axes.pcolormesh(share, cmap=ramp, vmin=0, vmax=1, edgecolors=theme.surface, linewidth=1.5)
        axes.set(xlabel="predicted score", ylabel="gold score", aspect="equal")
        axes.spines[["left", "bottom"]].set_visible(False)
        every = max(1, len(values) // _LABELLED_CELLS)
        ticks = np.arange(0, len(values), every)
        axes.set_xticks(ticks + 0.5, labels[::every])
        axes.set_yticks(ticks + 0.5, labels[::every])
        axes.tick_params(length=0)
        if len(values) <= _LABELLED_CELLS:
            for row, column in np.ndindex(*counts.shape):
                color = legible(ramp(share[row, column]), theme.ink, theme.surface)
                size = 10 if counts.max() < 10_000 else 8
                text = f"{counts[row, column]:,}"
                axes.text(column + 0.5, row + 0.5, text, ha="center", va="center", color=color, size=size)

    agreed = int(np.trace(counts))
    return [
        Chart(
            "confusion",
            "Confusion on the rounded grid",
            "Number of items for each gold score and prediction, both rounded to the grid. The shading shows the "
            "fraction of the items with that gold score.",
            f"Confusion matrix: {agreed:,} of {len(gold):,} items on the diagonal. By gold score: "
            + "; ".join(
                f"{label}: {', '.join(f'{count:,}' for count in row)}"
                for label, row in zip(labels, counts, strict=True)
                if len(labels) <= _LABELLED_CELLS
            ),
            draw,
            (5.2, 4.6),
        )
    ]


def _grid_mass(scores: JudgedScores) -> Chart:
    mass = np.clip(scores.grid_mass[np.isfinite(scores.grid_mass)], 0, 1)
    counts, edges = np.histogram(mass, bins=40, range=(0, 1))

    def draw(axes: Axes, theme: Theme) -> None:
        axes.bar(edges[:-1], counts, width=np.diff(edges), align="edge", color=theme.series[0], edgecolor="none")
        axes.axvline(float(mass.mean()), color=theme.series[1], linewidth=2, linestyle=(0, (4, 2)))
        axes.set(xlabel="probability on the grid", ylabel="items", xlim=(0, 1.001))
        axes.xaxis.grid(False)

    below = float((mass < 0.9).mean())
    return Chart(
        "grid-mass",
        "Grid mass",
        "Probability of the possible scores at the score position. Mass off the grid pulls the expected score towards "
        f"0. The dashed line is the mean, {mass.mean():.3f}; {below:.1%} of the items are below 0.9.",
        f"Histogram of grid mass: mean {mass.mean():.3f}, smallest {mass.min():.3f}, {below:.1%} of items below 0.9.",
        draw,
    )


def _jitter_step(values: Floats) -> float:
    """Distance of neighbouring predictions where they lie on few levels and cover one another; else 0."""
    levels = np.unique(values)
    return float(np.diff(levels).min()) if 1 < len(levels) <= 20 and len(levels) < len(values) else 0.0


def _listed(bins: Bins, numbers: Sequence[float], *, signed: bool = False) -> str:
    return "; ".join(
        f"{label}: {number:{'+' if signed else ''}.2f}" for label, number in zip(bins.labels, numbers, strict=True)
    )
