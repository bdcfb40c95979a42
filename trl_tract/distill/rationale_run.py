"""RationaleRun: rows -> rows with rationales that a model wrote, on disk as they come about.

What self-distillation and the bootstrap share: rows are looked at first, done in blocks that outlive their process, and
written as one file. Knows nothing of which rationales are wanted.
"""

import logging
import re
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, ClassVar, Protocol

from datasets import Dataset, Features

from trl_tract.backends import Sampling
from trl_tract.files.blocks import BlockLog, Record, Report
from trl_tract.files.fingerprint import made_by
from trl_tract.files.journal import JsonlRows, KnownRows, Rows, write_json, write_jsonl
from trl_tract.files.shards import Shard
from trl_tract.rows.golds import check_labels, is_missing, mean_golds
from trl_tract.rows.rendering import as_prompt_completion, settled
from trl_tract.rows.row import Row
from trl_tract.rows.template import Asked, Template, TemplateSettings
from trl_tract.rows.tokens import resolve_asked
from trl_tract.scale.scale import Scale
from trl_tract.scale.text import ScoreNotFoundError
from trl_tract.sources.files import plain

logger = logging.getLogger(__name__)

RESULT = ("rows.jsonl", "summary.json")


class Summary(Protocol):
    """What became of the rationales; printed, it is a table."""

    @property
    def many_failed(self) -> bool:
        """Whether so many failed that it is said."""
        ...

    def to_dict(self) -> dict[str, Any]:
        """All counts by name, ready for JSON."""
        ...


class RationaleRun(ABC):
    """What is finished is on disk: killed at any instant and started again with the same arguments, a run goes on."""

    what: ClassVar[str]
    columns: Features
    """What is added to the rows."""
    on_failure_now: ClassVar[Mapping[str, str]]

    def __init__(
        self,
        backend: Any,
        scales: tuple[Scale, ...],
        sampling: Sampling,
        *,
        num_generations: int,
        seed: int,
        on_failure: str,
        block_size: int,
        template: TemplateSettings,
    ) -> None:
        if num_generations < 1:
            raise ValueError(f"num_generations={num_generations} must be 1 or more")
        sampling.check(num_generations, scales[0].marker)
        if on_failure not in self.on_failure_now:
            raise ValueError(f"on_failure={on_failure!r} is unknown: choose one of {', '.join(self.on_failure_now)}")
        self.backend = backend
        self.scales = scales
        self.sampling = sampling
        self.num_generations = num_generations
        self.seed = seed
        self.on_failure = on_failure
        self.block_size = block_size
        # A chat endpoint has a template, but does not show it.
        self.template = None if backend.tokenizer is None else Template(backend.tokenizer, template)
        self._tokens_found = False

    def _of_dataset(self, dataset: Dataset, output_dir: str | Path) -> Dataset:
        if not isinstance(dataset, Dataset):
            raise TypeError(f"dataset is a {type(dataset).__name__}. Make it a Dataset, as in Dataset.from_list(rows)")
        if not len(dataset):
            raise ValueError("the dataset is empty")
        check_labels(dataset)
        times = next((name for name, kind in dataset.features.items() if re.search(r"time(32|64)\[", str(kind))), None)
        if times is not None:  # Arrow makes dates of their text, but no times of day
            raise ValueError(f"the column {times} holds times of day. Leave the column out, or convert it to text")
        directory = Path(output_dir)
        self._run(dataset, directory, None)
        features = Features({**dataset.features, **self._added(dataset.features)})
        file = directory / "rows.jsonl"
        if not file.stat().st_size:  # every row was dropped: the host reads no empty file
            return Dataset.from_dict({name: [] for name in features}, features=features)
        rows: Dataset = Dataset.from_json(str(file), features=features, cache_dir=str(directory / "cache"))
        return rows

    def _of_file(self, data: str | Path, output_dir: str | Path, shard: Shard | None) -> Path | None:
        directory = Path(output_dir)
        return directory / "rows.jsonl" if self._run(JsonlRows(Path(data)), directory, shard) else None

    def _run(self, rows: Rows, directory: Path, shard: Shard | None) -> bool:
        self.settle(rows)
        refused: dict[int, str] = {}
        known = KnownRows(rows, lambda row, number: self._check(row, number, refused))
        self._tell_of(refused, len(known))
        log = BlockLog(directory, self.made_with(), self.what, rows=known, block_size=self.block_size, shard=shard)
        self._begin(log)

        def write(records: Iterator[Record]) -> None:
            summary, written = self._written(known, records)
            write_jsonl(directory / "rows.jsonl", written)
            write_json(directory / "summary.json", summary.to_dict())
            if summary.many_failed:
                logger.warning("many rationales failed:\n%s", summary)

        return log.run(
            self.block,
            write,
            RESULT,
            max_calls=self.backend.max_calls,
            cancel=getattr(self.backend, "cancel", None),  # a double of a user's own need not have it
        )

    def settle(self, rows: Rows) -> dict[str, Any]:
        """Decide what these rows leave open of the template's settings; the arguments that say the same."""
        if self.template is None:
            return {}
        rendered = settled(self.template.tokenizer, self.template.settings, rows)
        self.template = Template(self.template.tokenizer, rendered)
        return rendered.arguments

    def made_with(self) -> dict[str, Any]:
        """All that the result depends on besides the rows, as settings."""
        return {**self._settings(), **made_by(self.backend)}

    @abstractmethod
    def _added(self, features: Mapping[str, Any]) -> Mapping[str, Any]:
        """Columns that a dataset with these features gets, with their types."""

    @abstractmethod
    def _own_settings(self) -> dict[str, Any]:
        """Arguments that change the result, besides those that all runs have."""

    @abstractmethod
    def block(self, rows: Sequence[Row], start: int, report: Report) -> list[Record]:
        """What became of the rationales of a block of rows, the first of which is number `start`."""

    @abstractmethod
    def _written(self, rows: Rows, records: Iterator[Record]) -> tuple[Summary, Iterator[Row]]:
        """The rows of the result, and the summary that is complete once they have been gone through."""

    def _needs_completion(self) -> bool:
        """Whether a row without a completion is refused."""
        return False

    def _begin(self, log: BlockLog) -> None:
        """Called before the first block is done."""
        return

    def _settings(self) -> dict[str, Any]:
        return {
            "model": self.backend.model_id,
            "backend": self.backend.name,
            **self._scale_settings(),
            **self._template_settings(),
            "num_generations": self.num_generations,
            **asdict(self.sampling),
            "seed": self.seed,
            "on_failure": self.on_failure,
            **self._own_settings(),
        }

    def _template_settings(self) -> dict[str, Any]:
        """What differs from templates without settings, so that runs from before there were any go on."""
        arguments = {} if self.template is None else self.template.settings.arguments
        return {name: value for name, value in arguments.items() if value not in ({}, "off", None)}

    def _scale_settings(self) -> dict[str, Any]:
        if len(self.scales) > 1:
            return {"aspects": {scale.name: scale.to_dict() for scale in self.scales}}
        (scale,) = self.scales
        values, texts = list(scale.grid.values), list(scale.grid.texts)
        return {"score_values": values, "score_texts": texts, "format": scale.format.to_dict()}

    def _check(self, row: Row, number: int, refused: dict[int, str]) -> None:
        """Look at what a row needs; `refused` receives the prompts that a chat template refuses."""
        for name, cell in row.items():
            try:
                plain(cell)
            except TypeError as error:
                raise ValueError(f"row {number}: the column {name} {error}: leave it out, or make it text") from error
        self._golds(row, number)
        try:
            pair = as_prompt_completion(row)
        except ScoreNotFoundError as error:
            raise ValueError(f"row {number}: {error}") from error
        if is_missing(pair.get("prompt")):
            raise ValueError(f"row {number} has no prompt. Its columns are {', '.join(sorted(row))}")
        if self._needs_completion() and is_missing(pair.get("completion")):
            raise ValueError(
                f"row {number} has no completion to keep if its rationale fails. Set on_failure to 'drop' or 'raise'"
            )
        if self.template is not None:
            try:
                self.template.ask(pair)
            except ScoreNotFoundError as error:
                refused[number] = str(error)

    def _tell_of(self, refused: Mapping[int, str], count: int) -> None:
        if not refused:
            return
        number, reason = next(iter(refused.items()))
        told = f"the chat template refuses {len(refused)} of {count} prompts (first: row {number}: {reason})"
        if self.on_failure == "raise" or len(refused) == count:
            others = " or ".join(repr(other) for other in self.on_failure_now if other != "raise")
            raise ValueError(f"{told}. Fix these rows, or set on_failure to {others}")
        logger.warning("%s: on_failure=%r %s", told, self.on_failure, self.on_failure_now[self.on_failure])

    def _golds(self, row: Mapping[str, Any], number: int) -> list[float]:
        """The gold score of a row on each scale: the mean of its annotators', rubric units."""
        try:
            golds = mean_golds(row, self.scales)
            if golds is None:
                raise ScoreNotFoundError("no score", "it has neither a score nor a completion")
        except ScoreNotFoundError as error:
            raise ValueError(f"row {number} has no gold score: {error}") from error
        return golds

    def _texts(self, golds: Sequence[float]) -> list[str]:
        """Gold scores as they are written: each scale's nearest text."""
        return [scale.grid.nearest_text(gold) for scale, gold in zip(self.scales, golds, strict=True)]

    def _asked(self, pair: Row) -> Asked | None:
        """A prompt as the model is asked; None where the chat template refuses it, or is not known."""
        try:
            return None if self.template is None else self.template.ask(pair)
        except ScoreNotFoundError:
            return None

    def _find_tokens(self, pairs: Sequence[Row]) -> None:
        """Look up the scores' tokens, behind which rationales are written, unless they are those of the training."""
        for pair in pairs:
            if self._tokens_found or self.template is None:
                return
            try:
                grids = [here.grid for here in resolve_asked(self.template, pair, self.scales)]
            except ScoreNotFoundError:
                continue  # its draft says so
            self.scales = tuple(replace(scale, grid=grid) for scale, grid in zip(self.scales, grids, strict=True))
            self._tokens_found = True


def replace_completion(row: Row, text: str) -> None:
    """Put `text` where the row's type has its completion."""
    turn = {"role": "assistant", "content": text}
    for column in ("messages", "conversations"):
        if column in row:
            *before, last = row[column]
            if as_prompt_completion({column: [last], "score": 0}).get("completion") is None:  # not the judge's turn
                before, last = row[column], {name: "gpt" if name == "from" else "" for name in last}
            row[column] = [*before, {"from": last["from"], "value": text} if "from" in last else turn]
            return
    row["completion"] = text if isinstance(row["prompt"], str) else [turn]
