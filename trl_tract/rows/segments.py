"""Text -> token ids and the characters that each covers, with cuts that no token goes across.

Knows a tokenizer, and nothing of what the text is.
"""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

from transformers import PreTrainedTokenizerBase

# Before a text that goes on behind another one: many tokenizers put a space before the first word of a text, and some
# join what stands here with what follows.
_ANCHORS = ("\n", "x", ".", "0")


@dataclass(frozen=True)
class Segments:
    """Token ids, and the first character and one past the last that each covers; added special tokens cover none."""

    ids: list[int]
    offsets: list[tuple[int, int]]


def segment(
    tokenizer: PreTrainedTokenizerBase, text: str, cuts: Sequence[int] = (), *, add_special_tokens: bool = False
) -> Segments:
    """Tokenise `text` from its beginning; what a tokenizer appends, such as an end of sequence, is left out."""
    bounds = [0, *cuts, len(text)]
    encoded = tokenizer(
        text[: bounds[1]],
        add_special_tokens=add_special_tokens,
        return_offsets_mapping=True,
        return_special_tokens_mask=add_special_tokens,
    )
    ids, offsets = list(encoded["input_ids"]), [(start, end) for start, end in encoded["offset_mapping"]]
    if add_special_tokens:
        mask = encoded["special_tokens_mask"]
        while ids and mask[len(ids) - 1] and offsets[-1] == (0, 0):
            del ids[-1], offsets[-1]
    for start, end in itertools.pairwise(bounds[1:]):
        behind = continuation(tokenizer, text[start:end])
        ids += behind.ids
        offsets += [(first + start, last + start) for first, last in behind.offsets]
    return Segments(ids, offsets)


def continuation(tokenizer: PreTrainedTokenizerBase, text: str) -> Segments:
    """Tokenise `text` as what goes on behind another text, without joining the two."""
    for anchor in _ANCHORS:
        encoded = tokenizer(anchor + text, add_special_tokens=False, return_offsets_mapping=True)
        pairs = zip(encoded["input_ids"], encoded["offset_mapping"], strict=True)
        own = [(token, first, last) for token, (first, last) in pairs if last > len(anchor)]
        if all(first >= len(anchor) for _, first, _ in own):
            break
    else:
        raise ValueError(f"this tokenizer merges {text[:20]!r} with the text before it")
    return Segments(
        [token for token, _, _ in own], [(first - len(anchor), last - len(anchor)) for _, first, last in own]
    )
