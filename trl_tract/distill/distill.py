"""CoTSelfDistill: the stage-one model writes its own rationale for every training prompt.

The gold score is attached, the model's own score is never read. Knows nothing of the trainer.
"""

import logging
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from datasets import Dataset, Features, Value

from trl_tract.backends import Backend, Sampling, TransformersBackend
from trl_tract.distill.failures import Failure
from trl_tract.distill.summary import DistillSummary, read_summary
from trl_tract.distill.writing import Draft, Writer
from trl_tract.files.blocks import BlockLog, Record, Report
from trl_tract.files.fingerprint import made_by
from trl_tract.files.journal import JsonlRows, KnownRows, Rows, write_json, write_jsonl
from trl_tract.files.shards import Shard
from trl_tract.rows.golds import is_missing, mean_golds
from trl_tract.rows.rendering import as_prompt_completion, settled, written_completion
from trl_tract.rows.row import Row
from trl_tract.rows.template import Asked, Frame, Template, TemplateSettings, Thinking
from trl_tract.rows.tokens import resolve_asked
from trl_tract.saved.judge_config import JudgeConfig
from trl_tract.scale.scale import given_scales
from trl_tract.scale.text import CompletionFormat, ScoreNotFoundError
from trl_tract.sources.files import plain

__all__ = ["PROVENANCE", "CoTSelfDistill", "DistillSummary", "Rows", "read_summary"]

logger = logging.getLogger(__name__)

ON_FAILURE = ("keep_gold", "drop", "raise")
PROVENANCE = {"rationale_source": Value("string"), "finish_reason": Value("string"), "attempts": Value("int64")}
_MANY_FAILED = 0.2


class CoTSelfDistill:
    """Replace the rationales of training rows by the model's own, and keep the gold scores.

    What is finished is on disk: killed at any instant and started again with the same arguments, a run goes on. Under
    `torchrun` or `accelerate launch` the processes share the rows.

    Args:
        backend: The stage-one model.
        score_values: The score grid, in rubric units; or texts with their values.
        score_marker: Text at which a rationale ends.
        completion_format: How rationale, marker and score are joined; one space each by default.
        aspects: Where a completion has several scores: see `TRACTConfig.aspects`, in place of the three above. Each
            rationale is written behind the gold score of the aspect before it.
        num_generations: Stage-two rows for each prompt.
        temperature: Temperature at which a rationale is sampled; 0 decodes greedily.
        top_p: Nucleus sampling threshold of the rationale.
        repetition_penalty: Penalty on tokens that the prompt or the rationale has already; 1: none.
        max_new_tokens: Tokens a rationale may have.
        seed: Random seed of sampling; the same seed gives the same rationales with the transformers backend, however
            often the run was stopped and however many processes shared it.
        max_attempts: How often a rationale is sampled, each time with another seed, until nothing is wrong with it:
            see `trl_tract.distill.failures`.
        on_failure: Then: `keep_gold` keeps the annotated rationale, `drop` leaves the row out, `raise` stops. Each is
            counted in `summary.json`.
        allow_leaks: Accept rationales that state a score although the row's annotated one states none.
        keep_annotated: Put every row's annotated rationale before its self-written ones: stage two on both.
        block_size: Prompts that are generated together and then written to disk.
        chat_template_kwargs: Variables that the chat template is rendered with; those of a row go before them.
        thinking: `off`, `rationale` or `auto`: see `TRACTConfig.thinking`.
        template_date: What a chat template that asks for the date is told, YYYY-MM-DD; None: today.

    Attributes:
        scales: The scales of a completion in their order; the name of a single one is empty.

    Source of the defaults: the authors' settings, https://aclanthology.org/2025.acl-long.147
    """

    def __init__(
        self,
        backend: Backend,
        *,
        score_values: Sequence[float] | Mapping[str, float] | str = (1, 2, 3, 4, 5),
        score_marker: str = "[RESULT]",
        completion_format: CompletionFormat | None = None,
        aspects: Mapping[str, Mapping[str, Any]] | str | None = None,
        num_generations: int = 1,
        temperature: float = 1.0,
        top_p: float = 0.9,
        repetition_penalty: float = 1.03,
        max_new_tokens: int = 1024,
        seed: int = 42,
        max_attempts: int = 3,
        on_failure: str = "keep_gold",
        allow_leaks: bool = False,
        keep_annotated: bool = False,
        block_size: int = 64,
        chat_template_kwargs: Mapping[str, Any] | None = None,
        thinking: Thinking = "auto",
        template_date: str | None = None,
    ) -> None:
        if on_failure not in ON_FAILURE:
            raise ValueError(f"on_failure={on_failure!r} is unknown: choose one of {', '.join(ON_FAILURE)}")
        for name, count in (("num_generations", num_generations), ("max_attempts", max_attempts)):
            if count < 1:
                raise ValueError(f"{name}={count} must be 1 or more")
        self.backend = backend
        self.scales = given_scales(score_values, completion_format or CompletionFormat(score_marker), aspects)
        self.num_generations = num_generations
        self.sampling = Sampling(
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            top_p=top_p,
            repetition_penalty=repetition_penalty,
        )
        self.sampling.check(num_generations, self.scales[0].marker)
        self.seed = seed
        self.max_attempts = max_attempts
        self.on_failure = on_failure
        self.allow_leaks = allow_leaks
        self.keep_annotated = keep_annotated
        self.block_size = block_size
        self.template = Template(
            backend.tokenizer, TemplateSettings(chat_template_kwargs or {}, thinking, template_date)
        )
        self._tokens_found = False

    @classmethod
    def from_pretrained(
        cls, path: str | Path, backend: Backend | None = None, *, revision: str | None = None, **settings: Any
    ) -> "CoTSelfDistill":
        """The stage-one model at `path`, with the grid and the format that it was trained with.

        Args:
            path: Model or adapter directory, or hub id, with a `tract_config.json`.
            backend: What generates; `TransformersBackend(path)` by default.
            revision: Branch, tag or commit of a hub id; a `backend` of your own is loaded at its own.
            **settings: Other arguments of the class.
        """
        config = JudgeConfig.load(path, revision)
        if not config.writes_rationale:
            raise ValueError(f"{path} was trained with drop_rationale=True, so it has no rationales to write")
        trained = {**config.arguments, **config.template.arguments}
        distiller = cls(backend or TransformersBackend(str(path), revision=revision), **{**trained, **settings})
        distiller.scales, distiller._tokens_found = config.scales, True
        return distiller

    def distill(self, dataset: Dataset, output_dir: str | Path) -> Dataset:
        """Write a rationale for every row.

        `output_dir` receives the rationales in `blocks/` as they are produced, and in the end `rows.jsonl` (the
        stage-two rows) and `summary.json`.

        Args:
            dataset: Training rows: `prompt`, `completion`, `score`, or `messages`.
            output_dir: Holds one run; another run's directory is refused.

        Returns:
            The rows with new completions, the same columns, and `rationale_source` (`self` or `annotated`),
            `finish_reason` (`stop`, or why the last attempt failed) and `attempts`.

        Raises:
            ValueError: A row has no gold score or no prompt; or, with `on_failure="raise"`, the chat template refuses
                its prompt. It is named, before anything is generated.
            FileExistsError: `output_dir` holds another run.
            OSError: The disk is full; what was written stays, and the run can be continued.
            RuntimeError: Another process is at work in `output_dir`; or, with `on_failure="raise"`, a rationale failed
                in all its attempts.
        """
        if not isinstance(dataset, Dataset):
            raise TypeError(f"dataset is a {type(dataset).__name__}: make it a Dataset, as in Dataset.from_list(rows)")
        if not len(dataset):
            raise ValueError("the dataset holds no rows")
        times = next((name for name, kind in dataset.features.items() if re.search(r"time(32|64)\[", str(kind))), None)
        if times is not None:  # Arrow makes dates of their text, but no times of day
            raise ValueError(f"the column {times} holds times of day: leave it out, or make it text")
        directory = Path(output_dir)
        self._distill(dataset, directory, None)
        features = Features({**dataset.features, **PROVENANCE})
        rows: Dataset = Dataset.from_json(
            str(directory / "rows.jsonl"), features=features, cache_dir=str(directory / "cache")
        )
        return rows

    def distill_file(self, data: str | Path, output_dir: str | Path, *, shard: Shard | None = None) -> Path | None:
        """Like `distill`, for a JSONL file of any size: its rows are read when their turn comes.

        Args:
            data: JSONL of training rows.
            output_dir: Holds one run.
            shard: This job's share of the rows, for an array of jobs; by default this process's share under a launcher.

        Returns:
            `rows.jsonl` in `output_dir`; None if other shards still have to be done.

        Raises:
            ValueError, FileExistsError, OSError, RuntimeError: As in `distill`.
        """
        directory = Path(output_dir)
        finished = self._distill(JsonlRows(Path(data)), directory, shard)
        return directory / "rows.jsonl" if finished else None

    @staticmethod
    def push_to_hub(output_dir: str | Path, repo_id: str, **options: Any) -> str:
        """Upload the rows of a finished self-distillation as a dataset, with a card that says how they came about.

        Args:
            output_dir: What `distill` was given. `rows.jsonl` and `summary.json` are uploaded.
            repo_id: `user/name`; made if it does not exist.
            **options: `source`, hub id or words for where the annotated rows come from; `model`, hub id of the model
                that wrote the rationales; `license`, which is yours to choose, and none by default; `private`, True
                unless you say otherwise; `token`, `revision` (a branch) and `commit_message`.

        Returns:
            The repository's address.

        Raises:
            FileNotFoundError: The self-distillation is not finished.
            ValueError: The repository exists and is public, and `private=False` was not given.
        """
        from trl_tract.saved.hub import push_rows

        return push_rows(Path(output_dir), repo_id, **options)

    def _distill(self, rows: Rows, directory: Path, shard: Shard | None) -> bool:
        rendered = settled(self.backend.tokenizer, self.template.settings, rows)
        self.template = Template(self.backend.tokenizer, rendered)
        refused: dict[int, str] = {}
        known = KnownRows(rows, lambda row, number: self._check(row, number, refused))
        self._tell_of(refused, len(known))
        settings = {**self._settings(), **made_by(self.backend)}
        log = BlockLog(directory, settings, "self-distillation", rows=known, block_size=self.block_size, shard=shard)

        def write(records: Iterator[Record]) -> None:
            summary = DistillSummary(len(known), len(known) * self.num_generations)
            write_jsonl(directory / "rows.jsonl", self._stage_two_rows(known, records, summary))
            write_json(directory / "summary.json", summary.to_dict())
            if sum(summary.failed.values()) > _MANY_FAILED * summary.rationales:
                logger.warning("many rationales failed:\n%s", summary)

        return log.run(
            self._block,
            write,
            ("rows.jsonl", "summary.json"),
            max_calls=self.backend.max_calls,
            cancel=getattr(self.backend, "cancel", None),  # a double of a user's own need not have it
        )

    def _settings(self) -> dict[str, Any]:
        return {
            "model": self.backend.model_id,
            "backend": self.backend.name,
            **self._scale_settings(),
            **self._template_settings(),
            "num_generations": self.num_generations,
            **asdict(self.sampling),
            "seed": self.seed,
            "max_attempts": self.max_attempts,
            "on_failure": self.on_failure,
            "allow_leaks": self.allow_leaks,
            "keep_annotated": self.keep_annotated,
        }

    def _template_settings(self) -> dict[str, Any]:
        """What differs from templates without settings, so that runs from before there were any go on."""
        return {
            name: value for name, value in self.template.settings.arguments.items() if value not in ({}, "off", None)
        }

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
            raise ValueError(f"row {number} has no prompt: its columns are {', '.join(sorted(row))}")
        keeps_completions = self.on_failure == "keep_gold" or self.keep_annotated
        if keeps_completions and is_missing(pair.get("completion")):
            raise ValueError(
                f"row {number} has no completion to keep if its rationale fails: set on_failure to 'drop' or 'raise'"
            )
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
            raise ValueError(f"{told}. Fix these rows, or set on_failure to 'keep_gold' or 'drop'")
        kept = "leaves them out" if self.on_failure == "drop" else "keeps their annotated rationales"
        logger.warning("%s: on_failure=%r %s", told, self.on_failure, kept)

    def _golds(self, row: Mapping[str, Any], number: int) -> list[str]:
        """The gold scores of a row as they are written: each scale's nearest text."""
        try:
            golds = mean_golds(row, self.scales)
            if golds is None:
                raise ScoreNotFoundError("no score", "there is neither a score nor a completion")
        except ScoreNotFoundError as error:
            raise ValueError(f"row {number} has no gold score: {error}") from error
        return [scale.grid.nearest_text(gold) for scale, gold in zip(self.scales, golds, strict=True)]

    def _block(self, rows: Sequence[Row], start: int, report: Report) -> list[Record]:
        """What became of the rationales of a block of rows."""
        pairs = [as_prompt_completion(row) for row in rows]
        golds = [self._golds(row, start + number) for number, row in enumerate(rows)]
        self._find_tokens(pairs)
        slots = [(number, sample) for number in range(len(rows)) for sample in range(self.num_generations)]
        asked = [self._asked(pair) for pair in pairs]
        drafts = [Draft(pairs[number], asked[number], golds[number]) for number, _ in slots]
        writer = Writer(
            self.backend,
            self.template,
            self.scales,
            self.sampling,
            num_generations=self.num_generations,
            seed=self.seed,
            max_attempts=self.max_attempts,
            allow_leaks=self.allow_leaks,
        )
        writer.write(drafts, start, report)
        records: list[Record] = []
        for (number, sample), draft in zip(slots, drafts, strict=True):
            rationales = draft.rationales if len(draft.rationales) == len(self.scales) else None
            if rationales is None and self.on_failure == "raise":
                raise RuntimeError(
                    f"row {start + number}: no usable rationale in {len(draft.failures)} attempts "
                    f"({', '.join(draft.failures)}). Raise max_new_tokens or max_attempts, or set on_failure to "
                    "'keep_gold' or 'drop'"
                )
            records.append(
                {"row": start + number, "sample": sample, "rationales": rationales, "failures": draft.failures}
            )
        return records

    def _asked(self, pair: Row) -> Asked | None:
        """A prompt as the model is asked; None where the chat template refuses it."""
        try:
            return self.template.ask(pair)
        except ScoreNotFoundError:
            return None

    def _find_tokens(self, pairs: Sequence[Row]) -> None:
        """Look up the scores' tokens, behind which rationales are written, unless they are those of the training."""
        for pair in pairs:
            if self._tokens_found:
                return
            try:
                grids = [here.grid for here in resolve_asked(self.template, pair, self.scales)]
            except ScoreNotFoundError:
                continue  # its draft says so
            self.scales = tuple(replace(scale, grid=grid) for scale, grid in zip(self.scales, grids, strict=True))
            self._tokens_found = True

    def _stage_two_rows(self, rows: Rows, records: Iterator[Record], summary: DistillSummary) -> Iterator[Row]:
        for record in records:
            number: int = record["row"]
            failures: list[Failure] = record["failures"]
            row: Row = plain(rows[number])
            rationales: list[str] | None = record["rationales"]
            attempts = len(failures) + (rationales is not None)
            provenance = {"finish_reason": "stop", "attempts": attempts}
            if self.keep_annotated and record["sample"] == 0:
                summary.annotated += 1
                yield {**row, "rationale_source": "annotated", "finish_reason": None, "attempts": 0}
            summary.resampled += attempts > 1
            for failure, count in Counter(failures).items():
                summary.attempts_failed[failure] += count
            if rationales is not None:
                summary.self_written += 1
                pieces = list(zip(rationales, self._golds(row, number), strict=True))
                asked = self._asked(as_prompt_completion(row))
                frame = Frame() if asked is None else asked.frame
                _replace_completion(row, written_completion(frame, self.scales, pieces))
                yield {**row, "rationale_source": "self", **provenance}
                continue
            last = failures[-1]
            summary.failed[last] += 1
            # With both kinds of rationale the annotated one is there already.
            if self.on_failure == "drop" or self.keep_annotated:
                summary.dropped += 1
            else:
                summary.annotated += 1
                yield {**row, "rationale_source": "annotated", **provenance, "finish_reason": last}


def _replace_completion(row: Row, text: str) -> None:
    """Put `text` where the row's type has its completion."""
    turn = {"role": "assistant", "content": text}
    for column in ("messages", "conversations"):
        if column in row:
            last = row[column][-1]
            row[column] = [*row[column][:-1], {"from": last["from"], "value": text} if "from" in last else turn]
            return
    row["completion"] = text if isinstance(row["prompt"], str) else [turn]
