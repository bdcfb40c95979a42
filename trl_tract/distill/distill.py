"""CoTSelfDistill: the stage-one model writes its own rationale for every training prompt.

The gold score is attached, the model's own score is never read. Knows nothing of the trainer.
"""

import logging
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, Protocol

from datasets import Dataset, Features, Value

from trl_tract.backends import Backend, Generation, Sampling, TransformersBackend
from trl_tract.distill.failures import Failure, rationale_failure
from trl_tract.distill.golds import GoldReader
from trl_tract.distill.summary import DistillSummary, read_summary
from trl_tract.files.blocks import BlockLog, Record, Report, Shard
from trl_tract.files.journal import JsonlRows, digest, write_json, write_jsonl
from trl_tract.rows.rendering import as_prompt_completion, with_completion
from trl_tract.rows.row import Row
from trl_tract.rows.tokens import aspect_prefix_ids, prompt_ids, resolve_aspects
from trl_tract.saved.judge_config import JudgeConfig
from trl_tract.scale.grid import ScoreGrid
from trl_tract.scale.scale import Scale, read_aspects, scored_within
from trl_tract.scale.text import CompletionFormat

__all__ = ["PROVENANCE", "CoTSelfDistill", "DistillSummary", "Rows", "read_summary"]

logger = logging.getLogger(__name__)

ON_FAILURE = ("keep_gold", "drop", "raise")
PROVENANCE = {"rationale_source": Value("string"), "finish_reason": Value("string"), "attempts": Value("int64")}
_MANY_FAILED = 0.2


class Rows(Protocol):
    """Rows by number: a `Dataset`, `JsonlRows`, a list."""

    def __len__(self) -> int: ...
    def __getitem__(self, index: int, /) -> Any: ...
    def __iter__(self) -> Iterator[Any]: ...


class CoTSelfDistill:
    """Replace the rationales of training rows by the model's own, and keep the gold scores.

    What is finished is on disk: killed at any instant and started again with the same arguments, a run goes on. Under
    `torchrun` or `accelerate launch` the processes share the rows.

    Args:
        backend: The stage-one model.
        score_values: The score grid, in rubric units; or texts with their values.
        score_marker: Text at which a rationale ends.
        completion_format: How rationale, marker and score are joined; one space each by default.
        aspects: Where a completion has several scores: see `TRACTConfig.aspects`; grid and marker above are not looked
            at then. Each rationale is written behind the gold score of the aspect before it.
        num_generations: Stage-two rows for each prompt.
        temperature: Of sampling.
        top_p: Of sampling.
        repetition_penalty: Of sampling.
        max_new_tokens: Tokens a rationale may have.
        seed: Of sampling; the same seed gives the same rationales with the transformers backend, however often the run
            was stopped and however many processes shared it.
        max_attempts: How often a rationale is sampled, each time with another seed, until nothing is wrong with it:
            see `trl_tract.distill.failures`.
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
    ) -> None:
        if on_failure not in ON_FAILURE:
            raise ValueError(f"on_failure={on_failure!r} is unknown: choose one of {', '.join(ON_FAILURE)}")
        for name, count in (("num_generations", num_generations), ("max_attempts", max_attempts)):
            if count < 1:
                raise ValueError(f"{name}={count} must be 1 or more")
        self.backend = backend
        self.grid = ScoreGrid.from_values(score_values)
        self.format = completion_format or CompletionFormat(score_marker)
        self.aspects = () if aspects is None else read_aspects(aspects)
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
        first, aspects = config.scales[0], config.scales if len(config.scales) > 1 else ()
        distiller = cls(
            backend or TransformersBackend(str(path), revision=revision),
            score_values=dict(zip(first.grid.texts, first.grid.values, strict=True)),
            completion_format=config.format,
            aspects={aspect.name: aspect.to_dict() for aspect in aspects} or None,
            **settings,
        )
        distiller.aspects, distiller._tokens_found = aspects, True
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
            cancel=lambda: self.backend.cancel(),
        )

    def _settings(self) -> dict[str, Any]:
        return {
            "model": self.backend.model_id,
            "backend": self.backend.name,
            "score_values": list(self.grid.values),
            "score_texts": list(self.grid.texts),
            "format": self.format.to_dict(),
            **({"aspects": {aspect.name: aspect.to_dict() for aspect in self.aspects}} if self.aspects else {}),
            "num_generations": self.num_generations,
            **asdict(self.sampling),
            "seed": self.seed,
            "max_attempts": self.max_attempts,
            "on_failure": self.on_failure,
            "allow_leaks": self.allow_leaks,
            "keep_annotated": self.keep_annotated,
        }

    @property
    def _stages(self) -> tuple[Scale, ...]:
        """What is written one after the other: the aspects, or the one rationale with its score."""
        return self.aspects or (Scale("", self.grid, self.format),)

    @property
    def _reader(self) -> GoldReader:
        return GoldReader(self._stages, self.on_failure == "keep_gold" or self.keep_annotated)

    def _checked(self, rows: Rows) -> Iterator[Row]:
        reader = self._reader
        for number, row in enumerate(rows):
            reader.golds(row, number)
            yield row

    def _block(self, rows: Sequence[Row], start: int, report: Report) -> list[Record]:
        """Sample until nothing is wrong with any rationale of the block, or the attempts are used up."""
        pairs = [as_prompt_completion(row) for row in rows]
        self._find_tokens(pairs[0]["prompt"])
        reader = self._reader
        texts = [reader.texts(row, start + number) for number, row in enumerate(rows)]
        slots = [(row, sample) for row in range(len(rows)) for sample in range(self.num_generations)]
        written: dict[tuple[int, int], list[str]] = {slot: [] for slot in slots}
        results: dict[tuple[int, int], Record] = {
            (row, sample): {"row": start + row, "sample": sample, "rationale": None, "failures": []}
            for row, sample in slots
        }
        attempts = self.max_attempts if self.sampling.temperature > 0 else 1  # greedy text would come out the same
        for number, stage in enumerate(self._stages):
            stated = [None if self.allow_leaks else reader.unstated(pair, number) for pair in pairs]
            prompts = {
                slot: self._asked(pairs[slot[0]]["prompt"], list(zip(written[slot], texts[slot[0]], strict=False)))
                for slot in slots
                if len(written[slot]) == number
            }
            for attempt in range(1, attempts + 1):
                # One that finds no room never will.
                open_slots = [
                    slot
                    for slot in prompts
                    if len(written[slot]) == number and results[slot]["failures"][-1:] != ["prompt too long"]
                ]
                if not open_slots:
                    break
                seed = [self.seed, start, attempt, *([number] if number else [])]
                told = report if not self.aspects else None
                generations = self._sample(prompts, open_slots, stage.marker, seed, attempt + number == 1, told)
                for slot, generation in zip(open_slots, generations, strict=True):
                    text = generation.text.rstrip()
                    failure = rationale_failure(text, generation.finish_reason, stated[slot[0]])
                    if failure is None and scored_within(text, self.aspects) is not None:
                        failure = "leak"  # it would be found there when the row is trained on
                    if failure is None:
                        written[slot].append(text)
                    else:
                        results[slot]["failures"].append(failure)
        if self.aspects:
            report(len(rows))
        for slot, rationales in written.items():
            if len(rationales) == len(self._stages):
                results[slot]["rationale"] = rationales if self.aspects else rationales[0]
        if self.on_failure == "raise":
            for result in results.values():
                self._raise_if_failed(result)
        return [results[slot] for slot in slots]

    def _find_tokens(self, prompt: Any) -> None:
        """Look up the aspects' tokens, behind which rationales are written, unless they are those of the training."""
        if self.aspects and not self._tokens_found:
            completion = "".join(aspect.format.join("", aspect.grid.texts[0]) for aspect in self.aspects)
            row = with_completion(prompt, completion)
            found = resolve_aspects(self.backend.tokenizer, row, self.aspects)
            self.aspects = tuple(
                replace(known, grid=here.grid) for known, here in zip(self.aspects, found, strict=True)
            )
            self._tokens_found = True

    def _asked(self, prompt: Any, done: Sequence[tuple[str, str]]) -> list[int]:
        tokenizer = self.backend.tokenizer
        return aspect_prefix_ids(tokenizer, prompt, self.aspects, done) if done else prompt_ids(tokenizer, prompt)

    def _raise_if_failed(self, result: Record) -> None:
        if result["rationale"] is None:
            raise RuntimeError(
                f"row {result['row']}: no usable rationale in {len(result['failures'])} attempts "
                f"({', '.join(result['failures'])}). Raise max_new_tokens or "
                "max_attempts, or set on_failure to 'keep_gold' or 'drop'"
            )

    def _sample(
        self,
        prompts: Mapping[tuple[int, int], Sequence[int]],
        slots: Sequence[tuple[int, int]],
        stop: str,
        seed: Sequence[int],
        is_first: bool,
        report: Report | None,
    ) -> list[Generation]:
        """One continuation for each slot; its seed is of block, attempt and aspect alone, so a rerun repeats it."""
        settings: dict[str, Any] = {**asdict(self.sampling), "stop": stop, "seed": int(digest(list(seed))[:8], 16)}
        if is_first:
            asked = [prompts[slot] for slot in prompts if slot[1] == 0]
            sampled = self.backend.generate(asked, n=self.num_generations, on_progress=report, **settings)
            return [sampled[row][sample] for row, sample in slots]
        return [samples[0] for samples in self.backend.generate([prompts[slot] for slot in slots], **settings)]

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
                rationales = record["rationale"] if self.aspects else [record["rationale"]]
                pieces = zip(self._stages, rationales, self._reader.texts(row, number), strict=True)
                _replace_completion(row, "".join(stage.format.join(*piece) for stage, *piece in pieces))
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
