"""What is wrong with a self-written rationale: one name for each way to fail. Characters only: knows no models.

A rationale that a model wrote is training data for the next one, so what a reader would throw away is sampled again.
"""

import functools
import re
from typing import Literal, get_args

import numpy as np

Failure = Literal["no marker", "length", "prompt too long", "prompt refused", "empty", "repetition", "leak", "thinking"]
FAILURES: tuple[Failure, ...] = get_args(Failure)
BOOTSTRAP_FAILURES = (*FAILURES, "off score")
"""Those of a bootstrap too, where a rationale has to come to the gold score."""

_LOOP_REPEATS = 8
_LOOP_CHARACTERS = 160
_LONGEST_UNIT = 200


def rationale_failure(text: str, finish_reason: str, stated: re.Pattern[str] | None = None) -> Failure | None:
    """Why a rationale cannot be trained on, or None.

    Args:
        text: What was written before the marker.
        finish_reason: Of its `Generation`.
        stated: Finds a score that is written out in the rationale (see `stated_score`); None: not looked for.

    Returns:
        `prompt too long` (nothing could be written), `repetition` (it ends in a loop, whether or not it came out of
        it), `length` (cut at max_new_tokens), `no marker` (the model ended its turn without a score), `empty`, or
        `leak` (the score stands in the rationale already; with several aspects also another one's, behind its marker,
        which `CoTSelfDistill` looks for).

    Example:
        >>> rationale_failure("It is polite.", "stop"), rationale_failure("It is", "length")
        (None, 'length')
    """
    if finish_reason == "prompt_too_long":
        return "prompt too long"
    if loops(text):
        return "repetition"
    if finish_reason != "stop":
        return "length" if finish_reason == "length" else "no marker"
    if not text.strip():
        return "empty"
    if stated is not None and stated.search(text):
        return "leak"
    return None


def loops(text: str) -> bool:
    """Whether a text has a stretch that repeats itself: eight times or more, over 160 characters or more.

    The repeated unit may have up to 200 characters, so a sentence written again and again counts, and a dashed line or
    a table of likes does not.

    Example:
        >>> loops("It is polite. " * 20), loops("It is polite. " * 3)
        (True, False)
    """
    codes = np.frombuffer(text.encode("utf-32-le", errors="surrogatepass"), dtype=np.uint32)
    for period in range(1, min(_LONGEST_UNIT, len(codes) // _LOOP_REPEATS) + 1):
        needed = max((_LOOP_REPEATS - 1) * period, _LOOP_CHARACTERS - period)
        differs = np.flatnonzero(codes[period:] != codes[:-period])
        # The longest run of characters that equal the one a period earlier.
        ends = np.concatenate(([-1], differs, [len(codes) - period]))
        if np.diff(ends).max() - 1 >= needed:
            return True
    return False


@functools.cache
def stated_score(texts: tuple[str, ...]) -> re.Pattern[str]:
    """A pattern that finds one of the scores `texts` written out as a score: `a score of 4`, `rating: 4`, `4/5`.

    Example:
        >>> bool(stated_score(("1", "2")).search("so the score is 2.")), bool(stated_score(("1", "2")).search("2 of 3"))
        (True, False)
    """
    score = "|".join(re.escape(text) for text in sorted(texts, key=len, reverse=True))
    highest = re.escape(texts[-1])
    word = r"(?:score|rating|grade|mark)s?"
    between = r"(?:\s+(?:a|an|as|at|be|is|of|the|this|to|would|should)){0,4}"
    ends = r"(?![\w]|[.,]\d)"
    return re.compile(
        rf"\b{word}{between}\s*[:=]?\s*[\"'(\[*]*(?:{score}){ends}|(?<![\w.])(?:{score})\s*(?:/|out\s+of)\s*{highest}{ends}",
        re.IGNORECASE,
    )


_SENTENCE_END = re.compile(r"[.!?][\"'”’)\]]*(?=\s|$)|[。！？।۔؟…]|\n")


_OPENED = re.compile(r"(?:(?<=\s)|^)[*_`#>]+\s*$")


def before_markup(text: str) -> str:
    """A rationale without the markup that its author opened for the marker behind it.

    Example:
        >>> before_markup("It is **polite**. **"), before_markup("It is **polite**")
        ('It is **polite**.', 'It is **polite**')
    """
    return _OPENED.sub("", text).rstrip()


def whole_sentences(text: str) -> str:
    """A text that was cut somewhere, up to the end of its last whole sentence; of its last word where it has none.

    Example:
        >>> whole_sentences("It is polite. It has 2.5 times as many wo")
        'It is polite.'
    """
    ends = [found.end() for found in _SENTENCE_END.finditer(text)]
    # Not all languages mark where a sentence ends.
    return text[: ends[-1]].rstrip() if ends else (text.rstrip().rpartition(" ")[0] or text)


def before_score(text: str, texts: tuple[str, ...]) -> str:
    """A text up to the sentence that writes one of the scores `texts` out; whole where none does, or it is the first.

    Example:
        >>> before_score("It is polite. So I give a score of 4. Good.", ("1", "2", "3", "4", "5"))
        'It is polite.'
    """
    found = stated_score(texts).search(text)
    ends = [] if found is None else [end.end() for end in _SENTENCE_END.finditer(text, 0, found.start())]
    before = text[: ends[-1]].rstrip() if ends else ""
    return before if before.strip() else text
