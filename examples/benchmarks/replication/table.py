"""The replication's tables: agreement of each row over all seeds, and its difference from TRACT and from the mean.

Knows where judgements lie, nothing of models or training. Everything in Markdown is made from the JSON.
"""

import math
import platform
from collections.abc import Sequence
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from choosing import FILE as CHOICE
from items import HELD_OUT
from rationales import own_rationales, several
from rows import RIVALS, TABLE

from trl_tract.evaluation.intervals import KINDS, Interval, Kind, bootstrap, interval
from trl_tract.evaluation.metrics import pearson
from trl_tract.evaluation.pairs import METRICS, Floats, JudgedPairs
from trl_tract.files.journal import digest, read_json, write_json
from trl_tract.runs.judged import Judged, JudgedScale, check_same_items
from trl_tract.runs.run import finished_steps
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
    tests = list(config.tests) or [HELD_OUT]
    finished = [seed for seed in config.seeds if _is_finished(config, directory / f"seed-{seed}", tests)]
    choice = directory / CHOICE
    result: dict[str, Any] = {
        "device": _device(),
        "versions": _versions(),
        "settings": _without_places(asdict(config)),
        "choice": read_json(choice) if choice.is_file() else None,
        "seeds": finished,
        "tests": {},
        "seconds": {
            seed: {name: round(taken, 1) for name, taken in finished_steps(directory / f"seed-{seed}").items()}
            for seed in finished
        },
        "curve": {
            count: read_json(directory / f"curve-{count}" / "table.json")["tests"]
            for count in config.curve
            if (directory / f"curve-{count}" / "table.json").is_file()
        },
    }
    for test in tests if finished else []:
        result["tests"][test] = tabulate(config, directory, test, finished)
    written = {seed: directory / f"seed-{seed}" / "scored-by-stage1" / "rows.jsonl" for seed in finished}
    result["own_rationales"] = {
        seed: own_rationales(file, config.grid.values) for seed, file in written.items() if file.is_file()
    }
    result["table"] = "\n\n".join(markdown(result)) or "no seed is finished"
    (directory / "table.md").write_text(result["table"] + "\n", encoding="utf-8")
    write_json(directory / "table.json", result)
    return result


def tabulate(config: Any, directory: Path, test: str, seeds: list[int]) -> dict[str, Any]:
    """One test: `n` items, of how many `questions`, the `rows` of its table, and what `several` rationales buy.

    Every interval comes twice: `by_question`, with whole questions drawn, and `by_item`, with single items.
    """

    def judgements(key: str, seed: int) -> JudgedScale:
        return Judged(directory / f"seed-{seed}" / f"judged-{TABLE[key].model}-{test}").scales[""]

    trained = [key for key in config.rows if TABLE[key].model not in RIVALS]
    if trained:
        first = judgements(trained[0], seeds[0])
        gold, groups, items = first.reference[first.items], first.groups, first.items
    else:
        scored = read_json(directory / f"seed-{seeds[0]}" / f"scored-{config.rows[0]}-{test}.json")
        gold, groups, items = np.array(scored["gold"]), scored["groups"], np.arange(len(scored["gold"]))
    units = {"by_question": np.unique(groups, return_inverse=True)[1], "by_item": np.arange(len(gold))}
    found: dict[str, tuple[SeedScores, list[float | None], int]] = {}
    for key in config.rows:
        if key in trained:
            judged = {seed: judgements(key, seed) for seed in seeds}
            for seed, each in judged.items():
                check_same_items(first, each, (f"{trained[0]}, seed {seeds[0]}", f"{key}, seed {seed}"))
            decision, values = TABLE[key].decision, config.grid.values
            scores = np.array([decided(each.records, values, decision, seed) for seed, each in judged.items()])
            masses = [each.mean_grid_mass for each in judged.values()]
        else:
            files = [directory / f"seed-{seed}" / f"scored-{key}-{test}.json" for seed in seeds]
            scores, masses = np.array([read_json(file)["scores"] for file in files])[:, items], []
        found[key] = SeedScores(scores, gold), masses, int(np.isnan(scores).sum())
    lines = []
    for key, (scores, masses, failed) in found.items():
        line: dict[str, Any] = {"row": key, "label": TABLE[key].label, "failed": failed, "paper": TABLE[key].pearson}
        line["grid_mass"] = _mean([mass for mass in masses if mass is not None])
        for name in ("pearson", "spearman", "rmse"):
            line[name] = {unit: _interval(scores, name, codes, KINDS[name]).to_dict() for unit, codes in units.items()}
        line["pearson_by_seed"] = [
            _none_if_nan(value) for value in scores.each_seed(np.ones((1, len(gold))))["pearson"][0]
        ]
        others = {"tract_minus_row": (REFERENCE, "pearson"), "rmse_minus_tract": (REFERENCE, "rmse")}
        others["rmse_minus_mean"] = ("mean", "rmse")
        if TABLE[key].decision == "sampled":
            expected = [other for other, row in TABLE.items() if row.model == TABLE[key].model and other != key]
            others["rmse_minus_expected"] = (expected[0], "rmse")
        for gap, (other, name) in others.items():
            if other not in found or other == key:
                continue
            sign = -1 if gap == "tract_minus_row" else 1
            difference = _Difference(scores, found[other][0], sign)
            line[gap] = {
                unit: _interval(difference, name, codes, "difference").to_dict() for unit, codes in units.items()
            }
        if gap := line.get("tract_minus_row"):
            number = {unit: int(codes.max()) + 1 for unit, codes in units.items()}
            line["needed"] = {unit: units_needed(_read(each), number[unit]) for unit, each in gap.items()}
        lines.append(line)
    bought = {}
    for model, samples in config.several.items():
        key = next((key for key in trained if TABLE[key].model == model), None)
        if key is not None and samples > 1:
            judged = [judgements(key, seed) for seed in seeds]
            bought[model] = several(judged, samples, units["by_question"])
    questions = int(units["by_question"].max()) + 1
    return {"n": len(gold), "questions": questions, "rows": lines, "several": bought}


class _Difference:
    """`sign` times what one row's metrics are above another's, on the same resamples."""

    def __init__(self, one: SeedScores, other: SeedScores, sign: int) -> None:
        self.one, self.other, self.sign = one, other, sign

    def __call__(self, counts: Floats) -> dict[str, Floats]:
        other = self.other(counts)
        return {name: self.sign * (values - other[name]) for name, values in self.one(counts).items()}


def decided(records: Sequence[dict[str, Any]], values: tuple[float, ...], decision: str, seed: int) -> Floats:
    """Each item's score from the probabilities of its first rationale, `(n,)`; NaN where there are none."""
    scores = np.full(len(records), np.nan)
    grid = torch.tensor(values, dtype=torch.float64)
    for number, record in enumerate(records):
        if record["error"] is None:
            generator = torch.Generator().manual_seed(int(digest([seed, "decision", number])[:8], 16))
            probs = torch.tensor(record["probs"][:1], dtype=torch.float64)
            scores[number] = decide(probs, grid, decision, generator=generator).mean()  # type: ignore[arg-type]
    return scores


def measured(scores: Floats, gold: Floats) -> dict[str, Any]:
    """Error and correlation of one judge's scores, rubric units."""
    correlation = pearson(scores, gold)
    return {"rmse": float(np.sqrt(np.mean((scores - gold) ** 2))), "pearson": _none_if_nan(correlation)}


def units_needed(gap: Interval, units: int) -> int | None:
    """About how many questions, or items, would put 0 outside the interval of a difference of this size.

    A half-width shrinks with the square root of their number. None where the difference is 0 or has no interval.
    """
    half = (gap.high - gap.low) / 2
    if math.isnan(half) or gap.value == 0:
        return None
    return math.ceil(units * (half / abs(gap.value)) ** 2)


def _interval(statistics: Any, name: str, codes: Any, kind: Kind) -> Interval:
    value = statistics(np.ones((1, len(codes))))[name][0]
    resampled = bootstrap(statistics, len(codes), codes, N_BOOTSTRAP, 0)
    return interval(float(value), resampled[name], int(codes.max()) + 1, kind)


def _is_finished(config: Any, directory: Path, tests: list[str]) -> bool:
    models = {TABLE[row].model for row in config.rows}
    files = {
        model: f"scored-{model}-{{}}.json" if model in RIVALS else f"judged-{model}-{{}}/judgements.jsonl"
        for model in models
    }
    return all((directory / file.format(test)).is_file() for file in files.values() for test in tests)


def markdown(result: dict[str, Any]) -> list[str]:
    """The tables of a result: for each test the agreement, then the differences."""
    blocks = []
    for test, found in result["tests"].items():
        rows, seeds = found["rows"], ", ".join(map(str, result["seeds"]))
        blocks.append(f"{test}: {found['n']} items of {found['questions']} questions, seeds {seeds}")
        blocks += [agreement_table(rows), difference_table(rows)]
        if found["several"]:
            blocks.append(several_table(found["several"]))
    if result["own_rationales"]:
        blocks.append(own_rationales_table(result["own_rationales"]))
    return blocks


def agreement_table(rows: list[dict[str, Any]]) -> str:
    """Correlation and error of each row."""
    head = ["row", "r [by question]", "[by item]", "r by seed", "rho", "RMSE [by question]", "[by item]"]
    head += ["grid mass", "failed", "r in the paper"]
    return _table(
        head,
        [
            [
                row["label"],
                *_both(row["pearson"]),
                " ".join("-" if value is None else f"{value:.2f}" for value in row["pearson_by_seed"]),
                str(_read(row["spearman"]["by_item"])).split(" [")[0],
                *_both(row["rmse"]),
                "-" if row["grid_mass"] is None else f"{row['grid_mass']:.3f}",
                str(row["failed"]),
                row["paper"],
            ]
            for row in rows
        ],
    )


def difference_table(rows: list[dict[str, Any]]) -> str:
    """What sets rows apart: an interval that leaves out 0 does."""
    head = ["row", "r of TRACT - row [by question]", "[by item]", "questions needed", "items needed"]
    head += ["RMSE - the mean's [by question]", "[by item]"]
    head += ["RMSE - TRACT's [by question]", "[by item]", "RMSE, sampled - expected [by question]", "[by item]"]
    lines = []
    for row in rows:
        needed = row.get("needed", {})
        shown = [f"{number:,}" if (number := needed.get(unit)) else "-" for unit in ("by_question", "by_item")]
        line = [row["label"], *_both(row.get("tract_minus_row")), *shown]
        for gap in ("rmse_minus_mean", "rmse_minus_tract", "rmse_minus_expected"):
            line += _both(row.get(gap))
        lines.append(line)
    return _table(head, lines)


def choice_table(choice: dict[str, Any]) -> str:
    """The log of the runs on the development split: where every setting comes from."""
    head = ["model", "settings", "RMSE", "r", "grid mass", "failed", "seconds of training", ""]
    lines = []
    for line in choice["log"]:
        taken = choice["chosen"][line["model"]] == line["settings"]
        lines.append(
            [
                line["model"],
                ", ".join(f"{name} {value:g}" for name, value in line["settings"].items()) or "-",
                f"{line['rmse']:.3f}",
                "-" if line["pearson"] is None else f"{line['pearson']:.3f}",
                "-" if line.get("grid_mass") is None else f"{line['grid_mass']:.3f}",
                str(line.get("failed", 0)),
                f"{line['seconds']:.0f}" if "seconds" in line else "-",
                "chosen" if taken else "",
            ]
        )
    return _table(head, lines)


def several_table(bought: dict[str, Any]) -> str:
    """RMSE by the number of rationales of an item, and how much its score varies between them."""
    head = ["judge", "variance between rationales, mean", "median", "rationales", "RMSE [by question]", "[by item]"]
    head += ["RMSE - that of one [by question]", "[by item]"]
    lines = []
    for model, found in bought.items():
        variance = [f"{found['variance'][name]:.4f}" for name in ("mean", "median")]
        for count, rmse in found["rmse"].items():
            gap = _both(found["rmse_minus_one"] if count == max(found["rmse"], key=int) else None)
            lines.append([model, *variance, count, *_both(rmse), *gap])
    return _table(head, lines)


def own_rationales_table(found: dict[str, Any]) -> str:
    """How right the stage-one model's own rationales are on training rows, by seed and gold score."""
    head = ["seed", "gold score", "rationales", "mean expected score", "within tolerance", "RMSE", "of the mean"]
    lines = []
    for seed, each in found.items():
        for level, own in each.get("by_gold", {}).items():
            line = [str(seed), level, str(own["rationales"]), f"{own['score']:.2f}", f"{own['within']:.2f}", "", ""]
            lines.append(line)
        if each["rationales"]:
            rmse = [f"{each[name]:.3f}" for name in ("rmse", "rmse_mean")]
            lines.append([str(seed), "all", str(each["rationales"]), "", f"{each['within']:.2f}", *rmse])
    return _table(head, lines)


def curve_table(result: dict[str, Any], test: str, rows: Sequence[str]) -> str:
    """RMSE and r of some rows by the number of training items."""
    sizes = {**result["curve"], "all": result["tests"]}
    lines = []
    for size, tests in sizes.items():
        for row in tests[test]["rows"]:
            if row["row"] in rows:
                lines.append([str(size), row["label"], *_both(row["rmse"]), *_both(row["pearson"])])
    return _table(["items", "row", "RMSE [by question]", "[by item]", "r [by question]", "[by item]"], lines)


def _table(head: list[str], lines: list[list[str]]) -> str:
    return "\n".join("| " + " | ".join(line) + " |" for line in [head, [":--", *["--:"] * (len(head) - 1)], *lines])


def _both(numbers: dict[str, Any] | None) -> tuple[str, str]:
    """A number with its interval by question, and the interval by item."""
    if numbers is None:
        return "", ""
    by_item = str(_read(numbers["by_item"]))
    return str(_read(numbers["by_question"])), f"[{by_item.partition(' [')[2]}" if "[" in by_item else ""


def _read(numbers: dict[str, float | None]) -> Interval:
    return Interval(**{name: math.nan if number is None else number for name, number in numbers.items()})


def _without_places(settings: dict[str, Any]) -> dict[str, Any]:
    """Settings that may be published: of a file its name alone."""
    tests = {name: Path(file).name for name, file in settings["tests"].items()}
    places = {name: Path(settings[name]) for name in ("data", "model") if settings[name] is not None}
    return {**settings, **{name: place.name for name, place in places.items() if place.exists()}, "tests": tests}


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
