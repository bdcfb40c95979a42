"""Token ids in, text out: what every engine's backend checks and cuts alike. Knows no engine."""

from collections.abc import Iterable, Sequence

from transformers import PreTrainedTokenizerBase

from trl_tract.backends.base import Generation


def checked_ids(rows: Sequence[Sequence[int]], what: str, vocabulary: int) -> list[list[int]]:
    """`rows` as plain lists.

    Args:
        rows: Token ids, one sequence a row.
        what: What they are called in errors.
        vocabulary: Ids of this size and above do not exist.

    Raises:
        ValueError: A row that is empty, or holds an id outside the vocabulary.
    """
    checked = []
    for index, row in enumerate(rows):
        ids = [int(token) for token in row]
        if not ids:
            raise ValueError(f"{what}[{index}] is empty: there is nothing to continue")
        if min(ids) < 0 or max(ids) >= vocabulary:
            wrong = next(token for token in ids if not 0 <= token < vocabulary)
            raise ValueError(f"{what}[{index}] holds token id {wrong}, outside the vocabulary of {vocabulary}")
        checked.append(ids)
    return checked


def decode(tokenizer: PreTrainedTokenizerBase, ids: Iterable[int]) -> str:
    """The text of `ids` without special tokens, exactly as the tokens spell it."""
    # clean_up_tokenization_spaces rewrites " ." to "." on some tokenizers, and with it the text to be matched.
    return str(tokenizer.decode(list(ids), skip_special_tokens=True, clean_up_tokenization_spaces=False))


def ended(tokenizer: PreTrainedTokenizerBase, written: Sequence[int], *, at_eos: bool, stop: str | None) -> Generation:
    """A continuation that is finished, cut at the stop text.

    The text is decoded from the ids here, whatever text an engine reports: engines differ in the spaces around a stop
    text and in front of the first word, and their ids go past the stop text.

    Args:
        tokenizer: Of the model.
        written: Every token sampled.
        at_eos: The last of them is an end of sequence.
        stop: The stop text, if any.
    """
    text = decode(tokenizer, written[:-1] if at_eos else written)
    if stop is not None and stop in text:
        return Generation(text[: text.index(stop)], "stop", len(written))
    return Generation(text, "eos" if at_eos else "length", len(written))
