"""Marker, score and rationale as text. Characters only: knows no tokens, grids or models."""

import functools
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass

_NUMBER = re.compile(r"[-+]?\d+(?:\.\d+)?")


# What may not stand right behind a score: "[RESULT] 4.5", "[RESULT] 3 / 10", "[RESULT] 3 points of 10", "[RESULT] 3
# (of 10)", "[RESULT] 3 on a scale of ten", "[RESULT] 3 to 4" and "[RESULT] 3 1/2" are other scores than 4 and 3, in
# whatever language and width they are written. A dash or comma with spaces may begin a sentence, unless the number
# behind it ends the line.
_OF = "(?:out |ud )?(?:of|af)|van|von|aus|auf|over|sur|de|di|da|su|em|av|na|ze?|od|из|от|από|στα|per|in"
_TO = (
    "to|or|through|thru|till?|bis|oder|à|ou|hasta|tot|eller|lub|albo|do|až|nebo|ila|veya|tai|или|до|або|έως|(?-i:a|o|e)"
)
_OR = rf"(?:[–~〜～→/]|[ \t]*[~〜～→至到×][ \t]*|\s+(?:up\s+)?(?:{_TO})\s+)"
_UNIT = (
    r"(?:\s+(?:points?|pts?\.?|marks?|stars?|punkten?|sternen?|puntos|estrellas|étoiles|punti|stelle|分|点|점)"
    r"|\s*[★☆⭐🌟\ufe0f]+)?"
)
_HIGHEST = (
    r"(?:\d|[十百]|десят|(?:ten|hundred|zehn|hundert|dix|cent|diez|cien|dieci|cento|dez|cem|tien|honderd|tio)(?!\w))"
)
_SCALE = r"(?:scale|skala|schaal|échelle|escala|scala|шкал\w*|max(?:im(?:um|al|o|a))?)(?!\w)"
_HALF = r"(?:half|halb|halve?|halvt|demie?|medi[ao]|mezz[ao]|mei[ao]|pół|půl|половиной)"
_SCORE_GOES_ON = re.compile(
    rf"\w|[.,:·٫'’*-]\d|[ \t]+\d+(?:[/⁄]\d|ths?(?!\w))|[ \t]\d{{3}}(?!\w)|[+±]|[−-](?=[\s.,;)\]]*$)"
    rf"|{_UNIT}\s*[/／∕⁄÷|]\s*{_HIGHEST}|\s+[:x·]\s*\d"
    rf"|{_UNIT}[ \t]*[(\[（［【](?:[^)\]）］】.\n]|\.(?=\s*\d)){{0,30}}?{_HIGHEST}"
    rf"|{_UNIT}[ \t]+(?:{_OF})\s+(?:(?:[^\W\d]+|max\.)\s+){{0,3}}{_HIGHEST}"
    rf"|[^.!?\n]{{0,30}}?{_SCALE}(?:[^.!?\n]|\.(?=\s*\d)){{0,20}}?{_HIGHEST}"
    rf"|[^.!?\n]{{0,30}}?{_HIGHEST}(?:[^.!?\n]{{0,12}}?{_SCALE}|\s+(?:is|being)\s+(?:the\s+)?(?:best|highest|top))"
    rf"|{_OR}[-+]?\d|\s*(?:[%％‰]|(?:per\s?cent|prozent|procent|pct|hundred|thousand|million)(?!\w))|[ \t]*[¼½¾⅓⅔]"
    r"|\s+and\s+(?:a|one|two|three)[\s-]+(?:half|thirds?|quarters?)"
    rf"|\s+(?:et|y|e|og|och|en|und|i|a|с)\s+(?:(?:een|ein|en|ett|um|uma)\s+)?{_HALF}(?!\w)"
    r"|\s+(?:point|dot|comma|komma)\s+(?:\d|zero|one|two|three|four|five|six|seven|eight|nine)"
    rf"|[ \t]*[-–—,;&+…]?[ \t]*\d+(?:\.\d+)?{_UNIT}[.!]?[ \t]*(?:[\r\n]|$)",
    re.IGNORECASE | re.MULTILINE,
)


# Behind a word or a letter: "A+", "poor-ish" and "A's" are other scores than A and poor.
_WORD_GOES_ON = re.compile(r"[\w+'’-]")


class ScoreNotFoundError(ValueError):
    """A completion has no score, or no single one. `kind` groups rows that share the reason."""

    def __init__(self, kind: str, message: str) -> None:
        super().__init__(message)
        self.kind = kind


@dataclass(frozen=True)
class ScoreSpan:
    """Where a completion's score stands, in characters of the completion.

    Attributes:
        marker_start: First character of the marker that announces it.
        lead: Whitespace between the rationale and the marker.
        separator: Whitespace between the marker and the score.
    """

    start: int
    end: int
    text: str
    marker_start: int
    lead: str
    separator: str


@dataclass(frozen=True)
class CompletionFormat:
    """How a rationale and a score are written as one completion: start, rationale, lead, marker, separator, score.

    The judge has to be asked with the very characters that it was trained on, so the format of the training rows is
    saved with the model. `start` is the whitespace that plain-text completions often begin with.

    Example:
        >>> CompletionFormat("[RESULT]").join("The reply is polite.", "4")
        'The reply is polite. [RESULT] 4'
    """

    marker: str
    lead: str = " "
    separator: str = " "
    start: str = ""

    def join(self, rationale: str, score_text: str) -> str:
        """Write `rationale` and `score_text` as one completion; an empty rationale leaves the lead out.

        A rationale that a model wrote may begin with whitespace of its own, which is kept; otherwise `start` is put
        before it.
        """
        rationale = rationale.rstrip()
        start = "" if rationale[:1].isspace() else self.start
        return f"{start}{rationale}{self.lead if rationale else ''}{self.marker}{self.separator}{score_text}"

    def to_dict(self) -> dict[str, str]:
        """The fields, as saved in `tract_config.json`."""
        return asdict(self)


def span_at(completion: str, marker_start: int, marker: str, score_texts: Sequence[str]) -> ScoreSpan:
    """The score behind the marker that begins at `marker_start`."""
    after = completion[marker_start + len(marker) :]
    separator = after[: len(after) - len(after.lstrip())]
    tail = after.lstrip()
    if not tail:
        raise ScoreNotFoundError("no score", f"nothing follows the marker {marker!r}")
    text = _leading_score(tail, score_texts)
    if text is None:
        shown = tail if len(tail) <= 40 else tail[:40] + "…"
        raise ScoreNotFoundError(
            "two scores" if _offers_two(tail, score_texts) else "not on the grid",
            f"{shown!r} follows the marker; the admissible scores are {some_scores(score_texts)}"
            f"{_what_to_write(tail, score_texts)}",
        )
    start = marker_start + len(marker) + len(separator)
    rationale = completion[:marker_start]
    return ScoreSpan(
        start=start,
        end=start + len(text),
        text=text,
        marker_start=marker_start,
        lead=rationale[len(rationale.rstrip()) :],
        separator=separator,
    )


def score_begins(after: str, score_texts: Sequence[str], *, whole: bool = False) -> bool | None:
    """Whether text behind a marker begins with a score, as far as it can be told while it is written.

    Here a judge's writing ends, whatever would have followed.

    Args:
        after: The text.
        score_texts: The admissible scores as they are written.
        whole: Nothing will be added.

    Returns:
        None where that is still open.

    Example:
        >>> [score_begins(after, ["1", "2"]) for after in (" 2 of 3", " and", " ")]
        [True, False, None]
    """
    after = after.lstrip()
    ends = [after[len(text) :] for text in score_texts if after.startswith(text)]
    # Of a word the end has to be seen: "A" is not "And". "10" may go on, since it is no word that was meant.
    if any(end[:1] and not end[0].isalpha() for end in ends) or (ends and after[0].isdigit()):
        return True
    is_open = "" in ends or any(text.startswith(after.rstrip()) for text in score_texts)
    return (True if whole else None) if is_open else False


def _leading_score(tail: str, score_texts: Sequence[str]) -> str | None:
    """The admissible score that `tail` begins with, or None; the longest where one is a prefix of another."""
    if _offers_two(tail, score_texts):
        return None
    for text in sorted(score_texts, key=len, reverse=True):
        goes_on = _SCORE_GOES_ON if _NUMBER.fullmatch(text) else _WORD_GOES_ON
        if tail.startswith(text) and not goes_on.match(tail, len(text)):
            return text
    return None


def _offers_two(tail: str, score_texts: Sequence[str]) -> bool:
    """Whether a second score is offered beside the first: "good or poor"."""
    return bool(_two(tuple(score_texts)).match(tail))


@functools.cache
def _two(score_texts: tuple[str, ...]) -> re.Pattern[str]:
    either = "|".join(map(re.escape, score_texts))
    return re.compile(rf"(?!\d+/)(?:{either}){_OR}(?:{either})(?!\w)", re.IGNORECASE)


def _what_to_write(tail: str, score_texts: Sequence[str]) -> str:
    """What to do about a number that is no score of the grid but lies within it; empty about anything else."""
    number = _NUMBER.match(tail)
    if number is None or _SCORE_GOES_ON.match(tail, number.end()):
        return ""
    values = {float(text): text for text in score_texts if _NUMBER.fullmatch(text)}
    value = float(number[0])
    if value in values:
        return (
            f". The grid writes {values[value]!r}. Write it this way in the rows, or set `score_texts` to the texts "
            "in the rows"
        )
    if values and min(values) < value < max(values):
        return (
            f". Write the nearest of them in the completion, and give {number[0]} as the gold score in a column. Gold "
            "scores may lie between grid scores"
        )
    return ""


def is_number(text: str) -> bool:
    """Whether a score is written in digits."""
    return _NUMBER.fullmatch(text) is not None


def holds_score(text: str, score_texts: Sequence[str]) -> bool:
    """Whether an admissible score stands anywhere in `text`, by itself."""
    numbers = set(_NUMBER.findall(text))
    return any(
        score in numbers if _NUMBER.fullmatch(score) else re.search(rf"(?<!\w){re.escape(score)}(?!\w)", text)
        for score in score_texts
    )


def some_scores(score_texts: Sequence[str]) -> str:
    """The scores for a message; the middle of a long grid is left out.

    Example:
        >>> some_scores(["1", "2", "3"]), some_scores([str(number) for number in range(101)])
        ('1, 2, 3', '0, 1, 2, 3, 4, ..., 100')
    """
    shown = list(score_texts) if len(score_texts) <= 12 else [*score_texts[:5], "...", score_texts[-1]]
    return ", ".join(shown)


def score_text(value: float) -> str:
    """How a score is written: `5.0` as `5`, `2.5` as `2.5`.

    Example:
        >>> score_text(5.0), score_text(2.5)
        ('5', '2.5')
    """
    return str(int(value)) if float(value).is_integer() else repr(float(value))
