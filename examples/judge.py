"""Score rows with a trained judge, and compare with gold scores if the rows have them.

    python examples/judge.py \
        --model judge \
        --dataset_name trl_tract/demo \
        --output_file judged.jsonl \
        --max_new_tokens 256

For long runs use `trl-tract judge`: it can be interrupted and continued, and shares the rows among processes.
"""

import json
from dataclasses import dataclass, field

from datasets import load_dataset
from trl import ScriptArguments, TrlParser

from trl_tract import CoTRAILJudge, TransformersBackend, score_report


@dataclass
class JudgeArguments:
    model: str = field(metadata={"help": "Judge model or adapter: directory or hub id."})
    output_file: str = field(metadata={"help": "Output file, with one JSON line per row: score, rationales, error."})
    num_generations: int = field(default=1, metadata={"help": "Rationales per row. Their scores are averaged."})
    max_new_tokens: int = field(default=1024, metadata={"help": "Maximum number of tokens in a rationale."})
    batch_size: int = field(default=8, metadata={"help": "Number of rationales generated at once."})


def main(script_args: ScriptArguments, args: JudgeArguments) -> None:
    rows = load_dataset(script_args.dataset_name, name=script_args.dataset_config, split=script_args.dataset_test_split)

    judge = CoTRAILJudge.from_pretrained(
        args.model,
        TransformersBackend(args.model, batch_size=args.batch_size),
        num_generations=args.num_generations,
        max_new_tokens=args.max_new_tokens,
    )
    judgements = judge.judge(list(rows))

    with open(args.output_file, "w", encoding="utf-8") as file:
        for judgement in judgements:
            file.write(json.dumps(judgement.to_dict()) + "\n")

    # An item that could not be scored has an error with the reason, and NaN as its score.
    scored = [judgement for judgement in judgements if judgement.error is None]
    print(f"{len(scored)} of {len(judgements)} rows have a score; all are in {args.output_file}")
    if "score" in rows.column_names:
        print(score_report([judgement.score for judgement in judgements], rows["score"]))


def make_parser() -> TrlParser:
    return TrlParser((ScriptArguments, JudgeArguments))


if __name__ == "__main__":
    main(*make_parser().parse_args_and_config())
