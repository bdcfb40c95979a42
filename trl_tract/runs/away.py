"""A run whose blocks are done elsewhere, seen from where its rows are looked at and its result is written."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from trl_tract.distill.distill import CoTSelfDistill
from trl_tract.files.blocks import Record, Report
from trl_tract.files.crew import Crew
from trl_tract.rows.row import Row


@dataclass
class AwayBackend:
    """Stands for the backend of workers elsewhere, where rows are looked at and the result is written."""

    tokenizer: Any
    model_id: str
    name: str
    loaded_as: Mapping[str, Any] = field(default_factory=dict)
    crew: Crew | None = None

    def hire(self, crew: Crew, known: Mapping[str, Any]) -> None:
        """Have a crew do the blocks; what it says beyond what is `known` here is how the model was loaded."""
        self.crew = crew
        self.loaded_as = {name: value for name, value in crew.made_with.items() if name not in known}

    @property
    def max_calls(self) -> int:
        """Blocks under way at once."""
        return self.crew.max_calls if self.crew else 1

    def cancel(self) -> None:
        """End the calls under way."""
        if self.crew:
            self.crew.cancel()


class AwayDistill(CoTSelfDistill):
    """A self-distillation whose rows are looked at and written here, and whose blocks are done elsewhere."""

    backend: AwayBackend

    def block(self, rows: Sequence[Row], start: int, report: Report) -> list[Record]:
        """Have the crew do a block."""
        assert self.backend.crew is not None
        return self.backend.crew.do(list(rows), start, report)
