"""Between the stages: the stage-one model writes its own rationale for every training prompt. The gold scores stay.

    python examples/distill.py \
        --model stage1 \
        --dataset_name trl_tract/demo \
        --output_dir self-generated \
        --max_new_tokens 256

What is finished is on disk: stopped and started again, it goes on. On many GPUs put `accelerate launch` in place of
`python`: the processes share the rows.
"""

from dataclasses import dataclass, field

from datasets import load_dataset
from trl import ScriptArguments, TrlParser

from trl_tract import CoTSelfDistill, TransformersBackend


@dataclass
class DistillArguments:
    model: str = field(metadata={"help": "The stage-one model or adapter: directory or hub id."})
    output_dir: str = field(metadata={"help": "Receives rows.jsonl, the rows of stage two."})
    num_generations: int = field(default=1, metadata={"help": "Stage-two rows for each prompt."})
    max_new_tokens: int = field(default=1024, metadata={"help": "Tokens a rationale may have."})
    batch_size: int = field(default=8, metadata={"help": "Rationales that are written at once."})
    on_failure: str = field(
        default="keep_gold",
        metadata={
            "help": "What happens to a row whose rationale fails in every attempt.",
            "choices": ["keep_gold", "drop", "raise"],
        },
    )


def main(script_args: ScriptArguments, args: DistillArguments) -> None:
    rows = load_dataset(
        script_args.dataset_name, name=script_args.dataset_config, split=script_args.dataset_train_split
    )

    # VLLMBackend or ServerBackend write the same rationales faster on a GPU.
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
