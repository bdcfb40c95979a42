"""CoTSelfDistill: the stage-one model writes its own rationale for every training prompt.

The gold score is attached, the model's own score is never read. Knows nothing of the trainer.
"""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from datasets import Dataset, Features, Value
from tqdm.auto import tqdm

from trl_tract.backends import Backend, Generation, TransformersBackend
from trl_tract.journal import Journal, digest, guard, write_json, write_jsonl
from trl_tract.judge_config import JudgeConfig
from trl_tract.prompts import CompletionFormat, Row, ScoreNotFoundError, gold_score, locate_score
from trl_tract.rendering import as_prompt_completion, completion_text, prompt_ids
from trl_tract.scores import ScoreGrid

ON_FAILURE = ("keep_gold", "drop", "raise")
PROVENANCE = {"rationale_source": Value("string"), "finish_reason": Value("string"), "attempts": Value("int64")}


class CoTSelfDistill:
    """Replace the rationales of training rows by the model's own, and keep the gold scores.

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
        seed: Of sampling; the same seed gives the same rationales with the transformers backend.
        max_attempts: How often a rationale is sampled until it reaches the marker.
        on_failure: Then: `keep_gold` keeps the annotated rationale, `drop` leaves the row out, `raise` stops. Each is
            counted in `summary.json`.
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
        keep_annotated: bool = False,
        block_size: int = 64,
    ) -> None:
        if on_failure not in ON_FAILURE:
            raise ValueError(f"on_failure={on_failure!r} is unknown: choose one of {', '.join(ON_FAILURE)}")
        for name, number in (
            ("num_generations", num_generations),
            ("max_attempts", max_attempts),
            ("max_new_tokens", max_new_tokens),
            ("block_size", block_size),
        ):
            if number < 1:
                raise ValueError(f"{name}={number} must be 1 or more")
        self.backend = backend
        self.grid = ScoreGrid.from_values(score_values)
        self.format = completion_format or CompletionFormat(score_marker)
        self.num_generations = num_generations
        self.sampling = {
            "temperature": temperature,
            "top_p": top_p,
            "repetition_penalty": repetition_penalty,
            "max_new_tokens": max_new_tokens,
        }
        self.seed = seed
        self.max_attempts = max_attempts
        self.on_failure = on_failure
        self.keep_annotated = keep_annotated
        self.block_size = block_size

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

        `output_dir` receives `rationales.jsonl` as it is produced, `rows.jsonl` (the stage-two rows) and
        `summary.json`. Run again after it was stopped, it goes on with the first rationale that is missing.

        Args:
            dataset: Training rows: `prompt`, `completion`, `score`, or `messages`.
            output_dir: Holds one run; another run's directory is refused.

        Returns:
            The rows with new completions, the same columns, and `rationale_source` (`self` or `annotated`),
            `finish_reason` and `attempts`.

        Raises:
            ValueError: A row has no gold score; it is named, before anything is generated.
            FileExistsError: `output_dir` holds another run.
            OSError: The disk is full; what was written stays, and the run can be continued.
            RuntimeError: With `on_failure="raise"`, a rationale never reached the marker.
        """
        directory = Path(output_dir)
        golds = [self._gold(row, number) for number, row in enumerate(dataset)]
        guard(directory, self._settings(dataset), "self-distillation")
        journal = Journal(directory / "rationales.jsonl", self.block_size * self.num_generations)
        first = min(journal.records // self.num_generations, len(dataset))
        with tqdm(total=len(dataset), initial=first, desc="Writing rationales", unit="row") as progress:
            for start in range(first, len(dataset), self.block_size):
                rows = [
                    as_prompt_completion(dataset[i]) for i in range(start, min(start + self.block_size, len(dataset)))
                ]
                journal.append(self._block(rows, start, progress))
        written = directory / "rows.jsonl"
        counts: Counter[str] = Counter()
        write_jsonl(written, self._stage_two_rows(dataset, golds, journal, counts))
        write_json(directory / "summary.json", {"rows": len(dataset), **counts})
        features = Features({**dataset.features, **PROVENANCE})
        return Dataset.from_json(str(written), features=features, cache_dir=str(directory / "cache"))

    def _settings(self, dataset: Dataset) -> dict[str, Any]:
        return {
            "model": self.backend.model_id,
            "backend": self.backend.name,
            "rows": len(dataset),
            "rows_digest": digest(dataset),
            "score_values": list(self.grid.values),
            "format": self.format.to_dict(),
            "num_generations": self.num_generations,
            **self.sampling,
            "seed": self.seed,
            "max_attempts": self.max_attempts,
            "on_failure": self.on_failure,
            "keep_annotated": self.keep_annotated,
            "block_size": self.block_size,
        }

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
        if (self.on_failure == "keep_gold" or self.keep_annotated) and pair.get("completion") is None:
            raise ValueError(
                f"row {number} has no completion to keep if its rationale fails: set on_failure to 'drop' or 'raise'"
            )
        return gold

    def _block(self, rows: Sequence[Row], start: int, progress: Any) -> list[dict[str, Any]]:
        """Sample until every rationale of the block reached the marker, or its attempts are used up."""
        prompts = [prompt_ids(self.backend.tokenizer, row["prompt"]) for row in rows]
        slots = [(row, sample) for row in range(len(rows)) for sample in range(self.num_generations)]
        results: dict[tuple[int, int], dict[str, Any]] = {}
        for attempt in range(1, self.max_attempts + 1):
            open_slots = [slot for slot in slots if results.get(slot, {}).get("rationale") is None]
            if not open_slots:
                break
            generations = self._sample(prompts, open_slots, attempt, start, progress if attempt == 1 else None)
            for slot, generation in zip(open_slots, generations, strict=True):
                rationale = generation.text.rstrip()
                reached = generation.finish_reason == "stop" and bool(rationale)
                results[slot] = {
                    "row": start + slot[0],
                    "sample": slot[1],
                    "rationale": rationale if reached else None,
                    "finish_reason": generation.finish_reason if rationale else "empty",
                    "attempts": attempt,
                }
        if self.on_failure == "raise":
            for result in results.values():
                if result["rationale"] is None:
                    raise RuntimeError(
                        f"row {result['row']}: no rationale reached {self.format.marker!r} in {self.max_attempts} "
                        f"attempts (the last ended by {result['finish_reason']!r}). Raise max_new_tokens or "
                        "max_attempts, or set on_failure to 'keep_gold' or 'drop'"
                    )
        return [results[slot] for slot in slots]

    def _sample(
        self,
        prompts: Sequence[Sequence[int]],
        slots: Sequence[tuple[int, int]],
        attempt: int,
        start: int,
        progress: Any,
    ) -> list[Generation]:
        """One continuation for each slot. The seed depends on block and attempt alone, so a rerun repeats the text."""
        seed = int(digest([self.seed, start, attempt])[:8], 16)
        settings: dict[str, Any] = {**self.sampling, "stop": self.format.marker, "seed": seed}
        if attempt == 1:
            sampled = self.backend.generate(prompts, n=self.num_generations, on_progress=progress.update, **settings)
            return [sampled[row][sample] for row, sample in slots]
        return [samples[0] for samples in self.backend.generate([prompts[row] for row, _ in slots], n=1, **settings)]

    def _stage_two_rows(
        self, dataset: Dataset, golds: Sequence[float], journal: Journal, counts: "Counter[str]"
    ) -> Iterator[Row]:
        for record in journal:
            row: Row = dict(dataset[record["row"]])
            failed = record["rationale"] is None
            if self.keep_annotated and record["sample"] == 0:
                counts["annotated"] += 1
                yield {**row, "rationale_source": "annotated", "finish_reason": None, "attempts": 0}
            counts["resampled"] += record["attempts"] > 1
            if failed:
                counts[f"failed ({record['finish_reason']})"] += 1
            if failed and (self.on_failure == "drop" or self.keep_annotated):
                # With both kinds of rationale the annotated one is there already.
                counts["dropped"] += 1
                continue
            source = "annotated" if failed else "self"
            counts[source] += 1
            if not failed:
                text = self.format.join(record["rationale"], self.grid.nearest_text(golds[record["row"]]))
                _replace_completion(row, text)
            yield {
                **row,
                "rationale_source": source,
                "finish_reason": record["finish_reason"],
                "attempts": record["attempts"],
            }


def _replace_completion(row: Row, text: str) -> None:
    """Put `text` where the row's type has its completion."""
    turn = {"role": "assistant", "content": text}
    for column in ("messages", "conversations"):
        if column in row:
            last = row[column][-1]
            row[column] = [*row[column][:-1], {"from": last["from"], "value": text} if "from" in last else turn]
            return
    row["completion"] = text if isinstance(row["prompt"], str) else [turn]
