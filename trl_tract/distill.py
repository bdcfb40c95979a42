"""CoTSelfDistill: the stage-one model writes its own rationale for every training prompt.

The gold score is attached, the model's own score is never read. Knows nothing of the trainer.
"""

import json
import logging
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Protocol

from datasets import Dataset, Features, Value

from trl_tract.backends import Backend, Generation, Sampling, TransformersBackend
from trl_tract.blocks import BlockLog, Record, Report, Shard
from trl_tract.failures import FAILURES, Failure, rationale_failure, stated_score
from trl_tract.journal import JsonlRows, digest, write_json, write_jsonl
from trl_tract.judge_config import JudgeConfig
from trl_tract.prompts import CompletionFormat, Row, ScoreNotFoundError, gold_score, locate_score
from trl_tract.rendering import as_prompt_completion, completion_text, prompt_ids
from trl_tract.scores import ScoreGrid

logger = logging.getLogger(__name__)

ON_FAILURE = ("keep_gold", "drop", "raise")
PROVENANCE = {"rationale_source": Value("string"), "finish_reason": Value("string"), "attempts": Value("int64")}
_MANY_FAILED = 0.2


class Rows(Protocol):
    """Rows by number: a `Dataset`, `JsonlRows`, a list."""

    def __len__(self) -> int: ...
    def __getitem__(self, index: int, /) -> Any: ...
    def __iter__(self) -> Iterator[Any]: ...


@dataclass
class DistillSummary:
    """What became of the rationales of a self-distillation; printed, it is a table. `summary.json` holds the same.

    Attributes:
        rows: Training rows.
        rationales: Asked for: rows times `num_generations`.
        self_written: Rationales of the model's own among the stage-two rows.
        annotated: Annotated rationales among them.
        dropped: Rationales that failed and left no row.
        resampled: Rationales that took more than one attempt.
        failed: How often the last attempt failed, by reason.
        attempts_failed: How often any attempt failed, by reason.
    """

    rows: int
    rationales: int
    self_written: int = 0
    annotated: int = 0
    dropped: int = 0
    resampled: int = 0
    failed: dict[str, int] = field(default_factory=lambda: dict.fromkeys(FAILURES, 0))
    attempts_failed: dict[str, int] = field(default_factory=lambda: dict.fromkeys(FAILURES, 0))

    def to_dict(self) -> dict[str, Any]:
        """All attributes by name."""
        return asdict(self)

    def __str__(self) -> str:
        counts = {
            "rows": self.rows,
            "rationales asked for": self.rationales,
            "self-written": self.self_written,
            "annotated": self.annotated,
            "dropped": self.dropped,
            "sampled more than once": self.resampled,
        }
        lines = [f"{name:24}{count:>10,}" for name, count in counts.items()]
        lines.append(f"{'failed':24}{'at last':>10}{'attempts':>10}")
        lines += [f"  {name:22}{self.failed[name]:>10,}{self.attempts_failed[name]:>10,}" for name in FAILURES]
        return "\n".join(lines)


def read_summary(directory: Path) -> DistillSummary:
    """The summary of a finished self-distillation."""
    return DistillSummary(**json.loads((directory / "summary.json").read_text(encoding="utf-8")))


class CoTSelfDistill:
    """Replace the rationales of training rows by the model's own, and keep the gold scores.

    What is finished is on disk: killed at any instant and started again with the same arguments, a run goes on. Under
    `torchrun` or `accelerate launch` the processes share the rows.

    Args:
        backend: The stage-one model.
        score_values: The score grid, in rubric units; or texts with their values.
        score_marker: Text at which a rationale ends.
        completion_format: How rationale, marker and score are joined; one space each by default.
        num_generations: Stage-two rows for each prompt.
        temperature: Of sampling.
        top_p: Of sampling.
        repetition_penalty: Of sampling.
        max_new_tokens: Tokens a rationale may have.
        seed: Of sampling; the same seed gives the same rationales with the transformers backend, however often the run
            was stopped and however many processes shared it.
        max_attempts: How often a rationale is sampled, each time with another seed, until nothing is wrong with it:
            see `trl_tract.failures`.
        on_failure: Then: `keep_gold` keeps the annotated rationale, `drop` leaves the row out, `raise` stops. Each is
            counted in `summary.json`.
        allow_leaks: Accept rationales that state a score although the row's annotated one states none.
        keep_annotated: Put every row's annotated rationale before its self-written ones: stage two on both.
        block_size: Prompts that are generated together and then written to disk.

    Source of the defaults: the authors' settings, https://aclanthology.org/2025.acl-long.147
    """

    def __init__(
        self,
        backend: Backend,
        *,
        score_values: Sequence[float] | Mapping[str, float] = (1, 2, 3, 4, 5),
        score_marker: str = "[RESULT]",
        completion_format: CompletionFormat | None = None,
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
    ) -> None:
        if on_failure not in ON_FAILURE:
            raise ValueError(f"on_failure={on_failure!r} is unknown: choose one of {', '.join(ON_FAILURE)}")
        for name, count in (("num_generations", num_generations), ("max_attempts", max_attempts)):
            if count < 1:
                raise ValueError(f"{name}={count} must be 1 or more")
        self.backend = backend
        self.grid = ScoreGrid.from_values(score_values)
        self.format = completion_format or CompletionFormat(score_marker)
        self.num_generations = num_generations
        self.sampling = Sampling(
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            top_p=top_p,
            repetition_penalty=repetition_penalty,
        )
        self.sampling.check(num_generations, self.format.marker)
        self.seed = seed
        self.max_attempts = max_attempts
        self.on_failure = on_failure
        self.allow_leaks = allow_leaks
        self.keep_annotated = keep_annotated
        self.block_size = block_size
        self._stated_score = stated_score(self.grid.texts)

    @classmethod
    def from_pretrained(cls, path: str | Path, backend: Backend | None = None, **settings: Any) -> "CoTSelfDistill":
        """The stage-one model at `path`, with the grid and the format that it was trained with.

        Args:
            path: Model or adapter directory, or hub id, with a `tract_config.json`.
            backend: What generates; `TransformersBackend(path)` by default.
            **settings: Other arguments of the class.
        """
        config = JudgeConfig.load(path)
        config.check_single_score(path)
        if not config.writes_rationale:
            raise ValueError(f"{path} was trained with drop_rationale=True, so it has no rationales to write")
        return cls(
            backend or TransformersBackend(str(path)),
            score_values=dict(zip(config.grid.texts, config.grid.values, strict=True)),
            completion_format=config.format,
            **settings,
        )

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
            ValueError: A row has no gold score; it is named, before anything is generated.
            FileExistsError: `output_dir` holds another run.
            OSError: The disk is full; what was written stays, and the run can be continued.
            RuntimeError: Another process is at work in `output_dir`; or, with `on_failure="raise"`, a rationale failed
                in all its attempts.
        """
        if not isinstance(dataset, Dataset):
            raise TypeError(f"dataset is a {type(dataset).__name__}: make it a Dataset, as in Dataset.from_list(rows)")
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

    def _distill(self, rows: Rows, directory: Path, shard: Shard | None) -> bool:
        settings = {**self._settings(), "rows_digest": digest(self._checked(rows))}
        log = BlockLog(
            directory, settings, "self-distillation", rows=len(rows), block_size=self.block_size, shard=shard
        )

        def write(records: Iterator[Record]) -> None:
            summary = DistillSummary(len(rows), len(rows) * self.num_generations)
            write_jsonl(directory / "rows.jsonl", self._stage_two_rows(rows, records, summary))
            write_json(directory / "summary.json", summary.to_dict())  # last: where it stands, the run is over
            if sum(summary.failed.values()) > _MANY_FAILED * summary.rationales:
                logger.warning("many rationales failed:\n%s", summary)

        return log.run(
            lambda numbers, report: self._block([rows[i] for i in numbers], numbers.start, report),
            directory / "summary.json",
            write,
            max_calls=self.backend.max_calls,
            cancel=getattr(self.backend, "cancel", None),
        )

    def _settings(self) -> dict[str, Any]:
        return {
            "model": self.backend.model_id,
            "backend": self.backend.name,
            "score_values": list(self.grid.values),
            "score_texts": list(self.grid.texts),
            "format": self.format.to_dict(),
            "num_generations": self.num_generations,
            **asdict(self.sampling),
            "seed": self.seed,
            "max_attempts": self.max_attempts,
            "on_failure": self.on_failure,
            "allow_leaks": self.allow_leaks,
            "keep_annotated": self.keep_annotated,
        }

    def _checked(self, rows: Rows) -> Iterator[Row]:
        for number, row in enumerate(rows):
            self._gold(row, number)
            yield row

    def _gold(self, row: Mapping[str, Any], number: int) -> float:
        """The gold score of a row: its `score`, or the one in its completion."""
        try:
            pair = as_prompt_completion(row)
            if row.get("scores") is not None:
                raise ScoreNotFoundError("several", "it has several (`scores`), and a rationale is written for one")
            if "score" in row:
                gold = gold_score(self.grid.in_numbers(row["score"]))
            else:
                text = completion_text(pair.get("completion"))
                gold = self.grid.value_of(locate_score(text, self.format.marker, self.grid.texts).text)
        except ScoreNotFoundError as error:
            raise ValueError(f"row {number} has no gold score: {error}") from error
        if not self.grid.in_range(gold):
            low, high = self.grid.texts[0], self.grid.texts[-1]
            raise ValueError(f"row {number}: the score {gold:g} is not between {low} and {high}")
        if "prompt" not in pair:
            raise ValueError(f"row {number} has no prompt: its columns are {', '.join(sorted(row))}")
        if (self.on_failure == "keep_gold" or self.keep_annotated) and pair.get("completion") is None:
            raise ValueError(
                f"row {number} has no completion to keep if its rationale fails: set on_failure to 'drop' or 'raise'"
            )
        return gold

    def _block(self, rows: Sequence[Row], start: int, report: Report) -> list[Record]:
        """Sample until nothing is wrong with any rationale of the block, or the attempts are used up."""
        pairs = [as_prompt_completion(row) for row in rows]
        prompts = [prompt_ids(self.backend.tokenizer, pair["prompt"]) for pair in pairs]
        stated = [None if self.allow_leaks or self._states_score(pair) else self._stated_score for pair in pairs]
        slots = [(row, sample) for row in range(len(rows)) for sample in range(self.num_generations)]
        results: dict[tuple[int, int], Record] = {
            (row, sample): {"row": start + row, "sample": sample, "rationale": None, "failures": []}
            for row, sample in slots
        }
        attempts = self.max_attempts if self.sampling.temperature > 0 else 1  # greedy text would come out the same
        for attempt in range(1, attempts + 1):
            open_slots = [slot for slot in slots if _is_open(results[slot])]
            if not open_slots:
                break
            generations = self._sample(prompts, open_slots, attempt, start, report)
            for slot, generation in zip(open_slots, generations, strict=True):
                text = generation.text.rstrip()
                failure = rationale_failure(text, generation.finish_reason, stated[slot[0]])
                if failure is None:
                    results[slot]["rationale"] = text
                else:
                    results[slot]["failures"].append(failure)
        if self.on_failure == "raise":
            for result in results.values():
                self._raise_if_failed(result)
        return [results[slot] for slot in slots]

    def _states_score(self, pair: Row) -> bool:
        """Whether the annotated rationale states a score, so that the model was taught to."""
        if pair.get("completion") is None:
            return False
        annotated = completion_text(pair["completion"]).rpartition(self.format.marker)[0]
        return self._stated_score.search(annotated) is not None

    def _raise_if_failed(self, result: Record) -> None:
        if result["rationale"] is None:
            raise RuntimeError(
                f"row {result['row']}: no usable rationale in {len(result['failures'])} attempts "
                f"({', '.join(result['failures'])}). Raise max_new_tokens or "
                "max_attempts, or set on_failure to 'keep_gold' or 'drop'"
            )

    def _sample(
        self,
        prompts: Sequence[Sequence[int]],
        slots: Sequence[tuple[int, int]],
        attempt: int,
        start: int,
        report: Report,
    ) -> list[Generation]:
        """One continuation for each slot. The seed depends on block and attempt alone, so a rerun repeats the text."""
        settings: dict[str, Any] = {**asdict(self.sampling), "stop": self.format.marker}
        settings["seed"] = int(digest([self.seed, start, attempt])[:8], 16)
        if attempt == 1:
            sampled = self.backend.generate(prompts, n=self.num_generations, on_progress=report, **settings)
            return [sampled[row][sample] for row, sample in slots]
        return [samples[0] for samples in self.backend.generate([prompts[row] for row, _ in slots], **settings)]

    def _stage_two_rows(self, rows: Rows, records: Iterator[Record], summary: DistillSummary) -> Iterator[Row]:
        for record in records:
            number: int = record["row"]
            failures: list[Failure] = record["failures"]
            row: Row = dict(rows[number])
            attempts = len(failures) + (record["rationale"] is not None)
            provenance = {"finish_reason": "stop", "attempts": attempts}
            if self.keep_annotated and record["sample"] == 0:
                summary.annotated += 1
                yield {**row, "rationale_source": "annotated", "finish_reason": None, "attempts": 0}
            summary.resampled += attempts > 1
            for failure, count in Counter(failures).items():
                summary.attempts_failed[failure] += count
            if record["rationale"] is not None:
                summary.self_written += 1
                text = self.format.join(record["rationale"], self.grid.nearest_text(self._gold(row, number)))
                _replace_completion(row, text)
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


def _is_open(result: Record) -> bool:
    """Whether a rationale is to be sampled (again). One that finds no room never will."""
    return result["rationale"] is None and result["failures"][-1:] != ["prompt too long"]


def _replace_completion(row: Row, text: str) -> None:
    """Put `text` where the row's type has its completion."""
    turn = {"role": "assistant", "content": text}
    for column in ("messages", "conversations"):
        if column in row:
            last = row[column][-1]
            row[column] = [*row[column][:-1], {"from": last["from"], "value": text} if "from" in last else turn]
            return
    row["completion"] = text if isinstance(row["prompt"], str) else [turn]
