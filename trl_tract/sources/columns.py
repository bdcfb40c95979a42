"""A user's own column names -> the columns that are understood. Knows nothing of files or models."""

import json
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from trl_tract.files.journal import write_json
from trl_tract.rows.golds import is_missing, mean_golds, read_golds
from trl_tract.rows.row import RENDERED_WITH, Row
from trl_tract.scale.scale import Scale
from trl_tract.scale.text import CompletionFormat, ScoreNotFoundError
from trl_tract.sources.rubric import Rubric

FILE_NAME = "tract_prompt.json"
"""File beside a judge, with the columns and the rubric of its training rows."""
ROLES = {
    "instruction": "the instruction or question that the response answers",
    "response": "the response to judge",
    "reference": "an answer that would get the highest score",
    "prompt": "the judge's whole prompt, if no rubric is given",
    "rationale": "the annotator's rationale",
    "completion": "rationale, marker and score in one text, instead of the rationale",
    "score": "the gold score",
    "chosen": "the better response of a pair",
    "rejected": "the worse response of a pair",
    "group": "a group: its items are never split between training and evaluation; by default, items with the same "
    "instruction",
    "id": "an identifier of the row",
    "subset": "the subset of the benchmark that the pair belongs to",
}
_CARRIED = ("group", "id", "subset", *RENDERED_WITH)


@dataclass(frozen=True)
class OwnColumns:
    """Which of a user's columns is what, and the rubric that their responses are judged by.

    Attributes:
        columns: Role -> column. A role that is left out is the column of its own name, where there is one.
        rubric: Makes the prompts; None: the rows hold whole prompts.
        optional: Roles whose column a file may lack, since the user did not name them: they were saved with a judge.
        saved: Whether all of it was. Then rows that hold neither responses nor prompts are read by a known schema.
    """

    columns: Mapping[str, str] = field(default_factory=dict)
    rubric: Rubric | None = None
    optional: frozenset[str] = frozenset()
    saved: bool = False

    @classmethod
    def parse(
        cls, columns: Sequence[str] | Mapping[str, str] | str | None, rubric: str | Path | None
    ) -> "OwnColumns | None":
        """Read `role=column` pairs (in YAML also a mapping) and a rubric file; None where neither is given.

        Raises:
            FileNotFoundError, ValueError: See `Rubric.load`; or a pair is not of that form, or names no role.

        Example:
            >>> OwnColumns.parse(["response=answer", "score=stars"], None).columns
            {'response': 'answer', 'score': 'stars'}
        """
        if not columns and not rubric:
            return None
        named: dict[str, str] = {}
        if isinstance(columns, Mapping):
            columns = [
                f"{role}={','.join(map(str, column)) if isinstance(column, list) else column}"
                for role, column in columns.items()
            ]
        for pair in [columns] if isinstance(columns, str) else columns or []:
            role, equals, column = pair.partition("=")
            if not equals or not column or role not in ROLES:
                raise ValueError(
                    f"--columns {pair}: write role=column, such as score=stars. The roles are {', '.join(ROLES)}"
                )
            if role in named:
                raise ValueError(f"--columns names {role} twice: {named[role]} and {column}")
            named[role] = column
        return cls(named, Rubric.load(rubric) if rubric else None)

    @classmethod
    def to_train_on(
        cls, columns: Sequence[str] | Mapping[str, str] | str | None, rubric: str | Path | None
    ) -> "OwnColumns | None":
        """The same for rows that a judge is trained on; see `Rubric.to_train_on`."""
        given = cls.parse(columns, rubric)
        if given is None or given.rubric is None:
            return given
        return replace(given, rubric=given.rubric.to_train_on())

    def to_dict(self) -> dict[str, Any]:
        """JSON-serialisable."""
        return {"columns": dict(self.columns), "rubric": None if self.rubric is None else asdict(self.rubric)}

    @classmethod
    def from_dict(cls, saved: Mapping[str, Any]) -> "OwnColumns":
        """What `to_dict` wrote."""
        return cls(dict(saved["columns"]), Rubric(**saved["rubric"]) if saved["rubric"] else None)

    def save(self, directory: str | Path) -> None:
        """Write `tract_prompt.json` into a judge's directory."""
        write_json(Path(directory) / FILE_NAME, self.to_dict())

    @classmethod
    def load(cls, path: str | Path, revision: str | None = None) -> "OwnColumns | None":
        """Read `tract_prompt.json` of a judge's directory or hub id; None where it was trained without.

        Raises:
            ValueError: It cannot be read.
        """
        from transformers.utils import cached_file

        try:
            file = Path(str(cached_file(str(path), FILE_NAME, revision=revision)))
        except OSError:
            return None  # the judge's own file, which is looked for first, says what is wrong with a repository
        try:
            return cls.from_dict(json.loads(file.read_text(encoding="utf-8")))
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{file} cannot be read: {error!r}. Save the model again, or delete the file") from error

    @staticmethod
    def beside(given: "OwnColumns | None", saved: "OwnColumns | None") -> "OwnColumns | None":
        """What the user gave, and for the rest what was saved with the judge."""
        if given is None:
            return None if saved is None else replace(saved, optional=frozenset(saved.columns), saved=True)
        trained_with = None if saved is None else saved.rubric
        rubric = trained_with if given.rubric is None else given.rubric.asked_of(trained_with)
        if saved is None:
            return replace(given, rubric=rubric)
        return OwnColumns(
            {**saved.columns, **given.columns},
            rubric,
            optional=frozenset(saved.columns.keys() - given.columns.keys()),
        )

    def of(self, record: Mapping[str, Any]) -> "OwnColumns | None":
        """What of it holds for a record; None for one that a known schema has to read."""
        absent = {role for role in self.optional if not set(_parts(role, self.columns[role])) & record.keys()}
        columns = {role: column for role, column in self.columns.items() if role not in absent}
        needed = ("prompt" if self.rubric is None else "response", "chosen")
        if self.saved and not any(columns.get(role, role) in record for role in needed):
            return None
        return replace(self, columns=columns)

    def check(self, scales: Sequence[Scale]) -> None:
        """Refuse a rubric that describes other scores than there are."""
        if scales[0].name and (self.rubric or {"score", "rationale"} & self.columns.keys()):
            raise ValueError(
                "--rubric and the columns score and rationale work only for rows with one score. For aspects, write "
                "`prompt` and `completion` yourself, and put the gold scores into `scores`"
            )
        if self.rubric is not None:
            self.rubric.check(scales[0].grid)

    def absent(self, seen: Collection[str]) -> list[str]:
        """The columns that are named and that no record has."""
        parts = {role: [column] if column in seen else _parts(role, column) for role, column in self.columns.items()}
        parts = {role: each for role, each in parts.items() if role not in self.optional}
        return [part for each in parts.values() for part in each if part not in seen]

    def convert(self, record: Mapping[str, Any], scales: Sequence[Scale], *, judged: bool = False) -> Row:
        """A record's columns under the names that are understood, its prompt written by the rubric.

        A record that is only `judged` needs no score beside its rationale.

        Raises:
            ScoreNotFoundError: A column that is needed is empty or missing; it is named.
        """
        found = {role: value for role in ROLES if (value := self._cell(role, record)) is not None}
        row: Row = {name: found.get(name, record.get(name)) for name in _CARRIED}
        row = {name: value for name, value in row.items() if value is not None}
        if scales[0].name and record.get("scores") is not None:
            row["scores"] = record["scores"]
        if "chosen" in found or "rejected" in found:
            pair = {name: found.get(name) for name in ("chosen", "rejected")}
            row |= pair | ({"reference": found["reference"]} if "reference" in found else {})
            return row | {"prompt": found.get("instruction", found.get("prompt"))}
        if self.rubric is None:
            row["prompt"] = self._need(found, "prompt", record)
            named = self.columns.keys() - self.optional
            if idle := [role for role in ("instruction", "response", "reference") if role in named]:
                raise ScoreNotFoundError(
                    "no rubric",
                    f"the column {self.columns[idle[0]]} ({idle[0]}) would not be read: without a rubric, the judge "
                    f"reads the prompt column alone. Give a rubric, or leave {idle[0]} out of the columns",
                )
        else:
            self._need(found, "response", record)
            asked = next((role for role in ("instruction", "prompt") if role in found), None)
            instruction = self._text(found, asked) if asked else ""
            response = self._text(found, "response")
            reference = self._text(found, "reference") if "reference" in found else None
            row["prompt"] = self.rubric.prompt(instruction, response, reference, scales[0].marker)
            row.setdefault("group", instruction or response)
        if "score" in found:
            golds = read_golds({"score": found["score"]}, scales)
            if golds is not None:
                row["score"] = golds[0] if isinstance(found["score"], list) or len(golds[0]) > 1 else golds[0][0]
        if "completion" in found:
            row["completion"] = found["completion"]
        elif "rationale" in found and not judged:
            self._need(row, "score", record)
            row["completion"] = written(self._text(found, "rationale"), row["score"], scales[0])
        return row

    def _cell(self, role: str, record: Mapping[str, Any]) -> Any:
        """What a record has in a role's column; a list of what it has in several; None for nothing."""
        column = self.columns.get(role, role)
        cells = [record.get(part) for part in ([column] if column in record else _parts(role, column))]
        cells = [cell for cell in cells if not is_missing(cell)]
        return cells if len(cells) > 1 else next(iter(cells), None)

    def _text(self, found: Mapping[str, Any], role: str) -> str:
        """A cell that goes into a prompt or a completion; a number is written as it stands."""
        if isinstance(found[role], bool) or not isinstance(found[role], str | int | float):
            raise ScoreNotFoundError("not text", f"the {role} is {type(found[role]).__name__}, not text")
        return str(found[role])

    def _need(self, found: Mapping[str, Any], role: str, record: Mapping[str, Any]) -> Any:
        if role in found:
            return found[role]
        column = self.columns.get(role, role)
        if role in self.columns or column in record:
            raise ScoreNotFoundError("empty column", f"the column {column} ({ROLES[role]}) is empty or missing")
        raise ScoreNotFoundError(
            "no column",
            f"no column is given for the {role} ({ROLES[role]}). Add --columns {role}=COLUMN. The columns of the data "
            f"are {', '.join(sorted(map(str, record)))}",
        )


def _parts(role: str, column: str) -> list[str]:
    return column.split(",") if role == "score" else [column]


def written(rationale: str, score: Any, scale: Scale) -> str:
    """A completion with the score of the grid that is nearest to a gold score."""
    golds = mean_golds({"score": score}, [scale])
    if golds is None:
        raise ScoreNotFoundError("no score", "the gold score is missing")
    return CompletionFormat(scale.marker).join(rationale, scale.grid.nearest_text(golds[0]))
