"""Rows of cells as text that lines up in a terminal, and as Markdown. Knows nothing of what is in them."""

from collections.abc import Sequence

import numpy as np


def number(value: float) -> str:
    """Three decimals, or `undefined`."""
    return "undefined" if np.isnan(value) else f"{value:.3f}"


def aligned(rows: Sequence[Sequence[str]], separator: str = "  ", *, left: int = 1) -> str:
    """The first `left` columns to the left, the others, which are numbers, to the right.

    Example:
        >>> print(aligned([["score", "n"], ["1", "10"]]))
        score   n
        1      10
    """
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        separator.join(
            cell.ljust(width) if i < left else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    )


def markdown(rows: Sequence[Sequence[str]]) -> str:
    """A GitHub Markdown table, the first row its heading."""
    widths = [max(3, *map(len, column)) for column in zip(*rows, strict=True)]
    rule = [":" + "-" * (widths[0] - 1), *("-" * (width - 1) + ":" for width in widths[1:])]
    return "\n".join(f"| {line} |" for line in aligned([rows[0], rule, *rows[1:]], " | ").splitlines())
