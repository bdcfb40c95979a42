"""How a model that was never trained as a judge is asked for a rationale: the row's prompt, and what to do with it.

What the row is trained with later is its own prompt alone. Characters only: knows no models.
"""

from collections.abc import Sequence
from typing import Any

from trl_tract.rows.row import Row
from trl_tract.scale.scale import Scale
from trl_tract.scale.text import some_scores

_BLIND = (
    "Now judge{aspect}. First say in two or three sentences what is good and what is wrong or missing, without a score "
    "in these sentences. Then write {marker} and one score out of {scores}."
)
_SHOWN = (
    "Now judge{aspect}. The right score is {score}, out of {scores}. Say in two or three sentences what deserves it: "
    "what is good, and what is wrong or missing. Write as if you had found out by yourself: do not name the score, and "
    "do not say that you know it. Then write {marker}."
)
_SO_FAR = "This is written already:\n{done}\n\n"


def asked_row(
    row: Row, scales: Sequence[Scale], number: int, *, shown: str | None = None, done: Sequence[tuple[str, str]] = ()
) -> Row:
    """A row with its prompt as it is asked for the rationale of scale `number`.

    Args:
        shown: The gold score as it is written; None: the model is not told.
        done: Rationales and scores of the scales before, for who cannot be asked behind them.
    """
    scale = scales[number]
    text = (_BLIND if shown is None else _SHOWN).format(
        aspect=f" its {scale.name}" if scale.name else "",
        marker=scale.marker,
        scores=some_scores(scale.grid.texts),
        score=shown,
    )
    if done:
        written = "".join(one.format.join(*piece) for one, piece in zip(scales, done, strict=False))
        text = _SO_FAR.format(done=written.strip()) + text
    return {**row, "prompt": _with(row["prompt"], text)}


def _with(prompt: Any, text: str) -> Any:
    """A prompt with `text` at its end, in its own type."""
    if isinstance(prompt, str):
        return f"{prompt.rstrip()}\n\n{text}\n\n"
    *before, last = prompt
    content = last["content"]
    if last["role"] != "user":
        return [*prompt, {"role": "user", "content": text}]
    if isinstance(content, str):
        return [*before, {**last, "content": f"{content.rstrip()}\n\n{text}"}]
    return [*before, {**last, "content": [*content, {"type": "text", "text": f"\n\n{text}"}]}]
