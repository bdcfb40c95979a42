"""What a model card says of the rows that a model was trained on. Knows nothing of models or training."""

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from datasets import Dataset

from trl_tract.rows.rendering import RenderedRow, as_prompt_completion
from trl_tract.rows.row import Row


@dataclass(frozen=True)
class TrainingRows:
    """What a card says of the rows.

    Attributes:
        count: How many there were; None where they were streamed.
        prompt: The first row's prompt, text or chat messages; None where it came tokenised.
        rendered: The same as the model reads it, chat template included.
        sources: Where rationales came from (`self`, `annotated`, `blind`, `shown`), and how many; empty where nothing
            is known.
    """

    count: int | None = None
    prompt: Any = None
    rendered: str | None = None
    sources: Mapping[str, int] = field(default_factory=dict)

    @classmethod
    def of(cls, given: Any, render: Callable[[Row], RenderedRow]) -> "TrainingRows":
        """What there is to say of a dataset of accepted rows; nothing of a stream, which would be read again."""
        if not isinstance(given, Dataset):
            return cls()
        known = given["rationale_source"] if "rationale_source" in given.column_names else []
        sources = Counter(source for source in known if source is not None)
        try:
            row = as_prompt_completion(given[0])
            rendered = render(row)
        except (ValueError, KeyError, TypeError):  # it came tokenised
            return cls(len(given), sources=sources)
        return cls(len(given), row["prompt"], rendered.prompt_text, sources)
