"""One row, token by token: which are prompt, rationale, marker, score, and in which term of the loss each takes part.

What is shown is read off the columns that training uses, not worked out a second time. Knows nothing of files.
"""

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from trl_tract.evaluation.tables import aligned
from trl_tract.rows.encoding import RowEncoder
from trl_tract.rows.rendering import RenderedRow
from trl_tract.rows.tokens import encode
from trl_tract.text.display import visible
from trl_tract.text.terminal import paint

Part = Literal["prompt", "rationale", "marker", "separator", "score", "after"]
PARTS: Mapping[Part, str] = {
    "prompt": "dim",
    "rationale": "green",
    "marker": "cyan",
    "separator": "cyan",
    "score": "score",
    "after": "yellow",
}
_SHOWN_PROMPT, _SHOWN_RATIONALE = 300, 900  # characters of each that are shown
_READ_PROMPT = 2000  # of a prompt that is to be read


@dataclass(frozen=True)
class Token:
    """A token of a row as it is trained on.

    Attributes:
        text: The characters it covers; of a token that covers none, such as a beginning of sequence, its name.
        squared_error: Whether its probability is a part of a score's, whose expected value is compared.
        gold: The gold score, rubric units, at the first token of a score; else None.
        kept: False beyond `max_length`.
    """

    index: int
    id: int
    text: str
    part: Part
    cross_entropy: bool
    squared_error: bool
    gold: float | None
    kept: bool = True

    @property
    def terms(self) -> str:
        """The terms of the loss that it takes part in."""
        if not self.kept:
            return "cut off"
        names = (["cross-entropy"] if self.cross_entropy else []) + (["squared error"] if self.squared_error else [])
        return " + ".join(names) or "none"


def view_row(encoder: RowEncoder, row: Mapping[str, Any], training: Mapping[str, Any] | None = None) -> list[Token]:
    """The tokens of a row that `encoder` accepts, but for its length.

    Args:
        training: Fields of TRACTConfig, whose weights are read: a term that weighs 0 has no tokens.

    Raises:
        ScoreNotFoundError: The row is refused for another reason than its length.
    """
    training = training or {}
    tokenizer, rendered = encoder.tokenizer, encoder.render(row)
    whole, prompt_length = encode(encoder.template, rendered)
    columns = replace(encoder, max_length=None)(row)
    if columns["refusal_kind"]:
        raise ValueError(columns["refusal"])
    limit = math.inf if encoder.max_length is None else encoder.max_length
    scored: set[int] = set()
    starts = [i for i, gold in enumerate(columns["score_labels"]) if not math.isnan(gold)]
    for start, score, scale in zip(starts, rendered.scores, encoder.scales, strict=True):
        grid = scale.grid
        if (training.get("raft_weight") if scale.raft_weight is None else scale.raft_weight) == 0:
            continue
        # Of several tokens all count, and where a score begins another one, what tells it apart does too.
        count = len(grid.paths[grid.texts.index(score.text)].token_ids) if grid.paths else 1
        scored.update(range(start, start + count))
    tokens = []
    for i, (number, (start, end)) in enumerate(zip(whole.ids, whole.offsets, strict=True)):
        gold = columns["score_labels"][i]
        tokens.append(
            Token(
                index=i,
                id=number,
                text=rendered.text[start:end] or tokenizer.convert_ids_to_tokens(number),
                part="prompt" if i < prompt_length else _part(rendered, start, end),
                cross_entropy=columns["labels"][i] != -100 and training.get("rationale_weight") != 0,
                squared_error=i in scored,
                gold=None if math.isnan(gold) else gold,
                kept=i < limit,
            )
        )
    return tokens


def _part(rendered: RenderedRow, start: int, end: int) -> Part:
    """What the characters `start` to `end` of the completion belong to; a token of two parts is of the later one."""
    previous = 0
    for score, written in zip(rendered.scores, rendered.formats, strict=True):
        marker = rendered.text.rfind(written.marker, previous, score.start)
        if start >= score.end:
            previous = score.end
            continue
        if end > score.start:
            return "score"
        if end > marker + len(written.marker):
            return "separator"
        return "marker" if end > marker else "rationale"
    return "after"


def painted(tokens: Sequence[Token]) -> str:
    """The row as running text in the colours of `PARTS`, the middle of a long prompt left out."""
    return "".join(paint(_shortened(part, text), PARTS[part]) for part, _, text in _runs(tokens))


def legend(tokens: Sequence[Token], *, colour: bool) -> str:
    """The parts of a row, each with its tokens and the terms of the loss that it takes part in."""
    counted: dict[tuple[Part, str], int] = {}
    for token in tokens:
        counted[token.part, token.terms] = counted.get((token.part, token.terms), 0) + 1
    return "; ".join(
        f"{paint(part, PARTS[part]) if colour else part} ({count} {'token' if count == 1 else 'tokens'}: {terms})"
        for (part, terms), count in counted.items()
    )


def labelled(tokens: Sequence[Token]) -> str:
    """The row without colour: a line for each part, with its tokens, its terms of the loss and its text."""
    table = [["part", "tokens", "terms of the loss", "text"]]
    for part, terms, text in _runs(tokens):
        count = sum(token.part == part and token.terms == terms for token in tokens)
        shown = _shortened(part, text)
        # Where a space more or less makes another token, it has to be seen.
        table.append([part, str(count), terms, shown.replace("\n", "⏎ ") if len(shown) > 40 else repr(shown)])
    return aligned(table, left=4)


def shown_prompt(tokens: Sequence[Token]) -> str:
    """The prompt, line by line, with the middle of a long one left out."""
    text = "".join(text for part, _, text in _runs(tokens) if part == "prompt")
    return "\n".join(f"    {line}".rstrip() for line in _cut(text, _READ_PROMPT).split("\n"))


def around_score(tokens: Sequence[Token], *, before: int = 3) -> str:
    """The tokens from shortly before the first marker to the end of the row, one a line."""
    first = next((i for i, token in enumerate(tokens) if token.part in ("marker", "score")), len(tokens))
    table = [["token", "id", "text", "part", "terms of the loss"]]
    for token in tokens[max(0, first - before) :]:
        terms = token.terms + ("" if token.gold is None else f", gold {token.gold:g}")
        table.append([str(token.index), str(token.id), repr(visible(token.text)), token.part, terms])
    return aligned(table, left=5)


def _runs(tokens: Sequence[Token]) -> list[tuple[Part, str, str]]:
    """Stretches of tokens of one part and the same terms, as `(part, terms, text)`."""
    found = []
    for (part, terms), run in itertools.groupby(tokens, key=lambda token: (token.part, token.terms)):
        # Several tokens may share the characters of one that is written in several bytes.
        found.append((part, terms, "".join(token.text for token in run)))
    return found


def _shortened(part: Part, text: str) -> str:
    return _cut(text, _SHOWN_PROMPT if part == "prompt" else _SHOWN_RATIONALE)


def _cut(text: str, limit: int) -> str:
    if len(text) > limit:
        text = f"{text[: limit // 2]} […] {text[-limit // 2 :]}"
    return visible(text)
