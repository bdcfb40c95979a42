"""Let the stage-one model write its own rationale for every training prompt. The gold scores stay the same.

    python examples/distill.py \
        --model stage1 \
        --dataset_name trl_tract/demo \
        --output_dir self-generated \
        --max_new_tokens 256

Finished blocks are saved, so an interrupted run continues when you start it again. On several GPUs, use `accelerate
launch` instead of `python`: the processes share the rows.
"""

from dataclasses import dataclass, field

from datasets import load_dataset
from trl import ScriptArguments, TrlParser

from trl_tract import CoTSelfDistill, TransformersBackend


@dataclass
class DistillArguments:
    model: str = field(metadata={"help": "Stage-one model or adapter: directory or hub id."})
    output_dir: str = field(metadata={"help": "Output directory for rows.jsonl, the rows of stage two."})
    num_generations: int = field(default=1, metadata={"help": "Number of rationales per prompt."})
    max_new_tokens: int = field(default=1024, metadata={"help": "Maximum number of tokens in a rationale."})
    batch_size: int = field(default=8, metadata={"help": "Number of rationales generated at once."})
    on_failure: str = field(
        default="keep_gold",
        metadata={
            "help": "What to do with a row if all attempts fail.",
            "choices": ["keep_gold", "drop", "raise"],
        },
    )


def main(script_args: ScriptArguments, args: DistillArguments) -> None:
    rows = load_dataset(
        script_args.dataset_name, name=script_args.dataset_config, split=script_args.dataset_train_split
    )

    # On a GPU, VLLMBackend and ServerBackend are faster.
    backend = TransformersBackend(args.model, batch_size=args.batch_size)
    distiller = CoTSelfDistill.from_pretrained(
        args.model,
        backend,
        num_generations=args.num_generations,
        max_new_tokens=args.max_new_tokens,
        on_failure=args.on_failure,
    )
    stage_two_rows = distiller.distill(rows, args.output_dir)

    own = sum(source == "self" for source in stage_two_rows["rationale_source"])
    print(f"{own} of {len(stage_two_rows)} rationales are the model's own; next: examples/stage_two.py")


def make_parser() -> TrlParser:
    return TrlParser((ScriptArguments, DistillArguments))


if __name__ == "__main__":
    main(*make_parser().parse_args_and_config())
