"""Train a judge further on its own errors. Rows need a prompt and a score, but no rationale.

    python examples/real.py \
        --model_name_or_path judge \
        --dataset_name rows.jsonl \
        --output_dir real \
        --num_generations 8 \
        --max_completion_length 256 \
        --learning_rate 1e-6

The judge is the full model or adapter that `stage_two.py` saved. Grid, marker and format are read from its directory.
"""

from datasets import load_dataset
from trl import ModelConfig, ScriptArguments, TrlParser, get_quantization_config

from trl_tract import REALConfig, REALTrainer


def main(script_args: ScriptArguments, training_args: REALConfig, model_args: ModelConfig) -> None:
    name = script_args.dataset_name
    rows = load_dataset("json", data_files=name, split="train") if name.endswith(".jsonl") else load_dataset(name)
    trainer = REALTrainer(
        model_args.model_name_or_path,
        args=training_args,
        train_dataset=rows.select_columns(["prompt", "score"]),
        quantization_config=get_quantization_config(model_args),
    )
    trainer.train()
    trainer.save_model()


def make_parser() -> TrlParser:
    return TrlParser((ScriptArguments, REALConfig, ModelConfig))


if __name__ == "__main__":
    main(*make_parser().parse_args_and_config())
