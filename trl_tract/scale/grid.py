"""Score grids: the admissible scores, how they are written, and their tokens.

Knows tokenizers, because a score's tokens depend on where it stands; knows nothing of models or training.
"""

import functools
import itertools
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from decimal import Decimal
from typing import Any

from trl_tract.scale.text import is_number, score_text, some_scores
from trl_tract.scale.trie import ScorePath, TokenTrie

_RANGE = re.compile(r"(-?\d+(?:\.\d+)?)\.\.(-?\d+(?:\.\d+)?)(?:\.\.(\d+(?:\.\d+)?))?")


_MOST_SCORES = 10_001  # of a range; more are a slip of the hand


@dataclass(frozen=True)
class ScoreGrid:
    """The possible scores: their values, texts and tokens.

    Attributes:
        values: Scores in rubric units, strictly increasing, `K` of them.
        texts: Text of each score in a completion.
        token_ids: Token of each score at the score position. Empty before `resolve`, and if a score has several tokens.
        paths: Tokens of each score if scores have several tokens; empty for a grid of single tokens.
    """

    values: tuple[float, ...]
    texts: tuple[str, ...]
    token_ids: tuple[int, ...] = ()
    paths: tuple[ScorePath, ...] = ()

    @classmethod
    def from_values(
        cls, values: Sequence[float] | Mapping[str, float] | str, texts: Sequence[str] | None = None
    ) -> "ScoreGrid":
        """Create a grid from values and texts, and check them.

        Args:
            values: Scores in rubric units, increasing; or a mapping from texts to values, in any order; or a range
                including both ends, `"0..100"`, optionally with a step, `"0..10..0.5"`.
            texts: Text of each value, in order. None: numbers.

        Raises:
            ValueError: Fewer than two values, one that is not finite, values that do not increase, or texts that do not
                fit them.

        Example:
            >>> ScoreGrid.from_values([1, 1.5, 2]).texts
            ('1', '1.5', '2')
            >>> ScoreGrid.from_values({"good": 4, "poor": 1}).texts
            ('poor', 'good')
            >>> ScoreGrid.from_values("0..1..0.25").values
            (0.0, 0.25, 0.5, 0.75, 1.0)
        """
        if isinstance(values, Mapping):
            if texts is not None:
                raise ValueError(
                    "the score texts are given twice: as the keys of score_values and as score_texts. Use "
                    "only one of the two"
                )
            pairs = sorted(values.items(), key=lambda pair: pair[1])
            texts, values = [text for text, _ in pairs], [value for _, value in pairs]
        try:
            numbers = tuple(_numbers(values))
        except _NoRangeError:
            raise
        except (TypeError, ValueError):
            raise ValueError(
                f"score_values={values!r} is not a list of numbers. Give the scores as numbers, such as [1, 2, 3], or "
                "as a range, such as 0..100 or 0..10..0.5. If scores are written as words, put the words into "
                "score_texts"
            ) from None
        given = values if isinstance(values, str) else list(values)
        if len(numbers) < 2:
            raise ValueError(f"score_values={given} holds {len(numbers)} score(s); a grid needs two or more")
        if not all(math.isfinite(number) for number in numbers):
            raise ValueError(f"score_values={given} holds a value that is not finite")
        if any(left >= right for left, right in itertools.pairwise(numbers)):
            raise ValueError(f"score_values={given} must increase from each value to the next")
        if texts is None:
            return cls(values=numbers, texts=tuple(score_text(number) for number in numbers))
        written = tuple(texts)
        odd = next((text for text in written if not isinstance(text, str)), None)
        if odd is not None:
            raise ValueError(
                f"score_texts holds {odd!r}, which is not text. YAML reads yes and no as true and false, and 01 and 02 "
                "as numbers. Put each text in quotes"
            )
        if len(written) != len(numbers):
            raise ValueError(
                f"score_texts has {len(written)} entries, but score_values has {len(numbers)}. Give one text for each "
                "value"
            )
        if len(set(written)) < len(written) or any(not text or text != text.strip() for text in written):
            raise ValueError(
                f"score_texts={list(written)} must be distinct and not empty, without spaces at the start or end"
            )
        return cls(values=numbers, texts=written)

    def __len__(self) -> int:
        return len(self.values)

    @functools.cached_property
    def trie(self) -> TokenTrie:
        """The `paths` as a trie of common prefixes."""
        return TokenTrie.from_paths([path.token_ids for path in self.paths])

    def resolve(self, tokenizer: Any, before: str, after: str = "", *, add_special_tokens: bool = False) -> "ScoreGrid":
        """Find each score's tokens between the text `before` and the text `after` it.

        A digit's token depends on what precedes it: `[RESULT] 5` ends in `5` for some vocabularies and in ` 5` for
        others. So every score is put into the same place of a real row, tokenised, and located by its characters.

        Args:
            tokenizer: A fast tokenizer (character offsets are needed).
            before: Rendered text of a training row up to its score.
            after: Text that follows the score there. It tells scores apart if one is the start of another.
            add_special_tokens: As for the training rows: False for text from a chat template.

        Raises:
            ValueError: Two scores have the same tokens, the end of a score is ambiguous, or the tokens before the score
                depend on the score.
        """
        encoded = tokenizer(
            [before + text + after for text in self.texts],
            add_special_tokens=add_special_tokens,
            return_offsets_mapping=True,
        )
        rows: list[list[int]] = encoded["input_ids"]
        coverings = []
        for text, offsets in zip(self.texts, encoded["offset_mapping"], strict=True):
            coverings.append(tokens_covering(offsets, len(before), len(before) + len(text)))
            if not coverings[-1]:
                raise ValueError(
                    f"score {text!r} cannot be written with the tokens of this tokenizer. Use another text for it"
                )
        start = min(covering[0] for covering in coverings)
        while any(row[:start] != rows[0][:start] for row in rows):
            start -= 1
        if any(covering[0] > start for covering in coverings):
            # What parts the scores begins before them. A space may go with them, but the marker is not theirs.
            odd = next((i for i, row in enumerate(rows) if row[: start + 1] != rows[0][: start + 1]), 0)
            first = min(offsets[start][0] for offsets in encoded["offset_mapping"])
            if first < len(before.rstrip()):
                raise ValueError(
                    f"the tokens before the score depend on the score ({self.texts[0]!r} and {self.texts[odd]!r} "
                    "differ), so the scores cannot all be read at one position. Put a space or a newline between "
                    "marker and score"
                )
        stops = [covering[-1] + 1 for covering in coverings]
        spans = [row[start:stop] for row, stop in zip(rows, stops, strict=True)]
        if len({tuple(span) for span in spans}) < len(spans):
            raise ValueError(f"scores {some_scores(self.texts)} share a token for this tokenizer: {spans}")
        if all(len(span) == 1 for span in spans):
            return replace(self, token_ids=tuple(span[0] for span in spans), paths=())
        ends = self._ends(rows, start, stops)
        paths = tuple(
            ScorePath(tuple(row[start : stop + end]), lead=covering[0] - start, end=end)
            for row, stop, end, covering in zip(rows, stops, ends, coverings, strict=True)
        )
        return replace(self, token_ids=(), paths=paths)

    def _ends(self, rows: list[list[int]], start: int, stops: list[int]) -> list[int]:
        """How many of the tokens behind each score its path needs, so that it is not the beginning of another path."""
        ends = [0] * len(rows)
        while True:
            paths = [tuple(row[start : stop + end]) for row, stop, end in zip(rows, stops, ends, strict=True)]
            beginnings = {path[:length] for path in paths for length in range(len(path))}
            open_ended = [i for i, path in enumerate(paths) if path in beginnings]
            if not open_ended:
                return ends
            for i in open_ended:
                ends[i] += 1
                if stops[i] + ends[i] > len(rows[i]):
                    raise ValueError(
                        f"score {self.texts[i]!r} is also the start of another score, and no text after it tells them "
                        "apart. Give the tokenizer an end-of-sequence token, or give all scores the same number of "
                        "characters (01, 10)"
                    )

    def value_of(self, text: str) -> float:
        """The value of a score text, in rubric units."""
        return self.values[self.texts.index(text)]

    def found_again(self, here: "ScoreGrid") -> "ScoreGrid":
        """The grid with its tokens; those it was trained with, if it was, have to be those that it has here.

        Args:
            here: The same scores with the tokens that the tokenizer in use gives them.

        Raises:
            ValueError: They are others.
        """
        trained, found = ([path.written for path in grid.paths] or grid.token_ids for grid in (self, here))
        if not trained:
            return here
        if found != trained:
            raise ValueError(
                f"the scores are the tokens {found} here, but were {trained} in training. Load the tokenizer that the "
                "judge was trained with"
            )
        return self

    def nearest_text(self, value: float) -> str:
        """The text of the grid value nearest to `value`; of two equally near, the lower one."""
        return self.texts[min(range(len(self)), key=lambda i: (abs(self.values[i] - value), i))]

    def in_range(self, value: float) -> bool:
        """Whether a gold score lies between the two ends of the grid; it need not be on it."""
        return self.values[0] <= value <= self.values[-1]

    @functools.cached_property
    def contradicts_numbers(self) -> bool:
        """Whether a score is written as a number of the range that is not its value: "1" for 5, the best one."""
        written = {text: value for text, value in zip(self.texts, self.values, strict=True) if is_number(text)}
        return any(float(text) != value and self.in_range(float(text)) for text, value in written.items())


class _NoRangeError(ValueError):
    """Steps that do not lead from the first score of a range to the last, or too many of them."""


def _numbers(values: Sequence[Any] | str) -> Iterator[float]:
    """The numbers among `values`, ranges written out."""
    for value in [values] if isinstance(values, str) else values:
        found = _RANGE.fullmatch(value.strip()) if isinstance(value, str) else None
        if found is None:
            if value is values:
                raise ValueError
            if isinstance(value, bool):
                raise ValueError
            yield float(value)
            continue
        # Decimal: 0, 0.1, 0.2, 0.3 and not 0.30000000000000004, which nobody writes.
        first, last, step = (Decimal(number or 1) for number in found.groups())
        if not step or (last - first) % step or not 0 <= (last - first) / step < _MOST_SCORES:
            raise _NoRangeError(
                f"score_values={value}: steps of {step} do not lead from {first} to {last} in {_MOST_SCORES:,} scores "
                "or fewer. Write a range as first..last or first..last..step"
            )
        yield from (float(first + step * count) for count in range(int((last - first) / step) + 1))


def tokens_covering(offsets: Sequence[tuple[int, int]], start: int, end: int) -> list[int]:
    """Indices of the tokens that hold any of the characters from `start` to `end`.

    Special tokens that a tokenizer adds have empty offsets and cover nothing.

    Example:
        >>> tokens_covering([(0, 0), (0, 3), (3, 5)], 3, 4)
        [2]
    """
    return [i for i, (first, last) in enumerate(offsets) if first < end and last > start and first < last]
