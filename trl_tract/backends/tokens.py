"""Token ids as callers hand them over, checked. Knows no engine."""

from collections.abc import Sequence


def checked_ids(rows: Sequence[Sequence[int]], what: str, vocabulary: int) -> list[list[int]]:
    """`rows` as plain lists.

    Args:
        vocabulary: Ids of this size and above do not exist.

    Raises:
        ValueError: A row that is empty, or holds an id outside the vocabulary.
    """
    checked = []
    for index, row in enumerate(rows):
        ids = [int(token) for token in row]
        if not ids:
            raise ValueError(f"{what}[{index}] is empty, so there is nothing to continue")
        if min(ids) < 0 or max(ids) >= vocabulary:
            wrong = next(token for token in ids if not 0 <= token < vocabulary)
            raise ValueError(f"{what}[{index}] holds token id {wrong}, outside the vocabulary of {vocabulary}")
        checked.append(ids)
    return checked
