"""The replication's table: agreement of each row over all seeds, its difference from TRACT, what would tell them apart.

Knows where judgements lie, nothing of models or training.
"""

import json
import math
import platform
from collections.abc import Sequence
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rows import TABLE

from trl_tract.evaluation.intervals import KINDS, Interval, Kind, bootstrap, interval
from trl_tract.evaluation.pairs import METRICS, Floats, JudgedPairs
from trl_tract.files.journal import digest, write_json
from trl_tract.runs.judged import Judged, JudgedScale, check_same_items
from trl_tract.scale.decisions import decide

REFERENCE = "tract"
N_BOOTSTRAP = 2000


class SeedScores:
    """One row's scores of one test, for every seed that judged it.

    Args:
        scores: `(seeds, n)`, rubric units, NaN where an item has none.
        gold: `(n,)`, rubric units.
    """

    def __init__(self, scores: Floats, gold: Floats) -> None:
        self.scores, self.gold = scores, gold
        self._given = ~np.isnan(scores)
        self._pairs = [
            JudgedPairs(each[given], gold[given]) if given.sum() > 2 else None
            for each, given in zip(scores, self._given, strict=True)
        ]

    def each_seed(self, counts: Floats) -> dict[str, Floats]:
        """Each metric by seed, `(B, seeds)`, as a function of how often each item counts, `(B, n)`."""
        undefined = dict.fromkeys(METRICS, np.full(len(counts), np.nan))
        found = [
            undefined if pairs is None else pairs(counts[:, given])
            for pairs, given in zip(self._pairs, self._given, strict=True)
        ]
        return {name: np.stack([each[name] for each in found], axis=1) for name in METRICS}

    def __call__(self, counts: Floats) -> dict[str, Floats]:
        """Each metric's mean over the seeds, `(B,)`: NaN where one of them leaves it undefined."""
        return {name: values.mean(axis=1) for name, values in self.each_seed(counts).items()}


def write_table(config: Any, directory: Path) -> dict[str, Any]:
    """Write `table.md` and `table.json` of the seeds that are finished, and return what is in the latter."""
    tests = list(config.tests) or ["held-out"]
    finished = [seed for seed in config.seeds if _is_finished(config, directory / f"seed-{seed}", tests)]
    result: dict[str, Any] = {
        "device": _device(),
        "versions": _versions(),
        "settings": asdict(config),
        "seeds": finished,
        "tests": {},
        "seconds": {
            seed: json.loads((directory / f"seed-{seed}" / "steps.json").read_text(encoding="utf-8"))
            for seed in finished
        },
    }
    tables = []
    for test in tests if finished else []:
        rows, n, questions = tabulate(config, directory, test, finished)
        result["tests"][test] = {"n": n, "questions": questions, "rows": rows}
        heading = f"{test}: {n} items of {questions} questions, seeds {', '.join(map(str, finished))}"
        tables.append(f"{heading}\n\n{_markdown(rows)}")
    result["table"] = "\n\n".join(tables) or "no seed is finished"
    (directory / "table.md").write_text(result["table"] + "\n", encoding="utf-8")
    write_json(directory / "table.json", result)
    return result


def tabulate(config: Any, directory: Path, test: str, seeds: list[int]) -> tuple[list[dict[str, Any]], int, int]:
    """The lines of one test's table, the number of its items and that of their questions."""

    def judgements(key: str, seed: int) -> JudgedScale:
        return Judged(directory / f"seed-{seed}" / f"judged-{TABLE[key].model}-{test}").scales[""]

    first = judgements(config.rows[0], seeds[0])
    gold, groups = first.reference, first.groups
    codes = np.unique(groups, return_inverse=True)[1]
    found: dict[str, tuple[SeedScores, list[float | None], int]] = {}
    for key in config.rows:
        judged = {seed: judgements(key, seed) for seed in seeds}
        for seed, each in judged.items():
            check_same_items(first, each, (f"{config.rows[0]}, seed {seeds[0]}", f"{key}, seed {seed}"))
        decision = TABLE[key].decision
        scores = np.array([decided(each.records, config.grid.values, decision, seed) for seed, each in judged.items()])
        masses = [each.mean_grid_mass for each in judged.values()]
        found[key] = SeedScores(scores, gold), masses, int(np.isnan(scores).sum())
    n_units = int(codes.max()) + 1
    lines = []
    for key, (scores, masses, failed) in found.items():
        line: dict[str, Any] = {"row": key, "label": TABLE[key].label, "failed": failed, "paper": TABLE[key].pearson}
        line["grid_mass"] = _mean([mass for mass in masses if mass is not None])
        for name in ("pearson", "spearman", "rmse"):
            line[name] = _interval(scores, name, codes, n_units, KINDS[name]).to_dict()
        line["pearson_by_seed"] = [
            _none_if_nan(value) for value in scores.each_seed(np.ones((1, len(gold))))["pearson"][0]
        ]
        if key != REFERENCE and REFERENCE in found:
            other = found[REFERENCE][0]

            def difference(counts: Floats, mine: SeedScores = scores, other: SeedScores = other) -> dict[str, Floats]:
                theirs = other(counts)
                return {name: theirs[name] - values for name, values in mine(counts).items()}

            gap = _interval(difference, "pearson", codes, n_units, "difference")
            line["tract_minus_row"] = gap.to_dict()
            line["questions_needed"] = questions_needed(gap, n_units)
        lines.append(line)
    return lines, len(gold), n_units


def decided(records: Sequence[dict[str, Any]], values: tuple[float, ...], decision: str, seed: int) -> Floats:
    """Each item's score from the probabilities that its judgement keeps, `(n,)`; NaN where there are none."""
    scores = np.full(len(records), np.nan)
    grid = torch.tensor(values, dtype=torch.float64)
    for number, record in enumerate(records):
        if record["error"] is None:
            generator = torch.Generator().manual_seed(int(digest([seed, "decision", number])[:8], 16))
            probs = torch.tensor(record["probs"], dtype=torch.float64)
            scores[number] = decide(probs, grid, decision, generator=generator).mean()  # type: ignore[arg-type]
    return scores


def questions_needed(gap: Interval, questions: int) -> int | None:
    """About how many questions would put 0 outside the interval of a difference of this size.

    A half-width shrinks with the square root of the number of questions. None where the difference is 0 or has no
    interval.
    """
    half = (gap.high - gap.low) / 2
    if math.isnan(half) or gap.value == 0:
        return None
    return math.ceil(questions * (half / abs(gap.value)) ** 2)


def _interval(statistics: Any, name: str, codes: Any, n_units: int, kind: Kind) -> Interval:
    value = statistics(np.ones((1, len(codes))))[name][0]
    resampled = bootstrap(statistics, len(codes), codes, N_BOOTSTRAP, 0)
    return interval(float(value), resampled[name], n_units, kind)


def _is_finished(config: Any, directory: Path, tests: list[str]) -> bool:
    models = {TABLE[row].model for row in config.rows}
    return all((directory / f"judged-{m}-{test}" / "judgements.jsonl").is_file() for m in models for test in tests)


def _markdown(rows: list[dict[str, Any]]) -> str:
    head = ["row", "r [95 %]", "r by seed", "TRACT - row [95 %]", "questions needed", "rho", "RMSE [95 %]", "grid mass"]
    head += ["failed", "r in the paper"]
    lines = [head, [":--", *["--:"] * (len(head) - 1)]]
    for row in rows:
        gap, needed = row.get("tract_minus_row"), row.get("questions_needed")
        lines.append(
            [
                row["label"],
                _shown(row["pearson"]),
                " ".join("-" if value is None else f"{value:.2f}" for value in row["pearson_by_seed"]),
                "" if gap is None else _shown(gap),
                "" if gap is None else "-" if needed is None else f"{needed:,}",
                _shown(row["spearman"]).split(" [")[0],
                _shown(row["rmse"]),
                "-" if row["grid_mass"] is None else f"{row['grid_mass']:.3f}",
                str(row["failed"]),
                row["paper"],
            ]
        )
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _shown(numbers: dict[str, float | None]) -> str:
    return str(Interval(**{name: math.nan if number is None else number for name, number in numbers.items()}))


def _mean(values: list[float]) -> float | None:
    return float(np.mean(values)) if values else None


def _none_if_nan(value: float) -> float | None:
    return None if math.isnan(value) else float(value)


def _device() -> str:
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    return f"{platform.processor() or platform.machine()} CPU, {torch.get_num_threads()} thread(s)"


def _versions() -> dict[str, str | None]:
    found: dict[str, str | None] = {}
    for name in ("torch", "transformers", "trl", "peft", "trl-tract"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = None
    return found
