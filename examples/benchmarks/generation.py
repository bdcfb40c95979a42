"""What does generation cost: its durability, its memory, and each further rationale of a prompt?

- `durable`: rationales per second of `CoTSelfDistill`, which writes every one to disk, against the bare backend on the
  same prompts. The aim is at least 0.95.
- `samples`: cost of n continuations of one prompt, whose prefill they share, against n that compute it n times.
- `memory`: peak memory of a distillation against its number of rows, with a `ScriptedBackend` in place of a model. Flat
  is the aim.

Both sides of a comparison do the same work: no continuation ends before `--new-tokens`, and each counts as a finished
rationale. They alternate in one process after a warm-up; a ratio is taken inside a round, and what is reported is the
median of the rounds' ratios with their spread. CPU seconds stand beside seconds: on a machine that does other work as
well, they are the ones to read.

    python examples/benchmarks/generation.py --smoke                               # seconds, tiny: does it run?
    python examples/benchmarks/generation.py --ask durable samples --model MODEL   # directory or hub id
    python examples/benchmarks/generation.py --ask memory --rows 1000 10000 100000 1000000

A markdown table for each question on stdout; the last line is JSON with device, versions, arguments and results.
"""

import argparse
import itertools
import json
import platform
import random
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

import trl_tract
from trl_tract import CoTSelfDistill, TransformersBackend
from trl_tract.backends import Generation, ScriptedBackend
from trl_tract.rows.tokens import prompt_ids

QUESTIONS = ["durable", "samples", "memory"]
SMOKE = {
    "model": None,
    "prompts": 6,
    "prompt_tokens": 40,
    "new_tokens": 4,
    "batch_size": 2,
    "n": [1, 2],
    "rows": [20, 40],
    "rounds": 2,
}
WORDS = ["polite", "rude", "short", "long", "clear", "greets", "explains", "refuses", "thanks", "helps"]
MARKER = "[RESULT]"


def made_up_rows(count: int, words: int, seed: int = 0) -> Iterator[dict[str, Any]]:
    """Training rows of about `words` words, one after the other."""
    rng = random.Random(seed)
    for number in range(count):
        text = " ".join(rng.choices(WORDS, k=max(1, words - rng.randint(0, words // 4))))
        score = 1 + number % 5
        yield {"prompt": f"{number}: {text}", "completion": f"It is {score}. {MARKER} {score}", "score": float(score)}


def word_tokenizer() -> PreTrainedTokenizerFast:
    """A token a word: small, quick, and without a network."""
    texts = [*WORDS, *map(str, range(10)), MARKER, "It", "is", ".", ":", "</s>", "<unk>"]
    tokenizer = Tokenizer(models.WordLevel({text: i for i, text in enumerate(texts)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.WhitespaceSplit()])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>", unk_token="<unk>")


class FullLength(TransformersBackend):
    """Every continuation has all its tokens, and counts as one that reached the marker: the same work in every call."""

    def __init__(self, model: str | None, batch_size: int, dtype: str | None) -> None:
        if model is None:
            tokenizer = word_tokenizer()
            config = LlamaConfig(
                vocab_size=len(tokenizer),
                hidden_size=64,
                intermediate_size=128,
                num_hidden_layers=2,
                num_attention_heads=4,
            )
            torch.manual_seed(0)
            super().__init__(LlamaForCausalLM(config).eval(), tokenizer, batch_size=batch_size)
        else:
            tokenizer = AutoTokenizer.from_pretrained(model)
            super().__init__(model, tokenizer, batch_size=batch_size, dtype=dtype)
        tokenizer.pad_token, tokenizer.eos_token = tokenizer.pad_token or tokenizer.eos_token, None
        self.model.generation_config.eos_token_id = None

    def generate(self, prompts: Sequence[Sequence[int]], **settings: Any) -> list[list[Generation]]:
        sampled = super().generate(prompts, **{**settings, "stop": "[NEVER WRITTEN]"})
        return [[replace(one, text=f"{one.text} .", finish_reason="stop") for one in row] for row in sampled]


def cost(step: Callable[[], Any]) -> dict[str, float]:
    """Seconds and CPU seconds of `step`."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    start, cpu = time.perf_counter(), time.process_time()
    step()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return {"seconds": time.perf_counter() - start, "cpu_seconds": time.process_time() - cpu}


def spread(values: list[float]) -> dict[str, float]:
    low, median, high = np.quantile(values, [0, 0.5, 1]).round(4).tolist()
    return {"min": low, "median": median, "max": high}


def compare(contenders: dict[str, Callable[[], Any]], rounds: int) -> dict[str, Any]:
    """Costs of both, and those of the second over the first's: alternating, the one and the other going first."""
    for step in contenders.values():
        step()
    orders = itertools.islice(itertools.cycle(itertools.permutations(contenders)), rounds)
    times = [{name: cost(contenders[name]) for name in order} for order in orders]
    first, second = contenders
    result: dict[str, Any] = {"rounds": rounds}
    for unit in ("seconds", "cpu_seconds"):
        result[unit] = {name: spread([each[name][unit] for each in times]) for name in contenders}
        result[f"{second}_over_{first}_in_{unit}"] = spread([each[second][unit] / each[first][unit] for each in times])
    return result


def ask_durable(arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """The durable pass against the bare backend: the same prompts, the same number of tokens."""
    backend = FullLength(arguments.model, arguments.batch_size, arguments.dtype)
    rows = list(made_up_rows(arguments.prompts, arguments.prompt_tokens))
    prompts = [prompt_ids(backend.tokenizer, row["prompt"]) for row in rows]
    settings = {"temperature": 1.0, "top_p": 0.9, "repetition_penalty": 1.03, "max_new_tokens": arguments.new_tokens}
    # What fails is not sampled again: an untrained model may write anything.
    distiller = CoTSelfDistill(backend, max_attempts=1, **settings)

    def durable() -> None:
        with tempfile.TemporaryDirectory() as folder:
            distiller.distill(Dataset.from_list(rows), folder)

    def bare() -> None:
        backend.generate(prompts, n=1, seed=42, **settings)

    result = compare({"durable": durable, "bare": bare}, arguments.rounds)
    result["rationales_per_second"] = {
        name: round(len(rows) / result["seconds"][name]["median"], 4) for name in ("durable", "bare")
    }
    return [result]


def ask_samples(arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """n continuations of one prompt, the prefill shared and not."""
    backend = FullLength(arguments.model, max(arguments.n), arguments.dtype)
    (row,) = made_up_rows(1, 2 * arguments.prompt_tokens)
    ids = prompt_ids(backend.tokenizer, row["prompt"])[: arguments.prompt_tokens]

    def shared(n: int) -> None:
        backend.generate([ids], n=n, max_new_tokens=arguments.new_tokens)

    def unshared(n: int) -> None:
        backend._shares = False  # as for models whose keys and values cannot be shared
        shared(n)
        backend._shares = True

    results = []
    for n in arguments.n:
        both = {"shared": lambda n=n: shared(n), "unshared": lambda n=n: unshared(n)}
        results.append({"n": n, "prompt_tokens": len(ids), **compare(both, arguments.rounds)})
        report(f"n={n}: {results[-1]['cpu_seconds']}")
    return results


def memory_child(rows: Path) -> None:
    """Distil a file of rows with a scripted backend, and print this process's peak resident set before and after."""
    script = ScriptedBackend(lambda prompt, seed: f"It is polite . {MARKER} 3", word_tokenizer(), record_calls=False)
    before = peak_rss_bytes()
    with tempfile.TemporaryDirectory() as folder:
        spent = cost(lambda: CoTSelfDistill(script).distill_file(rows, folder))
        sizes = [path.stat().st_size for path in Path(folder).rglob("*") if path.is_file()]
    left = {"files": len(sizes), "bytes": sum(sizes)}
    print(json.dumps({"imports_bytes": before, "peak_bytes": peak_rss_bytes(), **spent, **left}))


def peak_rss_bytes() -> int:
    """The largest resident set that this process has had; Linux tells it."""
    found = re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found is not None
    return int(found[1]) * 1024


def ask_memory(arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """A process for each number of rows: a peak never falls."""
    results = []
    for count in arguments.rows:
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder) / "rows.jsonl"
            with file.open("w", encoding="utf-8") as lines:
                lines.writelines(f"{json.dumps(row)}\n" for row in made_up_rows(count, 40))
            child = subprocess.run(
                [sys.executable, __file__, "--memory-child", str(file)], stdout=subprocess.PIPE, text=True, check=True
            )
            results.append({"rows": count, **json.loads(child.stdout.splitlines()[-1])})
        report(f"{count} rows: {results[-1]}")
    return results


def report(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def table(question: str, results: list[dict[str, Any]]) -> str:
    if question == "memory":
        header = ["rows", "peak, MB", "above the imports, MB", "seconds", "CPU seconds", "files", "on disk, MB"]
        rows = [
            [
                f"{r['rows']:,}",
                r["peak_bytes"] / 1e6,
                (r["peak_bytes"] - r["imports_bytes"]) / 1e6,
                r["seconds"],
                r["cpu_seconds"],
                f"{r['files']:,}",
                r["bytes"] / 1e6,
            ]
            for r in results
        ]
    else:
        first, second = ("durable", "bare") if question == "durable" else ("shared", "unshared")
        header = ["n", f"{first}, s", f"{second}, s", f"{second} / {first}", "the same in CPU seconds"]
        rows = [
            [
                r.get("n", 1),
                r["seconds"][first]["median"],
                r["seconds"][second]["median"],
                r[f"{second}_over_{first}_in_seconds"]["median"],
                r[f"{second}_over_{first}_in_cpu_seconds"]["median"],
            ]
            for r in results
        ]
    lines = [header, ["---"] * len(header)]
    lines += [[f"{cell:.3f}" if isinstance(cell, float) else str(cell) for cell in row] for row in rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ask", nargs="+", choices=QUESTIONS, default=QUESTIONS)
    parser.add_argument("--smoke", action="store_true", help="tiny sizes: does it run?")
    parser.add_argument("--model", help="directory or hub id; a tiny random Llama by default")
    parser.add_argument("--dtype", help="of the weights; the checkpoint's own by default")
    parser.add_argument("--prompts", type=int, default=64, help="prompts of `durable`")
    parser.add_argument("--prompt-tokens", type=int, default=900, help="of `samples`; about as many words in `durable`")
    parser.add_argument("--new-tokens", type=int, default=100, help="tokens of each continuation")
    parser.add_argument("--batch-size", type=int, default=8, help="sequences in a forward pass of `durable`")
    parser.add_argument("--n", type=int, nargs="+", default=[1, 2, 4, 8], help="continuations a prompt")
    parser.add_argument("--rows", type=int, nargs="+", default=[1000, 10_000, 100_000, 1_000_000], help="of `memory`")
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--memory-child", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args(argv)
    if arguments.memory_child:
        memory_child(arguments.memory_child)
        return
    if arguments.smoke:
        vars(arguments).update(SMOKE)
    ask = {"durable": ask_durable, "samples": ask_samples, "memory": ask_memory}
    results = {}
    for question in arguments.ask:
        results[question] = ask[question](arguments)
        print(f"{question}\n\n{table(question, results[question])}\n", flush=True)
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else platform.processor() or platform.machine()
    versions = {module.__name__: module.__version__ for module in (torch, transformers, trl_tract)}
    told = {name: value for name, value in vars(arguments).items() if name != "memory_child"}
    print(
        json.dumps(
            {
                "benchmark": "generation",
                "device": device,
                "threads": torch.get_num_threads(),
                "versions": versions,
                "arguments": told,
                "results": results,
            }
        )
    )


if __name__ == "__main__":
    main()
