"""What does it save to compute once what prompts begin with alike, in judging and in self-distillation?

Two builds do the same work on the same weights in turn, each in a process of its own that has the model loaded: this
one, and with `--against DIR` the package in DIR (a checkout of another commit); without it, this one with sharing
switched off. Each process warms up on `--warm-up` prompts. A build runs by its own defaults; `--batch-size` sets the
same for both.

- `judge`: items of several questions, `--new-tokens` for a rationale, in blocks of 64 as in `trl-tract judge`. `--rows`
  is a CSV file with `question`, `reference` and `answer`; else items are made up. Prompts have the response before
  reference and rubric (`standard`) or behind them (`shared-first`), for each build as `--orders` says.
- `distill`: `--n` rationales for each of `--prompts` prompts of `--prompt-tokens` tokens.

    python examples/benchmarks/shared_inference.py --smoke
    python examples/benchmarks/shared_inference.py --model MODEL --rows saf.csv --against OLD --ask judge
    python examples/benchmarks/shared_inference.py --model MODEL --against OLD --ask distill

A markdown table grows on stdout, ratios are medians over rounds; the last line is JSON with versions, arguments, rows.
"""

import argparse
import csv
import itertools
import json
import os
import platform
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

SMOKE = {"items": 4, "questions": 2, "prompts": 2, "prompt_tokens": 30, "new_tokens": 3, "n": 2, "rounds": 2}
TEXT = "the reply names two of four points and is polite but it gives no reason for its second claim"
WORDS = TEXT.split()
LEVELS = ("wrong", "mostly wrong", "half", "mostly right", "right")
RUBRIC = "\n".join(f"Score {score}: {text}" for score, text in enumerate(LEVELS, start=1))
TASK = "Judge the response. Write feedback of a few words, then [RESULT] and a score from 1 to 5."


def prompt(question: str, reference: str, answer: str, order: str) -> str:
    """The prompt of one item."""
    response = f"###Response:\n{answer}\n\n"
    rest = f"###Reference answer:\n{reference}\n\n###Rubric: is the response right?\n{RUBRIC}\n\n"
    parts = response + rest if order == "standard" else rest + response
    return f"{TASK}\n\n###Instruction:\n{question}\n\n{parts}###Feedback: "


def made_up(arguments: argparse.Namespace) -> list[dict[str, str]]:
    """Items of a few questions, in turn."""
    rng = random.Random(0)
    write = lambda count: " ".join(rng.choices(WORDS, k=count))  # noqa: E731
    asked = [{"question": write(40), "reference": write(80)} for _ in range(arguments.questions)]
    return [{**asked[item % len(asked)], "answer": write(rng.randint(5, 60))} for item in range(arguments.items)]


def tiny_model(folder: Path) -> str:
    """A random model that a smoke test loads."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer, bpe.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    bpe.train_from_iterator(
        WORDS, trainers.BpeTrainer(vocab_size=300, special_tokens=["<e>"], initial_alphabet=alphabet)
    )
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token="<e>", pad_token="<e>")
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), **sizes))
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def work(job: dict[str, Any]) -> None:
    """The process of one build: warms up, then does the job for each line that it reads, and writes what it took."""
    from datasets import Dataset

    from trl_tract import CoTRAILJudge, CoTSelfDistill, TransformersBackend

    sizes = {} if job["batch_size"] is None else {"batch_size": job["batch_size"]}
    backend = TransformersBackend(job["model"], dtype=job["dtype"], **sizes)
    backend._shares = False if job["unshared"] else None
    settings = {"max_new_tokens": job["new_tokens"], "max_attempts": 1}

    def judge(prompts: list[str]) -> list[float]:
        judging = CoTRAILJudge(backend, score_values=[1, 2, 3, 4, 5], append_marker=True, **settings)
        blocks = [prompts[at : at + 64] for at in range(0, len(prompts), 64)]
        return [judgement.score for block in blocks for judgement in judging.judge(block)]

    def distill(prompts: list[str]) -> list[float]:
        rows = [{"prompt": text, "completion": " fine [RESULT] 3", "score": 3.0} for text in prompts]
        with tempfile.TemporaryDirectory() as folder:
            CoTSelfDistill(backend, num_generations=job["n"], **settings).distill(Dataset.from_list(rows), folder)
        return []

    run = judge if job["ask"] == "judge" else distill
    for prompts in itertools.chain([job["prompts"][: job["warm_up"]]], (job["prompts"] for _ in sys.stdin)):
        wall, cpu = time.perf_counter(), time.process_time()
        scores = run(prompts)
        took = {"seconds": time.perf_counter() - wall, "cpu_seconds": time.process_time() - cpu, "scores": scores}
        print("\n" + json.dumps(took), flush=True)


class Build:
    """A process that does a job with one build of the package."""

    def __init__(self, job: dict[str, Any], package: Path | None, folder: Path) -> None:
        path = folder / f"{len(list(folder.iterdir()))}.json"
        path.write_text(json.dumps(job), encoding="utf-8")
        places = [str(package)] if package else [os.environ.get("PYTHONPATH", "")]
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, places))}
        command = [sys.executable, __file__, "--work", str(path)]
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
        )
        self.read()  # warmed up

    def read(self) -> dict[str, Any]:
        """What the next run took."""
        assert self.process.stdout is not None
        for line in self.process.stdout:
            if line.startswith("{"):
                took: dict[str, Any] = json.loads(line)
                return took
        raise RuntimeError("a build ended without an answer; its error is above")

    def run(self) -> dict[str, Any]:
        """Do the job once more."""
        assert self.process.stdin is not None
        self.process.stdin.write("\n")
        self.process.stdin.flush()
        return self.read()

    def close(self) -> None:
        """End the process."""
        self.process.communicate()


def spread(values: Sequence[float]) -> dict[str, float]:
    """Median, smallest and largest."""
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}


def compare(ask: str, arguments: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """One row: both builds in turn, round by round."""
    if ask == "judge":
        rows = made_up(arguments)
        if arguments.rows:
            with arguments.rows.open(encoding="utf-8", newline="") as file:
                rows = list(csv.DictReader(file))[: arguments.items]
        texts = [
            [prompt(row["question"], row["reference"], row["answer"], order) for row in rows]
            for order in arguments.orders
        ]
    else:
        from transformers import AutoTokenizer

        rng = random.Random(0)
        tokenizer = AutoTokenizer.from_pretrained(arguments.model)
        long = [" ".join(rng.choices(WORDS, k=arguments.prompt_tokens)) for _ in range(arguments.prompts)]
        cut = [tokenizer(text)["input_ids"][: arguments.prompt_tokens] for text in long]
        texts = [[tokenizer.decode(ids) for ids in cut]] * 2
    shared = {"model": arguments.model, "dtype": arguments.dtype, "batch_size": arguments.batch_size, "ask": ask}
    shared |= {"new_tokens": arguments.new_tokens, "n": arguments.n, "warm_up": arguments.warm_up}
    builds = [
        Build(shared | {"prompts": texts[0], "unshared": arguments.against is None}, arguments.against, folder),
        Build(shared | {"prompts": texts[1], "unshared": False}, None, folder),
    ]
    # In turn, each first as often as second.
    took = []
    for number in range(arguments.rounds):
        both = {at: builds[at].run() for at in ((0, 1) if number % 2 == 0 else (1, 0))}
        took.append([both[0], both[1]])
    for build in builds:
        build.close()
    row: dict[str, Any] = {"ask": ask, "prompts": len(texts[0]), "rounds": len(took)}
    for unit in ("seconds", "cpu_seconds"):
        row[f"before_{unit}"], row[f"now_{unit}"] = (spread([pair[at][unit] for pair in took]) for at in (0, 1))
        row[f"now_over_before_in_{unit}"] = spread([now[unit] / before[unit] for before, now in took])
    return row


def main(argv: Sequence[str] | None = None) -> None:
    """Parse, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="Directory of the model; a tiny random one with --smoke.")
    parser.add_argument("--ask", nargs="+", default=["judge", "distill"], choices=["judge", "distill"])
    parser.add_argument("--against", type=Path, help="Checkout of the build to compare with.")
    parser.add_argument("--rows", type=Path, help="CSV file of judge's items.")
    parser.add_argument(
        "--orders", nargs=2, default=["standard", "shared-first"], help="Of the other build, and of this."
    )
    parser.add_argument("--items", type=int, default=252)
    parser.add_argument("--questions", type=int, default=18)
    parser.add_argument("--prompts", type=int, default=16)
    parser.add_argument("--prompt-tokens", type=int, default=1000)
    parser.add_argument("--new-tokens", type=int, default=40)
    parser.add_argument("--n", type=int, default=4, help="Rationales for each prompt of `distill`.")
    parser.add_argument("--batch-size", type=int, help="Of both builds; each one's default without it.")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--warm-up", type=int, default=4, help="Prompts that each build does first, unmeasured.")
    parser.add_argument("--smoke", action="store_true", help="Seconds: does it run?")
    parser.add_argument("--work", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args(argv)
    if arguments.work:
        work(json.loads(arguments.work.read_text(encoding="utf-8")))
        return
    with tempfile.TemporaryDirectory() as folder:
        if arguments.smoke:
            vars(arguments).update(SMOKE)
            arguments.model = arguments.model or tiny_model(Path(folder) / "model")
        if not arguments.model:
            parser.error("--model is needed")
        jobs = Path(folder) / "jobs"
        jobs.mkdir()
        print("| | prompts | rounds | before, s | now, s | now / before | in CPU seconds |\n" + "|---" * 7 + "|")
        rows = []
        for ask in arguments.ask:
            row = compare(ask, arguments, jobs)
            rows.append(row)
            ratio, cpu = row["now_over_before_in_seconds"], row["now_over_before_in_cpu_seconds"]
            shown = [f"{each['median']:.3f} ({each['min']:.3f} to {each['max']:.3f})" for each in (ratio, cpu)]
            seconds = [f"{row[f'{which}_seconds']['median']:.1f}" for which in ("before", "now")]
            print(
                "| " + " | ".join([ask, str(row["prompts"]), str(row["rounds"]), *seconds, *shown]) + " |", flush=True
            )
    result = {
        "benchmark": "shared_inference",
        "device": platform.processor() or platform.machine(),
        "versions": {name: version(name) for name in ("torch", "transformers")},
        "arguments": {
            name: str(value) if isinstance(value, Path) else value for name, value in vars(arguments).items()
        },
        "rows": rows,
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
