"""Stage one of TRACT: train the seed model on annotated rationales and scores.

`--dataset_name` is a hub id, or a directory with `train.jsonl` and `eval.jsonl` such as the demo's. Rows have TRL's
prompt-completion format.

    python examples/stage_one.py \
        --model_name_or_path Qwen/Qwen2.5-0.5B-Instruct \
        --dataset_name trl_tract/demo \
        --output_dir stage1 \
        --learning_rate 1e-4 \
        --num_train_epochs 2 \
        --per_device_train_batch_size 4 \
        --gradient_accumulation_steps 2 \
        --eval_strategy epoch \
        --use_peft --lora_r 8 --lora_target_modules all-linear

QLoRA on a consumer card: add `--load_in_4bit`. Several GPUs: `accelerate launch examples/stage_one.py ...`.
"""

from datasets import load_dataset
from trl import ModelConfig, ScriptArguments, TrlParser, get_peft_config, get_quantization_config

from trl_tract import TRACTConfig, TRACTTrainer


def main(script_args: ScriptArguments, training_args: TRACTConfig, model_args: ModelConfig) -> None:
    training_args.model_init_kwargs = {
        "revision": model_args.model_revision,
        "attn_implementation": model_args.attn_implementation,
        "dtype": model_args.dtype,
        **(training_args.model_init_kwargs or {}),
    }
    dataset = load_dataset(script_args.dataset_name, name=script_args.dataset_config)

    trainer = TRACTTrainer(
        model_args.model_name_or_path,
        args=training_args,
        train_dataset=dataset[script_args.dataset_train_split],
        eval_dataset=dataset[script_args.dataset_test_split] if training_args.eval_strategy != "no" else None,
        quantization_config=get_quantization_config(model_args),
        peft_config=get_peft_config(model_args),
    )
    trainer.train(resume_from_checkpoint=training_args.resume_from_checkpoint)

    # This also saves the tokenizer and tract_config.json, from which a judge reads grid and marker.
    trainer.save_model()
    trainer.create_model_card(dataset_name=script_args.dataset_name)
    trainer.accelerator.print(f"Stage one is in {training_args.output_dir}; next: examples/distill.py")
    trainer.end()


def make_parser() -> TrlParser:
    return TrlParser((ScriptArguments, TRACTConfig, ModelConfig))


if __name__ == "__main__":
    main(*make_parser().parse_args_and_config())
