"""Rows that cannot be used: named all together, and refused or left out. Knows nothing of why they cannot."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

Say = Callable[[str], None]


class Refusal(NamedTuple):
    """Why a record gives no item, or a row cannot be used.

    Attributes:
        kind: Groups those that share the reason.
        tokens: Of the row, where they were counted.
    """

    number: int
    kind: str
    message: str
    tokens: int = 0


def refuse(
    refused: Sequence[Refusal], total: int, name: str, *, invalid_rows: str, say: Say, max_length: int | None = None
) -> None:
    """Refuse `total` rows for those that are refused among them; or say that they are left out.

    Raises:
        ValueError: There are such rows and `invalid_rows` is `raise`, or no others.
    """
    if not refused:
        return
    summary = refusal_summary(refused, total, name, max_length)
    if invalid_rows == "raise":
        raise ValueError(f"{summary} Or set invalid_rows='drop' to continue without them.")
    if len(refused) == total:
        raise ValueError(f"No row is left. {summary}")
    say(f"Continuing without them: {refusal_summary(refused, total, name, max_length, fix=False)}")


def kept_of_stream(
    refusal: Callable[[Mapping[str, Any], int], Refusal | None],
    name: str,
    *,
    invalid_rows: str,
    say: Say,
    max_length: int | None = None,
) -> Callable[[Mapping[str, Any], int], bool]:
    """Whether a row of a stream is kept: they cannot be looked at beforehand, so each bad one is met at its turn."""
    dropped = 0

    def keep(row: Mapping[str, Any], index: int) -> bool:
        nonlocal dropped
        found = refusal(row, index)
        if found is None:
            return True
        fix = invalid_rows == "raise"
        summary = refusal_summary([found], None, name, max_length, fix=fix)
        if fix:
            raise ValueError(f"{summary} Or set invalid_rows='drop' to continue without such rows.")
        dropped += 1
        if dropped & (dropped - 1) == 0:  # at 1, 2, 4, 8, ...: counted without flooding the log
            say(f"Dropped {dropped} row(s) of the stream so far, the last one: {summary}")
        return False

    return keep


def refusal_summary(
    refused: Sequence[Refusal], total: int | None, name: str, max_length: int | None, *, fix: bool = True
) -> str:
    """One sentence for each reason: how many rows, which is the first, and what to do.

    Args:
        fix: Ask to fix the rows; False where the user chose to go on without them.
    """
    advice = " Fix these rows." if fix else ""
    sentences = []
    for kind in dict.fromkeys(kind for _, kind, _, _ in refused):
        rows = [row for row in refused if row.kind == kind]
        number, _, message, num_tokens = rows[0]
        count = f"{len(rows)} of {total} {name} rows" if total is not None else f"{name} row {number}"
        if kind != "cut off":
            where = f"{kind}; first: row {number}" if total is not None else kind
            sentences.append(f"{count} refused ({where}): {message}.{advice}")
        elif total is None:
            sentences.append(
                f"{count} loses its score at max_length={max_length}: it has {num_tokens:,} tokens. Set max_length to "
                f"{num_tokens} or more."
            )
        else:
            longest = max(row.tokens for row in rows)
            sentences.append(
                f"{count} lose their score at max_length={max_length} (first: row {number}, {num_tokens:,} tokens; "
                f"longest: {longest:,}). Set max_length to {longest} or more."
            )
    return " ".join(sentences)
