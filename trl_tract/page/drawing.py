"""What a picture is: title, caption, description in words, and a drawing in light or dark colours, as SVG or PNG.

Needs matplotlib where it draws. Knows nothing of scores.
"""

from __future__ import annotations

import io
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


@dataclass(frozen=True)
class Theme:
    """Colours of a drawing. `series` are told apart in greyscale and by colour-blind readers too."""

    ink: str
    muted: str
    rule: str
    surface: str
    series: tuple[str, str]
    faint: str
    ramp: tuple[str, str]


LIGHT = Theme("#16161a", "#55545c", "#e4e3e8", "#ffffff", ("#2a6fc4", "#c2410c"), "#c9dcf4", ("#f1f5fb", "#14427d"))
DARK = Theme("#f2f2f5", "#b9b8c2", "#34343b", "#1c1c21", ("#6ea8f0", "#fb923c"), "#27415f", ("#23272f", "#8fc0fb"))


@dataclass(frozen=True)
class Chart:
    """One picture.

    Attributes:
        alt: What there is to see in it, in words.
        size: Inches.
    """

    name: str
    title: str
    caption: str
    alt: str
    draw: Callable[[Axes, Theme], None] = field(repr=False)
    size: tuple[float, float] = (5.2, 3.9)

    def svg(self, theme: Theme) -> bytes:
        """As an SVG document with glyphs as paths and a transparent ground; the same bytes every time."""
        import matplotlib as mpl

        buffer = io.BytesIO()
        with mpl.rc_context({"svg.fonttype": "path", "svg.hashsalt": self.name}):
            figure = self._figure(theme)
            figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
        return buffer.getvalue()

    def png(self) -> bytes:
        """As a PNG with its title, light."""
        figure = self._figure(LIGHT)
        figure.suptitle(self.title, color=LIGHT.ink, fontsize=12, x=0.02, ha="left", fontweight="bold")
        buffer = io.BytesIO()
        figure.savefig(buffer, format="png", dpi=150, facecolor=LIGHT.surface, metadata={"Software": None})
        return buffer.getvalue()

    def _figure(self, theme: Theme) -> Figure:
        from matplotlib.figure import Figure
        from matplotlib.layout_engine import ConstrainedLayoutEngine

        # Figure, not pyplot: no global state, no window.
        figure = Figure(figsize=self.size, layout=ConstrainedLayoutEngine(h_pad=0.1, w_pad=0.1))
        axes = figure.subplots()
        axes.set_facecolor("none")
        axes.spines[["top", "right"]].set_visible(False)
        axes.spines[["left", "bottom"]].set_color(theme.muted)
        axes.tick_params(colors=theme.muted, labelsize=10)
        for axis in (axes.xaxis, axes.yaxis):
            axis.label.set(color=theme.ink, size=11)
        axes.grid(color=theme.rule, linewidth=0.8)
        axes.set_axisbelow(True)
        self.draw(axes, theme)
        return figure


def require_matplotlib() -> None:
    """Say how to get matplotlib, where it is missing.

    Raises:
        ImportError: matplotlib is not installed.
    """
    try:
        import matplotlib.figure  # noqa: F401
    except ImportError as error:
        raise ImportError('The HTML report needs matplotlib: pip install "trl-tract[report]"') from error


def legible(ground: tuple[float, float, float, float], *inks: str) -> str:
    """The ink with the highest contrast on `ground`; of black and white one always has 4.5 or more.

    Source: WCAG 2.2, contrast ratio.
    """
    from matplotlib.colors import to_rgb

    def luminance(color: Any) -> float:
        channels = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in to_rgb(color)]
        return float(np.dot(channels, (0.2126, 0.7152, 0.0722))) + 0.05

    return max(inks, key=lambda ink: abs(np.log(luminance(ink) / luminance(ground))))
