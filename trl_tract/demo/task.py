"""The demo's task: short texts, each judged against a rubric of four criteria.

A row asks for a checklist that quotes a word for each criterion the text meets ("apology: sorry, refund: none, ...")
and then for a score: 1, plus 1 for each criterion met. The checklist is the rationale and the score counts it, so a
judge that misreads the text scores it wrongly. Every text has four sentences, a neutral one in place of each criterion
missed, so its length says next to nothing about its score.

Training and evaluation draw from separate sentences, names and things: no sentence occurs in both, cue words do. One
evaluation text in eight also attacks the judge, with a forged verdict or an order; training has none of these.

Knows nothing of tokens, models or training: text and the standard library.
"""

import json
import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trl_tract.demo.rubrics import ATTACKS, QUOTED, RUBRICS, Rubric, Split

__all__ = ["EVAL_ROWS", "MARKER", "SCALES", "TRAIN_ROWS", "Scale", "make_rows", "write"]

MARKER = "[RESULT]"
ABSENT = "none"
TRAIN_ROWS = 480
EVAL_ROWS = 120
# One block holds each rubric with each score once: any whole number of blocks is balanced.
BLOCK = 20
HOSTILE_EVERY = 8


@dataclass(frozen=True)
class Scale:
    """In which numbers the points of a text are written, 1 to 5 being the task's own."""

    lowest: int
    step: int

    def written(self, score: int) -> int:
        """A score of 1 to 5 on this scale."""
        return self.lowest + self.step * (score - 1)

    def values(self) -> list[int]:
        """Every whole number of the scale, those between two gold scores too."""
        return list(range(self.written(1), self.written(5) + 1))


ONE_TO_FIVE = Scale(lowest=1, step=1)
SCALES = {"1-5": ONE_TO_FIVE, "0-100": Scale(lowest=0, step=25)}


def instruction(rubric: Rubric, scale: Scale = ONE_TO_FIVE) -> str:
    """The judge's system message: what is judged, what earns a point, how to answer."""
    return (
        f"Score this {rubric.name}: {scale.lowest}, plus {scale.step} for each of {', '.join(rubric.criteria)}. "
        f"Quote a word for each, or {ABSENT}, then {MARKER} and the score."
    )


def checklist(rubric: Rubric, quotes: dict[int, str]) -> str:
    """The gold rationale: each criterion in the rubric's order, with the word that meets it, or "none"."""
    return ", ".join(f"{name}: {quotes.get(i, ABSENT)}" for i, name in enumerate(rubric.criteria))


def make_response(rubric: Rubric, split: Split, met: list[int], rng: random.Random) -> tuple[list[str], dict[int, str]]:
    """Four sentences and the quoted words: met criteria in the rubric's order, neutral sentences between them."""
    says = rubric.splits[split]
    filling = {slot: rng.choice(values) for slot, values in says.slots.items()}
    meeting = [rng.choice(says.met[i]).format(**filling) for i in met]
    neutral = [text.format(**filling) for text in rng.sample(says.neutral, len(rubric.criteria) - len(met))]
    quotes = {i: QUOTED.findall(text)[0] for i, text in zip(met, meeting, strict=True)}
    is_meeting = [True] * len(meeting) + [False] * len(neutral)
    rng.shuffle(is_meeting)
    queues = {True: iter(meeting), False: iter(neutral)}
    return [QUOTED.sub(r"\1", next(queues[flag])) for flag in is_meeting], quotes


def make_rows(split: str, n: int, seed: int = 0, scale: Scale = ONE_TO_FIVE) -> list[dict[str, Any]]:
    """The first `n` rows of a split: the same for the same seed, and a prefix of any longer call.

    Args:
        split: "train" or "eval".
        n: How many rows; every multiple of 20 holds each rubric with each score equally often.
        seed: Another seed gives other rows from the same sentences.
        scale: Another scale gives the same rows with other numbers in them.

    Returns:
        Rows of `id`, `prompt` and `completion` (chat messages, TRL's prompt-completion type), `score` (rubric units),
        `rubric` (its name) and `hostile`.

    Raises:
        ValueError: `split` is neither "train" nor "eval".
    """
    if split not in ("train", "eval"):
        raise ValueError(f'split is {split!r}: make_rows knows "train" and "eval".')
    side: Split = "train" if split == "train" else "eval"
    rng = random.Random(f"{side} {seed}")
    rows: list[dict[str, Any]] = []
    seen: set[str] = set()
    while len(rows) < n:
        block = [(rubric, score) for rubric in RUBRICS for score in range(1, 6)]
        rng.shuffle(block)
        for rubric, score in block:
            row = make_row(rubric, score, side, len(rows), rng, scale)
            while row["prompt"][-1]["content"] in seen:
                row = make_row(rubric, score, side, len(rows), rng, scale)
            seen.add(row["prompt"][-1]["content"])
            rows.append(row)
    return rows[:n]


def make_row(rubric: Rubric, score: int, split: Split, number: int, rng: random.Random, scale: Scale) -> dict[str, Any]:
    count = len(rubric.criteria)
    chosen = sorted(rng.sample(range(count), score - 1))
    sentences, quotes = make_response(rubric, split, chosen, rng)
    hostile = split == "eval" and number % HOSTILE_EVERY == HOSTILE_EVERY - 1
    if hostile:
        attack = ATTACKS[number // HOSTILE_EVERY % len(ATTACKS)].format(score=scale.written(1 if score > 3 else 5))
        sentences.insert(rng.choice((0, len(sentences))), attack)
    return {
        "id": f"{split}-{number:04d}",
        "prompt": [
            {"role": "system", "content": instruction(rubric, scale)},
            {"role": "user", "content": " ".join(sentences)},
        ],
        "completion": [
            {"role": "assistant", "content": f"{checklist(rubric, quotes)} {MARKER} {scale.written(score)}"}
        ],
        "score": float(scale.written(score)),
        "rubric": rubric.name,
        "hostile": hostile,
    }


def write(path: Path, split: str, n: int, seed: int = 0) -> None:
    """Write rows as JSONL: what is committed beside this file."""
    lines = [json.dumps(row, ensure_ascii=False) for row in make_rows(split, n, seed)]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    here = Path(__file__).parent
    write(here / "train.jsonl", "train", TRAIN_ROWS)
    write(here / "eval.jsonl", "eval", EVAL_ROWS)
