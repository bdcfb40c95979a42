"""`trl-tract bootstrap`: rationales for rows that have only scores. Imports nothing heavy: `--help` reads it."""

from dataclasses import dataclass
from typing import Any

from trl_tract.commands.options import (
    BACKENDS,
    ROWS,
    ColumnArguments,
    EngineArguments,
    GenerationArguments,
    ScoreArguments,
    WorkerArguments,
)
from trl_tract.commands.training import is_first_process
from trl_tract.text.options import option, required


@dataclass
class BootstrapArguments:
    """The model that writes rationales, and the rows."""

    model: str = required(
        "Model that writes the rationales: a directory or hub id, or with --backend chat, the "
        "model's name at the endpoint."
    )
    data: str = required(f"{ROWS} Rows that already have a rationale keep it.")
    output_dir: str = required("Output directory. The rows with rationales are written there, to rows.jsonl.")
    tolerance: float | None = option(
        None,
        "Maximum difference between the score given with a rationale and the gold score. Defaults to half the smallest "
        "step between scores, or an eighth of the score range, whichever is larger.",
    )
    show_score: bool = option(
        True,
        "If no rationale matches the gold score, show the model the gold score and ask again. Such rationales are "
        "marked in the output. They are rejected if they reveal the score.",
    )
    keep: int = option(1, "Maximum number of rationales kept per row, the closest first.")
    rewrite: bool = option(False, "Also write rationales for rows that already have one.")
    on_failure: str = option(
        "drop",
        "What to do with a row if no rationale was accepted: drop the row, keep it without a rationale, or stop.",
        choices=["drop", "keep", "raise"],
    )
    num_generations: int = option(4, "Number of rationales sampled per row, each time the model is asked.")
    temperature: float = option(0.7, "Sampling temperature for rationales.")
    top_p: float = option(0.9, "Nucleus sampling threshold.")
    repetition_penalty: float = option(1.03, "Penalty on repeated tokens. 1 turns it off.")
    max_new_tokens: int = option(
        256, "Maximum length of a rationale, in tokens. A longer one is cut after its last complete sentence."
    )
    generation_seed: int = option(42, "Random seed for sampling.")
    generation_batch_size: int = option(
        32, "Maximum number of rationales generated at once (transformers backend only)."
    )
    backend: str = option(
        "transformers",
        "Engine that generates text: transformers, vLLM in this process, a vLLM server (see --base_url), or chat for "
        "any OpenAI-compatible chat endpoint. A chat endpoint gives no probabilities, so the score that the model "
        "writes is used.",
        choices=[*BACKENDS, "chat"],
    )
    engine_args: str | None = option(
        None, "Additional arguments for the backend, as JSON, such as '{\"tensor_parallel_size\": 2}' for vLLM."
    )
    prices: list[float] | None = option(
        None,
        "Prices per million input tokens and per million output tokens. The maximum cost is then printed before "
        "the run.",
    )
    invalid_rows: str = option(
        "raise",
        "What to do with rows that cannot be read or have no gold score: stop at once, or continue without them.",
        choices=["raise", "drop"],
    )

    def settings(self) -> dict[str, Any]:
        """As arguments of CoTBootstrap, but for scales and template."""
        kept = ("tolerance", "show_score", "keep", "rewrite", "on_failure", "num_generations", "prices")
        sampling = ("temperature", "top_p", "repetition_penalty", "max_new_tokens")
        return {**{name: getattr(self, name) for name in (*kept, *sampling)}, "seed": self.generation_seed}

    def options(self, engine: EngineArguments) -> dict[str, Any]:
        """As arguments of `make_author`."""
        generation = GenerationArguments(
            backend="server" if self.backend == "chat" else self.backend,
            engine_args=self.engine_args,
            generation_batch_size=self.generation_batch_size,
        )
        return {**engine.options(generation), "name": self.backend}


def write_rationales(
    rows: BootstrapArguments,
    scores: ScoreArguments,
    columns: ColumnArguments,
    engine: EngineArguments,
    worker: WorkerArguments,
) -> int:
    """Do what the options say; the exit code."""
    from trl_tract.backends.loading import load_tokenizer
    from trl_tract.rows.template import TemplateSettings
    from trl_tract.runs.steps import BootstrapStep
    from trl_tract.scale.scale import read_scales, scale_arguments
    from trl_tract.sources.columns import OwnColumns
    from trl_tract.sources.door import Source, rows_file

    scales = read_scales(vars(scores))
    template = TemplateSettings.of_training(vars(scores)).arguments
    settings = {**rows.settings(), **scale_arguments(scales), **template, "block_size": worker.block_size}
    own = OwnColumns.to_train_on(columns.columns, columns.rubric)
    source = Source(rows.data, scales, own, rows.invalid_rows, writes=not rows.rewrite)
    chat = rows.backend == "chat" or bool(load_tokenizer(rows.model).chat_template)
    with rows_file(source.rows(chat, lambda item: item.training or [item.reference])) as data:
        options = rows.options(engine)
        written = BootstrapStep(rows.model, str(data), rows.output_dir, settings, options, shard=worker.shard).run()
    if written is not None and is_first_process():
        print(f"The rows and their rationales are in {written}")
    return 0
