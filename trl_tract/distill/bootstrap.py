"""CoTBootstrap: rationales for rows that have only scores. Knows nothing of the trainer."""

import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
from datasets import Dataset, Value

from trl_tract.backends import Backend, Sampling
from trl_tract.distill.authors import Author, ChatAuthor, Draft, ModelAuthor
from trl_tract.distill.bootstrap_summary import BootstrapCost, BootstrapSummary
from trl_tract.distill.choosing import Told, default_tolerance, written_like
from trl_tract.distill.rationale_run import RationaleRun, replace_completion
from trl_tract.files.blocks import BlockLog, Record, Report
from trl_tract.files.journal import Rows
from trl_tract.files.shards import Shard
from trl_tract.rows.frame import Frame
from trl_tract.rows.rendering import as_prompt_completion, written_completion
from trl_tract.rows.row import Row
from trl_tract.rows.template import TemplateSettings, Thinking
from trl_tract.scale.scale import given_scales
from trl_tract.scale.text import CompletionFormat, ScoreNotFoundError
from trl_tract.sources.files import plain
from trl_tract.sources.schemas import has_rationale
from trl_tract.text.progress import Passes

if TYPE_CHECKING:
    from trl_tract.backends import ChatBackend

_MEASURED = 64  # rows whose prompts are counted for the cost
_PROBED, _PROBE_TOKENS = 2, (32, 8)  # rows, and tokens of each, that the speed is measured on


class CoTBootstrap(RationaleRun):
    """Write rationales for rows that have only a prompt and a human score.

    For each row, sample several rationales from a model that does not see the gold score. Accept those whose score is
    within `tolerance` of the gold score: the expected score, or with a chat endpoint the score that it wrote. If none
    is accepted, ask again with the gold score shown. Rows that have a rationale keep it.

    Finished blocks are saved to disk. If a run is interrupted, start it again with the same arguments to continue.
    Under `torchrun` or `accelerate launch`, the processes share the rows.

    Args:
        backend: The model that writes the rationales: the seed model, any other one, or a `ChatBackend`.
        score_values: Score grid in rubric units, or a mapping from texts to values.
        score_marker: Text that ends a rationale and precedes the score.
        completion_format: How rationale, marker and score are joined. None: as in the rows that have a rationale, or
            with one space each.
        aspects: Aspects for completions with several scores, see `TRACTConfig.aspects`; replaces the three above. Each
            rationale follows the gold score of the previous aspect.
        num_generations: Number of rationales sampled per row, and again with the score shown.
        tolerance: Maximum difference between a rationale's score and the gold score, in rubric units. None: half the
            smallest step of the grid, or an eighth of its range, whichever is larger.
        show_score: Ask again with the gold score shown if no rationale was accepted. Such a rationale may justify the
            score for the wrong reasons, so it is marked in `rationale_source`, and rejected if it reveals the score.
        keep: Maximum number of rationales kept per row, the closest first. Each becomes a row of the result.
        rewrite: Also write rationales for rows that already have one.
        on_failure: What to do with a row without an accepted rationale: `drop` it, `keep` it without a rationale, or
            `raise`. `summary.json` counts each case.
        temperature: Sampling temperature for rationales; 0 decodes greedily and needs `num_generations=1`.
        top_p: Nucleus sampling threshold for rationales.
        repetition_penalty: Penalty on tokens that already occur in the prompt or the rationale; 1 turns it off.
        max_new_tokens: Maximum number of tokens in a rationale. A longer one is cut after its last complete sentence.
        seed: Random seed for sampling. With the transformers backend, the same seed gives the same rationales,
            regardless of interruptions and of the number of processes.
        block_size: Number of prompts in a block. Finished blocks are written to disk.
        prices: Prices per million input tokens and per million output tokens, for the cost estimate at the start.
        probe: Measure the speed on two rows first, for the time estimate at the start.
        chat_template_kwargs: Variables for the chat template. A row's own take precedence.
        thinking: `off`, `rationale` or `auto`: see `TRACTConfig.thinking`.
        template_date: Date for chat templates that render one, YYYY-MM-DD. None: today.
        say: Function that prints the cost estimate and the final table.

    Attributes:
        scales: The scales of a completion, in order. The name of a single scale is empty.
        tolerances: One for each scale, rubric units.

    Raises:
        ValueError: A setting out of range.

    Sources: blind sampling and selection by agreement, https://arxiv.org/abs/2510.25860; showing the answer if that
    fails, STaR, https://arxiv.org/abs/2203.14465; why such rationales are marked, https://arxiv.org/abs/2602.04649
    """

    what = "bootstrap"
    on_failure_now: ClassVar[Mapping[str, str]] = {
        "drop": "leaves them out",
        "keep": "leaves them without a rationale",
        "raise": "stops",
    }

    def __init__(
        self,
        backend: "Backend | ChatBackend",
        *,
        score_values: Sequence[float] | Mapping[str, float] | str = (1, 2, 3, 4, 5),
        score_marker: str = "[RESULT]",
        completion_format: CompletionFormat | None = None,
        aspects: Mapping[str, Mapping[str, Any]] | str | None = None,
        num_generations: int = 4,
        tolerance: float | None = None,
        show_score: bool = True,
        keep: int = 1,
        rewrite: bool = False,
        on_failure: str = "drop",
        temperature: float = 0.7,
        top_p: float = 0.9,
        repetition_penalty: float = 1.03,
        max_new_tokens: int = 256,
        seed: int = 42,
        block_size: int = 64,
        prices: Sequence[float] | None = None,
        probe: bool = False,
        chat_template_kwargs: Mapping[str, Any] | None = None,
        thinking: Thinking = "auto",
        template_date: str | None = None,
        say: Callable[[str], None] = print,
    ) -> None:
        if keep < 1:
            raise ValueError(f"keep={keep} must be 1 or more")
        if tolerance is not None and not tolerance >= 0:
            raise ValueError(f"tolerance={tolerance} must be 0 or more")
        if prices is not None and (len(prices) != 2 or min(prices) < 0):
            raise ValueError(f"prices={prices!r} must be two numbers: prices per million input and output tokens")
        if backend.tokenizer is None and repetition_penalty not in (1.0, 1.03):
            raise ValueError(
                f"repetition_penalty={repetition_penalty} has no effect on a chat endpoint: its API has no such field. "
                "Leave it out, or pass frequency_penalty in the options of ChatBackend"
            )
        scales = given_scales(score_values, score_marker, completion_format, aspects)
        super().__init__(
            backend,
            scales,
            Sampling(max_new_tokens, temperature, top_p, repetition_penalty),
            num_generations=num_generations,
            seed=seed,
            on_failure=on_failure,
            block_size=block_size,
            template=TemplateSettings(chat_template_kwargs or {}, thinking, template_date),
        )
        self.tolerances = [
            default_tolerance(scale.grid.values) if tolerance is None else float(tolerance) for scale in scales
        ]
        self.show_score = show_score
        self.keep = keep
        self.rewrite = rewrite
        self.prices = prices
        self.probe = probe
        self.say = say
        self._format_given = completion_format is not None
        self._lacking = 0

    def bootstrap(self, dataset: Dataset, output_dir: str | Path) -> Dataset:
        """Write a rationale for every row that has none.

        Rationales are saved in `output_dir/blocks/` as they are generated. At the end, `rows.jsonl` and `summary.json`
        are written, and the summary is printed.

        Args:
            dataset: Rows with `prompt` and `score` (for several annotators a list, whose mean is used), or `messages`
                without the judge's turn. `completion` may be missing in some or all rows.
            output_dir: Holds one run; another run's directory is refused.

        Returns:
            The rows with completions, the same columns, and `rationale_source` (`blind`, `shown`, `annotated`, or None
            for a row without a rationale), `rationale_score` (the score given with the rationale, in rubric units; with
            aspects a mapping) and `attempts`.

        Raises:
            ValueError: A row has no gold score or no prompt. Raised before anything is generated.
            FileExistsError: `output_dir` holds another run.
            OSError: The disk is full. Finished blocks stay on disk, and the run can be continued.
            RuntimeError: Another process is working in `output_dir`; or, with `on_failure="raise"`, no rationale of a
                row was accepted.
        """
        return self._of_dataset(dataset, output_dir)

    def bootstrap_file(self, data: str | Path, output_dir: str | Path, *, shard: Shard | None = None) -> Path | None:
        """Like `bootstrap`, for a JSONL file of any size. Rows are read as they are needed.

        Args:
            data: JSONL of rows.
            output_dir: Holds one run.
            shard: This job's share of the rows, for job arrays. None: this process's share under a launcher.

        Returns:
            `rows.jsonl` in `output_dir`; None if other shards are not finished.

        Raises:
            ValueError, FileExistsError, OSError, RuntimeError: As in `bootstrap`.
        """
        return self._of_file(data, output_dir, shard)

    def _run(self, rows: Rows, directory: Path, shard: Shard | None) -> bool:
        self._lacking = 0
        if not self._format_given:
            self.scales = written_like(rows, self.scales)
        return super()._run(rows, directory, shard)

    def _check(self, row: Row, number: int, refused: dict[int, str]) -> None:
        super()._check(row, number, refused)
        try:
            self._lacking += self._is_asked(row)
        except ScoreNotFoundError as error:
            raise ValueError(
                f"row {number} cannot be used for training: {error}. Fix its completion, or remove the completion so "
                "that a rationale is written"
            ) from error

    def _is_asked(self, row: Row) -> bool:
        return self.rewrite or not has_rationale(row, self.scales)

    def _added(self, features: Mapping[str, Any]) -> Mapping[str, Any]:
        names = [scale.name for scale in self.scales]
        score: Any = {name: Value("float64") for name in names} if names[0] else Value("float64")
        added = {"rationale_source": Value("string"), "rationale_score": score, "attempts": Value("int64")}
        known = features.get("completion")
        if not {"messages", "conversations"} & features.keys() and (known is None or known == Value("null")):
            is_text = str(getattr(features["prompt"], "dtype", "")) in ("string", "large_string")
            turn = [{"role": Value("string"), "content": Value("string")}]
            added["completion"] = Value("string") if is_text else turn
        return added

    def _own_settings(self) -> dict[str, Any]:
        return {"tolerance": self.tolerances, "show_score": self.show_score, "keep": self.keep, "rewrite": self.rewrite}

    def _begin(self, log: BlockLog) -> None:
        if log.finished or log.shard.index or not self._lacking:
            return
        self.say(f"{self.what}: {self._cost(log)}")

    def _cost(self, log: BlockLog) -> BootstrapCost:
        """What is left to do, from the prompts of a few rows all over the file."""
        rows = round(self._lacking * (1 - log.finished_rows / len(log.rows)))
        numbers = np.unique(np.linspace(0, len(log.rows) - 1, _MEASURED).astype(int)).tolist()
        pairs = [as_prompt_completion(log.rows[number]) for number in numbers]
        self._find_tokens(pairs)
        author = self._author()
        lengths = [author.prompt_tokens(pair) for pair in pairs]
        # Each rationale that is kept for the first aspect goes on to the others.
        times = self._sources * (1 + (len(self.scales) - 1) * min(self.keep, self.num_generations))
        asked = rows * self.num_generations * times
        # A chat endpoint is sent the prompt with each request; a model of one's own reads it once.
        prompts = asked if isinstance(author, ChatAuthor) else rows * times
        read, written = round(prompts * float(np.mean(lengths))), asked * self.sampling.max_new_tokens
        money = None if self.prices is None else (read * self.prices[0] + written * self.prices[1]) / 1e6
        seconds = self._seconds(author, pairs, prompts, written) if self.probe and rows else None
        return BootstrapCost(rows, asked, read, written, seconds, money)

    def _seconds(self, author: Author, pairs: Sequence[Row], prompts: int, written: int) -> float:
        """For so many prompts and tokens, from a few rows: short texts and longer ones tell reading from writing."""
        drafts = [self._draft(place, pair, self._golds(pair, place)) for place, pair in enumerate(pairs[:_PROBED])]
        measured = []
        for limit in _PROBE_TOKENS:  # the longer first: what a first call takes besides is then taken for writing
            author.sampling = replace(self.sampling, max_new_tokens=min(limit, self.sampling.max_new_tokens))
            started = time.monotonic()
            seed = [self.seed, "probe"]
            texts = author.write(drafts, self.num_generations, seed, shown=False, on_progress=lambda count: None)
            tokens = sum(candidate.tokens for own in texts for candidate in own)
            measured.append((time.monotonic() - started, max(tokens, 1)))
        (longer, more), (shorter, fewer) = measured
        if more <= fewer or longer <= shorter:
            return longer / more * written
        token = (longer - shorter) / (more - fewer)
        return max(shorter - token * fewer, 0.0) / len(drafts) * prompts + token * written

    @property
    def _sources(self) -> int:
        """How often a row may be asked: without its score, and with it."""
        return 1 + self.show_score

    def _author(self) -> Author:
        if self.template is None:
            return ChatAuthor(self.backend, self.scales, self.sampling)
        return ModelAuthor(self.backend, self.template, self.scales, self.sampling)

    def _draft(self, place: int, pair: Row, golds: list[float]) -> Draft:
        return Draft(place, pair, self._asked(pair), golds, self._texts(golds))

    def block(self, rows: Sequence[Row], start: int, report: Report) -> list[Record]:
        """What became of the rationales of a block of rows, the first of which is number `start`."""
        pairs = [as_prompt_completion(row) for row in rows]
        self._find_tokens(pairs)
        golds = [self._golds(row, start + number) for number, row in enumerate(rows)]
        asked = [place for place, row in enumerate(rows) if self._is_asked(row)]
        passes = Passes(report, len(rows), len(self.scales) * self._sources)
        drafts = [self._draft(place, pairs[place], golds[place]) for place in asked]
        author, told = self._author(), Told()
        for number in range(len(self.scales)):
            passes.add(self._sources * (len(rows) - len(asked)))
            drafts = self._next(author, drafts, [start, number], told, passes.add) if drafts else []
        passes.finish()
        records: list[Record] = []
        for place, row in enumerate(rows):
            if not self._is_asked(row):
                records.append({"row": start + place, "kept": None})
                continue
            kept = [draft for draft in drafts if draft.number == place]
            failures = told.failures.get(place, Counter())
            if not kept and self.on_failure == "raise":
                reasons = ", ".join(f"{name} {count}" for name, count in failures.items())
                raise RuntimeError(
                    f"row {start + place}: none of {told.sampled[place]} rationales was accepted ({reasons}). Raise "
                    "num_generations, tolerance or max_new_tokens, or set on_failure to 'drop' or 'keep'"
                )
            records.append(
                {
                    "row": start + place,
                    "kept": [
                        {
                            "rationales": [rationale for rationale, _ in draft.pieces],
                            "scores": [None if np.isnan(score) else score for score in draft.scores],
                            "source": "shown" if "shown" in draft.sources else "blind",
                        }
                        for draft in kept
                    ],
                    "failures": dict(failures),
                    "sampled": told.sampled[place],
                    "tokens": told.tokens[place],
                }
            )
        return records

    def _next(
        self,
        author: Author,
        drafts: Sequence[Draft],
        seed: Sequence[int],
        told: Told,
        on_progress: Callable[[float], None],
    ) -> list[Draft]:
        """The drafts with their next rationale: as many of each as are kept, and none where none is."""
        number = len(drafts[0].pieces)
        tolerance, keep = self.tolerances[number], self.keep if number == 0 else 1
        grown: dict[int, list[Draft]] = {}
        left = list(range(len(drafts)))
        for source in ("blind", "shown")[: self._sources]:
            if not left:
                break
            own_seed = [self.seed, *seed, source]
            asked = [drafts[place] for place in left]
            shown = source == "shown"
            written = author.write(asked, self.num_generations, own_seed, shown=shown, on_progress=on_progress)
            for place, candidates in zip(left, written, strict=True):
                draft = drafts[place]
                good = told.of(draft.number, candidates, draft.golds[number], None if shown else tolerance)
                grown[place] = [
                    replace(
                        draft,
                        pieces=(*draft.pieces, (one.rationale, draft.texts[number])),
                        scores=(*draft.scores, one.score),
                        sources=(*draft.sources, source),
                    )
                    for one in good[:keep]
                ]
            left = [place for place in left if not grown[place]]
            if not shown and self.show_score:
                on_progress(len(asked) - len(left))  # these are not asked with their score shown
        return [draft for place in range(len(drafts)) for draft in grown[place]]

    def _written(self, rows: Rows, records: Iterator[Record]) -> tuple[BootstrapSummary, Iterator[Row]]:
        summary = BootstrapSummary.of(len(rows), self.scales)
        return summary, self._rows(rows, records, summary)

    def _rows(self, rows: Rows, records: Iterator[Record], summary: BootstrapSummary) -> Iterator[Row]:
        for record in records:
            number: int = record["row"]
            row: Row = plain(rows[number])
            if record["kept"] is None:
                summary.annotated += 1
                yield {**row, "rationale_source": "annotated", "rationale_score": None, "attempts": 0}
                continue
            texts = self._texts(self._golds(row, number))
            summary.sampled += record["sampled"]
            summary.tokens += record["tokens"]
            for failure, count in record["failures"].items():
                summary.failed[failure] += count
            kept = record["kept"]
            summary.rationales += len(kept)
            outcome = kept[0]["source"] if kept else "given up"
            summary.count(outcome, {scale.name: text for scale, text in zip(self.scales, texts, strict=True)})
            provenance = {"rationale_source": None, "rationale_score": None, "attempts": record["sampled"]}
            if not kept and self.on_failure == "keep":
                yield {**row, **provenance}
            asked = self._asked(as_prompt_completion(row)) if kept else None
            frame = Frame() if asked is None else asked.frame
            for one in kept:
                done = dict(row)
                pieces = list(zip(one["rationales"], texts, strict=True))
                replace_completion(done, written_completion(frame, self.scales, pieces))
                names = [scale.name for scale in self.scales]
                score = dict(zip(names, one["scores"], strict=True)) if names[0] else one["scores"][0]
                yield {**done, **provenance, "rationale_source": one["source"], "rationale_score": score}
        self.say(str(summary))
