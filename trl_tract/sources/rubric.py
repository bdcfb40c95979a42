"""A user's own rubric: the scores it describes, and the prompts it makes. Knows nothing of rows, files or models."""

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from trl_tract.scale.grid import ScoreGrid
from trl_tract.scale.text import score_text, some_scores
from trl_tract.sources.prompts import ORDERS, rubric_prompt

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
        order: Of the prompt's parts, where there is no template; see `rubric_prompt`. None, as where a file has none:
            `standard`; but see `to_train_on` and `asked_of`.
    """

    criterion: str
    descriptions: Mapping[str, str]
    template: str | None = None
    scale: str | None = None
    order: str | None = None

    @classmethod
    def load(cls, path: str | Path) -> "Rubric":
        """Read a YAML file with `criterion`, `scores` (score: description), and `scale`, `order`, `template` if wanted.

        Raises:
            FileNotFoundError: No such file.
            ValueError: It is not YAML, or lacks something, or has something that is not understood.
        """
        import yaml

        try:
            text = Path(path).read_text(encoding="utf-8")
            content, as_written = yaml.safe_load(text), _as_written(yaml.compose(text, yaml.BaseLoader))
        except FileNotFoundError as error:
            raise FileNotFoundError(f"--rubric {path}: no such file") from error
        except (yaml.YAMLError, ValueError, RecursionError) as error:
            raise ValueError(f"--rubric {path} cannot be read as YAML: {' '.join(str(error).split())}") from error
        wanted = (
            "a rubric is a YAML file with `criterion: text` and `scores:`, followed by indented lines `1: text`, "
            "`2: text` and so on"
        )
        if not isinstance(content, dict) or not {"criterion", "scores"} <= content.keys():
            raise ValueError(f"--rubric {path}: {wanted}")
        unknown = sorted(map(str, content.keys() - {"criterion", "scores", "scale", "template", "order"}))
        if unknown:
            raise ValueError(
                f"--rubric {path}: {', '.join(unknown)} is not a known field; {wanted}. Optional fields: `scale: "
                "text`, `order: standard` and `template: text`"
            )
        if not isinstance(content["scores"], dict) or len(as_written["scores"]) < 2:
            raise ValueError(f"--rubric {path}: `scores` must describe at least two scores; {wanted}")
        if len(content["scores"]) < len(as_written["scores"]):
            raise ValueError(
                f"--rubric {path}: under `scores`, YAML reads two scores as the same key. Put them in quotes"
            )
        described = {
            _written(path, raw, score): text
            for (raw, text), score in zip(as_written["scores"].items(), content["scores"], strict=True)
        }
        for name, told in {**described, **as_written, "scores": "described"}.items():
            if not isinstance(told, str) or not told.strip():
                raise ValueError(f"--rubric {path}: {name} has no text; {wanted}")
        template, scale = as_written.get("template"), as_written.get("scale")
        scale, order = (None if each is None else each.strip() for each in (scale, as_written.get("order")))
        rubric = cls(as_written["criterion"], described, template, scale, order)
        rubric._check_template(path)
        return rubric

    def _check_template(self, path: str | Path) -> None:
        if self.order not in (None, *ORDERS):
            raise ValueError(f"--rubric {path}: order {self.order!r} is unknown; it is {' or '.join(ORDERS)}")
        if self.template is None:
            return
        if self.order is not None:
            raise ValueError(f"--rubric {path}: `template` sets its own order. Leave `order` out")
        places = re.findall(r"\{(\w+)\}", str(self.template))
        unknown = sorted(set(places) - set(_PLACES))
        if unknown or "response" not in places:
            wrong = f"{{{unknown[0]}}} is not understood" if unknown else "it has no placeholder for the {response}"
            known = ", ".join(f"{{{place}}}" for place in _PLACES)
            raise ValueError(f"--rubric {path}: in `template`, {wrong}. Placeholders are: {known}")

    def to_train_on(self) -> "Rubric":
        """The rubric as a judge is trained on it: where it has no order, with the response last.

        Judges agreed better with people in this order, and prompts share more tokens (docs/benchmarks.md).
        """
        return self._ordered("shared-first")

    def asked_of(self, trained_with: "Rubric | None") -> "Rubric":
        """The rubric as a trained judge is asked by it: where it has no order, in the one that the judge knows.

        Args:
            trained_with: The judge's own rubric. None: its prompts were others, most likely Feedback Collection's.
        """
        return self._ordered("standard" if trained_with is None else trained_with.order)

    def _ordered(self, order: str | None) -> "Rubric":
        return self if self.order is not None or self.template is not None else replace(self, order=order)

    def check(self, grid: ScoreGrid) -> None:
        """Refuse a rubric that describes other scores than the grid has."""
        described, known = list(self.descriptions), list(grid.texts)
        if self.scale is not None:
            self._check_some(grid)
        elif described != known:
            if sorted(described) == sorted(known):
                raise ValueError(
                    f"the rubric describes the scores in the order {described}. Write them in the order {known}"
                )
            numeric = all(re.fullmatch(r"[-+]?\d+(\.\d+)?", text) for text in described)
            options = f"--score_values {' '.join(described)}" if numeric else "--score_values and --score_texts"
            scale = ""
            if set(described) < set(known):
                some = f"any score from {known[0]} to {known[-1]}"
                scale = f". If the rubric describes only some scores, add `scale: {some}` to it"
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
                        f"the rubric describes {text!r}: that is neither a score of the grid "
                        f"({some_scores(grid.texts)}) nor a range of scores, such as 0-20. Give --score_values, such "
                        "as 0..100, or another rubric. A trained judge keeps the grid that it was trained on"
                    )
                place = grid.texts.index(end)
                if place < before:
                    raise ValueError(f"the rubric describes {text!r} after a higher score. Put the lowest score first")
                before = place

    def shows(self, place: str) -> bool:
        """Whether prompts have a place, such as `reference`."""
        return self.template is None or f"{{{place}}}" in self.template

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
                order=self.order or "standard",
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


def _as_written(node: Any) -> Any:
    """A YAML node as its characters, whatever YAML makes of `yes` and `2.50`; None for a list."""
    if not isinstance(node.value, list):
        return node.value
    if node.id != "mapping":
        return None
    written = {str(key.value): _as_written(value) for key, value in node.value}
    if len(written) < len(node.value):
        raise ValueError("a key appears twice in it")
    return written


def _written(path: str | Path, raw: str, score: Any) -> str:
    """A YAML key as score text: 5 and 5.0 as `5`; what YAML makes something else of is refused."""
    if isinstance(score, str):
        return score
    if isinstance(score, bool) or not isinstance(score, int | float) or str(score) != raw:
        raise ValueError(f'--rubric {path}: under `scores`, YAML reads {raw} as {score}. Put it in quotes: "{raw}"')
    return score_text(score)
