"""What became of the rows of a bootstrap, by their gold score; and what it will cost. Knows nothing of models."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from trl_tract.distill.failures import BOOTSTRAP_FAILURES
from trl_tract.evaluation.tables import aligned
from trl_tract.files.seal import check_result
from trl_tract.scale.scale import Scale

OUTCOMES = ("blind", "shown", "given up")
_TITLES = ("score", "rows", "at first try", "score shown", "given up", "first try %")


@dataclass
class BootstrapSummary:
    """What became of the rows of a bootstrap; printed, it is a table by score. `summary.json` holds the same.

    Attributes:
        annotated: Rows that had a rationale and kept it.
        blind: Rows with a rationale that was written without knowing the score, and comes to it.
        shown: Rows whose rationale was written for a score that was shown.
        rationales: Rationales among the rows that came out, the annotated ones not counted.
        failed: Why sampled rationales were not kept, by reason. `off score`: it comes to another score.
        by_score: Name of a scale (empty where there is one) -> gold score as it is written -> `blind`, `shown` and
            `given up` -> rows. In the order of the grid.
    """

    rows: int
    annotated: int = 0
    blind: int = 0
    shown: int = 0
    given_up: int = 0
    rationales: int = 0
    sampled: int = 0
    tokens: int = 0
    failed: dict[str, int] = field(default_factory=lambda: dict.fromkeys(BOOTSTRAP_FAILURES, 0))
    by_score: dict[str, dict[str, dict[str, int]]] = field(default_factory=dict)

    @classmethod
    def of(cls, rows: int, scales: Sequence[Scale]) -> "BootstrapSummary":
        """With nothing counted yet."""
        empty = {scale.name: {text: dict.fromkeys(OUTCOMES, 0) for text in scale.grid.texts} for scale in scales}
        return cls(rows, by_score=empty)

    def count(self, outcome: str, scores: Mapping[str, str]) -> None:
        """Count a row that had no rationale.

        Args:
            outcome: One of `OUTCOMES`.
            scores: Name of a scale -> the row's gold score as it is written.
        """
        attribute = outcome.replace(" ", "_")
        setattr(self, attribute, getattr(self, attribute) + 1)
        for name, score in scores.items():
            self.by_score[name][score][outcome] += 1

    @property
    def many_failed(self) -> bool:
        """Whether more than half of the rows were given up."""
        return 2 * self.given_up > self.rows - self.annotated

    def to_dict(self) -> dict[str, Any]:
        """All attributes by name."""
        return asdict(self)

    def __str__(self) -> str:
        lines = [f"{self.rows:,} rows, {self.annotated:,} of which had a rationale"]
        for name, scores in self.by_score.items() if self.annotated < self.rows else ():
            counts = [(score, [scores[score][outcome] for outcome in OUTCOMES]) for score in scores]
            if name:
                lines.append(name)
            rows = [(score, own) for score, own in counts if any(own)]
            rows.append(("all", [sum(column) for column in zip(*(own for _, own in counts), strict=True)]))
            lines.append(aligned([_TITLES, *(_cells(score, own) for score, own in rows)]))
        failed = ", ".join(f"{name} {count:,}" for name, count in self.failed.items() if count)
        kept = f"{self.sampled:,} rationales were sampled ({self.tokens:,} tokens) and {self.rationales:,} kept"
        return "\n".join([*lines, f"{kept}; not kept: {failed}" if failed else kept])


def _cells(score: str, counts: list[int]) -> list[str]:
    total = sum(counts)
    return [score, *(f"{count:,}" for count in (total, *counts)), f"{100 * counts[0] / total:.0f}"]


def read_bootstrap_summary(directory: Path) -> BootstrapSummary:
    """The summary of a finished bootstrap."""
    check_result(directory / "summary.json")
    return BootstrapSummary(**json.loads((directory / "summary.json").read_text(encoding="utf-8")))


@dataclass(frozen=True)
class BootstrapCost:
    """What a bootstrap will take at most: as if every row was asked a second time and no rationale ended early.

    Attributes:
        rows: Rows that are still to be done.
        seconds: None where nothing is known of the speed.
        money: In the unit of the prices; None without prices.
    """

    rows: int
    asked: int
    read: int
    written: int
    seconds: float | None = None
    money: float | None = None

    def __str__(self) -> str:
        parts = [
            f"{self.rows:,} rows without a rationale: at most {self.asked:,} rationales, about {self.read:,} tokens to "
            f"read and at most {self.written:,} to write"
        ]
        if self.seconds is not None:
            parts.append(f"at most {_duration(self.seconds)}, as measured on a few of them")
        if self.money is not None:
            parts.append(f"at most {self.money:,.2f} at the prices given")
        return "; ".join(parts)


def _duration(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} seconds"
    return f"{seconds / 60:.0f} minutes" if seconds < 90 * 60 else f"{seconds / 3600:.1f} hours"
