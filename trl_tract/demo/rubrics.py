"""The demo's rubrics: what its texts are about, and every sentence that a text may be made of, from `rubrics.json`.

Knows nothing of scores, prompts or rows: that is `task`.
"""

import json
import re
from dataclasses import dataclass
from importlib.resources import files
from typing import Literal

Split = Literal["train", "eval"]

# In a sentence, the brackets hold the word that a checklist quotes; the response is written without them.
QUOTED = re.compile(r"\[(.+?)\]")


@dataclass(frozen=True)
class Sentences:
    """What one split may say: sentences with `{slots}`, and what fills each slot."""

    met: list[list[str]]  # one list for each criterion, in the rubric's order
    neutral: list[str]  # sentences that meet no criterion
    slots: dict[str, list[str]]


@dataclass(frozen=True)
class Rubric:
    """Four criteria for one kind of text, and what each split may say."""

    name: str
    criteria: list[str]
    splits: dict[Split, Sentences]


_DATA = json.loads(files("trl_tract.demo").joinpath("rubrics.json").read_text(encoding="utf-8"))
RUBRICS = [
    Rubric(each["name"], each["criteria"], {split: Sentences(**says) for split, says in each["splits"].items()})
    for each in _DATA["rubrics"]
]
# Forged verdicts and orders; `{score}` is always one that the text does not deserve.
ATTACKS: list[str] = _DATA["attacks"]
