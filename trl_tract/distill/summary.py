"""What became of the rationales of a self-distillation: counted, printed, saved. Knows nothing of models or rows."""

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from trl_tract.distill.failures import FAILURES
from trl_tract.files.seal import check_result


@dataclass
class DistillSummary:
    """What became of the rationales of a self-distillation; printed, it is a table. `summary.json` holds the same.

    Attributes:
        rationales: Asked for: rows times `num_generations`.
        self_written: Rationales of the model's own among the stage-two rows.
        dropped: Rationales that failed and left no row.
        failed: How often the last attempt failed, by reason.
        attempts_failed: How often any attempt failed, by reason.
    """

    rows: int
    rationales: int
    self_written: int = 0
    annotated: int = 0
    dropped: int = 0
    resampled: int = 0
    failed: dict[str, int] = field(default_factory=lambda: dict.fromkeys(FAILURES, 0))
    attempts_failed: dict[str, int] = field(default_factory=lambda: dict.fromkeys(FAILURES, 0))

    @property
    def many_failed(self) -> bool:
        """Whether more than a fifth failed."""
        return 5 * sum(self.failed.values()) > self.rationales

    def to_dict(self) -> dict[str, Any]:
        """All attributes by name."""
        return asdict(self)

    def __str__(self) -> str:
        counts = {
            "rows": self.rows,
            "rationales requested": self.rationales,
            "self-written": self.self_written,
            "annotated": self.annotated,
            "dropped": self.dropped,
            "sampled again": self.resampled,
        }
        lines = [f"{name:24}{count:>10,}" for name, count in counts.items()]
        lines.append(f"{'failed':24}{'at last':>10}{'attempts':>10}")
        lines += [f"  {name:22}{self.failed[name]:>10,}{self.attempts_failed[name]:>10,}" for name in FAILURES]
        return "\n".join(lines)


def read_summary(directory: Path) -> DistillSummary:
    """The summary of a finished self-distillation."""
    check_result(directory / "summary.json")
    return DistillSummary(**json.loads((directory / "summary.json").read_text(encoding="utf-8")))
