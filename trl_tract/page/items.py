"""The items of a page: read once for figures, pictures and the table of all; the worst of them in full.

Texts are cut and made visible here, and escaped by the template. Knows nothing of HTML or files.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from trl_tract.evaluation.pairs import Floats
from trl_tract.page.charts import JudgedScores
from trl_tract.text.display import common_prefix, excerpt, prompt_text, short

RATIONALE_CHARACTERS = 1500
"""Characters of a rationale that are shown; the page says how long the whole is."""
PROMPT_CHARACTERS = 6000
"""Characters of a prompt that are shown."""
COLUMNS = ("Item", "Group", "Gold", "Predicted", "Error", "Grid mass", "Rationale, or why there is no score")

_SAMPLES = 5
_EXCERPT, _LEAST_EXCERPT, _ALL_EXCERPTS = 160, 40, 2_000_000  # characters: of one, of the least one, of all of them
_NAME = 80


@dataclass(frozen=True)
class ReadItems:
    """What one pass over the records gives. n items.

    Attributes:
        scores: The items with a score, as arrays.
        errors: Absolute error of each item, rubric units, `(n,)`; -1 without a score.
        failures: Why items have no score, and how many for each reason.
        table: For each item what `COLUMNS` name; None where there is nothing.
    """

    scores: JudgedScores
    errors: Floats
    failures: Counter[str]
    table: list[list[Any]]

    def worst(self, count: int) -> list[int]:
        """Items with the largest errors, largest first; equal ones in their order."""
        order = np.argsort(-self.errors, kind="stable")[:count]
        return [int(index) for index in order if self.errors[index] >= 0]


def read_items(records: Sequence[Mapping[str, Any]], grid: tuple[float, ...] | None) -> ReadItems:
    """Read the records of `JudgedItems`, each of them once."""
    failures: Counter[str] = Counter()
    table, errors, probs = [], [], []
    budget = _ALL_EXCERPTS // max(len(records), 1)
    limit = 0 if budget < _LEAST_EXCERPT else min(budget, _EXCERPT)
    for number, record in enumerate(records):
        score = record["score"] if _is_number(record.get("score")) else None
        if record.get("error"):
            failures[str(record["error"])] += 1
        if score is not None:
            probs.append(_mean_probs(record["probs"]) if record.get("probs") else None)
        errors.append(-1.0 if score is None else abs(score - record["reference"]))
        text = next((text for text in record.get("rationales") or () if text), record.get("error") or "")
        table.append(
            [
                short(str(record.get("id", number)), _NAME),
                None if record.get("group") is None else short(str(record["group"]), _NAME),
                record["reference"],
                score,
                None if score is None else score - record["reference"],
                record["grid_mass"] if _is_number(record.get("grid_mass")) else None,
                short(" ".join(str(text)[: 4 * limit].split()), limit) if limit else "",
            ]
        )
    columns = np.array([row[2:6] for row in table], dtype=np.float64).reshape(-1, 4)
    scored = columns[np.isfinite(columns[:, 1])]
    widths = {None if each is None else len(each) for each in probs}
    known = bool(probs) and None not in widths and len(widths) == 1 and (grid is None or widths == {len(grid)})
    return ReadItems(
        JudgedScores(
            predicted=scored[:, 1],
            gold=scored[:, 0],
            grid_mass=scored[:, 3],
            probs=np.array(probs) if known else None,
            grid=grid,
        ),
        np.array(errors),
        failures,
        [[_rounded(cell) for cell in row] for row in table],
    )


def shown_items(
    records: Sequence[Mapping[str, Any]],
    prompts: Sequence[Any] | None,
    grid: Sequence[float] | None,
    numbers: Sequence[int],
) -> list[dict[str, Any]]:
    """The items of these numbers, as the template shows them in full."""
    texts = [None] * len(numbers) if prompts is None else [prompt_text(prompts[number]) for number in numbers]
    given = [text for text in texts if text is not None]
    common = common_prefix(given) if len(set(given)) > 1 else 0
    return [_item(records[number], number, text, grid, common) for number, text in zip(numbers, texts, strict=True)]


def _item(
    record: Mapping[str, Any], number: int, prompt: str | None, grid: Sequence[float] | None, common: int
) -> dict[str, Any]:
    facts = [("Item", str(record.get("id", number)))]
    if record.get("group") is not None:
        facts.append(("Group", str(record["group"])))
    for label, name in (("Spread", "std"), ("Grid mass", "grid_mass")):
        if _is_number(record.get(name)):
            facts.append((label, f"{record[name]:.3f}"))
    scores = [score for score in record.get("scores") or [] if _is_number(score)]
    if len(scores) > 1:
        facts.append(("Scores", ", ".join(f"{score:.2f}" for score in scores[:20])))
    rationales = list(record.get("rationales") or [])
    return {
        "score": record["score"],
        "gold": record["reference"],
        "facts": [(label, short(text, 120)) for label, text in facts],
        "bars": _bars(record.get("probs"), grid, record["reference"]),
        "rationale_count": len(rationales),
        "rationales": [
            {
                "text": excerpt(str(text), RATIONALE_CHARACTERS),
                "score": f"{scores[place]:.2f}" if place < len(scores) else "",
            }
            for place, text in enumerate(rationales[:_SAMPLES])
            if text
        ],
        "prompt": None if prompt is None else excerpt(prompt, PROMPT_CHARACTERS),
        "prompt_start": None if prompt is None else _beginning(prompt, common),
    }


def _beginning(text: str, common: int) -> str:
    """The first words that set a prompt apart: those behind the instructions that all prompts begin with."""
    start = text.rfind("\n", 0, common) + 1
    words = " ".join(text[start : start + 1000].split())
    shown = excerpt(words, 140)
    return f"{'… ' if start else ''}{shown.text}{'…' if shown.is_cut or start + 1000 < len(text) else ''}"


def _bars(probs: Any, grid: Sequence[float] | None, gold: float) -> dict[str, Any] | None:
    """Places of the bars of one item's score distribution, the tallest of them 55 units high."""
    if not probs:
        return None
    mean = _mean_probs(probs)
    values = grid if grid is not None and len(grid) == len(mean) else None
    width, height = 300.0, 55.0
    step = width / len(mean)
    tallest = float(mean.max()) or 1.0
    every = max(1, -(-len(mean) // 11))
    bars = []
    for place, probability in enumerate(mean):
        tall = height * float(probability) / tallest
        bars.append(
            {
                "x": round((place + 0.15) * step, 2),
                "y": round(84 - tall, 2),
                "width": round(0.7 * step, 2),
                "height": round(tall, 2),
                "middle": round((place + 0.5) * step, 2),
                "label": f"{values[place]:g}" if values is not None and place % every == 0 else "",
                "share": f"{probability:.2f}" if every == 1 and probability >= 0.005 else "",
            }
        )
    names = [f"{value:g}" for value in values] if values is not None else [f"no. {i + 1}" for i in range(len(mean))]
    stated = ", ".join(f"{name}: {probability:.2f}" for name, probability in zip(names, mean, strict=True))
    place_of_gold = None
    if values is not None and values[0] <= gold <= values[-1]:
        place_of_gold = round((float(np.interp(gold, values, np.arange(len(values)))) + 0.5) * step, 2)
    return {
        "width": width,
        "bars": bars,
        "gold": place_of_gold,
        "description": f"Score distribution. {stated}. Gold score {gold:.3g}.",
    }


def _mean_probs(samples: Any) -> np.ndarray[Any, np.dtype[np.float64]]:
    return np.asarray(samples, dtype=np.float64).mean(axis=0)  # type: ignore[no-any-return]


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and bool(np.isfinite(value))


def _rounded(cell: Any) -> Any:
    return round(float(cell), 4) if _is_number(cell) else cell
