"""Train a policy with GRPO on a judge's expected scores.

The policy writes texts of the kind that the demo's judge was trained to score. For your own judge, change TASKS and
`judge_prompt`: the judge's prompts must have exactly the format of its training rows.

    python examples/grpo_judge_reward.py \
        --model_name_or_path Qwen/Qwen2.5-0.5B-Instruct \
        --judge judge \
        --output_dir policy \
        --num_generations 8 \
        --max_completion_length 128 \
        --learning_rate 1e-5 \
        --max_steps 100 \
        --use_peft --lora_r 8
"""

from dataclasses import dataclass, field

from datasets import Dataset
from trl import GRPOConfig, GRPOTrainer, ModelConfig, TrlParser, get_peft_config

from trl_tract import CoTRAILJudge, make_reward_func

TASKS = {
    "bug report": "version, system, steps, error",
    "recipe": "oven, minutes, servings, storage",
    "complaint reply": "apology, refund, cause, contact",
    "meeting invitation": "date, time, place, agenda",
}


@dataclass
class JudgeArguments:
    judge: str = field(metadata={"help": "Judge model or adapter: directory or hub id."})
    judge_max_new_tokens: int = field(default=256, metadata={"help": "Maximum tokens in the judge's rationale."})


def judge_prompt(row):
    """Build the prompt as in the judge's training rows, with the policy's text as the user turn."""
    rubric = f"Score this {row['task']}: 1, plus 1 for each of {row['criteria']}."
    system = f"{rubric} Quote a word for each, or none, then [RESULT] and the score."
    written = row["completion"][-1]["content"]
    return [{"role": "system", "content": system}, {"role": "user", "content": written}]


def main(script_args: JudgeArguments, training_args: GRPOConfig, model_args: ModelConfig) -> None:
    tasks = [
        {
            "prompt": [{"role": "user", "content": f"Write a {task}, in four sentences."}],
            "task": task,
            "criteria": criteria,
        }
        for task, criteria in TASKS.items()
    ]
    judge = CoTRAILJudge.from_pretrained(script_args.judge, max_new_tokens=script_args.judge_max_new_tokens)

    trainer = GRPOTrainer(
        model_args.model_name_or_path,
        reward_funcs=make_reward_func(judge, prompt=judge_prompt, scale="unit"),
        args=training_args,
        train_dataset=Dataset.from_list(tasks),
        peft_config=get_peft_config(model_args),
    )
    trainer.train()
    trainer.save_model()
    trainer.end()


def make_parser() -> TrlParser:
    return TrlParser((JudgeArguments, GRPOConfig, ModelConfig))


if __name__ == "__main__":
    main(*make_parser().parse_args_and_config())
