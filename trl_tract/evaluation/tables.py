"""Rows of cells as text that lines up in a terminal, and as Markdown. Knows nothing of what is in them."""

from collections.abc import Sequence

import numpy as np


def number(value: float) -> str:
    """Three decimals, or `undefined`."""
    return "undefined" if np.isnan(value) else f"{value:.3f}"


def aligned(rows: Sequence[Sequence[str]], separator: str = "  ") -> str:
    """Names to the left, numbers to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        separator.join([row[0].ljust(widths[0]), *(cell.rjust(w) for cell, w in zip(row[1:], widths[1:], strict=True))])
        for row in rows
    )


def markdown(rows: Sequence[Sequence[str]]) -> str:
    """A GitHub Markdown table, the first row its heading."""
    widths = [max(3, *map(len, column)) for column in zip(*rows, strict=True)]
    rule = [":" + "-" * (widths[0] - 1), *("-" * (width - 1) + ":" for width in widths[1:])]
    return "\n".join(f"| {line} |" for line in aligned([rows[0], rule, *rows[1:]], " | ").splitlines())
