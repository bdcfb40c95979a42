"""Stage two of TRACT: train the SEED model again, on the rationales that the stage-one model wrote.

Do not start from the stage-one model: that gave worse results in the paper's ablation. Use stage one's other options.

    python examples/stage_two.py \
        --model_name_or_path Qwen/Qwen2.5-0.5B-Instruct \
        --self_generated self-generated \
        --output_dir judge \
        --learning_rate 1e-4 \
        --num_train_epochs 2 \
        --per_device_train_batch_size 4 \
        --gradient_accumulation_steps 2 \
        --use_peft --lora_r 8 --lora_target_modules all-linear

To upload the judge to a private repository on the hub, add `--push_to_hub --hub_model_id user/my-judge`.
"""

from dataclasses import dataclass, field

from datasets import load_dataset
from trl import ModelConfig, TrlParser, get_peft_config, get_quantization_config

from trl_tract import TRACTConfig, TRACTTrainer


@dataclass
class StageTwoArguments:
    self_generated: str = field(metadata={"help": "Output directory of examples/distill.py."})


def main(script_args: StageTwoArguments, training_args: TRACTConfig, model_args: ModelConfig) -> None:
    training_args.model_init_kwargs = {
        "revision": model_args.model_revision,
        "attn_implementation": model_args.attn_implementation,
        "dtype": model_args.dtype,
        **(training_args.model_init_kwargs or {}),
    }
    rows = load_dataset("json", data_files=f"{script_args.self_generated}/rows.jsonl", split="train")

    trainer = TRACTTrainer(
        model_args.model_name_or_path,
        args=training_args,
        train_dataset=rows,
        quantization_config=get_quantization_config(model_args),
        peft_config=get_peft_config(model_args),
    )
    trainer.train(resume_from_checkpoint=training_args.resume_from_checkpoint)

    trainer.save_model()  # with --push_to_hub, this also uploads it with its card
    trainer.create_model_card()
    trainer.accelerator.print(f"The judge is in {training_args.output_dir}; next: examples/judge.py")
    trainer.end()


def make_parser() -> TrlParser:
    return TrlParser((StageTwoArguments, TRACTConfig, ModelConfig))


if __name__ == "__main__":
    main(*make_parser().parse_args_and_config())
