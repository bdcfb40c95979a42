"""Whether a rationale that was written for a shown score gives that score away. Characters only: knows no models."""

import functools
import re
from collections.abc import Sequence

_WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")

# Somebody was told a score, or speaks of the people who gave it; "the given data" is none of it.
_SCORE = r"(?:scores?|ratings?|grades?)"
_PEOPLE = r"(?:annotators?|raters?|graders?|human (?:judges?|experts?|reviewers?)|(?:experts?|people) (?:who )?gave)"
_TOLD = re.compile(
    rf"\b(?:given|assigned|shown|stated|provided|human|gold|reference|official|correct|right|target) {_SCORE}\b"
    rf"|\b{_SCORE}\b[^.!?\n]{{0,30}}\b(?:given|assigned|awarded|shown|provided|received)\b"
    rf"|\b(?:this|that|the|such an?|its) (?:\w+ )?(?:score|rating|grade)\b"
    rf"|\b{_PEOPLE}\b"
    r"|\b(?:I|we) (?:was|were|am|have been|had been) (?:told|given|shown|informed|asked)\b"
    r"|\bas (?:you )?(?:told|instructed|requested)\b",
    re.IGNORECASE,
)


def gives_away(text: str, score: str, texts: Sequence[str]) -> bool:
    """Whether a rationale names the score that was shown, or says that its author was told one.

    Example:
        >>> grid = ("1", "2", "3", "4", "5")
        >>> gives_away("It is polite, but the date is missing.", "4", grid)
        False
        >>> [gives_away(text, "4", grid) for text in ("It earns a 4.", "four out of five", "The given score fits.")]
        [True, True, True]
    """
    return bool(_TOLD.search(text) or _named(score, tuple(texts)).search(text))


@functools.lru_cache(maxsize=256)
def _named(score: str, texts: tuple[str, ...]) -> re.Pattern[str]:
    """A pattern that finds a score named: a number anywhere it stands alone, a word as a word, a letter as a grade."""
    if re.fullmatch(r"[-+]?\d+(?:\.\d+)?", score):
        value = float(score)
        number = re.escape(score) + (r"(?:\.0+)?" if value.is_integer() and "." not in score else "0*")
        # Not a part of another number, and not the number of a point in a list.
        forms = [
            rf"(?<![\w.,-])(?<!^)(?<!\n)(?:{number})(?![\w]|[.,]\d)",
            rf"^[ \t]*(?:{number})(?!\s*[.)\]:]|[\w]|,\d)",
        ]
        if value.is_integer() and 0 <= value < len(_WORDS):
            word, top = _WORDS[int(value)], texts[-1]
            tops = [re.escape(top)] + ([_WORDS[int(top)]] if top.isdigit() and int(top) < len(_WORDS) else [])
            forms.append(rf"\b{word}\s*(?:/|out\s+of|of)\s*(?:{'|'.join(tops)})\b")
            forms.append(rf"\b{word}\s+(?:points?|stars?|marks?)\b")
            given = (
                r"scor\w+|rat(?:es?|ed|ing)|grad(?:es?|ed|ing)|marked|deserv\w+|earn\w*|merit\w*|award\w*|give\w*|gets?"
            )
            others = r"of|or|and|more|things?|reasons?|examples?|who|that"
            forms.append(rf"\b(?:{given}|receiv\w+)\s+(?:\w+\s+){{0,3}}{word}\b(?!\s+(?:{others}))")
    elif len(score.strip()) == 1:
        # "A good answer" names no grade.
        letter = re.escape(score.strip())
        given = r"scor\w+|rat\w+|grad\w+|mark\w*|deserv\w+|earn\w*|gets?|receiv\w+|give\w*"
        forms = [
            rf"(?i:{given})[:\s]+(?:(?i:\w+)\s+){{0,3}}[\"'“‘(\[*]*{letter}\b(?!\s+[a-z])",
            rf"[\"'“‘(\[*]{letter}[\"'”’)\]*]|\b(?:an?|the)\s+{letter}\b|\b{letter}[+](?!\w)",
        ]
        return re.compile("|".join(forms), re.MULTILINE)
    else:
        forms = [rf"(?<!\w){re.escape(score.strip())}(?!\w)"]
    return re.compile("|".join(forms), re.IGNORECASE | re.MULTILINE)
