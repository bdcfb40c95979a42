"""Learning curves: what was logged in training, one picture for each quantity, one line for each stage."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from trl_tract.page.drawing import Chart, Theme, require_matplotlib

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_LOGGED = (
    ("loss/rationale", "Cross-entropy of the rationale", "nats per token"),
    ("loss/score", "Squared error of the expected score", "squared rubric units"),
    ("score/mae", "Mean absolute error in training", "rubric units"),
    ("score/grid_mass", "Grid mass in training", "probability"),
    ("judge/rmse", "RMSE with the model's own rationales, in training", "rubric units"),
)


def learning_charts(curves: Mapping[str, Sequence[Mapping[str, Any]]]) -> list[Chart]:
    """What was logged in training, one picture for each quantity, one line for each stage.

    Raises:
        ImportError: matplotlib is not installed.
    """
    require_matplotlib()
    charts = []
    for key, title, unit in _LOGGED:
        lines = {
            (stage, prefix): points
            for stage, history in curves.items()
            for prefix in ("", "eval_")
            if (points := _points(history, prefix + key))
        }
        if lines:
            charts.append(_learning(key, title, unit, lines, list(curves)))
    return charts


def _points(history: Sequence[Mapping[str, Any]], key: str) -> list[tuple[float, float]]:
    points = [(entry.get("step"), entry[key]) for entry in history if key in entry]
    return [
        (float(step), float(value))
        for step, value in points
        if isinstance(step, int | float) and isinstance(value, int | float) and np.isfinite(value)
    ]


def _learning(
    key: str, title: str, unit: str, lines: Mapping[tuple[str, str], list[tuple[float, float]]], stages: Sequence[str]
) -> Chart:

    def draw(axes: Axes, theme: Theme) -> None:
        for (stage, prefix), points in lines.items():
            second = stages.index(stage) % 2
            x, y = np.array(points).T
            axes.plot(
                x,
                y,
                color=theme.series[second],
                # Told apart without colour too: the second stage is dashed, held-out rows have markers.
                linestyle=(0, (5, 2)) if second else "-",
                linewidth=1.0 if prefix else 1.8,
                marker="D" if prefix else ("o" if len(points) == 1 else None),
                markersize=5,
                label=f"{stage}, held out" if prefix else stage,
            )
        axes.set(xlabel="step", ylabel=unit)
        legend = axes.legend(frameon=False, fontsize=10)
        for text in legend.get_texts():
            text.set_color(theme.ink)

    ends = "; ".join(
        f"{stage}{', held out' if prefix else ''} from {points[0][1]:.3f} to {points[-1][1]:.3f}"
        for (stage, prefix), points in lines.items()
    )
    return Chart(f"learning-{key.replace('/', '-').replace('_', '-')}", title, f"As logged: {ends}.", ends, draw)
