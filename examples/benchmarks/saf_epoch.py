"""One epoch of training on rows of Short Answer Feedback, timed: what `shared_prompts.py --epoch` starts.

Runs on older builds of trl_tract as well, which know neither `share_prompts` nor an order of prompts. The last line of
stdout is JSON.
"""

import argparse
import csv
import json
import random
import tempfile
import time
from typing import Any

import torch
from contenders import SHAPES
from datasets import Dataset
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from trl_tract import TRACTConfig, TRACTTrainer, rubric_prompt

CRITERION = "Is the answer to the question correct and complete, measured by the reference answer?"
DESCRIPTIONS = {
    "0": "The answer is wrong, or does not address the question.",
    "0.25": "Little of what the reference answer says is there.",
    "0.5": "About half of what the reference answer says is there.",
    "0.75": "Most of what the reference answer says is there, with a gap or an error.",
    "1": "The answer says all that the reference answer says, correctly.",
}


def read_rows(path: str, count: int, order: str) -> list[dict[str, Any]]:
    """`count` rows by chance, the same for every order and build; scores that are no quarters are at the nearest."""
    with open(path, newline="", encoding="utf-8") as file:
        records = [record for record in csv.DictReader(file) if record["answer"].strip()]
    rows = []
    for record in random.Random(0).sample(records, count):
        score = min(DESCRIPTIONS, key=lambda text: abs(float(text) - float(record["score"])))
        prompt = rubric_prompt(
            record["question"],
            record["answer"],
            CRITERION,
            DESCRIPTIONS,
            reference=record["reference"],
            **({} if order == "standard" else {"order": order}),
        )
        completion = f"{record['feedback'].strip()} [RESULT] {score}"
        rows.append(
            {
                "prompt": [{"role": "user", "content": prompt}],
                "completion": [{"role": "assistant", "content": completion}],
                "score": float(record["score"]),
            }
        )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("csv", help="columns question, reference, answer, feedback, score")
    parser.add_argument("--tokenizer", required=True, help="directory or hub id")
    parser.add_argument("--rows", type=int, default=240)
    parser.add_argument("--layers", type=int, default=3)
    parser.add_argument("--order", default="standard")
    parser.add_argument("--share", action="store_true")
    args = parser.parse_args()
    tokenizer = AutoTokenizer.from_pretrained(args.tokenizer)
    hidden, between, _, heads, key_value_heads = SHAPES["small"]
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=hidden,
        intermediate_size=between,
        num_hidden_layers=args.layers,
        num_attention_heads=heads,
        num_key_value_heads=key_value_heads,
        max_position_embeddings=4096,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    torch.manual_seed(0)
    cuda = torch.cuda.is_available()
    with tempfile.TemporaryDirectory() as folder:
        trainer = TRACTTrainer(
            LlamaForCausalLM(config).to("cuda" if cuda else "cpu"),
            TRACTConfig(
                folder,
                num_train_epochs=1,
                per_device_train_batch_size=8,
                score_values=[float(text) for text in DESCRIPTIONS],
                bf16=cuda,
                use_cpu=not cuda,
                save_strategy="no",
                logging_strategy="no",
                report_to="none",
                disable_tqdm=True,
                dataloader_pin_memory=False,
                **({"share_prompts": True, "share_batches": "question"} if args.share else {}),
            ),
            train_dataset=Dataset.from_list(read_rows(args.csv, args.rows, args.order)),
            processing_class=tokenizer,
        )
        start, cpu = time.perf_counter(), time.process_time()
        trainer.train()
        taken = {"seconds": time.perf_counter() - start, "cpu_seconds": time.process_time() - cpu}
    tokens = sum(map(len, trainer.train_dataset["input_ids"]))
    print(json.dumps(taken | {"rows": args.rows, "tokens": tokens, "updates": trainer.state.global_step}))


if __name__ == "__main__":
    main()
