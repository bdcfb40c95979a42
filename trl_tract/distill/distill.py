"""CoTSelfDistill: the stage-one model writes its own rationale for every training prompt.

The gold score is attached, the model's own score is never read. Knows nothing of the trainer.
"""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

from datasets import Dataset, Value

from trl_tract.backends import Backend, Sampling, TransformersBackend
from trl_tract.distill.failures import Failure
from trl_tract.distill.rationale_run import RationaleRun, replace_completion
from trl_tract.distill.summary import DistillSummary, read_summary
from trl_tract.distill.writing import Draft, Writer
from trl_tract.files.blocks import Record, Report
from trl_tract.files.journal import Rows
from trl_tract.files.shards import Shard
from trl_tract.rows.frame import Frame
from trl_tract.rows.rendering import as_prompt_completion, written_completion
from trl_tract.rows.row import Row
from trl_tract.rows.template import TemplateSettings, Thinking
from trl_tract.saved.judge_config import JudgeConfig
from trl_tract.scale.scale import given_scales
from trl_tract.scale.text import CompletionFormat
from trl_tract.sources.files import plain

__all__ = ["PROVENANCE", "CoTSelfDistill", "DistillSummary", "Rows", "read_summary"]

PROVENANCE = {"rationale_source": Value("string"), "finish_reason": Value("string"), "attempts": Value("int64")}


class CoTSelfDistill(RationaleRun):
    """Replace the rationales of training rows with the model's own, and keep the gold scores.

    Finished blocks are saved to disk. If a run is interrupted, start it again with the same arguments to continue.
    Under `torchrun` or `accelerate launch`, the processes share the rows.

    Args:
        backend: The stage-one model.
        score_values: Score grid in rubric units, or a mapping from texts to values.
        score_marker: Text that ends a rationale and precedes the score.
        completion_format: How rationale, marker and score are joined. None: with one space each.
        aspects: Aspects for completions with several scores, see `TRACTConfig.aspects`; replaces the three above. Each
            rationale follows the gold score of the previous aspect.
        num_generations: Number of rationales, and so of stage-two rows, per prompt.
        temperature: Sampling temperature for rationales; 0 decodes greedily.
        top_p: Nucleus sampling threshold for rationales.
        repetition_penalty: Penalty on tokens that already occur in the prompt or the rationale; 1 turns it off.
        max_new_tokens: Maximum number of tokens in a rationale.
        seed: Random seed for sampling. With the transformers backend, the same seed gives the same rationales,
            regardless of interruptions and of the number of processes.
        max_attempts: Maximum number of attempts to sample a usable rationale, each with another seed. See
            `trl_tract.distill.failures`.
        on_failure: What to do if all attempts fail: `keep_gold` keeps the annotated rationale, `drop` drops the row,
            `raise` stops. `summary.json` counts each case.
        allow_leaks: Accept rationales that state a score even if the row's annotated rationale does not.
        keep_annotated: Also keep each row's annotated rationale, before the self-written ones, so that stage two trains
            on both.
        block_size: Number of prompts in a block. Finished blocks are written to disk.
        chat_template_kwargs: Variables for the chat template. A row's own take precedence.
        thinking: `off`, `rationale` or `auto`: see `TRACTConfig.thinking`.
        template_date: Date for chat templates that render one, YYYY-MM-DD. None: today.

    Attributes:
        scales: The scales of a completion, in order. The name of a single scale is empty.

    Source of the defaults: the authors' settings, https://aclanthology.org/2025.acl-long.147
    """

    what = "self-distillation"
    on_failure_now: ClassVar[Mapping[str, str]] = {
        "keep_gold": "keeps their annotated rationales",
        "drop": "leaves them out",
        "raise": "stops",
    }

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
        if max_attempts < 1:
            raise ValueError(f"max_attempts={max_attempts} must be 1 or more")
        super().__init__(
            backend,
            given_scales(score_values, score_marker, completion_format, aspects),
            Sampling(max_new_tokens, temperature, top_p, repetition_penalty),
            num_generations=num_generations,
            seed=seed,
            on_failure=on_failure,
            block_size=block_size,
            template=TemplateSettings(chat_template_kwargs or {}, thinking, template_date),
        )
        self.max_attempts = max_attempts
        self.allow_leaks = allow_leaks
        self.keep_annotated = keep_annotated

    @classmethod
    def from_pretrained(
        cls, path: str | Path, backend: Backend | None = None, *, revision: str | None = None, **settings: Any
    ) -> "CoTSelfDistill":
        """Load the stage-one model at `path`, with the grid and format from its training.

        Args:
            path: Model or adapter directory, or hub id, with a `tract_config.json`.
            backend: Generation backend. None: `TransformersBackend(path)`.
            revision: Branch, tag or commit of a hub id. A `backend` that you pass has its own revision.
            **settings: Other arguments of the class.
        """
        config = JudgeConfig.load(path, revision)
        if not config.writes_rationale:
            raise ValueError(
                f"{path} was trained with drop_rationale=True, so it writes no rationales. Use a model "
                "trained with rationales"
            )
        arguments = config.with_settings(settings)
        distiller = cls(backend or TransformersBackend(str(path), revision=revision), **arguments)
        distiller.scales, distiller._tokens_found = config.scales, True
        return distiller

    def distill(self, dataset: Dataset, output_dir: str | Path) -> Dataset:
        """Write a rationale for every row.

        Rationales are saved in `output_dir/blocks/` as they are generated. At the end, `rows.jsonl` (the stage-two
        rows) and `summary.json` are written.

        Args:
            dataset: Training rows: `prompt`, `completion`, `score`, or `messages`.
            output_dir: Holds one run; another run's directory is refused.

        Returns:
            The rows with new completions, the same columns, and `rationale_source` (`self` or `annotated`),
            `finish_reason` (`stop`, or the reason why the last attempt failed) and `attempts`.

        Raises:
            ValueError: A row has no gold score or no prompt; or, with `on_failure="raise"`, the chat template refuses
                its prompt. Raised before anything is generated.
            FileExistsError: `output_dir` holds another run.
            OSError: The disk is full. Finished blocks stay on disk, and the run can be continued.
            RuntimeError: Another process is working in `output_dir`; or, with `on_failure="raise"`, a rationale failed
                in all its attempts.
        """
        return self._of_dataset(dataset, output_dir)

    def distill_file(self, data: str | Path, output_dir: str | Path, *, shard: Shard | None = None) -> Path | None:
        """Like `distill`, for a JSONL file of any size. Rows are read as they are needed.

        Args:
            data: JSONL of training rows.
            output_dir: Holds one run.
            shard: This job's share of the rows, for job arrays. None: this process's share under a launcher.

        Returns:
            `rows.jsonl` in `output_dir`; None if other shards are not finished.

        Raises:
            ValueError, FileExistsError, OSError, RuntimeError: As in `distill`.
        """
        return self._of_file(data, output_dir, shard)

    @staticmethod
    def push_to_hub(output_dir: str | Path, repo_id: str, **options: Any) -> str:
        """Upload the rows of a finished self-distillation as a dataset, with a dataset card.

        Args:
            output_dir: The output directory of `distill`. `rows.jsonl` and `summary.json` are uploaded.
            repo_id: `user/name`; created if it does not exist.
            **options: `source`, hub id or description of the annotated rows; `model`, hub id of the model that wrote
                the rationales; `license`, none by default; `private`, True by default; `token`, `revision` (a branch)
                and `commit_message`.

        Returns:
            The repository's URL.

        Raises:
            FileNotFoundError: The self-distillation is not finished.
            ValueError: The repository exists and is public, but `private=False` was not given.
        """
        from trl_tract.saved.hub import push_rows

        return push_rows(Path(output_dir), repo_id, **options)

    def _added(self, features: Mapping[str, Any]) -> Mapping[str, Any]:
        return PROVENANCE

    def _own_settings(self) -> dict[str, Any]:
        return {
            "max_attempts": self.max_attempts,
            "allow_leaks": self.allow_leaks,
            "keep_annotated": self.keep_annotated,
        }

    def _needs_completion(self) -> bool:
        return self.on_failure == "keep_gold" or self.keep_annotated

    def block(self, rows: Sequence[Row], start: int, report: Report) -> list[Record]:
        """What became of the rationales of a block of rows."""
        pairs = [as_prompt_completion(row) for row in rows]
        golds = [self._texts(self._golds(row, start + number)) for number, row in enumerate(rows)]
        self._find_tokens(pairs)
        assert self.template is not None  # a `Backend` has a tokenizer
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

    def _written(self, rows: Rows, records: Iterator[Record]) -> tuple[DistillSummary, Iterator[Row]]:
        summary = DistillSummary(len(rows), len(rows) * self.num_generations)
        return summary, self._stage_two_rows(rows, records, summary)

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
                yield {**row, "rationale_source": _annotated(row), "finish_reason": None, "attempts": 0}
            summary.resampled += attempts > 1
            for failure, count in Counter(failures).items():
                summary.attempts_failed[failure] += count
            if rationales is not None:
                summary.self_written += 1
                pieces = list(zip(rationales, self._texts(self._golds(row, number)), strict=True))
                asked = self._asked(as_prompt_completion(row))
                frame = Frame() if asked is None else asked.frame
                replace_completion(row, written_completion(frame, self.scales, pieces))
                yield {**row, "rationale_source": "self", **provenance}
                continue
            last = failures[-1]
            summary.failed[last] += 1
            # With both kinds of rationale the annotated one is there already.
            if self.on_failure == "drop" or self.keep_annotated:
                summary.dropped += 1
            else:
                summary.annotated += 1
                yield {**row, **provenance, "rationale_source": _annotated(row), "finish_reason": last}


def _annotated(row: Row) -> str:
    """Where the rationale that a row came with is from: a bootstrap has written it down."""
    return str(row.get("rationale_source") or "annotated")
