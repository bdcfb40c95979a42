"""`trl-tract bootstrap`: rationales for rows that have only scores. Imports nothing heavy: `--help` reads it."""

import os
from dataclasses import dataclass
from typing import Any

from trl_tract.commands.options import (
    BACKENDS,
    ROWS,
    ColumnArguments,
    EngineArguments,
    GenerationArguments,
    WorkerArguments,
)
from trl_tract.text.options import option, required


@dataclass
class BootstrapArguments:
    """Who writes the rationales, and for which rows."""

    model: str = required("Who writes: a model directory or hub id, or with --backend chat the model's name there.")
    data: str = required(f"{ROWS} Rows that have a rationale keep it.")
    output_dir: str = required("Where rows.jsonl, the rows with rationales, is written.")
    tolerance: float | None = option(
        None,
        "How far the score that a rationale comes to may be from the gold score. By default half the "
        "smallest step between scores, or an eighth of their range if that is more.",
    )
    show_score: bool = option(
        True,
        "Where no rationale comes to the gold score, show it and ask again. Such rationales are marked, "
        "and not kept if they give the score away.",
    )
    keep: int = option(1, "Rationales to keep for a row, the closest first.")
    rewrite: bool = option(False, "Write rationales for the rows that have one too.")
    on_failure: str = option(
        "drop",
        "What to do with a row for which no rationale was kept: drop it, keep it without one, or stop.",
        choices=["drop", "keep", "raise"],
    )
    num_generations: int = option(4, "Rationales to sample for a row, each time it is asked.")
    temperature: float = option(0.7, "Sampling temperature of the rationale.")
    top_p: float = option(0.9, "Nucleus sampling threshold.")
    repetition_penalty: float = option(1.03, "Penalty on tokens used before. 1 turns it off.")
    max_new_tokens: int = option(256, "Longest rationale, in tokens. A longer one ends with its last whole sentence.")
    generation_seed: int = option(42, "Random seed of the sampling.")
    generation_batch_size: int = option(32, "Rationales generated at once at most (transformers backend only).")
    backend: str = option(
        "transformers",
        "What generates text: transformers, vLLM in this process, a vLLM server (see --base_url), or chat: "
        "any OpenAI-compatible chat endpoint. The last one gives no probabilities, so the score that it writes "
        "counts.",
        choices=[*BACKENDS, "chat"],
    )
    engine_args: str | None = option(
        None, "More arguments for the backend, as JSON: '{\"tensor_parallel_size\": 2}' for vLLM."
    )
    prices: list[float] | None = option(
        None, "Two prices per million tokens, read and written, to be told the most that it can cost."
    )
    score_values: list[float] = option(
        [1.0, 2.0, 3.0, 4.0, 5.0], "The possible scores, as in training: 0 1 2, or 0..100."
    )
    score_texts: list[str] | None = option(None, "How the scores are written, if in words.")
    score_marker: str = option("[RESULT]", "Text before the score.")
    aspects: dict[str, Any] | str | None = option(
        None, "For several scores in one completion, as in training. JSON, or a mapping in a YAML file."
    )
    chat_template_kwargs: dict[str, Any] | str | None = option(
        None, "Variables of the chat template, as in training. JSON."
    )
    thinking: str = option(
        "auto", "Whether the rationale is the thinking, as in training.", choices=["auto", "off", "rationale"]
    )
    invalid_rows: str = option(
        "raise",
        "What to do with rows that cannot be read or have no gold score: stop at once, or go on without them.",
        choices=["raise", "drop"],
    )

    def settings(self) -> dict[str, Any]:
        """As arguments of CoTBootstrap, but for scales and template."""
        kept = ("tolerance", "show_score", "keep", "rewrite", "on_failure", "num_generations", "prices")
        sampling = ("temperature", "top_p", "repetition_penalty", "max_new_tokens")
        return {**{name: getattr(self, name) for name in (*kept, *sampling)}, "seed": self.generation_seed}

    def training(self) -> dict[str, Any]:
        """The fields of TRACTConfig among them."""
        names = ("score_values", "score_texts", "score_marker", "aspects", "chat_template_kwargs", "thinking")
        return {name: getattr(self, name) for name in names}

    def options(self, engine: EngineArguments) -> dict[str, Any]:
        """As arguments of `make_author`."""
        generation = GenerationArguments(
            backend="server" if self.backend == "chat" else self.backend,
            engine_args=self.engine_args,
            generation_batch_size=self.generation_batch_size,
        )
        return {**engine.options(generation), "name": self.backend}


def write_rationales(
    rows: BootstrapArguments, columns: ColumnArguments, engine: EngineArguments, worker: WorkerArguments
) -> int:
    """Do what the options say; the exit code."""
    from trl_tract.backends.loading import load_tokenizer
    from trl_tract.rows.template import TemplateSettings
    from trl_tract.runs.steps import BootstrapStep
    from trl_tract.scale.scale import read_scales, scale_arguments
    from trl_tract.sources.columns import OwnColumns
    from trl_tract.sources.door import Source, rows_file

    scales = read_scales(rows.training())
    template = TemplateSettings.of_training(rows.training()).arguments
    settings = {**rows.settings(), **scale_arguments(scales), **template, "block_size": worker.block_size}
    own = OwnColumns.parse(columns.columns, columns.rubric)
    source = Source(rows.data, scales, own, rows.invalid_rows, writes=not rows.rewrite)
    chat = rows.backend == "chat" or bool(load_tokenizer(rows.model).chat_template)
    with rows_file(source.rows(chat, lambda item: item.training or [item.reference])) as data:
        options = rows.options(engine)
        written = BootstrapStep(rows.model, str(data), rows.output_dir, settings, options, shard=worker.shard).run()
    if written is not None and os.environ.get("RANK", "0") == "0":
        print(f"The rows with rationales are in {written}")
    return 0
