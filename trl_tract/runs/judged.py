"""A folder of judgements, read once. Knows the layout of the folder, nothing of models, cards or pages."""

from array import array
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from trl_tract.evaluation.pairs import Floats, Ints
from trl_tract.evaluation.report import Comparison, ScoreReport, compare, score_report
from trl_tract.files.journal import JsonlRows, digest, read_json
from trl_tract.files.seal import check_result, sealed_rows
from trl_tract.saved.judge_config import JudgeConfig

_INTERNAL = {"block_size", "aspects", "fingerprint", "trl_tract", "recalibration"}
_COLUMNS = ("score", "reference", "grid_mass", "raters")
_KEYS = ("id", "group", "side", "subset")


class Judged:
    """One judge's judgements of some items.

    The file is read through once. Numbers and what identifies an item stay in memory; whole records are read from the
    file when they are asked for.

    Attributes:
        keys: `id`, `group`, `side` and `subset` of each item, as far as it has them.
        groups: The group of each item; an item without one is a group of its own.
        scales: Name -> scores on that scale; a completion with one score has one scale, whose name is "".

    Raises:
        FileNotFoundError: The folder holds no judgements.
        ValueError: They were cut or changed since they were written, or their settings are damaged.
    """

    def __init__(self, directory: str | Path) -> None:
        self.directory = Path(directory)
        if not (self.directory / "judgements.jsonl").is_file():
            raise FileNotFoundError(
                f"{self.directory} holds no judgements.jsonl. Give the output directory of `trl-tract judge`; if "
                "judging was interrupted, run that command again first"
            )
        settings = self.directory / "settings.json"
        self.settings: dict[str, Any] = read_json(settings) if settings.is_file() else {}
        self.rows = JsonlRows(self.directory / "judgements.jsonl")
        check_result(self.rows.path)
        self.keys: list[dict[str, Any]] = []
        columns: dict[str, dict[str, list[Any]]] = {}
        errors: dict[str, Counter[str]] = {}
        written: dict[str, array[int]] = {}
        for number, row in enumerate(self.rows):
            self.keys.append({key: row[key] for key in _KEYS if row.get(key) is not None})
            records = row.get("aspects") or {"": row}
            if number and records.keys() != columns.keys():
                names = [", ".join(each) or "one score" for each in (records, columns)]
                raise ValueError(
                    f"{self.rows.path}, row {number}: this row was judged on {names[0]}, the rows before it on "
                    f"{names[1]}"
                )
            for name, record in records.items():
                held = columns.setdefault(name, {column: [] for column in _COLUMNS})
                for column, values in held.items():
                    values.append(record.get(column))
                # Only whether texts are the same is asked for: 8 bytes do for each.
                written.setdefault(name, array("q")).extend(
                    hash(text) for text in record.get("rationales") or () if text
                )
                if record["error"]:
                    errors.setdefault(name, Counter())[record["error"]] += 1
        # An item's number may be another one's group.
        self.groups = [str(key["group"]) if "group" in key else f"item {n}" for n, key in enumerate(self.keys)]
        self.scales = {
            name: JudgedScale(
                self,
                name,
                raters=held.pop("raters"),
                **{column: np.array(values, dtype=np.float64) for column, values in held.items()},
                errors=dict(errors.get(name, Counter()).most_common()),
                rationales=np.array(written.get(name, ()), dtype=np.int64),
            )
            for name, held in (columns or {"": {column: [] for column in _COLUMNS}}).items()
        }

    def __len__(self) -> int:
        return len(self.keys)

    @property
    def shown_settings(self) -> dict[str, Any]:
        """The settings that a reader knows from having set them."""
        return {label: value for label, value in self.settings.items() if label not in _INTERNAL}

    @property
    def made_of(self) -> dict[str, Any]:
        """What the judgements were made of: the parts of the model, the rows, the version of this package."""
        made_by = {name: self.settings.get(name) for name in ("fingerprint", "trl_tract")}
        return {**made_by, "rows_digest": sealed_rows(self.directory)}

    @property
    def holds_pairs(self) -> bool:
        """Whether the items are chosen and rejected responses in turn."""
        return bool(self.keys) and all("side" in key for key in self.keys)

    @property
    def sides(self) -> list[dict[str, Any]]:
        """The records that `pair_report` takes."""
        scores = self.scales[""].score
        return [
            {**key, "score": None if np.isnan(score) else score} for key, score in zip(self.keys, scores, strict=True)
        ]

    def prompts(self, data: str | Path | None = None) -> Sequence[Any] | None:
        """The prompt of each item, read when it is asked for; None where the rows are not at hand.

        Args:
            data: JSONL of the rows that were judged; None: what lies beside the judgements, if that is what was judged.

        Raises:
            ValueError: `data` holds other rows than those that were judged.
        """
        # Of a run, the items that were held out; of `trl-tract judge`, the rows that it converted.
        beside = (self.directory.parent / "eval.jsonl", self.directory / "rows.jsonl")
        found = Path(data) if data is not None else next((file for file in beside if file.is_file()), None)
        if found is None:
            return None
        rows = JsonlRows(found)
        if sealed_rows(self.directory) == digest(rows):
            return Lazy(rows, range(len(rows)), lambda row: row["prompt"])
        if data is None:
            return None
        raise ValueError(
            f"{found} does not hold the rows as they were judged in {self.directory}. Leave --data out if the "
            "directory still has rows.jsonl; else give that file, which `judge` wrote there"
        )


class Lazy(Sequence[Any]):
    """Some rows of a file in their order, each read and made into something when it is asked for."""

    def __init__(
        self, rows: Sequence[Any], numbers: Sequence[int], make: Callable[[Any], Any] = lambda row: row
    ) -> None:
        self._rows, self._numbers, self._make = rows, numbers, make

    def __len__(self) -> int:
        return len(self._numbers)

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return Lazy(self._rows, self._numbers[index], self._make)
        return self._make(self._rows[self._numbers[index]])

    def __iter__(self) -> Iterator[Any]:
        # One pass through the file, where asking for each row would open it as often as there are rows.
        wanted = set(self._numbers)
        return (self._make(row) for number, row in enumerate(self._rows) if number in wanted)


@dataclass(frozen=True, eq=False)
class JudgedScale:
    """One judge's scores on one scale.

    Attributes:
        folder: Where they were read.
        name: The scale's name; "" where completions have one score.
        score: `(n,)`, rubric units, NaN where an item has none.
        reference: Gold scores, `(n,)`, rubric units, NaN where an item has none.
        grid_mass: Probability on the grid, `(n,)`, NaN where an item has no score.
        raters: Each item's gold scores by several people, where it has them, rubric units.
        errors: Why items have no score, and how many of them for that reason, commonest first.
        rationales: A number for each rationale, equal where they are.
    """

    folder: Judged
    name: str
    score: Floats
    reference: Floats
    grid_mass: Floats
    raters: list[list[float] | None]
    errors: dict[str, int]
    rationales: Ints

    def called(self, judge: str) -> str:
        """What a judge is called in the report on this scale."""
        return f"{judge}, {self.name}" if self.name else judge

    @cached_property
    def grid(self) -> tuple[float, ...] | None:
        """The grid that was judged on, where it is written down on this disk; no hub is asked for it."""
        settings = self.folder.settings
        if self.name:
            own = (settings.get("aspects") or {}).get(self.name)
            return None if own is None else tuple(float(value) for value in own["values"])
        if values := settings.get("score_values"):
            return tuple(float(value) for value in (values.values() if isinstance(values, Mapping) else values))
        if not Path(model := settings.get("model", "")).is_dir():
            return None
        try:
            return JudgeConfig.load(model).scales[0].grid.values
        except FileNotFoundError:
            return None

    @cached_property
    def items(self) -> Ints:
        """Numbers of the items with a gold score: the others are in no figure."""
        return np.flatnonzero(np.isfinite(self.reference))

    @property
    def groups(self) -> list[str]:
        """The group of each item with a gold score."""
        return [self.folder.groups[number] for number in self.items]

    @property
    def _units(self) -> list[str] | None:
        """What is resampled: groups, or items where each is a group of its own."""
        groups = self.groups
        return None if len(set(groups)) == len(groups) else groups

    @property
    def records(self) -> Sequence[dict[str, Any]]:
        """The judgements of the items with a gold score, each read when it is asked for."""
        return Lazy(self.folder.rows, self.items.tolist(), self._record)

    def _record(self, row: dict[str, Any]) -> dict[str, Any]:
        if not self.name:
            return row
        shared = {name: row[name] for name in ("id", "group", "backend") if name in row}
        return {**shared, **row["aspects"][self.name]}

    @property
    def mean_grid_mass(self) -> float | None:
        """Mean probability on the grid over the items that have a score; None if none has."""
        return None if np.isnan(self.grid_mass).all() else float(np.nanmean(self.grid_mass))

    def report(self, *, n_bootstrap: int = 1000, grid: Sequence[float] | None = None) -> ScoreReport:
        """Agreement with the gold scores; `grid` in place of the one that was judged on.

        Raises:
            ValueError: No item has a gold score.
        """
        if len(self.folder) and not len(self.items):
            raise ValueError(
                f"{self.folder.directory}: no judgement has a gold score. Judge rows that have gold scores"
            )
        return score_report(
            self.score[self.items],
            self.reference[self.items],
            groups=self._units,
            n_bootstrap=n_bootstrap,
            grid=grid or self.grid,
            rationales=self.rationales.tolist(),
            raters=[self.raters[number] for number in self.items],
        )

    def minus(
        self, other: "JudgedScale", *, n_bootstrap: int = 1000, grid: Sequence[float] | None = None
    ) -> Comparison:
        """This judge minus another one of the same items."""
        return compare(
            self.score[self.items],
            other.score[self.items],
            self.reference[self.items],
            groups=self._units,
            n_bootstrap=n_bootstrap,
            grid=grid or self.grid,
        )


def check_same_items(a: JudgedScale, b: JudgedScale, names: Sequence[str]) -> None:
    """Refuse to compare judgements of different items.

    Raises:
        ValueError: One judged more items, or an item differs in gold score, group or id.
    """
    if len(a.folder) != len(b.folder):
        raise ValueError(
            f"{names[0]} has {len(a.folder)} judgements and {names[1]} has {len(b.folder)}. Two judges can be compared "
            "only on the same items. Judge the same --data with both, and let both runs finish"
        )
    golds = zip(a.reference.tolist(), b.reference.tolist(), strict=True)
    for i, (one, other, gold) in enumerate(zip(a.folder.keys, b.folder.keys, golds, strict=True)):
        differ = [column for column in ("group", "id") if one.get(column) != other.get(column)]
        if gold[0] != gold[1] and not np.isnan(gold).all():
            differ, one, other = ["reference"], {"reference": gold[0]}, {"reference": gold[1]}
        for column in differ:
            raise ValueError(
                f"judgement {i} has {column} {one.get(column)!r} in {names[0]} and {other.get(column)!r} in "
                f"{names[1]}. Two judges can be compared only on the same items. Judge the same --data with both"
            )
