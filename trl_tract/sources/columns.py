"""A user's own rubric and column names -> the columns that are understood. Knows nothing of files or models."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from trl_tract.rows.golds import annotator_scores, gold_score
from trl_tract.rows.row import Row
from trl_tract.scale.grid import ScoreGrid
from trl_tract.scale.scales import Scales
from trl_tract.scale.text import CompletionFormat, ScoreNotFoundError, score_text, some_scores
from trl_tract.sources.prompts import rubric_prompt

ROLES = {
    "instruction": "what the response answers",
    "response": "the text to be judged",
    "reference": "an answer that would earn the highest score",
    "prompt": "the whole prompt of the judge, where no rubric is given",
    "rationale": "what the annotator wrote",
    "completion": "rationale, marker and score in one, instead of the rationale",
    "score": "the gold score",
    "chosen": "the better response of a pair",
    "rejected": "the worse one",
    "group": "items that share it stay on one side of a split; by default those with the same instruction",
    "id": "a name for the row",
    "subset": "the part of a benchmark that a pair belongs to",
}
_CARRIED = ("group", "id", "subset")
_PLACES = ("instruction", "response", "reference", "criterion", "descriptions", "scores", "marker")


@dataclass(frozen=True)
class Rubric:
    """A criterion, what earns each score, and optionally the user's own wording of the prompt.

    Attributes:
        criterion: What the rubric asks.
        descriptions: Score text -> what earns it, in the order of the grid. With a `scale` some of the scores do, and
            ranges of them, such as `0-20`.
        template: The prompt with `{response}` and the other places of it to fill; None: `prompts.rubric_prompt`.
        scale: What scores there are, in words; None: those that are described.
    """

    criterion: str
    descriptions: Mapping[str, str]
    template: str | None = None
    scale: str | None = None

    @classmethod
    def load(cls, path: str | Path) -> "Rubric":
        """Read a YAML file with `criterion`, `scores` (score: description) and, if wanted, `scale` and `template`.

        Raises:
            FileNotFoundError: No such file.
            ValueError: It is not YAML, or lacks something, or has something that is not understood.
        """
        import yaml

        try:
            content = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
        except FileNotFoundError as error:
            raise FileNotFoundError(f"--rubric {path}: no such file") from error
        except (yaml.YAMLError, UnicodeDecodeError) as error:
            raise ValueError(f"--rubric {path} is not YAML: {' '.join(str(error).split())}") from error
        wanted = "a rubric is YAML with `criterion: text` and `scores:`, under it `1: text`, `2: text` and so on"
        if not isinstance(content, dict) or not {"criterion", "scores"} <= content.keys():
            raise ValueError(f"--rubric {path}: {wanted}")
        unknown = sorted(map(str, content.keys() - {"criterion", "scores", "scale", "template"}))
        if unknown:
            raise ValueError(
                f"--rubric {path}: {', '.join(unknown)} is not understood; {wanted}; `scale: text` and "
                "`template: text` may stand beside them"
            )
        if not isinstance(content["scores"], dict) or len(content["scores"]) < 2:
            raise ValueError(f"--rubric {path}: `scores` has to describe two scores or more; {wanted}")
        rubric = cls(
            str(content["criterion"]),
            {_written(score): str(text) for score, text in content["scores"].items()},
            content.get("template"),
            str(content.get("scale") or "").strip() or None,
        )
        rubric._check_template(path)
        return rubric

    def _check_template(self, path: str | Path) -> None:
        if self.template is None:
            return
        places = re.findall(r"\{(\w+)\}", str(self.template))
        unknown = sorted(set(places) - set(_PLACES))
        if unknown or "response" not in places:
            wrong = f"{{{unknown[0]}}} is not understood" if unknown else "it has no place for the {response}"
            known = ", ".join(f"{{{place}}}" for place in _PLACES)
            raise ValueError(f"--rubric {path}: in `template`, {wrong}. Places are: {known}")

    def check(self, grid: ScoreGrid) -> None:
        """Refuse a rubric that describes other scores than the grid has.

        Raises:
            ValueError: It does.
        """
        described, known = list(self.descriptions), list(grid.texts)
        if self.scale is not None:
            self._check_some(grid)
        elif described != known:
            if sorted(described) == sorted(known):
                raise ValueError(f"the rubric describes the scores in the order {described}: write them as {known}")
            numeric = all(re.fullmatch(r"[-+]?\d+(\.\d+)?", text) for text in described)
            options = f"--score_values {' '.join(described)}" if numeric else "--score_values and --score_texts"
            scale = ""
            if set(described) < set(known):
                scale = f"; or, if it describes some of them, `scale: any score from {known[0]} to {known[-1]}` in it"
            raise ValueError(
                f"the rubric describes the scores {', '.join(described)}, but the grid is {some_scores(known)}: give "
                f"{options}, or another rubric{scale}. A trained judge keeps the grid that it was trained on"
            )

    def _check_some(self, grid: ScoreGrid) -> None:
        """Of a rubric with a scale: what is described has to be on the grid, in its order."""
        before = -1
        for text in self.descriptions:
            ends = [text] if text in grid.texts else re.split(r"(?<=\w)(?:\s*[-–]\s*|\s+to\s+)", text, maxsplit=1)
            for end in ends:
                if end not in grid.texts:
                    raise ValueError(
                        f"the rubric describes {text!r}: that is neither a score of the grid, which is "
                        f"{some_scores(grid.texts)}, nor a range of them, such as 0-20. Give --score_values, such as "
                        "0..100, or another rubric. A trained judge keeps the grid that it was trained on"
                    )
                place = grid.texts.index(end)
                if place < before:
                    raise ValueError(f"the rubric describes {text!r} behind a higher score: put the lowest first")
                before = place

    def prompt(self, instruction: str, response: str, reference: str | None, marker: str) -> str:
        """The judge's prompt of one response.

        Example:
            >>> rubric = Rubric("Polite?", {"1": "no", "2": "yes"}, "{criterion} {response}")
            >>> rubric.prompt("ask", "{marker}", None, "#")
            'Polite? {marker}'
        """
        if self.template is None:
            return rubric_prompt(
                instruction,
                response,
                self.criterion,
                self.descriptions,
                reference=reference,
                scale=self.scale,
                marker=marker,
            )
        filled = {
            "instruction": instruction,
            "response": response,
            "reference": reference or "",
            "criterion": self.criterion,
            "descriptions": "\n".join(f"Score {score}: {text}" for score, text in self.descriptions.items()),
            "scores": ", ".join(self.descriptions) if self.scale is None else self.scale,
            "marker": marker,
        }
        # One pass: what is filled in is text, also where it holds braces.
        return re.sub(r"\{(\w+)\}", lambda place: filled[place[1]], self.template)


@dataclass(frozen=True)
class OwnColumns:
    """Which of a user's columns is what, and the rubric that their responses are judged by.

    Attributes:
        columns: Role -> column. A role that is left out is the column of its own name, where there is one.
        rubric: Makes the prompts; None: the rows hold whole prompts.
    """

    columns: Mapping[str, str] = field(default_factory=dict)
    rubric: Rubric | None = None

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
            columns = [f"{role}={column}" for role, column in columns.items()]
        for pair in [columns] if isinstance(columns, str) else columns or []:
            role, equals, column = pair.partition("=")
            if not equals or not column or role not in ROLES:
                raise ValueError(
                    f"--columns {pair}: write role=column, the role one of {', '.join(ROLES)}, such as score=stars"
                )
            if role in named:
                raise ValueError(f"--columns names {role} twice: {named[role]} and {column}")
            named[role] = column
        return cls(named, Rubric.load(rubric) if rubric else None)

    def convert(self, record: Mapping[str, Any], scales: Scales) -> Row:
        """A record's columns under the names that are understood, its prompt written by the rubric.

        Raises:
            ValueError: A column is not there, or empty where it is needed; it is named. Or there are aspects, and a
                rubric or the columns of a single score.
        """
        grid, marker = scales.grid, scales.marker
        if scales.aspects and (self.rubric or {"score", "rationale"} & self.columns.keys()):
            raise ValueError(
                "--rubric and the columns score and rationale are for rows with one score. With aspects write prompt "
                "and completion yourself, and the gold scores into `scores`"
            )
        absent = [column for column in self.columns.values() if column not in record]
        if absent:
            raise ValueError(
                f"there is no column {', '.join(absent)}. The columns are {', '.join(sorted(map(str, record)))}"
            )
        found = {role: record[self._column(role)] for role in ROLES if record.get(self._column(role)) is not None}
        row: Row = {name: found[name] for name in _CARRIED if name in found}
        if scales.aspects and record.get("scores") is not None:
            row["scores"] = record["scores"]
        if "chosen" in found or "rejected" in found:
            return (
                row
                | {name: found[name] for name in ("chosen", "rejected", "reference") if name in found}
                | {"prompt": found.get("instruction", found.get("prompt"))}
            )
        if self.rubric is None:
            row["prompt"] = self._need(found, "prompt", record)
        else:
            self.rubric.check(grid)
            instruction = str(found.get("instruction", found.get("prompt", "")))
            response = str(self._need(found, "response", record))
            reference = None if "reference" not in found else str(found["reference"])
            row["prompt"] = self.rubric.prompt(instruction, response, reference, marker)
            row.setdefault("group", instruction or response)
        if "score" in found:
            row["score"] = self._score(found["score"], grid)
        if "completion" in found:
            row["completion"] = found["completion"]
        elif "rationale" in found:
            score = gold_score(grid.in_numbers(self._need(found, "score", record)))
            if not grid.in_range(score):
                low, high = grid.texts[0], grid.texts[-1]
                raise ScoreNotFoundError("off the range", f"the score {score:g} is not between {low} and {high}")
            row["completion"] = CompletionFormat(marker).join(str(found["rationale"]), grid.nearest_text(score))
        return row

    def _column(self, role: str) -> str:
        return self.columns.get(role, role)

    def _need(self, found: Mapping[str, Any], role: str, record: Mapping[str, Any]) -> Any:
        if role in found:
            return found[role]
        column = self._column(role)
        if column in record:
            raise ValueError(f"the column {column} ({ROLES[role]}) is empty")
        raise ValueError(
            f"no column is named for the {role} ({ROLES[role]}): add --columns {role}=COLUMN. The columns are "
            f"{', '.join(sorted(map(str, record)))}"
        )

    @staticmethod
    def _score(value: Any, grid: ScoreGrid) -> Any:
        """A number, also where a CSV file has its text; a list of annotators' scores stays one."""
        scores = annotator_scores(grid.in_numbers(value))
        return scores if isinstance(value, list | tuple) else scores[0]


def _written(score: Any) -> str:
    """A YAML key as score text: 5 and 5.0 as `5`."""
    return score_text(score) if isinstance(score, int | float) and not isinstance(score, bool) else str(score)
