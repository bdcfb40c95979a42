"""What rationales decide: how much a score varies between them, and how right the stage-one model's own ones are.

Knows where judgements and rationales lie, nothing of models or training.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from trl_tract.distill.choosing import default_tolerance
from trl_tract.evaluation.intervals import bootstrap, interval
from trl_tract.evaluation.metrics import pearson
from trl_tract.evaluation.pairs import Floats, Ints
from trl_tract.files.journal import read_jsonl
from trl_tract.runs.judged import JudgedScale

COUNTS = (1, 3, 5)
N_BOOTSTRAP = 2000


def squared_errors(scores: Floats, gold: float, count: int) -> float:
    """The squared error of the mean of `count` of an item's scores, averaged over all choices of so many.

    The mean of `count` drawn from n without replacement has variance s^2 / count * (1 - count / n) around the mean of
    all, s^2 with n - 1 below the line.

    Example:
        >>> squared_errors(np.array([1.0, 3.0]), 1.0, 1), squared_errors(np.array([1.0, 3.0]), 1.0, 2)
        (2.0, 1.0)
    """
    n = len(scores)
    spread = float(scores.var(ddof=1)) if n > 1 else 0.0
    return float((scores.mean() - gold) ** 2 + spread / count * (1 - count / n))


def several(judged: Sequence[JudgedScale], samples: int, codes: Ints) -> dict[str, Any]:
    """What several rationales an item buy, from one judging with all of them, over the seeds.

    Args:
        judged: One judge's judgements of the same items, by seed.
        samples: Rationales of each item.
        codes: Each item's question, `(n,)`.

    Returns:
        `items` of which every rationale has a score, `left_out`, how many do not; the `variance` of the score between
        rationales of an item, mean and median, squared rubric units; `rmse` by count, and `rmse_minus_one` of all
        against one, each `by_question` and `by_item`.
    """
    records = [list(each.records) for each in judged]
    gold = judged[0].reference[judged[0].items]
    whole = np.array([all(len(each[item]["scores"]) == samples for each in records) for item in range(len(gold))])
    items = np.flatnonzero(whole)
    scores = np.array([[each[item]["scores"] for item in items] for each in records])  # (seeds, n, samples)
    counts = [count for count in COUNTS if count <= samples]
    errors = {
        count: np.array(
            [[squared_errors(row, gold[item], count) for row, item in zip(each, items, strict=True)] for each in scores]
        )
        for count in counts
    }
    variance = scores.var(axis=2, ddof=1).mean(axis=0)
    units = {"by_question": np.unique(codes[items], return_inverse=True)[1], "by_item": np.arange(len(items))}

    def rmse(weights: Floats) -> dict[str, Floats]:
        means = {
            count: np.sqrt(weights @ error.T / weights.sum(axis=1, keepdims=True)).mean(axis=1)
            for count, error in errors.items()
        }
        last = means[counts[-1]]
        return {**{str(count): mean for count, mean in means.items()}, "difference": last - means[counts[0]]}

    found: dict[str, Any] = {"items": len(items), "left_out": int((~whole).sum()), "samples": samples, "rmse": {}}
    found["variance"] = {"mean": float(variance.mean()), "median": float(np.median(variance))}
    at_once = rmse(np.ones((1, len(items))))
    for name in at_once:
        shown = {}
        for unit, own in units.items():
            resampled = bootstrap(rmse, len(items), own, N_BOOTSTRAP, 0)[name]
            kind = "difference" if name == "difference" else "error"
            shown[unit] = interval(float(at_once[name][0]), resampled, int(own.max()) + 1, kind).to_dict()
        if name == "difference":
            found["rmse_minus_one"] = shown
        else:
            found["rmse"][name] = shown
    return found


def own_rationales(file: Path, values: Sequence[float]) -> dict[str, Any]:
    """How right the stage-one model's own rationales of training rows are: their expected score against the gold score.

    Args:
        file: `rows.jsonl` of a bootstrap by that model, with `rationale_score`, the nearest of a prompt first.
        values: The score grid, rubric units.

    Returns:
        `prompts` and `rationales`; `rmse` and `pearson` of all, `rmse_mean` of the mean gold score, `rmse_nearest` of
        the nearest of each prompt; `within`, the share no further than `tolerance` from the gold score; and `by_gold`:
        gold score (of the grid, the nearest) -> `rationales`, mean `score`, `within`.
    """
    prompts: dict[str, list[tuple[float, float]]] = {}
    for row in read_jsonl(file):
        if row.get("rationale_score") is not None:
            prompts.setdefault(str(row["prompt"]), []).append((float(row["rationale_score"]), float(row["score"])))
    if not prompts:
        return {"prompts": 0, "rationales": 0}
    scores, gold = np.array([pair for pairs in prompts.values() for pair in pairs]).T
    nearest, once = np.array([pairs[0] for pairs in prompts.values()]).T
    tolerance = default_tolerance(list(values))
    right = np.abs(scores - gold) <= tolerance
    levels = np.array(values)[np.abs(gold[:, None] - np.array(values)).argmin(axis=1)]
    correlation = pearson(scores, gold)
    return {
        "prompts": len(prompts),
        "rationales": len(scores),
        "rmse": _rms(scores - gold),
        "pearson": None if np.isnan(correlation) else float(correlation),
        "rmse_mean": _rms(gold - once.mean()),
        "rmse_nearest": _rms(nearest - once),
        "tolerance": tolerance,
        "within": float(right.mean()),
        "by_gold": {
            f"{level:g}": {
                "rationales": int((levels == level).sum()),
                "score": float(scores[levels == level].mean()),
                "within": float(right[levels == level].mean()),
            }
            for level in np.unique(levels)
        },
    }


def _rms(errors: Floats) -> float:
    return float(np.sqrt(np.mean(errors**2)))
